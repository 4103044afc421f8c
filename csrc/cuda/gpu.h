// The only header that kernel files include: CUDA itself, or its model on the CPU (csrc/simt).
//
// What keeps one source good for nvcc, NVRTC and the CPU:
//   shared memory is dynamic: GPU_SHARED(T, name), its size given at the launch
//   launches are GPU_LAUNCH(...), in functions under #ifndef __CUDACC_RTC__
//   collectives are the _sync ones, with a mask; nothing relies on lanes in step
//   inline PTX stands here alone; bits are moved by memcpy; no library but this header
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifdef __CUDACC_RTC__
#include <cuda/std/cstdint>
#include <cuda/std/type_traits>
using cuda::std::int64_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;
namespace std {
using cuda::std::conditional_t;
using cuda::std::is_same_v;
}  // namespace std
#define INFINITY __int_as_float(0x7f800000)
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#endif

namespace gpu {
struct s8x2;
struct e4m3x2;
// 16 bytes from global to shared memory, or 16 zeros where `read` is false.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool read = true) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  const int bytes = read ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `pending` of this thread's groups are on their way.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
// 2^x in one instruction, relative error 2^-22; results below 2^-126 are 0 (PTX ISA, ex2.approx).
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two elements of T as a register of mma has them, the first in the low half.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}
// Two float8_e4m3fn as a register has them, the first in the low byte: to nearest even, at most
// 448, of a NaN 0x7f. Before compute capability 8.9 by integers.
__device__ __forceinline__ unsigned e4m3_by_integers(float x);
__device__ __forceinline__ unsigned to_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  unsigned short bits;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(high), "f"(low));
  return bits;
#else
  return e4m3_by_integers(low) | e4m3_by_integers(high) << 8;
#endif
}
// Four 8x8 matrices of 16-bit elements; lane i gives row i % 8 of matrix i / 8.
template <bool transposed>
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  const unsigned from = unsigned(__cvta_generic_to_shared(row));
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
}
// d[16x8] += a[16x16] b[16x8] of T, in float32; with e4m3x2 for T a[16x32] b[32x8] of
// float8_e4m3fn, from compute capability 8.9 on: a launcher asks GPU_NEEDS.
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                          unsigned b1) {
  if constexpr (std::is_same_v<T, e4m3x2>) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    __trap();
#endif
  } else if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same registers with s8x2 for T: d[16x8] += a[16x32] b[32x8] of int8, in int32.
template <class T>
__device__ __forceinline__ void mma_16816(int (&d)[4], const unsigned (&a)[4], unsigned b0,
                                          unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
}  // namespace gpu

#define GPU_SHARED(T, name)                                           \
  extern __shared__ __align__(128) unsigned char gpu_shared_##name[]; \
  T* name = reinterpret_cast<T*>(gpu_shared_##name)

#ifndef __CUDACC_RTC__
template <class Kernel, class... Args>
inline int gpu_launch(Kernel kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                      Args... args) {
  if (shared > 48 * 1024) {  // more than that has to be asked for
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return int(error);
  }
  kernel<<<grid, block, shared, stream>>>(args...);
  return int(cudaGetLastError());
}
#define GPU_LAUNCH(kernel, grid, block, shared, stream, ...) \
  gpu_launch(kernel, grid, block, shared, stream, __VA_ARGS__)

// An error code, or 0 where the kernel's code was compiled for compute capability `least` (89 is
// 8.9) or above: a GPU may run code that was compiled for an earlier one.
template <class Kernel>
inline int gpu_needs(Kernel kernel, int least) {
  cudaFuncAttributes has{};
  const cudaError_t error = cudaFuncGetAttributes(&has, kernel);
  if (error != cudaSuccess) return int(error);
  return has.ptxVersion < least ? int(cudaErrorNotSupported) : 0;
}
#define GPU_NEEDS(kernel, least) gpu_needs(kernel, least)
#endif
#else
#include "simt/simt.h"  // IWYU pragma: export
#ifdef FASTDIFF_DRIVER
#include "cuda/driver.h"
#endif
#endif

namespace gpu {
using bf16 = __nv_bfloat16;
using f16 = __half;
constexpr unsigned kAll = 0xffffffffu;  // the mask of a whole warp
// Two neighbours in k: one element of ldmatrix and of tiles.
struct s8x2 {  // int8
  signed char e[2];
};
struct e4m3x2 {  // the bits of float8_e4m3fn
  signed char e[2];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16(x);
  } else if constexpr (std::is_same_v<T, f16>) {
    return __float2half(x);
  } else {
    return x;
  }
}

__device__ __forceinline__ unsigned e4m3_by_integers(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fu;         // NaN
  if (size >= 0x43e00000u) return sign | 0x7e;  // 448
  // Below 2^-6 a multiple of 2^-9, which are the last places of 2^14.
  if (size < 0x3c800000u)
    return sign | (__float_as_uint(__fadd_rn(fabsf(x), 16384.0f)) - 0x46800000u);
  return sign | (((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3));
}

__device__ __forceinline__ float warp_sum(float v) {
  for (int with = 16; with; with >>= 1) v += __shfl_xor_sync(kAll, v, with);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
  for (int with = 16; with; with >>= 1) v = fmaxf(v, __shfl_xor_sync(kAll, v, with));
  return v;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + __expf(-x)); }
__device__ __forceinline__ float gelu(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}
__device__ __forceinline__ float gelu_tanh(float x) {
  return x * sigmoid(1.5957691216057308f * fmaf(0.044715f * x * x, x, x));  // 2 sqrt(2 / pi)
}

// Four neighbouring elements as float32; the address is aligned to all four.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T e[4];
};
template <class T>
__device__ __forceinline__ void load4(const T* p, float (&v)[4]) {
  const Quad<T> q = *reinterpret_cast<const Quad<T>*>(p);
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = to_float(q.e[i]);
}
template <class T>
__device__ __forceinline__ void store4(const float (&v)[4], T* p) {
  Quad<T> q;
#pragma unroll
  for (int i = 0; i < 4; ++i) q.e[i] = from_float<T>(v[i]);
  *reinterpret_cast<Quad<T>*>(p) = q;
}

template <class T>
struct alignas(16) Eight {
  T e[8];
};
// One element as float32, or eight neighbours where the address is aligned to 16 bytes.
template <class T, int width>
__device__ __forceinline__ void load(const T* x, float (&v)[width]) {
  static_assert(width == 1 || width == 8);
  if constexpr (width == 8) {
    const Eight<T> pack = *reinterpret_cast<const Eight<T>*>(x);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(pack.e[i]);
  } else {
    v[0] = to_float(*x);
  }
}
template <int width>
struct alignas(width) Bytes {
  signed char e[width];
};

// Elements d to d + 7 of a row, zeros where `row` is null and at and past `dim`, to shared memory.
template <class T>
__device__ __forceinline__ void copy8(T* to, const T* row, int d, int dim, bool aligned) {
  if (aligned) {
    const bool read = row && d < dim;
    cp_async16(to, read ? row + d : row, read);
    return;
  }
  Eight<T> pack;
#pragma unroll
  for (int i = 0; i < 8; ++i) pack.e[i] = row && d + i < dim ? row[d + i] : from_float<T>(0.0f);
  *reinterpret_cast<Eight<T>*>(to) = pack;
}
}  // namespace gpu

// Element types as the host names them: fastdiff::Dtype of csrc/cpu/level.h.
#define GPU_DTYPE_SWITCH(dtype, ...) \
  switch (dtype) {                   \
    case 0: {                        \
      using T = float;               \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
    case 1: {                        \
      using T = gpu::bf16;           \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
    case 2: {                        \
      using T = gpu::f16;            \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
  }
