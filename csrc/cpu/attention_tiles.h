// Tiles of attention with queries in lanes, for what multiplies K and Q in its own way: P and its
// sums from scores S [key][kLanes], O^T += V^T P^T, and O back to rows.
#pragma once
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

namespace {

constexpr int W = Vec::width;
constexpr int kLanes = 3 * W;        // query rows per tile; the leading dimension of its panels
constexpr int kM = W == 16 ? 8 : 4;  // keys (or channels) per register tile: kM * 3 accumulators
constexpr float kLog2e = 1.44269504088896341f;
// The loops below are instantiated once per shape of tile, not inlined into every caller's copy.
#define FD_LOOP static __attribute__((noinline))

// Rows to columns of a W x W block of 32-bit words.
#ifdef __AVX512F__
FD_INLINE void transpose(Vec (&r)[16]) {
  __m512 t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    __m512 a = _mm512_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    __m512 c = _mm512_unpacklo_ps(r[i + 2].v, r[i + 3].v);
    __m512 d = _mm512_unpackhi_ps(r[i + 2].v, r[i + 3].v);
    t[i] = _mm512_shuffle_ps(a, c, 0x44), t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44), t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // t[4g + i], lane quarter l: rows 4g.., column 4l + i
    __m512 a = _mm512_shuffle_f32x4(t[i], t[4 + i], 0x88);
    __m512 b = _mm512_shuffle_f32x4(t[i], t[4 + i], 0xdd);
    __m512 c = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0x88);
    __m512 d = _mm512_shuffle_f32x4(t[8 + i], t[12 + i], 0xdd);
    r[i] = _mm512_shuffle_f32x4(a, c, 0x88), r[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88), r[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}
FD_INLINE Vec as_scale(Vec t) {  // 2^n from the sum n + 127 + 1.5 * 2^23
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(t.v), 23));
}
#else
FD_INLINE void transpose(Vec (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i += 4) {
    __m256 a = _mm256_unpacklo_ps(r[i].v, r[i + 1].v), b = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    __m256 c = _mm256_unpacklo_ps(r[i + 2].v, r[i + 3].v);
    __m256 d = _mm256_unpackhi_ps(r[i + 2].v, r[i + 3].v);
    t[i] = _mm256_shuffle_ps(a, c, 0x44), t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44), t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(t[i], t[4 + i], 0x31);
  }
}
FD_INLINE Vec as_scale(Vec t) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(t.v), 23));
}
#endif

// 2^x for x <= 0: relative error 1.7e-7, exactly 1 at 0 and 0 at and below -127; NaN stays NaN.
// The sum with 1.5 * 2^23 + 127 rounds x to n and leaves n + 127, the exponent, in its low bits.
FD_INLINE Vec exp2_negative(Vec x) {
  const Vec magic(12582912.0f + 127.0f);
  x = vmax(Vec(-127.0f), x);  // the second operand where x is NaN
  Vec t = x + magic;
  Vec r = x - (t - magic);
  Vec p = fma(Vec(0.001326472731307149f), r, Vec(0.009671512991189957f));
  p = fma(p, r, Vec(0.05550733581185341f));
  p = fma(p, r, Vec(0.24022242426872253f));
  p = fma(p, r, Vec(0.6931470036506653f));
  p = fma(p, r, Vec(1.0f));
  return p * as_scale(t);
}

// How 32-bit words of K, Q, V and P multiply: one float32, or a pair of bfloat16.
struct F32Words {
  using In = float;
  static constexpr int per_word = 1;
  static FD_INLINE Vec dot(Vec broadcast, Vec panel, Vec acc) { return fma(broadcast, panel, acc); }
};
#ifdef __AVX512BF16__
struct Bf16Words {
  static constexpr int per_word = 2;
  static FD_INLINE Vec dot(Vec broadcast, Vec panel, Vec acc) {
    return _mm512_dpbf16_ps(acc.v, (__m512bh)broadcast.v, (__m512bh)panel.v);
  }
};
#endif

// acc[i][j] = sum over w of rows[i * row_stride + w * word_stride] . panel[w][j]: the inner loop of
// both products, kM * NR accumulators in registers.
template <class Words, int NR>
FD_INLINE void multiply(const float* rows, int64_t row_stride, int64_t word_stride,
                        const float* panel, int64_t words, Vec (&acc)[kM][NR]) {
#pragma GCC unroll 8
  for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < NR; ++j) acc[i][j] = Vec(0.0f);
  for (int64_t w = 0; w < words; ++w) {
    Vec p[NR];
#pragma GCC unroll 3
    for (int j = 0; j < NR; ++j) p[j] = Vec::load(panel + w * kLanes + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
      Vec b(rows[i * row_stride + w * word_stride]);
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) acc[i][j] = Words::dot(b, p[j], acc[i][j]);
    }
  }
}

// P = 2^(S - m) in place, and its sum. Pairs of keys go into one word for bfloat16.
template <class Words, int NR>
FD_LOOP void exp_block(float* s, int64_t keys, const Vec (&m)[NR], Vec (&sum)[NR]) {
  if constexpr (Words::per_word == 1) {
    for (int64_t t = 0; t < keys; ++t)
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) {
        Vec p = exp2_negative(Vec::load(s + t * kLanes + j * W) - m[j]);
        sum[j] = sum[j] + p;
        p.store(s + t * kLanes + j * W);
      }
  }
#ifdef __AVX512BF16__
  if constexpr (Words::per_word == 2) {
    // Word i of the result: the halves i (first key) and 16 + i (second key).
    alignas(64) static constexpr uint16_t kInterleave[32] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(kInterleave);
    for (int64_t t = 0; t < keys; t += 2)
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) {
        Vec p0 = exp2_negative(Vec::load(s + t * kLanes + j * W) - m[j]);
        Vec p1 = exp2_negative(Vec::load(s + (t + 1) * kLanes + j * W) - m[j]);
        sum[j] = sum[j] + (p0 + p1);
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(p1.v, p0.v);
        _mm512_storeu_si512(s + t / 2 * kLanes + j * W, _mm512_permutexvar_epi16(interleave, both));
      }
  }
#endif
}

// O^T = O^T * correction + V^T P^T over `words` words of P; V in panels of kM channels, its words
// word_stride apart. The block is summed on its own first: one running sum over thousands of keys
// would lose bits.
template <class Words, int NR>
FD_LOOP void value_block(const float* v, int64_t panel_stride, int64_t word_stride, int64_t panels,
                         const float* p, int64_t words, const Vec (&correction)[NR], bool first,
                         float* o) {
  for (int64_t n = 0; n < panels; ++n, v += panel_stride, o += kM * kLanes) {
    Vec acc[kM][NR];
    multiply<Words, NR>(v, 1, Words::per_word == 2 ? kM : word_stride, p, words, acc);
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) {
        float* x = o + i * kLanes + j * W;
        (first ? acc[i][j] : fma(Vec::load(x), correction[j], acc[i][j])).store(x);
      }
  }
}

// Rows of O [dim][kLanes] from lane j * W on, `rows` of them, divided by their sums of P, to `out`.
// A live row's sum is at least 1, its largest weight; a NaN sum makes the row NaN. Where every key
// is masked, or there was none (not `any`; then o is not read), the row is 0.
template <class E>
FD_LOOP void store_rows(const float* o, int j, Vec sum, bool any, int rows, int64_t dim, E* out,
                        int64_t row_stride) {
  const Vec inverse = Vec(1.0f) / sum;
  for (int64_t d = 0; d < dim; d += W) {
    const int n = dim - d < W ? int(dim - d) : W;
    Vec r[W];
    for (int i = 0; i < W; ++i) {
      r[i] = i < n && any ? Vec::load(o + (d + i) * kLanes + j * W) * inverse : Vec(0.0f);
      r[i] = select_lt(sum, Vec(0.5f), Vec(0.0f), r[i]);
    }
    transpose(r);
    for (int i = 0; i < rows; ++i) {
      if (n == W)
        r[i].store(out + i * row_stride + d);
      else
        r[i].store(out + i * row_stride + d, n);
    }
  }
}

}  // namespace

FASTDIFF_KERNEL_END
