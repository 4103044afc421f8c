// Tiles of a grouped product: rows of x by columns of a weight, in registers.
#pragma once
#include <cstring>
#include <type_traits>

#include "grouped_linear.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

namespace {

constexpr int W = Vec::width;
constexpr int kWide = 2 * W;             // columns of a panel
constexpr int kRows = W == 16 ? 14 : 6;  // rows of a tile
constexpr int kDeep = 768;               // of k at a time: a tile stays near
constexpr int kStride = kDeep + 16;      // no power of two: rows would share cache sets
constexpr int64_t kPanelBytes = W == 16 ? 640 << 10 : 96 << 10;  // of the panels of a task
constexpr int kMostPanels = 16;
constexpr int kMostFew = 64;  // rows that are multiplied as they lie, at most

#ifdef __AVX512BF16__
constexpr bool kPairs = true;  // bfloat16 is multiplied in pairs
#else
constexpr bool kPairs = false;
#endif

// Where the two vectors of a panel come from: columns n, `count` of them. With a gate both are the
// same columns of the two halves.
struct Columns {
  int64_t n[2];
  int count[2];
  Columns(int64_t panel, int64_t out, bool gated) {
    const int64_t half = out / 2;
    for (int v = 0; v < 2; ++v) {
      n[v] = gated ? panel * W + v * half : panel * kWide + v * W;
      const int64_t left = gated ? half - panel * W : out - n[v];
      count[v] = left < 0 ? 0 : left > W ? W : int(left);
    }
  }
};

template <int kActivation>
FD_INLINE Vec activated(Vec u, Vec v) {
  if constexpr (kActivation == kGroupedGelu) return vgelu(u);
  if constexpr (kActivation == kGroupedGeluTanh) return vgelu_tanh(u);
  if constexpr (kActivation == kGroupedSilu) return vsilu(u);
  if constexpr (kActivation == kGroupedGeglu) return u * vgelu(v);
  if constexpr (kActivation == kGroupedSwiglu) return vsilu(u) * v;
  if constexpr (kActivation == kGroupedSwishglu) return u * vsilu(v);
  return u;
}

// What a lane of a panel holds: a float, or two bfloat16 or four int8 that are neighbours along k.
struct Floats {
  static constexpr int each = 1;
  static FD_INLINE Vec fma_(Vec w, const float* x, Vec sum) { return fma(w, Vec(*x), sum); }
};
struct Pairs {
  static constexpr int each = 2;
  static FD_INLINE Vec fma_(Vec w, const float* x, Vec sum) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum.v, __m512bh(_mm512_castps_si512(w.v)),
                            __m512bh(_mm512_castps_si512(_mm512_set1_ps(*x))));
#else
    return sum;
#endif
  }
};

struct Quads {
  static constexpr int each = 4;
};

// c [M][kWide] (+)= a b over `deep` lanes; a: element (i, k) at i * row + k * step.
template <class Kind, int M, int kRow, int kStep>
void product(const float* a, const float* b, int64_t deep, float* c, bool add) {
  Vec sum[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[i][v] = add ? Vec::load(c + i * kWide + v * W) : Vec(0.0f);
  for (int64_t k = 0; k < deep; ++k) {
    const Vec b0 = Vec::load(b), b1 = Vec::load(b + W);
    b += kWide;
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      sum[i][0] = Kind::fma_(b0, a + i * kRow, sum[i][0]);
      sum[i][1] = Kind::fma_(b1, a + i * kRow, sum[i][1]);
    }
    a += kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[i][v].store(c + i * kWide + v * W);
}

template <class Kind, int kRow, int kStep>
void product_of(int rows, const float* a, const float* b, int64_t deep, float* c, bool add) {
  switch (rows) {
    case 1: return product<Kind, 1, kRow, kStep>(a, b, deep, c, add);
    case 2: return product<Kind, 2, kRow, kStep>(a, b, deep, c, add);
    case 3: return product<Kind, 3, kRow, kStep>(a, b, deep, c, add);
    case 4: return product<Kind, 4, kRow, kStep>(a, b, deep, c, add);
    case 5: return product<Kind, 5, kRow, kStep>(a, b, deep, c, add);
    case 6: return product<Kind, 6, kRow, kStep>(a, b, deep, c, add);
  }
  if constexpr (kRows > 6) {
    switch (rows) {
      case 7: return product<Kind, 7, kRow, kStep>(a, b, deep, c, add);
      case 8: return product<Kind, 8, kRow, kStep>(a, b, deep, c, add);
      case 9: return product<Kind, 9, kRow, kStep>(a, b, deep, c, add);
      case 10: return product<Kind, 10, kRow, kStep>(a, b, deep, c, add);
      case 11: return product<Kind, 11, kRow, kStep>(a, b, deep, c, add);
      case 12: return product<Kind, 12, kRow, kStep>(a, b, deep, c, add);
      case 13: return product<Kind, 13, kRow, kStep>(a, b, deep, c, add);
      default: return product<Kind, 14, kRow, kStep>(a, b, deep, c, add);
    }
  }
}

// ---- weights into panels ----

#ifdef __AVX512F__
FD_INLINE void transpose(Vec (&r)[W]) {
  __m512 t[16], u[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
#else
FD_INLINE void transpose(Vec (&r)[W]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#endif

// W lanes from p on: elements as floats, or, of Pairs and Quads, elements as they are.
template <class Kind, class T>
FD_INLINE Vec lanes(const T* p) {
  if constexpr (Kind::each > 1)
    return Vec::load(reinterpret_cast<const float*>(p));
  else
    return Vec::load(p);
}
// Of which `count` elements are there.
template <class Kind, class T>
FD_INLINE Vec lanes(const T* p, int64_t count) {
  if (count >= Kind::each * W) return lanes<Kind>(p);
  if constexpr (Kind::each == 1) {
    return Vec::load(p, int(count));
  } else {
#ifdef __AVX512F__
    if constexpr (Kind::each == 2)
      return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << count) - 1, p));
    else
      return _mm512_castsi512_ps(_mm512_maskz_loadu_epi8((uint64_t(1) << count) - 1, p));
#else
    alignas(32) float t[W] = {0};
    std::memcpy(t, p, size_t(count) * sizeof(T));
    return Vec::load(t);
#endif
  }
}

// Columns n to n + count (at most W) of a panel whose weights lie along k.
template <class Kind, bool kFull, class T>
void pack_rows(const T* w, int64_t stride, int count, int64_t K, float* to) {
  constexpr int each = Kind::each;
  int64_t k = 0;
  if constexpr (kFull) {
    for (; k + each * W <= K; k += each * W) {
      Vec r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const T* p = w + i * stride + k;
        _mm_prefetch(reinterpret_cast<const char*>(p + W * stride), _MM_HINT_T0);
        r[i] = lanes<Kind>(p);
      }
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) r[i].store(to + (k / each + i) * kWide);
    }
  }
  for (; k < K; k += each * W) {
    Vec r[W];
    for (int i = 0; i < W; ++i)
      r[i] = i < count ? lanes<Kind>(w + i * stride + k, K - k) : Vec(0.0f);
    transpose(r);
    const int64_t deep = (K - k + each - 1) / each;
    for (int i = 0; i < (deep < W ? int(deep) : W); ++i) r[i].store(to + (k / each + i) * kWide);
  }
}

// The same where they lie along n.
template <class Kind, class T>
void pack_columns(const T* w, int64_t stride, int count, int64_t K, float* to) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<Kind, Pairs>) {
    const __mmask16 mask = Vec::mask(count);
    for (int64_t k = 0; k < K; k += 2) {
      const __m256i low = _mm256_maskz_loadu_epi16(mask, w + k * stride);
      const __m256i high =
          k + 1 < K ? _mm256_maskz_loadu_epi16(mask, w + (k + 1) * stride) : _mm256_setzero_si256();
      const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
      Vec(_mm512_castsi512_ps(both)).store(to + k / 2 * kWide);
    }
    return;
  }
#endif
  for (int64_t k = 0; k < K; ++k)
    (count == W ? Vec::load(w + k * stride) : Vec::load(w + k * stride, count))
        .store(to + k * kWide);
}

// ---- rows into a tile ----

template <class Kind, class T>
void copy_row(const T* x, int64_t count, float* to) {
  if constexpr (std::is_same_v<Kind, Pairs>) {
    if (count) std::memcpy(to, x, size_t(count) * 2);  // of no columns there is no memory
    if (count % 2) reinterpret_cast<uint16_t*>(to)[count] = 0;
  } else {
    each(count, [&](int64_t k, auto part) { part.store(part.load(x + k), to + k); });
  }
}

// ---- few rows ----

constexpr int kFew = W == 16 ? 6 : 2;  // rows of x beside kQuad of the weight: 24 (AVX2: 8) sums
constexpr int kQuad = 4;

// The lanes of four vectors added up.
FD_INLINE __m128 sums_of(const Vec (&r)[kQuad]) {
#ifdef __AVX512F__
  const __m512 a =
      _mm512_add_ps(_mm512_unpacklo_ps(r[0].v, r[1].v), _mm512_unpackhi_ps(r[0].v, r[1].v));
  const __m512 b =
      _mm512_add_ps(_mm512_unpacklo_ps(r[2].v, r[3].v), _mm512_unpackhi_ps(r[2].v, r[3].v));
  const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  const __m256 d = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
#else
  const __m256 a =
      _mm256_add_ps(_mm256_unpacklo_ps(r[0].v, r[1].v), _mm256_unpackhi_ps(r[0].v, r[1].v));
  const __m256 b =
      _mm256_add_ps(_mm256_unpacklo_ps(r[2].v, r[3].v), _mm256_unpackhi_ps(r[2].v, r[3].v));
  const __m256 d = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
#endif
  return _mm_add_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

template <class Kind>
FD_INLINE Vec times(Vec w, Vec x, Vec sum) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<Kind, Pairs>)
    return _mm512_dpbf16_ps(sum.v, __m512bh(_mm512_castps_si512(w.v)),
                            __m512bh(_mm512_castps_si512(x.v)));
#endif
  return fma(w, x, sum);
}

// c[i][0 to 4) = x[i] . w[0 to 4) over K elements; `near`: asks for the weights two quads on.
template <class Kind, int M, class X, class T>
void dots(const X* const* rows, const T* w, int64_t stride, int64_t K, float* c, bool near) {
  constexpr int step = std::is_same_v<Kind, Pairs> ? 2 * W : W;
  Vec sum[M][kQuad];
  const X* x[M];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) {
    x[i] = rows[i];
#pragma GCC unroll 4
    for (int n = 0; n < kQuad; ++n) sum[i][n] = Vec(0.0f);
  }
  int64_t k = 0;
  for (; k + step <= K; k += step) {
    Vec v[kQuad];
#pragma GCC unroll 4
    for (int n = 0; n < kQuad; ++n) v[n] = lanes<Kind>(w + n * stride + k);
    if (near)
#pragma GCC unroll 4
      for (int n = 0; n < kQuad; ++n)
        _mm_prefetch(reinterpret_cast<const char*>(w + (n + 2 * kQuad) * stride + k), _MM_HINT_T0);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const Vec u = lanes<Kind>(x[i] + k);
#pragma GCC unroll 4
      for (int n = 0; n < kQuad; ++n) sum[i][n] = times<Kind>(v[n], u, sum[i][n]);
    }
  }
  if (k < K) {
    Vec v[kQuad];
#pragma GCC unroll 4
    for (int n = 0; n < kQuad; ++n) v[n] = lanes<Kind>(w + n * stride + k, K - k);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const Vec u = lanes<Kind>(x[i] + k, K - k);
#pragma GCC unroll 4
      for (int n = 0; n < kQuad; ++n) sum[i][n] = times<Kind>(v[n], u, sum[i][n]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) _mm_storeu_ps(c + i * kWide, sums_of(sum[i]));
}

template <class Kind, class X, class T>
void dots_of(int rows, const X* const* x, const T* w, int64_t stride, int64_t K, float* c,
             bool near) {
  switch (rows) {
    case 1: return dots<Kind, 1>(x, w, stride, K, c, near);
    case 2: return dots<Kind, 2>(x, w, stride, K, c, near);
  }
  if constexpr (kFew > 2) {
    switch (rows) {
      case 3: return dots<Kind, 3>(x, w, stride, K, c, near);
      case 4: return dots<Kind, 4>(x, w, stride, K, c, near);
      case 5: return dots<Kind, 5>(x, w, stride, K, c, near);
      default: return dots<Kind, 6>(x, w, stride, K, c, near);
    }
  }
}

// c [rows][kWide] of one panel's columns, which are rows of the weight. `tail`: a copy of the last
// few, where they are fewer than a quad, with zeros after them.
template <class Kind, class X, class T>
void panel_dots(int rows, const X* const* x, const T* weight, int64_t stride, int64_t K,
                const int64_t (&n)[2], const int (&count)[2], float* c, T* tail) {
  for (int v = 0; v < 2; ++v) {
    const T* const w = weight + n[v] * stride;
    const int whole = count[v] / kQuad * kQuad, rest = count[v] - whole;
    if (rest) {
      std::memset(static_cast<void*>(tail), 0, size_t(kQuad * K) * sizeof(T));
      for (int i = 0; i < rest; ++i)
        std::memcpy(static_cast<void*>(tail + i * K), w + (whole + i) * stride,
                    size_t(K) * sizeof(T));
    }
    // A tile of x and the weights of one vector of columns stay in L1 together.
    for (int i = 0; i < rows; i += kFew) {
      const int tile = rows - i < kFew ? rows - i : kFew;
      float* to = c + i * kWide + v * W;
      for (int j = 0; j < whole; j += kQuad)
        dots_of<Kind>(tile, x + i, w + j * stride, stride, K, to + j, i == 0);
      if (rest) dots_of<Kind>(tile, x + i, tail, K, K, to + whole, false);
    }
  }
}

}  // namespace

FASTDIFF_KERNEL_END
