// The largest magnitude of every pixel, once; then every patch, whose largest is that of its
// pixels.
#include "quantize_patches.h"
#include "quantize_rows.h"

FASTDIFF_KERNEL_BEGIN

namespace {

template <class T>
void pixels(const QuantizePatchesArgs& a, float* most, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = i % a.width, row = i / a.width % a.height, b = i / a.width / a.height;
    const T* x = static_cast<const T*>(a.x) + b * a.x_batch + row * a.x_row + column * a.x_column;
    Vec largest(0.0f);
    each(a.channels,
         [&](int64_t c, auto part) { largest = max_bits(largest, vabs(part.load(x + c))); });
    most[i] = largest_of(largest);
  }
}

template <class T>
void patches(const QuantizePatchesArgs& a, const float* most, int64_t begin, int64_t end) {
  const int64_t height = a.height << a.upsample, width = a.width << a.upsample;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / a.columns / a.rows;
    const int64_t top = i / a.columns % a.rows * a.stride - a.padding;
    const int64_t left = i % a.columns * a.stride - a.padding;
    // body(h, w) of the pixels of x, in order; outside() where there is none
    const auto taps = [&](auto body, auto outside) {
      for (int64_t h = top; h < top + a.size; ++h)
        for (int64_t w = left; w < left + a.size; ++w)
          if (h >= 0 && h < height && w >= 0 && w < width)
            body(h >> a.upsample, w >> a.upsample);
          else
            outside();
    };
    float largest = 0.0f;  // a NaN or an infinity of any pixel is kept
    taps(
        [&](int64_t h, int64_t w) {
          const float own = most[(b * a.height + h) * a.width + w];
          largest = own <= largest ? largest : std::isnan(largest) ? largest : own;
        },
        [] {});
    const Levels levels(largest, a.s + i);
    int8_t* q = a.q + i * a.size * a.size * a.channels;
    const auto zeros = [&] {
      std::memset(q, 0, size_t(a.channels));
      q += a.channels;
    };
    if (!a.channels) continue;
    taps(
        [&](int64_t h, int64_t w) {
          if (!levels.usable) return zeros();
          const T* x = static_cast<const T*>(a.x) + b * a.x_batch + h * a.x_row + w * a.x_column;
          levels.round(a.channels, [&](int64_t c, auto part) { return part.load(x + c); }, q);
          q += a.channels;
        },
        zeros);
  }
}

template <class T>
void run(const QuantizePatchesArgs& a) {
  const int64_t count = a.batch * a.height * a.width, deep = a.channels + 1;
  Scratch<float> most(size_t(count) + 1);
  parallel_for(0, count, 1 + 16384 / deep,
               [&](int64_t begin, int64_t end) { pixels<T>(a, most.data, begin, end); });
  parallel_for(0, a.batch * a.rows * a.columns, 1 + 16384 / (a.size * a.size * deep),
               [&](int64_t begin, int64_t end) { patches<T>(a, most.data, begin, end); });
}

}  // namespace

void quantize_patches(const QuantizePatchesArgs& a) { FASTDIFF_DTYPE_SWITCH(a.dtype, run<T>(a)); }

FASTDIFF_KERNEL_END
