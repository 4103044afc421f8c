// Statistics, channel maps and exponential of group_norm_silu, shared by its forward and backward
// kernels.
#pragma once
#include "group_norm_silu.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

static constexpr int64_t kPiece =
    32768;  // elements measured at once: fits L2, and float32 sums stay exact enough

// Moments of a set; pieces merge as in Chan, Golub & LeVeque 1983.
struct GroupMoments {
  double n = 0, mean = 0, m2 = 0;
  void merge(const GroupMoments& other) {
    if (other.n == 0) return;
    const double total = n + other.n, delta = other.mean - mean;
    mean += delta * (other.n / total);
    m2 += other.m2 + delta * delta * (n * other.n / total);
    n = total;
  }
};

// From sum and sum of squares. False where they cancel (the mean is not within a deviation of 0):
// then the caller sums once more, deviations from this mean.
inline bool moments_near(double n, double sum, double square, GroupMoments& s) {
  s = {n, sum / n, square - sum * (sum / n)};
  return sum * s.mean <= s.m2;
}

// From sums of deviations from s.mean, which that mean's own rounding shifts a little.
inline GroupMoments moments_far(const GroupMoments& s, double deviation, double square) {
  const double m2 = square - deviation * (deviation / s.n);
  return {s.n, s.mean + deviation / s.n, m2 < 0 ? 0 : m2};
}

// y = silu((x - center) * mul + add) per channel; center is the group's mean in float32, what it
// leaves out of the mean is in add, so that mean >> deviation keeps full precision.
struct Affine {
  float center, mul, add;
};

template <class T>
static FD_INLINE Affine affine_of(const GroupNormSiluArgs& a, int64_t b, int64_t c,
                                  const GroupMoments& s, float rstd) {
  auto at = [](const void* p, int64_t i) { return to_float(static_cast<const T*>(p)[i]); };
  const float center = float(s.mean), rest = float(s.mean - double(center));
  const float gain = a.scale ? 1.0f + at(a.scale, b * a.scale_stride + c) : 1.0f;
  const float mul = rstd * (a.weight ? at(a.weight, c) : 1.0f) * gain;
  float add = a.bias ? at(a.bias, c) * gain : 0.0f;
  if (a.shift) add += at(a.shift, b * a.shift_stride + c);
  return {center, mul, add - rest * mul};
}

inline float rstd_of(const GroupMoments& s, float eps) {
  return float(1.0 / std::sqrt(s.m2 / s.n + double(eps)));
}

// p = 1 + exp(-u), so that silu(u) = u / p, to an absolute error of 3e-7 max(1, |u|). exp(-u) = 2^t
// with t = -u log2 e: the rounding of t only matters where silu no longer depends on it; degree-5
// minimax polynomial for 2^fraction, relative error 1.5e-7. U vectors in step, because one chain is
// longer than the processor looks ahead. `brief`: degree 3, relative error 7.5e-5, a 26th of
// what rounding to bfloat16 may add.
template <bool brief, int U>
static FD_INLINE void one_plus_exp(const Vec (&u)[U], Vec (&p)[U]) {
  static constexpr float c[] = {1.87757658e-3f, 8.98934063e-3f, 5.58263175e-2f,
                                0.240153611f,   0.693153083f,   0.99999994f};
  static constexpr float b[] = {0.0780245302f, 0.226067146f, 0.695833543f, 0.999925219f};
  Vec t[U], f[U];
#define FD_EACH _Pragma("GCC unroll 4") for (int j = 0; j < U; ++j)
  FD_EACH t[j] = u[j] * Vec(-1.44269504088896341f);
  FD_EACH f[j] = fraction(t[j]);
  if constexpr (brief) {
    FD_EACH p[j] = fma(f[j], Vec(b[0]), Vec(b[1]));
    FD_EACH p[j] = fma(p[j], f[j], Vec(b[2]));
    FD_EACH p[j] = fma(p[j], f[j], Vec(b[3]));
  } else {
    FD_EACH p[j] = fma(f[j], Vec(c[0]), Vec(c[1]));
    FD_EACH p[j] = fma(p[j], f[j], Vec(c[2]));
    FD_EACH p[j] = fma(p[j], f[j], Vec(c[3]));
    FD_EACH p[j] = fma(p[j], f[j], Vec(c[4]));
    FD_EACH p[j] = fma(p[j], f[j], Vec(c[5]));
  }
  FD_EACH p[j] = Vec(1.0f) + scale2_floor(p[j], t[j]);
#undef FD_EACH
}

// Vectors of a run, four in step as long as there are four: body(i, number of vectors, part).
template <class F>
static FD_INLINE void each_four(int64_t n, F body) {
  constexpr int W = Vec::width;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) body(i, std::integral_constant<int, 4>{}, Full{});
  for (; i + W <= n; i += W) body(i, std::integral_constant<int, 1>{}, Full{});
  if (i < n) body(i, std::integral_constant<int, 1>{}, Tail{int(n - i)});
}

template <class T>
static GroupMoments run_moments(const T* x, int64_t n) {
  GroupMoments all, s;
  for (int64_t from = 0; from < n; from += kPiece) {
    const T* p = x + from;
    const int64_t count = n - from < kPiece ? n - from : kPiece;
    float sums[2];
    sum_each<2>(count, sums, [&](int64_t i, auto part, Vec* acc) {
      Vec e = part.load(p + i);
      acc[0] = acc[0] + e;
      acc[1] = fma(e, e, acc[1]);
    });
    if (!moments_near(double(count), sums[0], sums[1], s)) {
      s.mean = float(s.mean);
      const Vec mean{float(s.mean)};
      sum_each<2>(count, sums, [&](int64_t i, auto part, Vec* acc) {
        Vec d = part.keep(part.load(p + i) - mean);
        acc[0] = acc[0] + d;
        acc[1] = fma(d, d, acc[1]);
      });
      s = moments_far(s, sums[0], sums[1]);
    }
    all.merge(s);
  }
  return all;
}

// Channels last, a piece of `count` positions: sums per channel in `sum` and `square` [C], 8
// positions at a time in registers, then one set of moments per group.
template <class T>
static void piece_moments(const GroupNormSiluArgs& a, const T* x, int64_t count, float* sum,
                          float* square, GroupMoments* out) {
  const int64_t C = a.C, per_group = C / a.groups;
  auto add_rows = [&](const T* rows, auto rows_constant, bool begin) {
    constexpr int height = decltype(rows_constant)::value;
    each(C, [&](int64_t c, auto part) {
      Vec s = begin ? Vec(0.0f) : part.load(sum + c), q = begin ? Vec(0.0f) : part.load(square + c);
#pragma GCC unroll 8
      for (int j = 0; j < height; ++j) {
        Vec e = part.load(rows + j * C + c);
        s = s + e;
        q = fma(e, e, q);
      }
      part.store(s, sum + c), part.store(q, square + c);
    });
  };
  int64_t p = 0;
  for (; p + 8 <= count; p += 8) add_rows(x + p * C, std::integral_constant<int, 8>{}, p == 0);
  for (; p < count; ++p) add_rows(x + p * C, std::integral_constant<int, 1>{}, p == 0);

  for (int64_t g = 0; g < a.groups; ++g) {
    const int64_t c = g * per_group;
    GroupMoments& s = out[g];
    float sums[2];
    sum_each<2>(per_group, sums, [&](int64_t i, auto part, Vec* acc) {
      acc[0] = acc[0] + part.load(sum + c + i);
      acc[1] = acc[1] + part.load(square + c + i);
    });
    if (moments_near(double(count * per_group), sums[0], sums[1], s)) continue;
    s.mean = float(s.mean);
    const Vec mean{float(s.mean)};
    double deviation = 0, squares = 0;
    for (p = 0; p < count; ++p) {
      const T* row = x + p * C + c;
      sum_each<2>(per_group, sums, [&](int64_t i, auto part, Vec* acc) {
        Vec d = part.keep(part.load(row + i) - mean);
        acc[0] = acc[0] + d;
        acc[1] = fma(d, d, acc[1]);
      });
      deviation += sums[0], squares += sums[1];
    }
    s = moments_far(s, deviation, squares);
  }
}

// Positions of a piece: at least 32, over which the sums per group at its end are spread, and at
// most 512, for the exactness of float32 sums. The split does not depend on the number of threads.
inline int64_t piece_of(int64_t C) {
  const int64_t positions = kPiece / C / 8 * 8;
  return positions < 32 ? 32 : positions > 512 ? 512 : positions;
}

// Channels last: moments of every (sample, piece, group).
template <class T>
static void measure_pieces(const GroupNormSiluArgs& a, int64_t pieces, GroupMoments* parts) {
  const int64_t C = a.C, piece = piece_of(C);
  parallel_for(0, a.B * pieces, 1 + 16384 / (C * piece), [&](int64_t begin, int64_t end) {
    Scratch<float> sums(size_t(2 * C));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = (t % pieces) * piece, count = a.P - from < piece ? a.P - from : piece;
      const T* x = static_cast<const T*>(a.x) + (t / pieces * a.P + from) * C;
      piece_moments(a, x, count, sums.data, sums.data + C, parts + t * a.groups);
    }
  });
}

inline GroupMoments merged(const GroupNormSiluArgs& a, int64_t b, int64_t g, int64_t pieces,
                           const GroupMoments* parts) {
  GroupMoments s;
  for (int64_t i = 0; i < pieces; ++i) s.merge(parts[(b * pieces + i) * a.groups + g]);
  return s;
}

// The channel maps of sample b.
template <class T>
static void map_channels(const GroupNormSiluArgs& a, int64_t b, int64_t pieces,
                         const GroupMoments* parts, float* center, float* mul, float* add) {
  const int64_t per_group = a.C / a.groups;
  for (int64_t g = 0; g < a.groups; ++g) {
    const GroupMoments s = merged(a, b, g, pieces, parts);
    const float rstd = rstd_of(s, a.eps);
    for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
      const Affine f = affine_of<T>(a, b, c, s, rstd);
      center[c] = f.center, mul[c] = f.mul, add[c] = f.add;
    }
  }
}

FASTDIFF_KERNEL_END
