// What low-rank adapters add, in one pass over the rows: x comes in once, y goes in and out once,
// and the low-rank product of a tile of rows never leaves the cache.
//
// Both factors of every adapter in use are turned into panels first, once a call. A task is a tile
// of rows of one sample. Sums are taken in the order of k and of the rank, whatever the rows beside
// are, so a sample's result is to the bit what it is alone.
#include <cstring>

#include "grouped_linear_tiles.h"
#include "lora.h"

FASTDIFF_KERNEL_BEGIN

namespace {

constexpr int64_t kBlock = 128;  // of k: sums of sums, whose roundings add up to less

// c [M][V W] (+)= x panel over `deep` lanes; x: rows kStride apart.
template <class Kind, int M, int V>
void project(const float* x, const float* panel, int64_t deep, float* c, int64_t pitch, bool add) {
  Vec sum[M][V];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[i][v] = Vec(0.0f);
  for (int64_t k = 0; k < deep; ++k, panel += kWide) {
    Vec w[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) w[v] = Vec::load(panel + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[i][v] = Kind::fma_(w[v], x + i * kStride + k, sum[i][v]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = c + i * pitch + v * W;
      (add ? Vec::load(to) + sum[i][v] : sum[i][v]).store(to);
    }
}

// out = y + low panel, of `count` rows and `columns` of the panel's.
template <int M, class T>
void expand(int count, const float* low, int64_t pitch, int64_t rank, const float* panel,
            const T* y, int64_t y_t, T* out, int64_t out_t, int columns) {
  Vec sum[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) sum[i][0] = sum[i][1] = Vec(0.0f);
  for (int64_t r = 0; r < rank; ++r, panel += kWide) {
    const Vec w0 = Vec::load(panel), w1 = Vec::load(panel + W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec u(low[i * pitch + r]);
      sum[i][0] = fma(w0, u, sum[i][0]);
      sum[i][1] = fma(w1, u, sum[i][1]);
    }
  }
  if (columns == kWide) {
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      if (i >= count) break;
      (Vec::load(y + i * y_t) + sum[i][0]).store(out + i * out_t);
      (Vec::load(y + i * y_t + W) + sum[i][1]).store(out + i * out_t + W);
    }
    return;
  }
  const int first = columns < W ? columns : W, second = columns - first;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    if (i >= count) break;
    (Vec::load(y + i * y_t, first) + sum[i][0]).store(out + i * out_t, first);
    if (second) (Vec::load(y + i * y_t + W, second) + sum[i][1]).store(out + i * out_t + W, second);
  }
}

template <class F>
FD_INLINE void for_rows(int count, F body) {
  if (count == 1) return body(std::integral_constant<int, 1>{});
  if (count == 2) return body(std::integral_constant<int, 2>{});
  if (count <= 4) return body(std::integral_constant<int, 4>{});
  if constexpr (kRows > 8)
    if (count <= 8) return body(std::integral_constant<int, 8>{});
  body(std::integral_constant<int, kRows>{});
}

// The panels of the adapters in use.
template <class Kind, class T>
struct Panels {
  static constexpr int each = std::is_same_v<Kind, Pairs> ? 2 : 1;
  const LoraAddArgs& a;
  const int64_t deep = (a.K + each - 1) / each, vectors = (a.rank + W - 1) / W;
  const int64_t of_down = (vectors + 1) / 2 * deep * kWide;
  const int64_t columns = (a.N + kWide - 1) / kWide, of_up = columns * a.rank * kWide;
  Scratch<int64_t> adapter, slot;  // of every place in `data`, and the place of every adapter
  int64_t used = 0;
  const int64_t counted = count();
  Scratch<float> data;

  explicit Panels(const LoraAddArgs& args)
      : a(args),
        adapter(size_t(a.A)),
        slot(size_t(a.A)),
        data(size_t(used * (of_down + of_up)) + 1) {
    parallel_for(0, used * vectors, 1 + 65536 / (a.K * W + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t at = i / vectors, v = i % vectors;
        const T* from = static_cast<const T*>(a.down) + (adapter.data[at] * a.rank + v * W) * a.K;
        turn<Kind>(from, a.K, a.rank - v * W, a.K, down(at) + v / 2 * deep * kWide + v % 2 * W);
      }
    });
    parallel_for(
        0, used * columns, 1 + 65536 / (a.rank * kWide + 1), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t at = i / columns, n = i % columns * kWide;
            const T* from = static_cast<const T*>(a.up) + (adapter.data[at] * a.N + n) * a.rank;
            float* to = up(at) + i % columns * a.rank * kWide;
            turn<Floats>(from, a.rank, a.N - n, a.rank, to);
            turn<Floats>(from + W * a.rank, a.rank, a.N - n - W, a.rank, to + W);
          }
        });
  }

  float* down(int64_t at) const { return data.data + at * (of_down + of_up); }
  float* up(int64_t at) const { return down(at) + of_down; }

  // Of sample b: its adapter, or -1.
  int64_t of(int64_t b) const { return a.index ? a.index[b] - 1 : 0; }
  bool neutral(int64_t of) const { return of < 0 || a.scale[of] == 0.0f; }

 private:
  int64_t count() {
    for (int64_t i = 0; i < a.A; ++i) slot.data[i] = -1;
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t i = of(b);
      if (i < 0 || slot.data[i] >= 0 || (neutral(i) && !a.low)) continue;
      adapter.data[used] = i;
      slot.data[i] = used++;
    }
    return used;
  }

  template <class As>
  static void turn(const T* from, int64_t stride, int64_t left, int64_t length, float* to) {
    if (left >= W)
      pack_rows<As, true>(from, stride, W, length, to);
    else
      pack_rows<As, false>(from, stride, left > 0 ? int(left) : 0, length, to);
  }
};

template <class Kind, class T>
void run(const LoraAddArgs& a) {
  constexpr int each = Panels<Kind, T>::each;
  const int64_t tiles = (a.T + kRows - 1) / kRows;
  const Panels<Kind, T> panels(a);
  const int64_t pitch = panels.vectors * W;
  const int64_t grain = 1 + (1 << 19) / (kRows * (a.K + a.N) * (a.rank + 8));
  parallel_for(0, a.B * tiles, grain, [&](int64_t begin, int64_t end) {
    Scratch<float> x(size_t(kRows) * kStride), c(size_t(kRows * pitch));
    std::memset(x.data, 0, size_t(kRows) * kStride * sizeof(float));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles, i = task % tiles, row = a.T * i / tiles;
      const int count = int(a.T * (i + 1) / tiles - row);
      const T* y = static_cast<const T*>(a.y) + b * a.y_b + row * a.y_t;
      T* out = static_cast<T*>(a.out) + (b * a.T + row) * a.N;
      T* low = a.low ? static_cast<T*>(a.low) + (b * a.T + row) * a.rank : nullptr;
      const int64_t of = panels.of(b);
      const bool neutral = panels.neutral(of) || a.rank == 0;
      if (neutral)
        for (int j = 0; j < count; ++j)
          std::memcpy(static_cast<void*>(out + j * a.N), y + j * a.y_t, size_t(a.N) * sizeof(T));
      if (low && of < 0)
        std::memset(static_cast<void*>(low), 0, size_t(count * a.rank) * sizeof(T));
      if ((neutral && !low) || of < 0 || a.rank == 0) continue;

      const int64_t at = panels.slot.data[of];
      for (int64_t k = 0; k == 0 || k < panels.deep; k += kDeep) {
        const int64_t part = panels.deep - k < kDeep ? panels.deep - k : kDeep;
        const int64_t rest = a.K - k * each, elements = rest < part * each ? rest : part * each;
        const T* from = static_cast<const T*>(a.x) + b * a.x_b + row * a.x_t + k * each;
        for (int j = 0; j < count; ++j)
          copy_row<Kind>(from + j * a.x_t, elements, x.data + j * kStride);
        for (int64_t v = 0; v < panels.vectors; v += 2) {
          const float* panel = panels.down(at) + (v / 2 * panels.deep + k) * kWide;
          float* to = c.data + v * W;
          for (int64_t first = 0; first == 0 || first < part; first += kBlock) {
            const int64_t some = part - first < kBlock ? part - first : kBlock;
            const float* block = panel + first * kWide;
            const bool add = k + first > 0;
            for_rows(count, [&](auto rows) {
              if (v + 1 < panels.vectors)
                project<Kind, rows(), 2>(x.data + first, block, some, to, pitch, add);
              else
                project<Kind, rows(), 1>(x.data + first, block, some, to, pitch, add);
            });
          }
        }
      }
      if (low)
        for (int j = 0; j < count; ++j)
          fastdiff::FASTDIFF_LEVEL::each(a.rank, [&](int64_t r, auto part) {
            part.store(Vec::load(c.data + j * pitch + r), low + j * a.rank + r);
          });
      if (neutral) continue;
      const Vec scale(a.scale[of]);
      for (int j = 0; j < count; ++j)
        for (int64_t v = 0; v < panels.vectors; ++v) {
          float* p = c.data + j * pitch + v * W;
          (Vec::load(p) * scale).store(p);
        }
      for (int64_t n = 0; n < a.N; n += kWide) {
        const float* panel = panels.up(at) + n * a.rank;
        const int columns = int(a.N - n < kWide ? a.N - n : kWide);
        for_rows(count, [&](auto rows) {
          expand<rows(), T>(count, c.data, pitch, a.rank, panel, y + n, a.y_t, out + n, a.N,
                            columns);
        });
      }
    }
  });
}

}  // namespace

void lora_add(const LoraAddArgs& a) {
  if (a.dtype == Dtype::kBf16 && kPairs) return run<Pairs, bf16>(a);
  FASTDIFF_DTYPE_SWITCH(a.dtype, run<Floats, T>(a));
}

FASTDIFF_KERNEL_END
