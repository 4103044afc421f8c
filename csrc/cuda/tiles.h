// Tiles of products on tensor cores: what kernels with a matrix product each do in their own way
// around. After gpu.h. bfloat16 and float16, sums in float32; pairs of int8, sums in int32. In the
// order of k.
//
// Both factors come in kDeep slices of k through shared memory, kStages of them, one worked on
// while the next two are on their way.
#pragma once

namespace fastdiff {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kColumns = 128, kDeep = 32, kStages = 3;

// One factor's slice: `size` rows or columns of it by kDeep of k, each with its k side by side
// (an odd number of 16 bytes apart: eight of a column lie in different banks), or turned: each k
// with its rows or columns side by side.
template <bool turned, int size>
struct Slice {
  static constexpr int pitch = turned ? size + 8 : kDeep + 8;
  static constexpr int elements = turned ? kDeep * pitch : size * pitch;
};

// What the warps of a block have of its tile: 32 rows each, and `columns`.
template <class A, class B, int rows>
struct Tile {
  static constexpr int down = rows / 32, across = kWarps / down;
  static constexpr int columns = kColumns / across, blocks = columns / 8;
  static constexpr int stage = A::elements + B::elements;
  static constexpr int pitch = columns + 8;  // of a warp's sums, as floats, on their way out
  static constexpr int shared = kStages * stage * 2;  // bytes
  static_assert(kWarps * 16 * pitch * 4 <= shared);
};

// A slice from k `first` on: row[j] is where row threadIdx.x / 4 + 64 j begins, or null.
template <int size, class T>
__device__ __forceinline__ void copy_rows(T* to, const T* const (&row)[size / 64], int first,
                                          int dim, bool aligned) {
  const int i = int(threadIdx.x) / 4, d = int(threadIdx.x) % 4 * 8;
#pragma unroll
  for (int j = 0; j < size / 64; ++j)
    gpu::copy8(to + (i + 64 * j) * Slice<false, size>::pitch + d, row[j], first + d, dim, aligned);
}

// A turned slice: row(k) is where the `dim` elements of k begin, or null; the thread's are at `d`.
template <int size, class T, class Row>
__device__ __forceinline__ void copy_turned(T* to, int first, int d, int dim, bool aligned,
                                            Row row) {
  const int k = int(threadIdx.x) / 16, at = int(threadIdx.x) % 16 * 8;
#pragma unroll
  for (int j = 0; j < kDeep / 16; ++j)
    gpu::copy8<T>(to + (k + 16 * j) * Slice<true, size>::pitch + at, row(first + k + 16 * j), d,
                  dim, aligned);
}

// The 16 rows of a from `row` on, by the 16 of k from `k` on; and the same of columns of b.
template <bool turned, int pitch, class T>
__device__ __forceinline__ void load_a(unsigned (&part)[4], const T* a, int row, int k, int lane) {
  if constexpr (turned)
    gpu::ldmatrix_x4<true>(part,
                           a + (k + lane % 8 + lane / 16 * 8) * pitch + row + lane / 8 % 2 * 8);
  else
    gpu::ldmatrix_x4<false>(part, a + (row + lane % 16) * pitch + k + lane / 16 * 8);
}
template <bool turned, int pitch, class T>
__device__ __forceinline__ void load_b(unsigned (&part)[4], const T* b, int column, int k,
                                       int lane) {
  if constexpr (turned)
    gpu::ldmatrix_x4<true>(part, b + (k + lane % 16) * pitch + column + lane / 16 * 8);
  else
    gpu::ldmatrix_x4<false>(part,
                            b + (column + lane % 8 + lane / 16 * 8) * pitch + k + lane / 8 % 2 * 8);
}

struct Nothing {
  __device__ __forceinline__ void operator()(int) const {}
};

// The block's tile of a b^T over `steps` slices, which copy(step, a, b) begins to bring; sum[m]:
// 16 rows of the warp's 32. after(step) may take the sums.
template <class T, bool a_turned, bool b_turned, int rows, class Copy, class Sum,
          class After = Nothing>
__device__ __forceinline__ void multiply(
    T* shared, int steps, Copy copy,
    Sum (&sum)[2][Tile<Slice<a_turned, rows>, Slice<b_turned, kColumns>, rows>::blocks][4],
    After after = {}) {
  using A = Slice<a_turned, rows>;
  using B = Slice<b_turned, kColumns>;
  using Own = Tile<A, B, rows>;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int row = warp % Own::down * 32, column = warp / Own::down * Own::columns;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) copy(s, shared + s * Own::stage, shared + s * Own::stage + A::elements);
    gpu::cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    gpu::cp_async_wait<kStages - 2>();
    __syncthreads();  // this slice is there for every warp, and none needs the one before
    const int next = step + kStages - 1;
    T* to = shared + next % kStages * Own::stage;
    if (next < steps) copy(next, to, to + A::elements);
    gpu::cp_async_commit();
    const T *a = shared + step % kStages * Own::stage, *b = a + A::elements;
#pragma unroll
    for (int k = 0; k < kDeep; k += 16) {
      unsigned p[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_a<a_turned, A::pitch>(p[m], a, row + 16 * m, k, lane);
#pragma unroll
      for (int n = 0; n < Own::blocks; n += 2) {
        unsigned q[4];
        load_b<b_turned, B::pitch>(q, b, column + 8 * n, k, lane);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          gpu::mma_16816<T>(sum[m][n], p[m], q[0], q[1]);
          gpu::mma_16816<T>(sum[m][n + 1], p[m], q[2], q[3]);
        }
      }
    }
    after(step);
  }
  __syncthreads();  // no warp reads its slices any more
}

// use(row, column, sums) for pieces of the tile: 16 rows and Own::columns from there on, rows of
// sums Own::pitch apart. A warp has its pieces one after another, in its own part of shared memory.
template <class Own, class Use>
__device__ __forceinline__ void pieces(const float (&sum)[2][Own::blocks][4], void* shared,
                                       Use use) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  float* own = static_cast<float*>(shared) + warp * 16 * Own::pitch;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    float* to = own + lane / 4 * Own::pitch + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Own::blocks; ++n) {
      to[8 * n] = sum[m][n][0], to[8 * n + 1] = sum[m][n][1];
      to[8 * Own::pitch + 8 * n] = sum[m][n][2], to[8 * Own::pitch + 8 * n + 1] = sum[m][n][3];
    }
    __syncwarp();
    use(warp % Own::down * 32 + 16 * m, warp / Own::down * Own::columns, own);
    __syncwarp();
  }
}

// put(row, column, sums) for the tile's sums, `wide` (8 or 16) neighbouring columns at a time,
// which a lane then stores together.
template <class Own, class Put>
__device__ __forceinline__ void take(const float (&sum)[2][Own::blocks][4], void* shared, int wide,
                                     Put put) {
  const int packs = Own::columns / wide;
  pieces<Own>(sum, shared, [&](int first, int from, const float* own) {
    for (int i = int(threadIdx.x) % 32; i < 16 * packs; i += 32) {
      const int row = i / packs, column = i % packs * wide;
      put(first + row, from + column, own + row * Own::pitch + column);
    }
  });
}

// Elements d to d + 7 of a row of `dim`, those past it left out.
template <class T>
__device__ __forceinline__ void store8(T* row, int d, int dim, bool aligned, const float (&v)[8]) {
  gpu::Eight<T> pack;
#pragma unroll
  for (int i = 0; i < 8; ++i) pack.e[i] = gpu::from_float<T>(v[i]);
  if (aligned) {
    if (d < dim) *reinterpret_cast<gpu::Eight<T>*>(row + d) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (d + i < dim) row[d + i] = pack.e[i];
}

#ifndef __CUDACC_RTC__
constexpr int kInvalidConfiguration = 9, kNotSupported = 801;  // of cudaError_t
constexpr int64_t kMost = 0x7fffff00;  // blocks, rows, columns: the last tile ends within an int

bool at16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether 16-byte loads reach every row; the stride of a dimension of size 1 does not matter.
bool rows_aligned(const void* p, int64_t size, int64_t stride, int64_t width) {
  return at16(p) && width % 8 == 0 && (size <= 1 || stride % 8 == 0);
}
#endif

}  // namespace
}  // namespace fastdiff
