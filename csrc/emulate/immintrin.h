// AVX-512 for kernel files that are compiled for AVX2 (FASTDIFF_EMULATE in setup.py): SIMDe's
// functions (github.com/simd-everywhere/simde), and below those that SIMDe 0.7.4 lacks or whose
// values are not the instruction's, from Intel's descriptions, lane by lane. Included once by each
// kernel file in place of the compiler's <immintrin.h>; masked-off memory is never touched.
#pragma once
#include_next <immintrin.h>
#ifdef __AVX512F__
#error "FASTDIFF_EMULATE is for a compiler without AVX-512 switched on"
#endif
#ifdef FASTDIFF_EMULATE_AVX2_VNNI  // AVX2 and one instruction more
#include <simde/x86/avx512/dpbusd.h>
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#else
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define FD_REGISTER "+m"  // there is none as wide

// What kernel files ask for; only now, as SIMDe would take them for the processor's.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#ifndef FASTDIFF_EMULATE_AVX512
#define __AVX512VNNI__ 1
#endif
#ifdef FASTDIFF_EMULATE_AVX512_BF16
#define __AVX512BF16__ 1
#endif

namespace {
namespace emulated {

#define FD_EMULATED inline __attribute__((always_inline, unused))

// A register as an array.
template <class Register, class T>
struct Of {
  T at[sizeof(Register) / sizeof(T)];
  FD_EMULATED Of() {}
  FD_EMULATED Of(Register v) { std::memcpy(at, &v, sizeof(v)); }
  FD_EMULATED operator Register() const {
    Register v;
    std::memcpy(&v, at, sizeof(v));
    return v;
  }
};
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wignored-attributes"  // registers may alias, in arrays or not
using Floats = Of<__m512, float>;
using Ints = Of<__m512i, int32_t>;
using Shorts = Of<__m512i, int16_t>;
using Halves = Of<__m512i, uint16_t>;
using Bytes = Of<__m512i, int8_t>;
using Floats8 = Of<__m256, float>;
using Halves16 = Of<__m256i, uint16_t>;
#pragma GCC diagnostic pop

// ---- masked memory ----

template <class To, class Mask>
FD_EMULATED To maskz_load(Mask k, const void* p) {
  To r;
  const auto* from = static_cast<const unsigned char*>(p);
  constexpr size_t each = sizeof(r.at[0]);
  for (size_t i = 0; i < sizeof(r.at) / each; ++i) {
    r.at[i] = 0;
    if (k >> i & 1) std::memcpy(&r.at[i], from + i * each, each);
  }
  return r;
}
template <class From, class Mask>
FD_EMULATED void mask_store(void* p, Mask k, const From& v) {
  auto* to = static_cast<unsigned char*>(p);
  constexpr size_t each = sizeof(v.at[0]);
  for (size_t i = 0; i < sizeof(v.at) / each; ++i)
    if (k >> i & 1) std::memcpy(to + i * each, &v.at[i], each);
}
FD_EMULATED __m512 maskz_loadu_ps(__mmask16 k, const void* p) { return maskz_load<Floats>(k, p); }
FD_EMULATED __m512i maskz_loadu_epi16(__mmask32 k, const void* p) {
  return maskz_load<Halves>(k, p);
}
FD_EMULATED __m512i maskz_loadu_epi8(__mmask64 k, const void* p) { return maskz_load<Bytes>(k, p); }
FD_EMULATED __m256i maskz_loadu_epi16_256(__mmask16 k, const void* p) {
  return maskz_load<Halves16>(k, p);
}
FD_EMULATED void mask_storeu_ps(void* p, __mmask16 k, __m512 v) { mask_store(p, k, Floats(v)); }
FD_EMULATED void mask_storeu_epi16_256(void* p, __mmask16 k, __m256i v) {
  mask_store(p, k, Halves16(v));
}
FD_EMULATED void mask_cvtsepi32_storeu_epi8(void* p, __mmask16 k, __m512i v) {
  const Ints x(v);
  for (int i = 0; i < 16; ++i) {
    const int8_t byte = int8_t(x.at[i] < -128 ? -128 : x.at[i] > 127 ? 127 : x.at[i]);
    if (k >> i & 1) std::memcpy(static_cast<int8_t*>(p) + i, &byte, 1);
  }
}

// ---- conversions ----

template <class F>
FD_EMULATED __m512 by_halves(__m512 v, F f) {  // f of eight lanes
  Floats x(v);
  for (int i = 0; i < 16; i += 8) _mm256_storeu_ps(x.at + i, f(_mm256_loadu_ps(x.at + i)));
  return x;
}
FD_EMULATED __m512i cvtps_epi32(__m512 v) {  // 0x80000000 out of range
  const Floats x(v);
  Ints r;
  for (int i = 0; i < 16; i += 8)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(r.at + i),
                        _mm256_cvtps_epi32(_mm256_loadu_ps(x.at + i)));
  return r;
}
FD_EMULATED __m512 cvtepi32_ps(__m512i v) {
  const Ints x(v);
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = float(x.at[i]);
  return r;
}
FD_EMULATED __m512 cvtepu32_ps(__m512i v) {
  const Ints x(v);
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = float(uint32_t(x.at[i]));
  return r;
}
FD_EMULATED __m512i cvtepu16_epi32(__m256i v) {
  const Halves16 x(v);
  Ints r;
  for (int i = 0; i < 16; ++i) r.at[i] = x.at[i];
  return r;
}
FD_EMULATED __m256i cvtepi32_epi16(__m512i v) {
  const Ints x(v);
  Halves16 r;
  for (int i = 0; i < 16; ++i) r.at[i] = uint16_t(x.at[i]);
  return r;
}
FD_EMULATED __m512 cvtph_ps(__m256i v) {
  const Halves16 x(v);
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = _cvtsh_ss(x.at[i]);
  return r;
}
template <int kRounding>
FD_EMULATED __m256i cvtps_ph(__m512 v) {
  const Floats x(v);
  Halves16 r;
  for (int i = 0; i < 16; ++i) r.at[i] = uint16_t(_cvtss_sh(x.at[i], kRounding & 7));
  return r;
}
FD_EMULATED uint16_t to_bf16(float x) {  // denormals to 0, ties to even, NaN made quiet
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t size = u & 0x7fffffffu;
  if (size < 0x00800000u) return uint16_t(u >> 16 & 0x8000u);
  if (size > 0x7f800000u) return uint16_t(u >> 16 | 0x40u);
  return uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
FD_EMULATED __m256i cvtneps_pbh(__m512 v) {
  const Floats x(v);
  Halves16 r;
  for (int i = 0; i < 16; ++i) r.at[i] = to_bf16(x.at[i]);
  return r;
}
FD_EMULATED __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  const Floats x(low), y(high);
  Halves r;
  for (int i = 0; i < 16; ++i) r.at[i] = to_bf16(x.at[i]), r.at[16 + i] = to_bf16(y.at[i]);
  return r;
}

// ---- arithmetic ----

FD_EMULATED __m512i madd_epi16(__m512i a, __m512i b) {
  const Shorts x(a), y(b);
  Ints r;
  for (int i = 0; i < 16; ++i)
    r.at[i] =
        int32_t(uint32_t(x.at[2 * i] * y.at[2 * i]) + uint32_t(x.at[2 * i + 1] * y.at[2 * i + 1]));
  return r;
}
FD_EMULATED __m512 fmaddsub_ps(__m512 a, __m512 b, __m512 c) {
  const Floats x(a), y(b), z(c);
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = std::fma(x.at[i], y.at[i], i % 2 ? z.at[i] : -z.at[i]);
  return r;
}
FD_EMULATED __m512 abs_ps(__m512 v) {  // of -0 and of NaN as well
  Floats x(v);
  for (float& a : x.at) a = std::fabs(a);
  return x;
}
// src + a1 b1 + a0 b0, odd elements first, each sum rounded to nearest; denormals in and out are 0.
FD_EMULATED float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
FD_EMULATED float of_bf16(uint16_t x) {
  const uint32_t u = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return flushed(f);
}
template <class Pairs>
FD_EMULATED __m512 dpbf16_ps(__m512 src, Pairs a, Pairs b) {
  const Halves x((__m512i)a), y((__m512i)b);
  Floats r(src);
  for (int i = 0; i < 16; ++i)
    for (int j = 2 * i + 1; j >= 2 * i; --j)
      r.at[i] = flushed(std::fma(of_bf16(x.at[j]), of_bf16(y.at[j]), flushed(r.at[i])));
  return r;
}
FD_EMULATED float scaled(float a, float b) {  // a 2^floor(b), one rounding
  if (std::isnan(a)) return !std::isinf(b) ? a : b > 0 ? b : 0.0f;
  if (std::isnan(b)) return b;
  if (std::isinf(b)) {
    const bool grows = b > 0, loses = grows ? a == 0.0f : std::isinf(a);
    return loses ? NAN : std::copysign(grows ? INFINITY : 0.0f, a);
  }
  const float n = std::floor(b);
  return float(std::ldexp(double(a), int(n < -400.0f ? -400.0f : n > 400.0f ? 400.0f : n)));
}
FD_EMULATED __m512 scalef_ps(__m512 a, __m512 b) {
  const Floats x(a), y(b);
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = scaled(x.at[i], y.at[i]);
  return r;
}
template <int kHow>
FD_EMULATED __m512 reduce_ps(__m512 v) {  // what rounding to integers takes off
  static_assert(kHow == (_MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
  Floats x(v);
  for (float& a : x.at) a = std::isinf(a) ? 0.0f : a - std::floor(a);
  return x;
}

// ---- lanes ----

template <int kPart>
FD_EMULATED __m256 extractf32x8_ps(__m512 v) {
  return _mm256_loadu_ps(Floats(v).at + 8 * kPart);
}
template <int kOrder>
FD_EMULATED __m512 permute_ps(__m512 v) {
  const Floats x(v);
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = x.at[i / 4 * 4 + (kOrder >> i % 4 * 2 & 3)];
  return r;
}
template <int kOrder>
FD_EMULATED __m512 shuffle_f32x4(__m512 a, __m512 b) {
  const Floats x(a), y(b);
  Floats r;
  for (int i = 0; i < 16; ++i) r.at[i] = (i < 8 ? x : y).at[(kOrder >> i / 4 * 2 & 3) * 4 + i % 4];
  return r;
}
// Halves upon halves, as compilers have it: these are no instructions.
template <class Lanes, class F>
FD_EMULATED auto reduced(Lanes x, F f) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) x.at[i] = f(x.at[i + n], x.at[i]);
  return x.at[0];
}
FD_EMULATED float reduce_add_ps(__m512 v) {
  return reduced(Floats(v), [](float a, float b) { return a + b; });
}
FD_EMULATED float reduce_max_ps(__m512 v) {
  return reduced(Floats(v), [](float a, float b) { return a > b ? a : b; });
}
FD_EMULATED int32_t reduce_add_epi32(__m512i v) {
  return reduced(Ints(v), [](int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); });
}

}  // namespace emulated
}  // namespace

#undef _mm512_abs_ps
#undef _mm512_dpbf16_ps
#undef _mm512_madd_epi16
#undef _mm512_scalef_ps
#undef _mm256_mask_storeu_epi16
#undef _mm256_maskz_loadu_epi16
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#undef _mm512_permute_ps
#undef _mm512_reduce_ps
#undef _mm512_shuffle_f32x4
#define _mm256_mask_storeu_epi16 emulated::mask_storeu_epi16_256
#define _mm256_maskz_loadu_epi16 emulated::maskz_loadu_epi16_256
#define _mm512_abs_ps emulated::abs_ps
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepu32_ps emulated::cvtepu32_ps
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _mm512_cvtneps_pbh emulated::cvtneps_pbh
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtps_ph(v, how) emulated::cvtps_ph<how>(v)
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_extractf32x8_ps(v, part) emulated::extractf32x8_ps<part>(v)
#define _mm512_fmaddsub_ps emulated::fmaddsub_ps
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_mask_cvtsepi32_storeu_epi8 emulated::mask_cvtsepi32_storeu_epi8
#define _mm512_mask_storeu_ps emulated::mask_storeu_ps
#define _mm512_maskz_loadu_epi16 emulated::maskz_loadu_epi16
#define _mm512_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_permute_ps(v, order) emulated::permute_ps<order>(v)
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_reduce_ps(v, how) emulated::reduce_ps<how>(v)
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_shuffle_f32x4(a, b, order) emulated::shuffle_f32x4<order>(a, b)
#endif
