// Routing of tokens to experts: a stable counting sort of slots by expert, whose result depends on
// no order of threads, and the weighted sum of the rows that experts gave.
//
// choose: a warp a token. count: how often each expert stands in each block of kMoeSlots slots.
// scan: one block turns those into how often it stood in the blocks before (in place), and makes
// counts and offsets. place: a slot's rank is that, with its rank inside its block. Only the last
// three depend on one another, and none waits for the host: grids follow from T, K and E. Logits
// are read once, slots' experts (8 bytes) twice; weights of dropped slots are written twice.
#include "cpu/moe.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kScanThreads = 1024, kScanParts = 32;
constexpr int kSlotsOfThread = kMoeSlots / kThreads;
static_assert(kMoeMaxExperts <= kThreads);  // a thread for every expert

__device__ __forceinline__ float element(const void* data, Dtype dtype, int64_t at) {
  GPU_DTYPE_SWITCH(int(dtype), return gpu::to_float(static_cast<const T*>(data)[at]));
  return 0;
}

// Unsigned integers in the order of logits, all above 0: one of NaN, below all others; one of zero.
__device__ __forceinline__ uint32_t key_of(float logit) {
  if (logit != logit) return 1;
  logit = logit == 0 ? 0.0f : logit;
  uint32_t bits;
  memcpy(&bits, &logit, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
  float logit;
  memcpy(&logit, &bits, sizeof(logit));
  return logit;
}

__device__ __forceinline__ int warp_total(int v) {
  for (int with = 16; with; with >>= 1) v += __shfl_xor_sync(gpu::kAll, v, with);
  return v;
}

// Slots that an expert may keep.
__device__ __forceinline__ int capacity_of(const MoeRouteArgs& a) {
  return a.capacity < 0 || a.capacity > 0x7fffffff ? 0x7fffffff : int(a.capacity);
}

}  // namespace

// Lane l has the experts l + 32 i of its warp's token, their keys in registers. The highest key is
// found, and left out, K times; ties go to the lower expert. Gates follow from the keys.
template <int each>
__global__ void __launch_bounds__(kThreads) moe_choose(MoeRouteArgs a) {
  const int lane = int(threadIdx.x) % 32, E = int(a.E), K = int(a.K);
  const int64_t t = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (t >= a.T) return;
  const int64_t sample = t / (a.T / a.B);
  float logit[each], top = -INFINITY, sum = 0;
  uint32_t key[each];
  bool nan = false;
#pragma unroll
  for (int i = 0; i < each; ++i) {
    const int e = lane + 32 * i;
    logit[i] = -INFINITY;
    if (e < E) {
      logit[i] = element(a.logits, a.dtype, t * E + e);
      if (a.sample) logit[i] += element(a.sample, a.sample_dtype, sample * E + e);
    }
    key[i] = e < E ? key_of(logit[i]) : 0;
    nan |= logit[i] != logit[i];
    top = fmaxf(top, logit[i]);  // of a number and NaN, the number
  }
  nan = __any_sync(gpu::kAll, nan);
  top = gpu::warp_max(top);
#pragma unroll
  for (int i = 0; i < each; ++i) sum += expf(logit[i] - top);
  sum = gpu::warp_sum(sum);

  int64_t* experts = a.experts + t * K;
  float* weights = a.weights + t * K;
  float chosen = 0;  // of the gates that this lane writes
  for (int j = 0; j < K; ++j) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      const uint64_t ranked = uint64_t(key[i]) << 32 | ~uint32_t(lane + 32 * i);
      best = ranked > best ? ranked : best;
    }
    for (int with = 16; with; with >>= 1) {
      const uint64_t other = __shfl_xor_sync(gpu::kAll, best, with);
      best = other > best ? other : best;
    }
    const int e = int(~uint32_t(best));
#pragma unroll
    for (int i = 0; i < each; ++i)
      if (e == lane + 32 * i) key[i] = 0;
    // An infinite top has made the sum NaN.
    const float x = logit_of(uint32_t(best >> 32));
    float gate = a.sigmoid ? 1.0f / (1.0f + expf(-x)) : expf(x - top) / sum;
    if (nan) gate = __int_as_float(0x7fffffff);
    if (lane == j % 32) {
      experts[j] = e;
      weights[j] = gate;
      chosen += gate;
    }
  }
  if (!a.renormalise) return;
  chosen = gpu::warp_sum(chosen);
  for (int j = lane; j < K; j += 32) weights[j] /= chosen;  // those that this lane wrote
}

// Shared: int[E].
__global__ void __launch_bounds__(kThreads) moe_count(MoeRouteArgs a) {
  GPU_SHARED(int, hits);
  const int thread = int(threadIdx.x), E = int(a.E);
  const int64_t slots = a.T * a.K, first = int64_t(blockIdx.x) * kMoeSlots;
  if (thread < E) hits[thread] = 0;
  __syncthreads();
  for (int i = 0; i < kSlotsOfThread; ++i) {
    const int64_t slot = first + i * kThreads + thread;
    if (slot < slots) atomicAdd(&hits[a.experts[slot]], 1);  // sums of integers have no order
  }
  __syncthreads();
  if (thread < E) a.work[int64_t(blockIdx.x) * E + thread] = hits[thread];
}

// A thread has one expert and a part of the blocks. Shared: int[kScanThreads + E], sums of the
// parts, and the slots that each expert keeps.
__global__ void __launch_bounds__(kScanThreads) moe_scan(MoeRouteArgs a, int blocks) {
  GPU_SHARED(int, sums);
  int* kept = sums + kScanThreads;
  const int E = int(a.E), e = int(threadIdx.x) % E, part = int(threadIdx.x) / E;
  const int parts = kScanThreads / E < kScanParts ? kScanThreads / E : kScanParts;
  const int each = (blocks + parts - 1) / parts;
  const int64_t begin = int64_t(part) * each, end = begin + each < blocks ? begin + each : blocks;
  int sum = 0;
  if (part < parts) {
#pragma unroll 4
    for (int64_t b = begin; b < end; ++b) sum += a.work[b * E + e];
    sums[part * E + e] = sum;
  }
  __syncthreads();
  if (part < parts) {
    int before = 0;
    for (int p = 0; p < part; ++p) before += sums[p * E + e];
    if (part == parts - 1) {
      const int total = before + sum, most = capacity_of(a);
      a.counts[e] = total;
      kept[e] = total < most ? total : most;
    }
#pragma unroll 4
    for (int64_t b = begin; b < end; ++b) {
      const int here = a.work[b * E + e];
      a.work[b * E + e] = before;
      before += here;
    }
  }
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int lane = int(threadIdx.x);
  int before = 0;
  if (lane == 0) a.offsets[0] = 0;
  for (int first = 0; first < E; first += 32) {
    int upto = first + lane < E ? kept[first + lane] : 0;
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(gpu::kAll, upto, by);
      if (lane >= by) upto += other;
    }
    if (first + lane < E) a.offsets[first + lane + 1] = before + upto;
    before += __shfl_sync(gpu::kAll, upto, 31);
  }
}

// A warp has kMoeSlots / kWarps neighbouring slots, 32 at a time. Shared: int[kWarps][E], how often
// each expert stood in the warp so far, then in all slots before the warp; and for every warp the
// slots that it drops, and its part of the slots that blocks before this one drop.
__global__ void __launch_bounds__(kThreads) moe_place(MoeRouteArgs a) {
  GPU_SHARED(int, seen);
  const int E = int(a.E), lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int *mine = seen + warp * E, *late = seen + kWarps * E, *earlier = late + kWarps;
  const int most = capacity_of(a);
  const int64_t slots = a.T * a.K;
  const int64_t first = int64_t(blockIdx.x) * kMoeSlots + warp * (kMoeSlots / kWarps) + lane;
  for (int e = lane; e < E; e += 32) mine[e] = 0;
  __syncwarp();
  int expert[kSlotsOfThread], rank[kSlotsOfThread];
#pragma unroll
  for (int i = 0; i < kSlotsOfThread; ++i) {
    const int64_t slot = first + 32 * i;
    expert[i] = slot < slots ? int(a.experts[slot]) : E;
    unsigned same = gpu::kAll;  // lanes with this one's expert
    for (int bit = 1; bit <= E; bit *= 2) {
      const unsigned with = __ballot_sync(gpu::kAll, (expert[i] & bit) != 0);
      same &= expert[i] & bit ? with : ~with;
    }
    const int before = __popc(same & ((1u << lane) - 1));
    rank[i] = expert[i] < E ? mine[expert[i]] + before : 0;
    __syncwarp();
    if (expert[i] < E && before == 0) mine[expert[i]] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  int over = 0;
  if (int(threadIdx.x) < E) {
    int before = a.work[int64_t(blockIdx.x) * E + threadIdx.x];
    over = before > most ? before - most : 0;
    for (int w = 0; w < kWarps; ++w) {
      int& at = seen[w * E + int(threadIdx.x)];
      const int here = at;
      at = before;
      before += here;
    }
  }
  over = warp_total(over);
  if (lane == 0) earlier[warp] = over;
  __syncthreads();
  int dropped = 0;
#pragma unroll
  for (int i = 0; i < kSlotsOfThread; ++i) {
    if (expert[i] < E) rank[i] += mine[expert[i]];
    dropped += __popc(__ballot_sync(gpu::kAll, expert[i] < E && rank[i] >= most));
  }
  if (lane == 0) late[warp] = dropped;
  __syncthreads();
  int64_t row = a.offsets[E];  // of the warp's next slot that is dropped
  for (int w = 0; w < kWarps; ++w) row += earlier[w] + (w < warp ? late[w] : 0);
#pragma unroll
  for (int i = 0; i < kSlotsOfThread; ++i) {
    const int64_t slot = first + 32 * i;
    const bool drop = expert[i] < E && rank[i] >= most;
    const unsigned with = __ballot_sync(gpu::kAll, drop);
    if (drop) {
      a.order[row + __popc(with & ((1u << lane) - 1))] = slot;
      a.position[slot] = -1;
      a.weights[slot] = 0;
    } else if (expert[i] < E) {
      const int64_t at = a.offsets[expert[i]] + rank[i];
      a.order[at] = slot;
      a.position[slot] = at;
    }
    row += __popc(with);
  }
}

// A warp has 32 packs (Bits: 16 bytes, or one element) of one token: rows of y are read once, and
// each element of out is written once. A position outside of 0 to R - 1 adds nothing.
template <class T, class Bits>
__global__ void __launch_bounds__(kThreads) moe_combine_rows(MoeCombineArgs a, int pieces) {
  constexpr int width = int(sizeof(Bits) / sizeof(T));
  const int64_t piece = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, t = piece / pieces;
  const int64_t c = (piece % pieces * 32 + threadIdx.x % 32) * width;
  if (t >= a.T || c >= a.C) return;
  float sum[width] = {};
#pragma unroll 2
  for (int64_t j = 0; j < a.K; ++j) {
    const int64_t row = a.position[t * a.K + j];
    const bool inside = row >= 0 && row < a.R;
    const float weight = inside ? a.weights[t * a.K + j] : 0.0f;
    const T* y = static_cast<const T*>(a.y);
    const Bits pack = inside ? *reinterpret_cast<const Bits*>(y + row * a.C + c) : Bits{};
    T e[width];
    memcpy(e, &pack, sizeof(e));
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] = fmaf(weight, gpu::to_float(e[i]), sum[i]);
  }
  T e[width];
#pragma unroll
  for (int i = 0; i < width; ++i) e[i] = gpu::from_float<T>(sum[i]);
  Bits pack;
  memcpy(&pack, e, sizeof(pack));
  *reinterpret_cast<Bits*>(static_cast<T*>(a.out) + t * a.C + c) = pack;
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int kInvalidConfiguration = 9;  // of cudaError_t
constexpr int64_t kMostBlocks = 0x7fffffff;

int choose(const MoeRouteArgs& a, cudaStream_t stream) {
  const dim3 grid(unsigned((a.T + kWarps - 1) / kWarps)), block(kThreads);
  if (a.E <= 32) return GPU_LAUNCH((moe_choose<1>), grid, block, 0, stream, a);
  if (a.E <= 64) return GPU_LAUNCH((moe_choose<2>), grid, block, 0, stream, a);
  if (a.E <= 128) return GPU_LAUNCH((moe_choose<4>), grid, block, 0, stream, a);
  return GPU_LAUNCH((moe_choose<8>), grid, block, 0, stream, a);
}

template <class T, class Bits>
int combine(const MoeCombineArgs& a, cudaStream_t stream) {
  constexpr int64_t wide = 32 * int64_t(sizeof(Bits) / sizeof(T));
  const int64_t pieces = (a.C + wide - 1) / wide, blocks = (a.T * pieces + kWarps - 1) / kWarps;
  if (blocks > kMostBlocks || pieces > kMostBlocks) return kInvalidConfiguration;
  return GPU_LAUNCH((moe_combine_rows<T, Bits>), dim3(unsigned(blocks)), dim3(kThreads), 0, stream,
                    a, int(pieces));
}

template <class T>
int combine(const MoeCombineArgs& a, cudaStream_t stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(a.y) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(a.out) % 16 == 0 &&
                       a.C % int64_t(16 / sizeof(T)) == 0;
  return aligned ? combine<T, uint4>(a, stream) : combine<T, T>(a, stream);
}

}  // namespace

extern "C" int fastdiff_gpu_moe_route(const MoeRouteArgs* a, void* on) {
  const auto stream = static_cast<cudaStream_t>(on);
  const int64_t blocks = (a->T * a->K + kMoeSlots - 1) / kMoeSlots;
  const dim3 grid{unsigned(blocks)}, block(kThreads);
  const size_t experts = size_t(a->E) * sizeof(int);
  int error = 0;
  if (blocks) error = choose(*a, stream);
  if (blocks && !error) error = GPU_LAUNCH((moe_count), grid, block, experts, stream, *a);
  if (!error)
    error = GPU_LAUNCH((moe_scan), dim3(1), dim3(kScanThreads),
                       kScanThreads * sizeof(int) + experts, stream, *a, int(blocks));
  if (blocks && !error)
    error = GPU_LAUNCH((moe_place), grid, block, kWarps * (experts + 2 * sizeof(int)), stream, *a);
  return error;
}

extern "C" int fastdiff_gpu_moe_combine(const MoeCombineArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = combine<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE(T)                                             \
  template __global__ void moe_combine_rows<T, uint4>(MoeCombineArgs, int); \
  template __global__ void moe_combine_rows<T, T>(MoeCombineArgs, int);
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
template __global__ void moe_choose<1>(MoeRouteArgs);
template __global__ void moe_choose<2>(MoeRouteArgs);
template __global__ void moe_choose<4>(MoeRouteArgs);
template __global__ void moe_choose<8>(MoeRouteArgs);
#endif
}  // namespace fastdiff
