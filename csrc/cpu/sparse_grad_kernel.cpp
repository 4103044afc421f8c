// Weight gradients at some entries: every one is a dot product over all rows. Both operands are
// turned first, so that what an entry multiplies lies in memory as it is read: a column of grad
// beside one of x, or planes of an image, where a tap of a convolution is a shift of a plane whose
// rows are wide enough for it (the gap that a shift runs into meets zeros of grad; strides take the
// image apart into as many interleaved ones). Then 8 entries of a row of the weight go together
// (blocks: 4 x 4 of them), and the lanes of their sums are added up at the end of a chunk of rows,
// which is as long as leaves all of x's chunk in the second cache level: an entry costs one load
// and a bit for 16 (AVX2: 8) of its rows, 1 of 20 entries about a sixth of the dense product.
// Every entry is summed by one thread in the order of chunks: threads change no bit.
#include <algorithm>
#include <cstring>

#include "grouped_linear_tiles.h"
#include "sparse_grad.h"

FASTDIFF_KERNEL_BEGIN

namespace {

constexpr int kGroup = 8;                   // entries of a row that go together
constexpr int kTileRows = W == 16 ? 4 : 2;  // of a block
constexpr int kTileCols = 4;
constexpr int64_t kChunkBytes = 384 << 10;  // of x at a time
constexpr int64_t kTurnedBytes = 4 << 20;   // of a layer's rows at a time: threads meet twice for
constexpr int64_t kMostBytes = 8 << 20;     // each; of images

int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// to[c * to_stride + r] = from[r * stride + c]: `rows` x `columns`. Of the last vector of rows the
// lanes past the end are written too, as zeros, where `pad`.
template <class T>
void turn(const T* from, int64_t stride, int64_t rows, int64_t columns, float* to,
          int64_t to_stride, bool pad) {
  for (int64_t r = 0; r < rows; r += W) {
    const int left = rows - r < W ? int(rows - r) : W;
    for (int64_t c = 0; c < columns; c += W) {
      const int wide = columns - c < W ? int(columns - c) : W;
      Vec v[W];
      for (int i = 0; i < W; ++i) {
        const T* p = from + (r + i) * stride + c;
        v[i] = i >= left ? Vec(0.0f) : wide == W ? Vec::load(p) : Vec::load(p, wide);
      }
      transpose(v);
      for (int i = 0; i < wide; ++i) {
        float* p = to + (c + i) * to_stride + r;
        if (left == W || pad)
          v[i].store(p);
        else
          v[i].store(p, left);
      }
    }
  }
}

// sums[i * N + j] = a[i] . b[j] over `count` elements, a multiple of W.
template <int M, int N>
FD_INLINE void dots_of(const float* const (&a)[M], const float* const (&b)[N], int64_t count,
                       float* sums) {
  Vec sum[M * N];
#pragma GCC unroll 16
  for (int i = 0; i < M * N; ++i) sum[i] = Vec(0.0f);
  for (int64_t k = 0; k < count; k += W) {
    Vec u[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) u[i] = Vec::load(a[i] + k);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Vec v = Vec::load(b[j] + k);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) sum[i * N + j] = fma(u[i], v, sum[i * N + j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < M * N; i += kQuad) {
    const Vec quad[kQuad] = {sum[i], sum[i + 1], sum[i + 2], sum[i + 3]};
    _mm_storeu_ps(sums + i, sums_of(quad));
  }
}

// The turned operands: row o of a at a + o * a_stride.
struct Turned {
  const float *a, *b;
  int64_t a_stride;
};

// The lanes of eight vectors added up.
FD_INLINE __m256 lane_sums(const Vec (&s)[kGroup]) {
#ifdef __AVX512F__
  const Vec low[kQuad] = {s[0], s[1], s[2], s[3]}, high[kQuad] = {s[4], s[5], s[6], s[7]};
  return _mm256_set_m128(sums_of(high), sums_of(low));
#else
  const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps(s[0].v, s[1].v), _mm256_hadd_ps(s[2].v, s[3].v));
  const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps(s[4].v, s[5].v), _mm256_hadd_ps(s[6].v, s[7].v));
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#endif
}

// Entries begin to end of out (+)= their dot products over `count` elements from `k` on; at(e):
// where what entry e multiplies lies in b.
template <class At>
void entries(const Turned& from, const int32_t* crow, int64_t rows, int64_t begin, int64_t end,
             int64_t k, int64_t count, bool add, float* out, At at) {
  int64_t o = std::upper_bound(crow, crow + rows + 1, int32_t(begin)) - crow - 1;
  const float* const base = from.b + k;
  for (int64_t e = begin; e < end; ++o) {
    const int64_t stop = std::min<int64_t>(end, crow[o + 1]);
    const float* const a = from.a + o * from.a_stride + k;
    for (; e < stop; e += kGroup) {
      const int n = int(std::min<int64_t>(kGroup, stop - e));
      const float* b[kGroup];
      for (int j = 0; j < kGroup; ++j) b[j] = base + at(e + (n == kGroup || j < n ? j : n - 1));
      Vec sum[kGroup];
#pragma GCC unroll 8
      for (int j = 0; j < kGroup; ++j) sum[j] = Vec(0.0f);
#pragma GCC unroll 2
      for (int64_t i = 0; i < count; i += W) {
        const Vec u = Vec::load(a + i);
#pragma GCC unroll 8
        for (int j = 0; j < kGroup; ++j) sum[j] = fma(u, Vec::load(b[j] + i), sum[j]);
      }
      const __m256 found = lane_sums(sum);
      if (n == kGroup) {
        _mm256_storeu_ps(out + e, add ? _mm256_add_ps(found, _mm256_loadu_ps(out + e)) : found);
      } else {
        float sums[kGroup];
        _mm256_storeu_ps(sums, found);
        for (int j = 0; j < n; ++j) out[e + j] = add ? out[e + j] + sums[j] : sums[j];
      }
    }
    e = stop;
  }
}

// The same of blocks, `height` x `width` each.
void blocks(const Turned& from, const int32_t* crow, const int32_t* col, int64_t rows,
            int64_t begin, int64_t end, int height, int width, int64_t b_stride, int64_t count,
            bool add, float* out) {
  int64_t o = std::upper_bound(crow, crow + rows + 1, int32_t(begin)) - crow - 1;
  for (int64_t e = begin; e < end; ++e) {
    while (crow[o + 1] <= e) ++o;
    const float* a0 = from.a + o * height * from.a_stride;
    const float* b0 = from.b + int64_t(col[e]) * width * b_stride;
    for (int i = 0; i < height; i += kTileRows)
      for (int j = 0; j < width; j += kTileCols) {
        const float *a[kTileRows], *b[kTileCols];
        for (int m = 0; m < kTileRows; ++m) a[m] = a0 + std::min(i + m, height - 1) * from.a_stride;
        for (int n = 0; n < kTileCols; ++n) b[n] = b0 + std::min(j + n, width - 1) * b_stride;
        float sums[kTileRows * kTileCols];
        dots_of(a, b, count, sums);
        for (int m = 0; m < kTileRows && i + m < height; ++m)
          for (int n = 0; n < kTileCols && j + n < width; ++n) {
            float& to = out[(e * height + i + m) * width + j + n];
            to = add ? to + sums[m * kTileCols + n] : sums[m * kTileCols + n];
          }
      }
  }
}

// Elements of a chunk: what `planes` of x have of it stays near.
int64_t chunk_of(int64_t planes) {
  return std::max<int64_t>(4 * W, kChunkBytes / 4 / (planes + 1) / W * W);
}

// body(k, count) over [0, length) in chunks of nearly equal size.
template <class F>
void chunks(int64_t length, int64_t most, F body) {
  const int64_t parts = (length + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t from = length / W * i / parts * W, to = length / W * (i + 1) / parts * W;
    if (to > from) body(from, to - from);
  }
}

template <class T>
void weight_grad(const SparseWeightGradArgs& a) {
  const int64_t block = int64_t(a.block_rows) * a.block_cols;
  const int64_t near = std::max<int64_t>(chunk_of(a.I), kTurnedBytes / 4 / (a.O + a.I) / W * W);
  const int64_t part = std::min(up_to(a.T, W), near);
  const int64_t stride = part / 16 % 2 ? part : part + 16;  // columns do not share cache sets
  Scratch<float> turned(size_t((a.O + a.I) * stride) + W);
  const Turned from{turned.data, turned.data + a.O * stride, stride};
  constexpr int64_t kColumns = 64;
  const int64_t first = (a.O + kColumns - 1) / kColumns, second = (a.I + kColumns - 1) / kColumns;
  for (int64_t t = 0; t < a.T; t += part) {
    const int64_t rows = std::min(a.T - t, part), length = up_to(rows, W);
    parallel_for(0, first + second, 1 + 32768 / (rows * kColumns), [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        const bool of_grad = i < first;
        const int64_t c = (of_grad ? i : i - first) * kColumns, width = of_grad ? a.O : a.I;
        const int64_t of = of_grad ? a.grad_stride : a.x_stride;
        const T* source = static_cast<const T*>(of_grad ? a.grad : a.x) + t * of + c;
        turn(source, of, rows, std::min(kColumns, width - c),
             turned.data + ((of_grad ? 0 : a.O) + c) * stride, stride, true);
      }
    });
    parallel_for(0, a.nnz, 1 + 65536 / (length * block), [&](int64_t begin, int64_t end) {
      chunks(length, chunk_of(a.I), [&](int64_t k, int64_t count) {
        const bool add = t > 0 || k > 0;
        if (block == 1)
          entries(from, a.crow, a.O, begin, end, k, count, add, a.out,
                  [&](int64_t e) { return a.col[e] * stride; });
        else
          blocks({from.a + k, from.b + k, stride}, a.crow, a.col, a.O / a.block_rows, begin, end,
                 a.block_rows, a.block_cols, stride, count, add, a.out);
      });
    });
  }
}

// An image as planes: rows `wide` apart, `plane` elements each; one for every remainder of the
// strides. Elements outside of the image are 0.
template <class T>
struct Image {
  const T* data;
  int64_t channels, height, width;
  bool last;              // channels-last
  int64_t stride[2];      // of the rows and columns taken, and how far before the image
  int64_t before[2];      // the first one is
  int64_t rows, columns;  // of a plane that may be inside
  int64_t wide, plane;

  int64_t planes() const { return channels * stride[0] * stride[1]; }

  // Position (r, c) of plane (y, x) of a channel is image (r * stride + y - before, ...).
  void row(int64_t b, int64_t r, int64_t y, int64_t x, int64_t first, int64_t stop,
           float* to) const {
    const int64_t line = r * stride[0] + y - before[0];
    if (line < 0 || line >= height) return;
    const int64_t shift = before[1] - x;
    const int64_t from = shift > 0 ? (shift + stride[1] - 1) / stride[1] : 0;
    const int64_t over = width - 1 + shift;
    const int64_t count = over < 0 ? 0 : std::min(columns, over / stride[1] + 1) - from;
    if (count <= 0) return;
    const int64_t pixel = from * stride[1] - shift, each = stride[0] * stride[1] * plane;
    float* at = to + (first * stride[0] * stride[1] + y * stride[1] + x) * plane + r * wide + from;
    if (last) {
      const T* p = data + ((b * height + line) * width + pixel) * channels + first;
      turn(p, stride[1] * channels, count, stop - first, at, each, false);
      return;
    }
    for (int64_t c = first; c < stop; ++c, at += each) {
      const T* p = data + ((b * channels + c) * height + line) * width + pixel;
      if (stride[1] == 1)
        fastdiff::FASTDIFF_LEVEL::each(
            count, [&](int64_t i, auto part) { part.store(part.load(p + i), at + i); });
      else
        for (int64_t i = 0; i < count; ++i) at[i] = to_float(p[i * stride[1]]);
    }
  }

  // Planes of channels first to stop of a sample, to planes at `to`.
  void pack(int64_t b, int64_t first, int64_t stop, float* to) const {
    const int64_t each = stride[0] * stride[1] * plane;
    std::memset(to + first * each, 0, size_t((stop - first) * each) * sizeof(float));
    for (int64_t y = 0; y < stride[0]; ++y)
      for (int64_t x = 0; x < stride[1]; ++x)
        for (int64_t r = 0; r < rows; ++r) row(b, r, y, x, first, stop, to);
  }
};

template <class T>
void conv_grad(const SparseConvWeightGradArgs& a) {
  int64_t reach[2];  // rows and columns of a plane that taps shift by, at most
  for (int d = 0; d < 2; ++d) reach[d] = (a.kernel[d] - 1) * a.dilation[d] / a.stride[d];
  const int64_t wide = a.Wo + reach[1];
  const int64_t length = up_to((a.Ho - 1) * wide + a.Wo, W);
  const int64_t plane = up_to(length + reach[0] * wide + reach[1], 16) + 16;
  const Image<T> grad{
      static_cast<const T*>(a.grad), a.O, a.Ho, a.Wo, a.grad_last, {1, 1}, {0, 0}, a.Ho, a.Wo, wide,
      up_to(length, 16) + 16};
  const Image<T> x{static_cast<const T*>(a.x),
                   a.C,
                   a.H,
                   a.W,
                   a.x_last,
                   {a.stride[0], a.stride[1]},
                   {a.padding[0], a.padding[1]},
                   a.Ho + reach[0],
                   a.Wo + reach[1],
                   wide,
                   plane};
  const int64_t of_grad = grad.channels * grad.plane, of_x = x.planes() * x.plane;
  const int64_t most = std::max<int64_t>(1, kMostBytes / 4 / (of_grad + of_x));
  const int64_t group = std::min(a.B, most);
  Scratch<float> packed(size_t(group * (of_grad + of_x)) + W);
  const int64_t taps = a.kernel[0] * a.kernel[1], phases = a.stride[0] * a.stride[1];
  // Where the plane of a column of the weight begins.
  const auto at = [&](int32_t c) {
    const int64_t y = c % taps / a.kernel[1] * a.dilation[0];
    const int64_t z = c % a.kernel[1] * a.dilation[1];
    const int64_t phase = y % a.stride[0] * a.stride[1] + z % a.stride[1];
    return (c / taps * phases + phase) * plane + y / a.stride[0] * wide + z / a.stride[1];
  };
  Scratch<int64_t> places(size_t(a.nnz));
  parallel_for(0, a.nnz, 16384, [&](int64_t e, int64_t end) {
    for (; e < end; ++e) places.data[e] = at(a.col[e]);
  });
  constexpr int64_t kChannels = 16;
  const int64_t first = (a.O + kChannels - 1) / kChannels,
                each = first + (a.C + kChannels - 1) / kChannels;
  for (int64_t b = 0; b < a.B; b += group) {
    const int64_t samples = std::min(group, a.B - b);
    parallel_for(0, samples * each, 1, [&](int64_t i, int64_t end) {
      for (; i < end; ++i) {
        const int64_t s = i / each, j = i % each;
        float* to = packed.data + s * (of_grad + of_x);
        if (j < first)
          grad.pack(b + s, j * kChannels, std::min(a.O, (j + 1) * kChannels), to);
        else
          x.pack(b + s, (j - first) * kChannels, std::min(a.C, (j - first + 1) * kChannels),
                 to + of_grad);
      }
    });
    parallel_for(0, a.nnz, 1 + 65536 / length, [&](int64_t begin, int64_t end) {
      for (int64_t s = 0; s < samples; ++s) {
        const float* data = packed.data + s * (of_grad + of_x);
        const Turned from{data, data + of_grad, grad.plane};
        chunks(length, chunk_of(a.C * phases), [&](int64_t k, int64_t count) {
          entries(from, a.crow, a.O, begin, end, k, count, b + s || k, a.out,
                  [&](int64_t e) { return places.data[e]; });
        });
      }
    });
  }
}

}  // namespace

void sparse_weight_grad(const SparseWeightGradArgs& a) {
  FASTDIFF_DTYPE_SWITCH(a.dtype, weight_grad<T>(a));
}

void sparse_conv2d_weight_grad(const SparseConvWeightGradArgs& a) {
  FASTDIFF_DTYPE_SWITCH(a.dtype, conv_grad<T>(a));
}

FASTDIFF_KERNEL_END
