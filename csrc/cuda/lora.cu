// What low-rank adapters add to a layer's result, a sample each: both products on tensor cores,
// sums in float32. bfloat16 and float16.
//
// A block owns kRowsOf rows of one sample and a stretch of the columns of y. It takes the rows'
// part of x down^T over K in slices, as tiles.h does, rounds it to T, puts it into shared memory
// and goes over its columns: a tile of `up` is worked on while the next is on its way. x is read
// once, y is read and written once, both in 16 bytes a lane. Where rows alone would leave
// multiprocessors idle, columns are shared out, and the first product is taken once for every
// stretch (N / share times 1 / (1 + N / K) of all work). A sample without adapter or with a scale
// of 0 is copied. No result depends on what is beside a row.
#include "cpu/lora.h"
#include "gpu.h"
#include "tiles.h"

namespace fastdiff {

struct LoraAligned {  // outside, or the kernels that take it have no symbol
  bool x, down, up, y, out;
};

namespace {

constexpr int kRowsOf = 64;

// R: the rank, rounded up.
template <int R>
struct Low {
  static constexpr int wide = R > 128 ? 32 : 64;  // columns of y at a time
  static constexpr int pitch = R + 8;             // of the product and of `up`, in shared memory
  static constexpr int slice = Slice<false, kRowsOf>::elements + R * Slice<false, 64>::pitch;
  static constexpr int own = wide / 2, sums = own + 8;  // columns of a warp, and a row of its sums
  static constexpr int first = kStages * slice * 2;     // bytes of the first product
  static constexpr int second = (kRowsOf + 2 * wide) * pitch * 2 + kWarps * 16 * sums * 4;
  static constexpr int shared = first > second ? first : second;
};

// y of the block's rows, columns `from` to `to`, as it is.
template <class T>
__device__ void copy_tile(const T* y, int64_t y_t, T* out, int64_t N, int rows, int from, int to,
                          bool aligned) {
  const int packs = (to - from + 7) / 8;
  for (int i = int(threadIdx.x); i < rows * packs; i += kThreads) {
    const int row = i / packs, n = from + i % packs * 8;
    const T* source = y + row * y_t + n;
    T* place = out + row * N + n;
    if (aligned) {
      *reinterpret_cast<gpu::Eight<T>*>(place) = *reinterpret_cast<const gpu::Eight<T>*>(source);
    } else {
      for (int j = 0; j < 8 && n + j < to; ++j) place[j] = source[j];
    }
  }
}

}  // namespace

// Grid: tiles of rows of all samples, by stretches of `share` columns. Shared: Low::shared bytes.
// Of small ranks 4 blocks are asked for, more than shared memory lets be: up to 64 registers, where
// the compilers else settle on 48 and 58, each on its own.
template <class T, int R>
__global__ void __launch_bounds__(kThreads, R <= 64 ? 4 : 0)
    lora_add_tiles(LoraAddArgs a, int tiles, int share, LoraAligned aligned) {
  using Own = Low<R>;
  constexpr int kPitch = Slice<false, 64>::pitch;
  GPU_SHARED(T, shared);
  const int thread = int(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t b = int(blockIdx.x) / tiles;
  const int64_t t = int64_t(int(blockIdx.x) % tiles) * kRowsOf;
  const int rows = a.T - t < kRowsOf ? int(a.T - t) : kRowsOf;
  const int N = int(a.N), K = int(a.K), rank = int(a.rank);
  const int from = int(blockIdx.y) * share, to = N - from < share ? N : from + share;
  const T* y = static_cast<const T*>(a.y) + b * a.y_b + t * a.y_t;
  T* out = static_cast<T*>(a.out) + (b * a.T + t) * a.N;
  const int64_t chosen = a.index ? a.index[b] : 1;
  const bool known = chosen > 0 && chosen <= a.A;
  const int64_t adapter = known ? chosen - 1 : 0;
  const float scale = known ? a.scale[adapter] : 0.0f;
  T* kept = a.low && blockIdx.y == 0 ? static_cast<T*>(a.low) + (b * a.T + t) * a.rank : nullptr;
  const bool neutral = scale == 0.0f || rank == 0;
  if (neutral) copy_tile(y, a.y_t, out, a.N, rows, from, to, aligned.y && aligned.out);
  if (kept && !known)
    for (int i = thread; i < rows * rank; i += kThreads) kept[i] = gpu::from_float<T>(0.0f);
  if ((neutral && !kept) || !known || rank == 0) return;

  const T* x[1];
  x[0] = thread / 4 < rows ? static_cast<const T*>(a.x) + b * a.x_b + (t + thread / 4) * a.x_t
                           : nullptr;
  const T* down = static_cast<const T*>(a.down) + adapter * a.rank * a.K;
  const auto copy_slice = [&](int step, T* slice) {
    copy_rows<kRowsOf>(slice, x, step * kDeep, K, aligned.x);
    T* of_down = slice + Slice<false, kRowsOf>::elements;
    const int d = thread % 4 * 8;
    for (int i = thread / 4; i < R; i += 64)
      gpu::copy8<T>(of_down + i * kPitch + d, i < rank ? down + int64_t(i) * K : nullptr,
                    step * kDeep + d, K, aligned.down);
  };
  const int row = warp % 4 * 16, half = warp / 4;
  float low[R / 16][4] = {};
  const int steps = (K + kDeep - 1) / kDeep;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) copy_slice(s, shared + s * Own::slice);
    gpu::cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    gpu::cp_async_wait<kStages - 2>();
    __syncthreads();  // this slice is there for every warp, and none needs the one before
    const int next = step + kStages - 1;
    if (next < steps) copy_slice(next, shared + next % kStages * Own::slice);
    gpu::cp_async_commit();
    const T* of_x = shared + step % kStages * Own::slice;
    const T* of_down = of_x + Slice<false, kRowsOf>::elements;
#pragma unroll
    for (int k = 0; k < kDeep; k += 16) {
      unsigned p[4];
      load_a<false, kPitch>(p, of_x, row, k, lane);
#pragma unroll
      for (int n = 0; n < R / 16; n += 2) {
        unsigned q[4];
        load_b<false, kPitch>(q, of_down, half * (R / 2) + 8 * n, k, lane);
        gpu::mma_16816<T>(low[n], p, q[0], q[1]);
        gpu::mma_16816<T>(low[n + 1], p, q[2], q[3]);
      }
    }
  }
  __syncthreads();  // no warp reads its slices any more

  T* product = shared;
#pragma unroll
  for (int n = 0; n < R / 16; ++n) {
    T* place = product + (row + lane / 4) * Own::pitch + half * (R / 2) + 8 * n + lane % 4 * 2;
    const unsigned above = gpu::pack<T>(low[n][0], low[n][1]);
    const unsigned below = gpu::pack<T>(low[n][2], low[n][3]);
    memcpy(place, &above, sizeof(above));
    memcpy(place + 8 * Own::pitch, &below, sizeof(below));
  }
  T* const ups = product + kRowsOf * Own::pitch;
  float* const sums =
      reinterpret_cast<float*>(ups + 2 * Own::wide * Own::pitch) + warp * 16 * Own::sums;
  const T* up = static_cast<const T*>(a.up) + adapter * a.N * a.rank;
  const auto copy_up = [&](int n, T* place) {
    for (int i = thread; i < Own::wide * (R / 8); i += kThreads) {
      const int column = i / (R / 8), d = i % (R / 8) * 8;
      gpu::copy8<T>(place + column * Own::pitch + d,
                    n + column < to ? up + int64_t(n + column) * rank : nullptr, d, rank,
                    aligned.up);
    }
  };
  if (!neutral && from < to) copy_up(from, ups);
  gpu::cp_async_commit();
  if (kept) {
    __syncthreads();  // the product is there
    for (int i = thread; i < rows * rank; i += kThreads)
      kept[i] = product[i / rank * Own::pitch + i % rank];
  }
  if (neutral) return;
  for (int n = from, turn = 0; n < to; n += Own::wide, turn ^= 1) {
    const int next = n + Own::wide;
    if (next < to) copy_up(next, ups + (turn ^ 1) * Own::wide * Own::pitch);
    gpu::cp_async_commit();
    gpu::cp_async_wait<1>();
    __syncthreads();  // the product and this tile are there
    const T* tile = ups + turn * Own::wide * Own::pitch;
    float sum[Own::own / 8][4] = {};
#pragma unroll
    for (int k = 0; k < R; k += 16) {
      unsigned p[4];
      load_a<false, Own::pitch>(p, product, row, k, lane);
#pragma unroll
      for (int m = 0; m < Own::own / 8; m += 2) {
        unsigned q[4];
        load_b<false, Own::pitch>(q, tile, half * Own::own + 8 * m, k, lane);
        gpu::mma_16816<T>(sum[m], p, q[0], q[1]);
        gpu::mma_16816<T>(sum[m + 1], p, q[2], q[3]);
      }
    }
    float* place = sums + lane / 4 * Own::sums + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < Own::own / 8; ++m) {
      place[8 * m] = sum[m][0], place[8 * m + 1] = sum[m][1];
      place[8 * Own::sums + 8 * m] = sum[m][2], place[8 * Own::sums + 8 * m + 1] = sum[m][3];
    }
    __syncwarp();
    constexpr int packs = Own::own / 8;
    for (int i = lane; i < 16 * packs; i += 32) {
      const int r = row + i / packs, column = n + half * Own::own + i % packs * 8;
      if (r >= rows || column >= to) continue;
      const T* source = y + r * a.y_t;
      gpu::Eight<T> base;
      if (aligned.y) {
        base = *reinterpret_cast<const gpu::Eight<T>*>(source + column);
      } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
          base.e[j] = column + j < N ? source[column + j] : gpu::from_float<T>(0.0f);
      }
      const float* u = sums + i / packs * Own::sums + i % packs * 8;
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = fmaf(scale, u[j], gpu::to_float(base.e[j]));
      store8(out + r * a.N, column, N, aligned.out, v);
    }
    __syncthreads();  // no warp reads this tile, or its sums, any more
  }
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int64_t kBlocks = 264;  // two for each multiprocessor of a large GPU

template <class T, int R>
int launch(const LoraAddArgs& a, cudaStream_t stream) {
  if (a.T > kMost || a.N > kMost || a.K > kMost) return kInvalidConfiguration;
  const int64_t tiles = (a.T + kRowsOf - 1) / kRowsOf;
  if (a.B > kMost / (tiles ? tiles : 1)) return kInvalidConfiguration;
  const int64_t blocks = a.B * tiles;
  const int64_t most = (a.N + 255) / 256;
  int64_t parts = kBlocks / blocks;
  parts = parts < 1 ? 1 : parts > most ? most : parts;
  const int64_t some = parts ? (a.N + parts - 1) / parts : 0;
  const int64_t share = some > 64 ? (some + 63) / 64 * 64 : 64;
  const int64_t stretches = a.N ? (a.N + share - 1) / share : 1;
  const bool x_b = a.B == 1 || a.x_b % 8 == 0, y_b = a.B == 1 || a.y_b % 8 == 0;
  const LoraAligned aligned = {
      rows_aligned(a.x, a.T, a.x_t, a.K) && x_b,
      rows_aligned(a.down, a.A * a.rank, a.K, a.K),
      rows_aligned(a.up, a.A * a.N, a.rank, a.rank),
      rows_aligned(a.y, a.T, a.y_t, a.N) && y_b,
      rows_aligned(a.out, a.T, a.N, a.N),
  };
  return GPU_LAUNCH((lora_add_tiles<T, R>), dim3(unsigned(blocks), unsigned(stretches)),
                    dim3(kThreads), Low<R>::shared, stream, a, int(tiles), int(share), aligned);
}

template <class T>
int launch(const LoraAddArgs& a, cudaStream_t stream) {
  if (a.rank <= 32) return launch<T, 32>(a, stream);
  if (a.rank <= 64) return launch<T, 64>(a, stream);
  return a.rank <= 128 ? launch<T, 128>(a, stream) : launch<T, 256>(a, stream);
}

}  // namespace

extern "C" int fastdiff_gpu_lora_add(const LoraAddArgs* a, void* stream) {
  switch (a->dtype) {
    case Dtype::kBf16: return launch<gpu::bf16>(*a, static_cast<cudaStream_t>(stream));
    case Dtype::kF16: return launch<gpu::f16>(*a, static_cast<cudaStream_t>(stream));
    case Dtype::kF32: return kNotSupported;  // tensor cores have no float32
  }
  return kNotSupported;
}
#else
#define FASTDIFF_INSTANTIATE(T)                                                        \
  template __global__ void lora_add_tiles<T, 32>(LoraAddArgs, int, int, LoraAligned);  \
  template __global__ void lora_add_tiles<T, 64>(LoraAddArgs, int, int, LoraAligned);  \
  template __global__ void lora_add_tiles<T, 128>(LoraAddArgs, int, int, LoraAligned); \
  template __global__ void lora_add_tiles<T, 256>(LoraAddArgs, int, int, LoraAligned);
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
