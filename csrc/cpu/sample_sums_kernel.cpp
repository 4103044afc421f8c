#include "sample_sums.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

template <class T>
static float piece(const SampleSumsArgs& a, int64_t b, int64_t from, int64_t count) {
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride + from;
  const T* y = a.y ? static_cast<const T*>(a.y) + b * a.y_stride + from : nullptr;
  float sum[1];
  if (!y) {
    sum_each<1>(count, sum, [&](int64_t i, auto part, Vec* acc) {
      const Vec v = part.load(x + i);
      acc[0] = fma(v, v, acc[0]);
    });
  } else if (a.difference) {
    sum_each<1>(count, sum, [&](int64_t i, auto part, Vec* acc) {
      const Vec v = part.load(x + i) - part.load(y + i);
      acc[0] = fma(v, v, acc[0]);
    });
  } else {
    sum_each<1>(count, sum, [&](int64_t i, auto part, Vec* acc) {
      acc[0] = fma(part.load(x + i), part.load(y + i), acc[0]);
    });
  }
  return sum[0];
}

template <class T>
static void pieces(const SampleSumsArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t from = task % a.pieces * kSumsPiece;
    const int64_t count = a.N - from < kSumsPiece ? a.N - from : kSumsPiece;
    const float sum = piece<T>(a, task / a.pieces, from, count);
    if (a.parts)
      a.parts[task] = sum;
    else
      a.out[task] = sum;
  }
}

void sample_sums(const SampleSumsArgs& a) {
  const int64_t size = a.N < kSumsPiece ? a.N : kSumsPiece;
  parallel_for(0, a.B * a.pieces, 1 + 65536 / size, [&](int64_t begin, int64_t end) {
    FASTDIFF_DTYPE_SWITCH(a.dtype, pieces<T>(a, begin, end));
  });
  if (!a.parts) return;
  for (int64_t b = 0; b < a.B; ++b) {
    double sum = 0.0;
    for (int64_t i = 0; i < a.pieces; ++i) sum += a.parts[b * a.pieces + i];
    a.out[b] = float(sum);
  }
}

FASTDIFF_KERNEL_END
