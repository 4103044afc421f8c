// Rows as int8 with one scale each: y = act(x) / smooth, s = max |y| / 127, q = round(y / s); or as
// float8_e4m3fn, 448 in place of 127.
//
// A warp takes a row, or a block does where rows are few, eight neighbouring elements a lane. The
// row is read twice, for its largest value and for the quotients, the second time from the cache;
// q is written once. Without an activation the values are those of the reference, bit for bit.
#include "cpu/quantize.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kGeluTanh = 1, kSilu = 2, kGeglu = 3;  // QuantizeArgs::activation

// `width` values of y from column k on.
template <class T, int width>
__device__ __forceinline__ void values(const QuantizeArgs& a, const T* x, int64_t k,
                                       float (&v)[width]) {
  gpu::load(x + k, v);
  if (a.activation == kGeglu) {
    float gate[width];
    gpu::load(x + a.dim + k, gate);
#pragma unroll
    for (int i = 0; i < width; ++i) v[i] *= gpu::gelu(gate[i]);
  }
#pragma unroll
  for (int i = 0; i < width; ++i) {
    if (a.activation == kGeluTanh) v[i] = gpu::gelu_tanh(v[i]);
    if (a.activation == kSilu) v[i] *= gpu::sigmoid(v[i]);
  }
  if (!a.smooth) return;
  if constexpr (width == 8) {
    const gpu::Eight<float> by = *reinterpret_cast<const gpu::Eight<float>*>(a.smooth + k);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __fdiv_rn(v[i], by.e[i]);
  } else {
    v[0] = __fdiv_rn(v[0], a.smooth[k]);
  }
}

}  // namespace

// Grid: rows, or kWarps of them a block. Shared, where a block has a row: float[kWarps].
template <class T, int width, bool block, bool float8>
__global__ void __launch_bounds__(kThreads, 4) quantize_rows(QuantizeArgs a) {
  constexpr float kLevels = float8 ? 448.0f : 127.0f, kTiny = kLevels * 1.17549435e-38f;  // 2^-126
  GPU_SHARED(float, shared);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t row = block ? int64_t(blockIdx.x) : int64_t(blockIdx.x) * kWarps + warp;
  if (row >= a.rows) return;  // a whole warp, and no block that meets
  const int first = block ? int(threadIdx.x) : lane;
  constexpr int kStep = (block ? kThreads : 32) * width;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  float v[width], most = 0.0f;
#pragma unroll(width == 8 ? 2 : 1)
  for (int64_t k = first * width; k < a.dim; k += kStep) {
    values<T, width>(a, x, k, v);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float size = fabsf(v[i]);
      most = fmaxf(most, size < INFINITY ? size : INFINITY);  // a NaN counts as infinite
    }
  }
  most = gpu::warp_max(most);
  if constexpr (block) {
    if (lane == 0) shared[warp] = most;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) most = fmaxf(most, shared[w]);
  }
  const bool finite = most < INFINITY, usable = finite && most >= kTiny;
  if (first == 0)
    a.s[row] = !finite ? __int_as_float(0x7fc00000) : usable ? __fdiv_rn(most, kLevels) : 0.0f;
  // kLevels / most as torch has it: a reciprocal, then a product.
  const float inverse = usable ? __fmul_rn(__fdiv_rn(1.0f, most), kLevels) : 0.0f;
  signed char* q = reinterpret_cast<signed char*>(a.q) + row * a.dim;
#pragma unroll(width == 8 ? 2 : 1)
  for (int64_t k = first * width; k < a.dim; k += kStep) {
    gpu::Bytes<width> pack = {};
    if (usable) {
      values<T, width>(a, x, k, v);
#pragma unroll
      for (int i = 0; i < width; ++i) v[i] = __fmul_rn(v[i], inverse);
      if constexpr (float8 && width == 1) {
        pack.e[0] = static_cast<signed char>(gpu::to_e4m3(v[0], 0.0f));
      } else if constexpr (float8) {
#pragma unroll
        for (int i = 0; i < width; i += 2) {
          const unsigned pair = gpu::to_e4m3(v[i], v[i + 1]);
          pack.e[i] = static_cast<signed char>(pair);
          pack.e[i + 1] = static_cast<signed char>(pair >> 8);
        }
      } else {
#pragma unroll
        for (int i = 0; i < width; ++i)
          pack.e[i] = static_cast<signed char>(fminf(fmaxf(rintf(v[i]), -kLevels), kLevels));
      }
    }
    *reinterpret_cast<gpu::Bytes<width>*>(q + k) = pack;
  }
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int64_t kFewRows = 1056;  // a warp each fills the multiprocessors of a large GPU once
constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int kInvalidConfiguration = 9;  // of cudaError_t

bool at(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <class T, int width, bool float8>
int launch(const QuantizeArgs& a, cudaStream_t stream) {
  if (a.rows > kMostBlocks) return kInvalidConfiguration;
  if (a.rows < kFewRows && a.dim > 32 * width)
    return GPU_LAUNCH((quantize_rows<T, width, true, float8>), dim3(unsigned(a.rows)),
                      dim3(kThreads), kWarps * sizeof(float), stream, a);
  return GPU_LAUNCH((quantize_rows<T, width, false, float8>),
                    dim3(unsigned((a.rows + kWarps - 1) / kWarps)), dim3(kThreads), 0, stream, a);
}

template <class T>
int launch(const QuantizeArgs& a, cudaStream_t stream) {
  const bool eight = a.dim % 8 == 0 && at(a.x, 16) && (a.rows <= 1 || a.x_stride % 8 == 0) &&
                     at(a.smooth, 16) && at(a.q, 8);
  if (a.float8) return eight ? launch<T, 8, true>(a, stream) : launch<T, 1, true>(a, stream);
  return eight ? launch<T, 8, false>(a, stream) : launch<T, 1, false>(a, stream);
}

}  // namespace

extern "C" int fastdiff_gpu_quantize(const QuantizeArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_ROWS(T, float8)                                             \
  template __global__ void quantize_rows<T, 8, true, float8>(QuantizeArgs);  \
  template __global__ void quantize_rows<T, 8, false, float8>(QuantizeArgs); \
  template __global__ void quantize_rows<T, 1, true, float8>(QuantizeArgs);  \
  template __global__ void quantize_rows<T, 1, false, float8>(QuantizeArgs);
#define FASTDIFF_INSTANTIATE(T) FASTDIFF_ROWS(T, false) FASTDIFF_ROWS(T, true)
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
