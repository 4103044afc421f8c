#include <cmath>
#include <limits>
#include <vector>

#include "resample.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

// One group: weights relative to the largest, in the order of the particles.
template <class T>
static void resample_of(const ResampleArgs& a, int64_t g, std::vector<double>& edges) {
  const T* logw = static_cast<const T*>(a.logw) + g * a.K;
  T* after = static_cast<T*>(a.after) + g * a.K;
  int64_t* parents = a.parents + g * a.K;
  const double inf = std::numeric_limits<double>::infinity(), count = double(a.K);
  double most = -inf;
  for (int64_t k = 0; k < a.K; ++k) most = logw[k] > most ? double(logw[k]) : most;
  double total = 0.0, squares = 0.0;
  for (int64_t k = 0; k < a.K; ++k) {
    const double l = double(logw[k]);
    // Equal weights where all are -inf or NaN; of infinite ones each has 1. NaN has none.
    const double w = most == -inf || l == most ? 1.0 : l == l ? std::exp(l - most) : 0.0;
    total += w, squares += w * w;
    edges[k] = total;
  }
  a.did[g] = total * total / squares < a.least;
  if (!a.did[g]) {
    for (int64_t k = 0; k < a.K; ++k) parents[k] = k, after[k] = logw[k];
    return;
  }
  const T mean = T(most + (std::log(total) - std::log(count)));
  for (int64_t j = 0, k = 0; j < a.K; ++j) {
    double point = (a.u[g] + double(j)) / count;
    point = point > kBelowOne ? kBelowOne : point;
    while (k < a.K - 1 && !(edges[k] / total > point)) ++k;
    parents[j] = k, after[j] = mean;
  }
}

template <class T>
static void groups(const ResampleArgs& a) {
  parallel_for(0, a.G, 1 + 4096 / a.K, [&](int64_t begin, int64_t end) {
    std::vector<double> edges(a.K);
    for (int64_t g = begin; g < end; ++g) resample_of<T>(a, g, edges);
  });
}

void resample(const ResampleArgs& a) { a.wide ? groups<double>(a) : groups<float>(a); }

FASTDIFF_KERNEL_END
