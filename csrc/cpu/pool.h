// The largest number, or the mean, of windows of every channel.
#pragma once

#include "epilogue.h"

namespace gross::cpu::GROSS_ISA {

// One row of outputs.
template <class T, class S>
void pool_row(const Pooling& call, int64_t image, int64_t y) {
  const Image &source = call.source, &target = call.target;
  const Geometry& g = call.geometry;
  const Finish& f = call.finish;
  const T divisor = static_cast<T>(g.taps());
  const int64_t top = y * g.stride_h - g.padding_h;
  for (int64_t x = 0; x < target.width; x++) {
    const int64_t left = x * g.stride_w - g.padding_w;
    for (int64_t c = 0; c < source.channels; c += lanes<T>) {
      const int64_t count = std::min<int64_t>(lanes<T>, source.channels - c);
      const S* const from =
          static_cast<const S*>(source.data) + image * source.stride_n + c * source.stride_c;
      Vector<T> found{};
      bool first = true;
      for (int64_t ky = 0; ky < g.kernel_h; ky++)
        for (int64_t kx = 0; kx < g.kernel_w; kx++) {
          const int64_t row = top + ky * g.dilation_h, col = left + kx * g.dilation_w;
          if (row < 0 || row >= source.height || col < 0 || col >= source.width) continue;
          const Vector<T> value = load_strided<T>(
              from + row * source.stride_h + col * source.stride_w, source.stride_c, count);
          if (call.mean)
            found += value;
          else  // what is not a number stays
            found = first ? value : ((value > found) | (value != value) ? value : found);
          first = false;
        }
      T sum[lanes<T>];
      store<T>(sum, call.mean ? found / divisor : found);
      const Epilogue<T> epilogue{nullptr, nullptr, f.activation, f.residual_last, f.residual};
      if (!epilogue.is_empty())
        finish_sums<T>(sum, 1, 0, epilogue, [&](int64_t) {
          const Image& other = *f.residual;
          return load_strided<T>(static_cast<const S*>(other.data) + image * other.stride_n +
                                     y * other.stride_h + x * other.stride_w + c * other.stride_c,
                                 other.stride_c, count);
        });
      store_strided<T>(static_cast<S*>(target.data) + image * target.stride_n +
                           y * target.stride_h + x * target.stride_w + c * target.stride_c,
                       load<T>(sum), target.stride_c, count);
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
