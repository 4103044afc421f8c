#include "cpu/level.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <cpuid.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <string>

namespace fastdiff {

namespace {

bool avx_vnni() {  // which GCC's and clang's __builtin_cpu_supports know under two names, or not
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

struct Known {
  const char* name;
  bool here;
};

// By the number of the level.
const Known* levels() {
  static const auto found = [] {
    __builtin_cpu_init();
#ifdef FASTDIFF_EMULATE  // csrc/emulate, which needs no more than AVX2
    constexpr bool emulated = true;
#else
    constexpr bool emulated = false;
#endif
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    return std::array<Known, 6>{{{"none", true},
                                 {"avx2", avx2},
                                 {"avx2_vnni", avx2 && (emulated || avx_vnni())},
                                 {"avx512", avx2 && (emulated || avx512)},
                                 {"avx512_vnni", avx2 && (emulated || vnni)},
                                 {"avx512_bf16", avx2 && (emulated || bf16)}}};
  }();
  return found.data();
}

Level at_most(int level) {
  while (!levels()[level].here) --level;
  return Level(level);
}

}  // namespace

bool has_level(Level level) { return levels()[int(level)].here; }

const char* level_name(Level level) { return levels()[int(level)].name; }

Level detected_level() { return at_most(int(Level::kAvx512Bf16)); }

static Level start_level() {
  const char* want = std::getenv("FASTDIFF_CPU");
  if (!want || !*want) return detected_level();
  for (int i = 1; i <= int(Level::kAvx512Bf16); ++i)
    if (std::string(want) == levels()[i].name) return at_most(i);
  TORCH_CHECK(false, "FASTDIFF_CPU=", want,
              ": need avx2, avx2_vnni, avx512, avx512_vnni or avx512_bf16");
}

static std::atomic<int>& level_slot() {
  static std::atomic<int> slot{int(start_level())};
  return slot;
}

Level current_level() { return Level(level_slot().load(std::memory_order_relaxed)); }

void set_level(Level level) {
  TORCH_CHECK(has_level(level), "set_cpu_level: this processor lacks the level asked for");
  level_slot().store(int(level), std::memory_order_relaxed);
}

void parallel_range(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx) {
  at::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { fn(ctx, b, e); });
}

}  // namespace fastdiff
