#include "layer_norm_modulate_rows.h"

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

// Per row: one read of x (and y), one write of each output; everything between stays in L1. The
// fold is redone only where the sample changes, or per row for per-token modulations.
template <class T>
static void norm_rows(const LayerNormModulateArgs& a, int64_t begin, int64_t end) {
  constexpr bool widen = !std::is_same_v<T, float>;
  const int64_t D = a.D;
  const int64_t padded = (D + 15) / 16 * 16;  // keeps the three vectors aligned
  Scratch<float> scratch(3 * size_t(padded));
  float *mul = scratch.data, *add = mul + padded, *buffer = add + padded;
  const bool per_token = a.shift.n_stride || a.scale.n_stride;
  int64_t folded = -1;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.N, n = row % a.N;
    const T *x = row_of<T>(a.x, b, n), *y = row_of<T>(a.y, b, n), *gate = row_of<T>(a.gate, b, n);
    T* residual = a.residual ? static_cast<T*>(a.residual) + row * D : nullptr;
    T* out = a.modulated ? static_cast<T*>(a.modulated) + row * D : nullptr;
    const float* h = buffer;
    float sums[2];
    if (y) {
      sum_each<2>(D, sums, [&](int64_t i, auto part, Vec* acc) {
        Vec r = fma(part.load(gate + i), part.load(y + i), part.load(x + i));
        part.store(r, residual + i);
        if (widen && out) part.store(r, buffer + i);
        acc[0] = acc[0] + r;
        acc[1] = fma(r, r, acc[1]);
      });
      if (!out) continue;
      if constexpr (!widen) h = residual;
    } else {
      sum_each<2>(D, sums, [&](int64_t i, auto part, Vec* acc) {
        Vec r = part.load(x + i);
        if constexpr (widen) part.store(r, buffer + i);
        acc[0] = acc[0] + r;
        acc[1] = fma(r, r, acc[1]);
      });
      if constexpr (!widen) h = x;
    }
    if (per_token || folded != b) fold<T>(a, b, n, mul, add), folded = b;
    const RowMoments s = moments(h, D, sums[0], sums[1], a.eps, a.rms);
    const Vec center(s.center), rstd(s.rstd), rest(s.rest);
    each(D, [&](int64_t i, auto part) {
      Vec m = fma(part.load(h + i) - center, rstd, rest);
      part.store(fma(m, part.load(mul + i), part.load(add + i)), out + i);
    });
  }
}

void layer_norm_modulate(const LayerNormModulateArgs& a) {
  int64_t grain = 1 + 16384 / a.D;
  FASTDIFF_DTYPE_SWITCH(a.dtype, parallel_for(0, a.B * a.N, grain, [&](int64_t b, int64_t e) {
                          norm_rows<T>(a, b, e);
                        }));
}

FASTDIFF_KERNEL_END
