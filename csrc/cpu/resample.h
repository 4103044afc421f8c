#pragma once
#include "level.h"

namespace fastdiff {
// Which particles survive, as fastdiff/ops/resample.py defines it. All contiguous.
struct ResampleArgs {
  const void* logw;  // [G, K], float or double
  const double* u;   // [G]
  int64_t* parents;  // [G, K]
  void* after;       // [G, K], of logw's type
  bool* did;         // [G]
  int64_t G, K;
  double least;  // effective sample size of a group that stays as it is
  bool wide;     // logw is double
};

constexpr int64_t kMaxGpuParticles = 1024;
constexpr double kBelowOne = 1 - 0x1p-53;
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(resample, ResampleArgs)
