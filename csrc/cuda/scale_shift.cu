// y = x scale + shift per channel, and the gradients of both. Every element is read once and
// written once; sums over positions are taken in pieces whose order depends on shapes alone,
// without atomics. A sample whose index is outside of 0 to A - 1 gives NaN and adds to no row.
#include "cpu/scale_shift.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kRows = 4;          // positions of a warp: its scale and shift are read once for them
constexpr int kPlanePart = 1024;  // elements of a plane that a warp takes

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

// The row of sample b, or one below 0 where its index names none.
template <class Args>
__device__ __forceinline__ int64_t row_of(const Args& a, int64_t b) {
  if (!a.index) return 0;
  const int64_t row = a.index[b * a.index_stride];
  return row < a.A ? row : -1;
}

template <class T>
__device__ __forceinline__ const T* at(const Positions& x, int64_t b, int64_t p) {
  return static_cast<const T*>(x.data) + b * x.b_stride + p * x.p_stride;
}

// `width` values of a row from channel c on; NaN where there is no row, 0 where there are no rows.
template <int width, class S>
__device__ __forceinline__ void channels(const ChannelRows& rows, int64_t row, int64_t c,
                                         float (&v)[width]) {
  if (rows.data && row >= 0) {
    load<width>(static_cast<const S*>(rows.data) + row * rows.stride + c, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < width; ++i) v[i] = rows.data ? __int_as_float(0x7fc00000) : 0.0f;
}

}  // namespace

// Channels innermost: a warp takes kRows positions of a sample.
template <class T, class S, int width>
__global__ void __launch_bounds__(kThreads) scale_shift_rows(ScaleShiftArgs a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t parts = (a.P + kRows * kWarps - 1) / (kRows * kWarps);
  const int64_t b = blockIdx.x / parts;
  const int64_t first = (blockIdx.x % parts * kWarps + threadIdx.x / 32) * kRows;
  const int64_t row = row_of(a, b);
  const bool shifts = a.shift.data;
  for (int64_t c = lane * width; c < a.C; c += 32 * width) {
    float scale[width], shift[width], v[kRows][width];
    channels<width, S>(a.scale, row, c, scale);
    channels<width, S>(a.shift, row, c, shift);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (first + r < a.P) load<width>(at<T>(a.x, b, first + r) + c, v[r]);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (first + r >= a.P) break;
#pragma unroll
      for (int i = 0; i < width; ++i)
        v[r][i] = shifts ? fmaf(v[r][i], scale[i], shift[i]) : v[r][i] * scale[i];
      store<width>(v[r], static_cast<T*>(a.out) + (b * a.P + first + r) * a.C + c);
    }
  }
}

// Planes: a warp takes kPlanePart elements of one.
template <class T, class S, int width>
__global__ void __launch_bounds__(kThreads) scale_shift_planes(ScaleShiftArgs a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t parts = (a.P + kPlanePart - 1) / kPlanePart;
  const int64_t task = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (task >= a.B * a.C * parts) return;
  const int64_t plane = task / parts, from = task % parts * kPlanePart;
  const int64_t to = from + kPlanePart < a.P ? from + kPlanePart : a.P;
  const int64_t row = row_of(a, plane / a.C);
  float scale[1], shift[1], v[width];
  channels<1, S>(a.scale, row, plane % a.C, scale);
  channels<1, S>(a.shift, row, plane % a.C, shift);
  const bool shifts = a.shift.data;
  const T* x = static_cast<const T*>(a.x.data) + plane * a.P;
  T* out = static_cast<T*>(a.out) + plane * a.P;
#pragma unroll 4
  for (int64_t p = from + lane * width; p < to; p += 32 * width) {
    load<width>(x + p, v);
#pragma unroll
    for (int i = 0; i < width; ++i)
      v[i] = shifts ? fmaf(v[i], scale[0], shift[0]) : v[i] * scale[0];
    store<width>(v, out + p);
  }
}

// Channels innermost: a block takes a piece of a sample's positions and 32 * width channels, a warp
// every kWarps-th of the positions. Shared: float[kWarps][2][32 * width], the warps' sums.
template <class T, class S, int width>
__global__ void __launch_bounds__(kThreads) backward_rows(ScaleShiftBackwardArgs a) {
  GPU_SHARED(float, sums);
  constexpr int kTile = 32 * width;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t tiles = (a.C + kTile - 1) / kTile, task = blockIdx.x / tiles;
  const int64_t b = task / a.pieces, from = task % a.pieces * a.piece;
  const int64_t to = from + a.piece < a.P ? from + a.piece : a.P;
  const int64_t first = blockIdx.x % tiles * kTile, c = first + lane * width;
  float scale[width], g[width], x[width], sum_gx[width] = {}, sum_g[width] = {};
  if (c < a.C) {
    channels<width, S>(a.scale, row_of(a, b), c, scale);
#pragma unroll 4
    for (int64_t p = from + warp; p < to; p += kWarps) {
      load<width>(at<T>(a.grad, b, p) + c, g);
      load<width>(at<T>(a.x, b, p) + c, x);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        sum_gx[i] = fmaf(g[i], x[i], sum_gx[i]);
        sum_g[i] += g[i];
        g[i] *= scale[i];
      }
      store<width>(g, static_cast<T*>(a.grad_x) + (b * a.P + p) * a.C + c);
    }
  }
#pragma unroll
  for (int i = 0; i < width; ++i) {
    sums[2 * warp * kTile + lane * width + i] = sum_gx[i];
    sums[(2 * warp + 1) * kTile + lane * width + i] = sum_g[i];
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < 2 * kTile; i += kThreads) {
    const int64_t channel = first + i % kTile;
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += sums[2 * w * kTile + i];
    if (channel < a.C) a.parts[(task * 2 + i / kTile) * a.C + channel] = sum;
  }
}

// Planes: a warp takes a piece of one.
template <class T, class S, int width>
__global__ void __launch_bounds__(kThreads) backward_planes(ScaleShiftBackwardArgs a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t task = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (task >= a.B * a.C * a.pieces) return;
  const int64_t plane = task / a.pieces, piece = task % a.pieces, from = piece * a.piece;
  const int64_t to = from + a.piece < a.P ? from + a.piece : a.P;
  const int64_t b = plane / a.C, c = plane % a.C;
  float scale[1], g[width], x[width], sum_gx = 0.0f, sum_g = 0.0f;
  channels<1, S>(a.scale, row_of(a, b), c, scale);
  const T* grads = static_cast<const T*>(a.grad.data) + plane * a.P;
  const T* values = static_cast<const T*>(a.x.data) + plane * a.P;
  T* grad_x = static_cast<T*>(a.grad_x) + plane * a.P;
#pragma unroll 4
  for (int64_t p = from + lane * width; p < to; p += 32 * width) {
    load<width>(grads + p, g);
    load<width>(values + p, x);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      sum_gx = fmaf(g[i], x[i], sum_gx);
      sum_g += g[i];
      g[i] *= scale[0];
    }
    store<width>(g, grad_x + p);
  }
  sum_gx = gpu::warp_sum(sum_gx), sum_g = gpu::warp_sum(sum_g);
  if (lane) return;
  float* parts = a.parts + (b * a.pieces + piece) * 2 * a.C + c;
  parts[0] = sum_gx, parts[a.C] = sum_g;
}

// A block takes 32 channels of one row and one of its two sums; its warps take every kWarps-th of
// the pieces of the row's samples. Shared: float[kWarps][32].
__global__ void __launch_bounds__(kThreads) add_parts(ScaleShiftBackwardArgs a) {
  GPU_SHARED(float, sums);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t tiles = (a.C + 31) / 32, task = blockIdx.x / tiles;
  const int64_t row = task / 2, which = task % 2, c = blockIdx.x % tiles * 32 + lane;
  float sum = 0.0f;
  for (int64_t b = 0; b < a.B; ++b) {
    if (row_of(a, b) != row || c >= a.C) continue;
#pragma unroll 4
    for (int64_t n = warp; n < a.pieces; n += kWarps)
      sum += a.parts[((b * a.pieces + n) * 2 + which) * a.C + c];
  }
  sums[warp * 32 + lane] = sum;
  __syncthreads();
  if (warp || c >= a.C) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w * 32 + lane];
  (which ? a.grad_shift : a.grad_scale)[row * a.C + c] = sum;
}

#ifndef __CUDACC_RTC__
namespace {

template <class T>
bool aligned(const Positions& x) {
  return reinterpret_cast<uintptr_t>(x.data) % (4 * sizeof(T)) == 0 && x.b_stride % 4 == 0 &&
         x.p_stride % 4 == 0;
}

template <class S>
bool aligned(const ChannelRows& rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % (4 * sizeof(S)) == 0 && rows.stride % 4 == 0;
}

// In planes positions are neighbours, and all else of their place is a multiple of P.
template <class T, class Args>
bool four(const Args& a, const Positions& t) {
  return a.planes ? a.P % 4 == 0 && aligned<T>(Positions{t.data, 0, 0})
                  : a.C % 4 == 0 && aligned<T>(t);
}

unsigned blocks(int64_t tasks, int64_t of_block) {
  return unsigned((tasks + of_block - 1) / of_block);
}

template <class T, class S, int width>
int launch(const ScaleShiftArgs& a, cudaStream_t stream) {
  if (a.planes) {
    const int64_t tasks = a.B * a.C * ((a.P + kPlanePart - 1) / kPlanePart);
    return GPU_LAUNCH((scale_shift_planes<T, S, width>), dim3(blocks(tasks, kWarps)),
                      dim3(kThreads), 0, stream, a);
  }
  const dim3 grid(unsigned(a.B) * blocks(a.P, kRows * kWarps));
  return GPU_LAUNCH((scale_shift_rows<T, S, width>), grid, dim3(kThreads), 0, stream, a);
}

template <class T, class S>
int launch(const ScaleShiftArgs& a, cudaStream_t stream) {
  const bool wide = four<T>(a, a.x) && four<T>(a, Positions{a.out, 0, 0}) &&
                    (a.planes || (aligned<S>(a.scale) && aligned<S>(a.shift)));
  return wide ? launch<T, S, 4>(a, stream) : launch<T, S, 1>(a, stream);
}

template <class T, class S, int width>
int launch(const ScaleShiftBackwardArgs& a, cudaStream_t stream) {
  int error;
  if (a.planes) {
    error = GPU_LAUNCH((backward_planes<T, S, width>), dim3(blocks(a.B * a.C * a.pieces, kWarps)),
                       dim3(kThreads), 0, stream, a);
  } else {
    const dim3 grid(unsigned(a.B * a.pieces) * blocks(a.C, 32 * width));
    error = GPU_LAUNCH((backward_rows<T, S, width>), grid, dim3(kThreads),
                       2 * kThreads * width * sizeof(float), stream, a);
  }
  if (error) return error;
  const dim3 grid(unsigned(a.A) * 2 * blocks(a.C, 32));
  return GPU_LAUNCH(add_parts, grid, dim3(kThreads), kThreads * sizeof(float), stream, a);
}

template <class T, class S>
int launch(const ScaleShiftBackwardArgs& a, cudaStream_t stream) {
  const bool wide = four<T>(a, a.x) && four<T>(a, a.grad) &&
                    four<T>(a, Positions{a.grad_x, 0, 0}) && (a.planes || aligned<S>(a.scale));
  return wide ? launch<T, S, 4>(a, stream) : launch<T, S, 1>(a, stream);
}

template <class T, class Args>
int either(const Args& a, cudaStream_t stream) {
  return a.wide ? launch<T, float>(a, stream) : launch<T, T>(a, stream);
}

}  // namespace

extern "C" int fastdiff_gpu_scale_shift(const ScaleShiftArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = either<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}

extern "C" int fastdiff_gpu_scale_shift_backward(const ScaleShiftBackwardArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = either<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE(T, S)                                           \
  template __global__ void scale_shift_rows<T, S, 4>(ScaleShiftArgs);        \
  template __global__ void scale_shift_rows<T, S, 1>(ScaleShiftArgs);        \
  template __global__ void scale_shift_planes<T, S, 4>(ScaleShiftArgs);      \
  template __global__ void scale_shift_planes<T, S, 1>(ScaleShiftArgs);      \
  template __global__ void backward_rows<T, S, 4>(ScaleShiftBackwardArgs);   \
  template __global__ void backward_rows<T, S, 1>(ScaleShiftBackwardArgs);   \
  template __global__ void backward_planes<T, S, 4>(ScaleShiftBackwardArgs); \
  template __global__ void backward_planes<T, S, 1>(ScaleShiftBackwardArgs);
FASTDIFF_INSTANTIATE(float, float)
FASTDIFF_INSTANTIATE(gpu::bf16, gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::bf16, float)
FASTDIFF_INSTANTIATE(gpu::f16, gpu::f16)
FASTDIFF_INSTANTIATE(gpu::f16, float)
#endif
}  // namespace fastdiff
