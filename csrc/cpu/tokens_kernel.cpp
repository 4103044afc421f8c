#include <cstring>

#include "tokens.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

template <class T>
static const T* row_of(const TokenRows& rows, int64_t b, int64_t n) {
  return static_cast<const T*>(rows.data) + b * rows.b_stride + n * rows.n_stride;
}

template <class T>
static void gather_rows(const GatherTokensArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.A, n = a.index[b * a.index_stride + row % a.A];
    std::memcpy(static_cast<T*>(a.out) + row * a.D, row_of<T>(a.x, b, n), a.D * sizeof(T));
  }
}

// Every row of the output is written once, from the one source that it has.
template <class T>
static void scatter_rows(const ScatterTokensArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.N, k = a.last[row];
    const T* x = row_of<T>(a.x, b, row % a.N);
    T* out = static_cast<T*>(a.out) + row * a.D;
    if (k < 0) {
      std::memcpy(out, x, a.D * sizeof(T));
      continue;
    }
    const T* y = row_of<T>(a.y, b, k);
    if (!a.gate.data) {
      std::memcpy(out, y, a.D * sizeof(T));
      continue;
    }
    const T* gate = row_of<T>(a.gate, b, k);
    each(a.D, [&](int64_t d, auto part) {
      part.store(part.load(x + d) + part.load(gate + d) * part.load(y + d), out + d);
    });
  }
}

void gather_tokens(const GatherTokensArgs& a) {
  const int64_t grain = 1 + 32768 / a.D;  // a copy of 64 to 128 KiB is worth a thread
  FASTDIFF_DTYPE_SWITCH(a.dtype, parallel_for(0, a.B * a.A, grain, [&](int64_t b, int64_t e) {
                          gather_rows<T>(a, b, e);
                        }));
}

void scatter_tokens(const ScatterTokensArgs& a) {
  const int64_t grain = 1 + 32768 / a.D;
  FASTDIFF_DTYPE_SWITCH(a.dtype, parallel_for(0, a.B * a.N, grain, [&](int64_t b, int64_t e) {
                          scatter_rows<T>(a, b, e);
                        }));
}

// Pieces of a row go to different threads, and every thread walks all rows of its piece in their
// order: the last of several with one index is the last to be written.
template <class T>
static void update_pieces(const UpdateTokensArgs& a, int64_t piece, int64_t begin, int64_t end) {
  const int64_t pieces = (a.D + piece - 1) / piece;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t d = task % pieces * piece, h = task / pieces % a.H, b = task / pieces / a.H;
    const int64_t size = (d + piece < a.D ? piece : a.D - d) * int64_t(sizeof(T));
    T* cache = static_cast<T*>(a.cache.data) + b * a.cache.b_stride + h * a.cache.h_stride + d;
    const T* y = static_cast<const T*>(a.y.data) + b * a.y.b_stride + h * a.y.h_stride + d;
    const int64_t* index = a.index + b * a.index_stride;
    for (int64_t k = 0; k < a.A; ++k)
      std::memcpy(cache + index[k] * a.cache.n_stride, y + k * a.y.n_stride, size);
  }
}

void update_tokens(const UpdateTokensArgs& a) {
  const int64_t piece = 128, pieces = (a.D + piece - 1) / piece;
  const int64_t grain = 1 + 32768 / (1 + a.A * piece);
  FASTDIFF_DTYPE_SWITCH(
      a.dtype, parallel_for(0, a.B * a.H * pieces, grain,
                            [&](int64_t b, int64_t e) { update_pieces<T>(a, piece, b, e); }));
}

FASTDIFF_KERNEL_END
