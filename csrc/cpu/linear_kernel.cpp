// A product with few rows on its left, such as the modulations of a batch: bound by the weight's
// way from memory, so each of its elements is read once and used for up to four rows from
// registers; for more rows its tile comes from L1 again.
#include "linear.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

namespace {

constexpr int kRows = 4;                         // of x, at most, beside each other
constexpr int kTile = Vec::width == 16 ? 4 : 2;  // rows of the weight: accumulators in registers
constexpr int64_t kAhead = 2048;                 // bytes by which reads are announced

// y[m, n] of M rows of x and N rows of the weight; every sum is taken in the same order whatever M
// and N are, so results do not depend on the batch.
template <int M, int N, class T>
FD_INLINE void dots(const float* x, int64_t x_stride, const T* weight, int64_t weight_stride,
                    int64_t in, float (&sums)[kRows][kTile]) {
  Vec acc[M][N];
  for (auto& row : acc)
    for (auto& v : row) v = Vec(0.0f);
  each(in, [&](int64_t k, auto part) {
    Vec xs[M];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) xs[m] = part.load(x + m * x_stride + k);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const T* w = weight + n * weight_stride + k;
      _mm_prefetch(reinterpret_cast<const char*>(w) + kAhead, _MM_HINT_T0);
      const Vec v = part.load(w);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) acc[m][n] = fma(v, xs[m], acc[m][n]);
    }
  });
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sums[m][n] = acc[m][n].sum();
}

template <int N, class T>
FD_INLINE void tile(const LinearArgs& a, const float* x, int64_t n) {
  const T* weight = static_cast<const T*>(a.weight) + n * a.weight_stride;
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t m = 0; m < a.rows; m += kRows) {
    const float* rows = x + m * a.in;
    const int count = int(a.rows - m < kRows ? a.rows - m : kRows);
    float sums[kRows][kTile];
    switch (count) {
      case 1: dots<1, N>(rows, a.in, weight, a.weight_stride, a.in, sums); break;
      case 2: dots<2, N>(rows, a.in, weight, a.weight_stride, a.in, sums); break;
      case 3: dots<3, N>(rows, a.in, weight, a.weight_stride, a.in, sums); break;
      default: dots<4, N>(rows, a.in, weight, a.weight_stride, a.in, sums);
    }
    for (int i = 0; i < count; ++i) {
      T* y = static_cast<T*>(a.y) + (m + i) * a.out + n;
      Vec v = Vec::load(sums[i], N);
      if (bias) v = v + Vec::load(bias + n, N);
      if (a.activation == 1) v = vgelu_tanh(v);
      if (a.activation == 2) v = vsilu(v);
      v.store(y, N);
    }
  }
}

template <class T>
void run(const LinearArgs& a) {
  Scratch<float> wide(size_t(a.rows * a.in));
  for (int64_t m = 0; m < a.rows; ++m) {
    const T* x = static_cast<const T*>(a.x) + m * a.x_stride;
    each(a.in,
         [&](int64_t k, auto part) { part.store(part.load(x + k), wide.data + m * a.in + k); });
  }
  const int64_t tiles = (a.out + kTile - 1) / kTile;
  const int64_t grain = 1 + 65536 / (a.in * kTile);
  parallel_for(0, tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i * kTile;
      if (a.out - n >= kTile)
        tile<kTile, T>(a, wide.data, n);
      else
        for (int64_t j = n; j < a.out; ++j) tile<1, T>(a, wide.data, j);
    }
  });
}

}  // namespace

void linear_few_rows(const LinearArgs& a) { FASTDIFF_DTYPE_SWITCH(a.dtype, run<T>(a)); }

FASTDIFF_KERNEL_END
