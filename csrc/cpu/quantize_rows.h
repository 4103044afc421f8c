// A row as int8, from the largest magnitude of its elements.
// Magnitudes are compared as the integers that their bits are: those of infinities are above all
// finite ones and those of NaN above these, so that nothing is lost in a maximum.
#pragma once
#include <cstring>
#include <limits>

#include "vec.h"

FASTDIFF_KERNEL_BEGIN

constexpr float kLevels = 127.0f;
constexpr float kTiny = kLevels * std::numeric_limits<float>::min();

FD_INLINE Vec max_bits(Vec a, Vec b) {
#ifdef __AVX512F__
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)));
#else
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a.v), _mm256_castps_si256(b.v)));
#endif
}

// The first `count` lanes, which are at most 127, to the nearest integer, ties to even.
FD_INLINE void store_rounded(Vec v, int8_t* q, int count) {
#ifdef __AVX512F__
  _mm512_mask_cvtsepi32_storeu_epi8(q, Vec::mask(count), _mm512_cvtps_epi32(v.v));
#else
  const __m256i wide = _mm256_cvtps_epi32(v.v);
  const __m128i half =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  const __m128i bytes = _mm_packs_epi16(half, half);
  if (count >= Vec::width) return _mm_storel_epi64(reinterpret_cast<__m128i*>(q), bytes);
  alignas(16) int8_t t[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(t), bytes);
  std::memcpy(q, t, size_t(count));
#endif
}

// What a row is rounded with, from its largest magnitude; writes its scale.
struct Levels {
  bool usable;
  Vec inverse;

  FD_INLINE Levels(float largest, float* s) : inverse(0.0f) {
    const bool finite = std::isfinite(largest);
    usable = finite && largest >= kTiny;
    *s = usable ? largest / kLevels : finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    if (usable) inverse = Vec(1.0f / largest * kLevels);
  }
  // load(i, part) gives elements from i on.
  template <class Load>
  FD_INLINE void round(int64_t dim, Load load, int8_t* q) const {
    each(dim, [&](int64_t i, auto part) {
      store_rounded(load(i, part) * inverse, q + i,
                    dim - i < Vec::width ? int(dim - i) : Vec::width);
    });
  }
};

// The largest of the lanes.
FD_INLINE float largest_of(Vec most) {
  alignas(64) int32_t lanes[Vec::width];
  std::memcpy(lanes, &most, sizeof(lanes));
  int32_t bits = lanes[0];
  for (int i = 1; i < Vec::width; ++i) bits = lanes[i] > bits ? lanes[i] : bits;
  float largest;
  std::memcpy(&largest, &bits, sizeof(bits));
  return largest;
}

// `most` has the largest magnitude in one of its lanes.
template <class Load>
void quantize_row(Vec most, int64_t dim, Load load, int8_t* q, float* s) {
  const Levels levels(largest_of(most), s);
  if (levels.usable)
    levels.round(dim, load, q);
  else if (dim)  // of no columns there is no memory
    std::memset(q, 0, size_t(dim));
}

FASTDIFF_KERNEL_END
