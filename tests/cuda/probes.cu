// Kernels with a planted fault each, and their controls: what the model must find, and must not.
#include "gpu.h"

namespace {

__global__ void neighbour(float* x, int n, bool barrier) {
  GPU_SHARED(float, s);
  s[threadIdx.x] = float(threadIdx.x);
  if (barrier) __syncthreads();
  x[threadIdx.x] = s[(int(threadIdx.x) + 1) % n];
}

__global__ void lanes(float* x, bool order) {
  GPU_SHARED(float, s);
  s[threadIdx.x] = 1.0f;
  if (order) __syncwarp();
  x[threadIdx.x] = s[threadIdx.x ^ 1];
}

__global__ void divergent(float* x) {
  if (threadIdx.x < 32) __syncthreads();
  x[threadIdx.x] = 1.0f;
}

__global__ void left(float* x, int n) {
  if (int(threadIdx.x) >= n) return;
  __syncthreads();
  x[threadIdx.x] = 1.0f;
}

__global__ void lanes_apart(float* x) {
  float v = 1.0f;
  if (threadIdx.x < 16) {
    v = __shfl_xor_sync(gpu::kAll, v, 1);
  } else {
    v = __shfl_xor_sync(gpu::kAll, v, 2);
  }
  x[threadIdx.x] = v;
}

__global__ void wrong_mask(float* x) {
  x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, float(threadIdx.x), 1);
}

__global__ void outside_mask(float* x) {
  if (threadIdx.x < 16) x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, float(threadIdx.x), 16);
}

__global__ void past_shared(float* x, int n) {
  GPU_SHARED(float, s);
  s[threadIdx.x + n] = 0.0f;
  __syncthreads();
  x[threadIdx.x] = s[threadIdx.x];
}

__global__ void unset_shared(float* x) {
  GPU_SHARED(float, s);
  x[threadIdx.x] = s[threadIdx.x];
}

__global__ void copied(float* x, const float* from, bool wait) {
  GPU_SHARED(float, s);
  gpu::cp_async16(s + 4 * threadIdx.x, from + 4 * threadIdx.x);
  gpu::cp_async_commit();
  if (wait) gpu::cp_async_wait<0>();
  x[threadIdx.x] = s[4 * threadIdx.x + 1];
}

__global__ void uncommitted(float* x) {
  GPU_SHARED(float, s);
  gpu::cp_async16(s + 4 * threadIdx.x, x);
}

__global__ void misaligned(float* x) {
  GPU_SHARED(float, s);
  gpu::cp_async16(s + threadIdx.x, x);
  gpu::cp_async_commit();
  gpu::cp_async_wait<0>();
}

__global__ void blocks_race(float* x) {
  if (threadIdx.x == 0) x[0] = float(blockIdx.x);
}

__global__ void blocks_add(float* x) {
  if (threadIdx.x == 0) atomicAdd(x, 1.0f);
}

// Row i of a 16 x 16 matrix of i's through ldmatrix: conflict-free where rows are 24 apart.
__global__ void matrix(float* x, int stride) {
  GPU_SHARED(gpu::bf16, s);
  for (int i = threadIdx.x; i < 256; i += 32)
    s[i / 16 * stride + i % 16] = gpu::from_float<gpu::bf16>(float(i / 16));
  __syncwarp();
  unsigned r[4];
  const int lane = int(threadIdx.x);
  gpu::ldmatrix_x4<false>(r, s + lane % 16 * stride + lane / 16 * 8);
  float d[4] = {0, 0, 0, 0};
  unsigned one;
  const gpu::bf16 pair[2] = {gpu::from_float<gpu::bf16>(1.0f), gpu::from_float<gpu::bf16>(1.0f)};
  memcpy(&one, pair, 4);
  gpu::mma_16816<gpu::bf16>(d, r, one, one);  // every column: 16 times the row's number
  for (int e = 0; e < 4; ++e) x[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = d[e];
}

// A 16 x 32 matrix of int8, i + k (where k is odd, its negative), by a 32 x 8 one: lane l has eight
// of column l / 4, k = 4 (l % 4) to + 3 and the same + 16, from l / 4 - 3 upwards.
__global__ void matrix_int8(float* x) {
  GPU_SHARED(signed char, s);
  for (int i = threadIdx.x; i < 16 * 32; i += 32) {
    const int k = i % 32, value = i / 32 + k;
    s[i / 32 * 48 + k] = static_cast<signed char>(k % 2 ? -value : value);
  }
  __syncwarp();
  unsigned r[4];
  const int lane = int(threadIdx.x);
  gpu::ldmatrix_x4<false>(r, s + lane % 16 * 48 + lane / 16 * 16);
  int d[4] = {1000000, 0, 0, -5};
  unsigned b[2];
  signed char column[8];
  for (int i = 0; i < 8; ++i) column[i] = static_cast<signed char>(lane / 4 - 3 + i);
  memcpy(b, column, 8);
  gpu::mma_16816<gpu::s8x2>(d, r, b[0], b[1]);
  for (int e = 0; e < 4; ++e) x[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = float(d[e]);
}

// 16 x 32 and 8 x 32 bytes of float8_e4m3fn, the second's rows by those of the first, added to x.
__global__ void matrix_float8(float* x, const unsigned char* y) {
  GPU_SHARED(unsigned char, s);
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 16 * 32; i += 32) s[i / 32 * 48 + i % 32] = y[i];
  __syncwarp();
  unsigned r[4], b[2];
  gpu::ldmatrix_x4<false>(r, s + lane % 16 * 48 + lane / 16 * 16);
  const unsigned char* column = y + 16 * 32 + lane / 4 * 32 + lane % 4 * 4;
  memcpy(&b[0], column, 4), memcpy(&b[1], column + 16, 4);
  float* own = x + lane / 4 * 8 + lane % 4 * 2;
  float d[4] = {own[0], own[1], own[64], own[65]};
  gpu::mma_16816<gpu::e4m3x2>(d, r, b[0], b[1]);
  own[0] = d[0], own[1] = d[1], own[64] = d[2], own[65] = d[3];
}

// The bits of float8_e4m3fn of the first 512 of y: by the instruction, and by integers.
__global__ void float8(float* x, const float* y) {
  const int i = 2 * int(threadIdx.x);
  const unsigned pair = gpu::to_e4m3(y[i], y[i + 1]);
  x[i] = float(pair & 255), x[i + 1] = float(pair >> 8);
  x[512 + i] = float(gpu::e4m3_by_integers(y[i]));
  x[513 + i] = float(gpu::e4m3_by_integers(y[i + 1]));
}

}  // namespace

#define PROBE(name, kernel, blocks, threads, shared, ...)                                 \
  extern "C" int probe_##name(float* x, float* y) {                                       \
    (void)y;                                                                              \
    return GPU_LAUNCH(kernel, dim3(blocks), dim3(threads), shared, nullptr, __VA_ARGS__); \
  }
PROBE(barrier, neighbour, 1, 64, 256, x, 64, true)
PROBE(no_barrier, neighbour, 1, 64, 256, x, 64, false)
PROBE(warp_ordered, lanes, 1, 32, 128, x, true)
PROBE(warp_unordered, lanes, 1, 32, 128, x, false)
PROBE(divergent, divergent, 1, 64, 0, x)
PROBE(left, left, 1, 64, 0, x, 40)
PROBE(lanes_apart, lanes_apart, 1, 32, 0, x)
PROBE(wrong_mask, wrong_mask, 1, 32, 0, x)
PROBE(outside_mask, outside_mask, 1, 32, 0, x)
PROBE(past_shared, past_shared, 1, 64, 256, x, 1)
PROBE(unset_shared, unset_shared, 1, 64, 256, x)
PROBE(copied, copied, 1, 16, 256, x, y, true)
PROBE(copied_without_wait, copied, 1, 16, 256, x, y, false)
PROBE(uncommitted, uncommitted, 1, 8, 128, x)
PROBE(misaligned, misaligned, 1, 8, 128, x)
PROBE(blocks_race, blocks_race, 4, 32, 0, x)
PROBE(blocks_add, blocks_add, 4, 32, 0, x)
PROBE(matrix, matrix, 1, 32, 16 * 24 * 2, x, 24)
PROBE(matrix_with_conflicts, matrix, 1, 32, 16 * 64 * 2, x, 64)
PROBE(matrix_int8, matrix_int8, 1, 32, 16 * 48, x)
PROBE(matrix_float8, matrix_float8, 1, 32, 16 * 48, x, reinterpret_cast<unsigned char*>(y))
PROBE(float8, float8, 1, 256, 0, x, y)
PROBE(too_many_threads, unset_shared, 1, 2048, 8192, x)
PROBE(too_much_shared, unset_shared, 1, 32, 256 * 1024, x)
