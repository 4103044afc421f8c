// One float32 vector of the level being compiled, with loads and stores that convert bfloat16 and
// float16. Included only by *_kernel.cpp, between no other instruction set: everything lives in the
// level's own namespace.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "level.h"

#ifndef FASTDIFF_LEVEL
#error "compile kernel files with -DFASTDIFF_LEVEL=avx2|avx512|avx512_bf16"
#endif
#define FASTDIFF_KERNEL_BEGIN \
  namespace fastdiff {        \
  namespace FASTDIFF_LEVEL {
#define FASTDIFF_KERNEL_END \
  }                         \
  }
#define FD_INLINE inline __attribute__((always_inline))
#ifndef FD_REGISTER  // of a vector, in assembly
#define FD_REGISTER "+v"
#endif

FASTDIFF_KERNEL_BEGIN

// Work memory of a kernel; contents undefined.
template <class E>
struct Scratch {
  E* data;
  explicit Scratch(size_t count)
      : data(static_cast<E*>(::operator new(count * sizeof(E), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FD_INLINE float to_float(float x) { return x; }
FD_INLINE float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
FD_INLINE float to_float(f16 x) { return _cvtsh_ss(x.bits); }
template <class T>
FD_INLINE T from_float(float x);
template <>
FD_INLINE float from_float<float>(float x) {
  return x;
}
template <>
FD_INLINE bf16 from_float<bf16>(float x) {  // round to nearest even; NaN stays a quiet NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((u >> 16) | 0x40)};
  return bf16{uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
template <>
FD_INLINE f16 from_float<f16>(float x) {
  return f16{uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
}

#ifdef __AVX512F__

struct Vec {
  static constexpr int width = 16;
  __m512 v;
  FD_INLINE Vec() {}
  FD_INLINE Vec(__m512 x) : v(x) {}
  FD_INLINE explicit Vec(float x) : v(_mm512_set1_ps(x)) {}

  static FD_INLINE __mmask16 mask(int n) { return n >= 16 ? 0xffff : __mmask16((1u << n) - 1); }
  static FD_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static FD_INLINE Vec load(const bf16* p) {
    __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static FD_INLINE Vec load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // First n of width elements; the rest are 0 and their memory is not touched.
  static FD_INLINE Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static FD_INLINE Vec load(const bf16* p, int n) {
    __m256i h = _mm256_maskz_loadu_epi16(mask(n), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  static FD_INLINE Vec load(const f16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p));
  }
  FD_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FD_INLINE void store(bf16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16());
  }
  FD_INLINE void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  FD_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, mask(n), v); }
  FD_INLINE void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, mask(n), to_bf16()); }
  FD_INLINE void store(f16* p, int n) const {
    _mm256_mask_storeu_epi16(p, mask(n),
                             _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  FD_INLINE __m256i to_bf16() const {
#ifdef __AVX512BF16__  // one instruction; float32 denormals become 0
    return __m256i(_mm512_cvtneps_pbh(v));
#else
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_srli_epi32(
        _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_set1_epi32(r, nan, 0x7fc0);
    return _mm512_cvtepi32_epi16(r);
#endif
  }
  FD_INLINE float sum() const { return _mm512_reduce_add_ps(v); }
  FD_INLINE float max() const { return _mm512_reduce_max_ps(v); }
};
FD_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
FD_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
FD_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
FD_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }    // a*b + c
FD_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }  // c - a*b
FD_INLINE Vec vmax(Vec a, Vec b) {
  return _mm512_max_ps(a.v, b.v);
}  // second operand where either is NaN
FD_INLINE Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
FD_INLINE Vec vsqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
FD_INLINE Vec vabs(Vec a) { return _mm512_abs_ps(a.v); }
FD_INLINE Vec round_even(Vec a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
FD_INLINE Vec scale2(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }  // a * 2^n, n integral
FD_INLINE Vec copysign(Vec magnitude, Vec sign) {
  __m512i s = _mm512_set1_epi32(int(0x80000000u));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(s, _mm512_castps_si512(sign.v),
                                                       _mm512_castps_si512(magnitude.v), 0xca));
}
FD_INLINE Vec keep_nan(Vec result, Vec x) {  // result, but x where x is NaN
  return _mm512_mask_mov_ps(result.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), x.v);
}
FD_INLINE Vec first(Vec a, int n) {
  return _mm512_maskz_mov_ps(Vec::mask(n), a.v);
}  // 0 past lane n
// exp2 in two steps: a - floor(a), and p * 2^floor(a) (0 or infinite out of range).
FD_INLINE Vec fraction(Vec a) {
  return _mm512_reduce_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
FD_INLINE Vec scale2_floor(Vec p, Vec a) { return _mm512_scalef_ps(p.v, a.v); }
// a < b ? yes : no
FD_INLINE Vec select_lt(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_mov_ps(no.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), yes.v);
}

// Channels 2i and 2i+1 exchanged.
FD_INLINE Vec swap_pairs(Vec a) { return _mm512_permute_ps(a.v, 0xb1); }
// a*b - c in even lanes, a*b + c in odd ones.
FD_INLINE Vec fmaddsub(Vec a, Vec b, Vec c) { return _mm512_fmaddsub_ps(a.v, b.v, c.v); }
// First n/2 floats, each twice; n even.
FD_INLINE Vec load_twice(const float* p, int n) {
  __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  return _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(Vec::mask(n / 2), p));
}

#else  // AVX2

struct Vec {
  static constexpr int width = 8;
  __m256 v;
  FD_INLINE Vec() {}
  FD_INLINE Vec(__m256 x) : v(x) {}
  FD_INLINE explicit Vec(float x) : v(_mm256_set1_ps(x)) {}

  static FD_INLINE __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static FD_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static FD_INLINE Vec widen(__m128i h, const bf16*) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  static FD_INLINE Vec widen(__m128i h, const f16*) { return _mm256_cvtph_ps(h); }
  static FD_INLINE Vec load(const bf16* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
  }
  static FD_INLINE Vec load(const f16* p) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
  }
  static FD_INLINE Vec load(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  template <class H>
  static FD_INLINE Vec load(const H* p, int n) {  // AVX2 has no 16-bit masked load
    alignas(16) uint16_t t[8] = {0};
    std::memcpy(t, p, size_t(n < 8 ? n : 8) * 2);
    return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(t)), p);
  }
  FD_INLINE __m128i narrow(const bf16*) const {
    __m256i u = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_srli_epi32(
        _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }
  FD_INLINE __m128i narrow(const f16*) const {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  FD_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FD_INLINE void store(bf16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p));
  }
  FD_INLINE void store(f16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p)); }
  FD_INLINE void store(float* p, int n) const { _mm256_maskstore_ps(p, mask(n), v); }
  template <class H>
  FD_INLINE void store(H* p, int n) const {
    alignas(16) uint16_t t[8];
    _mm_store_si128(reinterpret_cast<__m128i*>(t), narrow(p));
    std::memcpy(p, t, size_t(n < 8 ? n : 8) * 2);
  }
  FD_INLINE float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  FD_INLINE float max() const {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
};
FD_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
FD_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
FD_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
FD_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
FD_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
FD_INLINE Vec fnma(Vec a, Vec b, Vec c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
FD_INLINE Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
FD_INLINE Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
FD_INLINE Vec vsqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
FD_INLINE Vec vabs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
FD_INLINE Vec round_even(Vec a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// a * 2^n, n integral in [-252, 252]: two exact factors keep 2^n normal, so results may go denormal
// or infinite.
FD_INLINE Vec scale2(Vec a, Vec n) {
  __m256i i = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(i, 1),
          bias = _mm256_set1_epi32(127);
  __m256 f = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  __m256 g =
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a.v, f), g);
}
FD_INLINE Vec copysign(Vec magnitude, Vec sign) {
  __m256 s = _mm256_set1_ps(-0.0f);
  return _mm256_or_ps(_mm256_andnot_ps(s, magnitude.v), _mm256_and_ps(s, sign.v));
}
FD_INLINE Vec keep_nan(Vec result, Vec x) {
  return _mm256_blendv_ps(result.v, x.v, _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
}
FD_INLINE Vec first(Vec a, int n) { return _mm256_and_ps(a.v, _mm256_castsi256_ps(Vec::mask(n))); }
FD_INLINE Vec fraction(Vec a) { return _mm256_sub_ps(a.v, _mm256_floor_ps(a.v)); }
FD_INLINE Vec scale2_floor(Vec p, Vec a) {  // clamped: 2^-126 for 0, 2^127 for infinite
  __m256 n = _mm256_floor_ps(vmax(vmin(a, Vec(127.0f)), Vec(-126.0f)).v);
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
FD_INLINE Vec select_lt(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
FD_INLINE Vec swap_pairs(Vec a) { return _mm256_permute_ps(a.v, 0xb1); }
FD_INLINE Vec fmaddsub(Vec a, Vec b, Vec c) { return _mm256_fmaddsub_ps(a.v, b.v, c.v); }
FD_INLINE Vec load_twice(const float* p, int n) {
  __m256i twice = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return _mm256_permutevar8x32_ps(_mm256_maskload_ps(p, Vec::mask(n / 2)), twice);
}

#endif

// exp(x): 2^n * p(r), Cephes coefficients, <= 2 ulp; 0 below -104, inf above 88.73; NaN stays NaN.
FD_INLINE Vec vexp(Vec x) {
  Vec y = vmin(vmax(x, Vec(-105.0f)), Vec(89.0f));
  Vec n = round_even(y * Vec(1.44269504088896341f));
  Vec r = fnma(n, Vec(0.693359375f), y);
  r = fnma(n, Vec(-2.12194440e-4f), r);
  Vec p = Vec(1.9875691500e-4f);
  p = fma(p, r, Vec(1.3981999507e-3f));
  p = fma(p, r, Vec(8.3334519073e-3f));
  p = fma(p, r, Vec(4.1665795894e-2f));
  p = fma(p, r, Vec(1.6666665459e-1f));
  p = fma(p, r, Vec(5.0000001201e-1f));
  p = fma(p * r, r, r + Vec(1.0f));
  return keep_nan(scale2(p, n), x);
}

FD_INLINE Vec vsigmoid(Vec x) { return Vec(1.0f) / (Vec(1.0f) + vexp(Vec(0.0f) - x)); }
FD_INLINE Vec vsilu(Vec x) { return x / (Vec(1.0f) + vexp(Vec(0.0f) - x)); }

// tanh(x) = 1 - 2/(exp(2|x|)+1) with the sign of x; a Taylor branch below 0.1 keeps the relative
// error <= 4e-7.
FD_INLINE Vec vtanh(Vec x) {
  Vec a = vabs(x), s = x * x;
  Vec big = Vec(1.0f) - Vec(2.0f) / (vexp(a + a) + Vec(1.0f));
  Vec p = fma(s, Vec(-17.0f / 315.0f), Vec(2.0f / 15.0f));
  p = fma(s, p, Vec(-1.0f / 3.0f));
  Vec small = fma(a * s, p, a);
  return keep_nan(copysign(select_lt(a, Vec(0.1f), small, big), x), x);
}

// GELU, tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415): x * sigmoid(2 sqrt(2/pi) (x +
// 0.044715 x^3)).
FD_INLINE Vec vgelu_tanh(Vec x) {
  Vec inner = x * fma(x * x, Vec(-0.044715f * 1.5957691216057308f), Vec(-1.5957691216057308f));
  return x / (Vec(1.0f) + vexp(inner));
}

// GELU: x Phi(x) with Phi(x) = 1/2 + x P(x^2)/Q(x^2), minimax (2e-8) for |x| < 5.6, 0 or 1 past it.
// Absolute error <= 1e-6 (near |x| = 5; torch's is 1.2e-6); half the time of a form through exp.
// NaN at NaN and at -inf.
FD_INLINE Vec vgelu(Vec x) {
  Vec s = vmin(x * x, Vec(31.36f));
  Vec p = Vec(2.2297456325759413e-8f), q = Vec(1.179659534500388e-6f);
  p = fma(p, s, Vec(6.289793418545742e-6f));
  q = fma(q, s, Vec(7.334442489081994e-5f));
  p = fma(p, s, Vec(1.6892977873794734e-4f));
  q = fma(q, s, Vec(1.8854949157685041e-3f));
  p = fma(p, s, Vec(4.677353892475367e-3f));
  q = fma(q, s, Vec(2.8677579015493393e-2f));
  p = fma(p, s, Vec(3.392906114459038e-2f));
  q = fma(q, s, Vec(0.2517138719558716f));
  p = fma(p, s, Vec(0.3989422619342804f));
  q = fma(q, s, Vec(1.0f));
  return x * vmax(vmin(fma(x, p / q, Vec(0.5f)), Vec(1.0f)), Vec(0.0f));
}

// Full vectors and the masked tail of a row through one generic body(i, part).
struct Full {
  template <class T>
  FD_INLINE Vec load(const T* p) const {
    return Vec::load(p);
  }
  template <class T>
  FD_INLINE void store(Vec v, T* p) const {
    v.store(p);
  }
  FD_INLINE Vec keep(Vec v) const { return v; }
};
struct Tail {
  int n;
  template <class T>
  FD_INLINE Vec load(const T* p) const {
    return Vec::load(p, n);
  }
  template <class T>
  FD_INLINE void store(Vec v, T* p) const {
    v.store(p, n);
  }
  FD_INLINE Vec keep(Vec v) const { return first(v, n); }
};

template <class F>
FD_INLINE void each(int64_t dim, F body) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + Vec::width <= dim; i += Vec::width) body(i, Full{});
  if (i < dim) body(i, Tail{int(dim - i)});
}

// Asks for the cache line of p, which need not be readable, in L2 ahead of its use.
FD_INLINE void prefetch_l2(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
}

// Sums of K quantities over a row; four chains of additions hide their latency.
template <int K, class F>
FD_INLINE void sum_each(int64_t dim, float (&sums)[K], F body) {
  Vec acc[4][K];
  for (auto& chain : acc)
    for (auto& v : chain) v = Vec(0.0f);
  constexpr int W = Vec::width;
  int64_t i = 0;
  for (; i + 4 * W <= dim; i += 4 * W)
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) body(i + u * W, Full{}, acc[u]);
  for (; i + W <= dim; i += W) body(i, Full{}, acc[0]);
  if (i < dim) body(i, Tail{int(dim - i)}, acc[0]);
  for (int k = 0; k < K; ++k) sums[k] = ((acc[0][k] + acc[1][k]) + (acc[2][k] + acc[3][k])).sum();
}

FASTDIFF_KERNEL_END

// Switches on args.dtype with `T` bound to float, bf16 or f16.
#define FASTDIFF_DTYPE_SWITCH(dtype, ...) \
  switch (dtype) {                        \
    case ::fastdiff::Dtype::kF32: {       \
      using T = float;                    \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case ::fastdiff::Dtype::kBf16: {      \
      using T = bf16;                     \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
    case ::fastdiff::Dtype::kF16: {       \
      using T = f16;                      \
      __VA_ARGS__;                        \
      break;                              \
    }                                     \
  }
