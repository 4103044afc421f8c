// Which tokens of a sample a step computes. One block for a sample: the threshold of each of the
// two orders is built bit by bit from the top, a bit being set where fewer keys lie below than are
// to be left out; tokens that equal it are left out in the order of their index. A thread has the
// tokens n = threadIdx.x + kThreads i in every pass, so that what it wrote of them it reads itself.
// Scores and counts (8 to 9 bytes a token) are read 126 times, from cache. Shared: int[kWarps + 1].
#include "cpu/select_tokens.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kWarps = 16, kThreads = 32 * kWarps;

// Unsigned integers in the order of floats; no NaN, and one zero.
__device__ __forceinline__ uint32_t ordered(float value) {
  value = value == 0 ? 0.0f : value;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Protection, then value; side 1 is the order of the highest.
__device__ __forceinline__ uint64_t key_of(const SelectTokensArgs& a, int64_t at, int side) {
  float score = a.score[at];
  const int drops = a.drops[at];
  uint32_t guard = a.most >= 0 && drops >= a.most ? uint32_t(drops) : 0;
  if (score != score) {
    guard = kNan;
    score = 0;
  }
  if (a.forced && a.forced[at]) guard = kForced;
  const int64_t waited = drops < 0 ? 0 : drops < a.steps ? drops : a.steps - 1;
  const uint32_t value = ordered(score * a.factors[side * a.steps + waited]);
  return uint64_t(guard) << 32 | (side ? ~value : value);
}

// The sum of `count` over the block, in every thread.
__device__ int block_sum(int count, int* shared) {
  for (int with = 16; with; with >>= 1) count += __shfl_xor_sync(gpu::kAll, count, with);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = count;
  __syncthreads();
  int sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  return sum;
}

// How many threads before this one have the flag; `total`: how many there are in the block.
__device__ int block_rank(bool flag, int* shared, int& total) {
  const unsigned with = __ballot_sync(gpu::kAll, flag);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  __syncthreads();
  if (lane == 0) shared[warp] = __popc(with);
  __syncthreads();
  int before = __popc(with & ((1u << lane) - 1));
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared[w];
    total += shared[w];
  }
  return before;
}

// Marks in `drops` (-1: not left out) the `wanted` first tokens of an order.
__device__ void leave_out(const SelectTokensArgs& a, int64_t first, int side, int wanted,
                          int32_t* drops, int* shared) {
  if (wanted == 0) return;
  uint64_t low = 0;
  for (int bit = 62; bit >= 0; --bit) {
    const uint64_t trial = low | uint64_t(1) << bit;
    int below = 0;
    for (int64_t n = threadIdx.x; n < a.N; n += kThreads)
      if (drops[n] < 0) below += key_of(a, first + n, side) < trial;
    if (block_sum(below, shared) < wanted) low = trial;
  }
  int below = 0;
  for (int64_t n = threadIdx.x; n < a.N; n += kThreads)
    if (drops[n] < 0) below += key_of(a, first + n, side) < low;
  int left = wanted - block_sum(below, shared);  // of those that equal it
  for (int64_t start = 0; start < a.N; start += kThreads) {
    const int64_t n = start + threadIdx.x;
    const bool here = n < a.N && drops[n] < 0;
    const uint64_t key = here ? key_of(a, first + n, side) : 0;
    int equal = 0;
    const int rank = block_rank(here && key == low, shared, equal);
    if (here && (key < low || (key == low && rank < left))) drops[n] = a.drops[first + n] + 1;
    left -= equal;
  }
}

}  // namespace

__global__ void __launch_bounds__(kThreads) select_of(SelectTokensArgs a) {
  GPU_SHARED(int, shared);
  const int64_t first = int64_t(blockIdx.x) * a.N;
  int32_t* drops = a.new_drops + first;
  for (int64_t n = threadIdx.x; n < a.N; n += kThreads) drops[n] = -1;
  leave_out(a, first, 0, int(a.low), drops, shared);
  leave_out(a, first, 1, int(a.N - a.count - a.low), drops, shared);
  int64_t* index = a.index + int64_t(blockIdx.x) * a.count;
  for (int64_t start = 0; start < a.N; start += kThreads) {
    const int64_t n = start + threadIdx.x;
    const bool chosen = n < a.N && drops[n] < 0;
    int total = 0;
    const int place = block_rank(chosen, shared, total);
    if (chosen) {
      index[place] = n;
      drops[n] = a.reset ? 0 : a.drops[first + n];
    }
    index += total;
  }
}

#ifndef __CUDACC_RTC__
extern "C" int fastdiff_gpu_select_tokens(const SelectTokensArgs* a, void* stream) {
  return GPU_LAUNCH((select_of), dim3(unsigned(a->B)), dim3(kThreads), kWarps * sizeof(int),
                    static_cast<cudaStream_t>(stream), *a);
}
#endif
}  // namespace fastdiff
