#include <algorithm>

#include "layer_norm_modulate_rows.h"
#include "quantize_rows.h"

FASTDIFF_KERNEL_BEGIN

// Folds the affine map and the modulation: modulated = normalised * mul + add.
template <class T>
static void fold(const LayerNormModulateArgs& a, int64_t b, int64_t n, float* mul, float* add) {
  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  const T *scale = row_of<T>(a.scale, b, n), *shift = row_of<T>(a.shift, b, n);
  each(a.D, [&](int64_t i, auto part) {
    Vec gain = scale ? part.load(scale + i) + Vec(1.0f) : Vec(1.0f);
    part.store(weight ? gain * part.load(weight + i) : gain, mul + i);
    Vec offset = bias ? gain * part.load(bias + i) : Vec(0.0f);
    part.store(shift ? offset + part.load(shift + i) : offset, add + i);
  });
}

// r = x + gate * y of one row, written to `residual` and, in float32, to `h` where that is given.
template <class T>
static void add_gated(const LayerNormModulateArgs& a, int64_t b, int64_t n, T* residual, float* h,
                      float (&sums)[2]) {
  const T *x = row_of<T>(a.x, b, n), *y = row_of<T>(a.y, b, n), *gate = row_of<T>(a.gate, b, n);
  sum_each<2>(a.D, sums, [&](int64_t i, auto part, Vec* acc) {
    Vec r = fma(part.load(gate + i), part.load(y + i), part.load(x + i));
    part.store(r, residual + i);
    if (h) part.store(r, h + i);
    acc[0] = acc[0] + r;
    acc[1] = fma(r, r, acc[1]);
  });
}

template <class T>
static void gated_rows(const LayerNormModulateArgs& a, int64_t begin, int64_t end) {
  float sums[2];
  for (int64_t row = begin; row < end; ++row)
    add_gated<T>(a, row / a.N, row % a.N, static_cast<T*>(a.residual) + row * a.D, nullptr, sums);
}

// Sums of one row, and where it is normalised from: x itself, or x + gate * y before it is rounded
// to T, which goes to `wide` unless T is float32.
template <class T, class H>
static const H* sum_row(const LayerNormModulateArgs& a, int64_t row, float* wide,
                        float (&sums)[2]) {
  const int64_t b = row / a.N, n = row % a.N;
  if (a.y.data) {
    T* residual = static_cast<T*>(a.residual) + row * a.D;
    if constexpr (std::is_same_v<T, float>) {
      add_gated<T>(a, b, n, residual, nullptr, sums);
      return residual;
    } else if constexpr (std::is_same_v<H, float>) {
      add_gated<T>(a, b, n, residual, wide, sums);
      return wide;
    }
  }
  const H* x = reinterpret_cast<const H*>(row_of<T>(a.x, b, n));
  sum_each<2>(a.D, sums, [&](int64_t i, auto part, Vec* acc) {
    Vec e = part.load(x + i);
    acc[0] = acc[0] + e;
    acc[1] = fma(e, e, acc[1]);
  });
  return x;
}

// Every row is read once, and written while it is in L1. Without y up to four rows go together:
// their statistics, each the latency of tens of vectors, are then computed side by side. (With y
// the rows of four tensors would push each other out of L1.)
template <class T, class H>
static void norm_rows(const LayerNormModulateArgs& a, int64_t begin, int64_t end) {
  constexpr int kRows = 4;
  constexpr int64_t kInFlight = 12288;  // bytes; twice that is slower where L3 is busy
  const int64_t D = a.D, padded = (D + 15) / 16 * 16;  // keeps the vectors aligned
  Scratch<float> scratch(4 * size_t(padded));
  float *mul = scratch.data, *add = mul + padded, *wide = add + padded, *rounded = wide + padded;
  const bool per_token = a.shift.n_stride || a.scale.n_stride;
  const int64_t fit = kInFlight / (2 * D * int64_t(sizeof(T)));
  const int64_t step = a.y.data ? 1 : std::clamp<int64_t>(fit, 1, kRows);
  int64_t folded = -1;
  for (int64_t first = begin; first < end; first += step) {
    const int count = int(std::min(end - first, step));
    const H* h[kRows];
    float sums[kRows][2];
    RowMoments moments[kRows];
    for (int r = 0; r < count; ++r) h[r] = sum_row<T, H>(a, first + r, wide, sums[r]);
    for (int r = 0; r < count; ++r)
      moments[r] = moments_of(h[r], D, sums[r][0], sums[r][1], a.eps, a.rms);
    for (int r = 0; r < count; ++r) {
      const int64_t row = first + r, b = row / a.N;
      if (per_token || folded != b) fold<T>(a, b, row % a.N, mul, add), folded = b;
      const Vec center(moments[r].center), rstd(moments[r].rstd), rest(moments[r].rest);
      const auto modulated = [&](int64_t i, auto part) {
        Vec m = fma(part.load(h[r] + i) - center, rstd, rest);
        return fma(m, part.load(mul + i), part.load(add + i));
      };
      if (a.q) {
        Vec most(0.0f);
        each(D, [&](int64_t i, auto part) {
          Vec m = modulated(i, part);
          m = part.keep(a.smooth ? m / part.load(a.smooth + i) : m);
          part.store(m, rounded + i);
          most = max_bits(most, vabs(m));
        });
        const auto again = [&](int64_t i, auto part) { return part.load(rounded + i); };
        quantize_row(most, D, again, a.q + row * D, a.s + row);
        continue;
      }
      T* out = static_cast<T*>(a.modulated) + row * D;
      each(D, [&](int64_t i, auto part) { part.store(modulated(i, part), out + i); });
    }
  }
}

template <class T>
static void rows(const LayerNormModulateArgs& a, int64_t begin, int64_t end) {
  if (!a.modulated && !a.q) {
    gated_rows<T>(a, begin, end);
  } else if (a.y.data) {
    norm_rows<T, float>(a, begin, end);
  } else {
    norm_rows<T, T>(a, begin, end);
  }
}

void layer_norm_modulate(const LayerNormModulateArgs& a) {
  int64_t grain = 1 + 16384 / a.D;
  FASTDIFF_DTYPE_SWITCH(
      a.dtype, parallel_for(0, a.B * a.N, grain, [&](int64_t b, int64_t e) { rows<T>(a, b, e); }));
}

FASTDIFF_KERNEL_END
