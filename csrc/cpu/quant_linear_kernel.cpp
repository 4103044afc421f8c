// A linear layer: panels of the weight, and where those give too few tasks rows, are divided among
// threads.
#include "quant_linear_tiles.h"

FASTDIFF_KERNEL_BEGIN

namespace {

void run(const QuantLinearArgs& a, Finish finish) {
  Panels panels(a);
  if (a.M <= kFewRows) {
    const Rows rows(a);
    return parallel_for(
        0, panels.all, 1 + 65536 / (a.K * kWide + 1),
        [&](int64_t from, int64_t to) { few_rows(panels, rows, from, to, finish); });
  }
  while (panels.most > 2 && up(panels.all, panels.most) < 32) --panels.most;
  // Rows are divided where columns alone give too few tasks.
  const int64_t across = up(panels.all, panels.most), wanted = across < 32 ? 32 / across : 1;
  const int64_t fit = a.M / kTaskRows, down = wanted < fit ? wanted : fit > 0 ? fit : 1;
  const int64_t cost = up(a.M, down) * panels.most * kWide * (a.K + 16);
  parallel_for(0, across * down, 1 + (1 << 20) / cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / down, part = i % down;
      many_rows(panels, panels.all * column / across, panels.all * (column + 1) / across,
                a.M * part / down, a.M * (part + 1) / down, finish);
    }
  });
}

}  // namespace

void quant_linear(const QuantLinearArgs& a) {
  switch (a.activation) {
    case kGroupedGeluTanh:
      FASTDIFF_DTYPE_SWITCH(a.dtype, run(a, finish<kGroupedGeluTanh, T>));
      break;
    case kGroupedSilu: FASTDIFF_DTYPE_SWITCH(a.dtype, run(a, finish<kGroupedSilu, T>)); break;
    default: FASTDIFF_DTYPE_SWITCH(a.dtype, run(a, finish<kGroupedNone, T>));
  }
}

FASTDIFF_KERNEL_END
