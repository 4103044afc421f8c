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
    auto body = [&](int64_t i, auto... n) {
      Vec hidden = Vec::load(x + i, n...), gate = Vec::load(x + a.dim + i, n...);
      if (bias) {
        hidden = hidden + Vec::load(bias + i, n...);
        gate = gate + Vec::load(bias + a.dim + i, n...);
      }
      (hidden * (kTanh ? vgelu_tanh(gate) : vgelu(gate))).store(y + i, n...);
    };
    int64_t i = 0;
    for (; i + Vec::width <= a.dim; i += Vec::width) body(i);
    if (i < a.dim) body(i, int(a.dim - i));
  }
}

void geglu(const GegluArgs& a) {
  int64_t grain = 1 + 8192 / a.dim;
  FASTDIFF_DTYPE_SWITCH(a.dtype, parallel_for(0, a.rows, grain, [&](int64_t b, int64_t e) {
                          a.tanh ? geglu_rows<T, true>(a, b, e) : geglu_rows<T, false>(a, b, e);
                        }));
}

FASTDIFF_KERNEL_END
