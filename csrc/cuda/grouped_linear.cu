// Products of ragged groups of rows on tensor cores, summed in float32, with the gather of rows in
// front and bias and activation behind. bfloat16 and float16.
//
// A block owns a tile of one group: kColumns columns, 128 or 64 rows; of a gated activation half as
// many, with both their products side by side in turns of eight. Grids follow from what the host
// knows (rows, groups): a block finds its group in the offsets, and leaves where there is none.
// Both factors come in kDeep slices of k through shared memory, kStages of them, one worked on
// while the next two are on their way. A row of x is read once for every tile of columns, a row of
// weights once for every tile of rows. Sums are taken in the order of k: no result depends on what
// is beside a row.
#include "cpu/grouped_linear.h"
#include "gpu.h"
#include "group_tiles.h"
#include "tiles.h"

namespace fastdiff {
namespace {

// Where row r of the groups lies in x; null past `end`, and where its index is outside of x.
template <class T, class Args>
__device__ __forceinline__ const T* row_of(const Args& a, int r, int end) {
  if (r >= end) return nullptr;
  const int64_t at = a.index ? a.index[r] : r;
  return at >= 0 && at < a.T ? static_cast<const T*>(a.x) + at * a.x_stride : nullptr;
}

}  // namespace

// Grid: tiles of rows (an upper bound) by tiles of columns, those of a tile of rows side by side.
// turned: a weight's n, and not its k, lie side by side. Shared: Tile::shared bytes.
template <class T, int rows, bool turned>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_linear_tiles(GroupedLinearArgs a, int across, bool x_aligned, bool w_aligned,
                         bool y_aligned) {
  using Own = Tile<Slice<false, rows>, Slice<turned, kColumns>, rows>;
  GPU_SHARED(T, shared);
  const int thread = int(threadIdx.x);
  const Group group = find<rows>(a, int(blockIdx.x) / across, thread % 32);
  if (group.begin >= group.end) return;
  const bool gated = a.activation >= kGroupedGeglu;
  const int K = int(a.K), N = int(a.N), out = gated ? N / 2 : N;
  const int first = int(blockIdx.x) % across * (gated ? kColumns / 2 : kColumns);
  // Column i of the tile is weight row column(i), of the second half where half(i).
  const auto column = [&](int i) { return first + (gated ? i / 16 * 8 + i % 8 : i); };
  const auto half = [&](int i) { return gated && (i & 8) != 0; };

  const T* x[rows / 64];
#pragma unroll
  for (int j = 0; j < rows / 64; ++j)
    x[j] = row_of<T>(a, group.begin + thread / 4 + 64 * j, group.end);
  const T* weight = static_cast<const T*>(a.weight) + group.expert * a.weight_e;
  float sum[2][Own::blocks][4] = {};
  const int steps = (K + kDeep - 1) / kDeep;
  if constexpr (turned) {
    const int own = thread % 16 * 8, d = column(own);
    if (half(own)) weight += out;
    const auto copy = [&](int step, T* to_x, T* to_w) {
      copy_rows<rows>(to_x, x, step * kDeep, K, x_aligned);
      copy_turned<kColumns>(to_w, step * kDeep, d, out, w_aligned,
                            [&](int k) { return k < K ? weight + k * a.weight_k : nullptr; });
    };
    multiply<T, false, true, rows>(shared, steps, copy, sum);
  } else {
    const T* w[kColumns / 64];
#pragma unroll
    for (int j = 0; j < kColumns / 64; ++j) {
      const int i = thread / 4 + 64 * j;
      const int64_t n = column(i) + (half(i) ? out : 0);
      w[j] = column(i) < out ? weight + n * a.weight_n : nullptr;
    }
    const auto copy = [&](int step, T* to_x, T* to_w) {
      copy_rows<rows>(to_x, x, step * kDeep, K, x_aligned);
      copy_rows<kColumns>(to_w, w, step * kDeep, K, w_aligned);
    };
    multiply<T, false, false, rows>(shared, steps, copy, sum);
  }

  const T* bias = a.bias ? static_cast<const T*>(a.bias) + int64_t(group.expert) * N : nullptr;
  take<Own>(sum, shared, gated ? 16 : 8, [&](int row, int i, const float* u) {
    const int r = group.begin + row, n = column(i);
    if (r >= group.end) return;
    float y[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const bool inside = bias && n + j < out;
      const float b = inside ? gpu::to_float(bias[n + j]) : 0.0f;
      const float c = inside && gated ? gpu::to_float(bias[out + n + j]) : 0.0f;
      y[j] = activated(a.activation, u[j] + b, gated ? u[8 + j] + c : 0.0f);
    }
    store8(static_cast<T*>(a.y) + int64_t(r) * out, n, out, y_aligned, y);
  });
}

// The same for the sum over a group's rows: a block has kColumns rows n of one group's [N, K], and
// as many columns. Both factors come turned, their rows being what is summed over.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_weight_grad_tiles(GroupedWeightGradArgs a, int down, int across, bool grad_aligned,
                              bool x_aligned, bool out_aligned) {
  using Factor = Slice<true, kColumns>;
  using Own = Tile<Factor, Factor, kColumns>;
  GPU_SHARED(T, shared);
  const int thread = int(threadIdx.x), K = int(a.K), N = int(a.N);
  const int tile = int(blockIdx.x) % (down * across), expert = int(blockIdx.x) / (down * across);
  const int n = tile / across * kColumns, k = tile % across * kColumns;
  int begin = 0;
  for (int e = 1 + thread % 32; e <= expert; e += 32) {
    const int end = clamp(a.offsets[e], a.R);
    begin = end > begin ? end : begin;
  }
  for (int with = 16; with; with >>= 1) {
    const int other = __shfl_xor_sync(gpu::kAll, begin, with);
    begin = other > begin ? other : begin;
  }
  const int end = clamp(a.offsets[expert + 1], a.R);
  const int steps = end > begin ? (end - begin + kDeep - 1) / kDeep : 0;
  const T* grad = static_cast<const T*>(a.grad);
  const int own = thread % 16 * 8;
  float sum[2][Own::blocks][4] = {};
  const auto copy = [&](int step, T* to_grad, T* to_x) {
    const int first = begin + step * kDeep;
    copy_turned<kColumns>(to_grad, first, n + own, N, grad_aligned,
                          [&](int r) { return r < end ? grad + int64_t(r) * N : nullptr; });
    copy_turned<kColumns>(to_x, first, k + own, K, x_aligned,
                          [&](int r) { return row_of<T>(a, r, end); });
  };
  multiply<T, true, true, kColumns>(shared, steps, copy, sum);
  T* out = static_cast<T*>(a.out) + int64_t(expert) * N * K;
  take<Own>(sum, shared, 8, [&](int row, int column, const float* u) {
    if (n + row >= N) return;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = u[i];
    store8(out + int64_t(n + row) * K, k + column, K, out_aligned, v);
  });
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int64_t kFewBlocks = 132;  // about as many as there are multiprocessors

template <class T, int rows, bool turned>
int launch(const GroupedLinearArgs& a, cudaStream_t stream) {
  using Own = Tile<Slice<false, rows>, Slice<turned, kColumns>, rows>;
  const bool gated = a.activation >= kGroupedGeglu;
  const int64_t out = gated ? a.N / 2 : a.N, wide = gated ? kColumns / 2 : kColumns;
  const int64_t across = (out + wide - 1) / wide;
  const int64_t tiles = a.R / rows + (a.E < a.R ? a.E : a.R);  // every group may have a tail
  if (across > kMost || tiles > kMost / across) return kInvalidConfiguration;
  const bool x_aligned = rows_aligned(a.x, a.T, a.x_stride, a.K);
  const bool w_aligned = (turned ? rows_aligned(a.weight, a.K, a.weight_k, out)
                                 : rows_aligned(a.weight, a.N, a.weight_n, a.K)) &&
                         (a.E == 1 || a.weight_e % 8 == 0);
  return GPU_LAUNCH((grouped_linear_tiles<T, rows, turned>), dim3(unsigned(tiles * across)),
                    dim3(kThreads), Own::shared, stream, a, int(across), x_aligned, w_aligned,
                    rows_aligned(a.y, a.R, out, out));
}

// Tiles of 64 rows where groups are small, or where larger ones leave multiprocessors idle. Not
// measured on a GPU.
template <class T, bool turned>
int launch(const GroupedLinearArgs& a, cudaStream_t stream) {
  const int64_t tiles = (a.R / 128 + 1) * (a.N / kColumns + 1);
  if (a.R <= 96 * a.E || tiles < kFewBlocks) return launch<T, 64, turned>(a, stream);
  return launch<T, 128, turned>(a, stream);
}

template <class T>
int launch(const GroupedLinearArgs& a, cudaStream_t stream) {
  if (a.R > kMost || a.N > kMost || a.K > kMost || a.E > kMost) return kInvalidConfiguration;
  return a.weight_k == 1 ? launch<T, false>(a, stream) : launch<T, true>(a, stream);
}

template <class T>
int launch(const GroupedWeightGradArgs& a, cudaStream_t stream) {
  using Factor = Slice<true, kColumns>;
  using Own = Tile<Factor, Factor, kColumns>;
  if (a.R > kMost || a.N > kMost || a.K > kMost || a.E > kMost) return kInvalidConfiguration;
  const int64_t down = (a.N + kColumns - 1) / kColumns, across = (a.K + kColumns - 1) / kColumns;
  if (down > kMost / across || down * across > kMost / a.E) return kInvalidConfiguration;
  return GPU_LAUNCH((grouped_weight_grad_tiles<T>), dim3(unsigned(a.E * down * across)),
                    dim3(kThreads), Own::shared, stream, a, int(down), int(across),
                    rows_aligned(a.grad, a.R, a.N, a.N), rows_aligned(a.x, a.T, a.x_stride, a.K),
                    rows_aligned(a.out, a.N, a.K, a.K));
}

// Tensor cores have no float32.
template <class Args>
int launch_any(const Args& a, void* stream) {
  switch (a.dtype) {
    case Dtype::kBf16: return launch<gpu::bf16>(a, static_cast<cudaStream_t>(stream));
    case Dtype::kF16: return launch<gpu::f16>(a, static_cast<cudaStream_t>(stream));
    case Dtype::kF32: return kNotSupported;
  }
  return kNotSupported;
}

}  // namespace

extern "C" int fastdiff_gpu_grouped_linear(const GroupedLinearArgs* a, void* stream) {
  return launch_any(*a, stream);
}

extern "C" int fastdiff_gpu_grouped_weight_grad(const GroupedWeightGradArgs* a, void* stream) {
  return launch_any(*a, stream);
}
#else
#define FASTDIFF_INSTANTIATE(T)                                                                    \
  template __global__ void grouped_linear_tiles<T, 64, false>(GroupedLinearArgs, int, bool, bool,  \
                                                              bool);                               \
  template __global__ void grouped_linear_tiles<T, 64, true>(GroupedLinearArgs, int, bool, bool,   \
                                                             bool);                                \
  template __global__ void grouped_linear_tiles<T, 128, false>(GroupedLinearArgs, int, bool, bool, \
                                                               bool);                              \
  template __global__ void grouped_linear_tiles<T, 128, true>(GroupedLinearArgs, int, bool, bool,  \
                                                              bool);                               \
  template __global__ void grouped_weight_grad_tiles<T>(GroupedWeightGradArgs, int, int, bool,     \
                                                        bool, bool);
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
