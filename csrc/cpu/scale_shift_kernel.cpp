#include "scale_shift.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

// The row of sample b.
template <class Args>
static int64_t row_of(const Args& a, int64_t b) {
  return a.index ? a.index[b * a.index_stride] : 0;
}

template <class T>
static const T* at(const Positions& x, int64_t b, int64_t p) {
  return static_cast<const T*>(x.data) + b * x.b_stride + p * x.p_stride;
}

template <class S>
static const S* at(const ChannelRows& rows, int64_t row) {
  return rows.data ? static_cast<const S*>(rows.data) + row * rows.stride : nullptr;
}

template <class T, class S>
static void positions(const ScaleShiftArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / a.P, row = row_of(a, b);
    const T* x = at<T>(a.x, b, i % a.P);
    T* out = static_cast<T*>(a.out) + i * a.C;
    const S *scale = at<S>(a.scale, row), *shift = at<S>(a.shift, row);
    if (shift) {
      each(a.C, [&](int64_t c, auto part) {
        part.store(fma(part.load(x + c), part.load(scale + c), part.load(shift + c)), out + c);
      });
    } else {
      each(a.C, [&](int64_t c, auto part) {
        part.store(part.load(x + c) * part.load(scale + c), out + c);
      });
    }
  }
}

template <class T, class S>
static void planes(const ScaleShiftArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = i % a.C, row = row_of(a, i / a.C);
    const T* x = static_cast<const T*>(a.x.data) + i * a.P;
    T* out = static_cast<T*>(a.out) + i * a.P;
    const Vec scale(to_float(at<S>(a.scale, row)[c]));
    if (const S* shift = at<S>(a.shift, row)) {
      const Vec add(to_float(shift[c]));
      each(a.P,
           [&](int64_t p, auto part) { part.store(fma(part.load(x + p), scale, add), out + p); });
    } else {
      each(a.P, [&](int64_t p, auto part) { part.store(part.load(x + p) * scale, out + p); });
    }
  }
}

template <class T, class S>
static void forward(const ScaleShiftArgs& a) {
  const int64_t count = a.planes ? a.C : a.P, run = a.planes ? a.P : a.C;
  parallel_for(0, a.B * count, 1 + 32768 / run, [&](int64_t begin, int64_t end) {
    a.planes ? planes<T, S>(a, begin, end) : positions<T, S>(a, begin, end);
  });
}

void scale_shift(const ScaleShiftArgs& a) {
  FASTDIFF_DTYPE_SWITCH(a.dtype, a.wide ? forward<T, float>(a) : forward<T, T>(a));
}

// Pieces of positions: 8 at a time, whose sums stay in registers.
template <class T, class S>
static void backward_positions(const ScaleShiftBackwardArgs& a, int64_t begin, int64_t end) {
  const int64_t C = a.C;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.pieces, from = task % a.pieces * a.piece;
    const int64_t to = from + a.piece < a.P ? from + a.piece : a.P;
    const S* scale = at<S>(a.scale, row_of(a, b));
    float *sum_gx = a.parts + task * 2 * C, *sum_g = sum_gx + C;
    for (int64_t p = from; p < to; p += 8) {
      const int64_t height = to - p < 8 ? to - p : 8;
      const T *grad = at<T>(a.grad, b, p), *x = at<T>(a.x, b, p);
      T* grad_x = static_cast<T*>(a.grad_x) + (b * a.P + p) * C;
      each(C, [&](int64_t c, auto part) {
        const Vec s = part.load(scale + c);
        Vec gx(0.0f), total(0.0f);
        for (int64_t j = 0; j < height; ++j) {
          const Vec g = part.load(grad + j * a.grad.p_stride + c);
          part.store(g * s, grad_x + j * C + c);
          gx = fma(g, part.load(x + j * a.x.p_stride + c), gx);
          total = total + g;
        }
        part.store(p == from ? gx : gx + part.load(sum_gx + c), sum_gx + c);
        part.store(p == from ? total : total + part.load(sum_g + c), sum_g + c);
      });
    }
  }
}

template <class T, class S>
static void backward_planes(const ScaleShiftBackwardArgs& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / a.C, c = i % a.C;
    const Vec scale(to_float(at<S>(a.scale, row_of(a, b))[c]));
    for (int64_t n = 0; n < a.pieces; ++n) {
      const int64_t from = n * a.piece, count = a.P - from < a.piece ? a.P - from : a.piece;
      const T* grad = static_cast<const T*>(a.grad.data) + i * a.P + from;
      const T* x = static_cast<const T*>(a.x.data) + i * a.P + from;
      T* grad_x = static_cast<T*>(a.grad_x) + i * a.P + from;
      float sums[2];
      sum_each<2>(count, sums, [&](int64_t p, auto part, Vec* acc) {
        const Vec g = part.load(grad + p);
        part.store(g * scale, grad_x + p);
        acc[0] = fma(g, part.load(x + p), acc[0]);
        acc[1] = acc[1] + g;
      });
      float* parts = a.parts + (b * a.pieces + n) * 2 * a.C + c;
      parts[0] = sums[0], parts[a.C] = sums[1];
    }
  }
}

// Pieces are added up in their order, samples in theirs: the split does not depend on the threads.
static void add_parts(const ScaleShiftBackwardArgs& a) {
  constexpr int64_t kChannels = 64;
  const int64_t tiles = (a.C + kChannels - 1) / kChannels;
  const int64_t grain = 1 + 32768 / (a.B * a.pieces * kChannels);
  parallel_for(0, a.A * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / tiles, first = task % tiles * kChannels;
      const int64_t count = a.C - first < kChannels ? a.C - first : kChannels;
      for (int k = 0; k < 2; ++k) {
        float* out = (k ? a.grad_shift : a.grad_scale) + row * a.C + first;
        for (int64_t c = 0; c < count; ++c) out[c] = 0.0f;
        for (int64_t b = 0; b < a.B; ++b) {
          if (row_of(a, b) != row) continue;
          for (int64_t n = 0; n < a.pieces; ++n) {
            const float* parts = a.parts + ((b * a.pieces + n) * 2 + k) * a.C + first;
            each(count, [&](int64_t c, auto part) {
              part.store(part.load(out + c) + part.load(parts + c), out + c);
            });
          }
        }
      }
    }
  });
}

template <class T, class S>
static void backward(const ScaleShiftBackwardArgs& a) {
  if (a.planes) {
    parallel_for(0, a.B * a.C, 1 + 16384 / a.P,
                 [&](int64_t b, int64_t e) { backward_planes<T, S>(a, b, e); });
  } else {
    parallel_for(0, a.B * a.pieces, 1 + 16384 / (a.C * a.piece),
                 [&](int64_t b, int64_t e) { backward_positions<T, S>(a, b, e); });
  }
}

void scale_shift_backward(const ScaleShiftBackwardArgs& a) {
  FASTDIFF_DTYPE_SWITCH(a.dtype, a.wide ? backward<T, float>(a) : backward<T, T>(a));
  add_parts(a);
}

FASTDIFF_KERNEL_END
