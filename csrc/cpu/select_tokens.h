#pragma once
#include "cpu/level.h"

namespace fastdiff {
// Which tokens are left out, as fastdiff/ops/select_tokens.py defines it. All contiguous.
struct SelectTokensArgs {
  const float* score;                     // [B, N]
  const int32_t* drops;                   // [B, N]
  const bool* forced;                     // [B, N], or null
  const float* factors;                   // [2, steps]: exp(k d), and that of the second order
  int64_t* index;                         // [B, count], ascending
  int32_t* new_drops;                     // [B, N]
  int64_t B, N, steps, count, low, most;  // most < 0: none
  bool reset;                             // drops of chosen tokens are 0, else they stay
};

constexpr uint32_t kForced = 0x7fffffff, kNan = 0x7ffffffe;  // protections
constexpr uint32_t kOut = 0x80000000;                        // left out already
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(select_tokens, SelectTokensArgs)
