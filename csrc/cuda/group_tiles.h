// Groups of rows among tiles, and the activations of experts. After gpu.h.
#pragma once
#include "cpu/grouped_linear.h"

namespace fastdiff {
namespace {

__device__ __forceinline__ int clamp(int64_t offset, int64_t rows) {
  return int(offset < 0 ? 0 : offset > rows ? rows : offset);
}

struct Group {
  int expert, begin, end;  // rows of the tile; end: of the group
};

// Tile `tile` of all groups, in every lane; no rows where there are fewer. Offsets that descend, or
// lie past R, give groups that follow one another within R all the same.
template <int rows, class Args>
__device__ Group find(const Args& a, int tile, int lane) {
  int last = 0, tiles = 0;  // of the groups so far
  for (int first = 0; first < a.E; first += 32) {
    const int e = first + lane;
    int end = e < a.E ? clamp(a.offsets[e + 1], a.R) : 0;
    end = end > last ? end : last;
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(gpu::kAll, end, by);
      if (lane >= by && other > end) end = other;
    }
    int begin = __shfl_up_sync(gpu::kAll, end, 1);
    if (lane == 0) begin = last;
    const int count = (end - begin + rows - 1) / rows;
    int upto = count;
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(gpu::kAll, upto, by);
      if (lane >= by) upto += other;
    }
    upto += tiles;
    const unsigned past = __ballot_sync(gpu::kAll, tile < upto);
    if (past) {
      const int owner = __ffs(int(past)) - 1;
      begin += (tile - (upto - count)) * rows;
      return {first + owner, __shfl_sync(gpu::kAll, begin, owner),
              __shfl_sync(gpu::kAll, end, owner)};
    }
    last = __shfl_sync(gpu::kAll, end, 31);
    tiles = __shfl_sync(gpu::kAll, upto, 31);
  }
  return {0, 0, 0};
}

using gpu::gelu;
using gpu::gelu_tanh;
using gpu::sigmoid;

// y of the sums u; `other`: those of the other half of a gated activation.
__device__ __forceinline__ float activated(int activation, float u, float other) {
  switch (activation) {
    case kGroupedGelu: return gelu(u);
    case kGroupedGeluTanh: return gelu_tanh(u);
    case kGroupedSilu: return u * sigmoid(u);
    case kGroupedGeglu: return u * gelu(other);
    case kGroupedSwiglu: return u * sigmoid(u) * other;
    case kGroupedSwishglu: return u * (other * sigmoid(other));
  }
  return u;
}

}  // namespace
}  // namespace fastdiff
