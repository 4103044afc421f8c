// Instruction-set levels of the native CPU kernels, and the parallel loop they share.
// No torch header: included by kernel files, which are compiled once per level.
#pragma once
#include <cstdint>
#include <type_traits>

namespace fastdiff {

// From the slowest to the fastest. kNone: not even AVX2, native rows refuse. A processor may have
// one and lack one before it: client processors have AVX-VNNI and no AVX-512, older servers
// AVX512-VNNI and no AVX-VNNI.
enum class Level : int {
  kNone = 0,
  kAvx2 = 1,
  kAvx2Vnni = 2,
  kAvx512 = 3,
  kAvx512Vnni = 4,
  kAvx512Bf16 = 5
};

bool has_level(Level level);  // this processor
const char* level_name(Level level);
Level detected_level();       // the fastest that it has
Level current_level();        // detected, lowered by FASTDIFF_CPU or set_level()
void set_level(Level level);  // tests run every level

// Element types of the tensors that kernels read and write.
enum class Dtype : int { kF32 = 0, kBf16 = 1, kF16 = 2 };

// Calls body(begin, end) on torch's thread pool (at::parallel_for); `grain` is the least range
// worth a thread.
using RangeFn = void (*)(void* ctx, int64_t begin, int64_t end);
void parallel_range(int64_t begin, int64_t end, int64_t grain, RangeFn fn, void* ctx);

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& body) {
  using Body = std::remove_reference_t<F>;
  parallel_range(
      begin, end, grain, [](void* ctx, int64_t b, int64_t e) { (*static_cast<Body*>(ctx))(b, e); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fastdiff

// Declares `void name(const Args&)` for every level; kernels define it inside FASTDIFF_KERNEL_BEGIN
// / END.
#define FASTDIFF_DECLARE_KERNEL(name, Args) \
  namespace fastdiff {                      \
  namespace avx2 {                          \
  void name(const Args&);                   \
  }                                         \
  namespace avx2_vnni {                     \
  void name(const Args&);                   \
  }                                         \
  namespace avx512 {                        \
  void name(const Args&);                   \
  }                                         \
  namespace avx512_vnni {                   \
  void name(const Args&);                   \
  }                                         \
  namespace avx512_bf16 {                   \
  void name(const Args&);                   \
  }                                         \
  }

// Host side: runs the variant of the current level.
#define FASTDIFF_CALL_KERNEL(name, args) FASTDIFF_CALL_LEVEL(name, args, avx2, avx512)
// Of one whose products of int8 are VNNI's (setup.py: INT8).
#define FASTDIFF_CALL_INT8_KERNEL(name, args) \
  FASTDIFF_CALL_LEVEL(name, args, avx2_vnni, avx512_vnni)
#define FASTDIFF_CALL_LEVEL(name, args, avx2_with_vnni, avx512_with_vnni)                          \
  do {                                                                                             \
    switch (::fastdiff::current_level()) {                                                         \
      case ::fastdiff::Level::kAvx512Bf16: ::fastdiff::avx512_bf16::name(args); break;             \
      case ::fastdiff::Level::kAvx512Vnni: ::fastdiff::avx512_with_vnni::name(args); break;        \
      case ::fastdiff::Level::kAvx512: ::fastdiff::avx512::name(args); break;                      \
      case ::fastdiff::Level::kAvx2Vnni: ::fastdiff::avx2_with_vnni::name(args); break;            \
      case ::fastdiff::Level::kAvx2: ::fastdiff::avx2::name(args); break;                          \
      case ::fastdiff::Level::kNone:                                                               \
        TORCH_CHECK(false,                                                                         \
                    #name ": native kernels need AVX2, FMA and F16C, which this processor lacks"); \
    }                                                                                              \
  } while (0)
