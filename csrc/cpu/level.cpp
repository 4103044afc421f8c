#include "cpu/level.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace fastdiff {

Level detected_level() {
  static const Level level = [] {
    __builtin_cpu_init();

    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
          __builtin_cpu_supports("f16c")))
      return Level::kNone;
#ifdef FASTDIFF_EMULATE  // csrc/emulate, which needs no more
    return Level::kAvx512Bf16;
#endif
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
      return Level::kAvx2;
    if (!(__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16")))
      return Level::kAvx512;
    return Level::kAvx512Bf16;
  }();
  return level;
}

static Level start_level() {
  const char* want = std::getenv("FASTDIFF_CPU");
  if (!want || !*want) return detected_level();
  std::string name = want;
  Level level = name == "avx2"          ? Level::kAvx2
                : name == "avx512"      ? Level::kAvx512
                : name == "avx512_bf16" ? Level::kAvx512Bf16
                                        : Level::kNone;
  TORCH_CHECK(level != Level::kNone, "FASTDIFF_CPU=", name, ": need avx2, avx512 or avx512_bf16");
  return level < detected_level() ? level : detected_level();
}

static std::atomic<int>& level_slot() {
  static std::atomic<int> slot{int(start_level())};
  return slot;
}

Level current_level() { return Level(level_slot().load(std::memory_order_relaxed)); }

void set_level(Level level) {
  TORCH_CHECK(level <= detected_level(), "set_cpu_level: this processor lacks the level asked for");
  level_slot().store(int(level), std::memory_order_relaxed);
}

void parallel_range(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx) {
  at::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { fn(ctx, b, e); });
}

}  // namespace fastdiff
