// A linear layer of int8 tokens and an int8 weight: y = act(s (sum over groups of scale times the
// integer products) + bias), products on tensor cores, sums in int32.
//
// A block owns a tile of y, as tiles.h has it; its elements are pairs of int8, so a slice is of
// 2 kDeep columns. With one scale a row of the weight the sums are scaled at the end; with groups,
// whose slices do not reach over a group's end, after the last slice of each, and added to float32
// totals: tiles of 64 rows then, as totals take as many registers as sums. q is read once for every
// tile of columns, the weight once for every tile of rows, y written once, in 16 bytes a lane.
#include "cpu/quant_linear.h"
#include "gpu.h"
#include "tiles.h"

namespace fastdiff {
namespace {

using Pair = gpu::s8x2;
constexpr int kBytes = 2 * kDeep;        // columns of a slice
constexpr int kGeluTanh = 1, kSilu = 2;  // QuantLinearArgs::activation

// Columns k to k + 15 of a row, zeros where `row` is null and at and past `end`, to shared memory.
__device__ __forceinline__ void copy16(Pair* to, const signed char* row, int k, int end,
                                       bool aligned) {
  if (aligned) {
    const bool read = row && k < end;
    gpu::cp_async16(to, read ? row + k : row, read);
    return;
  }
  gpu::Eight<Pair> pack;
#pragma unroll
  for (int i = 0; i < 16; ++i) pack.e[i / 2].e[i % 2] = row && k + i < end ? row[k + i] : 0;
  *reinterpret_cast<gpu::Eight<Pair>*>(to) = pack;
}

// A slice from column `first` on: row[j] is where row threadIdx.x / 4 + 64 j begins, or null.
template <int size>
__device__ __forceinline__ void copy_slice(Pair* to, const signed char* const (&row)[size / 64],
                                           int first, int end, bool aligned) {
  const int i = int(threadIdx.x) / 4, part = int(threadIdx.x) % 4;
#pragma unroll
  for (int j = 0; j < size / 64; ++j)
    copy16(to + (i + 64 * j) * Slice<false, size>::pitch + 8 * part, row[j], first + 16 * part, end,
           aligned);
}

}  // namespace

// Grid: tiles of rows by tiles of columns, those of a tile of rows side by side. Shared:
// Tile::shared bytes.
template <class T, int rows, bool groups>
__global__ void __launch_bounds__(kThreads, 2)
    quant_linear_tiles(QuantLinearArgs a, int across, bool k_aligned, bool y_aligned) {
  using Own = Tile<Slice<false, rows>, Slice<false, kColumns>, rows>;
  GPU_SHARED(Pair, shared);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first = int(blockIdx.x) / across * rows, left = int(blockIdx.x) % across * kColumns;
  const int M = int(a.M), N = int(a.N), K = int(a.K), G = int(a.G);
  const int size = groups ? K / G : K;
  const int per = (size + kBytes - 1) / kBytes, steps = groups ? per * G : per;

  const signed char *q[rows / 64], *w[kColumns / 64];
#pragma unroll
  for (int j = 0; j < rows / 64; ++j) {
    const int m = first + thread / 4 + 64 * j;
    q[j] = m < M ? reinterpret_cast<const signed char*>(a.q) + m * a.K : nullptr;
  }
#pragma unroll
  for (int j = 0; j < kColumns / 64; ++j) {
    const int n = left + thread / 4 + 64 * j;
    w[j] = n < N ? reinterpret_cast<const signed char*>(a.values) + n * a.K : nullptr;
  }
  int sum[2][Own::blocks][4] = {};
  float total[2][Own::blocks][4] = {};
  int k = 0, end = size, part = 0, g = 0;  // of the next slice; slices multiplied, and the group
  const auto copy = [&](int, Pair* to_q, Pair* to_w) {
    copy_slice<rows>(to_q, q, k, end, k_aligned);
    copy_slice<kColumns>(to_w, w, k, end, k_aligned);
    k += kBytes;
    if (groups && k >= end) k = end, end += size;
  };
  multiply<Pair, false, false, rows>(shared, steps, copy, sum, [&](int) {
    if (!groups || ++part < per) return;
    const int column = left + warp / Own::down * Own::columns + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Own::blocks; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int of = column + 8 * n + e % 2;
        const float scale = of < N ? a.scale[of * G + g] : 0.0f;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          total[m][n][e] = fmaf(float(sum[m][n][e]), scale, total[m][n][e]);
          sum[m][n][e] = 0;
        }
      }
    part = 0, ++g;
  });
  if constexpr (!groups) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < Own::blocks; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) total[m][n][e] = float(sum[m][n][e]);
  }

  const T* bias = static_cast<const T*>(a.bias);
  take<Own>(total, shared, 8, [&](int row, int i, const float* u) {
    const int m = first + row, n = left + i;
    if (m >= M) return;
    const float s = a.s[m];
    float y[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const bool inside = n + j < N;
      const float x = groups ? u[j] : inside && G ? u[j] * a.scale[n + j] : 0.0f;
      y[j] = fmaf(s, x, inside && bias ? gpu::to_float(bias[n + j]) : 0.0f);
      if (a.activation == kGeluTanh) y[j] = gpu::gelu_tanh(y[j]);
      if (a.activation == kSilu) y[j] *= gpu::sigmoid(y[j]);
    }
    store8(static_cast<T*>(a.y) + m * a.N, n, N, y_aligned, y);
  });
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int64_t kFewBlocks = 132;  // about as many as there are multiprocessors

template <class T, int rows, bool groups>
int launch(const QuantLinearArgs& a, cudaStream_t stream) {
  using Own = Tile<Slice<false, rows>, Slice<false, kColumns>, rows>;
  const int64_t across = (a.N + kColumns - 1) / kColumns, down = (a.M + rows - 1) / rows;
  if (down > kMost / across) return kInvalidConfiguration;
  const bool k_aligned =
      at16(a.q) && at16(a.values) && a.K % 16 == 0 && (!groups || a.K / a.G % 16 == 0);
  return GPU_LAUNCH((quant_linear_tiles<T, rows, groups>), dim3(unsigned(down * across)),
                    dim3(kThreads), Own::shared, stream, a, int(across), k_aligned,
                    rows_aligned(a.y, a.M, a.N, a.N));
}

// Tiles of 64 rows where larger ones leave multiprocessors idle. Not measured on a GPU.
template <class T>
int launch(const QuantLinearArgs& a, cudaStream_t stream) {
  if (a.M > kMost || a.N > kMost || a.K > kMost || a.G > kMost / (a.N ? a.N : 1))
    return kInvalidConfiguration;
  if (a.G > 1) return launch<T, 64, true>(a, stream);
  const int64_t tiles = (a.M / 128 + 1) * (a.N / kColumns + 1);
  return tiles < kFewBlocks ? launch<T, 64, false>(a, stream) : launch<T, 128, false>(a, stream);
}

}  // namespace

extern "C" int fastdiff_gpu_quant_linear(const QuantLinearArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE(T)                                                                \
  template __global__ void quant_linear_tiles<T, 64, true>(QuantLinearArgs, int, bool, bool);  \
  template __global__ void quant_linear_tiles<T, 64, false>(QuantLinearArgs, int, bool, bool); \
  template __global__ void quant_linear_tiles<T, 128, false>(QuantLinearArgs, int, bool, bool);
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
