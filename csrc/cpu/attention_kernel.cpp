// Attention with the online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867), queries in
// lanes.
//
// A thread owns a run of query vectors (W = Vec::width rows of one head each) and walks them in
// tiles of up to 3 vectors, so that S^T = K Q^T and O^T += V^T P^T are both "broadcast one word of
// K or V, multiply three vectors", with no horizontal step: maximum, exponential and sum are
// lane-wise. Per head the thread repacks K to rows [T][words] and V to panels [D/kM][T][kM] of its
// scratch (the conversion to float32, or to bfloat16 pairs for vdpbf16ps, is done there, once per
// head and not per tile); keys past the sample's length are never read. Per tile it transposes Q
// to [words][3W], then per block of kAttentionKeys keys: S^T kM keys at a time in registers with
// the block's maximum, P = exp2(S - m), O = O * correction + P V. A bias per key is one broadcast
// add per score vector; groups and full biases are transposed rows [.][3W] that offsets choose
// from. Work is split by scores, so that ragged lengths stay balanced.
//
// Tried, on one thread of an AMD EPYC (Zen 5), `bench/run.py attention --threads 1`; ratios are to
// scaled_dot_product_attention at (2,16,1024,64) of the same run, whose float32 is AVX2:
//   as above, sums of O held over all keys     2.4 float32, 1.2 at the avx2 level, 4.3 bfloat16;
//     scale folded into q                      but errors up to 3 times the allowed at 4096 keys
//   O summed per block of keys first           same time, errors of eager torch
//   scale applied to finished scores           same time; folded, q is rounded once more: the worst
//                                              of 500 float32 cases had 2.7 times the error of
//                                              eager
//   blocks of 64, 96, 192 or 256 keys          within 3 %, so 128: S and Q of D 64 fit L1 together
//   float32 K, V in place for <= 96 rows       (1,8,16,1024,64) 315 to 229 us; above, no gain
//   loops not inlined per dtype                same time, 10 s of compiling per level, from 25
// What is left: without any exponential bfloat16 would gain 10 %, float32 nothing measurable: it
// runs at 200 to 207 GFLOP/s there, what the two FMA pipes give.
#include "attention.h"
#include "attention_tiles.h"

FASTDIFF_KERNEL_BEGIN

namespace {

constexpr int64_t kBlock = kAttentionKeys;
constexpr float kLn2 = 0.693147180559945309f;
constexpr int64_t kDepth = 160;  // words summed in one run of a score, for its rounding
enum BiasKind { kNoBias, kKeyBias, kLaneBias };

// Keys of one block: rows of `words` words, `stride` apart (pairs are always packed: `words`). The
// last `keys` % kM of them are read from `tail`, packed and padded to kM rows.
struct Keys {
  const float *k, *tail;
  int64_t stride, words, keys;
};

// S^T of a block of keys and NR query vectors: s[key][lane] = k . q * c + bias. Keys up to the next
// multiple of kM are written too, as -inf. `top` takes the maximum.
template <class Words, int NR, BiasKind KIND>
FD_LOOP void score_block(const Keys& block, const float* q, float c, const float* key_bias,
                         const float* lane_bias, const int64_t* offset, float* s, Vec (&top)[NR]) {
  const int64_t keys = block.keys, words = block.words;
  for (int64_t t = 0; t < keys; t += kM) {
    const bool whole = t + kM <= keys;
    const float* row = whole ? block.k + t * block.stride : block.tail;
    const int64_t stride = whole && Words::per_word == 1 ? block.stride : words;
    float* out = s + t * kLanes;
    Vec acc[kM][NR];
    int64_t w = 0;
    for (;; w += kDepth) {
      const int64_t depth = words - w < kDepth ? words - w : kDepth;
      multiply<Words, NR>(row + w, stride, 1, q + w * kLanes, depth, acc);
      if (w + depth == words) break;
#pragma GCC unroll 8
      for (int i = 0; i < kM; ++i)
#pragma GCC unroll 3
        for (int j = 0; j < NR; ++j) {
          float* x = out + i * kLanes + j * W;
          (w ? acc[i][j] + Vec::load(x) : acc[i][j]).store(x);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) {
        Vec x = acc[i][j];
        if (w) x = x + Vec::load(out + i * kLanes + j * W);
        x = x * Vec(c);
        if (KIND == kKeyBias) x = x + Vec(key_bias[t + i]);
        if (KIND == kLaneBias) x = x + Vec::load(lane_bias + offset[t + i] + j * W);
        if (t + i >= keys) x = Vec(-INFINITY);
        top[j] = vmax(top[j], x);
        x.store(out + i * kLanes + j * W);
      }
    }
  }
}

// dst[n][kLanes] = factor * rows[lane][n]; dst has room for n rounded up to W rows.
template <class E>
FD_LOOP void pack_lanes(const E* const* rows, int vectors, int64_t n, float factor, float* dst) {
  for (int j = 0; j < vectors; ++j)
    for (int64_t c = 0; c < n; c += W) {
      Vec r[W];
      int m = n - c < W ? int(n - c) : W;
      for (int i = 0; i < W; ++i) {
        const E* p = rows[j * W + i] + c;
        r[i] = (m == W ? Vec::load(p) : Vec::load(p, m)) * Vec(factor);
      }
      transpose(r);
      for (int i = 0; i < W; ++i) r[i].store(dst + (c + i) * kLanes + j * W);
    }
}

#ifdef __AVX512BF16__
FD_INLINE Vec load_pairs(const bf16* p, int64_t n) {  // the first n halves of 32, the rest 0
  __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1;
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
}
// The same with pairs of bfloat16 as words.
FD_LOOP void pack_pair_lanes(const bf16* const* rows, int vectors, int64_t dim, float* dst) {
  for (int j = 0; j < vectors; ++j)
    for (int64_t c = 0; c < dim; c += 32) {
      Vec r[16];
      for (int i = 0; i < 16; ++i) r[i] = load_pairs(rows[j * 16 + i] + c, dim - c);
      transpose(r);
      for (int i = 0; i < 16; ++i) r[i].store(dst + (c / 2 + i) * kLanes + j * 16);
    }
}
#endif

// The query rows of sample b, and the vectors that they are in.
FD_INLINE int64_t rows_begin(const AttentionArgs& a, int64_t b) {
  return a.q_starts ? a.q_starts[b] : 0;
}
FD_INLINE int64_t rows_of(const AttentionArgs& a, int64_t b) {
  return a.q_starts ? a.q_starts[b + 1] - a.q_starts[b] : a.rows;
}
FD_INLINE int64_t vectors_of(const AttentionArgs& a, int64_t b) {
  return (rows_of(a, b) + W - 1) / W;
}

template <class E, class Words>
struct Worker {
  const AttentionArgs& a;
  AttentionScratch at;
  float* scratch;
  int64_t words;          // words per row of K and Q
  int64_t v_words;        // words per column of V: the stride of a panel is kM times this
  int64_t panels;         // panels of V
  bool in_place = false;  // K and V are read where they lie: they are float32 words already
  int64_t length = 0;     // keys of the sample in work
  int64_t rows_end = 0;   // of its query rows
  int64_t stored = 0;     // the sample of q, out and lse that has them
  const float *k_head = nullptr, *v_head = nullptr;      // first key's row; first panel
  int64_t k_stride = 0, v_stride = 0, panel_stride = 0;  // between keys; words; panels
  const E *q_head = nullptr, *bias_head = nullptr;
  const float *bias32_head = nullptr, *table_head = nullptr;

  Worker(const AttentionArgs& args, int64_t thread)
      : a(args),
        at(args),
        scratch(args.scratch + thread * at.total),
        words((a.dim + Words::per_word - 1) / Words::per_word),
        v_words(round_up(a.keys, 2) / Words::per_word),
        panels((a.dim + kM - 1) / kM) {}

  // Repacking pays for itself after two tiles: rows far apart share few cache sets, and cost a page
  // each. Panels of V must not pass the end of its rows.
  static bool read_in_place(const AttentionArgs& a, int64_t rows) {
    return std::is_same_v<E, float> && a.dim % kM == 0 && rows <= 2 * kLanes;
  }

  void pack_key_row(int64_t t, const E* src) {
    float* dst = scratch + at.k + t * words;
    if constexpr (Words::per_word == 1) {
      int64_t d = 0;
      for (; d + W <= a.dim; d += W) (src ? Vec::load(src + d) : Vec(0.0f)).store(dst + d);
      if (int n = int(a.dim - d)) (src ? Vec::load(src + d, n) : Vec(0.0f)).store(dst + d, n);
    } else {
      dst[words - 1] = 0.0f;  // the second half of the last word where dim is odd
      if (src)
        std::memcpy(dst, src, size_t(a.dim) * 2);
      else
        std::memset(dst, 0, size_t(words) * 4);
    }
  }

  // Columns of V into panels: kM floats of one key, or kM pairs (key t, key t + 1).
  void pack_value_word(int64_t w, const E* v, int64_t stride) {
    float* dst = scratch + at.v + w * kM;
    for (int64_t d = 0; d < panels * kM; d += W) {
      int n = a.dim - d < W ? int(a.dim - d) : W;
      Vec x;
      if constexpr (Words::per_word == 1) {
        x = n == W ? Vec::load(v + d) : Vec::load(v + d, n);
      }
#ifdef __AVX512BF16__
      else {
        __mmask16 mask = Vec::mask(n);
        __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, v + d));
        __m512i high = _mm512_setzero_si512();
        if (2 * w + 1 < length)
          high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, v + stride + d));
        x = _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
#endif
      alignas(64) float parts[W];
      x.store(parts);
      for (int i = 0; i < W && d + i < panels * kM; i += kM)
        std::memcpy(dst + (d + i) / kM * panel_stride, parts + i, kM * sizeof(float));
    }
    (void)stride;
  }

  // Everything that the query tiles of one head share.
  void start_head(int64_t b, int64_t h) {
    length = a.key_lengths ? a.key_lengths[b] : a.keys;
    rows_end = rows_begin(a, b) + rows_of(a, b);
    stored = a.q_starts ? 0 : b;
    in_place = read_in_place(a, rows_of(a, b));
    k_stride = in_place ? a.k_stride[2] : words;
    v_stride = in_place ? a.v_stride[2] : kM;
    panel_stride = in_place ? kM : v_words * kM;
    q_head = static_cast<const E*>(a.q) + stored * a.q_stride[0] + h * a.q_stride[1];
    const E* k = static_cast<const E*>(a.k) + b * a.k_stride[0] + h * a.k_stride[1];
    const E* v = static_cast<const E*>(a.v) + b * a.v_stride[0] + h * a.v_stride[1];
    for (int64_t t = in_place ? length / kM * kM : 0; t < round_up(length, kM); ++t)
      pack_key_row(t, t < length ? k + t * a.k_stride[2] : nullptr);
    for (int64_t t = 0; !in_place && t < length; t += Words::per_word)
      pack_value_word(t / Words::per_word, v + t * a.v_stride[2], a.v_stride[2]);
    k_head = in_place ? reinterpret_cast<const float*>(k) : scratch + at.k;
    v_head = in_place ? reinterpret_cast<const float*>(v) : scratch + at.v;
    if (a.bias) {
      int64_t at_head = b * a.bias_stride[0] + h * a.bias_stride[1];
      bias_head = static_cast<const E*>(a.bias) + at_head;
      bias32_head = static_cast<const float*>(a.bias) + at_head;
      float* key_bias = scratch + at.key_bias;
      if (!a.bias_full)
        for (int64_t t = 0; t < round_up(length, kM); ++t)
          key_bias[t] =
              t >= length ? 0.0f : kLog2e * (a.bias_f32 ? bias32_head[t] : to_float(bias_head[t]));
    }
    int64_t* offset = reinterpret_cast<int64_t*>(scratch + at.key_offset);
    if (a.table) table_head = a.table + b * a.table_stride[0] + h * a.table_stride[1];
    if (a.table || a.bias_full)
      for (int64_t t = 0; t < round_up(length, kM); ++t)
        offset[t] = kLanes * (t >= length ? 0
                              : a.table   ? a.key_group[b * a.key_group_stride + t]
                                          : t % kBlock);
  }

  // Transposed biases of the tile's rows: of keys t0.. (full), or of every key group.
  void pack_bias(const int64_t* rows, int vectors, int64_t t0, int64_t keys) {
    float* dst = scratch + at.lane_bias;
    const float* rows32[kLanes];
    const E* rows_e[kLanes];
    for (int i = 0; i < vectors * W; ++i) {
      if (a.table)
        rows32[i] = table_head + rows[i] * a.key_groups;
      else if (a.bias_f32)
        rows32[i] = bias32_head + rows[i] * a.bias_stride[2] + t0;
      else
        rows_e[i] = bias_head + rows[i] * a.bias_stride[2] + t0;
    }
    if (a.table)
      pack_lanes(rows32, vectors, a.key_groups, kLog2e, dst);
    else if (a.bias_f32)
      pack_lanes(rows32, vectors, keys, kLog2e, dst);
    else
      pack_lanes(rows_e, vectors, keys, kLog2e, dst);
  }

  template <int NR>
  void tile(int64_t b, int64_t h, int64_t first_row) {
    const auto score = a.table || a.bias_full ? score_block<Words, NR, kLaneBias>
                       : a.bias               ? score_block<Words, NR, kKeyBias>
                                              : score_block<Words, NR, kNoBias>;
    float *q = scratch + at.q, *s = scratch + at.score, *o = scratch + at.out;
    const int64_t* offset = reinterpret_cast<const int64_t*>(scratch + at.key_offset);
    const float c = a.scale * kLog2e;
    int64_t rows[kLanes];  // rows past the end repeat the last one and are not stored
    const E* q_rows[kLanes];
    for (int i = 0; i < NR * W; ++i) {
      int64_t r = first_row + i < rows_end ? first_row + i : rows_end - 1;
      rows[i] = a.q_index ? a.q_index[b * a.rows + r] : r;
      q_rows[i] = q_head + rows[i] * a.q_stride[2];
    }
    if constexpr (Words::per_word == 1) pack_lanes(q_rows, NR, a.dim, 1.0f, q);
#ifdef __AVX512BF16__
    else
      pack_pair_lanes(q_rows, NR, a.dim, q);
#endif
    if (a.table) {
      int64_t groups[kLanes];
      for (int i = 0; i < NR * W; ++i)
        groups[i] = a.query_group[b * a.query_group_stride + rows[i]];
      pack_bias(groups, NR, 0, 0);
    }
    Vec m[NR], sum[NR];
#pragma GCC unroll 3
    for (int j = 0; j < NR; ++j) m[j] = Vec(-INFINITY), sum[j] = Vec(0.0f);
    for (int64_t t0 = 0; t0 < length; t0 += kBlock) {
      int64_t keys = length - t0 < kBlock ? length - t0 : kBlock;
      if (a.bias_full) pack_bias(rows, NR, t0, keys);
      Vec top[NR], base[NR], correction[NR], block_sum[NR];
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) top[j] = m[j];
      Keys block{k_head + t0 * k_stride, scratch + at.k + (t0 + keys / kM * kM) * words, k_stride,
                 words, keys};
      score(block, q, c, scratch + at.key_bias + t0, scratch + at.lane_bias, offset + t0, s, top);
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) {
        // A row with every key masked so far subtracts 0, so that its weights are 2^-inf = 0.
        base[j] = select_lt(top[j], Vec(-3.4028235e38f), Vec(0.0f), top[j]);
        correction[j] = exp2_negative(m[j] - base[j]);
        m[j] = top[j];
        block_sum[j] = Vec(0.0f);
      }
      exp_block<Words, NR>(s, keys, base, block_sum);
#pragma GCC unroll 3
      for (int j = 0; j < NR; ++j) sum[j] = fma(sum[j], correction[j], block_sum[j]);
      int64_t p_words = (keys + Words::per_word - 1) / Words::per_word;
      value_block<Words, NR>(v_head + t0 / Words::per_word * v_stride, panel_stride, v_stride,
                             panels, s, p_words, correction, t0 == 0, o);
    }
    store(h, first_row, NR, m, sum);
  }

  __attribute__((noinline)) void store(int64_t h, int64_t first_row, int vectors, const Vec* m,
                                       const Vec* sum) {
    const float* o = scratch + at.out;
    const int64_t row_stride = a.heads * a.dim;
    for (int j = 0; j < vectors; ++j) {
      int64_t row = first_row + j * W;
      int rows = rows_end - row < W ? int(rows_end - row) : W;
      alignas(64) float top[W], total[W];
      m[j].store(top);
      sum[j].store(total);
      float* lse = a.lse + (stored * a.heads + h) * a.rows + row;
      for (int i = 0; i < rows; ++i)
        lse[i] = total[i] == 0.0f ? -INFINITY : (top[i] + std::log2(total[i])) * kLn2;
      E* out = static_cast<E*>(a.out) + ((stored * a.rows + row) * a.heads + h) * a.dim;
      store_rows(o, j, sum[j], length > 0, rows, a.dim, out, row_stride);
    }
  }

  // Query vectors [begin, end) in the order batch, head, row.
  void vectors(int64_t begin, int64_t end) {
    int64_t b = 0, before = 0;  // vectors of the samples before b
    for (int64_t u = begin; u < end;) {
      const int64_t per_head = vectors_of(a, b);
      if (u - before >= per_head * a.heads) {
        before += per_head * a.heads, ++b;
        continue;
      }
      int64_t h = (u - before) / per_head, in_head = (u - before) % per_head;
      int64_t stop = end - u < per_head - in_head ? end - u : per_head - in_head;
      start_head(b, h);
      for (int64_t left = stop, row = rows_begin(a, b) + in_head * W; left;) {
        int nr = left >= 5 || left == 3 ? 3 : left == 1 ? 1 : 2;  // 4 = 2 + 2: one alone is slowest
        if (nr == 3)
          tile<3>(b, h, row);
        else if (nr == 2)
          tile<2>(b, h, row);
        else
          tile<1>(b, h, row);
        left -= nr, row += nr * W;
      }
      u += stop;
    }
  }
};

// The query vector at which `part` of `parts` of the work begins, and past the last part the end:
// work is keys + 32 per vector.
static int64_t split(const AttentionArgs& a, int64_t part, int64_t parts) {
  auto vectors = [&](int64_t b) { return a.heads * vectors_of(a, b); };
  auto cost = [&](int64_t b) { return (a.key_lengths ? a.key_lengths[b] : a.keys) + 32; };
  double total = 0.0;
  for (int64_t b = 0; b < a.batch; ++b) total += double(cost(b)) * double(vectors(b));
  double target = total * double(part) / double(parts);
  int64_t before = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    double sample = double(cost(b)) * double(vectors(b));
    if (part < parts && target < sample) return before + int64_t(target / double(cost(b)) + 0.5);
    target -= sample;
    before += vectors(b);
  }
  return before;
}

template <class E, class Words>
static void run_all(const AttentionArgs& a) {
  parallel_for(0, a.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      Worker<E, Words>(a, part).vectors(split(a, part, a.threads), split(a, part + 1, a.threads));
  });
}

}  // namespace

void attention(const AttentionArgs& a) {
  switch (a.dtype) {
    case Dtype::kF32: return run_all<float, F32Words>(a);
    case Dtype::kF16: return run_all<f16, F32Words>(a);
    case Dtype::kBf16:
#ifdef __AVX512BF16__
      return run_all<bf16, Bf16Words>(a);
#else
      return run_all<bf16, F32Words>(a);
#endif
  }
}

FASTDIFF_KERNEL_END
