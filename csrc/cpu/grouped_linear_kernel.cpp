// Products of ragged groups. A task is a few panels (kWide output columns) of one expert, all its
// rows: the panels' weights are turned once into [k][kWide], which the second cache level holds;
// rows are taken in tiles of up to kRows, copied together (that is where `index` gathers) so that
// an element's address is a constant away from the tile's. 28 of 32 registers are sums (AVX2: 12 of
// 16): an element of x is read for two vectors of columns, a vector of weights for kRows rows.
// Where an expert has few rows, turning its weights would cost more than it gains: rows of x and of
// the weight are multiplied as they lie, and the lanes of each product added up at the end.
// Every sum is taken by one thread, in the order of k or of lanes: results depend on how many rows
// an expert has (few or many), and neither on threads nor on which rows these are. With
// AVX512-BF16, bfloat16 pairs along k are multiplied as they are.
#include <cstring>
#include <vector>

#include "grouped_linear.h"
#include "grouped_linear_tiles.h"

FASTDIFF_KERNEL_BEGIN

namespace {

// ---- tasks ----

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

  // body(first, last): the tasks of a thread.
  template <class F>
  void run(int64_t grain, F body) const {
    parallel_for(0, cost, grain, [&](int64_t begin, int64_t end) {
      const Task *task = list.data(), *last = task + list.size();
      while (task < last && task->start < begin) ++task;
      const Task* stop = task;
      while (stop < last && stop->start < end) ++stop;
      if (task < stop) body(task, stop);
    });
  }
};

int64_t most_panels(int64_t deep) {
  const int64_t fit = kPanelBytes / (deep * kWide * 4 + 1);
  return fit < 1 ? 1 : fit > kMostPanels ? kMostPanels : fit;
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

// One task's rows, where they are few.
template <class Kind, int kActivation, class T>
void few_rows(const GroupedLinearArgs& a, const Task& task, float* c, float* wide, T* tail) {
  constexpr bool gated = kActivation >= kGroupedGeglu;
  constexpr bool direct = std::is_same_v<T, float> || std::is_same_v<Kind, Pairs>;
  using X = std::conditional_t<direct, T, float>;
  const int64_t first = a.offsets[task.expert], rows = a.offsets[task.expert + 1] - first;
  const X* x[kMostFew];
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t from = a.index ? a.index[first + i] : first + i;
    const T* row = static_cast<const T*>(a.x) + from * a.x_stride;
    if constexpr (direct) {
      x[i] = row;
    } else {
      copy_row<Kind>(row, a.K, wide + i * a.K);
      x[i] = wide + i * a.K;
    }
  }
  const T* weight = static_cast<const T*>(a.weight) + task.expert * a.weight_e;
  for (int64_t p = 0; p < task.panels; ++p) {
    const Columns at(task.panel + p, a.N, gated);
    panel_dots<Kind>(int(rows), x, weight, a.weight_n, a.K, at.n, at.count, c, tail);
    finish<kActivation, T>(a, task.expert, first, int(rows), at, c);
  }
}

template <class Kind, int kActivation, class T>
void many_rows(const GroupedLinearArgs& a, const Task& task, float* b, float* x, float* c) {
  constexpr int each = std::is_same_v<Kind, Pairs> ? 2 : 1;
  constexpr bool gated = kActivation >= kGroupedGeglu;
  const int64_t deep = (a.K + each - 1) / each;  // lanes
  const T* weight = static_cast<const T*>(a.weight) + task.expert * a.weight_e;
  for (int64_t p = 0; p < task.panels; ++p) {
    const Columns at(task.panel + p, a.N, gated);
    for (int v = 0; v < 2; ++v) {
      float* to = b + p * deep * kWide + v * W;
      const T* from = weight + at.n[v] * a.weight_n;
      if (a.weight_k != 1)
        pack_columns<Kind>(from, a.weight_k, at.count[v], a.K, to);
      else if (at.count[v] == W)
        pack_rows<Kind, true>(from, a.weight_n, W, a.K, to);
      else
        pack_rows<Kind, false>(from, a.weight_n, at.count[v], a.K, to);
    }
  }
  const int64_t first = a.offsets[task.expert], rows = a.offsets[task.expert + 1] - first;
  const int64_t tiles = (rows + kRows - 1) / kRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = first + rows * i / tiles;
    const int count = int(first + rows * (i + 1) / tiles - row);
    for (int64_t k = 0; k == 0 || k < deep; k += kDeep) {
      const int64_t part = deep - k < kDeep ? deep - k : kDeep;
      const int64_t elements = a.K - k * each < part * each ? a.K - k * each : part * each;
      for (int j = 0; j < count; ++j) {
        const int64_t from = a.index ? a.index[row + j] : row + j;
        copy_row<Kind>(static_cast<const T*>(a.x) + from * a.x_stride + k * each, elements,
                       x + j * kStride);
      }
      for (int64_t p = 0; p < task.panels; ++p)
        product_of<Kind, kStride, 1>(count, x, b + (p * deep + k) * kWide, part,
                                     c + p * kRows * kWide, k > 0);
    }
    for (int64_t p = 0; p < task.panels; ++p)
      finish<kActivation, T>(a, task.expert, row, count, Columns(task.panel + p, a.N, gated),
                             c + p * kRows * kWide);
  }
}

template <class Kind, int kActivation, class T>
void forward(const GroupedLinearArgs& a) {
  constexpr int each = std::is_same_v<Kind, Pairs> ? 2 : 1;
  constexpr bool gated = kActivation >= kGroupedGeglu;
  constexpr bool direct = std::is_same_v<T, float> || std::is_same_v<Kind, Pairs>;
  const int64_t deep = (a.K + each - 1) / each;
  const int64_t panels = gated ? (a.N / 2 + W - 1) / W : (a.N + kWide - 1) / kWide;
  // Turning a quad's weights takes about 2 K cycles, adding up its lanes 10 a row.
  const int64_t few = a.weight_k != 1 ? 0 : a.K / 6 < kMostFew ? a.K / 6 : kMostFew;
  const Tasks tasks(a.offsets, a.E, panels, most_panels(deep));
  bool any_few = false, any_many = false;
  for (int64_t e = 0; e < a.E; ++e)
    (a.offsets[e + 1] - a.offsets[e] > few ? any_many : any_few) = true;
  tasks.run(1 + 65536 / (deep + 1), [&](const Task* task, const Task* stop) {
    const int64_t c_rows = any_many ? tasks.most * kRows : 0;
    Scratch<float> c(size_t(c_rows > kMostFew ? c_rows : kMostFew) * kWide);
    Scratch<float> b(any_many ? size_t(tasks.most * deep * kWide) + 1 : 1);
    Scratch<float> x(any_many ? size_t(kRows) * kStride : 1);
    Scratch<float> wide(any_few && !direct ? size_t(kMostFew * a.K) + 1 : 1);
    Scratch<T> tail(any_few ? size_t(kQuad * a.K) + 1 : 1);
    for (; task < stop; ++task) {
      if (a.offsets[task->expert + 1] - a.offsets[task->expert] > few)
        many_rows<Kind, kActivation, T>(a, *task, b.data, x.data, c.data);
      else
        few_rows<Kind, kActivation, T>(a, *task, c.data, wide.data, tail.data);
    }
  });
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
  const auto body = [&](const Task& task) {
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
  tasks.run(1 + 65536 / (a.N + 1), [&](const Task* task, const Task* stop) {
    for (; task < stop; ++task) body(*task);
  });
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
