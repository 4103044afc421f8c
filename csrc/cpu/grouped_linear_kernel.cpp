// Products of ragged groups. A task is a few panels (kWide output columns) of one expert, all its
// rows: the panels' weights are turned once into [k][kWide], which the second cache level holds;
// rows are taken in tiles of up to kRows, copied together (that is where `index` gathers) so that
// an element's address is a constant away from the tile's. 28 of 32 registers are sums (AVX2: 12 of
// 16): an element of x is read for two vectors of columns, a vector of weights for kRows rows.
// Every sum is taken in the order of k by one thread: results depend neither on threads nor on what
// is beside a row. With AVX512-BF16, bfloat16 pairs along k are multiplied as they are.
#include <cstring>
#include <vector>

#include "grouped_linear.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

namespace {

constexpr int W = Vec::width;
constexpr int kWide = 2 * W;             // columns of a panel
constexpr int kRows = W == 16 ? 14 : 6;  // rows of a tile
constexpr int kDeep = 1536;              // of k at a time: a tile stays near
constexpr int kStride = kDeep + 16;      // no power of two: rows would share cache sets
constexpr int64_t kPanelBytes = W == 16 ? 400 << 10 : 96 << 10;  // of the panels of a task
constexpr int kMostPanels = 16;

#ifdef __AVX512BF16__
constexpr bool kPairs = true;  // bfloat16 is multiplied in pairs
#else
constexpr bool kPairs = false;
#endif

// What a lane of a panel holds: a float, or two bfloat16 that are neighbours along k.
struct Floats {
  static FD_INLINE Vec fma_(Vec w, const float* x, Vec sum) { return fma(w, Vec(*x), sum); }
};
struct Pairs {
  static FD_INLINE Vec fma_(Vec w, const float* x, Vec sum) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum.v, __m512bh(_mm512_castps_si512(w.v)),
                            __m512bh(_mm512_castps_si512(_mm512_set1_ps(*x))));
#else
    return sum;
#endif
  }
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

// ---- weights into panels
// -------------------------------------------------------------------------

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

// W lanes from p on: elements as floats, or, of Pairs, 2 W elements as they are.
template <class Kind, class T>
FD_INLINE Vec lanes(const T* p) {
  if constexpr (std::is_same_v<Kind, Pairs>)
    return Vec::load(reinterpret_cast<const float*>(p));
  else
    return Vec::load(p);
}
// Of which `count` elements are there.
template <class Kind, class T>
FD_INLINE Vec lanes(const T* p, int64_t count) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<Kind, Pairs>) {
    const __mmask32 mask = count >= 32 ? 0xffffffffu : (1u << count) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
  }
#endif
  return count >= W ? Vec::load(p) : Vec::load(p, int(count));
}

// Columns n to n + count (at most W) of a panel whose weights lie along k.
template <class Kind, bool kFull, class T>
void pack_rows(const T* w, int64_t stride, int count, int64_t K, float* to) {
  constexpr int each = std::is_same_v<Kind, Pairs> ? 2 : 1;
  int64_t k = 0;
  if constexpr (kFull) {
    for (; k + each * W <= K; k += each * W) {
      Vec r[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        const T* p = w + i * stride + k;
        _mm_prefetch(reinterpret_cast<const char*>(p) + 512, _MM_HINT_T0);
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

// ---- rows into a tile
// ----------------------------------------------------------------------------

template <class Kind, class T>
void copy_row(const T* x, int64_t count, float* to) {
  if constexpr (std::is_same_v<Kind, Pairs>) {
    std::memcpy(to, x, size_t(count) * 2);
    if (count % 2) reinterpret_cast<uint16_t*>(to)[count] = 0;
  } else {
    each(count, [&](int64_t k, auto part) { part.store(part.load(x + k), to + k); });
  }
}

// ---- tasks
// ---------------------------------------------------------------------------------------

struct Task {
  int64_t expert, panel, panels, start;  // start: of its cost among all
};

// Panels of all experts that have rows, cut so that a task's weights fit and there is work for all.
struct Tasks {
  std::vector<Task> list;
  int64_t cost = 0, most;  // most: panels of a task

  Tasks(const int64_t* offsets, int64_t experts, int64_t panels, int64_t fit) : most(fit) {
    int64_t busy = 0;
    for (int64_t e = 0; e < experts; ++e) busy += offsets[e + 1] > offsets[e];
    while (most > 2 && busy * ((panels + most - 1) / most) < 32) --most;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t rows = offsets[e + 1] - offsets[e];
      const int64_t parts = rows ? (panels + most - 1) / most : 0;
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t from = panels * i / parts, to = panels * (i + 1) / parts;
        list.push_back({e, from, to - from, cost});
        cost += (to - from) * (rows + 16);  // turning a panel is worth some rows
      }
    }
  }

  // Every thread makes a body, and calls body(task, next or null) for its tasks in turn.
  template <class F>
  void run(int64_t grain, F make) const {
    parallel_for(0, cost, grain, [&](int64_t begin, int64_t end) {
      const Task *task = list.data(), *last = task + list.size();
      while (task < last && task->start < begin) ++task;
      const Task* stop = task;
      while (stop < last && stop->start < end) ++stop;
      if (task == stop) return;
      auto body = make();
      for (; task < stop; ++task) body(*task, stop - task > 1 ? task + 1 : nullptr);
    });
  }
};

int64_t most_panels(int64_t deep) {
  const int64_t fit = kPanelBytes / (deep * kWide * 4 + 1);
  return fit < 1 ? 1 : fit > kMostPanels ? kMostPanels : fit;
}

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

template <int kActivation, class T>
void finish(const GroupedLinearArgs& a, int64_t e, int64_t row, int rows, const Columns& at,
            const float* c) {
  constexpr bool gated = kActivation >= kGroupedGeglu;
  const int64_t out = gated ? a.N / 2 : a.N;
  Vec bias[2] = {Vec(0.0f), Vec(0.0f)};
  if (a.bias)
    for (int v = 0; v < 2; ++v)
      if (at.count[v])
        bias[v] = Vec::load(static_cast<const T*>(a.bias) + e * a.N + at.n[v], at.count[v]);
  T* y = static_cast<T*>(a.y) + row * out + at.n[0];
  const bool full = at.count[0] == W && at.count[1] == W;
  for (int i = 0; i < rows; ++i, c += kWide, y += out) {
    const Vec u = Vec::load(c) + bias[0], v = Vec::load(c + W) + bias[1];
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

// Asks for the weights of a later task, some lines at a time, while this one computes.
template <class T>
struct Ahead {
  const char* at = nullptr;
  int64_t stride = 0, bytes = 0, rows = 0, done = 0;
  const char* other = nullptr;  // the second half of a gate

  Ahead(const GroupedLinearArgs& a, const Task* task, bool gated) {
    if (!task) return;
    const T* weight = static_cast<const T*>(a.weight) + task->expert * a.weight_e;
    const int64_t width = gated ? W : kWide, all = gated ? a.N / 2 : a.N;
    const int64_t n = task->panel * width;
    const int64_t columns = (task->panels * width < all - n ? task->panels * width : all - n);
    at = reinterpret_cast<const char*>(weight + n * a.weight_n);
    if (gated) other = reinterpret_cast<const char*>(weight + (n + all) * a.weight_n);
    const bool along = a.weight_k == 1;
    stride = (along ? a.weight_n : a.weight_k) * int64_t(sizeof(T));
    bytes = (along ? a.K : columns) * int64_t(sizeof(T)), rows = along ? columns : a.K;
  }

  void rows_until(int64_t until) {
    for (; done < until && done < rows; ++done) {
      for (int64_t i = 0; i < bytes; i += 64) prefetch_l2(at + i);
      at += stride;
      if (!other) continue;
      for (int64_t i = 0; i < bytes; i += 64) prefetch_l2(other + i);
      other += stride;
    }
  }
};

template <class Kind, int kActivation, class T>
void forward(const GroupedLinearArgs& a) {
  constexpr int each = std::is_same_v<Kind, Pairs> ? 2 : 1;
  constexpr bool gated = kActivation >= kGroupedGeglu;
  const int64_t deep = (a.K + each - 1) / each;  // lanes
  const int64_t panels = gated ? (a.N / 2 + W - 1) / W : (a.N + kWide - 1) / kWide;
  const Tasks tasks(a.offsets, a.E, panels, most_panels(deep));
  const auto make = [&] {
    return [&, b = Scratch<float>(size_t(tasks.most * deep * kWide) + 1),
            x = Scratch<float>(size_t(kRows) * kStride),
            c = Scratch<float>(size_t(tasks.most) * kRows * kWide)](const Task& task,
                                                                    const Task* next) {
      const T* weight = static_cast<const T*>(a.weight) + task.expert * a.weight_e;
      for (int64_t p = 0; p < task.panels; ++p) {
        const Columns at(task.panel + p, a.N, gated);
        for (int v = 0; v < 2; ++v) {
          float* to = b.data + p * deep * kWide + v * W;
          const T* from = weight + at.n[v] * a.weight_n;
          if (a.weight_k != 1)
            pack_columns<Kind>(from, a.weight_k, at.count[v], a.K, to);
          else if (at.count[v] == W)
            pack_rows<Kind, true>(from, a.weight_n, W, a.K, to);
          else
            pack_rows<Kind, false>(from, a.weight_n, at.count[v], a.K, to);
        }
      }
      Ahead<T> ahead(a, next, gated);
      const int64_t first = a.offsets[task.expert], rows = a.offsets[task.expert + 1] - first;
      const int64_t tiles = (rows + kRows - 1) / kRows;
      const int64_t steps = tiles * task.panels;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t row = first + rows * i / tiles;
        const int count = int(first + rows * (i + 1) / tiles - row);
        for (int64_t k = 0; k == 0 || k < deep; k += kDeep) {
          const int64_t part = deep - k < kDeep ? deep - k : kDeep;
          const int64_t elements = a.K - k * each < part * each ? a.K - k * each : part * each;
          for (int j = 0; j < count; ++j) {
            const int64_t from = a.index ? a.index[row + j] : row + j;
            copy_row<Kind>(static_cast<const T*>(a.x) + from * a.x_stride + k * each, elements,
                           x.data + j * kStride);
          }
          for (int64_t p = 0; p < task.panels; ++p) {
            product_of<Kind, kStride, 1>(count, x.data, b.data + (p * deep + k) * kWide, part,
                                         c.data + p * kRows * kWide, k > 0);
            ahead.rows_until(ahead.rows * (i * task.panels + p + 1) / steps);
            if (k + kDeep >= deep)  // and for the rows of the next tile
              for (int j = int(count * p / task.panels); j < count * (p + 1) / task.panels; ++j) {
                const int64_t to = row + count + j;
                if (to >= first + rows) break;
                const T* near =
                    static_cast<const T*>(a.x) + (a.index ? a.index[to] : to) * a.x_stride;
                for (int64_t n = 0; n < a.K && n < kDeep * each; n += 64 / int64_t(sizeof(T)))
                  _mm_prefetch(reinterpret_cast<const char*>(near + n), _MM_HINT_T0);
              }
          }
        }
        for (int64_t p = 0; p < task.panels; ++p)
          finish<kActivation, T>(a, task.expert, row, count, Columns(task.panel + p, a.N, gated),
                                 c.data + p * kRows * kWide);
      }
    };
  };
  tasks.run(1 + 65536 / (deep + 1), make);
}

template <class Kind, class T>
void forward_of(const GroupedLinearArgs& a) {
  switch (a.activation) {
    case kGroupedGelu: return forward<Kind, kGroupedGelu, T>(a);
    case kGroupedGeluTanh: return forward<Kind, kGroupedGeluTanh, T>(a);
    case kGroupedSilu: return forward<Kind, kGroupedSilu, T>(a);
    case kGroupedGeglu: return forward<Kind, kGroupedGeglu, T>(a);
    case kGroupedSwiglu: return forward<Kind, kGroupedSwiglu, T>(a);
    case kGroupedSwishglu: return forward<Kind, kGroupedSwishglu, T>(a);
    default: return forward<Kind, kGroupedNone, T>(a);
  }
}

// out[e] = grad^T x over the rows of e. Panels hold columns of x, tiles rows of grad's transpose:
// [row][16], so that consecutive columns of grad are copied as they lie.
template <class T>
void weight_grad(const GroupedWeightGradArgs& a) {
  constexpr int kTile = 16;
  const int64_t panels = (a.K + kWide - 1) / kWide;
  int64_t longest = 0;
  for (int64_t e = 0; e < a.E; ++e) {
    const int64_t rows = a.offsets[e + 1] - a.offsets[e];
    longest = rows > longest ? rows : longest;
    if (!rows)
      std::memset(static_cast<T*>(a.out) + e * a.N * a.K, 0, size_t(a.N * a.K) * sizeof(T));
  }
  constexpr int64_t kLong = 2048;  // rows at a time
  const int64_t block = longest < kLong ? longest : kLong;
  const Tasks tasks(a.offsets, a.E, panels, most_panels(block));
  const auto body = [&](const Task& task, const Task*) {
    Scratch<float> b(size_t(task.panels * block * kWide) + 1), g(size_t(block) * kTile + 1);
    // Sums of more than one block of rows wait here.
    const int64_t first = a.offsets[task.expert], rows = a.offsets[task.expert + 1] - first;
    const bool parts = rows > block;
    Scratch<float> c(size_t(parts ? a.N * task.panels : kRows) * kWide);
    const int64_t tiles = (a.N + kRows - 1) / kRows;
    for (int64_t r = 0; r < rows; r += block) {
      const int64_t deep = rows - r < block ? rows - r : block;
      for (int64_t k = 0; k < deep; ++k) {
        const int64_t row = first + r + k, from = a.index ? a.index[row] : row;
        const T* x = static_cast<const T*>(a.x) + from * a.x_stride;
        for (int64_t p = 0; p < task.panels; ++p) {
          const Columns at(task.panel + p, a.K, false);
          for (int v = 0; v < 2; ++v)
            (at.count[v] ? Vec::load(x + at.n[v], at.count[v]) : Vec(0.0f))
                .store(b.data + (p * deep + k) * kWide + v * W);
        }
      }
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t n = a.N * i / tiles;
        const int count = int(a.N * (i + 1) / tiles - n);
        const T* grad = static_cast<const T*>(a.grad) + (first + r) * a.N + n;
        for (int64_t k = 0; k < deep; ++k) {
          float* to = g.data + k * kTile;
          for (int from = 0; from < count; from += W)
            Vec::load(grad + k * a.N + from, count - from).store(to + from, count - from);
        }
        for (int64_t p = 0; p < task.panels; ++p) {
          float* sums = c.data + (parts ? (p * a.N + n) * kWide : 0);
          product_of<Floats, 1, kTile>(count, g.data, b.data + p * deep * kWide, deep, sums, r > 0);
          if (r + deep < rows) continue;
          const Columns at(task.panel + p, a.K, false);
          for (int j = 0; j < count; ++j)
            for (int v = 0; v < 2; ++v)
              if (at.count[v])
                Vec::load(sums + j * kWide + v * W)
                    .store(static_cast<T*>(a.out) + (task.expert * a.N + n + j) * a.K + at.n[v],
                           at.count[v]);
        }
      }
    }
  };
  tasks.run(1 + 65536 / (a.N + 1), [&] { return body; });
}

}  // namespace

void grouped_linear(const GroupedLinearArgs& a) {
  if (a.dtype == Dtype::kBf16 && kPairs) return forward_of<Pairs, bf16>(a);
  FASTDIFF_DTYPE_SWITCH(a.dtype, forward_of<Floats, T>(a));
}

void grouped_weight_grad(const GroupedWeightGradArgs& a) {
  FASTDIFF_DTYPE_SWITCH(a.dtype, weight_grad<T>(a));
}

FASTDIFF_KERNEL_END
