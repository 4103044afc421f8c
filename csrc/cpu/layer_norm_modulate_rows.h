// Rows and their statistics, shared by the forward and backward kernels of layer_norm_modulate.
#pragma once
#include "layer_norm_modulate.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

template <class T>
FD_INLINE const T* row_of(const Modulation& m, int64_t b, int64_t n) {
  return m.data ? static_cast<const T*>(m.data) + b * m.b_stride + n * m.n_stride : nullptr;
}

struct RowMoments {
  float center, rest, rstd;  // normalised value: (h - center) * rstd + rest
};

// Mean and variance by a second pass over a row in L1. It sums the deviations themselves too: their
// mean is the rounding error of the first mean, so rows with mean >> deviation keep full precision
// (Chan et al. 1983).
template <class H>
inline RowMoments moments_far(const H* h, int64_t dim, float mean, float eps) {
  float sums[2];
  sum_each<2>(dim, sums, [&](int64_t i, auto part, Vec* acc) {
    Vec d = part.keep(part.load(h + i) - Vec(mean));
    acc[0] = acc[0] + d;
    acc[1] = fma(d, d, acc[1]);
  });
  float error = sums[0] / float(dim), var = sums[1] / float(dim) - error * error;
  float rstd = 1.0f / std::sqrt((var < 0.0f ? 0.0f : var) + eps);
  return {mean, -error * rstd, rstd};
}

// One pass gave sum and square; they cancel by at most 1 bit where the mean is within a
// deviation of 0.
template <class H>
FD_INLINE RowMoments moments_of(const H* h, int64_t dim, float sum, float square, float eps,
                                bool rms) {
  float mean = rms ? 0.0f : sum / float(dim), var = square / float(dim) - mean * mean;
  if (!rms && !(mean * mean <= var)) return moments_far(h, dim, mean, eps);
  float rstd = 1.0f / std::sqrt(var + eps);
  return {0.0f, -mean * rstd, rstd};
}

FASTDIFF_KERNEL_END
