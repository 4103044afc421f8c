// r = x + gate y and m = modulate(norm(r)), one warp a row, or m / smooth as int8 with a scale. The
// row stays in registers between the sum, the statistics, the modulation and the rounding: every
// element is read once and written once.
#include "cpu/layer_norm_modulate.h"
#include "gpu.h"

namespace fastdiff {
namespace {

constexpr int kWarps = 4;  // rows of a block
constexpr float kLevels = 127.0f;
constexpr float kTiny = kLevels * 0x1p-126f;  // below it 127 / max is no float32

template <class T>
__device__ __forceinline__ const T* row_of(const Modulation& m, int64_t b, int64_t n) {
  return m.data ? static_cast<const T*>(m.data) + b * m.b_stride + n * m.n_stride : nullptr;
}

// `width` neighbouring elements: 4 where every row is aligned to four, else 1.
template <int width, class T>
__device__ __forceinline__ void load(const T* p, float (&v)[width]) {
  if constexpr (width == 4) {
    gpu::load4(p, v);
  } else {
    v[0] = gpu::to_float(*p);
  }
}
template <int width, class T>
__device__ __forceinline__ void store(const float (&v)[width], T* p) {
  if constexpr (width == 4) {
    gpu::store4(v, p);
  } else {
    *p = gpu::from_float<T>(v[0]);
  }
}

template <int width>
struct alignas(width) Bytes {
  signed char e[width];
};

// x + gate y of `width` elements of a row, written to the residual where there is one.
template <class T, int width>
__device__ __forceinline__ void add_gated(const T* x, const T* y, const T* gate, T* residual,
                                          int64_t d, float (&r)[width]) {
  load<width>(x + d, r);
  if (!y) return;
  float v[width], g[width];
  load<width>(y + d, v);
  load<width>(gate + d, g);
#pragma unroll
  for (int i = 0; i < width; ++i) r[i] = fmaf(g[i], v[i], r[i]);
  store<width>(r, residual + d);
}

}  // namespace

// Lane l holds packs l, l + 32, ... of the row, `packs` of them at most; longer rows are read again
// (kept == 0) from x, or from x + gate y computed anew.
template <class T, int width, int kept, bool rounded>
__global__ void __launch_bounds__(32 * kWarps, rounded ? 3 : 0)
    layer_norm_rows(LayerNormModulateArgs a) {
  const int lane = int(threadIdx.x) % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= a.B * a.N) return;
  const int64_t b = row / a.N, n = row % a.N, packs = a.D / width;
  const T *x = row_of<T>(a.x, b, n), *y = row_of<T>(a.y, b, n), *gate = row_of<T>(a.gate, b, n);
  T* residual = a.residual ? static_cast<T*>(a.residual) + row * a.D : nullptr;
  T* out = a.modulated ? static_cast<T*>(a.modulated) + row * a.D : nullptr;

  constexpr int kHeld = kept ? kept : 1;
  float held[kHeld][width], sum = 0.0f;
  if constexpr (kept > 0) {
#pragma unroll
    for (int k = 0; k < kept; ++k) {
      const int64_t pack = lane + 32 * k;
      if (pack < packs) add_gated<T, width>(x, y, gate, residual, pack * width, held[k]);
#pragma unroll
      for (int i = 0; i < width; ++i) {
        if (pack >= packs) held[k][i] = 0.0f;
        sum += held[k][i];
      }
    }
  } else {
    for (int64_t pack = lane; pack < packs; pack += 32) {
      add_gated<T, width>(x, y, gate, residual, pack * width, held[0]);
#pragma unroll
      for (int i = 0; i < width; ++i) sum += held[0][i];
    }
  }
  if (!out && !rounded) return;

  // Two passes: squares of deviations do not cancel where the mean is large.
  const float mean = a.rms ? 0.0f : gpu::warp_sum(sum) / float(a.D);
  float square = 0.0f;
  auto deviate = [&](int64_t pack, float (&v)[width]) {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      const float d = v[i] - mean;
      if (pack < packs) square = fmaf(d, d, square);
    }
  };
  auto again = [&](int64_t pack, float (&v)[width]) {  // without a second write of the residual
    load<width>(x + pack * width, v);
    if (!y) return;
    float s[width], g[width];
    load<width>(y + pack * width, s);
    load<width>(gate + pack * width, g);
#pragma unroll
    for (int i = 0; i < width; ++i) v[i] = fmaf(g[i], s[i], v[i]);
  };
  if constexpr (kept > 0) {
#pragma unroll
    for (int k = 0; k < kept; ++k) deviate(lane + 32 * k, held[k]);
  } else {
    for (int64_t pack = lane; pack < packs; pack += 32)
      again(pack, held[0]), deviate(pack, held[0]);
  }
  const float rstd = rsqrtf(gpu::warp_sum(square) / float(a.D) + a.eps);

  const T *weight = static_cast<const T*>(a.weight), *bias = static_cast<const T*>(a.bias);
  const T *scale = row_of<T>(a.scale, b, n), *shift = row_of<T>(a.shift, b, n);
  auto modulate = [&](int64_t pack, const float (&v)[width], float (&m)[width]) {
    const int64_t d = pack * width;
    float p[width];
#pragma unroll
    for (int i = 0; i < width; ++i) m[i] = (v[i] - mean) * rstd;
    if (weight) {
      load<width>(weight + d, p);
#pragma unroll
      for (int i = 0; i < width; ++i) m[i] *= p[i];
    }
    if (bias) {
      load<width>(bias + d, p);
#pragma unroll
      for (int i = 0; i < width; ++i) m[i] += p[i];
    }
    if (scale) {
      load<width>(scale + d, p);
#pragma unroll
      for (int i = 0; i < width; ++i) m[i] = fmaf(m[i], p[i], m[i]);
    }
    if (shift) {
      load<width>(shift + d, p);
#pragma unroll
      for (int i = 0; i < width; ++i) m[i] += p[i];
    }
    if constexpr (rounded) {
      if (!a.smooth) return;
      load<width>(a.smooth + d, p);
#pragma unroll
      for (int i = 0; i < width; ++i) m[i] = __fdiv_rn(m[i], p[i]);
    }
  };
  // do_(first element, m) for the lane's packs; the second time m is held already where rows are.
  const auto each = [&](bool modulated, auto do_) {
    if constexpr (kept > 0) {
#pragma unroll
      for (int k = 0; k < kept; ++k) {
        const int64_t pack = lane + 32 * k;
        if (pack >= packs) continue;
        if (!modulated) {
          float m[width];
          modulate(pack, held[k], m);
#pragma unroll
          for (int i = 0; i < width; ++i) held[k][i] = m[i];
        }
        do_(pack * width, held[k]);
      }
    } else {
#pragma unroll(rounded ? 1 : 4)
      for (int64_t pack = lane; pack < packs; pack += 32) {
        float m[width];
        again(pack, held[0]), modulate(pack, held[0], m);
        do_(pack * width, m);
      }
    }
  };
  if constexpr (!rounded) {
    each(false, [&](int64_t d, const float (&m)[width]) { store<width>(m, out + d); });
  } else {
    float most = 0.0f;
    each(false, [&](int64_t, const float (&m)[width]) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float size = fabsf(m[i]);
        most = fmaxf(most, size < INFINITY ? size : INFINITY);  // a NaN counts as infinite
      }
    });
    most = gpu::warp_max(most);
    const bool finite = most < INFINITY, usable = finite && most >= kTiny;
    if (lane == 0)
      a.s[row] = !finite ? __int_as_float(0x7fc00000) : usable ? __fdiv_rn(most, kLevels) : 0.0f;
    const float inverse = usable ? __fmul_rn(__fdiv_rn(1.0f, most), kLevels) : 0.0f;
    signed char* q = reinterpret_cast<signed char*>(a.q) + row * a.D;
    each(true, [&](int64_t d, const float (&m)[width]) {
      Bytes<width> pack = {};
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const float level = usable ? rintf(__fmul_rn(m[i], inverse)) : 0.0f;
        pack.e[i] = static_cast<signed char>(fminf(fmaxf(level, -kLevels), kLevels));
      }
      *reinterpret_cast<Bytes<width>*>(q + d) = pack;
    });
  }
}

#ifndef __CUDACC_RTC__
namespace {

template <class T, int width, int kept>
int launch(const LayerNormModulateArgs& a, cudaStream_t stream) {
  const dim3 grid(unsigned((a.B * a.N + kWarps - 1) / kWarps)), block(32 * kWarps);
  if constexpr (kept <= 10)
    if (a.q) return GPU_LAUNCH((layer_norm_rows<T, width, kept, true>), grid, block, 0, stream, a);
  return GPU_LAUNCH((layer_norm_rows<T, width, kept, false>), grid, block, 0, stream, a);
}

template <class T>
bool aligned(const Modulation& m) {
  return reinterpret_cast<uintptr_t>(m.data) % (4 * sizeof(T)) == 0 && m.b_stride % 4 == 0 &&
         m.n_stride % 4 == 0;
}

template <class T>
int launch(const LayerNormModulateArgs& a, cudaStream_t stream) {
  bool four = a.D % 4 == 0;
  for (const Modulation& m : {a.x, a.y, a.gate, a.shift, a.scale}) four = four && aligned<T>(m);
  for (const void* p : {a.weight, a.bias, static_cast<const void*>(a.residual),
                        static_cast<const void*>(a.modulated)})
    four = four && aligned<T>(Modulation{p, 0, 0});
  four = four && aligned<float>(Modulation{a.smooth, 0, 0}) && aligned<char>(Modulation{a.q, 0, 0});
  if (!four) return launch<T, 1, 0>(a, stream);
  const int64_t packs = (a.D / 4 + 31) / 32;  // of a lane
  if (packs <= 4) return launch<T, 4, 4>(a, stream);
  if (packs <= 10) return launch<T, 4, 10>(a, stream);
  if (packs <= 16 && !a.q) return launch<T, 4, 16>(a, stream);  // as integers it would spill
  return launch<T, 4, 0>(a, stream);
}

}  // namespace

extern "C" int fastdiff_gpu_layer_norm_modulate(const LayerNormModulateArgs* a, void* stream) {
  int error = 0;
  GPU_DTYPE_SWITCH(int(a->dtype), error = launch<T>(*a, static_cast<cudaStream_t>(stream)));
  return error;
}
#else
#define FASTDIFF_INSTANTIATE(T)                                                     \
  template __global__ void layer_norm_rows<T, 4, 4, false>(LayerNormModulateArgs);  \
  template __global__ void layer_norm_rows<T, 4, 10, false>(LayerNormModulateArgs); \
  template __global__ void layer_norm_rows<T, 4, 16, false>(LayerNormModulateArgs); \
  template __global__ void layer_norm_rows<T, 4, 0, false>(LayerNormModulateArgs);  \
  template __global__ void layer_norm_rows<T, 1, 0, false>(LayerNormModulateArgs);  \
  template __global__ void layer_norm_rows<T, 4, 4, true>(LayerNormModulateArgs);   \
  template __global__ void layer_norm_rows<T, 4, 10, true>(LayerNormModulateArgs);  \
  template __global__ void layer_norm_rows<T, 4, 0, true>(LayerNormModulateArgs);   \
  template __global__ void layer_norm_rows<T, 1, 0, true>(LayerNormModulateArgs);
FASTDIFF_INSTANTIATE(float)
FASTDIFF_INSTANTIATE(gpu::bf16)
FASTDIFF_INSTANTIATE(gpu::f16)
#endif
}  // namespace fastdiff
