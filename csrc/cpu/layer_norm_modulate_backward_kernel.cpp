#include "layer_norm_modulate_rows.h"

FASTDIFF_KERNEL_BEGIN

// With n the normalised row, k = weight (1 + scale) and dn = grad_modulated k:
//   grad_r = grad_residual + rstd (dn - mean(dn) - n mean(dn n))     (rms: without mean(dn))
//   grad_x = grad_r,  grad_y = gate grad_r
// Statistics are computed again from x and y: the forward pass keeps nothing. One read of each
// input and one write of each output; n and the sums over tokens stay in L1. Those are added
// up 8 tokens at a time, which keeps the error of float32 additions near that of a tree.
template <class T>
static void backward_piece(const LayerNormModulateBackwardArgs& a, int64_t b, int64_t begin,
                           int64_t end, float* sums, float* recent, float* mul, float* n) {
  const int64_t D = a.D;
  const T *weight = static_cast<const T*>(a.weight), *scale = row_of<T>(a.scale, b, 0);
  const T* gate = row_of<T>(a.gate, b, 0);
  const bool norm = a.grad_modulated.data;
  float *sum_m = recent, *sum_mn = recent + D, *sum_ry = recent + 2 * D;
  each(D, [&](int64_t i, auto part) {
    Vec gain = scale ? part.load(scale + i) + Vec(1.0f) : Vec(1.0f);
    part.store(weight ? gain * part.load(weight + i) : gain, mul + i);
  });
  for (int64_t i = 0; i < 3 * D; ++i) sums[i] = recent[i] = 0.0f;

  for (int64_t token = begin; token < end; ++token) {
    const T *x = row_of<T>(a.x, b, token), *y = row_of<T>(a.y, b, token);
    const T* grad_residual = row_of<T>(a.grad_residual, b, token);
    const T* grad_modulated = row_of<T>(a.grad_modulated, b, token);
    T* grad_x = static_cast<T*>(a.grad_x) + (b * a.N + token) * D;
    T* grad_y = y ? static_cast<T*>(a.grad_y) + (b * a.N + token) * D : nullptr;
    Vec rstd(0.0f), mean_dn(0.0f), mean_dnn(0.0f);
    if (norm) {
      float totals[2];
      sum_each<2>(D, totals, [&](int64_t i, auto part, Vec* acc) {
        Vec r = part.load(x + i);
        if (y) r = fma(part.load(gate + i), part.load(y + i), r);
        part.store(r, n + i);
        acc[0] = acc[0] + r;
        acc[1] = fma(r, r, acc[1]);
      });
      const RowMoments s = moments_of(n, D, totals[0], totals[1], a.eps, a.rms);
      const Vec center(s.center), rest(s.rest);
      rstd = Vec(s.rstd);
      sum_each<2>(D, totals, [&](int64_t i, auto part, Vec* acc) {
        Vec v = fma(part.load(n + i) - center, rstd, rest), dm = part.load(grad_modulated + i);
        Vec dn = dm * part.load(mul + i);
        part.store(v, n + i);
        part.store(part.load(sum_m + i) + dm, sum_m + i);
        part.store(fma(dm, v, part.load(sum_mn + i)), sum_mn + i);
        acc[0] = acc[0] + dn;
        acc[1] = fma(dn, v, acc[1]);
      });
      mean_dn = Vec(a.rms ? 0.0f : totals[0] / float(D));
      mean_dnn = Vec(totals[1] / float(D));
    }
    each(D, [&](int64_t i, auto part) {
      Vec dr = grad_residual ? part.load(grad_residual + i) : Vec(0.0f);
      if (norm) {
        Vec dn = part.load(grad_modulated + i) * part.load(mul + i);
        dr = fma(rstd, fnma(part.load(n + i), mean_dnn, dn - mean_dn), dr);
      }
      part.store(dr, grad_x + i);
      if (y) {
        part.store(dr * part.load(gate + i), grad_y + i);
        part.store(fma(dr, part.load(y + i), part.load(sum_ry + i)), sum_ry + i);
      }
    });
    if ((token + 1 - begin) % 8 && token + 1 < end) continue;
    for (int64_t i = 0; i < 3 * D; ++i) sums[i] += recent[i], recent[i] = 0.0f;
  }
}

// Pieces of a sample's tokens; their split does not depend on the threads.
void layer_norm_modulate_backward(const LayerNormModulateBackwardArgs& a) {
  FASTDIFF_DTYPE_SWITCH(
      a.dtype, parallel_for(0, a.B * a.pieces, 1, [&](int64_t begin, int64_t end) {
        Scratch<float> scratch(5 * size_t(a.D));
        for (int64_t i = begin; i < end; ++i) {
          const int64_t from = (i % a.pieces) * a.piece, to = from + a.piece;
          backward_piece<T>(a, i / a.pieces, from, to < a.N ? to : a.N, a.sums + i * 3 * a.D,
                            scratch.data, scratch.data + 3 * a.D, scratch.data + 4 * a.D);
        }
      }));
}

FASTDIFF_KERNEL_END
