// Linear layers of int8 of ragged groups of rows: tiles of one group, found in the offsets as in
// grouped_linear, products and their scales taken as in quant_linear, each token's row read through
// the index, the activation of experts behind.
#include "cpu/grouped_quant_linear.h"
#include "gpu.h"
#include "quant_tiles.h"

namespace fastdiff {

// Grid: tiles of rows (an upper bound) by tiles of columns, those of a tile of rows side by side.
// Shared: Tile::shared bytes.
template <class T, int rows, bool groups>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_quant_linear_tiles(GroupedQuantLinearArgs a, int across, bool k_aligned,
                               bool y_aligned) {
  using Pair = gpu::s8x2;
  GPU_SHARED(Pair, shared);
  const Group group = find<rows>(a, int(blockIdx.x) / across, int(threadIdx.x) % 32);
  if (group.begin >= group.end) return;
  const int wide = a.all.activation >= kGroupedGeglu ? kColumns / 2 : kColumns;
  quant_tile<T, Pair, rows, groups, true>(a.all, shared, group.begin, group.end, a.T,
                                          group.expert * int(a.all.N),
                                          int(blockIdx.x) % across * wide, k_aligned, y_aligned);
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int64_t kFewBlocks = 132;  // about as many as there are multiprocessors

template <class T, int rows, bool groups>
int launch(const GroupedQuantLinearArgs& a, cudaStream_t stream) {
  using Own = Tile<Slice<false, rows>, Slice<false, kColumns>, rows>;
  const QuantLinearArgs& all = a.all;
  const bool gated = all.activation >= kGroupedGeglu;
  const int64_t out = gated ? all.N / 2 : all.N, wide = gated ? kColumns / 2 : kColumns;
  const int64_t across = (out + wide - 1) / wide;
  const int64_t tiles = a.R / rows + (a.E < a.R ? a.E : a.R);  // every group may have a tail
  if (tiles > kMost / across) return kInvalidConfiguration;
  const bool k_aligned =
      at16(all.q) && at16(all.values) && all.K % 16 == 0 && (!groups || all.K / all.G % 16 == 0);
  return GPU_LAUNCH((grouped_quant_linear_tiles<T, rows, groups>), dim3(unsigned(tiles * across)),
                    dim3(kThreads), Own::shared, stream, a, int(across), k_aligned,
                    rows_aligned(all.y, a.R, out, out));
}

// Tiles of 64 rows where groups are small, or where larger ones leave multiprocessors idle. Not
// measured on a GPU.
template <class T>
int launch(const GroupedQuantLinearArgs& a, cudaStream_t stream) {
  const QuantLinearArgs& all = a.all;
  if (a.R > kMost || a.T > kMost || all.N > kMost || all.K > kMost || a.E > kMost / all.N ||
      all.G > kMost / (a.E * all.N))
    return kInvalidConfiguration;
  if (all.G > 1) return launch<T, 64, true>(a, stream);
  const int64_t tiles = (a.R / 128 + 1) * (all.N / kColumns + 1);
  return a.R <= 96 * a.E || tiles < kFewBlocks ? launch<T, 64, false>(a, stream)
                                               : launch<T, 128, false>(a, stream);
}

}  // namespace

extern "C" int fastdiff_gpu_grouped_quant_linear(const GroupedQuantLinearArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->all.dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE(T)                                                                   \
  template __global__ void grouped_quant_linear_tiles<T, 64, true>(GroupedQuantLinearArgs, int,   \
                                                                   bool, bool);                   \
  template __global__ void grouped_quant_linear_tiles<T, 64, false>(GroupedQuantLinearArgs, int,  \
                                                                    bool, bool);                  \
  template __global__ void grouped_quant_linear_tiles<T, 128, false>(GroupedQuantLinearArgs, int, \
                                                                     bool, bool);
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
