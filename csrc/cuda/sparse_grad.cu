// Entries of grad^T x on tensor cores, summed in float32. bfloat16 and float16.
//
// A block owns a tile of the dense product, kColumns rows of the weight by as many columns. It
// first searches the columns of its rows for the entries in the tile, and leaves where there are
// none. Else it forms the tile from slices of kDeep tokens, and picks the entries of every row from
// its sums in shared memory: of the dense gradient nothing is written. Both factors are read once
// for every tile beside one another.
//
// Of a convolution a token is an output pixel, and a row of x what its window shows: the copies
// into shared memory are the im2col, a pixel for every lane.
#include "cpu/sparse_grad.h"
#include "gpu.h"
#include "tiles.h"

namespace fastdiff {
namespace {

constexpr int kFinders = kColumns / 32;  // warps that search

// Entries of the tile's rows (blocks of them): first and past the last; which warps found some.
struct Found {
  int low[kColumns], high[kColumns], any[kFinders];
};

// The first of entries `low` to `high` with a column of at least `column`.
__device__ __forceinline__ int first_of(const int32_t* col, int low, int high, int column) {
  while (low < high) {
    const int middle = low + (high - low) / 2;
    const bool below = col[middle] < column;
    low = below ? middle + 1 : low, high = below ? high : middle;
  }
  return low;
}

// Whether the tile from `row` and `column` on has entries. Rows that begin outside of the entries,
// or descend, have none there.
template <class Args>
__device__ bool find(const Args& a, int row, int column, int block_rows, int block_cols,
                     Found* found) {
  const int i = int(threadIdx.x), o = row + i, nnz = int(a.nnz);
  if (i < kColumns) {
    int low = 0, high = 0;
    if (o < a.O) {
      int begin = a.crow[o / block_rows], end = a.crow[o / block_rows + 1];
      begin = begin < 0 ? 0 : begin > nnz ? nnz : begin;
      end = end > nnz ? nnz : end;
      low = first_of(a.col, begin, end, column / block_cols);
      high = first_of(a.col, low, end, (column + kColumns - 1) / block_cols + 1);
    }
    found->low[i] = low, found->high[i] = high;
    const bool any = __any_sync(gpu::kAll, low < high);
    if (i % 32 == 0) found->any[i / 32] = any;
  }
  __syncthreads();
  bool any = false;
#pragma unroll
  for (int w = 0; w < kFinders; ++w) any = any || found->any[w];
  return any;
}

// The entries found, from the tile's sums. Two lanes have a row.
template <class Own>
__device__ __forceinline__ void pick(const float (&sum)[2][Own::blocks][4], void* shared,
                                     const Found& found, const int32_t* col, float* out, int row,
                                     int column, int block_rows, int block_cols) {
  pieces<Own>(sum, shared, [&](int first, int from, const float* own) {
    const int i = int(threadIdx.x) % 16, high = found.high[first + i];
    const int64_t within = (row + first + i) % block_rows;
    own += i * Own::pitch;
    for (int e = found.low[first + i] + int(threadIdx.x) % 32 / 16; e < high; e += 2) {
      const int64_t at = int64_t(col[e]) * block_cols - (column + from);
      float* to = out + (int64_t(e) * block_rows + within) * block_cols;
      for (int j = 0; j < block_cols; ++j)
        if (at + j >= 0 && at + j < Own::columns) to[j] = own[at + j];
    }
  });
}

// A column of the weight: how far from a token's window its element of x lies, and where in it.
struct Tap {
  int64_t offset;
  int down, right;
};

constexpr int kOutside = 1 << 30;  // further down than any picture

}  // namespace

// Grid: tiles of rows by tiles of columns, the latter side by side. Shared: the slices of both
// factors, each token with its columns side by side, then Found.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    sparse_weight_grad_tiles(SparseWeightGradArgs a, int across, bool grad_aligned,
                             bool x_aligned) {
  using Factor = Slice<true, kColumns>;
  using Own = Tile<Factor, Factor, kColumns>;
  GPU_SHARED(T, shared);
  Found* found = reinterpret_cast<Found*>(shared + kStages * Own::stage);
  const int tokens = int(a.T), O = int(a.O), I = int(a.I);
  const int row = int(blockIdx.x) / across * kColumns, column = int(blockIdx.x) % across * kColumns;
  if (!find(a, row, column, a.block_rows, a.block_cols, found)) return;

  const T *grad = static_cast<const T*>(a.grad), *x = static_cast<const T*>(a.x);
  const int own = int(threadIdx.x) % 16 * 8;
  float sum[2][Own::blocks][4] = {};
  const auto copy = [&](int step, T* to_grad, T* to_x) {
    copy_turned<kColumns>(to_grad, step * kDeep, row + own, O, grad_aligned, [&](int t) {
      return t < tokens ? grad + int64_t(t) * a.grad_stride : nullptr;
    });
    copy_turned<kColumns>(to_x, step * kDeep, column + own, I, x_aligned, [&](int t) {
      return t < tokens ? x + int64_t(t) * a.x_stride : nullptr;
    });
  };
  multiply<T, true, true, kColumns>(shared, (tokens + kDeep - 1) / kDeep, copy, sum);
  pick<Own>(sum, shared, *found, a.col, a.out, row, column, a.block_rows, a.block_cols);
}

// The same of a convolution; slices have the tokens of a column side by side. Shared: also Tap[].
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    sparse_conv2d_weight_grad_tiles(SparseConvWeightGradArgs a, int across) {
  using Factor = Slice<false, kColumns>;
  using Own = Tile<Factor, Factor, kColumns>;
  GPU_SHARED(T, shared);
  Tap* taps = reinterpret_cast<Tap*>(shared + kStages * Own::stage);
  Found* found = reinterpret_cast<Found*>(taps + kColumns);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int O = int(a.O), H = int(a.H), W = int(a.W), Ho = int(a.Ho), Wo = int(a.Wo);
  const int kh = int(a.kernel[0]), kw = int(a.kernel[1]), columns = int(a.C) * kh * kw;
  const int row = int(blockIdx.x) / across * kColumns, column = int(blockIdx.x) % across * kColumns;
  const int64_t x_w = a.x_last ? a.C : 1, x_h = W * x_w, x_c = a.x_last ? 1 : int64_t(H) * W;
  if (int(threadIdx.x) < kColumns) {
    const int n = column + int(threadIdx.x);
    const int64_t down = n / kw % kh * a.dilation[0], right = n % kw * a.dilation[1];
    Tap tap{n / (kh * kw) * x_c + down * x_h + right * x_w, int(down), int(right)};
    if (n >= columns) tap.down = kOutside;
    taps[threadIdx.x] = tap;
  }
  // The barrier in there is the taps', too.
  if (!find(a, row, column, 1, 1, found)) return;

  const T *grad = static_cast<const T*>(a.grad), *x = static_cast<const T*>(a.x);
  const int tokens = int(a.B) * Ho * Wo;
  const int64_t pixels = int64_t(Ho) * Wo;
  const T none = gpu::from_float<T>(0.0f);
  float sum[2][Own::blocks][4] = {};
  const auto copy = [&](int step, T* to_grad, T* to_x) {
    const int t = step * kDeep + lane;
    const bool live = t < tokens;
    const int pixel = t % int(pixels), h = pixel / Wo, w = pixel % Wo;
    const int64_t b = t / int(pixels);
    const T* g = grad + b * O * pixels + (a.grad_last ? int64_t(pixel) * O : pixel);
    const int64_t g_o = a.grad_last ? 1 : pixels;
    const int top = int(h * a.stride[0] - a.padding[0]), left = int(w * a.stride[1] - a.padding[1]);
    const T* from = x + b * a.C * H * W;
    const int64_t corner = top * x_h + left * x_w;
#pragma unroll 4
    for (int n = warp; n < kColumns; n += kWarps) {
      T value = none;
      if (live && row + n < O) value = g[(row + n) * g_o];
      to_grad[n * Factor::pitch + lane] = value;
      const Tap tap = taps[n];
      const int y = top + tap.down, z = left + tap.right;
      value = none;
      if (live && y >= 0 && y < H && z >= 0 && z < W) value = from[corner + tap.offset];
      to_x[n * Factor::pitch + lane] = value;
    }
  };
  multiply<T, false, false, kColumns>(shared, (tokens + kDeep - 1) / kDeep, copy, sum);
  pick<Own>(sum, shared, *found, a.col, a.out, row, column, 1, 1);
}

#ifndef __CUDACC_RTC__
namespace {

template <class T>
int launch(const SparseWeightGradArgs& a, cudaStream_t stream) {
  using Factor = Slice<true, kColumns>;
  using Own = Tile<Factor, Factor, kColumns>;
  if (a.T > kMost || a.O > kMost || a.I > kMost || a.nnz > kMost) return kInvalidConfiguration;
  const int64_t down = (a.O + kColumns - 1) / kColumns, across = (a.I + kColumns - 1) / kColumns;
  if (down > kMost / across) return kInvalidConfiguration;
  return GPU_LAUNCH((sparse_weight_grad_tiles<T>), dim3(unsigned(down * across)), dim3(kThreads),
                    Own::shared + sizeof(Found), stream, a, int(across),
                    rows_aligned(a.grad, a.T, a.grad_stride, a.O),
                    rows_aligned(a.x, a.T, a.x_stride, a.I));
}

template <class T>
int launch(const SparseConvWeightGradArgs& a, cudaStream_t stream) {
  using Factor = Slice<false, kColumns>;
  using Own = Tile<Factor, Factor, kColumns>;
  const int64_t taps = a.kernel[0] * a.kernel[1];
  const int64_t low = a.padding[0] > a.padding[1] ? a.padding[0] : a.padding[1];
  if (taps > kMost || a.C > kMost / taps || a.O > kMost || a.nnz > kMost || a.B > kMost ||
      a.H > kOutside / 2 || a.W > kOutside / 2 || low > kOutside / 2 || a.Ho * a.Wo > kMost / a.B)
    return kInvalidConfiguration;
  const int64_t down = (a.O + kColumns - 1) / kColumns;
  const int64_t across = (a.C * taps + kColumns - 1) / kColumns;
  if (down > kMost / across) return kInvalidConfiguration;
  return GPU_LAUNCH((sparse_conv2d_weight_grad_tiles<T>), dim3(unsigned(down * across)),
                    dim3(kThreads), Own::shared + kColumns * sizeof(Tap) + sizeof(Found), stream, a,
                    int(across));
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

extern "C" int fastdiff_gpu_sparse_weight_grad(const SparseWeightGradArgs* a, void* stream) {
  return launch_any(*a, stream);
}

extern "C" int fastdiff_gpu_sparse_conv2d_weight_grad(const SparseConvWeightGradArgs* a,
                                                      void* stream) {
  return launch_any(*a, stream);
}
#else
#define FASTDIFF_INSTANTIATE(T)                                                                \
  template __global__ void sparse_weight_grad_tiles<T>(SparseWeightGradArgs, int, bool, bool); \
  template __global__ void sparse_conv2d_weight_grad_tiles<T>(SparseConvWeightGradArgs, int);
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
