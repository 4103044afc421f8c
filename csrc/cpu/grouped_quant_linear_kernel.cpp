// Linear layers of int8 of ragged groups: each expert's rows and weight as one of quant_linear, cut
// into tasks of panels and of rows by what they cost, so that threads have equal shares however
// rows are spread.
#include <vector>

#include "grouped_quant_linear.h"
#include "quant_linear_tiles.h"

FASTDIFF_KERNEL_BEGIN

namespace {

constexpr int64_t kTurning = 16;  // rows that turning, or reading, a panel is worth
constexpr int64_t kPieces = 32;   // of all work, about

QuantLinearArgs expert(const GroupedQuantLinearArgs& a, int64_t e) {
  QuantLinearArgs own = a.all;
  const int64_t first = a.offsets[e], bytes = a.all.dtype == Dtype::kF32 ? 4 : 2;
  own.M = a.offsets[e + 1] - first;
  own.values += e * own.N * own.K, own.scale += e * own.N * own.G;
  if (own.bias) own.bias = static_cast<const char*>(own.bias) + e * own.N * bytes;
  if (a.index)
    own.index = a.index + first;
  else
    own.q += first * own.K, own.s += first;
  const int64_t out = own.activation >= kGroupedGeglu ? own.N / 2 : own.N;
  own.y = static_cast<char*>(own.y) + first * out * bytes;
  return own;
}

struct Task {
  int64_t expert, from, to, begin, end, start;  // panels, rows; start: of its cost among all
};

struct Tasks {
  std::vector<Task> list;
  int64_t cost = 0;

  Tasks(const GroupedQuantLinearArgs& a, const Panels& panels) {
    int64_t total = 0;
    for (int64_t e = 0; e < a.E; ++e) total += cost_of(a.offsets[e + 1] - a.offsets[e], panels.all);
    for (int64_t e = 0; e < a.E; ++e) {
      const int64_t rows = a.offsets[e + 1] - a.offsets[e];
      if (!rows) continue;
      const int64_t wanted = up(kPieces * cost_of(rows, panels.all), total);
      const int64_t least = up(panels.all, panels.most), finest = up(panels.all, 2);
      const int64_t across = wanted < least ? least : wanted < finest ? wanted : finest;
      const int64_t parts = wanted / across, fit = rows / kTaskRows;
      const int64_t down = parts < fit ? (parts > 0 ? parts : 1) : fit > 0 ? fit : 1;
      for (int64_t i = 0; i < across * down; ++i) {
        const int64_t column = i / down, part = i % down;
        const Task task{e,
                        panels.all * column / across,
                        panels.all * (column + 1) / across,
                        rows * part / down,
                        rows * (part + 1) / down,
                        cost};
        list.push_back(task);
        cost += cost_of(task.end - task.begin, task.to - task.from);
      }
    }
  }
  static int64_t cost_of(int64_t rows, int64_t panels) {
    return rows ? panels * (rows + kTurning) : 0;
  }
};

void run(const GroupedQuantLinearArgs& a, Finish finish) {
  const Tasks tasks(a, Panels(a.all));
  const int64_t grain = 1 + (1 << 20) / (kWide * (a.all.K + 16));
  parallel_for(0, tasks.cost, grain, [&](int64_t begin, int64_t end) {
    for (const Task& task : tasks.list) {
      if (task.start < begin || task.start >= end) continue;
      const QuantLinearArgs own = expert(a, task.expert);
      const Panels panels(own);
      if (own.M <= kFewRows)
        few_rows(panels, Rows(own), task.from, task.to, finish);
      else
        many_rows(panels, task.from, task.to, task.begin, task.end, finish);
    }
  });
}

template <class T>
Finish finish_of(int activation) {
  switch (activation) {
    case kGroupedGelu: return finish<kGroupedGelu, T>;
    case kGroupedGeluTanh: return finish<kGroupedGeluTanh, T>;
    case kGroupedSilu: return finish<kGroupedSilu, T>;
    case kGroupedGeglu: return finish<kGroupedGeglu, T>;
    case kGroupedSwiglu: return finish<kGroupedSwiglu, T>;
    case kGroupedSwishglu: return finish<kGroupedSwishglu, T>;
    default: return finish<kGroupedNone, T>;
  }
}

}  // namespace

void grouped_quant_linear(const GroupedQuantLinearArgs& a) {
  FASTDIFF_DTYPE_SWITCH(a.all.dtype, run(a, finish_of<T>(a.all.activation)));
}

FASTDIFF_KERNEL_END
