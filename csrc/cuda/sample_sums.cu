// Sums over samples of x^2, x y or (x - y)^2. A block takes a piece of a sample, a thread four
// neighbouring elements at a time, which it adds in float32; sums of threads, and of pieces, are
// added in float64 in an order that the size of a sample alone decides, without atomics. Inputs are
// read once; samples of several pieces take a second launch, a warp for each. Shared:
// double[kWarps].
#include "cpu/sample_sums.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

__device__ __forceinline__ double warp_sum(double v) {
  for (int with = 16; with; with >>= 1) v += __shfl_xor_sync(gpu::kAll, v, with);
  return v;
}

// Elements i to i + 3 of a sample, zeros at and past `end`.
template <bool wide, class T>
__device__ __forceinline__ void load(const T* p, int64_t i, int64_t end, float (&v)[4]) {
  if constexpr (wide) {
    gpu::load4(p + i, v);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = i + k < end ? gpu::to_float(p[i + k]) : 0.0f;
  }
}

}  // namespace

// `wide`: every sample starts at an address for loads of four elements and has a multiple of four.
template <class T, bool wide>
__global__ void __launch_bounds__(kThreads) sums_of_pieces(SampleSumsArgs a) {
  GPU_SHARED(double, shared);
  const int64_t b = blockIdx.x / a.pieces, from = blockIdx.x % a.pieces * kSumsPiece;
  const int64_t end = from + kSumsPiece < a.N ? from + kSumsPiece : a.N;
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride;
  const T* y = a.y ? static_cast<const T*>(a.y) + b * a.y_stride : nullptr;
  float sums[4] = {};
#pragma unroll 4
  for (int64_t i = from + 4 * int(threadIdx.x); i < end; i += 4 * kThreads) {
    float u[4], v[4];
    load<wide>(x, i, end, u);
    if (y) load<wide>(y, i, end, v);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!y) v[k] = u[k];
      if (a.difference) u[k] = v[k] = u[k] - v[k];
      sums[k] = fmaf(u[k], v[k], sums[k]);
    }
  }
  const double own = (double(sums[0]) + double(sums[1])) + (double(sums[2]) + double(sums[3]));
  const double of_warp = warp_sum(own);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = of_warp;
  __syncthreads();
  if (threadIdx.x) return;
  double sum = 0.0;
  for (int w = 0; w < kWarps; ++w) sum += shared[w];
  if (a.parts)
    a.parts[blockIdx.x] = sum;
  else
    a.out[blockIdx.x] = float(sum);
}

__global__ void __launch_bounds__(kThreads) add_pieces(SampleSumsArgs a) {
  const int64_t b = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (b >= a.B) return;
  double sum = 0.0;
  for (int64_t i = threadIdx.x % 32; i < a.pieces; i += 32) sum += a.parts[b * a.pieces + i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) a.out[b] = float(sum);
}

#ifndef __CUDACC_RTC__
namespace {

template <class T>
bool aligned(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % (4 * sizeof(T)) == 0 && stride % 4 == 0;
}

template <class T>
int launch(const SampleSumsArgs& a, cudaStream_t stream) {
  const bool wide =
      a.N % 4 == 0 && aligned<T>(a.x, a.x_stride) && (!a.y || aligned<T>(a.y, a.y_stride));
  const dim3 grid(unsigned(a.B * a.pieces)), block(kThreads);
  const size_t shared = kWarps * sizeof(double);
  const int error = wide ? GPU_LAUNCH((sums_of_pieces<T, true>), grid, block, shared, stream, a)
                         : GPU_LAUNCH((sums_of_pieces<T, false>), grid, block, shared, stream, a);
  if (error || !a.parts) return error;
  return GPU_LAUNCH((add_pieces), dim3(unsigned((a.B + kWarps - 1) / kWarps)), block, 0, stream, a);
}

}  // namespace

extern "C" int fastdiff_gpu_sample_sums(const SampleSumsArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE(T)                                     \
  template __global__ void sums_of_pieces<T, true>(SampleSumsArgs); \
  template __global__ void sums_of_pieces<T, false>(SampleSumsArgs);
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
