// One sampler step (the algebra: fastdiff/ops/fused_step.py), and its noise alone.
//
// A thread owns the 16 elements of four neighbouring Philox counters: quads of four neighbours, 16
// apart, in one group of 64. So noise never leaves registers, nothing is drawn twice, and the four
// threads of a group read and write 16 neighbours at a time. Every input is read once and every
// output written once; no shared memory in the step. Sums of guidance rescale are added in a fixed
// order: over chunks of kStepChunk elements by blocks, then over a sample's chunks by one warp.
//
// Row index, seed, slot and step are read here: no call waits for the device. A row out of range
// is clamped, so that nothing outside the table is read.
#include "cpu/fused_step.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kThreads = 128;
constexpr int kQuads = 4;  // of a thread, one for each word of a Philox counter

__device__ __forceinline__ int64_t value(const Counter& counter, int64_t b) {
  return counter.data[b * counter.stride];
}

// Elements p[0] .. p[3] of which n are there, zeros for the rest. Aligned quads are whole or
// absent.
template <bool aligned, class T>
__device__ __forceinline__ void load(const T* p, int64_t n, float (&v)[4]) {
  if constexpr (aligned) {
    if (n > 0) return gpu::load4(p, v);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = !aligned && i < n ? gpu::to_float(p[i]) : 0.0f;
}
template <bool aligned, class T>
__device__ __forceinline__ void store(const float (&v)[4], int64_t n, T* p) {
  if constexpr (aligned) {
    gpu::store4(v, p);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < n) p[i] = gpu::from_float<T>(v[i]);
  }
}
template <bool aligned, class T>
__device__ __forceinline__ void copy(const T* from, int64_t n, T* to) {
  if constexpr (aligned) {
    *reinterpret_cast<gpu::Quad<T>*>(to) = *reinterpret_cast<const gpu::Quad<T>*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < n) to[i] = from[i];
  }
}

struct Noise {
  uint64_t seed;
  uint32_t slot, step;
};

__device__ __forceinline__ Noise noise_of(const NoiseCounters& noise, int64_t b) {
  return {uint64_t(value(noise.seed, b)), uint32_t(value(noise.slot, b)),
          uint32_t(value(noise.step, b))};
}

// Philox4x32-10 (Salmon et al. 2011).
__device__ __forceinline__ void philox(const Noise& noise, uint32_t stream, uint32_t counter,
                                       uint32_t (&c)[4]) {
  uint32_t k0 = uint32_t(noise.seed), k1 = uint32_t(noise.seed >> 32);
  c[0] = counter, c[1] = noise.slot, c[2] = noise.step, c[3] = stream;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(c[0]) * 0xD2511F53u, p1 = uint64_t(c[2]) * 0xCD9E8D57u;
    c[0] = uint32_t(p1 >> 32) ^ c[1] ^ k0;
    c[2] = uint32_t(p0 >> 32) ^ c[3] ^ k1;
    c[1] = uint32_t(p1);
    c[3] = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// ln(u) for normal u > 0: Cephes logf, <= 1 ulp; the hardware's is only absolutely accurate near 1.
__device__ __forceinline__ float log_of(float u) {
  const uint32_t i = __float_as_uint(u) - 0x3f3504f3u;  // sqrt(1/2): mantissa in [1/2, 2) of it
  const float e = float(int(i) >> 23);
  const float x = __int_as_float(int((i & 0x007fffffu) + 0x3f3504f3u)) - 1.0f, z = x * x;
  float p = 7.0376836292e-2f;
  p = fmaf(p, x, -1.1514610310e-1f);
  p = fmaf(p, x, 1.1676998740e-1f);
  p = fmaf(p, x, -1.2420140846e-1f);
  p = fmaf(p, x, 1.4249322787e-1f);
  p = fmaf(p, x, -1.6668057665e-1f);
  p = fmaf(p, x, 2.0000714765e-1f);
  p = fmaf(p, x, -2.4999993993e-1f);
  p = fmaf(p, x, 3.3333331174e-1f);
  const float y = fmaf(-0.5f, z, fmaf(e, -2.12194440e-4f, p * x * z));
  return fmaf(e, 0.693359375f, x + y);
}

// cos and sin of 2 pi r / 2^32: exact quadrant from integers, Cephes polynomials to pi/4.
__device__ __forceinline__ void cos_sin(uint32_t r, float& cosine, float& sine) {
  const uint32_t quadrant = (r + 0x20000000u) >> 30;
  const float a = float(int(r - (quadrant << 30))) * 1.4629180792671596e-9f;  // pi/2 2^-30
  const float z = a * a;
  float s = fmaf(z, -1.9515295891e-4f, 8.3321608736e-3f);
  s = fmaf(s, z, -1.6666654611e-1f);
  s = fmaf(s * z, a, a);
  float c = fmaf(z, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = fmaf(c, z, 4.166664568298827e-2f);
  c = fmaf(c, z * z, fmaf(-0.5f, z, 1.0f));
  const bool odd = quadrant & 1;
  cosine = odd ? s : c;
  sine = odd ? c : s;
  if ((quadrant + 1) & 2) cosine = -cosine;
  if (quadrant & 2) sine = -sine;
}

// Two normals of two words (Box-Muller).
__device__ __forceinline__ void box_muller(uint32_t a, uint32_t angle, float& z0, float& z1) {
  const float u = fmaf(float(a), 2.3283064365386963e-10f, 1.1641532182693481e-10f);  // 2^-32, 2^-33
  const float radius = sqrtf(-2.0f * log_of(u));
  float cosine, sine;
  cos_sin(angle, cosine, sine);
  z0 = radius * cosine;
  z1 = radius * sine;
}

// Words 0..3 of the counters counter .. counter + 3: one quad of noise for each word.
__device__ __forceinline__ void normals(const Noise& noise, uint32_t stream, uint32_t counter,
                                        float (&z)[kQuads][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t r[4];
    philox(noise, stream, counter + uint32_t(i), r);
    box_muller(r[0], r[1], z[0][i], z[1][i]);
    box_muller(r[2], r[3], z[2][i], z[3][i]);
  }
}

// Which elements of a sample a thread owns: quads at begin, begin + 16, begin + 32, begin + 48.
struct Place {
  int64_t b, begin;
  uint32_t counter;  // the first of four
};
__device__ __forceinline__ Place place(unsigned blocks) {
  const int64_t thread = int64_t(blockIdx.x % blocks) * blockDim.x + threadIdx.x;
  return {int64_t(blockIdx.x / blocks), thread / 4 * kNoiseGroup + thread % 4 * 4,
          uint32_t(thread * 4)};
}

// Quads m + apart q of which n elements from m on are there: loads of all quads before their use.
template <bool aligned, int apart, class T, int count>
__device__ __forceinline__ void load_quads(const T* m, int64_t n, float (&v)[count][4]) {
#pragma unroll
  for (int q = 0; q < count; ++q) load<aligned>(m + apart * q, n - apart * q, v[q]);
}

// sum_k w_k m_k of such quads of a sample; w null: m of the only branch.
template <bool aligned, int apart, class Tm, int count>
__device__ __forceinline__ void combine(const FusedStepArgs& a, const float* w, const Tm* m,
                                        int64_t n, float (&g)[count][4]) {
  load_quads<aligned, apart>(m, n, g);
  if (!w) return;
#pragma unroll
  for (int i = 0; i < 4 * count; ++i) {
    float& v = g[i / 4][i % 4];
    v = fmaf(w[0], v, 0.0f);  // not fused with what follows
  }
  for (int64_t k = 1; k < a.branches; ++k) {
    float v[count][4];
    load_quads<aligned, apart>(m + k * a.m_branch, n, v);
#pragma unroll
    for (int i = 0; i < 4 * count; ++i)
      g[i / 4][i % 4] = fmaf(w[k], v[i / 4][i % 4], g[i / 4][i % 4]);
  }
}

// The mask of elements i .. i + 3 of a plane that repeats; planes of aligned quads are whole quads.
template <bool aligned>
__device__ __forceinline__ void load_mask(const float* mask, int64_t plane, int64_t i, int64_t n,
                                          float (&v)[4]) {
  auto wrap = [&](int64_t j) { return j < plane ? j : j % plane; };  // divides where it must
  if constexpr (aligned) {
    gpu::load4(mask + wrap(i), v);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] = e < n ? mask[wrap(i + e)] : 0.0f;
  }
}

}  // namespace

// Grid: samples times `blocks`.
template <bool aligned>
__global__ void __launch_bounds__(kThreads)
    philox_normal_elements(PhiloxNormalArgs a, unsigned blocks) {
  const Place at = place(blocks);
  if (at.begin >= a.numel) return;
  float z[kQuads][4];
  normals(noise_of(a.noise, at.b), a.noise.stream, at.counter, z);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int64_t i = at.begin + 16 * q;
    if (i < a.numel) store<aligned>(z[q], a.numel - i, a.z + at.b * a.numel + i);
  }
}

// Sums of (g - g_0), (g - g_0)^2 of the combined prediction and of the last branch over one chunk,
// a block each. Shifted by the sample's first element: no loss to a large mean, and exactly 0 for a
// constant. The order of additions depends on neither alignment nor batch.
template <class Tm, bool aligned>
__global__ void __launch_bounds__(kThreads) fused_step_moments(FusedStepArgs a) {
  GPU_SHARED(float, sums);  // [4, kThreads / 32]
  const int64_t b = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
  const Tm* m = static_cast<const Tm*>(a.m) + b * a.m_sample;
  const Tm* last = m + (a.branches - 1) * a.m_branch;
  const float* w = a.w ? a.w + b * a.branches : nullptr;
  float first[1][4];
  combine<false, 0>(a, w, m, 1, first);
  const float g0 = first[0][0], p0 = gpu::to_float(last[0]);
  float s[4] = {0, 0, 0, 0};
  constexpr int kApart = kThreads * 4, kOnce = 2;  // four quads at once spill on sm_86 and 90
  int64_t i = chunk * kStepChunk + int64_t(threadIdx.x) * 4;
  const int64_t end = min((chunk + 1) * kStepChunk, a.numel);
  for (; i < end; i += kOnce * kApart) {
    float g[kOnce][4], p[kOnce][4];
    load_quads<aligned, kApart>(last + i, end - i, p);
    combine<aligned, kApart>(a, w, m + i, end - i, g);
#pragma unroll
    for (int e = 0; e < 4 * kOnce; ++e) {
      if (i + e / 4 * kApart + e % 4 >= end) continue;
      const float dg = g[e / 4][e % 4] - g0, dp = p[e / 4][e % 4] - p0;
      s[0] += dg, s[1] = fmaf(dg, dg, s[1]);
      s[2] += dp, s[3] = fmaf(dp, dp, s[3]);
    }
  }
  constexpr int kWarps = kThreads / 32;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float sum = gpu::warp_sum(s[k]);
    if (threadIdx.x % 32 == 0) sums[k * kWarps + threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= 4) return;
  double sum = 0.0;
  for (int warp = 0; warp < kWarps; ++warp) sum += sums[threadIdx.x * kWarps + warp];
  a.moments[int64_t(blockIdx.x) * 4 + threadIdx.x] = sum;
}

// phi std(last) / std(combined) + 1 - phi of one sample, a warp each; 1 where phi is 0 or nothing
// varies.
__global__ void __launch_bounds__(32) fused_step_rescale(FusedStepArgs a) {
  const int64_t b = blockIdx.x;
  const double* moments = a.moments + b * a.chunks * 4;
  double mean[4] = {0, 0, 0, 0};
  for (int64_t c = threadIdx.x; c < a.chunks; c += 32)
#pragma unroll
    for (int k = 0; k < 4; ++k) mean[k] += moments[c * 4 + k];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    for (int with = 16; with; with >>= 1) mean[k] += __shfl_xor_sync(gpu::kAll, mean[k], with);
    mean[k] /= double(a.numel);
  }
  if (threadIdx.x != 0) return;
  const double var = mean[1] - mean[0] * mean[0], last = mean[3] - mean[2] * mean[2];
  const double phi = a.phi[b];
  const bool spread = phi != 0.0 && !(var <= 0.0);
  a.factor[b] = spread ? float(phi * sqrt(max(last, 0.0) / var) + (1.0 - phi)) : 1.0f;
}

// Grid: samples times `blocks`. Noise is drawn only where its column of the row is not 0.
template <class T, class Tm, bool aligned>
__global__ void __launch_bounds__(kThreads) fused_step_elements(FusedStepArgs a, unsigned blocks) {
  const Place at = place(blocks);
  const int64_t b = at.b;
  if (at.begin >= a.numel) return;
  int64_t row = b * a.row.stride;
  if (a.row.data) row = min(max(a.row.data[row], int64_t(0)), a.rows - 1);
  float c[kStepColumns];
#pragma unroll
  for (int k = 0; k < kStepColumns; ++k) c[k] = a.coef[row * kStepColumns + k];
  const float* w = a.w ? a.w + b * a.branches : nullptr;
  const float* mask = a.mask ? a.mask + b * a.mask_sample : nullptr;
  const int64_t plane = a.mask_plane ? a.mask_plane : a.numel;
  const int64_t in_plane = mask ? at.begin % plane : 0;
  const float factor = a.phi ? a.factor[b] : 1.0f;
  const bool take = a.select && a.select[b];

  // On their way while the noise is computed.
  float x[kQuads][4], g[kQuads][4];
  const int64_t sample = b * a.numel, left = a.numel - at.begin;
  load_quads<aligned, 16>(static_cast<const T*>(a.x) + sample + at.begin, left, x);
  combine<aligned, 16>(a, w, static_cast<const Tm*>(a.m) + b * a.m_sample + at.begin, left, g);

  float z[kQuads][4] = {}, z_ref[kQuads][4] = {};
  if (a.noise.seed.data) {
    const Noise noise = noise_of(a.noise, b);
    if (c[kSigma] != 0.0f) normals(noise, a.noise.stream, at.counter, z);
    if (mask && c[kRb] != 0.0f) normals(noise, a.noise.stream + 1, at.counter, z_ref);
  }

#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int64_t n = left - 16 * q, from = sample + at.begin + 16 * q;
    if (n <= 0) continue;
    auto input = [&](const void* p, float (&v)[4]) {
      load<aligned>(static_cast<const T*>(p) + from, n, v);
    };
    float x0[4], y[4], v[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (a.phi) g[q][e] *= factor;
      const float unclipped = fmaf(c[kAx], x[q][e], c[kAm] * g[q][e]);
      // Comparisons let a NaN through.
      x0[e] = unclipped < -c[kClip] ? -c[kClip] : unclipped > c[kClip] ? c[kClip] : unclipped;
      y[e] = fmaf(c[kCx], x[q][e], fmaf(c[kC0], x0[e], c[kCm] * g[q][e]));
    }
    if (a.h1) {
      input(a.h1, v);
#pragma unroll
      for (int e = 0; e < 4; ++e) y[e] = fmaf(c[kCh1], v[e], y[e]);
    }
    if (a.h2) {
      input(a.h2, v);
#pragma unroll
      for (int e = 0; e < 4; ++e) y[e] = fmaf(c[kCh2], v[e], y[e]);
    }
    if (a.noise.seed.data) {
#pragma unroll
      for (int e = 0; e < 4; ++e) y[e] = fmaf(c[kSigma], z[q][e], y[e]);
    }
    if (a.kept) {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        v[e] = fmaf(c[kKx], x[q][e], fmaf(c[kK0], x0[e], c[kKm] * g[q][e]));
      store<aligned>(v, n, static_cast<T*>(a.kept) + from);
    }
    if (mask) {
      float inside[4];
      load_mask<aligned>(mask, plane, in_plane + 16 * q, n, inside);
      input(a.ref, v);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float pasted = fmaf(c[kRb], z_ref[q][e], c[kRa] * v[e]);
        y[e] = fmaf(inside[e], y[e], (1.0f - inside[e]) * pasted);
      }
    }
    T* out = static_cast<T*>(a.y) + from;
    if (take) {
      copy<aligned>(static_cast<const T*>(a.stored) + from, n, out);
    } else {
      store<aligned>(y, n, out);
    }
  }
}

#ifndef __CUDACC_RTC__
namespace {

constexpr int kInvalidConfiguration = 9;  // of cudaError_t

// Blocks for the 16 elements a thread of `numel`, and threads of a block: no more than there is
// work for.
struct Split {
  int64_t blocks, threads;
};
Split split_of(int64_t numel) {
  const int64_t units = (numel + kNoiseGroup - 1) / kNoiseGroup * 4;
  const int64_t threads = units < kThreads ? (units + 31) / 32 * 32 : kThreads;
  return {(units + threads - 1) / threads, threads};
}

// Whether quads at p, p + stride, ... are aligned.
bool quads(const void* p, size_t size, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(p) % (4 * size) == 0 && stride % 4 == 0;
}

template <class T, class Tm, bool aligned>
int launch(const FusedStepArgs& a, cudaStream_t stream) {
  const Split split = split_of(a.numel);
  constexpr int64_t kMost = 0x7fffffff;  // blocks of a grid
  if (a.batch * split.blocks > kMost || a.batch * a.chunks > kMost) return kInvalidConfiguration;
  if (a.phi) {
    const size_t shared = 4 * kThreads / 32 * sizeof(float);
    int error = GPU_LAUNCH((fused_step_moments<Tm, aligned>), dim3(unsigned(a.batch * a.chunks)),
                           dim3(kThreads), shared, stream, a);
    if (error) return error;
    error = GPU_LAUNCH((fused_step_rescale), dim3(unsigned(a.batch)), dim3(32), 0, stream, a);
    if (error) return error;
  }
  return GPU_LAUNCH((fused_step_elements<T, Tm, aligned>), dim3(unsigned(a.batch * split.blocks)),
                    dim3(unsigned(split.threads)), 0, stream, a, unsigned(split.blocks));
}

template <class State, class Output>
int launch(const FusedStepArgs& a, cudaStream_t stream) {
  bool aligned = a.numel % 4 == 0 && a.mask_plane % 4 == 0;
  for (const void* p : {a.x, a.h1, a.h2, a.ref, a.stored, static_cast<const void*>(a.y),
                        static_cast<const void*>(a.kept)})
    aligned = aligned && quads(p, sizeof(State));
  aligned = aligned && quads(a.m, sizeof(Output), a.m_branch) && a.m_sample % 4 == 0;
  aligned = aligned && quads(a.mask, sizeof(float), a.mask_sample);
  return aligned ? launch<State, Output, true>(a, stream) : launch<State, Output, false>(a, stream);
}

template <class State>
int launch(const FusedStepArgs& a, cudaStream_t stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a.m_dtype), error = launch<State, T>(a, stream));
  return error;
}

int launch(const PhiloxNormalArgs& a, cudaStream_t stream) {
  const Split split = split_of(a.numel);
  if (a.batch * split.blocks > 0x7fffffff) return kInvalidConfiguration;
  const dim3 grid(unsigned(a.batch * split.blocks)), block(unsigned(split.threads));
  const bool aligned = a.numel % 4 == 0 && quads(a.z, sizeof(float));
  return aligned ? GPU_LAUNCH((philox_normal_elements<true>), grid, block, 0, stream, a,
                              unsigned(split.blocks))
                 : GPU_LAUNCH((philox_normal_elements<false>), grid, block, 0, stream, a,
                              unsigned(split.blocks));
}

}  // namespace

extern "C" int fastdiff_gpu_fused_step(const FusedStepArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
extern "C" int fastdiff_gpu_philox_normal(const PhiloxNormalArgs* a, void* stream) {
  return launch(*a, static_cast<cudaStream_t>(stream));
}
#else
#define FASTDIFF_INSTANTIATE(T)                                                               \
  template __global__ void fused_step_moments<T, true>(FusedStepArgs);                        \
  template __global__ void fused_step_moments<T, false>(FusedStepArgs);                       \
  template __global__ void fused_step_elements<float, T, true>(FusedStepArgs, unsigned);      \
  template __global__ void fused_step_elements<float, T, false>(FusedStepArgs, unsigned);     \
  template __global__ void fused_step_elements<gpu::bf16, T, true>(FusedStepArgs, unsigned);  \
  template __global__ void fused_step_elements<gpu::bf16, T, false>(FusedStepArgs, unsigned); \
  template __global__ void fused_step_elements<gpu::f16, T, true>(FusedStepArgs, unsigned);   \
  template __global__ void fused_step_elements<gpu::f16, T, false>(FusedStepArgs, unsigned);
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
template __global__ void philox_normal_elements<true>(PhiloxNormalArgs, unsigned);
template __global__ void philox_normal_elements<false>(PhiloxNormalArgs, unsigned);
#endif
}  // namespace fastdiff
