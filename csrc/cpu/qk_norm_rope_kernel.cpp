#include "qk_norm_rope.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

template <class T>
FD_INLINE float inverse_rms(const T* x, int64_t dim, float eps) {
  float sum[1];
  sum_each(dim, sum, [&](int64_t i, auto part, Vec* acc) {
    Vec v = part.load(x + i);
    acc[0] = fma(v, v, acc[0]);
  });
  return 1.0f / std::sqrt(sum[0] / float(dim) + eps);
}

FD_INLINE Vec load_pairs(const float* p, Full) { return load_twice(p, Vec::width); }
FD_INLINE Vec load_pairs(const float* p, Tail tail) { return load_twice(p, tail.n); }

// One head of one token. A second read of x comes from L1.
template <class T, bool kNorm, bool kInterleaved>
FD_INLINE void one_head(const T* x, T* y, const T* weight, const float* cos, const float* sin,
                        int64_t dim, int64_t half, float eps) {
  Vec scale(kNorm ? inverse_rms(x, dim, eps) : 1.0f);
  auto value = [&](int64_t i, auto part) {
    Vec v = part.load(x + i);
    return kNorm ? v * scale * part.load(weight + i) : v;
  };
  if (kInterleaved) {
    each(2 * half, [&](int64_t i, auto part) {
      Vec v = value(i, part), c = load_pairs(cos + i / 2, part), s = load_pairs(sin + i / 2, part);
      part.store(fmaddsub(v, c, swap_pairs(v) * s), y + i);
    });
  } else {
    each(half, [&](int64_t i, auto part) {
      Vec a = value(i, part), b = value(i + half, part);
      Vec c = part.load(cos + i), s = part.load(sin + i);
      part.store(fnma(b, s, a * c), y + i);
      part.store(fma(a, s, b * c), y + i + half);
    });
  }
  each(dim - 2 * half,
       [&](int64_t i, auto part) { part.store(value(2 * half + i, part), y + 2 * half + i); });
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
