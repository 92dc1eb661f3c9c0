// The largest number, or the mean, of windows of every channel.
#pragma once

#include "epilogue.h"

namespace gross::cpu::GROSS_ISA {

// The channels [first, first + count) of a window's pixels, taken together.
template <class T, class S, class Load>
GROSS_INLINE Vector<T> pooled(const std::vector<const S*>& pixels, bool mean, T share, Load value) {
  const int64_t count = pixels.size();
  Vector<T> found = count ? value(pixels[0]) : Vector<T>{};
  if (mean) {
    for (int64_t i = 1; i < count; i++) found += value(pixels[i]);
    return found * share;
  }
  for (int64_t i = 1; i < count; i++) {
    const Vector<T> next = value(pixels[i]);
    found = (next > found) | (next != next) ? next : found;  // what is not a number stays
  }
  return found;
}

// One row of outputs.
template <class T, class S>
void pool_row(const Pooling& call, int64_t image, int64_t y) {
  const Image &source = call.source, &target = call.target;
  const Geometry& g = call.geometry;
  const auto& [activation, residual, residual_last, forms] = call.finish;
  const Epilogue<T> epilogue{nullptr, nullptr, activation, residual_last, residual};
  const T share = T(1) / static_cast<T>(g.taps());
  const S* const data = static_cast<const S*>(source.data) + image * source.stride_n;
  std::vector<const S*> pixels;
  for (int64_t x = 0; x < target.width; x++) {
    pixels.clear();
    for (int64_t ky = 0; ky < g.kernel_h; ky++)
      for (int64_t kx = 0; kx < g.kernel_w; kx++) {
        const int64_t row = y * g.stride_h - g.padding_h + ky * g.dilation_h,
                      col = x * g.stride_w - g.padding_w + kx * g.dilation_w;
        if (row >= 0 && row < source.height && col >= 0 && col < source.width)
          pixels.push_back(data + row * source.stride_h + col * source.stride_w);
      }
    S* const to = static_cast<S*>(target.data) + image * target.stride_n + y * target.stride_h +
                  x * target.stride_w;
    int64_t c = 0;
    if (source.stride_c == 1 && target.stride_c == 1 && epilogue.is_empty())
      for (; c + lanes<T> <= source.channels; c += lanes<T>)
        store<T>(to + c, pooled<T, S>(pixels, call.mean, share,
                                      [&](const S* at) { return load<T>(at + c); }));
    for (; c < source.channels; c += lanes<T>) {
      const int64_t count = std::min<int64_t>(lanes<T>, source.channels - c);
      T sum[lanes<T>];
      store<T>(sum, pooled<T, S>(pixels, call.mean, share, [&](const S* at) {
                 return load_strided<T>(at + c * source.stride_c, source.stride_c, count);
               }));
      if (!epilogue.is_empty())
        finish_sums<T>(sum, 1, 0, epilogue, [&](int64_t) {
          return load_strided<T>(static_cast<const S*>(residual->data) +
                                     image * residual->stride_n + y * residual->stride_h +
                                     x * residual->stride_w + c * residual->stride_c,
                                 residual->stride_c, count);
        });
      store_strided<T>(to + c * target.stride_c, load<T>(sum), target.stride_c, count);
    }
  }
}

template <class T, class S>
void pool(const Pooling& call) {
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      pool_row<T, S>(call, i / call.target.height, i % call.target.height);
  };
  run(call.threads, call.geometry.images * call.target.height, work);
}

}  // namespace gross::cpu::GROSS_ISA
