#include "gelu_tanh.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

// One read and one write per element; bias stays in L1.
template <class T>
static void gelu_rows(const GeluTanhArgs& a, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.dim;
    each(a.dim, [&](int64_t i, auto part) {
      Vec h = part.load(x + i);
      if (bias) h = h + part.load(bias + i);
      part.store(vgelu_tanh(h), y + i);
    });
  }
}

void gelu_tanh(const GeluTanhArgs& a) {
  int64_t grain = 1 + 16384 / a.dim;
  FASTDIFF_DTYPE_SWITCH(a.dtype, parallel_for(0, a.rows, grain, [&](int64_t b, int64_t e) {
                          gelu_rows<T>(a, b, e);
                        }));
}

FASTDIFF_KERNEL_END
