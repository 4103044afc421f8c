// Attention whose scores are products of int8 (SageAttention, Zhang et al. 2024,
// arXiv:2410.02367), queries in lanes as in attention_kernel.cpp.
//
// First the integers of all keys: a head's mean per channel, then each key's row less the mean, as
// int8 with a scale of its own. Then a thread walks its run of query vectors in tiles of up to 3:
// it quantises a tile's rows and transposes them to words [D / 4][3W] of four channels each, and
// per block of keys has S^T = K Q^T in int32, kS keys at a time, times both scales; the softmax and
// O^T += V^T P^T are the float kernel's, in float32 (attention_tiles.h).
//
// Everything is summed in one order whatever the level, the threads or the batch; the mean in
// float64, so that its float32 is that of other orders too.
#include <limits>

#include "attention_tiles.h"
#include "quant_attention.h"

FASTDIFF_KERNEL_BEGIN

namespace {

constexpr int kS = W == 16 ? 8 : 2;  // keys per register tile of scores: kS * 3 sums
constexpr int64_t kBlock = kQuantKeys;
constexpr float kLevels = 127.0f;  // of int8 to either side of 0
constexpr float kTiny = kLevels * std::numeric_limits<float>::min();

// ---- the level's integers ----

// dot4: sum += the four products of each lane, exact where every |q|, |k| <= 127; q as q_lanes left
// it, sums begun at before(the sum of k's row).
#ifdef __AVX512F__
using Ints = __m512i;
FD_INLINE Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
FD_INLINE Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
FD_INLINE Ints bits(Vec v) { return _mm512_castps_si512(v.v); }
FD_INLINE Vec as_vec(Ints v) { return _mm512_castsi512_ps(v); }
FD_INLINE Vec floats(Ints v) { return _mm512_cvtepi32_ps(v); }
#ifdef __AVX512VNNI__  // of an unsigned and a signed factor: q + 128, and 128 sum(k) comes off
FD_INLINE Ints q_lanes(Ints q) { return _mm512_xor_si512(q, _mm512_set1_epi8(-128)); }
FD_INLINE int32_t before(int32_t k_sum) {  // wraps like the sums that it begins
  return int32_t(uint32_t(k_sum) * uint32_t(-128));
}
FD_INLINE Ints dot4(Ints sum, Ints q, Ints k) { return _mm512_dpbusd_epi32(sum, q, k); }
#else
FD_INLINE Ints q_lanes(Ints q) { return q; }
FD_INLINE int32_t before(int32_t) { return 0; }
FD_INLINE Ints dot4(Ints sum, Ints q, Ints k) {  // |k| times q with the sign of k
  const Ints turned = _mm512_mask_sub_epi8(q, _mm512_movepi8_mask(k), _mm512_setzero_si512(), q);
  const Ints pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(k), turned);
  return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif
// The first `count` lanes to the nearest integer, ties to even.
FD_INLINE void store_rounded(Vec v, int8_t* q, int count) {
  _mm512_mask_cvtsepi32_storeu_epi8(q, Vec::mask(count), _mm512_cvtps_epi32(v.v));
}
#else
using Ints = __m256i;
FD_INLINE Ints load_ints(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
FD_INLINE Ints all_ints(int32_t x) { return _mm256_set1_epi32(x); }
FD_INLINE Ints bits(Vec v) { return _mm256_castps_si256(v.v); }
FD_INLINE Vec as_vec(Ints v) { return _mm256_castsi256_ps(v); }
FD_INLINE Vec floats(Ints v) { return _mm256_cvtepi32_ps(v); }
#ifdef __AVXVNNI__
FD_INLINE Ints q_lanes(Ints q) { return _mm256_xor_si256(q, _mm256_set1_epi8(-128)); }
FD_INLINE int32_t before(int32_t k_sum) { return int32_t(uint32_t(k_sum) * uint32_t(-128)); }
FD_INLINE Ints dot4(Ints sum, Ints q, Ints k) { return _mm256_dpbusd_avx_epi32(sum, q, k); }
#else
FD_INLINE Ints q_lanes(Ints q) { return q; }
FD_INLINE int32_t before(int32_t) { return 0; }
FD_INLINE Ints dot4(Ints sum, Ints q, Ints k) {  // |k| times q with the sign of k
  const Ints pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(k), _mm256_sign_epi8(q, k));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
FD_INLINE void store_rounded(Vec v, int8_t* q, int count) {
  const __m256i wide = _mm256_cvtps_epi32(v.v);
  const __m128i half =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  alignas(16) int8_t t[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(t), _mm_packs_epi16(half, half));
  std::memcpy(q, t, size_t(count < W ? count : W));
}
#endif

// ---- rows to integers ----

// x - mean (null: x) as `words` words of int8, zeros past dim; gives the row's scale: 0 of a row of
// zeros, NaN of one with a NaN or an infinity, whose integers are 0. `row`: room for dim floats,
// rounded up to a vector.
template <class E>
FD_LOOP float quantise(const E* x, const float* mean, int64_t dim, int64_t words, float* row,
                       int8_t* to) {
  Vec most(0.0f), none(0.0f);  // 0 while all is finite
  each(dim, [&](int64_t d, auto part) {
    Vec y = part.load(x + d);
    if (mean) y = y - part.load(mean + d);
    y.store(row + d);
    most = vmax(vabs(y), most);
    none = fma(y, Vec(0.0f), none);
  });
  const bool finite = none.sum() == 0.0f;
  const float largest = most.max();
  if (!finite || largest < kTiny) {
    std::memset(to, 0, size_t(words) * 4);
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const Vec inverse((1.0f / largest) * kLevels);
  each(dim, [&](int64_t d, auto) {
    store_rounded(Vec::load(row + d) * inverse, to + d, dim - d < W ? int(dim - d) : W);
  });
  std::memset(to + dim, 0, size_t(words * 4 - dim));
  return largest / kLevels;
}

template <class E>
struct Worker {
  const QuantAttentionArgs& a;
  const QuantAttentionScratch at;
  float* const own;
  const int64_t panels;  // of V, in kM channels

  Worker(const QuantAttentionArgs& args, int64_t thread)
      : a(args),
        at(args),
        own(args.scratch + at.own + thread * at.each),
        panels((a.value_dim + kM - 1) / kM) {}

  const E* row_of(const void* t, const int64_t (&stride)[3], int64_t head) const {
    return static_cast<const E*>(t) + head / a.heads * stride[0] + head % a.heads * stride[1];
  }
  int32_t* k_ints(int64_t head) const {
    return reinterpret_cast<int32_t*>(a.scratch) + at.k + head * at.keys * at.words;
  }
  float* k_scales(int64_t head) const { return a.scratch + at.k_scale + head * at.keys; }
  int32_t* k_sums(int64_t head) const {
    return reinterpret_cast<int32_t*>(a.scratch) + at.k_sum + head * at.keys;
  }

  // The mean over the keys of a head, per channel.
  void mean_of(const E* k, float* mean) {
    double* sum = reinterpret_cast<double*>(own + at.sum);
    for (int64_t d = 0; d < (a.dim + W - 1) / W * W; ++d) sum[d] = 0.0;
    for (int64_t t = 0; t < a.keys; ++t)
      each(a.dim, [&](int64_t d, auto part) {
        alignas(64) float x[W];
        part.load(k + t * a.k_stride[2] + d).store(x);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) sum[d + i] += x[i];
      });
    for (int64_t d = 0; d < a.dim; ++d) mean[d] = float(sum[d] / double(a.keys));
  }

  // The integers of a head's keys; those past the last are 0.
  void keys_of(int64_t head) {
    const E* k = row_of(a.k, a.k_stride, head);
    float* mean = own + at.mean;
    if (a.smooth) mean_of(k, mean);
    int32_t* ints = k_ints(head);
    for (int64_t t = 0; t < at.keys; ++t, ints += at.words) {
      int8_t* to = reinterpret_cast<int8_t*>(ints);
      float scale = 0.0f;
      if (t < a.keys)
        scale = quantise(k + t * a.k_stride[2], a.smooth ? mean : nullptr, a.dim, at.words,
                         own + at.row, to);
      else
        std::memset(to, 0, size_t(at.words) * 4);
      int32_t sum = 0;
      for (int64_t d = 0; d < at.words * 4; ++d) sum += to[d];
      k_scales(head)[t] = scale;
      k_sums(head)[t] = sum;
    }
  }

  // V to panels [panels][T][kM] of float32, zeros past its last channel.
  void values_of(const E* v) {
    for (int64_t t = 0; t < a.keys; ++t)
      for (int64_t d = 0; d < panels * kM; d += W) {
        const int n = a.value_dim - d < W ? int(a.value_dim - d) : W;
        const E* from = v + t * a.v_stride[2] + d;
        alignas(64) float x[W];
        (n == W ? Vec::load(from) : Vec::load(from, n)).store(x);
        for (int i = 0; i < W && d + i < panels * kM; i += kM)
          std::memcpy(own + at.v + ((d + i) / kM * a.keys + t) * kM, x + i, kM * sizeof(float));
      }
  }

  // S^T of `keys` keys from t0 on and NR query vectors, [key][kLanes]: c holds the scales of
  // queries. Keys up to the next multiple of kS are written too, as -inf. `top` takes the maximum.
  template <int NR>
  FD_LOOP void score_block(const int32_t* k, const float* k_scale, const int32_t* k_sum,
                           int64_t words, int64_t keys, const int32_t* q, const Vec (&c)[NR],
                           float* s, Vec (&top)[NR]) {
    for (int64_t t = 0; t < keys; t += kS) {
      Ints sum[kS][NR];
#pragma GCC unroll 8
      for (int i = 0; i < kS; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < NR; ++j) sum[i][j] = all_ints(before(k_sum[t + i]));
      for (int64_t w = 0; w < words; ++w) {
        Ints p[NR];
#pragma GCC unroll 3
        for (int j = 0; j < NR; ++j) p[j] = load_ints(q + w * kLanes + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < kS; ++i) {
          const Ints b = all_ints(k[(t + i) * words + w]);
#pragma GCC unroll 3
          for (int j = 0; j < NR; ++j) sum[i][j] = dot4(sum[i][j], p[j], b);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < kS; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < NR; ++j) {
          Vec x = floats(sum[i][j]) * (Vec(k_scale[t + i]) * c[j]);
          if (t + i >= keys) x = Vec(-INFINITY);
          top[j] = vmax(top[j], x);
          x.store(s + (t + i) * kLanes + j * W);
        }
    }
  }

  // Query rows from first_row on, as words [D / 4][kLanes]; their scales, times those of the call.
  void queries_of(const E* q, int64_t first_row, int vectors, int32_t* to, float* scales) {
    const int64_t stride = (at.words + 15) / 16 * 16;
    int32_t* rows = reinterpret_cast<int32_t*>(own + at.q_rows);
    for (int i = 0; i < vectors * W; ++i) {  // rows past the end repeat the last: not stored
      const int64_t r = first_row + i < a.rows ? first_row + i : a.rows - 1;
      int8_t* row = reinterpret_cast<int8_t*>(rows + i * stride);
      scales[i] = quantise(q + r * a.q_stride[2], static_cast<const float*>(nullptr), a.dim,
                           at.words, own + at.row, row) *
                  (a.scale * kLog2e);
      std::memset(row + at.words * 4, 0, size_t(stride - at.words) * 4);
    }
    for (int j = 0; j < vectors; ++j)
      for (int64_t w = 0; w < at.words; w += W) {
        Vec r[W];
        for (int i = 0; i < W; ++i) r[i] = as_vec(load_ints(rows + (j * W + i) * stride + w));
        transpose(r);
        for (int i = 0; i < W; ++i)
          as_vec(q_lanes(bits(r[i])))
              .store(reinterpret_cast<float*>(to + (w + i) * kLanes + j * W));
      }
  }

  template <int NR>
  void tile(int64_t head, const float* v, int64_t v_stride, int64_t panel_stride,
            int64_t first_row) {
    int32_t* q = reinterpret_cast<int32_t*>(own + at.q);
    float *s = own + at.score, *o = own + at.out;
    alignas(64) float scales[kLanes];
    queries_of(row_of(a.q, a.q_stride, head), first_row, NR, q, scales);
    Vec c[NR], m[NR], sum[NR];
#pragma GCC unroll 3
    for (int j = 0; j < NR; ++j)
      c[j] = Vec::load(scales + j * W), m[j] = Vec(-INFINITY), sum[j] = Vec(0.0f);
    for (int64_t t0 = 0; t0 < a.keys; t0 += kBlock) {
      const int64_t keys = a.keys - t0 < kBlock ? a.keys - t0 : kBlock;
      Vec top[NR], correction[NR], block_sum[NR];
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) top[j] = m[j];
      score_block<NR>(k_ints(head) + t0 * at.words, k_scales(head) + t0, k_sums(head) + t0,
                      at.words, keys, q, c, s, top);
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) {
        correction[j] = exp2_negative(m[j] - top[j]);
        m[j] = top[j];
        block_sum[j] = Vec(0.0f);
      }
      exp_block<F32Words, NR>(s, keys, m, block_sum);
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) sum[j] = fma(sum[j], correction[j], block_sum[j]);
      value_block<F32Words, NR>(v + t0 * v_stride, panel_stride, v_stride, panels, s, keys,
                                correction, t0 == 0, o);
    }
    const int64_t stride = a.heads * a.value_dim;
    for (int j = 0; j < NR; ++j) {
      const int64_t row = first_row + j * W;
      const int rows = a.rows - row < W ? int(a.rows - row) : W;
      E* out = static_cast<E*>(a.out) +
               ((head / a.heads * a.rows + row) * a.heads + head % a.heads) * a.value_dim;
      store_rows(o, j, sum[j], a.keys > 0, rows, a.value_dim, out, stride);
    }
  }

  // Query vectors [begin, end) in the order batch, head, row.
  void vectors(int64_t begin, int64_t end) {
    const int64_t per_head = (a.rows + W - 1) / W;
    // Repacking pays for itself after two tiles, as in attention_kernel.cpp.
    const bool in_place = std::is_same_v<E, float> && a.value_dim % kM == 0 && a.rows <= 2 * kLanes;
    for (int64_t u = begin; u < end;) {
      const int64_t head = u / per_head, in_head = u % per_head;
      const int64_t stop = end - u < per_head - in_head ? end - u : per_head - in_head;
      const E* value = row_of(a.v, a.v_stride, head);
      if (!in_place) values_of(value);
      const float* v = in_place ? reinterpret_cast<const float*>(value) : own + at.v;
      const int64_t v_stride = in_place ? a.v_stride[2] : kM;
      const int64_t panel_stride = in_place ? kM : a.keys * kM;
      for (int64_t left = stop, row = in_head * W; left;) {
        const int nr = left >= 5 || left == 3 ? 3 : left == 1 ? 1 : 2;
        if (nr == 3)
          tile<3>(head, v, v_stride, panel_stride, row);
        else if (nr == 2)
          tile<2>(head, v, v_stride, panel_stride, row);
        else
          tile<1>(head, v, v_stride, panel_stride, row);
        left -= nr, row += nr * W;
      }
      u += stop;
    }
  }
};

template <class E>
void run_all(const QuantAttentionArgs& a) {
  const int64_t heads = a.batch * a.heads, vectors = heads * ((a.rows + W - 1) / W);
  auto in_parts = [&](int64_t count, auto body) {
    parallel_for(0, a.threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) {
        Worker<E> worker(a, part);
        body(worker, count * part / a.threads, count * (part + 1) / a.threads);
      }
    });
  };
  in_parts(heads, [](Worker<E>& worker, int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) worker.keys_of(head);
  });
  in_parts(vectors,
           [](Worker<E>& worker, int64_t begin, int64_t end) { worker.vectors(begin, end); });
}

}  // namespace

void quant_attention(const QuantAttentionArgs& a) { FASTDIFF_DTYPE_SWITCH(a.dtype, run_all<T>(a)); }

FASTDIFF_KERNEL_END
