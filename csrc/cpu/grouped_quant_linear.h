#pragma once
#include "quant_linear.h"

namespace fastdiff {
// As fastdiff/ops/grouped_quant_linear.py defines them; all contiguous.
struct GroupedQuantLinearArgs {
  QuantLinearArgs all;     // q [T, K], s [T]; values, scale and bias of E experts; y of R rows
  const int64_t* offsets;  // [E + 1]
  const int64_t* index;    // that of all
  int64_t R, T, E;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(grouped_quant_linear, GroupedQuantLinearArgs)
