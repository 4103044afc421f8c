// Group norm with affine map, scale, shift and SiLU: one block per (sample, group). The group is
// read twice, the second time from L2, and written once.
#include "cpu/group_norm_silu.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// Sums of two values over the block; `partial` is shared memory of 2 * kWarps floats.
__device__ __forceinline__ void block_sums(float& a, float& b, float* partial) {
  a = gpu::warp_sum(a), b = gpu::warp_sum(b);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  if (lane == 0) partial[2 * warp] = a, partial[2 * warp + 1] = b;
  __syncthreads();
  a = b = 0.0f;
  for (int w = 0; w < kWarps; ++w) a += partial[2 * w], b += partial[2 * w + 1];
}

}  // namespace

// Contiguous: a group is one run of C/G rows of P, and `width` neighbours share a channel.
// Channels last: it is C/G neighbours at each of P positions, C apart.
template <class T, int width, bool channels_last>
__global__ void __launch_bounds__(kThreads) group_norm_silu_blocks(GroupNormSiluArgs a) {
  GPU_SHARED(float, shared);  // partial sums, then mul and add of every channel of the group
  // A group has less than 2^31 elements (launch): 64-bit division is a subroutine, at every pack.
  const unsigned per_group = unsigned(a.C / a.groups), positions = unsigned(a.P);
  const unsigned packs = per_group * positions / width;
  float *mul = shared + 2 * kWarps, *add = mul + per_group;
  const unsigned groups = unsigned(a.groups);
  const int64_t b = blockIdx.x / groups, first = int64_t(blockIdx.x % groups) * per_group;
  const int64_t base = channels_last ? b * a.P * a.C + first : (b * a.C + first) * a.P;
  const T* x = static_cast<const T*>(a.x) + base;
  T* y = static_cast<T*>(a.y) + base;
  auto at = [&](unsigned pack) {
    const unsigned i = pack * width;
    return channels_last ? int64_t(i / per_group) * a.C + i % per_group : int64_t(i);
  };
  auto load = [&](int64_t i, float (&v)[width]) {
    if constexpr (width == 4) {
      gpu::load4(x + i, v);
    } else {
      v[0] = gpu::to_float(x[i]);
    }
  };

  // Deviations from the mean of the first elements, so that a large mean does not cancel.
  const unsigned lane = threadIdx.x % 32, all = per_group * positions, few = all < 32 ? all : 32;
  const int64_t place =
      channels_last ? int64_t(lane / per_group) * a.C + lane % per_group : int64_t(lane);
  const float origin = gpu::warp_sum(lane < few ? gpu::to_float(x[place]) : 0.0f) / float(few);
  float sum = 0.0f, square = 0.0f, v[width];
  for (unsigned pack = threadIdx.x; pack < packs; pack += kThreads) {
    load(at(pack), v);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float d = v[i] - origin;
      sum += d;
      square = fmaf(d, d, square);
    }
  }
  block_sums(sum, square, shared);
  const float n = float(all), mean = sum / n;  // of the deviations
  const float rstd = rsqrtf(fmaxf(square / n - mean * mean, 0.0f) + a.eps);
  const float center = origin + mean, rest = mean - (center - origin);  // what rounding left out

  auto parameter = [](const void* p, int64_t i) {
    return gpu::to_float(static_cast<const T*>(p)[i]);
  };
  for (unsigned k = threadIdx.x; k < per_group; k += kThreads) {
    const int64_t c = first + k;
    const float gain = a.scale ? 1.0f + parameter(a.scale, b * a.scale_stride + c) : 1.0f;
    mul[k] = rstd * gain * (a.weight ? parameter(a.weight, c) : 1.0f);
    add[k] = (a.bias ? parameter(a.bias, c) * gain : 0.0f) +
             (a.shift ? parameter(a.shift, b * a.shift_stride + c) : 0.0f) - rest * mul[k];
  }
  __syncthreads();

  for (unsigned pack = threadIdx.x; pack < packs; pack += kThreads) {
    const int64_t i = at(pack);
    load(i, v);
#pragma unroll
    for (int j = 0; j < width; ++j) {
      const unsigned k = channels_last ? pack * width % per_group + j : pack * width / positions;
      const float u = fmaf(v[j] - center, mul[k], add[k]);
      v[j] = a.silu ? __fdividef(u, 1.0f + __expf(-u)) : u;
    }
    if constexpr (width == 4) {
      gpu::store4(v, y + i);
    } else {
      y[i] = gpu::from_float<T>(v[0]);
    }
  }
}

#ifndef __CUDACC_RTC__
namespace {

template <class T, int width, bool channels_last>
int launch(const GroupNormSiluArgs& a, cudaStream_t stream) {
  const size_t shared = size_t(2 * kWarps + 2 * (a.C / a.groups)) * sizeof(float);
  return GPU_LAUNCH((group_norm_silu_blocks<T, width, channels_last>),
                    dim3(unsigned(a.B * a.groups)), dim3(kThreads), shared, stream, a);
}

template <class T>
int launch(const GroupNormSiluArgs& a, cudaStream_t stream) {
  constexpr int kInvalidValue = 1;  // of cudaError_t
  if (a.C / a.groups * a.P >= int64_t(1) << 31) return kInvalidValue;
  const int64_t run = a.channels_last ? a.C / a.groups : a.P;
  bool four = run % 4 == 0;
  for (const void* p : {a.x, static_cast<const void*>(a.y)})
    four = four && reinterpret_cast<uintptr_t>(p) % (4 * sizeof(T)) == 0;
  if (a.channels_last) return four ? launch<T, 4, true>(a, stream) : launch<T, 1, true>(a, stream);
  return four ? launch<T, 4, false>(a, stream) : launch<T, 1, false>(a, stream);
}

}  // namespace

extern "C" int fastdiff_gpu_group_norm_silu(const GroupNormSiluArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE(T)                                                    \
  template __global__ void group_norm_silu_blocks<T, 4, true>(GroupNormSiluArgs);  \
  template __global__ void group_norm_silu_blocks<T, 4, false>(GroupNormSiluArgs); \
  template __global__ void group_norm_silu_blocks<T, 1, true>(GroupNormSiluArgs);  \
  template __global__ void group_norm_silu_blocks<T, 1, false>(GroupNormSiluArgs);
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
