// Tiles of int8 or float8_e4m3fn products with their scales, for a linear layer and for those of
// experts. After gpu.h.
#pragma once
#include "cpu/quant_linear.h"
#include "group_tiles.h"
#include "tiles.h"

namespace fastdiff {
namespace {

constexpr int kBytes = 2 * kDeep;  // columns of a slice

// Columns k to k + 15 of a row, zeros where `row` is null and at and past `end`, to shared memory.
template <class Pair>
__device__ __forceinline__ void copy16(Pair* to, const signed char* row, int k, int end,
                                       bool aligned) {
  if (aligned) {
    const bool read = row && k < end;
    gpu::cp_async16(to, read ? row + k : row, read);
    return;
  }
  gpu::Eight<Pair> pack;
#pragma unroll
  for (int i = 0; i < 16; ++i) pack.e[i / 2].e[i % 2] = row && k + i < end ? row[k + i] : 0;
  *reinterpret_cast<gpu::Eight<Pair>*>(to) = pack;
}

// A slice from column `first` on of `from` [..., K]: row[j] is row threadIdx.x / 4 + 64 j of it, or
// -1. (Pointers would be twice the registers.)
template <int size, class Pair>
__device__ __forceinline__ void copy_slice(Pair* to, const void* from, const int (&row)[size / 64],
                                           int K, int first, int end, bool aligned) {
  const int i = int(threadIdx.x) / 4, part = int(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < size / 64; ++j) {
    const signed char* at = static_cast<const signed char*>(from) + int64_t(row[j]) * K;
    copy16(to + (i + 64 * j) * Slice<false, size>::pitch + 8 * part, row[j] < 0 ? nullptr : at,
           first + 16 * part, end, aligned);
  }
}

// The tile of y of rows `first` on, before `end`, and columns `left` on. q has `given` rows.
// grouped: rows are read through the index, those of the weight begin with row `base`, and the
// activation may gate: half as many columns then, with both their products side by side in turns of
// eight. Sums of float8_e4m3fn go to the totals after every slice, of one group too: Ada's tensor
// cores keep 13 bits of fraction of them, and cut the rest off (SageAttention2, arXiv:2411.10958,
// sec. 3.3).
template <class T, class Pair, int rows, bool groups, bool grouped>
__device__ __forceinline__ void quant_tile(const QuantLinearArgs& a, Pair* shared, int first,
                                           int end, int64_t given, int base, int left,
                                           bool k_aligned, bool y_aligned) {
  using Own = Tile<Slice<false, rows>, Slice<false, kColumns>, rows>;
  constexpr bool float8 = std::is_same_v<Pair, gpu::e4m3x2>;
  static_assert(groups || !float8);
  using Sum = std::conditional_t<float8, float, int>;
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const bool gated = grouped && a.activation >= kGroupedGeglu;
  const int N = int(a.N), K = int(a.K), G = int(a.G), out = gated ? N / 2 : N;
  // Column i of the tile is that of y, and row n_of(i) of the weight.
  const auto column = [&](int i) { return left + (gated ? i / 16 * 8 + i % 8 : i); };
  const auto n_of = [&](int i) { return base + column(i) + (gated && (i & 8) != 0 ? out : 0); };
  // The row of q for row m, or -1.
  const auto token = [&](int m) {
    if (m >= end) return -1;
    const int64_t at = grouped && a.index ? a.index[m] : m;
    return at >= 0 && at < given ? int(at) : -1;
  };
  const int size = groups && G ? K / G : K;
  const int per = (size + kBytes - 1) / kBytes, steps = groups ? per * G : per;

  int q[rows / 64], w[kColumns / 64];
#pragma unroll
  for (int j = 0; j < rows / 64; ++j) q[j] = token(first + thread / 4 + 64 * j);
#pragma unroll
  for (int j = 0; j < kColumns / 64; ++j) {
    const int i = thread / 4 + 64 * j;
    w[j] = column(i) < out ? n_of(i) : -1;
  }
  Sum sum[2][Own::blocks][4] = {};
  float total[2][Own::blocks][4] = {};
  int k = 0, stop = size, part = 0, g = 0;  // of the next slice; slices multiplied, and the group
  const auto copy = [&](int, Pair* to_q, Pair* to_w) {
    copy_slice<rows>(to_q, a.q, q, K, k, stop, k_aligned);
    copy_slice<kColumns>(to_w, a.values, w, K, k, stop, k_aligned);
    k += kBytes;
    if (groups && k >= stop) k = stop, stop += size;
  };
  multiply<Pair, false, false, rows>(shared, steps, copy, sum, [&](int) {
    if (!groups) return;
    const bool ends = ++part == per;  // the group
    if (!ends && !float8) return;
    const int own = warp / Own::down * Own::columns + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Own::blocks; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = own + 8 * n + e % 2;
        const float scale = column(i) < out ? a.scale[n_of(i) * G + g] : 0.0f;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          total[m][n][e] = fmaf(float(sum[m][n][e]), scale, total[m][n][e]);
          sum[m][n][e] = 0;
        }
      }
    if (ends) part = 0, ++g;
  });
  if constexpr (!groups) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < Own::blocks; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) total[m][n][e] = float(sum[m][n][e]);
  }

  const T* bias = static_cast<const T*>(a.bias);
  take<Own>(total, shared, gated ? 16 : 8, [&](int row, int i, const float* u) {
    const int m = first + row, n = column(i);
    if (m >= end) return;
    const int at = token(m);
    const float s = at >= 0 ? a.s[at] : 0.0f;
    const auto scaled = [&](int j, int of) {  // sum j of the piece, which is weight row `of`
      const bool inside = n + j % 8 < out;
      const float x = groups ? u[j] : inside && G ? u[j] * a.scale[of] : 0.0f;
      return fmaf(s, x, inside && bias ? gpu::to_float(bias[of]) : 0.0f);
    };
    float y[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      y[j] = scaled(j, base + n + j);
      if constexpr (grouped) {
        y[j] = activated(a.activation, y[j], gated ? scaled(8 + j, base + out + n + j) : 0.0f);
      } else {
        if (a.activation == kGroupedGeluTanh) y[j] = gpu::gelu_tanh(y[j]);
        if (a.activation == kGroupedSilu) y[j] *= gpu::sigmoid(y[j]);
      }
    }
    store8(static_cast<T*>(a.y) + int64_t(m) * out, n, out, y_aligned, y);
  });
}

}  // namespace
}  // namespace fastdiff
