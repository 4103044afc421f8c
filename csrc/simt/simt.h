// CUDA's spelling of what runtime.h offers; gpu.h includes it where the compiler is not CUDA's.
// Kernel files see this header and nothing else of the CPU.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "runtime.h"

#ifdef FASTDIFF_DRIVER
#define __global__  // a kernel's symbol is its name to the driver
#else
#define __global__ static
#endif
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)

#define threadIdx (simt_current->thread)
#define blockIdx (simt_current->block)
#define blockDim (simt_current->block_dim)
#define gridDim (simt_current->grid_dim)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// 16-bit floats, rounded to nearest even.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = uint32_t(b.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half h) { return float(h.value); }
inline __half __float2half(float f) { return {_Float16(f)}; }

// Collectives take the line they stand in, by which lanes that meet in different ones are found.
#define SIMT_LINE int line = __builtin_LINE()
inline void __syncthreads(SIMT_LINE) { simt_barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_LINE) { simt_sync_warp(mask, line); }
template <class T>
inline T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIMT_LINE) {
  T out;
  const int lane = int(simt_current->lane);
  simt_shuffle(mask, &v, sizeof(T), (lane & ~(width - 1)) | (source & (width - 1)), &out, line);
  return out;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32, SIMT_LINE) {
  return __shfl_sync(mask, v, int(simt_current->lane) ^ with, width, line);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T v, int by, int width = 32, SIMT_LINE) {
  const int at = int(simt_current->lane) & (width - 1);
  return __shfl_sync(mask, v, at + by < width ? at + by : at, width, line);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T v, int by, int width = 32, SIMT_LINE) {
  const int at = int(simt_current->lane) & (width - 1);
  return __shfl_sync(mask, v, at >= by ? at - by : at, width, line);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, SIMT_LINE) {
  return simt_ballot(mask, predicate, line);
}
inline bool __any_sync(unsigned mask, bool predicate, SIMT_LINE) {
  return simt_ballot(mask, predicate, line) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, SIMT_LINE) {
  return simt_ballot(mask, predicate, line) == mask;
}

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
template <class T>
inline T atomicAdd(T* p, T v) {
  return std::atomic_ref<T>(*p).fetch_add(v, std::memory_order_relaxed);
}
inline int atomicMax(int* p, int v) {
  std::atomic_ref<int> at(*p);
  int old = at.load(std::memory_order_relaxed);
  while (old < v && !at.compare_exchange_weak(old, v, std::memory_order_relaxed)) {
  }
  return old;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void sincospif(float x, float* s, float* c) {
  *s = float(std::sin(M_PI * double(x))), *c = float(std::cos(M_PI * double(x)));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __int_as_float(int x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned x;
  std::memcpy(&x, &f, 4);
  return x;
}
using std::max;
using std::min;

using cudaStream_t = void*;

namespace gpu {  // gpu.h gives the same names as inline PTX
inline void cp_async16(void* shared, const void* global, bool read = true, SIMT_LINE) {
  simt_copy_async(shared, global, read, line);
}
inline void cp_async_commit() { simt_copy_commit(); }
template <int pending>
inline void cp_async_wait(SIMT_LINE) {
  simt_copy_wait(pending, line);
}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}
template <class T>
inline unsigned pack(float low, float high) {
  T pair[2];
  if constexpr (std::is_same_v<T, __half>) {
    pair[0] = __float2half(low), pair[1] = __float2half(high);
  } else {
    pair[0] = __float2bfloat16(low), pair[1] = __float2bfloat16(high);
  }
  unsigned bits;
  std::memcpy(&bits, pair, sizeof(bits));
  return bits;
}
struct e4m3x2;
inline unsigned to_e4m3(float low, float high) { return simt_e4m3(low) | simt_e4m3(high) << 8; }
template <bool transposed>
inline void ldmatrix_x4(unsigned (&r)[4], const void* row, SIMT_LINE) {
  simt_ldmatrix(row, transposed, r, line);
}
template <class T>
inline void mma_16816(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, SIMT_LINE) {
  const unsigned b[2] = {b0, b1};
  if constexpr (std::is_same_v<T, e4m3x2>) {
    simt_mma_float8(d, a, b, line);
  } else {
    simt_mma(std::is_same_v<T, __half>, d, a, b, line);
  }
}
template <class T>
inline void mma_16816(int (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, SIMT_LINE) {
  const unsigned b[2] = {b0, b1};
  simt_mma_int8(d, a, b, line);
}
}  // namespace gpu

// Runs `kernel(args...)` and gives an error code; on a GPU, the launch's own.
template <class Body>
inline int simt_run(dim3 grid, dim3 block, size_t shared, Body body) {
  return simt_launch(grid, block, shared, [](void* b) { (*static_cast<Body*>(b))(); }, &body);
}
#define GPU_LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), simt_run(grid, block, shared, [&] { kernel(__VA_ARGS__); }))
#define GPU_NEEDS(kernel, least) 0
#define GPU_SHARED(T, name) T* name = reinterpret_cast<T*>(simt_current->shared)
