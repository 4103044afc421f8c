// Rows of samples by index: gathered, and scattered into a copy of x with or without a gate. A warp
// moves a row, 16 bytes a lane where all rows are aligned to that, else one element; every element
// of the output is written once. An index outside of 0 to N - 1 names no row: gathered, it gives
// zeros; scattered or updated, it is skipped.
#include "cpu/tokens.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kFlight = 4;  // loads that a lane has on their way at once

template <class T>
__device__ __forceinline__ const T* row_of(const TokenRows& rows, int64_t b, int64_t n) {
  return static_cast<const T*>(rows.data) + b * rows.b_stride + n * rows.n_stride;
}

// The warp's row `to`[D] = `from`[D], or zeros where that is null; Bits: what a lane moves at once.
template <class Bits, class T>
__device__ __forceinline__ void copy_row(const T* from, T* to, int64_t D, int lane) {
  const int64_t packs = D * int64_t(sizeof(T)) / int64_t(sizeof(Bits));
  const Bits* source = reinterpret_cast<const Bits*>(from);
  Bits* target = reinterpret_cast<Bits*>(to);
  for (int64_t pack = lane; pack < packs; pack += 32 * kFlight) {
    Bits held[kFlight];
#pragma unroll
    for (int i = 0; i < kFlight; ++i)
      held[i] = source && pack + 32 * i < packs ? source[pack + 32 * i] : Bits{};
#pragma unroll
    for (int i = 0; i < kFlight; ++i)
      if (pack + 32 * i < packs) target[pack + 32 * i] = held[i];
  }
}

// The warp's row `to`[D] = x + gate y, in float32 and rounded once.
template <class Bits, class T>
__device__ __forceinline__ void add_gated(const T* x, const T* y, const T* gate, T* to, int64_t D,
                                          int lane) {
  constexpr int width = int(sizeof(Bits) / sizeof(T));
#pragma unroll 2
  for (int64_t d = lane * width; d < D; d += 32 * width) {
    const Bits packs[3] = {*reinterpret_cast<const Bits*>(x + d),
                           *reinterpret_cast<const Bits*>(y + d),
                           *reinterpret_cast<const Bits*>(gate + d)};
    T e[3][width];
    memcpy(e, packs, sizeof(e));
#pragma unroll
    for (int i = 0; i < width; ++i)
      e[0][i] = gpu::from_float<T>(
          fmaf(gpu::to_float(e[2][i]), gpu::to_float(e[1][i]), gpu::to_float(e[0][i])));
    Bits sum;
    memcpy(&sum, e[0], sizeof(sum));
    *reinterpret_cast<Bits*>(to + d) = sum;
  }
}

}  // namespace

template <class T, class Bits>
__global__ void __launch_bounds__(kThreads) gather_rows(GatherTokensArgs a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.B * a.A) return;
  const int64_t b = row / a.A, n = a.index[b * a.index_stride + row % a.A];
  const bool inside = n >= 0 && n < a.N;
  copy_row<Bits>(inside ? row_of<T>(a.x, b, n) : nullptr, static_cast<T*>(a.out) + row * a.D, a.D,
                 lane);
}

// One block for `rows` rows of a sample: it reads the sample's whole index (8 A bytes) to find what
// goes to each of them, so that no two blocks write to one place and the last of several wins
// whatever the order of threads. Shared: int[rows], the last a of each row, or -1.
template <class T, class Bits>
__global__ void __launch_bounds__(kThreads) scatter_rows(ScatterTokensArgs a, int rows) {
  GPU_SHARED(int, last);
  const int64_t pieces = (a.N + rows - 1) / rows;
  const int64_t b = blockIdx.x / pieces, first = blockIdx.x % pieces * rows;
  const int64_t end = first + rows < a.N ? first + rows : a.N;
  const int64_t* index = a.index + b * a.index_stride;
  for (int i = int(threadIdx.x); i < rows; i += kThreads) last[i] = -1;
  __syncthreads();
  for (int64_t k = threadIdx.x; k < a.A; k += kThreads) {
    const int64_t n = index[k];
    if (n >= first && n < end) atomicMax(&last[n - first], int(k));
  }
  __syncthreads();
  for (int64_t n = first + threadIdx.x / 32; n < end; n += kWarps) {
    const int k = last[n - first], lane = int(threadIdx.x) % 32;
    const T* x = row_of<T>(a.x, b, n);
    T* out = static_cast<T*>(a.out) + (b * a.N + n) * a.D;
    if (k >= 0 && a.gate.data) {
      add_gated<Bits>(x, row_of<T>(a.y, b, k), row_of<T>(a.gate, b, k), out, a.D, lane);
    } else {
      copy_row<Bits>(k < 0 ? x : row_of<T>(a.y, b, k), out, a.D, lane);
    }
  }
}

// A warp for each (b, a): it looks through the rest of the sample's index (8 A bytes, from cache)
// for a later row with its place, which then counts in its stead, and copies the row of every head.
template <class T, class Bits>
__global__ void __launch_bounds__(kThreads) update_rows(UpdateTokensArgs a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.B * a.A) return;
  const int64_t b = row / a.A, k = row % a.A;
  const int64_t* index = a.index + b * a.index_stride;
  const int64_t n = index[k];
  bool later = false;
  for (int64_t i = k + 1 + lane; i < a.A; i += 32) later |= index[i] == n;
  if (__any_sync(gpu::kAll, later) || n < 0 || n >= a.N) return;
  const T* y = static_cast<const T*>(a.y.data) + b * a.y.b_stride + k * a.y.n_stride;
  T* cache = static_cast<T*>(a.cache.data) + b * a.cache.b_stride + n * a.cache.n_stride;
  for (int64_t h = 0; h < a.H; ++h)
    copy_row<Bits>(y + h * a.y.h_stride, cache + h * a.cache.h_stride, a.D, lane);
}

#ifndef __CUDACC_RTC__
namespace {

// Whether every row starts at a multiple of 16 bytes.
template <class T>
bool aligned(const TokenRows& rows) {
  constexpr int64_t elements = 16 / sizeof(T);
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.b_stride % elements == 0 &&
         rows.n_stride % elements == 0;
}

template <class T>
int launch(const GatherTokensArgs& a, cudaStream_t stream) {
  const dim3 grid(unsigned((a.B * a.A + kWarps - 1) / kWarps)), block(kThreads);
  if (aligned<T>({a.out, a.D, a.D}) && aligned<T>(a.x))
    return GPU_LAUNCH((gather_rows<T, uint4>), grid, block, 0, stream, a);
  return GPU_LAUNCH((gather_rows<T, T>), grid, block, 0, stream, a);
}

template <class T>
int launch(const ScatterTokensArgs& a, cudaStream_t stream) {
  // Rows of a block: many, as each block reads the index, but enough blocks for every
  // multiprocessor of a large GPU (132) to have two. Not measured on a GPU.
  int rows = 64;
  while (rows > kWarps && a.B * ((a.N + rows - 1) / rows) < 2 * 132) rows /= 2;
  const dim3 grid(unsigned(a.B * ((a.N + rows - 1) / rows))), block(kThreads);
  const size_t shared = rows * sizeof(int);
  if (aligned<T>({a.out, a.D, a.D}) && aligned<T>(a.x) && aligned<T>(a.y) && aligned<T>(a.gate))
    return GPU_LAUNCH((scatter_rows<T, uint4>), grid, block, shared, stream, a, rows);
  return GPU_LAUNCH((scatter_rows<T, T>), grid, block, shared, stream, a, rows);
}

template <class T>
bool aligned(const HeadRows& rows) {
  return aligned<T>(TokenRows{rows.data, rows.b_stride, rows.n_stride}) &&
         rows.h_stride % int64_t(16 / sizeof(T)) == 0;
}

template <class T>
int launch(const UpdateTokensArgs& a, cudaStream_t stream) {
  const dim3 grid(unsigned((a.B * a.A + kWarps - 1) / kWarps)), block(kThreads);
  if (a.D % int64_t(16 / sizeof(T)) == 0 && aligned<T>(a.cache) && aligned<T>(a.y))
    return GPU_LAUNCH((update_rows<T, uint4>), grid, block, 0, stream, a);
  return GPU_LAUNCH((update_rows<T, T>), grid, block, 0, stream, a);
}

}  // namespace

extern "C" int fastdiff_gpu_update_tokens(const UpdateTokensArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}

extern "C" int fastdiff_gpu_gather_tokens(const GatherTokensArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}

extern "C" int fastdiff_gpu_scatter_tokens(const ScatterTokensArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE(T)                                            \
  template __global__ void gather_rows<T, uint4>(GatherTokensArgs);        \
  template __global__ void gather_rows<T, T>(GatherTokensArgs);            \
  template __global__ void scatter_rows<T, uint4>(ScatterTokensArgs, int); \
  template __global__ void scatter_rows<T, T>(ScatterTokensArgs, int);     \
  template __global__ void update_rows<T, uint4>(UpdateTokensArgs);        \
  template __global__ void update_rows<T, T>(UpdateTokensArgs);
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
