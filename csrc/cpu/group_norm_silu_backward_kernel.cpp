#include "group_norm_silu_moments.h"

FASTDIFF_KERNEL_BEGIN

// With n the normalised x, u = n k + add (k = weight (1 + scale)), du = grad silu'(u) and means
// over the group:  dx = rstd (k du - mean(k du) - n mean(k du n)). Statistics and u are computed
// again from x: the forward pass keeps nothing. As the maps work on e = x - center, n = (e - rest)
// rstd, that is dx = mul du + at0 + at1 e with two numbers per group.

// d *= silu'(u) = s (1 + u (1 - s)), s = 1 / (1 + exp(-u)).
template <bool act, int U>
static FD_INLINE void times_slope(Vec (&d)[U], const Vec (&u)[U]) {
  if constexpr (act) {
    Vec s[U];
    one_plus_exp<false>(u, s);
#define FD_EACH _Pragma("GCC unroll 4") for (int j = 0; j < U; ++j)
    FD_EACH s[j] = Vec(1.0f) / s[j];
    FD_EACH d[j] = d[j] * s[j];
    FD_EACH d[j] = d[j] * fma(u[j], Vec(1.0f) - s[j], Vec(1.0f));
#undef FD_EACH
  }
}

// Of one group: the two numbers of dx, from its channels' sums of du and du * e.
struct GroupSums {
  double du = 0, dun = 0;  // each weighted by mul
};

struct Line {
  float at0, at1;
  Line(const GroupSums& g, double n, float rstd, float rest) {
    const double slope = -double(rstd) * (g.dun / n);
    at1 = float(slope);
    at0 = float(-g.du / n - double(rest) * slope);
  }
};

// What turns x and grad into dx at one channel.
struct Map {
  Vec center, mul, add, at0, at1;
};

template <bool act, class T, class MapAt>
static FD_INLINE void write_dx(const T* x, const T* grad, T* dx, int64_t n, MapAt map_at) {
  each_four(n, [&](int64_t i, auto vectors, auto part) {
    constexpr int U = decltype(vectors)::value;
    Vec u[U], d[U], rest[U];
#pragma GCC unroll 4
    for (int j = 0; j < U; ++j) {
      const int64_t at = i + j * Vec::width;
      const Map m = map_at(at, part);
      const Vec e = part.load(x + at) - m.center;
      u[j] = fma(e, m.mul, m.add);
      rest[j] = fma(e, m.at1, m.at0);
      d[j] = part.load(grad + at);
    }
    times_slope<act, U>(d, u);
#pragma GCC unroll 4
    for (int j = 0; j < U; ++j) {
      const int64_t at = i + j * Vec::width;
      part.store(fma(d[j], map_at(at, part).mul, rest[j]), dx + at);
    }
  });
}

// A channel's two sums in the terms of n, into `sums`, and its share of the group's.
static void finish_channel(double du, double due, float rest, float rstd, float mul, float* sum_du,
                           float* sum_dun, GroupSums& group) {
  const double dun = (due - double(rest) * du) * double(rstd);
  *sum_du = float(du), *sum_dun = float(dun);
  group.du += double(mul) * du, group.dun += double(mul) * dun;
}

// Contiguous: one thread takes a group, whose two inputs stay in L2 for the second and third
// reading.
template <class T, bool act>
static void contiguous(const GroupNormSiluBackwardArgs& args) {
  const GroupNormSiluArgs& a = args.forward;
  const int64_t P = a.P, per_group = a.C / a.groups, run = per_group * P;
  parallel_for(0, a.B * a.groups, 1 + 16384 / run, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const T* x = static_cast<const T*>(a.x) + g * run;
      const T* grad = static_cast<const T*>(args.grad) + g * run;
      T* dx = static_cast<T*>(a.y) + g * run;
      const GroupMoments s = run_moments(x, run);
      const float rstd = rstd_of(s, a.eps), rest = float(s.mean - double(float(s.mean)));
      GroupSums group;
      for (int64_t k = 0; k < per_group; ++k) {
        const int64_t row = g * per_group + k, b = row / a.C, c = row % a.C;
        const Affine f = affine_of<T>(a, b, c, s, rstd);
        const Vec center(f.center), mul(f.mul), add(f.add);
        double du = 0, due = 0;
        for (int64_t from = 0; from < P; from += kPiece) {
          const int64_t at = k * P + from, count = P - from < kPiece ? P - from : kPiece;
          Vec sum_du[4], sum_due[4];
          for (int j = 0; j < 4; ++j) sum_du[j] = sum_due[j] = Vec(0.0f);
          each_four(count, [&](int64_t i, auto vectors, auto part) {
            constexpr int U = decltype(vectors)::value;
            Vec e[U], u[U], d[U];
#pragma GCC unroll 4
            for (int j = 0; j < U; ++j) {
              e[j] = part.load(x + at + i + j * Vec::width) - center;
              u[j] = fma(e[j], mul, add);
              d[j] = part.load(grad + at + i + j * Vec::width);
            }
            times_slope<act, U>(d, u);
#pragma GCC unroll 4
            for (int j = 0; j < U; ++j) {
              sum_du[j] = sum_du[j] + d[j];
              sum_due[j] = fma(d[j], e[j], sum_due[j]);
            }
          });
          du += ((sum_du[0] + sum_du[1]) + (sum_du[2] + sum_du[3])).sum();
          due += ((sum_due[0] + sum_due[1]) + (sum_due[2] + sum_due[3])).sum();
        }
        float* sums = args.sums + b * 2 * a.C + c;
        finish_channel(du, due, rest, rstd, f.mul, sums, sums + a.C, group);
      }
      const Line line(group, s.n, rstd, rest);
      const Vec at0(line.at0), at1(line.at1);
      for (int64_t k = 0; k < per_group; ++k) {
        const int64_t row = g * per_group + k, at = k * P;
        const Affine f = affine_of<T>(a, row / a.C, row % a.C, s, rstd);
        const Vec center(f.center), mul(f.mul), add(f.add);
        write_dx<act>(x + at, grad + at, dx + at, P,
                      [&](int64_t, auto) { return Map{center, mul, add, at0, at1}; });
      }
    }
  });
}

// Channels last: pieces are measured, samples mapped, pieces summed, samples' lines drawn,
// positions written; each step by all threads.
template <class T, bool act>
static void channels_last(const GroupNormSiluBackwardArgs& args) {
  const GroupNormSiluArgs& a = args.forward;
  const T *x = static_cast<const T*>(a.x), *grad = static_cast<const T*>(args.grad);
  T* dx = static_cast<T*>(a.y);
  const int64_t C = a.C, P = a.P, piece = piece_of(C), pieces = (P + piece - 1) / piece;
  const int64_t per_group = C / a.groups;
  Scratch<GroupMoments> parts(size_t(a.B * pieces * a.groups));
  measure_pieces<T>(a, pieces, parts.data);
  Scratch<float> maps(size_t(a.B * 5 * C)), sums(size_t(a.B * pieces * 2 * C));
  auto map_of = [&](int64_t b, int64_t k) { return maps.data + (b * 5 + k) * C; };
  parallel_for(0, a.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      map_channels<T>(a, b, pieces, parts.data, map_of(b, 0), map_of(b, 1), map_of(b, 2));
  });

  parallel_for(0, a.B * pieces, 1 + 16384 / (C * piece), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / pieces, from = (t % pieces) * piece;
      const int64_t to = from + piece < P ? from + piece : P;
      const float *center = map_of(b, 0), *mul = map_of(b, 1), *add = map_of(b, 2);
      float *du = sums.data + t * 2 * C, *due = du + C;
      for (int64_t p = from; p < to; p += 8) {
        const int64_t height = to - p < 8 ? to - p : 8, row = (b * P + p) * C;
        each(C, [&](int64_t c, auto part) {
          const Vec ce = part.load(center + c), mu = part.load(mul + c), ad = part.load(add + c);
          Vec s(0.0f), q(0.0f);
          auto add_rows = [&](int64_t first_row, auto rows) {
            constexpr int U = decltype(rows)::value;
            Vec e[U], u[U], d[U];
#pragma GCC unroll 4
            for (int j = 0; j < U; ++j) {
              const int64_t at = row + (first_row + j) * C + c;
              e[j] = part.load(x + at) - ce;
              u[j] = fma(e[j], mu, ad);
              d[j] = part.load(grad + at);
            }
            times_slope<act, U>(d, u);
#pragma GCC unroll 4
            for (int j = 0; j < U; ++j) s = s + d[j], q = fma(d[j], e[j], q);
          };
          int64_t j = 0;
          for (; j + 4 <= height; j += 4) add_rows(j, std::integral_constant<int, 4>{});
          for (; j < height; ++j) add_rows(j, std::integral_constant<int, 1>{});
          part.store(p == from ? s : s + part.load(du + c), du + c);
          part.store(p == from ? q : q + part.load(due + c), due + c);
        });
      }
    }
  });

  parallel_for(0, a.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t g = 0; g < a.groups; ++g) {
        const GroupMoments s = merged(a, b, g, pieces, parts.data);
        const float rstd = rstd_of(s, a.eps), rest = float(s.mean - double(float(s.mean)));
        GroupSums group;
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
          double du = 0, due = 0;
          for (int64_t i = 0; i < pieces; ++i) {
            const float* part = sums.data + (b * pieces + i) * 2 * C + c;
            du += part[0], due += part[C];
          }
          float* out = args.sums + b * 2 * C + c;
          finish_channel(du, due, rest, rstd, map_of(b, 1)[c], out, out + C, group);
        }
        const Line line(group, s.n, rstd, rest);
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
          map_of(b, 3)[c] = line.at0, map_of(b, 4)[c] = line.at1;
          // The norm of a lone element is constant: exactly 0, not what its two terms leave.
          if (s.n == 1) map_of(b, 1)[c] = map_of(b, 3)[c] = 0.0f;
        }
      }
    }
  });

  parallel_for(0, a.B * P, 1 + 16384 / C, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* map = map_of(row / P, 0);
      write_dx<act>(x + row * C, grad + row * C, dx + row * C, C, [&](int64_t c, auto part) {
        return Map{part.load(map + c), part.load(map + C + c), part.load(map + 2 * C + c),
                   part.load(map + 3 * C + c), part.load(map + 4 * C + c)};
      });
    }
  });
}

template <class T, bool act>
static void either_layout(const GroupNormSiluBackwardArgs& a) {
  if (a.forward.channels_last || a.forward.P == 1) {
    channels_last<T, act>(a);
  } else {
    contiguous<T, act>(a);
  }
}

void group_norm_silu_backward(const GroupNormSiluBackwardArgs& a) {
  FASTDIFF_DTYPE_SWITCH(a.forward.dtype,
                        a.forward.silu ? either_layout<T, true>(a) : either_layout<T, false>(a));
}

FASTDIFF_KERNEL_END
