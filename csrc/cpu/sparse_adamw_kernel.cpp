#include <atomic>

#include "sparse_adamw.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

// Elements between two calls of torch's sqrt: 80 KB of five vectors, which stay in L2, and enough
// for the call's half microsecond to be a twentieth of their time.
constexpr int64_t kChunk = 4096;
constexpr int64_t kGrain = 8;  // chunks worth a thread, as many elements as torch gives one

// Its rounding to float32 stays: the compiler may not fuse it into a sum.
static FD_INLINE Vec product(Vec a, Vec b) {
  Vec out = a * b;
  asm("" : FD_REGISTER(out.v));
  return out;
}

// The moments, and the second one again in `second`.
static void update_moments(const SparseAdamwArgs& a, int64_t at, int64_t n, float* second) {
  const float* g = a.grad + at;
  float *m = a.exp_avg + at, *v = a.exp_avg_sq + at;
  const Vec beta2(a.beta2), weight2(a.weight2);
  const bool near = std::fabs(a.weight1) < 0.5f;  // the end that torch's lerp starts from
  const Vec weight1(near ? a.weight1 : a.weight1 - 1.0f);
  each(n, [&](int64_t i, auto part) {
    const Vec grad = part.load(g + i), old = part.load(m + i);
    part.store(fma(weight1, grad - old, near ? old : grad), m + i);
    const Vec sum = fma(weight2 * grad, grad, product(part.load(v + i), beta2));
    part.store(sum, v + i);
    part.store(sum, second + i);
  });
}

static void update_values(const SparseAdamwArgs& a, int64_t at, int64_t n, const float* second) {
  float* p = a.values + at;
  const float* m = a.exp_avg + at;
  const Vec decay(a.decay), root(a.root), eps(a.eps), size(a.step_size);
  each(n, [&](int64_t i, auto part) {
    const Vec denominator = part.load(second + i) / root + eps;
    const Vec change = size * part.load(m + i) / denominator;
    part.store(product(part.load(p + i), decay) + change, p + i);
  });
}

template <class T>
static FD_INLINE const T* narrow(const float* from, int64_t n, T* to) {
  // By element: the vectors' bfloat16 of AVX-512-BF16 would lose denormals.
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);
  return to;
}
template <>
FD_INLINE const float* narrow(const float* from, int64_t, float*) {
  return from;
}
template <>
FD_INLINE const f16* narrow(const float* from, int64_t n, f16* to) {
  each(n, [&](int64_t i, auto part) { part.store(part.load(from + i), to + i); });
  return to;
}

template <class T, class I>
static void scatter(const T* from, const I* index, int64_t n, T* weight) {
  if (int64_t(index[n - 1]) - int64_t(index[0]) == n - 1) {  // it ascends: one run
    std::memcpy(weight + index[0], from, size_t(n) * sizeof(T));
    return;
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < n; ++i) weight[index[i]] = from[i];
}

template <class T, class I>
static void update(const SparseAdamwArgs& a, int64_t begin, int64_t end) {
  const Scratch<float> second(kChunk);
  const Scratch<T> rounded(kChunk);
  for (int64_t at = begin * kChunk; at < end * kChunk && at < a.n; at += kChunk) {
    const int64_t n = a.n - at < kChunk ? a.n - at : kChunk;
    update_moments(a, at, n, second.data);
    a.sqrt(second.data, n);
    update_values(a, at, n, second.data);
    scatter(narrow(a.values + at, n, rounded.data), static_cast<const I*>(a.index) + at, n,
            static_cast<T*>(a.weight));
  }
}

void sparse_adamw(const SparseAdamwArgs& a) {
  FASTDIFF_DTYPE_SWITCH(
      a.dtype, parallel_for(0, (a.n + kChunk - 1) / kChunk, kGrain, [&](int64_t b, int64_t e) {
        if (a.wide)
          update<T, int64_t>(a, b, e);
        else
          update<T, int32_t>(a, b, e);
      }));
}

template <class I>
static bool ascends(const I* index, int64_t begin, int64_t end) {
  int bad = 0;
  for (int64_t i = begin; i < end; ++i) bad |= index[i + 1] <= index[i];
  return !bad;
}

void sparse_adamw_order(const SparseAdamwOrderArgs& a) {
  std::atomic<bool> good{true};
  parallel_for(0, a.n - 1, kGrain * kChunk, [&](int64_t b, int64_t e) {
    if (!(a.wide ? ascends(static_cast<const int64_t*>(a.index), b, e)
                 : ascends(static_cast<const int32_t*>(a.index), b, e)))
      good.store(false, std::memory_order_relaxed);
  });
  *a.ascends = good.load(std::memory_order_relaxed);
}

FASTDIFF_KERNEL_END
