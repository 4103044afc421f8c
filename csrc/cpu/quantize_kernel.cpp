// Two passes over a row, which stays in L1 between them: the largest magnitude, then the rounding.
// Magnitudes are compared as the integers that their bits are: those of infinities are above all
// finite ones and those of NaN above these, so that nothing is lost in a maximum.
#include <cstring>
#include <limits>

#include "quantize.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

namespace {

constexpr int W = Vec::width;
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
  if (count >= W) return _mm_storel_epi64(reinterpret_cast<__m128i*>(q), bytes);
  alignas(16) int8_t t[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(t), bytes);
  std::memcpy(q, t, size_t(count));
#endif
}

template <int kActivation, class T>
void quantize_rows(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const bool plain = !kActivation && !a.smooth;  // then the second pass reads x again
  Scratch<float> kept(plain ? 1 : size_t(a.dim) + 1);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    int8_t* q = a.q + row * a.dim;
    Vec most(0.0f);
    each(a.dim, [&](int64_t i, auto part) {
      Vec y = part.load(x + i);
      if constexpr (kActivation == 1) y = vgelu_tanh(y);
      if constexpr (kActivation == 2) y = vsilu(y);
      if (a.smooth) y = part.keep(y / part.load(a.smooth + i));
      if (!plain) part.store(y, kept.data + i);
      most = max_bits(most, vabs(y));
    });
    alignas(64) float lanes[W];
    most.store(lanes);
    float largest = lanes[0];
    bool finite = std::isfinite(largest);
    for (int i = 1; i < W; ++i) {
      finite = finite && std::isfinite(lanes[i]);
      largest = lanes[i] > largest ? lanes[i] : largest;
    }
    if (!finite || largest < kTiny) {
      a.s[row] = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
      if (a.dim) std::memset(q, 0, size_t(a.dim));  // of no columns there is no memory
      continue;
    }
    a.s[row] = largest / kLevels;
    const Vec inverse(1.0f / largest * kLevels);
    each(a.dim, [&](int64_t i, auto part) {
      const Vec y = plain ? part.load(x + i) : part.load(kept.data + i);
      store_rounded(y * inverse, q + i, a.dim - i < W ? int(a.dim - i) : W);
    });
  }
}

}  // namespace

void quantize(const QuantizeArgs& a) {
  const int64_t grain = 1 + 16384 / (a.dim + 1);
  parallel_for(0, a.rows, grain, [&](int64_t b, int64_t e) {
    switch (a.activation) {
      case 1: FASTDIFF_DTYPE_SWITCH(a.dtype, quantize_rows<1, T>(a, b, e)); break;
      case 2: FASTDIFF_DTYPE_SWITCH(a.dtype, quantize_rows<2, T>(a, b, e)); break;
      default: FASTDIFF_DTYPE_SWITCH(a.dtype, quantize_rows<0, T>(a, b, e));
    }
  });
}

FASTDIFF_KERNEL_END
