// Products of int8 with int8 in int32, exact for every value, and scales after them.
//
// Many rows: a task is a few panels (kWide output columns) and a range of rows. The panels' weights
// are turned once into [k / 4][kWide] lanes of four, each group of columns padded to whole lanes;
// rows are taken in tiles of up to kRows, whose sums are registers (28 of 32, AVX2: 12 of 16).
// Few rows: bound by the weight's way from memory, which is read as it lies, and the lanes of each
// product added up at the end of a group.
//
// Four products of a lane. With VNNI in one instruction that takes an unsigned and a signed factor:
// the weight goes in as w + 128, and 128 times the row's sum of x comes off. Elsewhere the even and
// the odd columns as two pairs of int16: as many instructions as one product of |x| with sign(x) w
// and the widening of its int16 sums take, and -128 is no exception.
//
// Integers do not round, and floats are taken in one order everywhere: results depend neither on
// the level, nor on threads, nor on the rows beside.
#pragma once
#include <cstring>

#include "grouped_linear_tiles.h"
#include "quant_linear.h"

FASTDIFF_KERNEL_BEGIN

namespace {

// ---- the level's integers ----

#ifdef __AVX512F__
using Ints = __m512i;
FD_INLINE Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
FD_INLINE void store_ints(Ints v, void* p) { _mm512_storeu_si512(p, v); }
FD_INLINE Ints all_ints(int32_t x) { return _mm512_set1_epi32(x); }
FD_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
FD_INLINE Ints bits(Vec v) { return _mm512_castps_si512(v.v); }
FD_INLINE Vec floats(Ints v) { return _mm512_cvtepi32_ps(v); }
FD_INLINE __m256i halves(Ints v) {
  return _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
}
#else
using Ints = __m256i;
FD_INLINE Ints load_ints(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
FD_INLINE void store_ints(Ints v, void* p) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
FD_INLINE Ints all_ints(int32_t x) { return _mm256_set1_epi32(x); }
FD_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
FD_INLINE Ints bits(Vec v) { return _mm256_castps_si256(v.v); }
FD_INLINE Vec floats(Ints v) { return _mm256_cvtepi32_ps(v); }
FD_INLINE __m256i halves(Ints v) { return v; }
#endif

// In a register, as it is: else GCC adds up products of several steps before the sums, which then
// are in memory.
FD_INLINE Ints kept(Ints v) {
  asm("" : FD_REGISTER(v));
  return v;
}

// The parts in which lanes of four are multiplied, and what to add to a group's sums: `offset` of
// the lanes' sums of x.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int kParts = 1;
#ifdef __AVX512VNNI__
FD_INLINE Ints products(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }
FD_INLINE Ints of_weight(Ints w, int) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
FD_INLINE int32_t sum_of(Ints v) { return _mm512_reduce_add_epi32(v); }
#else
FD_INLINE Ints products(Ints sum, Ints w, Ints x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
FD_INLINE Ints of_weight(Ints w, int) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }
FD_INLINE int32_t sum_of(Ints v) {
  const __m128i a = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i b = _mm_hadd_epi32(a, a);
  return _mm_cvtsi128_si32(_mm_hadd_epi32(b, b));
}
#endif
FD_INLINE Ints of_row(Ints x, int) { return x; }
FD_INLINE Ints dot(Ints sum, Ints w, Ints x) { return kept(products(sum, w, x)); }
FD_INLINE int32_t offset(Ints x) {  // wraps like the sums that it is added to
  return int32_t(-128u * uint32_t(sum_of(products(all_ints(0), all_ints(0x01010101), x))));
}
#else
constexpr int kParts = 2;
#ifdef __AVX512F__
FD_INLINE Ints of_weight(Ints w, int part) {
  return _mm512_srai_epi16(part ? w : _mm512_slli_epi16(w, 8), 8);
}
FD_INLINE Ints products(Ints w, Ints x) { return _mm512_madd_epi16(w, x); }
#else
FD_INLINE Ints of_weight(Ints w, int part) {
  return _mm256_srai_epi16(part ? w : _mm256_slli_epi16(w, 8), 8);
}
FD_INLINE Ints products(Ints w, Ints x) { return _mm256_madd_epi16(w, x); }
#endif
FD_INLINE Ints dot(Ints sum, Ints w, Ints x) { return kept(add_ints(sum, products(w, x))); }
FD_INLINE Ints of_row(Ints x, int part) { return of_weight(x, part); }
FD_INLINE int32_t offset(Ints) { return 0; }
#endif

FD_INLINE int32_t wrapped(int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); }

constexpr int kLane = Quads::each;
constexpr int kBytes = kLane * W;                   // of a vector
constexpr int64_t kBlock = kDeep / kParts / W * W;  // lanes of a row in a tile
constexpr int kTileStride = kParts * kBlock + 16;   // no power of two
constexpr int kFewRows = 8;                         // that are multiplied as they lie, at most
constexpr int kFewTile = W == 16 ? 6 : 3;           // of them, beside kQuad of the weight
constexpr int64_t kTaskRows = 16 * kRows;           // a task's least, if rows are divided

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

FD_INLINE int64_t token(const QuantLinearArgs& a, int64_t row) {
  return a.index ? a.index[row] : row;
}

// ---- what comes after the sums ----

// y of `rows` rows and the columns of a panel; totals [rows][kWide].
template <int kActivation, class T>
void finish(const QuantLinearArgs& a, int64_t row, int rows, const Columns& at,
            const float* totals) {
  constexpr bool gated = kActivation >= kGroupedGeglu;
  const int64_t out = gated ? a.N / 2 : a.N;
  Vec bias[2] = {Vec(0.0f), Vec(0.0f)};
  if (a.bias)
    for (int v = 0; v < 2; ++v)
      if (at.count[v]) bias[v] = Vec::load(static_cast<const T*>(a.bias) + at.n[v], at.count[v]);
  T* y = static_cast<T*>(a.y) + row * out + at.n[0];
  const bool full = at.count[0] == W && at.count[1] == W;
  for (int i = 0; i < rows; ++i, totals += kWide, y += out) {
    const Vec s(a.s[token(a, row + i)]), t[2] = {Vec::load(totals), Vec::load(totals + W)};
    const Vec u = a.bias ? fma(t[0], s, bias[0]) : t[0] * s;
    const Vec v = a.bias ? fma(t[1], s, bias[1]) : t[1] * s;
    const Vec first = activated<kActivation>(u, v), second = activated<kActivation>(v, v);
    if (full) {
      first.store(y);
      if constexpr (!gated) second.store(y + W);
    } else {
      first.store(y, at.count[0]);
      if (!gated && at.count[1]) second.store(y + W, at.count[1]);
    }
  }
}
using Finish = void (*)(const QuantLinearArgs&, int64_t, int, const Columns&, const float*);

// ---- many rows ----

// c [M][kWide] (+)= x b over `deep` lanes; x: part p of lane k of row i at i * kTileStride + p *
// kBlock + k.
template <int M>
void tile(const int32_t* x, const float* b, int64_t deep, int32_t* c, bool add) {
  Ints sum[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sum[i][v] = add ? load_ints(c + i * kWide + v * W) : all_ints(0);
  for (int64_t k = 0; k < deep; ++k, b += kWide, ++x) {
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) {
      const Ints w0 = of_weight(load_ints(b), p), w1 = of_weight(load_ints(b + W), p);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        const Ints u = all_ints(x[i * kTileStride + p * kBlock]);
        sum[i][0] = dot(sum[i][0], w0, u);
        sum[i][1] = dot(sum[i][1], w1, u);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) store_ints(sum[i][v], c + i * kWide + v * W);
}

template <int M = kRows>
void tile_of(int rows, const int32_t* x, const float* b, int64_t deep, int32_t* c, bool add) {
  if constexpr (M > 1)
    if (rows < M) return tile_of<M - 1>(rows, x, b, deep, c, add);
  tile<M>(x, b, deep, c, add);
}

// `count` columns of a row into a tile; gives their offset.
int32_t copy_tokens(const int8_t* q, int64_t count, int32_t* to) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; k += kBytes, to += W) {
    const Ints v = bits(lanes<Quads>(q + k, count - k));
#pragma GCC unroll 2
    for (int p = 0; p < kParts; ++p) store_ints(of_row(v, p), to + p * kBlock);
    sum = wrapped(sum, offset(v));
  }
  return sum;
}

struct Panels {
  const QuantLinearArgs& a;
  const bool gated = a.activation >= kGroupedGeglu;
  const int64_t size = a.G ? a.K / a.G : 0;  // columns of a group
  const int64_t deep = up(size, kLane);      // its lanes
  const int64_t of_one = a.G * deep * kWide, all = gated ? up(a.N / 2, W) : up(a.N, kWide);
  int64_t most;  // panels of a task

  explicit Panels(const QuantLinearArgs& args) : a(args) {
    const int64_t fit = kPanelBytes / ((of_one + a.G * kWide) * 4 + 1);
    most = fit < 1 ? 1 : fit > kMostPanels ? kMostPanels : fit;
  }
  Columns at(int64_t panel) const { return Columns(panel, a.N, gated); }

  // Panel `panel` into `b` [G][deep][kWide], its scales into `scales` [G][kWide].
  void pack(int64_t panel, float* b, float* scales) const {
    const Columns of = at(panel);
    for (int v = 0; v < 2; ++v) {
      const int64_t n = of.n[v];
      const int count = of.count[v];
      const int8_t* from = a.values + (count ? n : 0) * a.K;
      for (int64_t g = 0; g < a.G; ++g) {
        float* to = b + g * deep * kWide + v * W;
        if (count == W)
          pack_rows<Quads, true>(from + g * size, a.K, W, size, to);
        else
          pack_rows<Quads, false>(from + g * size, a.K, count, size, to);
        for (int i = 0; i < W; ++i)
          scales[g * kWide + v * W + i] = i < count ? a.scale[(n + i) * a.G + g] : 0.0f;
      }
    }
  }
};

// totals [rows][kWide] (+)= scale (c + start): the sums of a group.
void flush(int rows, const int32_t* c, const int32_t* start, const float* scales, float* totals,
           bool add) {
  for (int v = 0; v < 2; ++v) {
    const Vec scale = Vec::load(scales + v * W);
    for (int i = 0; i < rows; ++i) {
      const int at = i * kWide + v * W;
      const Vec sum = floats(add_ints(load_ints(c + at), all_ints(start[i])));
      fma(sum, scale, add ? Vec::load(totals + at) : Vec(0.0f)).store(totals + at);
    }
  }
}

// Panels `from` to `to`, rows `begin` to `end`.
void many_rows(const Panels& panels, int64_t from, int64_t to, int64_t begin, int64_t end,
               Finish finish) {
  const QuantLinearArgs& a = panels.a;
  const int64_t count = to - from, per_tile = int64_t(kRows) * kWide;
  Scratch<float> b(size_t(count * panels.of_one) + 1), scales(size_t(count * a.G * kWide) + 1);
  Scratch<float> totals(size_t(count * per_tile));
  Scratch<int32_t> x(size_t(kRows) * kTileStride), c(size_t(count * per_tile));
  if (!a.G) std::memset(totals.data, 0, size_t(count * per_tile) * sizeof(float));
  for (int64_t p = 0; p < count; ++p)
    panels.pack(from + p, b.data + p * panels.of_one, scales.data + p * a.G * kWide);
  const int64_t tiles = up(end - begin, kRows);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t row = begin + (end - begin) * t / tiles;
    const int rows = int(begin + (end - begin) * (t + 1) / tiles - row);
    for (int64_t g = 0; g < a.G; ++g) {
      int32_t start[kRows] = {0};
      for (int64_t k = 0; k < panels.deep; k += kBlock) {
        const int64_t deep = panels.deep - k < kBlock ? panels.deep - k : kBlock;
        const int64_t left = panels.size - k * kLane;
        const int64_t columns = left < deep * kLane ? left : deep * kLane;
        for (int i = 0; i < rows; ++i) {
          const int8_t* q = a.q + token(a, row + i) * a.K + g * panels.size + k * kLane;
          start[i] = wrapped(start[i], copy_tokens(q, columns, x.data + i * kTileStride));
        }
        for (int64_t p = 0; p < count; ++p)
          tile_of(rows, x.data, b.data + p * panels.of_one + (g * panels.deep + k) * kWide, deep,
                  c.data + p * per_tile, k > 0);
      }
      for (int64_t p = 0; p < count; ++p)
        flush(rows, c.data + p * per_tile, start, scales.data + (p * a.G + g) * kWide,
              totals.data + p * per_tile, g > 0);
    }
    for (int64_t p = 0; p < count; ++p)
      finish(a, row, rows, panels.at(from + p), totals.data + p * per_tile);
  }
}

// ---- few rows ----

FD_INLINE __m128i sums_of(const Ints (&r)[kQuad]) {
  const __m256i a = _mm256_hadd_epi32(halves(r[0]), halves(r[1]));
  const __m256i b = _mm256_hadd_epi32(halves(r[2]), halves(r[3]));
  const __m256i c = _mm256_hadd_epi32(a, b);
  return _mm_add_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
}

// The rows of x as vectors of parts, every group padded to whole vectors with zeros.
struct Rows {
  const QuantLinearArgs& a;
  const int64_t size = a.G ? a.K / a.G : 0, vectors = up(size, kBytes);
  const int64_t pitch = a.G * vectors * kParts * W;
  Scratch<int32_t> x, start;  // [M][G][vectors][kParts][W]; [M][G]

  explicit Rows(const QuantLinearArgs& args)
      : a(args), x(size_t(a.M * pitch) + 1), start(size_t(a.M * a.G) + 1) {
    int32_t* to = x.data;
    for (int64_t i = 0; i < a.M * a.G; ++i) {
      const int8_t* q = a.q + token(a, i / a.G) * a.K + i % a.G * size;
      start.data[i] = 0;
      for (int64_t k = 0; k < size; k += kBytes) {
        const Ints v = bits(lanes<Quads>(q + k, size - k));
        for (int p = 0; p < kParts; ++p, to += W) store_ints(of_row(v, p), to);
        start.data[i] = wrapped(start.data[i], offset(v));
      }
    }
  }
};

// c [M][kWide], of which kQuad: rows `first` on of x, and rows n on of the weight, whose last is
// taken again where it has no more.
template <int M>
void dots(const Rows& rows, int64_t first, int64_t n, float* c) {
  const QuantLinearArgs& a = rows.a;
  const int8_t *w[kQuad], *const end = a.values + a.N * a.K;
  const float* scale[kQuad];
#pragma GCC unroll 4
  for (int j = 0; j < kQuad; ++j) {
    const int64_t at = n + j < a.N ? n + j : a.N - 1;
    w[j] = a.values + at * a.K, scale[j] = a.scale + at * a.G;
  }
  __m128 total[M];
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) total[i] = _mm_setzero_ps();
  const int32_t* x = rows.x.data + first * rows.pitch;
  for (int64_t g = 0; g < a.G; ++g) {
    // What lies past a group's end is multiplied by 0, if it can be read at all.
    const int64_t at = g * rows.size;
    const bool ends = end - (w[kQuad - 1] + at) < rows.vectors * kBytes;
    const int64_t whole = ends ? rows.size / kBytes : rows.vectors;
    alignas(64) int8_t rest[kQuad][kBytes];
    if (whole < rows.vectors)
      for (int j = 0; j < kQuad; ++j)
        lanes<Quads>(w[j] + at + whole * kBytes, rows.size - whole * kBytes)
            .store(reinterpret_cast<float*>(rest[j]));
    Ints sum[M][kQuad];
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kQuad; ++j) sum[i][j] = all_ints(0);
    const auto step = [&](const int8_t* const(&from)[kQuad]) {
#pragma GCC unroll 4
      for (int j = 0; j < kQuad; ++j) {
        const Ints v = load_ints(from[j]);
#pragma GCC unroll 2
        for (int p = 0; p < kParts; ++p) {
          const Ints u = of_weight(v, p);
#pragma GCC unroll 6
          for (int i = 0; i < M; ++i)
            sum[i][j] = dot(sum[i][j], u, load_ints(x + i * rows.pitch + p * W));
        }
      }
      x += kParts * W;
    };
    for (int64_t k = 0; k < whole * kBytes; k += kBytes) {
#pragma GCC unroll 4
      for (int j = 0; j < kQuad; ++j)
        _mm_prefetch(reinterpret_cast<const char*>(w[j] + at + k + kQuad * a.K), _MM_HINT_T0);
      step({w[0] + at + k, w[1] + at + k, w[2] + at + k, w[3] + at + k});
    }
    if (whole < rows.vectors) step({rest[0], rest[1], rest[2], rest[3]});
    const __m128 s = _mm_setr_ps(scale[0][g], scale[1][g], scale[2][g], scale[3][g]);
#pragma GCC unroll 6
    for (int i = 0; i < M; ++i) {
      const __m128i start = _mm_set1_epi32(rows.start.data[(first + i) * a.G + g]);
      const __m128i whole = _mm_add_epi32(sums_of(sum[i]), start);
      total[i] = _mm_fmadd_ps(_mm_cvtepi32_ps(whole), s, total[i]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; ++i) _mm_storeu_ps(c + i * kWide, total[i]);
}

template <int M = kFewTile>
void dots_of(int count, const Rows& rows, int64_t first, int64_t n, float* c) {
  if constexpr (M > 1)
    if (count < M) return dots_of<M - 1>(count, rows, first, n, c);
  dots<M>(rows, first, n, c);
}

// Panels `from` to `to` of all rows.
void few_rows(const Panels& panels, const Rows& rows, int64_t from, int64_t to, Finish finish) {
  const QuantLinearArgs& a = panels.a;
  const int64_t tiles = up(a.M, kFewTile);
  float c[kFewTile * kWide];
  for (int64_t panel = from; panel < to; ++panel) {
    const Columns at = panels.at(panel);
    for (int64_t t = 0; t < tiles; ++t) {  // the panel's weights stay in L1
      const int64_t first = a.M * t / tiles;
      const int count = int(a.M * (t + 1) / tiles - first);
      for (int v = 0; v < 2; ++v)
        for (int j = 0; j < at.count[v]; j += kQuad)
          dots_of(count, rows, first, at.n[v] + j, c + v * W + j);
      finish(a, first, count, at, c);
    }
  }
}

}  // namespace

FASTDIFF_KERNEL_END
