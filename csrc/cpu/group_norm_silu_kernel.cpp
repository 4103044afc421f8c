#include "group_norm_silu.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

static constexpr int W = Vec::width;
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
static bool moments_near(double n, double sum, double square, GroupMoments& s) {
  s = {n, sum / n, square - sum * (sum / n)};
  return sum * s.mean <= s.m2;
}

// From sums of deviations from s.mean, which that mean's own rounding shifts a little.
static GroupMoments moments_far(const GroupMoments& s, double deviation, double square) {
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

static float rstd_of(const GroupMoments& s, float eps) {
  return float(1.0 / std::sqrt(s.m2 / s.n + double(eps)));
}

// u / (1 + exp(-u)), absolute error 3e-7 max(1, |u|). exp(-u) = 2^t, t = -u log2 e: the rounding of
// t only matters where silu no longer depends on it; degree-5 minimax polynomial for 2^fraction,
// relative error 1.5e-7. U vectors in step, because one chain is longer than the processor looks
// ahead.
template <int U>
static FD_INLINE void silu(Vec (&u)[U]) {
  static constexpr float c[] = {1.87757658e-3f, 8.98934063e-3f, 5.58263175e-2f,
                                0.240153611f,   0.693153083f,   0.99999994f};
  Vec t[U], f[U], p[U];
#define FD_EACH _Pragma("GCC unroll 4") for (int j = 0; j < U; ++j)
  FD_EACH t[j] = u[j] * Vec(-1.44269504088896341f);
  FD_EACH f[j] = fraction(t[j]);
  FD_EACH p[j] = fma(f[j], Vec(c[0]), Vec(c[1]));
  FD_EACH p[j] = fma(p[j], f[j], Vec(c[2]));
  FD_EACH p[j] = fma(p[j], f[j], Vec(c[3]));
  FD_EACH p[j] = fma(p[j], f[j], Vec(c[4]));
  FD_EACH p[j] = fma(p[j], f[j], Vec(c[5]));
  FD_EACH p[j] = Vec(1.0f) + scale2_floor(p[j], t[j]);
  FD_EACH u[j] = u[j] / p[j];
#undef FD_EACH
}

template <bool act, int U, class T, class Part, class Map>
static FD_INLINE void apply_step(const T* x, T* y, int64_t i, Part part, Map map) {
  Vec u[U];
#pragma GCC unroll 4
  for (int j = 0; j < U; ++j) u[j] = map(part.load(x + i + j * W), i + j * W, part);
  if constexpr (act) silu<U>(u);
#pragma GCC unroll 4
  for (int j = 0; j < U; ++j) part.store(u[j], y + i + j * W);
}

// y[i] = act(map(x[i], i)) over n contiguous elements.
template <bool act, class T, class Map>
static FD_INLINE void apply(const T* x, T* y, int64_t n, Map map) {
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) apply_step<act, 4>(x, y, i, Full{}, map);
  for (; i + W <= n; i += W) apply_step<act, 1>(x, y, i, Full{}, map);
  if (i < n) apply_step<act, 1>(x, y, i, Tail{int(n - i)}, map);
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

// Elements [from, to) of group g, which is one contiguous run of C/G rows of P.
template <class T, bool act>
static void apply_run(const GroupNormSiluArgs& a, int64_t g, int64_t from, int64_t to,
                      const GroupMoments& s) {
  const int64_t per_group = a.C / a.groups, start = g * per_group * a.P;
  const float rstd = rstd_of(s, a.eps);
  for (int64_t at = from; at < to;) {
    const int64_t k = at / a.P, stop = (k + 1) * a.P < to ? (k + 1) * a.P : to;
    const int64_t row = g * per_group + k;
    const Affine f = affine_of<T>(a, row / a.C, row % a.C, s, rstd);
    const Vec center(f.center), mul(f.mul), add(f.add);
    apply<act>(static_cast<const T*>(a.x) + start + at, static_cast<T*>(a.y) + start + at,
               stop - at, [&](Vec x, int64_t, auto) { return fma(x - center, mul, add); });
    at = stop;
  }
}

// Contiguous. Where there are groups enough for the threads, one thread measures a group and writes
// it while it is in L2: one read and one write per element. Few large groups are measured in pieces
// by all threads and read twice.
template <class T, bool act>
static void contiguous(const GroupNormSiluArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t run = a.C / a.groups * a.P, total = a.B * a.groups;
  if (total >= 16 || run < 2 * kPiece) {
    parallel_for(0, total, 1 + 16384 / run, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g)
        apply_run<T, act>(a, g, 0, run, run_moments(x + g * run, run));
    });
    return;
  }
  const int64_t pieces = (run + kPiece - 1) / kPiece;
  auto end_of = [&](int64_t i) { return (i + 1) * kPiece < run ? (i + 1) * kPiece : run; };
  Scratch<GroupMoments> parts(size_t(total * pieces));
  parallel_for(0, total * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i = t % pieces, from = i * kPiece;
      parts.data[t] = run_moments(x + (t / pieces) * run + from, end_of(i) - from);
    }
  });
  parallel_for(0, total * pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t g = t / pieces, i = t % pieces;
      GroupMoments s;
      for (int64_t k = 0; k < pieces; ++k) s.merge(parts.data[g * pieces + k]);
      apply_run<T, act>(a, g, i * kPiece, end_of(i), s);
    }
  });
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

// Channels last: all threads measure pieces of positions, then all threads write positions, each
// with its own copy of the sample's channel maps. x is read twice, y written once. The split does
// not depend on the threads.
template <class T, bool act>
static void channels_last(const GroupNormSiluArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t C = a.C, P = a.P, G = a.groups;
  // At least 32 positions, over which the sums per group at a piece's end are spread.
  const int64_t piece = kPiece / C > 32 ? kPiece / C / 8 * 8 : 32, pieces = (P + piece - 1) / piece;
  Scratch<GroupMoments> parts(size_t(a.B * pieces * G));
  parallel_for(0, a.B * pieces, 1 + 16384 / (C * piece), [&](int64_t begin, int64_t end) {
    Scratch<float> sums(size_t(2 * C));
    for (int64_t t = begin; t < end; ++t) {
      const int64_t from = (t % pieces) * piece, count = P - from < piece ? P - from : piece;
      piece_moments(a, x + (t / pieces * P + from) * C, count, sums.data, sums.data + C,
                    parts.data + t * G);
    }
  });
  parallel_for(0, a.B * P, 1 + 16384 / C, [&](int64_t begin, int64_t end) {
    Scratch<float> maps(size_t(3 * C));
    float *center = maps.data, *mul = center + C, *add = mul + C;
    int64_t mapped = -1;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / P;
      if (b != mapped) {
        mapped = b;
        for (int64_t g = 0; g < G; ++g) {
          GroupMoments s;
          for (int64_t i = 0; i < pieces; ++i) s.merge(parts.data[(b * pieces + i) * G + g]);
          const float rstd = rstd_of(s, a.eps);
          for (int64_t c = g * (C / G); c < (g + 1) * (C / G); ++c) {
            const Affine f = affine_of<T>(a, b, c, s, rstd);
            center[c] = f.center, mul[c] = f.mul, add[c] = f.add;
          }
        }
      }
      apply<act>(x + row * C, y + row * C, C, [&](Vec v, int64_t c, auto part) {
        return fma(v - part.load(center + c), part.load(mul + c), part.load(add + c));
      });
    }
  });
}

template <class T, bool act>
static void either_layout(const GroupNormSiluArgs& a) {
  if (a.channels_last || a.P == 1) {  // with one position both layouts are the same memory
    channels_last<T, act>(a);
  } else {
    contiguous<T, act>(a);
  }
}

void group_norm_silu(const GroupNormSiluArgs& a) {
  FASTDIFF_DTYPE_SWITCH(a.dtype, a.silu ? either_layout<T, true>(a) : either_layout<T, false>(a));
}

FASTDIFF_KERNEL_END
