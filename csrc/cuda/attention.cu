// Attention with an online softmax in float32 (Milakov & Gimelshein 2018, arXiv:1805.02867), tile
// by tile on tensor cores (Dao 2023, arXiv:2307.08691, algorithm 1). bfloat16 and float16.
//
// A block owns the query rows of one head that its warps have between them, 16 a warp: a warp holds
// its rows of q, the weighted sums of v, their running maximum and denominator in registers. Keys
// and values come in tiles through shared memory, one worked on while the next is on its way. Each
// element of q is read once, of k and v once a block; biases are read where they lie, none is laid
// out at S x T. Scores are in units of log 2: 2^s is one instruction.
#include "cpu/attention.h"
#include "gpu.h"
#include "softmax.h"

namespace fastdiff {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Sizes for head dimensions up to `dim`, a multiple of 16, with which no register spills on sm_80
// to sm_120. Two stages of k and v lie in shared memory, and the rows of q pass through the second
// one before the second tile does: at most 86016 bytes of the 101376 that a block may have on
// sm_86, sm_89 and sm_120.
template <int dim>
struct Tiles {
  static constexpr int keys = dim <= 160 ? 64 : 16;
  static constexpr int warps = dim > 64 && dim <= 160 ? 8 : 4;
  // An odd number of 16 bytes: eight rows of a column lie in different banks.
  static constexpr int pitch = dim + 8;
  static constexpr int stage = 2 * keys * pitch;  // elements of k and v
  static constexpr int q = 16 * warps * pitch;
  static constexpr int shared = stage + (q > stage ? q : stage);
  static constexpr int blocks = dim <= 64 ? 3 : 1;  // that registers of a multiprocessor are for
};

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// Keys `first` to first + keys - 1 of k and v to one stage, zeros past `length`.
template <class T, int dim>
__device__ __forceinline__ void copy_keys(const AttentionArgs& a, const T* k, const T* v, T* stage,
                                          int first, int length, bool aligned) {
  using Tile = Tiles<dim>;
  for (int i = int(threadIdx.x); i < Tile::keys * (dim / 8); i += int(blockDim.x)) {
    const int row = i / (dim / 8), d = i % (dim / 8) * 8;
    const int64_t key = first + row;  // whose offset passes 2^31
    const bool seen = key < length;
    T* to = stage + row * Tile::pitch + d;
    gpu::copy8(to, seen ? k + key * a.k_stride[2] : nullptr, d, int(a.dim), aligned);
    gpu::copy8(to + Tile::keys * Tile::pitch, seen ? v + key * a.v_stride[2] : nullptr, d,
               int(a.dim), aligned);
  }
}

__device__ __forceinline__ int start_of(const AttentionArgs& a, int64_t b) {
  const int64_t start = a.q_starts[b];
  return int(start < 0 ? 0 : start < a.rows ? start : a.rows);
}
// Past the last query row of sample b, and the sample of q and out that has them. What a block
// needs at its end too is read once more: no register holds it meanwhile.
__device__ __forceinline__ int end_of(const AttentionArgs& a, int b) {
  return a.q_starts ? start_of(a, int64_t(b) + 1) : int(a.rows);
}
__device__ __forceinline__ int holder_of(const AttentionArgs& a, int b) {
  return a.q_starts ? 0 : b;
}

// A sample, -1 for none, and the first of a block's query rows.
struct Part {
  int sample, row;
};

// Tile `slot`, of `rows` rows, among those of packed samples. Every warp looks for itself, a sample
// a lane: the starts come from cache, and no block waits for a barrier.
__device__ __forceinline__ Part find_part(const AttentionArgs& a, int slot, int rows, int lane) {
  int64_t before = 0;  // tiles of the samples that were looked at
  for (int64_t first = 0; first < a.batch; first += 32) {
    int start = 0, end = 0;
    if (first + lane < a.batch)
      start = start_of(a, first + lane), end = start_of(a, first + lane + 1);
    const int64_t tiles = end > start ? (int64_t(end) - start + rows - 1) / rows : 0;
    int64_t sum = tiles;  // of the lanes up to this one
    for (int by = 1; by < 32; by *= 2) {
      const int64_t more = __shfl_up_sync(gpu::kAll, sum, by);
      if (lane >= by) sum += more;
    }
    const unsigned past = __ballot_sync(gpu::kAll, before + sum > slot);
    if (past) {
      const int owner = __ffs(int(past)) - 1;
      const int tile = slot - int(before + __shfl_sync(gpu::kAll, sum - tiles, owner));
      return {int(first) + owner, __shfl_sync(gpu::kAll, start, owner) + tile * rows};
    }
    before += __shfl_sync(gpu::kAll, sum, 31);
  }
  return {-1, 0};
}

// The row of q that output row `row` is of, or -1: past the end, or of no row of q.
__device__ __forceinline__ int64_t query_of(const AttentionArgs& a, int b, int row, int end) {
  if (row >= end) return -1;
  const int64_t query = a.q_index ? a.q_index[b * a.rows + row] : row;
  return query >= 0 && query < a.queries ? query : -1;
}

// The same for the queries of `rows` output rows from `first`, zeros where there is none.
template <class T, int dim>
__device__ __forceinline__ void copy_queries(const AttentionArgs& a, const T* q, T* tile, int b,
                                             int first, int rows, bool aligned) {
  const int end = end_of(a, b);
  for (int i = int(threadIdx.x); i < rows * (dim / 8); i += int(blockDim.x)) {
    const int row = i / (dim / 8), d = i % (dim / 8) * 8;
    const int64_t query = query_of(a, b, first + row, end);
    gpu::copy8(tile + row * Tiles<dim>::pitch + d, query < 0 ? nullptr : q + query * a.q_stride[2],
               d, int(a.dim), aligned);
  }
}

// s[n][e] += log2(e) bias(r, key) for the keys of this lane: e of column block n is row r = e / 2
// of the lane's two, key first + 8 n + e % 2.
template <int blocks, class Bias>
__device__ __forceinline__ void add_bias(float (&s)[blocks][4], int first, int length, Bias bias) {
#pragma unroll
  for (int n = 0; n < blocks; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = first + 8 * n + e % 2;
      if (key < length) s[n][e] = fmaf(bias(e / 2, key), kLog2e, s[n][e]);
    }
}

// The same for whichever bias there is. bias[r]: where that of row r begins, null for none to read.
template <class T, int blocks>
__device__ __forceinline__ void add_any_bias(const AttentionArgs& a, const int64_t* key_group,
                                             const void* const (&bias)[2], float (&s)[blocks][4],
                                             int first, int length) {
  if (a.table) {
    add_bias(s, first, length, [&](int r, int key) {
      const int64_t group = key_group[key];
      const float* row = static_cast<const float*>(bias[r]);
      if (group < 0 || group >= a.key_groups) return not_a_number();
      return row ? row[group] : 0.0f;
    });
  } else if (a.bias && a.bias_f32) {
    add_bias(s, first, length, [&](int r, int key) {
      return bias[r] ? static_cast<const float*>(bias[r])[key] : 0.0f;
    });
  } else if (a.bias) {
    add_bias(s, first, length, [&](int r, int key) {
      return bias[r] ? gpu::to_float(static_cast<const T*>(bias[r])[key]) : 0.0f;
    });
  }
}

// s = scale q k^T of a warp's 16 rows and one tile of keys.
template <class T, int dim>
__device__ __forceinline__ void scores(const unsigned (&q)[dim / 16][4], const T* k, int lane,
                                       float scale, float (&s)[Tiles<dim>::keys / 8][4]) {
  const T* at = k + (lane % 8 + lane / 16 * 8) * Tiles<dim>::pitch + lane / 8 % 2 * 8;
#pragma unroll
  for (int n = 0; n < Tiles<dim>::keys / 16; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[2 * n][e] = s[2 * n + 1][e] = 0.0f;
#pragma unroll
    for (int d = 0; d < dim / 16; ++d) {
      unsigned b[4];
      gpu::ldmatrix_x4<false>(b, at + n * 16 * Tiles<dim>::pitch + d * 16);
      gpu::mma_16816<T>(s[2 * n], q[d], b[0], b[1]);
      gpu::mma_16816<T>(s[2 * n + 1], q[d], b[2], b[3]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) s[2 * n][e] *= scale, s[2 * n + 1][e] *= scale;
  }
}

// out += weight v for one tile of keys; weights are rounded to T, as operands of tensor cores.
template <class T, int dim>
__device__ __forceinline__ void add_values(const float (&weight)[Tiles<dim>::keys / 8][4],
                                           const T* v, int lane, float (&out)[dim / 8][4]) {
  const T* at = v + lane % 16 * Tiles<dim>::pitch + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < Tiles<dim>::keys / 16; ++n) {
    const unsigned p[4] = {gpu::pack<T>(weight[2 * n][0], weight[2 * n][1]),
                           gpu::pack<T>(weight[2 * n][2], weight[2 * n][3]),
                           gpu::pack<T>(weight[2 * n + 1][0], weight[2 * n + 1][1]),
                           gpu::pack<T>(weight[2 * n + 1][2], weight[2 * n + 1][3])};
#pragma unroll
    for (int d = 0; d < dim / 16; ++d) {
      unsigned b[4];
      gpu::ldmatrix_x4<true>(b, at + n * 16 * Tiles<dim>::pitch + d * 16);
      gpu::mma_16816<T>(out[2 * d], p, b[0], b[1]);
      gpu::mma_16816<T>(out[2 * d + 1], p, b[2], b[3]);
    }
  }
}

// One row's out and log-sum-exp; a row with no key left gives 0 and -inf.
template <class T, int dim>
__device__ __forceinline__ void store_row(const AttentionArgs& a, int b, int h, int row, int lane,
                                          int r, float top, float total,
                                          const float (&out)[dim / 8][4]) {
  const bool dead = total == 0.0f;
  const float inverse = 1.0f / total;
  if (lane % 4 == 0)
    a.lse[(b * a.heads + h) * a.rows + row] = dead ? -INFINITY : (top + log2f(total)) * kLn2;
  T* to = static_cast<T*>(a.out) + ((b * a.rows + row) * a.heads + h) * a.dim;
#pragma unroll
  for (int n = 0; n < dim / 8; ++n) {
    const int d = 8 * n + lane % 4 * 2;
    const Pair<T> pair{gpu::from_float<T>(dead ? 0.0f : out[n][2 * r] * inverse),
                       gpu::from_float<T>(dead ? 0.0f : out[n][2 * r + 1] * inverse)};
    if (a.dim % 2 == 0) {
      if (d < a.dim) *reinterpret_cast<Pair<T>*>(to + d) = pair;
    } else {
      if (d < a.dim) to[d] = pair.low;
      if (d + 1 < a.dim) to[d + 1] = pair.high;
    }
  }
}

// Where the bias of query row `query` begins, null where there is none to read; whether its group
// is one of the table's.
template <class T>
__device__ __forceinline__ bool find_bias(const AttentionArgs& a, int b, int h, int64_t query,
                                          const void*& bias) {
  if (a.table) {
    const int64_t group = a.query_group[b * a.query_group_stride + query];
    if (group < 0 || group >= a.query_groups) return false;
    bias = a.table + b * a.table_stride[0] + h * a.table_stride[1] + group * a.key_groups;
  } else if (a.bias) {
    const int64_t at =
        b * a.bias_stride[0] + h * a.bias_stride[1] + (a.bias_full ? query * a.bias_stride[2] : 0);
    if (a.bias_f32) {
      bias = static_cast<const float*>(a.bias) + at;
    } else {
      bias = static_cast<const T*>(a.bias) + at;
    }
  }
  return true;
}

}  // namespace

// Grid: batch * heads * tiles blocks, the tiles of a head side by side, so that its keys and values
// stay in cache. Of packed samples it is heads * tiles blocks: each sample has tiles of its own,
// one after another, and blocks past the last of them leave. What an index, group or length names
// outside of its tensor is not read, and the rows that ask for it are NaN; starts outside of q are
// moved to its ends.
template <class T, int dim>
__global__ void __launch_bounds__(32 * Tiles<dim>::warps, Tiles<dim>::blocks)
    attention_tiles(AttentionArgs a, int tiles, bool aligned) {
  using Tile = Tiles<dim>;
  GPU_SHARED(T, shared);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int head = int(blockIdx.x) / tiles, h = head % int(a.heads), slot = int(blockIdx.x) % tiles;
  const int rows = int(blockDim.x) / 2, sample = head / int(a.heads);
  const Part part = a.q_starts ? find_part(a, slot, rows, lane) : Part{sample, slot * rows};
  const int b = part.sample;
  if (b < 0) return;
  const T* q = static_cast<const T*>(a.q) + holder_of(a, b) * a.q_stride[0] + h * a.q_stride[1];
  const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + h * a.k_stride[1];
  const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + h * a.v_stride[1];
  const int64_t given = a.key_lengths ? a.key_lengths[b] : a.keys;
  const bool fits = given >= 0 && given <= a.keys;
  const int length = fits ? int(given) : 0;

  copy_keys<T, dim>(a, k, v, shared, 0, length, aligned);
  T* q_tile = shared + Tile::stage;
  copy_queries<T, dim>(a, q, q_tile, b, part.row, rows, aligned);
  gpu::cp_async_commit();

  // A lane has two rows of the warp's 16, eight apart.
  const int row = part.row + warp * 16 + lane / 4;
  bool known[2];
  const void* bias[2] = {nullptr, nullptr};
  const int64_t* key_group = a.table ? a.key_group + b * a.key_group_stride : nullptr;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t query = query_of(a, b, row + 8 * r, end_of(a, b));
    known[r] = query >= 0 && fits && find_bias<T>(a, b, h, query, bias[r]);
  }

  unsigned q_part[dim / 16][4];
  gpu::cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int d = 0; d < dim / 16; ++d)
    gpu::ldmatrix_x4<false>(
        q_part[d], q_tile + (warp * 16 + lane % 16) * Tile::pitch + d * 16 + lane / 16 * 8);

  float out[dim / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  const float to_log2 = a.scale * kLog2e;
  int stage = 0;
  for (int first = 0; first < length; first += Tile::keys, stage ^= 1) {
    gpu::cp_async_wait<0>();
    __syncthreads();  // this tile is there for every warp, and none needs the other stage
    if (first + Tile::keys < length) {
      copy_keys<T, dim>(a, k, v, shared + (stage ^ 1) * Tile::stage, first + Tile::keys, length,
                        aligned);
      gpu::cp_async_commit();
    }
    const T* tile = shared + stage * Tile::stage;
    float s[Tile::keys / 8][4];
    scores<T, dim>(q_part, tile, lane, to_log2, s);
    const int key = first + lane % 4 * 2;
    add_any_bias<T>(a, key_group, bias, s, key, length);
    if (first + Tile::keys > length) mask(s, key, length);
    soften(s, top, total, out);
    add_values<T, dim>(s, tile + Tile::keys * Tile::pitch, lane, out);
  }

  const int end = end_of(a, b);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = row_sum(total[r]);
    if (row + 8 * r < end)
      store_row<T, dim>(a, holder_of(a, b), h, row + 8 * r, lane, r, top[r],
                        known[r] ? sum : not_a_number(), out);
  }
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int kInvalidConfiguration = 9, kNotSupported = 801;  // of cudaError_t

// Whether 16-byte loads reach every row; the stride of a dimension of size 1 does not matter.
bool rows_aligned(const AttentionArgs& a, int64_t batch, const void* data,
                  const int64_t (&stride)[3], int64_t rows) {
  const int64_t sizes[3] = {batch, a.heads, rows};
  bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && (sizes[i] == 1 || stride[i] % 8 == 0);
  return aligned;
}

// Rows of a block: as few warps as cover a head's rows in as few blocks as the most warps would;
// half as many where the grid would leave multiprocessors idle. Of packed samples the device knows
// the rows: they are taken for as many each, and the grid has as many blocks as they may ever need.
template <class T, int dim>
int launch(const AttentionArgs& a, cudaStream_t stream) {
  constexpr int64_t kFewBlocks = 128;    // about as many as there are multiprocessors
  constexpr int64_t kMost = 0x7fffff00;  // blocks, rows, keys: the last tile ends within an int
  const int64_t each = a.q_starts ? (a.rows + a.batch - 1) / a.batch : a.rows;
  int64_t most = 16 * Tiles<dim>::warps;
  if (a.batch * a.heads * ((each + most - 1) / most) < kFewBlocks) most /= 2;
  int64_t tiles = (each + most - 1) / most;
  const int64_t warps = (each + 16 * tiles - 1) / (16 * tiles);
  const int64_t samples = a.rows < a.batch ? a.rows : a.batch;  // that have rows, at most
  const int64_t heads = a.q_starts ? a.heads : a.batch * a.heads;
  tiles = a.q_starts ? (a.rows + samples * (16 * warps - 1)) / (16 * warps)
                     : (each + 16 * warps - 1) / (16 * warps);
  if (heads * tiles > kMost || a.rows > kMost || a.keys > kMost) return kInvalidConfiguration;
  const int64_t stored = a.q_starts ? 1 : a.batch;
  const bool aligned = a.dim % 8 == 0 && rows_aligned(a, stored, a.q, a.q_stride, a.queries) &&
                       rows_aligned(a, a.batch, a.k, a.k_stride, a.keys) &&
                       rows_aligned(a, a.batch, a.v, a.v_stride, a.keys);
  return GPU_LAUNCH((attention_tiles<T, dim>), dim3(unsigned(heads * tiles)),
                    dim3(unsigned(32 * warps)), Tiles<dim>::shared * sizeof(T), stream, a,
                    int(tiles), aligned);
}

template <class T>
int launch(const AttentionArgs& a, cudaStream_t stream) {
  if (a.dim <= 32) return launch<T, 32>(a, stream);
  if (a.dim <= 48) return launch<T, 48>(a, stream);
  if (a.dim <= 64) return launch<T, 64>(a, stream);
  if (a.dim <= 80) return launch<T, 80>(a, stream);
  if (a.dim <= 96) return launch<T, 96>(a, stream);
  if (a.dim <= 128) return launch<T, 128>(a, stream);
  if (a.dim <= 160) return launch<T, 160>(a, stream);
  if (a.dim <= 256) return launch<T, 256>(a, stream);
  return kNotSupported;
}

}  // namespace

extern "C" int fastdiff_gpu_attention(const AttentionArgs* a, void* stream) {
  switch (a->dtype) {
    case Dtype::kBf16: return launch<gpu::bf16>(*a, static_cast<cudaStream_t>(stream));
    case Dtype::kF16: return launch<gpu::f16>(*a, static_cast<cudaStream_t>(stream));
    case Dtype::kF32: return kNotSupported;  // tensor cores have no float32
  }
  return kNotSupported;
}
#else
#define FASTDIFF_INSTANTIATE(dim)                                                     \
  template __global__ void attention_tiles<gpu::bf16, dim>(AttentionArgs, int, bool); \
  template __global__ void attention_tiles<gpu::f16, dim>(AttentionArgs, int, bool);
FASTDIFF_INSTANTIATE(32)
FASTDIFF_INSTANTIATE(48)
FASTDIFF_INSTANTIATE(64)
FASTDIFF_INSTANTIATE(80)
FASTDIFF_INSTANTIATE(96)
FASTDIFF_INSTANTIATE(128)
FASTDIFF_INSTANTIATE(160)
FASTDIFF_INSTANTIATE(256)
#endif
}  // namespace fastdiff
