// Patches of a convolution as int8 with one scale each: s = max |patch| / 127, round(patch / s).
//
// A warp takes a pixel of the result, eight neighbouring elements of its patch a lane, which lie in
// one tap. The patch is read twice, for its largest value and for the integers, the second time
// from the cache, in which neighbouring patches find most of theirs as well.
#include "cpu/quantize_patches.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr float kLevels = 127.0f;
constexpr float kTiny = 127.0f * 1.17549435e-38f;  // 127 2^-126

// Where element k of the patch of a warp's pixel lies; null outside of the picture.
template <class T>
__device__ __forceinline__ const T* place(const QuantizePatchesArgs& a, const T* x, int64_t top,
                                          int64_t left, unsigned k) {
  const unsigned channels = unsigned(a.channels), size = unsigned(a.size);
  const unsigned tap = k / channels, c = k % channels;
  const int64_t h = top + tap / size, w = left + tap % size;
  const int up = a.upsample ? 1 : 0;
  if (h < 0 || h >= a.height << up || w < 0 || w >= a.width << up) return nullptr;
  return x + (h >> up) * a.x_row + (w >> up) * a.x_column + c;
}

}  // namespace

// Grid: kWarps pixels of the result a block.
template <class T, int width>
__global__ void __launch_bounds__(kThreads, 4) patch_rows(QuantizePatchesArgs a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + int(threadIdx.x) / 32;
  if (row >= a.batch * a.rows * a.columns) return;  // a whole warp
  const int64_t line = row / a.columns;
  const int64_t top = line % a.rows * a.stride - a.padding;
  const int64_t left = row % a.columns * a.stride - a.padding;
  const T* x = static_cast<const T*>(a.x) + line / a.rows * a.x_batch;
  const unsigned dim = unsigned(a.size * a.size * a.channels);
  float v[width], most = 0.0f;
  for (unsigned k = lane * width; k < dim; k += 32 * width) {
    const T* from = place(a, x, top, left, k);
    if (!from) continue;
    gpu::load<T, width>(from, v);
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float size = fabsf(v[i]);
      most = fmaxf(most, size < INFINITY ? size : INFINITY);  // a NaN counts as infinite
    }
  }
  most = gpu::warp_max(most);
  const bool usable = most < INFINITY && most >= kTiny;
  if (lane == 0)
    a.s[row] = usable            ? __fdiv_rn(most, kLevels)
               : most < INFINITY ? 0.0f
                                 : __int_as_float(0x7fc00000);
  // As torch has 127 / most: a reciprocal, then a product.
  const float inverse = usable ? __fmul_rn(__fdiv_rn(1.0f, most), kLevels) : 0.0f;
  signed char* q = reinterpret_cast<signed char*>(a.q) + row * dim;
  for (unsigned k = lane * width; k < dim; k += 32 * width) {
    gpu::Bytes<width> pack = {};
    const T* from = usable ? place(a, x, top, left, k) : nullptr;
    if (from) {
      gpu::load<T, width>(from, v);
#pragma unroll
      for (int i = 0; i < width; ++i)
        pack.e[i] = static_cast<signed char>(
            fminf(fmaxf(rintf(__fmul_rn(v[i], inverse)), -kLevels), kLevels));
    }
    *reinterpret_cast<gpu::Bytes<width>*>(q + k) = pack;
  }
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int64_t kMostBlocks = 0x7fffffff, kMostElements = 0x7fffffff;
constexpr int kInvalidConfiguration = 9;  // of cudaError_t

bool at(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <class T>
int launch(const QuantizePatchesArgs& a, cudaStream_t stream) {
  const int64_t blocks = (a.batch * a.rows * a.columns + kWarps - 1) / kWarps;
  if (blocks > kMostBlocks || a.size * a.size * a.channels > kMostElements)
    return kInvalidConfiguration;
  const bool eight = a.channels % 8 == 0 && at(a.x, 16) && a.x_batch % 8 == 0 && a.x_row % 8 == 0 &&
                     a.x_column % 8 == 0;
  if (eight)
    return GPU_LAUNCH((patch_rows<T, 8>), dim3(unsigned(blocks)), dim3(kThreads), 0, stream, a);
  return GPU_LAUNCH((patch_rows<T, 1>), dim3(unsigned(blocks)), dim3(kThreads), 0, stream, a);
}

}  // namespace

extern "C" int fastdiff_gpu_quantize_patches(const QuantizePatchesArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE(T)                                   \
  template __global__ void patch_rows<T, 8>(QuantizePatchesArgs); \
  template __global__ void patch_rows<T, 1>(QuantizePatchesArgs);
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
