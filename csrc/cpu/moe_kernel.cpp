// Routing: a token's logits lie in registers and L1, top-k is k passes over them; then one counting
// sort over all slots, in one thread, so that the order is the same for any number of threads.
// Combine: one pass, every row of y read once.
#include "moe.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

namespace {

template <class T>
FD_INLINE void widen(const void* from, int64_t row, int64_t count, float* to) {
  const T* p = static_cast<const T*>(from) + row * count;
  each(count, [&](int64_t i, auto part) { part.store(part.load(p + i), to + i); });
}

FD_INLINE void widen(const void* from, Dtype dtype, int64_t row, int64_t count, float* to) {
  FASTDIFF_DTYPE_SWITCH(dtype, widen<T>(from, row, count, to));
}

// Experts and gates of one token.
void choose(const MoeRouteArgs& a, int64_t t, float* logits, float* gates) {
  const int64_t E = a.E;
  widen(a.logits, a.dtype, t, E, logits);
  if (a.sample) {
    widen(a.sample, a.sample_dtype, t / (a.T / a.B), E, gates);
    for (int64_t e = 0; e < E; ++e) logits[e] += gates[e];
  }
  bool nan = false;
  float top = -INFINITY;
  for (int64_t e = 0; e < E; ++e) {
    nan |= logits[e] != logits[e];
    top = logits[e] > top ? logits[e] : top;
  }
  float sum = 1;
  if (nan || (!a.sigmoid && (top == INFINITY || top == -INFINITY))) {
    for (int64_t e = 0; e < E; ++e) gates[e] = NAN;
  } else if (a.sigmoid) {
    each(E, [&](int64_t e, auto part) { part.store(vsigmoid(part.load(logits + e)), gates + e); });
  } else {
    Vec total(0.0f);
    each(E, [&](int64_t e, auto part) {
      const Vec g = part.keep(vexp(part.load(logits + e) - Vec(top)));
      total = total + g;
      part.store(g, gates + e);
    });
    sum = total.sum();
  }
  int64_t* experts = a.experts + t * a.K;
  float* weights = a.weights + t * a.K;
  uint64_t used[kMoeMaxExperts / 64] = {0};
  float chosen = 0;
  for (int64_t j = 0; j < a.K; ++j) {
    int64_t best = -1, spare = -1;
    for (int64_t e = 0; e < E; ++e) {
      if (used[e / 64] >> (e % 64) & 1) continue;
      if (logits[e] != logits[e]) {
        if (spare < 0) spare = e;
      } else if (best < 0 || logits[e] > logits[best]) {
        best = e;
      }
    }
    if (best < 0) best = spare;
    used[best / 64] |= uint64_t(1) << (best % 64);
    experts[j] = best;
    weights[j] = gates[best] / sum;
    chosen += weights[j];
  }
  if (a.renormalise)
    for (int64_t j = 0; j < a.K; ++j) weights[j] /= chosen;
}

template <class T>
void combine(const MoeCombineArgs& a, int64_t begin, int64_t end) {
  const T* y = static_cast<const T*>(a.y);
  for (int64_t t = begin; t < end; ++t) {
    T* out = static_cast<T*>(a.out) + t * a.C;
    const int64_t* position = a.position + t * a.K;
    const float* weights = a.weights + t * a.K;
    each(a.C, [&](int64_t c, auto part) {
      Vec sum(0.0f);
      for (int64_t j = 0; j < a.K; ++j)
        if (position[j] >= 0) sum = fma(Vec(weights[j]), part.load(y + position[j] * a.C + c), sum);
      part.store(sum, out + c);
    });
  }
}

}  // namespace

void moe_route(const MoeRouteArgs& a) {
  parallel_for(0, a.T, 1 + 4096 / a.E, [&](int64_t begin, int64_t end) {
    alignas(64) float logits[kMoeMaxExperts], gates[kMoeMaxExperts];
    for (int64_t t = begin; t < end; ++t) choose(a, t, logits, gates);
  });
  for (int64_t e = 0; e < a.E; ++e) a.counts[e] = 0;
  const int64_t slots = a.T * a.K;
  for (int64_t s = 0; s < slots; ++s) ++a.counts[a.experts[s]];
  a.offsets[0] = 0;
  int64_t next[kMoeMaxExperts];
  for (int64_t e = 0; e < a.E; ++e) {
    const int64_t kept = a.capacity >= 0 && a.counts[e] > a.capacity ? a.capacity : a.counts[e];
    next[e] = a.offsets[e];
    a.offsets[e + 1] = a.offsets[e] + kept;
  }
  int64_t late = a.offsets[a.E];
  for (int64_t s = 0; s < slots; ++s) {
    const int64_t e = a.experts[s];
    if (next[e] < a.offsets[e + 1]) {
      a.position[s] = next[e];
      a.order[next[e]++] = s;
    } else {
      a.position[s] = -1;
      a.weights[s] = 0;
      a.order[late++] = s;
    }
  }
}

void moe_combine(const MoeCombineArgs& a) {
  const int64_t grain = 1 + 16384 / (a.C * a.K + 1);
  FASTDIFF_DTYPE_SWITCH(
      a.dtype, parallel_for(0, a.T, grain, [&](int64_t b, int64_t e) { combine<T>(a, b, e); }));
}

FASTDIFF_KERNEL_END
