// AdamW on packed entries of a weight, written into it in the same pass. A thread has kFlight
// entries, kThreads apart, so that a warp's loads and its writes to the weight lie together. Reads
// 20 bytes an entry (24 with an index of int64), writes 12 and the weight's entry, each once.
// Roundings are those of fastdiff/ops/sparse_adamw.py: intrinsics keep the compiler from fusing.
#include "cpu/sparse_adamw.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kThreads = 256;
constexpr int kFlight = 4;
constexpr int64_t kBlock = kThreads * kFlight;

template <bool kWide>
struct Index {
  using type = int;
};
template <>
struct Index<true> {
  using type = int64_t;
};

}  // namespace

// Shared: float[2], step_size and root where they hang on a step in GPU memory; one thread computes
// them in double while the block's loads are on their way.
// kWide: the index is int64. (Not a type: int64_t is `long` to nvcc and `long long` to NVRTC, which
// would give the kernel two names.)
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) sparse_adamw_entries(SparseAdamwArgs a) {
  using I = typename Index<kWide>::type;
  GPU_SHARED(float, numbers);
  const int64_t first = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  float p[kFlight], g[kFlight], m[kFlight], v[kFlight];
  I to[kFlight];
#pragma unroll
  for (int k = 0; k < kFlight; ++k) {
    const int64_t i = first + k * kThreads;
    if (i >= a.n) break;
    p[k] = a.values[i], g[k] = a.grad[i], m[k] = a.exp_avg[i], v[k] = a.exp_avg_sq[i];
    to[k] = static_cast<const I*>(a.index)[i];
  }
  float step_size = a.step_size, root = a.root;
  if (a.step) {
    if (threadIdx.x == 0) {
      const double t = *a.step;
      numbers[0] = float(-a.lr / (1 - exp(t * a.log_beta1)));
      numbers[1] = float(sqrt(1 - exp(t * a.log_beta2)));
    }
    __syncthreads();
    step_size = numbers[0], root = numbers[1];
  }
  const bool near = fabsf(a.weight1) < 0.5f;  // the end that torch's lerp starts from
  const float weight1 = near ? a.weight1 : a.weight1 - 1.0f;
#pragma unroll
  for (int k = 0; k < kFlight; ++k) {
    const int64_t i = first + k * kThreads;
    if (i >= a.n) break;
    m[k] = fmaf(weight1, __fadd_rn(g[k], -m[k]), near ? m[k] : g[k]);
    v[k] = fmaf(__fmul_rn(a.weight2, g[k]), g[k], __fmul_rn(v[k], a.beta2));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v[k]), root), a.eps);
    const float change = __fdiv_rn(__fmul_rn(step_size, m[k]), denominator);
    p[k] = __fadd_rn(__fmul_rn(p[k], a.decay), change);
    a.exp_avg[i] = m[k], a.exp_avg_sq[i] = v[k], a.values[i] = p[k];
    if (to[k] >= 0 && to[k] < a.size) static_cast<T*>(a.weight)[to[k]] = gpu::from_float<T>(p[k]);
  }
}

#ifndef __CUDACC_RTC__
namespace {

template <class T>
int launch(const SparseAdamwArgs& a, cudaStream_t stream) {
  const dim3 grid(unsigned((a.n + kBlock - 1) / kBlock)), block(kThreads);
  const size_t shared = 2 * sizeof(float);
  if (a.wide) return GPU_LAUNCH((sparse_adamw_entries<T, true>), grid, block, shared, stream, a);
  return GPU_LAUNCH((sparse_adamw_entries<T, false>), grid, block, shared, stream, a);
}

}  // namespace

extern "C" int fastdiff_gpu_sparse_adamw(const SparseAdamwArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE(T)                                            \
  template __global__ void sparse_adamw_entries<T, true>(SparseAdamwArgs); \
  template __global__ void sparse_adamw_entries<T, false>(SparseAdamwArgs);
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
