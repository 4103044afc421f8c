#include "geglu.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

// Two reads and one write per output element; bias stays in L1.
template <class T, bool kTanh>
static void geglu_rows(const GegluArgs& a, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * 2 * a.dim;
    T* y = static_cast<T*>(a.y) + row * a.dim;
    each(a.dim, [&](int64_t i, auto part) {
      Vec hidden = part.load(x + i), gate = part.load(x + a.dim + i);
      if (bias) {
        hidden = hidden + part.load(bias + i);
        gate = gate + part.load(bias + a.dim + i);
      }
      part.store(hidden * (kTanh ? vgelu_tanh(gate) : vgelu(gate)), y + i);
    });
  }
}

void geglu(const GegluArgs& a) {
  int64_t grain = 1 + 8192 / a.dim;
  FASTDIFF_DTYPE_SWITCH(a.dtype, parallel_for(0, a.rows, grain, [&](int64_t b, int64_t e) {
                          a.tanh ? geglu_rows<T, true>(a, b, e) : geglu_rows<T, false>(a, b, e);
                        }));
}

FASTDIFF_KERNEL_END
