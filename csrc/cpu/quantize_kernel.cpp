// Two passes over a row, which stays in L1 between them: the largest magnitude, then the rounding.
#include "quantize.h"
#include "quantize_rows.h"

FASTDIFF_KERNEL_BEGIN

namespace {

template <int kActivation, class T>
void quantize_rows(const QuantizeArgs& a, int64_t begin, int64_t end) {
  const bool plain = !kActivation && !a.smooth;  // then the second pass reads x again
  Scratch<float> kept(plain ? 1 : size_t(a.dim) + 1);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    Vec most(0.0f);
    each(a.dim, [&](int64_t i, auto part) {
      Vec y = part.load(x + i);
      if constexpr (kActivation == 1) y = vgelu_tanh(y);
      if constexpr (kActivation == 2) y = vsilu(y);
      if constexpr (kActivation == 3) y = part.keep(y * vgelu(part.load(x + a.dim + i)));
      if (a.smooth) y = part.keep(y / part.load(a.smooth + i));
      if (!plain) part.store(y, kept.data + i);
      most = max_bits(most, vabs(y));
    });
    quantize_row(
        most, a.dim,
        [&](int64_t i, auto part) { return plain ? part.load(x + i) : part.load(kept.data + i); },
        a.q + row * a.dim, a.s + row);
  }
}

}  // namespace

void quantize(const QuantizeArgs& a) {
  const int64_t grain = 1 + 16384 / (a.dim + 1);
  parallel_for(0, a.rows, grain, [&](int64_t b, int64_t e) {
    switch (a.activation) {
      case 1: FASTDIFF_DTYPE_SWITCH(a.dtype, quantize_rows<1, T>(a, b, e)); break;
      case 2: FASTDIFF_DTYPE_SWITCH(a.dtype, quantize_rows<2, T>(a, b, e)); break;
      case 3: FASTDIFF_DTYPE_SWITCH(a.dtype, quantize_rows<3, T>(a, b, e)); break;
      default: FASTDIFF_DTYPE_SWITCH(a.dtype, quantize_rows<0, T>(a, b, e));
    }
  });
}

FASTDIFF_KERNEL_END
