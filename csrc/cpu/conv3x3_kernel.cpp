// 3x3 convolution by Winograd's minimal filtering F(4x4, 3x3) (Lavin & Gray 2016,
// arXiv:1509.09308): 36 products for 16 pixels where the definition takes 144.
//
//   Y = A^T [ sum over channels of (G g G^T) * (B^T d B) ] A
//
// The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity: their transforms magnify rounding errors
// half as much as those of 0, +-1, +-2 do.
#include <algorithm>

#include "conv3x3.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

static constexpr int kProducts = 36;
static constexpr float kRoot = 1.41421356237309505f;

// Work memory that a thread keeps until it ends: its pages, given back and taken anew in every
// call, would cost several times the convolution (16 MB of new pages took 6 ms).
class Workspace {
  float* data_ = nullptr;
  size_t count_ = 0;

 public:
  float* take(size_t count) {
    if (count > count_) {
      release();
      data_ = static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t(64)));
      count_ = count;
    }
    return data_;
  }
  void release() {
    if (data_) ::operator delete(data_, std::align_val_t(64));
    data_ = nullptr;
    count_ = 0;
  }
  ~Workspace() { release(); }
};
static thread_local Workspace weight_space, tile_space;

// Columns (output channels) go in blocks of at most 64, as even as multiples of 16 allow; the last
// is filled up with zeros.
struct Blocks {
  int64_t vectors, count;
  explicit Blocks(int64_t out) : vectors((out + 15) / 16), count((vectors + 3) / 4) {}
  int64_t begin(int64_t block) const { return 16 * (vectors * block / count); }
  // 16 floats more than it holds, so that 36 planes do not share the sets of a cache.
  int64_t plane(int64_t in, int64_t first, int64_t last) const {
    return (begin(last) - begin(first)) * in + 16;
  }
};

// B^T of six values, in place.
static FD_INLINE void to_products(Vec& d0, Vec& d1, Vec& d2, Vec& d3, Vec& d4, Vec& d5) {
  const Vec half(0.5f), two(2.0f), five_halves(2.5f), root(kRoot), inverse(kRoot / 2);
  Vec t0 = fnma(five_halves, d2, d0) + d4;
  Vec even = fnma(two, d2, d4), odd = inverse * fnma(two, d1, d3);
  Vec even2 = fnma(half, d2, d4), odd2 = root * fnma(half, d1, d3);
  Vec t5 = fnma(five_halves, d3, d1) + d5;
  d0 = t0;
  d1 = even + odd;
  d2 = even - odd;
  d3 = even2 + odd2;
  d4 = even2 - odd2;
  d5 = t5;
}

// A^T of six products: four values.
static FD_INLINE void to_pixels(const Vec (&m)[6], Vec (&y)[4]) {
  Vec p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
  y[0] = m[0] + p + r;
  y[1] = fma(Vec(kRoot), s, Vec(kRoot / 2) * q);
  y[2] = fma(Vec(2.0f), r, Vec(0.5f) * p);
  y[3] = fma(Vec(2 * kRoot), s, fma(Vec(kRoot / 4), q, m[5]));
}

// c[M rows][N vectors] = a[M rows][depth] b[depth][N vectors], or added to c
template <int M, int N>
static FD_INLINE void product(const float* a, int64_t lda, const float* b, int64_t ldb,
                              int64_t depth, float* c, int64_t ldc, bool more) {
  constexpr int W = Vec::width;
  Vec sums[M][N];
  for (auto& row : sums)
    for (auto& v : row) v = Vec(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) columns[n] = Vec::load(b + k * ldb + n * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      Vec value(a[m * lda + k]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = fma(value, columns[n], sums[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* to = c + m * ldc + n * W;
      (more ? Vec::load(to) + sums[m][n] : sums[m][n]).store(to);
    }
}

template <int M, int N>
static void products(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                     float* c, int64_t ldc, int64_t rows, bool more) {
  int64_t row = 0;
  for (; row + M <= rows; row += M)
    product<M, N>(a + row * lda, lda, b, ldb, depth, c + row * ldc, ldc, more);
  if constexpr (M > 1)
    if (row < rows)
      products<M / 2, N>(a + row * lda, lda, b, ldb, depth, c + row * ldc, ldc, rows - row, more);
}

// All rows of one block of columns; accumulators fill the registers.
static void depth_product(const float* a, int64_t lda, const float* b, int64_t columns,
                          int64_t depth, float* c, int64_t ldc, int64_t rows, bool more) {
#ifdef __AVX512F__
  switch (columns / 16) {
    case 4: return products<6, 4>(a, lda, b, columns, depth, c, ldc, rows, more);
    case 3: return products<8, 3>(a, lda, b, columns, depth, c, ldc, rows, more);
    case 2: return products<12, 2>(a, lda, b, columns, depth, c, ldc, rows, more);
    default: return products<12, 1>(a, lda, b, columns, depth, c, ldc, rows, more);
  }
#else
  for (int64_t i = 0; i < columns; i += 16)
    products<6, 2>(a, lda, b + i, columns, depth, c + i, ldc, rows, more);
#endif
}

// Sums over 256 channels at a time: half the rounding error of one chain of 1,280.
static void block_product(const float* a, int64_t lda, const float* b, int64_t columns,
                          int64_t depth, float* c, int64_t ldc, int64_t rows) {
  int64_t k = 0;
  do {
    const int64_t count = std::min<int64_t>(256, depth - k);
    depth_product(a + k, lda, b + k * columns, columns, count, c, ldc, rows, k > 0);
    k += count;
  } while (k < depth);
}

struct Tile {
  int64_t image, row, column;  // of its first pixel
};

static Tile tile_at(const Conv3x3Args& a, int64_t index) {
  int64_t across = (a.width + 3) / 4, down = (a.height + 3) / 4;
  return {index / (across * down), index / across % down * 4, index % across * 4};
}

// B^T d B of the 6x6 pixels around a tile: 36 rows of `in` values, `stride` apart.
static void transform_in(const Conv3x3Args& a, const Tile& tile, const float* zeros, float* to,
                         int64_t stride) {
  const int shift = a.upsample;
  const int64_t height = a.height >> shift, width = a.width >> shift;
  const float* pixels[kProducts];
  for (int i = 0; i < 6; ++i)
    for (int j = 0; j < 6; ++j) {
      int64_t row = tile.row + i - 1, column = tile.column + j - 1;
      bool inside = row >= 0 && row < a.height && column >= 0 && column < a.width;
      pixels[i * 6 + j] =
          inside ? a.x + ((tile.image * height + (row >> shift)) * width + (column >> shift)) * a.in
                 : zeros;
    }
  each(a.in, [&](int64_t c, auto part) {
    Vec d[6][6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) {
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) d[i][j] = part.load(pixels[i * 6 + j] + c);
      to_products(d[0][j], d[1][j], d[2][j], d[3][j], d[4][j], d[5][j]);
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      to_products(d[i][0], d[i][1], d[i][2], d[i][3], d[i][4], d[i][5]);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) part.store(d[i][j], to + (i * 6 + j) * stride + c);
    }
  });
}

// A^T m A, bias and residual of a tile: `count` columns from `column` on.
static void transform_out(const Conv3x3Args& a, const Tile& tile, const float* from, int64_t stride,
                          int64_t column, int64_t count) {
  const int64_t rows = std::min<int64_t>(4, a.height - tile.row);
  const int64_t columns = std::min<int64_t>(4, a.width - tile.column);
  const int64_t first =
      ((tile.image * a.height + tile.row) * a.width + tile.column) * a.out + column;
  const float* biases = a.bias ? a.bias + tile.image * a.bias_stride + column : nullptr;
  each(count, [&](int64_t c, auto part) {
    Vec half[6][4], y[4][4];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      Vec m[6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) m[j] = Vec::load(from + (i * 6 + j) * stride + c);
      to_pixels(m, half[i]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Vec m[6], column[4];
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) m[i] = half[i][j];
      to_pixels(m, column);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) y[i][j] = column[i];
    }
    Vec bias = biases ? part.load(biases + c) : Vec(0.0f);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        int64_t at = first + (i * a.width + j) * a.out + c;
        Vec value = y[i][j] + bias;
        if (a.add) value = value + part.load(a.add + at);
        part.store(value, a.y + at);
      }
  });
}

// G of three values: six.
static FD_INLINE void to_products(const Vec (&g)[3], Vec (&u)[6]) {
  const Vec third(1.0f / 3), root3(kRoot / 3), root6(kRoot / 6), sixth(1.0f / 6);
  Vec even = fma(Vec(2.0f), g[0], g[2]) * third, odd = root3 * g[1];
  Vec even2 = fma(third, g[2], sixth * g[0]), odd2 = root6 * g[1];
  u[0] = g[0];
  u[1] = Vec(0.0f) - (even + odd);
  u[2] = odd - even;
  u[3] = even2 + odd2;
  u[4] = even2 - odd2;
  u[5] = g[2];
}

// G g G^T of the blocks [first, last): 36 planes of [blocks, in, columns of the block].
static void transform_weight(const Conv3x3Args& a, const Blocks& blocks, int64_t first,
                             int64_t last, float* packed) {
  constexpr int W = Vec::width;
  const int64_t plane = blocks.plane(a.in, first, last);
  parallel_for(first * a.in, last * a.in, 64, [&](int64_t begin, int64_t end) {
    alignas(64) float lanes[9][W];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / a.in, k = i % a.in;
      const int64_t column = blocks.begin(block), width = blocks.begin(block + 1) - column;
      float* to = packed + (column - blocks.begin(first)) * a.in + k * width;
      for (int64_t n = 0; n < width; n += W) {
        for (int64_t lane = 0; lane < W; ++lane) {
          const bool inside = column + n + lane < a.out;
          const float* w = a.weight + (column + n + lane) * a.weight_out + k * a.weight_in;
          for (int tap = 0; tap < 9; ++tap)
            lanes[tap][lane] =
                inside ? w[tap / 3 * a.weight_row + tap % 3 * a.weight_column] : 0.0f;
        }
        Vec half[3][6];
#pragma GCC unroll 3
        for (int j = 0; j < 3; ++j) {
          Vec g[3];
#pragma GCC unroll 3
          for (int r = 0; r < 3; ++r) g[r] = Vec::load(lanes[3 * r + j]);
          to_products(g, half[j]);
        }
#pragma GCC unroll 6
        for (int r = 0; r < 6; ++r) {
          Vec g[3] = {half[0][r], half[1][r], half[2][r]}, u[6];
          to_products(g, u);
#pragma GCC unroll 6
          for (int c = 0; c < 6; ++c) u[c].store(to + (r * 6 + c) * plane + n);
        }
      }
    }
  });
}

// The columns of the blocks [first, last) of y.
static void convolve(const Conv3x3Args& a, const Blocks& blocks, int64_t first, int64_t last,
                     const float* packed) {
  const int64_t tiles = a.batch * ((a.height + 3) / 4) * ((a.width + 3) / 4);
  const int64_t plane = blocks.plane(a.in, first, last);
  const int64_t column0 = blocks.begin(first), columns = blocks.begin(last) - column0;
  // Up to 24 tiles together, which 12, 8 and 6 divide: their values and products stay in the core's
  // own cache (48 and 96 are slower at all sizes seen), and every thread gets as many.
  const int64_t rounds = (tiles + 24 * a.threads - 1) / (24 * a.threads);
  const int64_t group = (tiles + rounds * a.threads - 1) / (rounds * a.threads);
  parallel_for(0, (tiles + group - 1) / group, 1, [&](int64_t begin, int64_t end) {
    // 16 floats more, so that the 36 rows of a tile do not share the sets of a cache
    const int64_t in_stride = group * a.in + 16, out_stride = group * columns + 16;
    float* values = tile_space.take(kProducts * (in_stride + out_stride) + a.in);
    float *sums = values + kProducts * in_stride, *zeros = sums + kProducts * out_stride;
    std::memset(zeros, 0, size_t(a.in) * sizeof(float));
    for (int64_t g = begin; g < end; ++g) {
      const int64_t tile = g * group, count = std::min(group, tiles - tile);
      for (int64_t t = 0; t < count; ++t)
        transform_in(a, tile_at(a, tile + t), zeros, values + t * a.in, in_stride);
      for (int64_t p = 0; p < kProducts; ++p)
        for (int64_t block = first; block < last; ++block) {
          const int64_t at = blocks.begin(block) - column0;
          block_product(values + p * in_stride, a.in, packed + p * plane + at * a.in,
                        blocks.begin(block + 1) - column0 - at, a.in, sums + p * out_stride + at,
                        columns, count);
        }
      for (int64_t t = 0; t < count; ++t)
        transform_out(a, tile_at(a, tile + t), sums + t * columns, out_stride, column0,
                      std::min(columns, a.out - column0));
    }
  });
}

// Weights are transformed in every call, which costs little and leaves nothing that a change of
// them could make stale; as many columns at a time as stay in the last cache, so that the work
// memory stays small next to the weights.
void conv3x3(const Conv3x3Args& a) {
  constexpr int64_t kPacked = int64_t(4) << 20;  // floats
  const Blocks blocks(a.out);
  const int64_t most = std::max<int64_t>(1, kPacked / (kProducts * 64 * a.in));
  const int64_t step = std::min(most, blocks.count);
  float* packed = weight_space.take(kProducts * (64 * step * a.in + 16));
  for (int64_t first = 0; first < blocks.count; first += step) {
    const int64_t last = std::min(first + step, blocks.count);
    transform_weight(a, blocks, first, last, packed);
    convolve(a, blocks, first, last, packed);
  }
}

FASTDIFF_KERNEL_END
