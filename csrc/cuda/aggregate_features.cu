// The sum of K models' features, weighted by the softmax over models of their logits, and its
// gradients. Every element of x is read once, but where each has its own logit: the backward then
// reads it a second time, from cache. Sums over channels have one order, without atomics.
#include "cpu/aggregate_features.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kChannels = 64;  // of a block where planes share their weights

template <int width, class T>
__device__ __forceinline__ void load(const T* p, float (&v)[width]) {
  if constexpr (width == 4) {
    gpu::load4(p, v);
  } else {
    v[0] = gpu::to_float(*p);
  }
}
template <int width, class T>
__device__ __forceinline__ void store(const float (&v)[width], T* p) {
  if constexpr (width == 4) {
    gpu::store4(v, p);
  } else {
    *p = gpu::from_float<T>(v[0]);
  }
}

template <class T>
__device__ __forceinline__ const T* sample_of(const Models& m, int64_t k, int64_t b) {
  return static_cast<const T*>(m.data) + k * m.k_stride + b * m.b_stride;
}

// exp(logit - most), 1 for the largest even where that is infinite; NaN for NaN.
__device__ __forceinline__ float below(float logit, float most) {
  return logit == most ? 1.0f : expf(logit - most);
}

// The largest of K logits at `at` of sample b, and one over the sum of what is below it. No logit
// above -inf, and NaN, give NaN.
template <class L, int width>
__device__ __forceinline__ void softmax(const Models& logits, int64_t K, int64_t b, int64_t at,
                                        float (&most)[width], float (&share)[width]) {
  float v[width];
#pragma unroll
  for (int i = 0; i < width; ++i) most[i] = -INFINITY, share[i] = 0.0f;
  for (int64_t k = 0; k < K; ++k) {
    load<width>(sample_of<L>(logits, k, b) + at, v);
#pragma unroll
    for (int i = 0; i < width; ++i) most[i] = fmaxf(most[i], v[i]);
  }
  for (int64_t k = 0; k < K; ++k) {
    load<width>(sample_of<L>(logits, k, b) + at, v);
#pragma unroll
    for (int i = 0; i < width; ++i) share[i] += below(v[i], most[i]);
  }
#pragma unroll
  for (int i = 0; i < width; ++i)
    share[i] = most[i] > -INFINITY ? 1.0f / share[i] : __int_as_float(0x7fc00000);
}

}  // namespace

// One logit for each element: a thread takes `width` of them.
template <class T, class L, int width>
__global__ void __launch_bounds__(kThreads) aggregate_each(AggregateFeaturesArgs a) {
  const int64_t size = a.C * a.P, packs = size / width;
  const int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (task >= a.B * packs) return;
  const int64_t b = task / packs, at = task % packs * width;
  float most[width], share[width], v[width], x[width], sum[width] = {};
  softmax<L, width>(a.logits, a.K, b, at, most, share);
  for (int64_t k = 0; k < a.K; ++k) {
    load<width>(sample_of<L>(a.logits, k, b) + at, v);
    load<width>(sample_of<T>(a.x, k, b) + at, x);
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] = fmaf(below(v[i], most[i]) * share[i], x[i], sum[i]);
  }
  store<width>(sum, static_cast<T*>(a.out) + b * size + at);
}

template <class T, class L, int width>
__global__ void __launch_bounds__(kThreads)
    aggregate_each_backward(AggregateFeaturesBackwardArgs a) {
  const int64_t size = a.C * a.P, packs = size / width;
  const int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (task >= a.B * packs) return;
  const int64_t b = task / packs, at = task % packs * width;
  float most[width], share[width], v[width], x[width], g[width], mean[width] = {};
  softmax<L, width>(a.logits, a.K, b, at, most, share);
  load<width>(static_cast<const T*>(a.grad) + b * size + at, g);
  for (int64_t k = 0; k < a.K; ++k) {
    load<width>(sample_of<L>(a.logits, k, b) + at, v);
    load<width>(sample_of<T>(a.x, k, b) + at, x);
#pragma unroll
    for (int i = 0; i < width; ++i)
      mean[i] = fmaf(below(v[i], most[i]) * share[i], g[i] * x[i], mean[i]);
  }
  for (int64_t k = 0; k < a.K; ++k) {
    load<width>(sample_of<L>(a.logits, k, b) + at, v);
    load<width>(sample_of<T>(a.x, k, b) + at, x);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float w = below(v[i], most[i]) * share[i];
      v[i] = w * (g[i] * x[i] - mean[i]);
      x[i] = w * g[i];
    }
    const int64_t to = (k * a.B + b) * size + at;
    store<width>(x, static_cast<T*>(a.grad_x) + to);
    store<width>(v, static_cast<L*>(a.grad_logits) + to);
  }
}

// Channels innermost, one logit for a position: a warp takes a position. Its weights lie in shared
// memory: float[kWarps][kMaxModels].
template <class T, class L, int width>
__global__ void __launch_bounds__(kThreads) aggregate_rows(AggregateFeaturesArgs a) {
  GPU_SHARED(float, shared);
  const int lane = int(threadIdx.x) % 32;
  const int64_t task = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (task >= a.B * a.P) return;
  const int64_t b = task / a.P, p = task % a.P;
  float* w = shared + threadIdx.x / 32 * kMaxModels;
  float most[1], share[1];
  softmax<L, 1>(a.logits, a.K, b, p, most, share);
  if (lane < a.K)
    w[lane] = below(gpu::to_float(sample_of<L>(a.logits, lane, b)[p]), most[0]) * share[0];
  __syncwarp();
  for (int64_t c = lane * width; c < a.C; c += 32 * width) {
    float x[width], sum[width] = {};
#pragma unroll 4
    for (int64_t k = 0; k < a.K; ++k) {
      load<width>(sample_of<T>(a.x, k, b) + p * a.C + c, x);
#pragma unroll
      for (int i = 0; i < width; ++i) sum[i] = fmaf(w[k], x[i], sum[i]);
    }
    store<width>(sum, static_cast<T*>(a.out) + task * a.C + c);
  }
}

template <class T, class L, int width>
__global__ void __launch_bounds__(kThreads)
    aggregate_rows_backward(AggregateFeaturesBackwardArgs a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t task = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (task >= a.B * a.P) return;
  const int64_t b = task / a.P, p = task % a.P;
  float most[1], share[1], mine = 0.0f, d = 0.0f;  // of model `lane`: its weight, and d
  softmax<L, 1>(a.logits, a.K, b, p, most, share);
  const T* grad = static_cast<const T*>(a.grad) + task * a.C;
  for (int64_t k = 0; k < a.K; ++k) {
    const float w = below(gpu::to_float(sample_of<L>(a.logits, k, b)[p]), most[0]) * share[0];
    T* grad_x = static_cast<T*>(a.grad_x) + ((k * a.B + b) * a.P + p) * a.C;
    float sum = 0.0f, g[width], x[width];
#pragma unroll 4
    for (int64_t c = lane * width; c < a.C; c += 32 * width) {
      load<width>(grad + c, g);
      load<width>(sample_of<T>(a.x, k, b) + p * a.C + c, x);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        sum = fmaf(g[i], x[i], sum);
        g[i] *= w;
      }
      store<width>(g, grad_x + c);
    }
    sum = gpu::warp_sum(sum);
    if (lane == k) mine = w, d = sum;
  }
  const float mean = gpu::warp_sum(mine * d);
  if (lane < a.K)
    static_cast<L*>(a.grad_logits)[(lane * a.B + b) * a.P + p] =
        gpu::from_float<L>(mine * (d - mean));
}

// Planes, one logit for a position: a block takes 32 * width positions of kChannels planes, a warp
// every kWarps-th plane. Shared: float[K][32 * width], the weights. Four blocks are asked for, up
// to 64 registers: else the compilers settle on 48, and one of them spills.
template <class T, class L, int width>
__global__ void __launch_bounds__(kThreads, width == 4 ? 4 : 0)
    aggregate_planes(AggregateFeaturesArgs a) {
  GPU_SHARED(float, weights);
  constexpr int kTile = 32 * width;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t tiles = (a.P + kTile - 1) / kTile, groups = (a.C + kChannels - 1) / kChannels;
  const int64_t b = blockIdx.x / tiles / groups, first = blockIdx.x / tiles % groups * kChannels;
  const int64_t p = blockIdx.x % tiles * kTile + lane * width;
  const bool live = p < a.P;
  const int K = int(a.K);
  if (live) {
    float most[width], share[width], v[width];
    softmax<L, width>(a.logits, a.K, b, p, most, share);
#pragma unroll 1
    for (int k = warp; k < K; k += kWarps) {
      load<width>(sample_of<L>(a.logits, k, b) + p, v);
#pragma unroll
      for (int i = 0; i < width; ++i)
        weights[k * kTile + lane * width + i] = below(v[i], most[i]) * share[i];
    }
  }
  __syncthreads();
  if (!live) return;
  const int64_t end = first + kChannels < a.C ? first + kChannels : a.C;
  for (int64_t c = first + warp; c < end; c += kWarps) {
    float x[width], sum[width] = {};
    const T* from = sample_of<T>(a.x, 0, b) + c * a.P + p;
#pragma unroll 4
    for (int k = 0; k < K; ++k, from += a.x.k_stride) {
      load<width>(from, x);
#pragma unroll
      for (int i = 0; i < width; ++i)
        sum[i] = fmaf(weights[k * kTile + lane * width + i], x[i], sum[i]);
    }
    store<width>(sum, static_cast<T*>(a.out) + (b * a.C + c) * a.P + p);
  }
}

// A block takes 32 positions of all planes, a warp every kWarps-th plane. Shared:
// float[K][kWarps][32], the warps' shares of d; then those of warp 0 hold d. (In this order the
// shares of a model are a fixed distance apart, and one register addresses them.)
template <class T, class L>
__global__ void __launch_bounds__(kThreads)
    aggregate_planes_backward(AggregateFeaturesBackwardArgs a) {
  GPU_SHARED(float, d);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t tiles = (a.P + 31) / 32, b = blockIdx.x / tiles;
  const int64_t p = blockIdx.x % tiles * 32 + lane;
  const bool live = p < a.P;
  const int K = int(a.K);
  float most[1], share[1];
  if (live) {
    softmax<L, 1>(a.logits, a.K, b, p, most, share);
    for (int k = 0; k < K; ++k) {
      const float w = below(gpu::to_float(sample_of<L>(a.logits, k, b)[p]), most[0]) * share[0];
      const T* grad = static_cast<const T*>(a.grad) + (b * a.C + warp) * a.P + p;
      const T* x = sample_of<T>(a.x, k, b) + warp * a.P + p;
      T* grad_x = static_cast<T*>(a.grad_x) + ((k * a.B + b) * a.C + warp) * a.P + p;
      const int64_t step = kWarps * a.P;
      float sum = 0.0f;
#pragma unroll 4
      for (int64_t c = warp; c < a.C; c += kWarps) {
        const float g = gpu::to_float(*grad);
        sum = fmaf(g, gpu::to_float(*x), sum);
        *grad_x = gpu::from_float<T>(w * g);
        grad += step, x += step, grad_x += step;
      }
      d[(k * kWarps + warp) * 32 + lane] = sum;
    }
  }
  __syncthreads();
  if (warp || !live) return;
  float mean = 0.0f;
  for (int k = 0; k < K; ++k) {
    float sum = 0.0f, *shares = d + k * kWarps * 32 + lane;
    for (int other = 0; other < kWarps; ++other) sum += shares[other * 32];
    shares[0] = sum;
    mean =
        fmaf(below(gpu::to_float(sample_of<L>(a.logits, k, b)[p]), most[0]) * share[0], sum, mean);
  }
  for (int k = 0; k < K; ++k) {
    const float w = below(gpu::to_float(sample_of<L>(a.logits, k, b)[p]), most[0]) * share[0];
    static_cast<L*>(a.grad_logits)[(k * a.B + b) * a.P + p] =
        gpu::from_float<L>(w * (d[k * kWarps * 32 + lane] - mean));
  }
}

#ifndef __CUDACC_RTC__
namespace {

template <class T>
bool aligned(const Models& m) {
  return reinterpret_cast<uintptr_t>(m.data) % (4 * sizeof(T)) == 0 && m.k_stride % 4 == 0 &&
         m.b_stride % 4 == 0;
}

unsigned blocks(int64_t tasks, int64_t of_block) {
  return unsigned((tasks + of_block - 1) / of_block);
}

template <class T, class L, int width>
int launch(const AggregateFeaturesArgs& a, cudaStream_t stream) {
  const dim3 block(kThreads);
  if (a.maps == Maps::kEach) {
    const dim3 grid(blocks(a.B * a.C * a.P / width, kThreads));
    return GPU_LAUNCH((aggregate_each<T, L, width>), grid, block, 0, stream, a);
  }
  if (a.maps == Maps::kRows) {
    const size_t shared = kWarps * kMaxModels * sizeof(float);
    const dim3 grid(blocks(a.B * a.P, kWarps));
    return GPU_LAUNCH((aggregate_rows<T, L, width>), grid, block, shared, stream, a);
  }
  const dim3 grid(unsigned(a.B) * blocks(a.P, 32 * width) * blocks(a.C, kChannels));
  const size_t shared = size_t(a.K) * 32 * width * sizeof(float);
  return GPU_LAUNCH((aggregate_planes<T, L, width>), grid, block, shared, stream, a);
}

template <class T, class L, int width>
int launch(const AggregateFeaturesBackwardArgs& a, cudaStream_t stream) {
  const dim3 block(kThreads);
  if (a.maps == Maps::kEach) {
    const dim3 grid(blocks(a.B * a.C * a.P / width, kThreads));
    return GPU_LAUNCH((aggregate_each_backward<T, L, width>), grid, block, 0, stream, a);
  }
  if (a.maps == Maps::kRows) {
    const dim3 grid(blocks(a.B * a.P, kWarps));
    return GPU_LAUNCH((aggregate_rows_backward<T, L, width>), grid, block, 0, stream, a);
  }
  const dim3 grid(unsigned(a.B) * blocks(a.P, 32));
  const size_t shared = size_t(kWarps) * a.K * 32 * sizeof(float);
  return GPU_LAUNCH((aggregate_planes_backward<T, L>), grid, block, shared, stream, a);
}

// Whether four neighbours of each tensor are aligned to all four. In rows the logits are scalars.
template <class T, class L, class Args>
bool four(const Args& a, std::initializer_list<const void*> dense) {
  const int64_t run = a.maps == Maps::kEach ? a.C * a.P : a.maps == Maps::kRows ? a.C : a.P;
  bool yes = run % 4 == 0 && aligned<T>(a.x);
  if (a.maps != Maps::kRows) yes = yes && aligned<L>(a.logits);
  for (const void* p : dense) yes = yes && aligned<float>(Models{p, 0, 0});
  return yes;
}

template <class T, class L>
int launch(const AggregateFeaturesArgs& a, cudaStream_t stream) {
  return four<T, L>(a, {a.out}) ? launch<T, L, 4>(a, stream) : launch<T, L, 1>(a, stream);
}

template <class T, class L>
int launch(const AggregateFeaturesBackwardArgs& a, cudaStream_t stream) {
  const bool wide = four<T, L>(a, {a.grad, a.grad_x, a.grad_logits});
  return wide ? launch<T, L, 4>(a, stream) : launch<T, L, 1>(a, stream);
}

template <class T, class Args>
int either(const Args& a, cudaStream_t stream) {
  return a.wide ? launch<T, float>(a, stream) : launch<T, T>(a, stream);
}

}  // namespace

extern "C" int fastdiff_gpu_aggregate_features(const AggregateFeaturesArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = either<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}

extern "C" int fastdiff_gpu_aggregate_features_backward(const AggregateFeaturesBackwardArgs* a,
                                                        void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = either<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE_WIDTH(T, L, width)                                                 \
  template __global__ void aggregate_each<T, L, width>(AggregateFeaturesArgs);                  \
  template __global__ void aggregate_rows<T, L, width>(AggregateFeaturesArgs);                  \
  template __global__ void aggregate_planes<T, L, width>(AggregateFeaturesArgs);                \
  template __global__ void aggregate_each_backward<T, L, width>(AggregateFeaturesBackwardArgs); \
  template __global__ void aggregate_rows_backward<T, L, width>(AggregateFeaturesBackwardArgs);
#define FASTDIFF_INSTANTIATE(T, L)    \
  FASTDIFF_INSTANTIATE_WIDTH(T, L, 4) \
  FASTDIFF_INSTANTIATE_WIDTH(T, L, 1) \
  template __global__ void aggregate_planes_backward<T, L>(AggregateFeaturesBackwardArgs);
FASTDIFF_INSTANTIATE(float, float)
FASTDIFF_INSTANTIATE(gpu::bf16, gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::bf16, float)
FASTDIFF_INSTANTIATE(gpu::f16, gpu::f16)
FASTDIFF_INSTANTIATE(gpu::f16, float)
#endif
}  // namespace fastdiff
