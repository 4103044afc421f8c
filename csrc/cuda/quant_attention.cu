// Attention whose scores are products of int8 (SageAttention, Zhang et al. 2024, arXiv:2410.02367),
// in three kernels: the means of the keys, the keys as int8 with a scale each, and attention.
//
// A block of the last owns the query rows of one head that its warps have between them, 16 a warp,
// as in attention.cu. It rounds them to int8 itself: four lanes have a row, in the registers that
// the products take them in, and every row is one block's. Keys, their scales and values come in
// tiles through shared memory, one worked on while the next is on its way. Each element of q is
// read twice, of k too and once more for the mean, of integers and v once a block.
//
// Weights and v are multiplied on tensor cores in the dtype of v. A float32 is three bfloat16 there
// that sum to it, eight bits each: the six products that float32 does not round away.
#include "cpu/quant_attention.h"
#include "gpu.h"
#include "softmax.h"

namespace fastdiff {
using Scratch = QuantAttentionGpuScratch;

namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLevels = 127.0f;
constexpr float kTiny = 127.0f * 1.17549435e-38f;  // 127 2^-126
constexpr int kMeanThreads = 512, kKeyThreads = 256;
constexpr int kKeyRows = kKeyThreads / 4;  // of a block: the keys of a head are padded to it

// What a value is to tensor cores.
template <class T>
struct Value {
  using Part = T;
  static constexpr int parts = 1;
};
template <>
struct Value<float> {
  using Part = gpu::bf16;
  static constexpr int parts = 3;
};

// Sizes for up to `dim` channels, a multiple of 16, with which no register spills on sm_80 to
// sm_120. A stage has int8 keys, values and scales, in bytes.
template <class T, int dim>
struct Tiles {
  static constexpr int parts = Value<T>::parts;
  static constexpr int width = (dim + 31) / 32 * 32;
  static constexpr int keys = parts == 1 && dim <= 160 ? 64 : 32;
  static constexpr int warps = dim > 64 && dim <= 160 ? 8 : 4;
  // An odd number of 16 bytes: eight rows of a column lie in different banks.
  static constexpr int k_pitch = width + 16, v_pitch = dim + 8;
  static constexpr int v = keys * k_pitch;
  static constexpr int scale = v + parts * keys * v_pitch * 2;
  static constexpr int stage = scale + keys * 4;
  static constexpr int blocks = dim <= 64 ? 3 : 1;  // that registers of a multiprocessor are for
};

__device__ __forceinline__ signed char* integers(const QuantAttentionArgs& a, const Scratch& at) {
  return reinterpret_cast<signed char*>(a.scratch + at.k);
}
__device__ __forceinline__ gpu::bf16* parts_of_v(const QuantAttentionArgs& a, const Scratch& at) {
  return reinterpret_cast<gpu::bf16*>(a.scratch + at.v);
}

// Channels d to d + 3 of a row, zeros where `row` is null and at and past `dim`.
template <class T>
__device__ __forceinline__ void load(const T* row, int d, int dim, bool aligned, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = 0.0f;
  if (!row) return;
  if (aligned) {
    if (d < dim) gpu::load4(row + d, x);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (d + i < dim) x[i] = gpu::to_float(row[d + i]);
}

// A row less its means as int8, in four lanes: lane t of them has channels 16 c + 4 t to 16 c +
// 4 t + 3, for c < chunks, and put(c, word) their integers. Gives the row's scale.
template <class T, class Put>
__device__ __forceinline__ float quantise(const T* row, const float* mean, int chunks, int dim,
                                          bool aligned, int t, Put put) {
  const auto values = [&](int c, float (&x)[4]) {
    const int d = 16 * c + 4 * t;
    load(row, d, dim, aligned, x);
    if (!mean || !row) return;
    float m[4];
    gpu::load4(mean + d, m);  // zeros past dim
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] -= m[i];
  };
  float x[4], most = 0.0f;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    values(c, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float size = fabsf(x[i]);
      most = fmaxf(most, size < INFINITY ? size : INFINITY);  // a NaN counts as infinite
    }
  }
  most = row_max(most);
  const bool finite = most < INFINITY, usable = finite && most >= kTiny;
  // 127 / most as torch has it: a reciprocal, then a product.
  const float inverse = usable ? __fmul_rn(__fdiv_rn(1.0f, most), kLevels) : 0.0f;
#pragma unroll
  for (int c = 0; c < chunks; ++c) {
    signed char e[4] = {};
    if (usable) {
      values(c, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float level = rintf(__fmul_rn(x[i], inverse));
        e[i] = static_cast<signed char>(fminf(fmaxf(level, -kLevels), kLevels));
      }
    }
    unsigned word;
    memcpy(&word, e, sizeof(word));
    put(c, word);
  }
  return !finite ? __int_as_float(0x7fc00000) : usable ? __fdiv_rn(most, kLevels) : 0.0f;
}

// The first eight bits of x.
__device__ __forceinline__ float first_bits(float x) {
  return __int_as_float(int(__float_as_uint(x) & 0xffff0000u));
}

// Keys `first` to first + keys - 1 to one stage; of v zeros past `length`.
template <class T, int dim, class Part>
__device__ __forceinline__ void copy_keys(const signed char* k, const float* scale, const Part* v,
                                          int64_t v_stride, int v_dim, bool aligned,
                                          unsigned char* stage, int first, int length) {
  using Tile = Tiles<T, dim>;
  constexpr int kPacks = Tile::width / 16;
  for (int i = int(threadIdx.x); i < Tile::keys * kPacks; i += int(blockDim.x)) {
    const int row = i / kPacks, byte = i % kPacks * 16;
    gpu::cp_async16(stage + row * Tile::k_pitch + byte,
                    k + (int64_t(first) + row) * Tile::width + byte);
  }
  Part* tile = reinterpret_cast<Part*>(stage + Tile::v);
  for (int i = int(threadIdx.x); i < Tile::keys * (dim / 8); i += int(blockDim.x)) {
    const int row = i / (dim / 8), d = i % (dim / 8) * 8;
    const int64_t key = first + row;  // whose offset passes 2^31
#pragma unroll
    for (int p = 0; p < Tile::parts; ++p)
      gpu::copy8(tile + (p * Tile::keys + row) * Tile::v_pitch + d,
                 key < length ? v + key * v_stride + p * dim : nullptr, d, v_dim, aligned);
  }
  for (int i = int(threadIdx.x); i < Tile::keys / 4; i += int(blockDim.x))
    gpu::cp_async16(stage + Tile::scale + 16 * i, scale + first + 4 * i);
}

// Scores of a warp's 16 rows and one tile of keys; q_scale: of the lane's two rows.
template <class T, int dim>
__device__ __forceinline__ void scores(const unsigned (&q)[Tiles<T, dim>::width / 32][4],
                                       const float (&q_scale)[2], const unsigned char* stage,
                                       int lane, float (&s)[Tiles<T, dim>::keys / 8][4]) {
  using Tile = Tiles<T, dim>;
  const unsigned char* at = stage + (lane % 8 + lane / 16 * 8) * Tile::k_pitch + lane / 8 % 2 * 16;
  const float* k_scale = reinterpret_cast<const float*>(stage + Tile::scale) + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < Tile::keys / 8; n += 2) {
    int sum[2][4] = {};
#pragma unroll
    for (int d = 0; d < Tile::width / 32; ++d) {
      unsigned b[4];
      gpu::ldmatrix_x4<false>(b, at + n * 8 * Tile::k_pitch + d * 32);
      gpu::mma_16816<gpu::s8x2>(sum[0], q[d], b[0], b[1]);
      gpu::mma_16816<gpu::s8x2>(sum[1], q[d], b[2], b[3]);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        s[n + m][e] = float(sum[m][e]) * (k_scale[8 * (n + m) + e % 2] * q_scale[e / 2]);
  }
}

// out += weight v for one tile of keys; a weight is rounded as v is, or comes in as many parts.
template <class T, int dim>
__device__ __forceinline__ void add_values(const float (&weight)[Tiles<T, dim>::keys / 8][4],
                                           const unsigned char* stage, int lane,
                                           float (&out)[dim / 8][4]) {
  using Tile = Tiles<T, dim>;
  using Part = typename Value<T>::Part;
  constexpr int kParts = Tile::parts;
  const Part* at =
      reinterpret_cast<const Part*>(stage + Tile::v) + lane % 16 * Tile::v_pitch + lane / 16 * 8;
#pragma unroll
  for (int n = 0; n < Tile::keys / 16; ++n) {
    unsigned p[kParts][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float low = weight[2 * n + i / 2][i % 2 * 2], high = weight[2 * n + i / 2][i % 2 * 2 + 1];
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        const bool last = j == kParts - 1;
        const float a = last ? low : first_bits(low), b = last ? high : first_bits(high);
        p[j][i] = gpu::pack<Part>(a, b);
        low -= a, high -= b;
      }
    }
#pragma unroll
    for (int d = 0; d < dim / 16; ++d)
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        unsigned b[4];
        gpu::ldmatrix_x4<true>(b, at + (j * Tile::keys + n * 16) * Tile::v_pitch + d * 16);
#pragma unroll
        for (int i = 0; i < kParts - j; ++i) {
          gpu::mma_16816<Part>(out[2 * d], p[i], b[0], b[1]);
          gpu::mma_16816<Part>(out[2 * d + 1], p[i], b[2], b[3]);
        }
      }
  }
}

// The lane's part of a row of the output, r of its two; without keys 0.
template <class T, int dim>
__device__ __forceinline__ void store_row(const QuantAttentionArgs& a, T* to, int lane, int r,
                                          float total, const float (&out)[dim / 8][4]) {
  const float inverse = a.keys ? 1.0f / total : 0.0f;
  const int value_dim = int(a.value_dim);
#pragma unroll
  for (int n = 0; n < dim / 8; ++n) {
    const int d = 8 * n + lane % 4 * 2;
    const Pair<T> pair{gpu::from_float<T>(out[n][2 * r] * inverse),
                       gpu::from_float<T>(out[n][2 * r + 1] * inverse)};
    if (value_dim % 2 == 0) {
      if (d < value_dim) *reinterpret_cast<Pair<T>*>(to + d) = pair;
    } else {
      if (d < value_dim) to[d] = pair.low;
      if (d + 1 < value_dim) to[d + 1] = pair.high;
    }
  }
}

}  // namespace

// The means over the keys, of float64 sums. Grid: batch * heads * (width / 32) blocks, a lane a
// channel, the keys dealt out to warps. Shared: double[kMeanThreads].
template <class T>
__global__ void __launch_bounds__(kMeanThreads)
    quant_attention_means(QuantAttentionArgs a, Scratch at) {
  GPU_SHARED(double, shared);
  constexpr int kWarps = kMeanThreads / 32;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, parts = int(at.width) / 32;
  const int head = int(blockIdx.x) / parts, h = head % int(a.heads), b = head / int(a.heads);
  const int d = int(blockIdx.x) % parts * 32 + lane;
  double sum = 0.0;
  if (d < a.dim) {
    const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + h * a.k_stride[1] + d;
#pragma unroll 4
    for (int64_t key = warp; key < a.keys; key += kWarps)
      sum += double(gpu::to_float(k[key * a.k_stride[2]]));
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp) return;
  for (int w = 1; w < kWarps; ++w) sum += shared[32 * w + lane];
  (a.scratch + at.mean)[head * at.width + d] = float(sum / double(a.keys));  // 0 past dim
}

// Keys as int8 less their means, with a scale each, zeros past the last; and v of float32 in parts,
// an infinity or NaN in the last of them, which small parts of weights do not meet. Grid: batch *
// heads * (keys / kKeyRows) blocks, four lanes a key.
template <class T>
__global__ void __launch_bounds__(kKeyThreads, 4)
    quant_attention_keys(QuantAttentionArgs a, Scratch at, bool k_aligned, bool v_aligned) {
  const int tiles = int(at.keys) / kKeyRows, thread = int(threadIdx.x), t = thread % 4;
  const int head = int(blockIdx.x) / tiles, h = head % int(a.heads), b = head / int(a.heads);
  const int first = int(blockIdx.x) % tiles * kKeyRows;
  const int64_t key = first + thread / 4, slot = head * at.keys + key;
  const T* k = static_cast<const T*>(a.k) + b * a.k_stride[0] + h * a.k_stride[1];
  const float* mean = a.smooth ? a.scratch + at.mean + head * at.width : nullptr;
  signed char* to = integers(a, at) + slot * at.width + 4 * t;
  const float scale =
      quantise(key < a.keys ? k + key * a.k_stride[2] : nullptr, mean, int(at.width) / 16,
               int(a.dim), k_aligned, t,
               [&](int c, unsigned word) { *reinterpret_cast<unsigned*>(to + 16 * c) = word; });
  if (t == 0) (a.scratch + at.k_scale)[slot] = scale;

  if constexpr (Value<T>::parts > 1) {
    const T* v = static_cast<const T*>(a.v) + b * a.v_stride[0] + h * a.v_stride[1];
    const int packs = int(at.dim) / 4;
    for (int i = thread; i < kKeyRows * packs; i += kKeyThreads) {
      const int64_t row = first + i / packs;
      const int d = i % packs * 4;
      if (row >= a.keys) return;
      float x[4], part[4];
      load(v + row * a.v_stride[2], d, int(a.value_dim), v_aligned, x);
#pragma unroll
      for (int p = 0; p < 3; ++p) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          part[j] = p == 2 ? x[j] : fabsf(x[j]) < INFINITY ? first_bits(x[j]) : 0.0f;
          x[j] -= part[j];
        }
        gpu::store4(part, parts_of_v(a, at) + ((head * a.keys + row) * 3 + p) * at.dim + d);
      }
    }
  }
}

// Grid: batch * heads * tiles blocks, the tiles of a head side by side, so that its keys and values
// stay in cache. Shared: two stages.
template <class T, int dim>
__global__ void __launch_bounds__(32 * Tiles<T, dim>::warps, Tiles<T, dim>::blocks)
    quant_attention_tiles(QuantAttentionArgs a, Scratch at, int tiles, bool q_aligned,
                          bool v_aligned) {
  using Tile = Tiles<T, dim>;
  using Part = typename Value<T>::Part;
  GPU_SHARED(unsigned char, shared);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int head = int(blockIdx.x) / tiles, h = head % int(a.heads), b = head / int(a.heads);
  const int row =
      int(blockIdx.x) % tiles * (int(blockDim.x) / 2) + warp * 16 + lane / 4;  // and row + 8
  const signed char* k = integers(a, at) + head * at.keys * Tile::width;
  const float* k_scale = a.scratch + at.k_scale + head * at.keys;
  const int length = int(a.keys);
  const Part* v;
  if constexpr (Tile::parts > 1) {
    v = parts_of_v(a, at) + head * a.keys * Tile::parts * dim;
  } else {
    v = static_cast<const Part*>(a.v) + b * a.v_stride[0] + h * a.v_stride[1];
  }
  const auto copy = [&](int stage, int first) {
    copy_keys<T, dim>(k, k_scale, v, Tile::parts > 1 ? Tile::parts * dim : a.v_stride[2],
                      Tile::parts > 1 ? dim : int(a.value_dim), v_aligned,
                      shared + stage * Tile::stage, first, length);
    gpu::cp_async_commit();
  };
  if (length) copy(0, 0);

  unsigned q_part[Tile::width / 32][4];
  float q_scale[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const T* q = static_cast<const T*>(a.q) + b * a.q_stride[0] + h * a.q_stride[1];
    const int64_t query = row + 8 * r;
    q_scale[r] = quantise(query < a.rows ? q + query * a.q_stride[2] : nullptr, nullptr,
                          Tile::width / 16, int(a.dim), q_aligned, lane % 4,
                          [&](int c, unsigned word) { q_part[c / 2][c % 2 * 2 + r] = word; });
    q_scale[r] *= a.scale * kLog2e;
  }

  float out[dim / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  int stage = 0;
  for (int first = 0; first < length; first += Tile::keys, stage ^= 1) {
    gpu::cp_async_wait<0>();
    __syncthreads();  // this tile is there for every warp, and none needs the other stage
    if (first + Tile::keys < length) copy(stage ^ 1, first + Tile::keys);
    const unsigned char* tile = shared + stage * Tile::stage;
    float s[Tile::keys / 8][4];
    scores<T, dim>(q_part, q_scale, tile, lane, s);
    if (first + Tile::keys > length) mask(s, first + lane % 4 * 2, length);
    soften(s, top, total, out);
    add_values<T, dim>(s, tile, lane, out);
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = row_sum(total[r]);
    const int64_t query = row + 8 * r;
    if (query < a.rows)
      store_row<T, dim>(a,
                        static_cast<T*>(a.out) + ((b * a.rows + query) * a.heads + h) * a.value_dim,
                        lane, r, sum, out);
  }
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int kInvalidConfiguration = 9, kNotSupported = 801;  // of cudaError_t
constexpr int64_t kMost = 0x7fffff00;  // blocks, rows, keys: the last tile ends within an int

// Whether loads of `many` elements reach every row; the stride of a dimension of size 1 does not
// matter.
bool aligned(const QuantAttentionArgs& a, const void* data, const int64_t (&stride)[3],
             int64_t rows, int64_t dim, int many) {
  const int64_t sizes[3] = {a.batch, a.heads, rows};
  const size_t bytes = many * (a.dtype == Dtype::kF32 ? 4 : 2);
  bool all = reinterpret_cast<uintptr_t>(data) % bytes == 0 && dim % many == 0;
  for (int i = 0; i < 3; ++i) all = all && (sizes[i] == 1 || stride[i] % many == 0);
  return all;
}

// Rows of a block: as few warps as cover a head's rows in as few blocks as the most warps would;
// half as many where the grid would leave multiprocessors idle. Not measured on a GPU.
template <class T, int dim>
int launch_tiles(const QuantAttentionArgs& a, const Scratch& at, cudaStream_t stream) {
  using Tile = Tiles<T, dim>;
  constexpr int64_t kFewBlocks = 128;  // about as many as there are multiprocessors
  const int64_t heads = a.batch * a.heads;
  int64_t most = 16 * Tile::warps;
  if (heads * ((a.rows + most - 1) / most) < kFewBlocks) most /= 2;
  int64_t tiles = (a.rows + most - 1) / most;
  const int64_t warps = (a.rows + 16 * tiles - 1) / (16 * tiles);
  tiles = (a.rows + 16 * warps - 1) / (16 * warps);
  if (heads * tiles > kMost) return kInvalidConfiguration;
  return GPU_LAUNCH((quant_attention_tiles<T, dim>), dim3(unsigned(heads * tiles)),
                    dim3(unsigned(32 * warps)), 2 * Tile::stage, stream, a, at, int(tiles),
                    aligned(a, a.q, a.q_stride, a.rows, a.dim, 4),
                    Tile::parts > 1 || aligned(a, a.v, a.v_stride, a.keys, a.value_dim, 8));
}

template <class T>
int launch_keys(const QuantAttentionArgs& a, const Scratch& at, cudaStream_t stream) {
  const int64_t heads = a.batch * a.heads, blocks = heads * (at.keys / kKeyRows);
  if (blocks > kMost || heads * at.width > kMost) return kInvalidConfiguration;
  int error = 0;
  if (a.smooth)
    error = GPU_LAUNCH((quant_attention_means<T>), dim3(unsigned(heads * (at.width / 32))),
                       dim3(kMeanThreads), kMeanThreads * sizeof(double), stream, a, at);
  if (error) return error;
  return GPU_LAUNCH((quant_attention_keys<T>), dim3(unsigned(blocks)), dim3(kKeyThreads), 0, stream,
                    a, at, aligned(a, a.k, a.k_stride, a.keys, a.dim, 4),
                    aligned(a, a.v, a.v_stride, a.keys, a.value_dim, 4));
}

template <class T>
int launch(const QuantAttentionArgs& a, cudaStream_t stream) {
  if (a.rows > kMost || a.keys > kMost) return kInvalidConfiguration;
  const Scratch at(a);
  if (!at.dim) return kNotSupported;
  const int error = a.keys ? launch_keys<T>(a, at, stream) : 0;
  if (error) return error;
  switch (at.dim) {
    case 48: return launch_tiles<T, 48>(a, at, stream);
    case 64: return launch_tiles<T, 64>(a, at, stream);
    case 80: return launch_tiles<T, 80>(a, at, stream);
    case 128: return launch_tiles<T, 128>(a, at, stream);
  }
  if constexpr (Value<T>::parts == 1) {
    if (at.dim == 160) return launch_tiles<T, 160>(a, at, stream);
    return launch_tiles<T, 256>(a, at, stream);
  }
  return kNotSupported;
}

}  // namespace

extern "C" int fastdiff_gpu_quant_attention(const QuantAttentionArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE_TILES(T, dim)                                                       \
  template __global__ void quant_attention_tiles<T, dim>(QuantAttentionArgs, Scratch, int, bool, \
                                                         bool);
#define FASTDIFF_INSTANTIATE(T)                                                              \
  template __global__ void quant_attention_means<T>(QuantAttentionArgs, Scratch);            \
  template __global__ void quant_attention_keys<T>(QuantAttentionArgs, Scratch, bool, bool); \
  FASTDIFF_INSTANTIATE_TILES(T, 48)                                                          \
  FASTDIFF_INSTANTIATE_TILES(T, 64)                                                          \
  FASTDIFF_INSTANTIATE_TILES(T, 80)                                                          \
  FASTDIFF_INSTANTIATE_TILES(T, 128)
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
FASTDIFF_INSTANTIATE_TILES(gpu::bf16, 160)
FASTDIFF_INSTANTIATE_TILES(gpu::bf16, 256)
FASTDIFF_INSTANTIATE_TILES(gpu::f16, 160)
FASTDIFF_INSTANTIATE_TILES(gpu::f16, 256)
#endif
}  // namespace fastdiff
