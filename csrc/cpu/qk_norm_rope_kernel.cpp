#include "qk_norm_rope.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

// body(i) for whole vectors of [begin, end), body(i, n) for the rest.
template <class F>
FD_INLINE void for_vectors(int64_t begin, int64_t end, F&& body) {
  for (; begin + Vec::width <= end; begin += Vec::width) body(begin);
  if (begin < end) body(begin, int(end - begin));
}

template <class T>
FD_INLINE float inverse_rms(const T* x, int64_t dim, float eps) {
  Vec sum(0.0f);
  for_vectors(0, dim, [&](int64_t i, auto... n) {
    Vec v = Vec::load(x + i, n...);
    sum = fma(v, v, sum);
  });
  return 1.0f / std::sqrt(sum.sum() / float(dim) + eps);
}

// One head of one token. A second read of x comes from L1.
template <class T, bool kNorm, bool kInterleaved>
FD_INLINE void one_head(const T* x, T* y, const T* weight, const float* cos, const float* sin,
                        int64_t dim, int64_t half, float eps) {
  Vec scale(kNorm ? inverse_rms(x, dim, eps) : 1.0f);
  auto value = [&](int64_t i, auto... n) {
    Vec v = Vec::load(x + i, n...);
    return kNorm ? v * scale * Vec::load(weight + i, n...) : v;
  };
  if (kInterleaved) {
    for_vectors(0, 2 * half, [&](int64_t i, auto... n) {
      Vec v = value(i, n...), c = load_twice(cos + i / 2, n...), s = load_twice(sin + i / 2, n...);
      fmaddsub(v, c, swap_pairs(v) * s).store(y + i, n...);
    });
  } else {
    for_vectors(0, half, [&](int64_t i, auto... n) {
      Vec a = value(i, n...), b = value(i + half, n...);
      Vec c = Vec::load(cos + i, n...), s = Vec::load(sin + i, n...);
      fnma(b, s, a * c).store(y + i, n...);
      fma(a, s, b * c).store(y + i + half, n...);
    });
  }
  for_vectors(2 * half, dim, [&](int64_t i, auto... n) { value(i, n...).store(y + i, n...); });
}

template <class T, bool kInterleaved>
static void tokens(const QkNormRopeArgs& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    int64_t b = token / a.length, s = token % a.length;
    int64_t p = a.position ? a.position[b * a.position_b + s] : s;
    const float *cos = a.cos + p * a.half, *sin = a.sin + p * a.half;
    for (const QkNormRopeTensor& t : a.tensors) {
      const T* x = static_cast<const T*>(t.x) + b * t.x_b + s * t.x_s;
      T* y = static_cast<T*>(t.y) + b * t.y_b + s * t.y_s;
      const T* weight = static_cast<const T*>(t.weight);
      for (int64_t h = 0; h < t.heads; ++h, x += t.x_h, y += t.y_h) {
        if (weight)
          one_head<T, true, kInterleaved>(x, y, weight, cos, sin, a.dim, a.half, a.eps);
        else
          one_head<T, false, kInterleaved>(x, y, weight, cos, sin, a.dim, a.half, a.eps);
      }
    }
  }
}

// Reads and writes every element once; a token's cos and sin serve all its heads from L1.
void qk_norm_rope(const QkNormRopeArgs& a) {
  int64_t grain = 1 + 16384 / (a.dim * (a.tensors[0].heads + a.tensors[1].heads));
  FASTDIFF_DTYPE_SWITCH(
      a.dtype, parallel_for(0, a.batch * a.length, grain, [&](int64_t begin, int64_t end) {
        a.interleaved ? tokens<T, true>(a, begin, end) : tokens<T, false>(a, begin, end);
      }));
}

FASTDIFF_KERNEL_END
