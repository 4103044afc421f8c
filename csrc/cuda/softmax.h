// The online softmax over tiles of scores that lie as the sums of tensor cores do. After gpu.h.
//
// A lane has two rows of a warp's 16, eight apart: s[n][e] is row e / 2 of the two, column
// 8 n + lane % 4 * 2 + e % 2. Scores are in units of log 2: 2^s is one instruction.
#pragma once

namespace fastdiff {
namespace {

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

// Keys at and past `length` weigh nothing.
template <int blocks>
__device__ __forceinline__ void mask(float (&s)[blocks][4], int first, int length) {
#pragma unroll
  for (int n = 0; n < blocks; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (first + 8 * n + e % 2 >= length) s[n][e] = -INFINITY;
}

// Maximum and sum over the four lanes that hold a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(gpu::kAll, x, 1));
  return fmaxf(x, __shfl_xor_sync(gpu::kAll, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(gpu::kAll, x, 1);
  return x + __shfl_xor_sync(gpu::kAll, x, 2);
}

// Scores to weights 2^(s - maximum), with what was summed before brought to the new maximum. A row
// with every key masked so far subtracts 0, so that its weights are 2^-inf = 0.
template <int blocks, int columns>
__device__ __forceinline__ void soften(float (&s)[blocks][4], float (&top)[2], float (&total)[2],
                                       float (&out)[columns][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float high = top[r];
#pragma unroll
    for (int n = 0; n < blocks; ++n) high = fmaxf(high, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    high = row_max(high);
    const float base = high == -INFINITY ? 0.0f : high;
    const float shrink = gpu::exp2_approx(top[r] - base);
    top[r] = high;
    total[r] *= shrink;
#pragma unroll
    for (int d = 0; d < columns; ++d) out[d][2 * r] *= shrink, out[d][2 * r + 1] *= shrink;
#pragma unroll
    for (int n = 0; n < blocks; ++n)
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        s[n][e] = gpu::exp2_approx(s[n][e] - base);
        total[r] += s[n][e];
      }
  }
}

}  // namespace
}  // namespace fastdiff
