#include "fused_step.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

// Vector of 32-bit words, as wide as Vec, and the few operations that Philox and Box-Muller need.
#ifdef __AVX512F__
struct Words {
  __m512i v;
  FD_INLINE Words() {}
  FD_INLINE Words(__m512i x) : v(x) {}
  FD_INLINE explicit Words(uint32_t x) : v(_mm512_set1_epi32(int(x))) {}
};
FD_INLINE Words lanes() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
FD_INLINE Words operator+(Words a, Words b) { return _mm512_add_epi32(a.v, b.v); }
FD_INLINE Words operator-(Words a, Words b) { return _mm512_sub_epi32(a.v, b.v); }
FD_INLINE Words operator&(Words a, Words b) { return _mm512_and_si512(a.v, b.v); }
FD_INLINE Words xor3(Words a, Words b, Words c) {
  return _mm512_ternarylogic_epi32(a.v, b.v, c.v, 0x96);
}
template <int N>
FD_INLINE Words shift_left(Words a) {
  return _mm512_slli_epi32(a.v, N);
}
template <int N>
FD_INLINE Words shift_right(Words a) {
  return _mm512_srli_epi32(a.v, N);
}
FD_INLINE void multiply(Words a, Words b, Words& high, Words& low) {
  __m512i even = _mm512_mul_epu32(a.v, b.v);
  __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), b.v);  // b has all lanes equal
  low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}
FD_INLINE Vec from_unsigned(Words a) { return _mm512_cvtepu32_ps(a.v); }
FD_INLINE Vec from_signed(Words a) { return _mm512_cvtepi32_ps(a.v); }
FD_INLINE Words bits(Vec a) { return _mm512_castps_si512(a.v); }
FD_INLINE Vec as_float(Words a) { return _mm512_castsi512_ps(a.v); }
FD_INLINE Vec select_bit0(Words a, Vec yes, Vec no) {  // yes where bit 0 of a is set
  return _mm512_mask_mov_ps(no.v, _mm512_test_epi32_mask(a.v, _mm512_set1_epi32(1)), yes.v);
}
#else
struct Words {
  __m256i v;
  FD_INLINE Words() {}
  FD_INLINE Words(__m256i x) : v(x) {}
  FD_INLINE explicit Words(uint32_t x) : v(_mm256_set1_epi32(int(x))) {}
};
FD_INLINE Words lanes() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
FD_INLINE Words operator+(Words a, Words b) { return _mm256_add_epi32(a.v, b.v); }
FD_INLINE Words operator-(Words a, Words b) { return _mm256_sub_epi32(a.v, b.v); }
FD_INLINE Words operator&(Words a, Words b) { return _mm256_and_si256(a.v, b.v); }
FD_INLINE Words xor3(Words a, Words b, Words c) {
  return _mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v);
}
template <int N>
FD_INLINE Words shift_left(Words a) {
  return _mm256_slli_epi32(a.v, N);
}
template <int N>
FD_INLINE Words shift_right(Words a) {
  return _mm256_srli_epi32(a.v, N);
}
FD_INLINE void multiply(Words a, Words b, Words& high, Words& low) {
  __m256i even = _mm256_mul_epu32(a.v, b.v);
  __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), b.v);  // b has all lanes equal
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}
// High half times 2^16 is exact, so the sum rounds once: the same as one conversion.
FD_INLINE Vec from_unsigned(Words a) {
  __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(a.v, 16));
  __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(a.v, _mm256_set1_epi32(0xffff)));
  return _mm256_add_ps(_mm256_mul_ps(high, _mm256_set1_ps(65536.0f)), low);
}
FD_INLINE Vec from_signed(Words a) { return _mm256_cvtepi32_ps(a.v); }
FD_INLINE Words bits(Vec a) { return _mm256_castps_si256(a.v); }
FD_INLINE Vec as_float(Words a) { return _mm256_castsi256_ps(a.v); }
FD_INLINE Vec select_bit0(Words a, Vec yes, Vec no) {
  return _mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(_mm256_slli_epi32(a.v, 31)));
}
#endif

// ln(u) for normal u > 0: Cephes logf, <= 1 ulp; u near 1 keeps its relative accuracy.
FD_INLINE Vec vlog(Vec u) {
  // Exponent and mantissa in [sqrt(1/2), sqrt(2)): 0x3f3504f3 is sqrt(1/2).
  Words i = bits(u) - Words(0x3f3504f3u);
  Words biased = shift_right<23>(i + Words(0x3f800000u));  // + 127: unsigned shift
  Vec e = from_signed(biased) - Vec(127.0f);
  Vec x = as_float((i & Words(0x007fffffu)) + Words(0x3f3504f3u)) - Vec(1.0f);
  Vec z = x * x;
  Vec p = Vec(7.0376836292e-2f);
  p = fma(p, x, Vec(-1.1514610310e-1f));
  p = fma(p, x, Vec(1.1676998740e-1f));
  p = fma(p, x, Vec(-1.2420140846e-1f));
  p = fma(p, x, Vec(1.4249322787e-1f));
  p = fma(p, x, Vec(-1.6668057665e-1f));
  p = fma(p, x, Vec(2.0000714765e-1f));
  p = fma(p, x, Vec(-2.4999993993e-1f));
  p = fma(p, x, Vec(3.3333331174e-1f));
  Vec y = fma(e, Vec(-2.12194440e-4f), p * x * z);
  y = fnma(Vec(0.5f), z, y);
  return fma(e, Vec(0.693359375f), x + y);
}

// cos and sin of 2 pi r / 2^32: exact quadrant from integers, Cephes polynomials to pi/4.
FD_INLINE void vsincos(Words r, Vec& cosine, Vec& sine) {
  Words quadrant = shift_right<30>(r + Words(1u << 29));
  Vec a = from_signed(r - shift_left<30>(quadrant)) * Vec(1.4629180792671596e-9f);  // pi/2 2^-30
  Vec z = a * a;
  Vec s = fma(z, Vec(-1.9515295891e-4f), Vec(8.3321608736e-3f));
  s = fma(s, z, Vec(-1.6666654611e-1f));
  s = fma(s * z, a, a);
  Vec c = fma(z, Vec(2.443315711809948e-5f), Vec(-1.388731625493765e-3f));
  c = fma(c, z, Vec(4.166664568298827e-2f));
  c = fma(c, z * z, fnma(Vec(0.5f), z, Vec(1.0f)));
  const Words sign(0x80000000u), none(0u);
  Words sine_sign = shift_left<30>(quadrant) & sign;
  Words cosine_sign = shift_left<30>(quadrant + Words(1u)) & sign;
  cosine = as_float(xor3(bits(select_bit0(quadrant, s, c)), cosine_sign, none));
  sine = as_float(xor3(bits(select_bit0(quadrant, c, s)), sine_sign, none));
}

// One sample's noise: Philox key and the counter words that do not depend on the element.
struct NoiseKey {
  uint64_t seed;
  uint32_t slot, step;
};
static int64_t value(const Counter& counter, int64_t b) { return counter.data[b * counter.stride]; }
static NoiseKey noise_key(const NoiseCounters& noise, int64_t b) {
  return {uint64_t(value(noise.seed, b)), uint32_t(value(noise.slot, b)),
          uint32_t(value(noise.step, b))};
}

// The 64 normals of a group, elements 64 group and on: Philox4x32-10 (Salmon et al. 2011).
FD_INLINE void noise_group(const NoiseKey& key, uint32_t stream, uint32_t group, float* z) {
  for (int half = 0; half < 16; half += Vec::width) {
    Words c0 = lanes() + Words(group * 16 + uint32_t(half)), c1(key.slot), c2(key.step), c3(stream);
    uint32_t k0 = uint32_t(key.seed), k1 = uint32_t(key.seed >> 32);
    const Words m0(0xD2511F53u), m1(0xCD9E8D57u);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      Words h0, l0, h1, l1;
      multiply(c0, m0, h0, l0);
      multiply(c2, m1, h1, l1);
      c0 = xor3(h1, c1, Words(k0));
      c2 = xor3(h0, c3, Words(k1));
      c1 = l1;
      c3 = l0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    auto pair = [&](Words a, Words angle, float* out) {
      Vec u = fma(from_unsigned(a), Vec(0x1p-32f), Vec(0x1p-33f));
      Vec radius = vsqrt(Vec(-2.0f) * vlog(u)), cosine, sine;
      vsincos(angle, cosine, sine);
      (radius * cosine).store(out + half);
      (radius * sine).store(out + 16 + half);
    };
    pair(c0, c1, z);
    pair(c2, c3, z + 32);
  }
}

template <bool Full, class T>
FD_INLINE Vec load(const T* p, int n) {
  if constexpr (Full) return Vec::load(p);
  return Vec::load(p, n);
}
template <bool Full, class T>
FD_INLINE void store(Vec v, T* p, int n) {
  if constexpr (Full) return v.store(p);
  return v.store(p, n);
}

template <bool Full, class Tm>
FD_INLINE Vec combine(const FusedStepArgs& a, const float* w, const Tm* m, int n) {
  Vec g = load<Full>(m, n);
  if (!w) return g;
  g = Vec(w[0]) * g;
  for (int64_t k = 1; k < a.branches; ++k) g = fma(Vec(w[k]), load<Full>(m + k * a.m_branch, n), g);
  return g;
}

// Sums of (g - g_0), (g - g_0)^2 of the combined prediction and of the last branch over one chunk.
// Shifted by the sample's first element, so that the variance loses nothing to a large mean.
template <class Tm>
static void chunk_moments(const FusedStepArgs& a, int64_t b, int64_t chunk) {
  const Tm* m = static_cast<const Tm*>(a.m) + b * a.m_sample;
  const Tm* last = m + (a.branches - 1) * a.m_branch;
  const float* w = a.w ? a.w + b * a.branches : nullptr;
  float g0 = to_float(m[0]), p0 = to_float(last[0]);
  if (w) {
    g0 = w[0] * g0;
    for (int64_t k = 1; k < a.branches; ++k) g0 += w[k] * to_float(m[k * a.m_branch]);
  }
  Vec s1(0.0f), s2(0.0f), t1(0.0f), t2(0.0f);
  int64_t i = chunk * kStepChunk, end = i + kStepChunk < a.numel ? i + kStepChunk : a.numel;
  for (; i + Vec::width <= end; i += Vec::width) {
    Vec g = combine<true>(a, w, m + i, 0) - Vec(g0), p = Vec::load(last + i) - Vec(p0);
    s1 = s1 + g;
    s2 = fma(g, g, s2);
    t1 = t1 + p;
    t2 = fma(p, p, t2);
  }
  double* out = a.moments + (b * a.chunks + chunk) * 4;
  out[0] = s1.sum(), out[1] = s2.sum(), out[2] = t1.sum(), out[3] = t2.sum();
  for (; i < end; ++i) {
    double g = to_float(m[i]), p = to_float(last[i]) - p0;
    if (w) {
      g = w[0] * g;
      for (int64_t k = 1; k < a.branches; ++k) g += w[k] * to_float(m[i + k * a.m_branch]);
    }
    g -= g0;
    out[0] += g, out[1] += g * g, out[2] += p, out[3] += p * p;
  }
}

// phi std(last) / std(combined) + 1 - phi; 1 where phi is 0 or nothing varies.
static float rescale_factor(const FusedStepArgs& a, int64_t b) {
  double s[4] = {0, 0, 0, 0}, n = double(a.numel);
  for (int64_t c = 0; c < a.chunks; ++c)
    for (int k = 0; k < 4; ++k) s[k] += a.moments[(b * a.chunks + c) * 4 + k];
  double var = s[1] / n - (s[0] / n) * (s[0] / n), last = s[3] / n - (s[2] / n) * (s[2] / n);
  if (a.phi[b] == 0.0f || var <= 0.0) return 1.0f;
  double phi = a.phi[b];
  return float(phi * std::sqrt((last > 0.0 ? last : 0.0) / var) + (1.0 - phi));
}

// Everything one sample's vectors share.
template <class T, class Tm>
struct Sample {
  const FusedStepArgs& a;
  const T *x, *h1, *h2, *ref;
  const Tm* m;
  T *y, *kept;
  const float *w, *mask, *c;
  float factor;

  Sample(const FusedStepArgs& args, int64_t b) : a(args) {
    auto at = [&](const void* p) { return p ? static_cast<const T*>(p) + b * a.numel : nullptr; };
    x = at(a.x), h1 = at(a.h1), h2 = at(a.h2), ref = at(a.ref);
    y = static_cast<T*>(a.y) + b * a.numel;
    kept = a.kept ? static_cast<T*>(a.kept) + b * a.numel : nullptr;
    m = static_cast<const Tm*>(a.m) + b * a.m_sample;
    w = a.w ? a.w + b * a.branches : nullptr;
    mask = a.mask ? a.mask + b * a.mask_sample : nullptr;
    c = a.coef + (a.row.data ? value(a.row, b) : b * a.row.stride) * kStepColumns;
    factor = a.phi ? a.factor[b] : 1.0f;
  }

  template <bool Full>
  FD_INLINE Vec load_mask(int64_t i, int n) const {
    if (!a.mask_plane) return load<Full>(mask + i, n);
    int64_t at = i % a.mask_plane;
    if (at + n <= a.mask_plane) return load<Full>(mask + at, n);
    float around[Vec::width] = {0};
    for (int k = 0; k < n; ++k) around[k] = mask[(i + k) % a.mask_plane];
    return Vec::load(around);
  }

  // Elements i .. i + n of the step; z and z_ref are this vector's noise, or null.
  template <bool Full>
  FD_INLINE void step(int64_t i, int n, const float* z, const float* z_ref) const {
    Vec xv = load<Full>(x + i, n);
    Vec g = combine<Full>(a, w, m + i, n);
    if (a.phi) g = g * Vec(factor);
    Vec x0 = fma(Vec(c[kAx]), xv, Vec(c[kAm]) * g);
    // Operands in this order let a NaN through: vmax and vmin give their second operand for it.
    x0 = vmin(Vec(c[kClip]), vmax(Vec(-c[kClip]), x0));
    Vec out = fma(Vec(c[kCx]), xv, fma(Vec(c[kC0]), x0, Vec(c[kCm]) * g));
    if (h1) out = fma(Vec(c[kCh1]), load<Full>(h1 + i, n), out);
    if (h2) out = fma(Vec(c[kCh2]), load<Full>(h2 + i, n), out);
    if (z) out = fma(Vec(c[kSigma]), Vec::load(z), out);
    if (kept) {
      Vec k = fma(Vec(c[kKx]), xv, fma(Vec(c[kK0]), x0, Vec(c[kKm]) * g));
      store<Full>(k, kept + i, n);
    }
    if (mask) {
      Vec inside = load_mask<Full>(i, n), pasted = Vec(c[kRa]) * load<Full>(ref + i, n);
      if (z_ref) pasted = fma(Vec(c[kRb]), Vec::load(z_ref), pasted);
      out = fma(inside, out, (Vec(1.0f) - inside) * pasted);
    }
    store<Full>(out, y + i, n);
  }
};

// One task is one chunk of one sample: one read of every input, one write of y (and kept). Noise is
// made in groups of 64 in L1. A row with sigma or r_b 0 draws nothing for it.
template <class T, class Tm>
static void chunk_step(const FusedStepArgs& a, int64_t b, int64_t chunk) {
  Sample<T, Tm> s(a, b);
  alignas(64) float z[kNoiseGroup], z_ref[kNoiseGroup];
  const bool keyed = a.noise.seed.data;
  const bool noisy = keyed && s.c[kSigma] != 0.0f;
  const bool noisy_ref = keyed && a.mask && s.c[kRb] != 0.0f;
  const NoiseKey key = keyed ? noise_key(a.noise, b) : NoiseKey{};
  const uint32_t stream = a.noise.stream;
  int64_t begin = chunk * kStepChunk;
  int64_t end = begin + kStepChunk < a.numel ? begin + kStepChunk : a.numel;
  for (int64_t i = begin; i < end; i += kNoiseGroup) {
    if (noisy) noise_group(key, stream, uint32_t(i / kNoiseGroup), z);
    if (noisy_ref) noise_group(key, stream + 1, uint32_t(i / kNoiseGroup), z_ref);
    for (int64_t j = 0; j < kNoiseGroup && i + j < end; j += Vec::width) {
      const float* zj = noisy ? z + j : nullptr;
      const float* rj = noisy_ref ? z_ref + j : nullptr;
      if (i + j + Vec::width <= end)
        s.template step<true>(i + j, Vec::width, zj, rj);
      else
        s.template step<false>(i + j, int(end - i - j), zj, rj);
    }
  }
  if (a.select && a.select[b])
    std::memcpy(s.y + begin, static_cast<const T*>(a.stored) + b * a.numel + begin,
                size_t(end - begin) * sizeof(T));
}

template <class T, class Tm>
static void run(const FusedStepArgs& a) {
  int64_t tasks = a.batch * a.chunks;
  if (a.phi) {
    parallel_for(0, tasks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) chunk_moments<Tm>(a, i / a.chunks, i % a.chunks);
    });
    for (int64_t b = 0; b < a.batch; ++b) a.factor[b] = rescale_factor(a, b);
  }
  parallel_for(0, tasks, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) chunk_step<T, Tm>(a, i / a.chunks, i % a.chunks);
  });
}

template <class T>
static void run_state(const FusedStepArgs& a) {
  switch (a.m_dtype) {
    case Dtype::kF32: return run<T, float>(a);
    case Dtype::kBf16: return run<T, bf16>(a);
    case Dtype::kF16: return run<T, f16>(a);
  }
}

void fused_step(const FusedStepArgs& a) { FASTDIFF_DTYPE_SWITCH(a.dtype, run_state<T>(a)); }

void philox_normal(const PhiloxNormalArgs& a) {
  int64_t groups = (a.numel + kNoiseGroup - 1) / kNoiseGroup;
  parallel_for(0, a.batch * groups, 128, [&](int64_t begin, int64_t end) {
    alignas(64) float rest[kNoiseGroup];
    for (int64_t i = begin; i < end; ++i) {
      int64_t b = i / groups, group = i % groups, at = group * kNoiseGroup;
      float* z = a.z + b * a.numel + at;
      bool whole = at + kNoiseGroup <= a.numel;
      noise_group(noise_key(a.noise, b), a.noise.stream, uint32_t(group), whole ? z : rest);
      if (!whole) std::memcpy(z, rest, size_t(a.numel - at) * sizeof(float));
    }
  });
}

FASTDIFF_KERNEL_END
