#include "aggregate_features.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

template <class T>
static const T* sample_of(const Models& m, int64_t k, int64_t b) {
  return static_cast<const T*>(m.data) + k * m.k_stride + b * m.b_stride;
}

// Weights of K models at one vector of logits: load(k) gives them. A logit of +inf counts as far
// above all others; NaN and no logit above -inf give NaN.
template <class Load>
static FD_INLINE void softmax(int64_t K, Vec* w, Load load) {
  Vec most(-INFINITY);
  for (int64_t k = 0; k < K; ++k) {
    w[k] = load(k);
    most = vmax(most, w[k]);
  }
  Vec sum(0.0f);
  for (int64_t k = 0; k < K; ++k) {
    // inf - inf is NaN: the largest are 0 below themselves
    const Vec below = select_lt(w[k], most, w[k] - most, Vec(0.0f));
    w[k] = vexp(keep_nan(below, w[k]));
    sum = sum + w[k];
  }
  const Vec share = Vec(1.0f) / select_lt(Vec(-INFINITY), most, sum, Vec(NAN));
  for (int64_t k = 0; k < K; ++k) w[k] = w[k] * share;
}

// Positions of a task: of planes many, as each has its own pages of memory.
constexpr int64_t kTile = 512, kRowsTile = 64;
constexpr int64_t kWeights = kTile + Vec::width;  // of a model: a tail is stored as a whole vector

// Weights of positions p to p + count - 1 of sample b, float32 [K, kWeights].
template <class L>
static void weigh(const Models& logits, int64_t K, int64_t b, int64_t p, int64_t count,
                  float* weights) {
  each(count, [&](int64_t i, auto part) {
    Vec w[kMaxModels];
    softmax(K, w, [&](int64_t k) { return part.load(sample_of<L>(logits, k, b) + p + i); });
    for (int64_t k = 0; k < K; ++k) w[k].store(weights + k * kWeights + i);
  });
}

// ---- one logit for each element ----

template <class T, class L>
static void each_forward(const AggregateFeaturesArgs& a, int64_t b, int64_t from, int64_t count) {
  T* out = static_cast<T*>(a.out) + b * a.C * a.P + from;
  each(count, [&](int64_t i, auto part) {
    Vec w[kMaxModels];
    softmax(a.K, w, [&](int64_t k) { return part.load(sample_of<L>(a.logits, k, b) + from + i); });
    Vec sum = w[0] * part.load(sample_of<T>(a.x, 0, b) + from + i);
    for (int64_t k = 1; k < a.K; ++k)
      sum = fma(w[k], part.load(sample_of<T>(a.x, k, b) + from + i), sum);
    part.store(sum, out + i);
  });
}

template <class T, class L>
static void each_backward(const AggregateFeaturesBackwardArgs& a, int64_t b, int64_t from,
                          int64_t count) {
  const int64_t size = a.C * a.P;
  const T* grad = static_cast<const T*>(a.grad) + b * size + from;
  each(count, [&](int64_t i, auto part) {
    Vec w[kMaxModels], d[kMaxModels], sum(0.0f);
    softmax(a.K, w, [&](int64_t k) { return part.load(sample_of<L>(a.logits, k, b) + from + i); });
    const Vec g = part.load(grad + i);
    for (int64_t k = 0; k < a.K; ++k) {
      d[k] = g * part.load(sample_of<T>(a.x, k, b) + from + i);
      sum = fma(w[k], d[k], sum);
    }
    for (int64_t k = 0; k < a.K; ++k) {
      const int64_t at = (k * a.B + b) * size + from + i;
      part.store(w[k] * g, static_cast<T*>(a.grad_x) + at);
      part.store(w[k] * (d[k] - sum), static_cast<L*>(a.grad_logits) + at);
    }
  });
}

// ---- one logit for each position: tiles of positions ----

template <class T, class L>
static void rows_forward(const AggregateFeaturesArgs& a, int64_t b, int64_t from, int64_t count,
                         float* weights) {
  weigh<L>(a.logits, a.K, b, from, count, weights);
  for (int64_t p = 0; p < count; ++p) {
    T* out = static_cast<T*>(a.out) + (b * a.P + from + p) * a.C;
    const T* x = sample_of<T>(a.x, 0, b) + (from + p) * a.C;
    each(a.C, [&](int64_t c, auto part) {
      Vec sum = Vec(weights[p]) * part.load(x + c);
      for (int64_t k = 1; k < a.K; ++k)
        sum = fma(Vec(weights[k * kWeights + p]), part.load(x + k * a.x.k_stride + c), sum);
      part.store(sum, out + c);
    });
  }
}

template <class T, class L>
static void planes_forward(const AggregateFeaturesArgs& a, int64_t b, int64_t from, int64_t count,
                           float* weights) {
  weigh<L>(a.logits, a.K, b, from, count, weights);
  for (int64_t c = 0; c < a.C; ++c) {
    T* out = static_cast<T*>(a.out) + (b * a.C + c) * a.P + from;
    const T* x = sample_of<T>(a.x, 0, b) + c * a.P + from;
    each(count, [&](int64_t p, auto part) {
      Vec sum = part.load(weights + p) * part.load(x + p);
      for (int64_t k = 1; k < a.K; ++k)
        sum = fma(part.load(weights + k * kWeights + p), part.load(x + k * a.x.k_stride + p), sum);
      part.store(sum, out + p);
    });
  }
}

// d_k [K, kWeights] to the gradients of the logits.
template <class L>
static void finish(const AggregateFeaturesBackwardArgs& a, int64_t b, int64_t from, int64_t count,
                   const float* weights, const float* d) {
  each(count, [&](int64_t p, auto part) {
    Vec sum(0.0f);
    for (int64_t k = 0; k < a.K; ++k)
      sum = fma(part.load(weights + k * kWeights + p), part.load(d + k * kWeights + p), sum);
    for (int64_t k = 0; k < a.K; ++k)
      part.store(part.load(weights + k * kWeights + p) * (part.load(d + k * kWeights + p) - sum),
                 static_cast<L*>(a.grad_logits) + (k * a.B + b) * a.P + from + p);
  });
}

template <class T, class L>
static void rows_backward(const AggregateFeaturesBackwardArgs& a, int64_t b, int64_t from,
                          int64_t count, float* weights, float* d) {
  weigh<L>(a.logits, a.K, b, from, count, weights);
  for (int64_t p = 0; p < count; ++p) {
    const T* grad = static_cast<const T*>(a.grad) + (b * a.P + from + p) * a.C;
    for (int64_t k = 0; k < a.K; ++k) {
      const T* x = sample_of<T>(a.x, k, b) + (from + p) * a.C;
      T* grad_x = static_cast<T*>(a.grad_x) + ((k * a.B + b) * a.P + from + p) * a.C;
      const Vec w(weights[k * kWeights + p]);
      float sums[1];
      sum_each<1>(a.C, sums, [&](int64_t c, auto part, Vec* acc) {
        const Vec g = part.load(grad + c);
        part.store(w * g, grad_x + c);
        acc[0] = fma(g, part.load(x + c), acc[0]);
      });
      d[k * kWeights + p] = sums[0];
    }
  }
  finish<L>(a, b, from, count, weights, d);
}

// Channels are added up 16 at a time, which keeps the error of float32 additions near a tree's.
template <class T, class L>
static void planes_backward(const AggregateFeaturesBackwardArgs& a, int64_t b, int64_t from,
                            int64_t count, float* weights, float* d) {
  weigh<L>(a.logits, a.K, b, from, count, weights);
  const T* grad = static_cast<const T*>(a.grad) + b * a.C * a.P + from;
  for (int64_t first = 0; first < a.C; first += 16) {  // whose gradients stay in cache for all k
    const int64_t end = first + 16 < a.C ? first + 16 : a.C;
    for (int64_t k = 0; k < a.K; ++k) {
      const T* x = sample_of<T>(a.x, k, b) + from;
      T* grad_x = static_cast<T*>(a.grad_x) + (k * a.B + b) * a.C * a.P + from;
      each(count, [&](int64_t p, auto part) {
        const Vec w = part.load(weights + k * kWeights + p);
        Vec sum(0.0f);
        for (int64_t c = first; c < end; ++c) {
          const Vec g = part.load(grad + c * a.P + p);
          part.store(w * g, grad_x + c * a.P + p);
          sum = fma(g, part.load(x + c * a.P + p), sum);
        }
        float* to = d + k * kWeights + p;
        part.store(first ? sum + part.load(to) : sum, to);
      });
    }
  }
  finish<L>(a, b, from, count, weights, d);
}

// Calls body(b, from, count, scratch) for tiles of the samples' elements or positions.
template <class Args, class F>
static void tiles(const Args& a, F body) {
  const bool each = a.maps == Maps::kEach;
  const int64_t size = each ? a.C * a.P : a.P;
  const int64_t tile = each ? 4096 : a.maps == Maps::kRows ? kRowsTile : kTile;
  const int64_t count = (size + tile - 1) / tile;
  const int64_t work = tile * a.K * (each ? 4 : a.C);
  parallel_for(0, a.B * count, 1 + 32768 / work, [&](int64_t begin, int64_t end) {
    Scratch<float> scratch(2 * size_t(kMaxModels) * kWeights);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i % count * tile;
      body(i / count, from, size - from < tile ? size - from : tile, scratch.data);
    }
  });
}

template <class T, class L>
static void forward(const AggregateFeaturesArgs& a) {
  tiles(a, [&](int64_t b, int64_t from, int64_t count, float* weights) {
    switch (a.maps) {
      case Maps::kEach: return each_forward<T, L>(a, b, from, count);
      case Maps::kRows: return rows_forward<T, L>(a, b, from, count, weights);
      case Maps::kPlanes: return planes_forward<T, L>(a, b, from, count, weights);
    }
  });
}

template <class T, class L>
static void backward(const AggregateFeaturesBackwardArgs& a) {
  tiles(a, [&](int64_t b, int64_t from, int64_t count, float* weights) {
    float* d = weights + kMaxModels * kWeights;
    switch (a.maps) {
      case Maps::kEach: return each_backward<T, L>(a, b, from, count);
      case Maps::kRows: return rows_backward<T, L>(a, b, from, count, weights, d);
      case Maps::kPlanes: return planes_backward<T, L>(a, b, from, count, weights, d);
    }
  });
}

void aggregate_features(const AggregateFeaturesArgs& a) {
  FASTDIFF_DTYPE_SWITCH(a.dtype, a.wide ? forward<T, float>(a) : forward<T, T>(a));
}

void aggregate_features_backward(const AggregateFeaturesBackwardArgs& a) {
  FASTDIFF_DTYPE_SWITCH(a.dtype, a.wide ? backward<T, float>(a) : backward<T, T>(a));
}

FASTDIFF_KERNEL_END
