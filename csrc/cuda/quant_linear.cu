// A linear layer of int8 tokens and an int8 weight, or of float8_e4m3fn: y = act(s (sum over groups
// of scale times the products) + bias), products on tensor cores, sums in int32 or float32.
//
// A block owns a tile of y, as tiles.h has it; its elements are pairs of int8, so a slice is of
// 2 kDeep columns. With one scale a row of the weight the sums are scaled at the end; with groups,
// whose slices do not reach over a group's end, after the last slice of each, and added to float32
// totals: tiles of 64 rows then, as totals take as many registers as sums; so are those of
// float8_e4m3fn, after every slice. q is read once for every tile of columns, the weight once for
// every tile of rows, y written once, in 16 bytes a lane.
//
// float8_e4m3fn needs compute capability 8.9. ptxas (13.0) makes its products those instructions on
// 8.9 and 12.0; on 9.0 and 10.0, whose own ones are wgmma and tcgen05, float16 products of the same
// numbers, which are exact.
#include "cpu/quant_linear.h"
#include "gpu.h"
#include "quant_tiles.h"

namespace fastdiff {
// Grid: tiles of rows by tiles of columns, those of a tile of rows side by side. Shared:
// Tile::shared bytes.
template <class T, class Pair, int rows, bool groups>
__global__ void __launch_bounds__(kThreads, 2)
    quant_linear_tiles(QuantLinearArgs a, int across, bool k_aligned, bool y_aligned) {
  GPU_SHARED(Pair, shared);
  const int first = int(blockIdx.x) / across * rows, left = int(blockIdx.x) % across * kColumns;
  quant_tile<T, Pair, rows, groups, false>(a, shared, first, int(a.M), a.M, 0, left, k_aligned,
                                           y_aligned);
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int64_t kFewBlocks = 132;  // about as many as there are multiprocessors

template <class T, class Pair, int rows, bool groups>
int launch(const QuantLinearArgs& a, cudaStream_t stream) {
  using Own = Tile<Slice<false, rows>, Slice<false, kColumns>, rows>;
  const int64_t across = (a.N + kColumns - 1) / kColumns, down = (a.M + rows - 1) / rows;
  if (down > kMost / across) return kInvalidConfiguration;
  const bool k_aligned =
      at16(a.q) && at16(a.values) && a.K % 16 == 0 && (a.G <= 1 || a.K / a.G % 16 == 0);
  return GPU_LAUNCH((quant_linear_tiles<T, Pair, rows, groups>), dim3(unsigned(down * across)),
                    dim3(kThreads), Own::shared, stream, a, int(across), k_aligned,
                    rows_aligned(a.y, a.M, a.N, a.N));
}

// Tiles of 64 rows where larger ones leave multiprocessors idle. Not measured on a GPU.
template <class T>
int launch(const QuantLinearArgs& a, cudaStream_t stream) {
  if (a.M > kMost || a.N > kMost || a.K > kMost || a.G > kMost / (a.N ? a.N : 1))
    return kInvalidConfiguration;
  if (a.float8) {
    using Pair = gpu::e4m3x2;
    if (int error = GPU_NEEDS((quant_linear_tiles<T, Pair, 64, true>), 89)) return error;
    return launch<T, Pair, 64, true>(a, stream);
  }
  using Pair = gpu::s8x2;
  if (a.G > 1) return launch<T, Pair, 64, true>(a, stream);
  const int64_t tiles = (a.M / 128 + 1) * (a.N / kColumns + 1);
  return tiles < kFewBlocks ? launch<T, Pair, 64, false>(a, stream)
                            : launch<T, Pair, 128, false>(a, stream);
}

}  // namespace

extern "C" int fastdiff_gpu_quant_linear(const QuantLinearArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_TILES(T, Pair, rows, groups)                                                    \
  template __global__ void quant_linear_tiles<T, Pair, rows, groups>(QuantLinearArgs, int, bool, \
                                                                     bool);
#define FASTDIFF_INSTANTIATE(T)            \
  FASTDIFF_TILES(T, gpu::s8x2, 64, true)   \
  FASTDIFF_TILES(T, gpu::s8x2, 64, false)  \
  FASTDIFF_TILES(T, gpu::s8x2, 128, false) \
  FASTDIFF_TILES(T, gpu::e4m3x2, 64, true)
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
