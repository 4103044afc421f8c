// Systematic selection of particles, one block for a group. A thread has the particles k =
// threadIdx.x + kThreads i; the first warp makes the cumulative sums, each lane of neighbouring
// particles one after another, so that they ascend and a particle without weight has the edge of
// the one before it. A point finds its parent in them by bisection. Reads 4 or 8 bytes a particle,
// writes 12 or 16. Shared: double[K + 2 kWarps + 32].
#include "cpu/resample.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

// The largest of `v` over the block, in every thread; no NaN.
__device__ double block_max(double v, double* shared) {
  for (int with = 16; with; with >>= 1) {
    const double other = __shfl_xor_sync(gpu::kAll, v, with);
    v = other > v ? other : v;
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) v = shared[w] > v ? shared[w] : v;
  return v;
}

// The sum of `v` over the block, in every thread.
__device__ double block_sum(double v, double* shared) {
  for (int with = 16; with; with >>= 1) v += __shfl_xor_sync(gpu::kAll, v, with);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.0;
  for (int w = 0; w < kWarps; ++w) v += shared[w];
  return v;
}

// Weights become their cumulative sums; by the first warp.
__device__ void accumulate(double* edges, double* totals, int count) {
  const int lane = int(threadIdx.x), each = (count + 31) / 32;
  const int from = min(lane * each, count), to = min(from + each, count);
  double sum = 0.0;
  for (int k = from; k < to; ++k) {
    sum += edges[k];
    edges[k] = sum;
  }
  totals[lane] = sum;
  __syncwarp();
  double before = 0.0;
  for (int l = 0; l < lane; ++l) before += totals[l];
  for (int k = from; k < to; ++k) edges[k] = before + edges[k];
}

}  // namespace

template <class T>
__global__ void __launch_bounds__(kThreads) resample_group(ResampleArgs a) {
  GPU_SHARED(double, edges);
  const int count = int(a.K), thread = int(threadIdx.x);
  double *most_of = edges + count, *squares_of = most_of + kWarps, *totals = squares_of + kWarps;
  const int64_t first = int64_t(blockIdx.x) * a.K;
  const T* logw = static_cast<const T*>(a.logw) + first;
  T* after = static_cast<T*>(a.after) + first;
  const double none = -INFINITY;
  double most = none;
  for (int k = thread; k < count; k += kThreads) {
    const double l = double(logw[k]);
    most = l > most ? l : most;
  }
  most = block_max(most, most_of);
  double squares = 0.0;
  for (int k = thread; k < count; k += kThreads) {
    const double l = double(logw[k]);
    // Equal weights where all are -inf or NaN; of infinite ones each has 1. NaN has none.
    const double w = most == none || l == most ? 1.0 : l == l ? exp(l - most) : 0.0;
    edges[k] = w;
    squares += w * w;
  }
  squares = block_sum(squares, squares_of);
  if (thread < 32) accumulate(edges, totals, count);
  __syncthreads();
  const double total = edges[count - 1];
  const bool did = total * total / squares < a.least;
  if (thread == 0) a.did[blockIdx.x] = did;
  const T mean = T(most + (log(total) - log(double(count))));
  for (int j = thread; j < count; j += kThreads) {
    int low = 0, high = count - 1;  // the first edge past the point is in [low, high]
    double point = (a.u[blockIdx.x] + double(j)) / double(count);
    point = point > kBelowOne ? kBelowOne : point;
    while (did && low < high) {
      const int middle = (low + high) / 2;
      if (edges[middle] / total > point)
        high = middle;
      else
        low = middle + 1;
    }
    a.parents[first + j] = did ? low : j;
    after[j] = did ? mean : logw[j];
  }
}

#ifndef __CUDACC_RTC__
extern "C" int fastdiff_gpu_resample(const ResampleArgs* a, void* stream) {
  const dim3 grid(unsigned(a->G)), block(kThreads);
  const size_t shared = size_t(a->K + 2 * kWarps + 32) * sizeof(double);
  const auto on = static_cast<cudaStream_t>(stream);
  return a->wide ? GPU_LAUNCH((resample_group<double>), grid, block, shared, on, *a)
                 : GPU_LAUNCH((resample_group<float>), grid, block, shared, on, *a);
}
#else
template __global__ void resample_group<double>(ResampleArgs);
template __global__ void resample_group<float>(ResampleArgs);
#endif
}  // namespace fastdiff
