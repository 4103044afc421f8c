#include "group_norm_silu_moments.h"

FASTDIFF_KERNEL_BEGIN

// y[i] = act(map(x[i], i)) over n contiguous elements.
template <bool act, class T, class Map>
static FD_INLINE void apply(const T* x, T* y, int64_t n, Map map) {
  each_four(n, [&](int64_t i, auto vectors, auto part) {
    constexpr int U = decltype(vectors)::value;
    Vec u[U];
#pragma GCC unroll 4
    for (int j = 0; j < U; ++j) {
      const int64_t at = i + j * Vec::width;
      u[j] = map(part.load(x + at), at, part);
    }
    if constexpr (act) {
      Vec p[U];
      one_plus_exp<std::is_same_v<T, bf16>>(u, p);
#pragma GCC unroll 4
      for (int j = 0; j < U; ++j) u[j] = u[j] / p[j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < U; ++j) part.store(u[j], y + i + j * Vec::width);
  });
}

// Elements [from, to) of group g, which is one contiguous run of C/G rows of P. The elements `next`
// further on are brought to L2 meanwhile: the arithmetic here leaves the memory idle, and measuring
// the next group would wait for it.
template <class T, bool act>
static void apply_run(const GroupNormSiluArgs& a, int64_t g, int64_t from, int64_t to, int64_t next,
                      const GroupMoments& s) {
  const int64_t per_group = a.C / a.groups, start = g * per_group * a.P;
  const float rstd = rstd_of(s, a.eps);
  for (int64_t at = from; at < to;) {
    const int64_t k = at / a.P, stop = (k + 1) * a.P < to ? (k + 1) * a.P : to;
    const int64_t row = g * per_group + k;
    const Affine f = affine_of<T>(a, row / a.C, row % a.C, s, rstd);
    const Vec center(f.center), mul(f.mul), add(f.add);
    const T* x = static_cast<const T*>(a.x) + start + at;
    apply<act>(x, static_cast<T*>(a.y) + start + at, stop - at, [&](Vec v, int64_t i, auto) {
      prefetch_l2(x + next + i);
      return fma(v - center, mul, add);
    });
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
        apply_run<T, act>(a, g, 0, run, run, run_moments(x + g * run, run));
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
      apply_run<T, act>(a, g, i * kPiece, end_of(i), kPiece, s);
    }
  });
}

// Channels last: all threads measure pieces of positions, then all threads write positions, each
// with its own copy of the sample's channel maps. x is read twice, y written once.
template <class T, bool act>
static void channels_last(const GroupNormSiluArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  T* y = static_cast<T*>(a.y);
  const int64_t C = a.C, P = a.P, pieces = (P + piece_of(C) - 1) / piece_of(C);
  Scratch<GroupMoments> parts(size_t(a.B * pieces * a.groups));
  measure_pieces<T>(a, pieces, parts.data);
  parallel_for(0, a.B * P, 1 + 16384 / C, [&](int64_t begin, int64_t end) {
    Scratch<float> maps(size_t(3 * C));
    float *center = maps.data, *mul = center + C, *add = mul + C;
    int64_t mapped = -1;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / P;
      if (b != mapped) map_channels<T>(a, b, pieces, parts.data, center, mul, add), mapped = b;
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
