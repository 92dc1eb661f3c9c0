// Windows of 8 bits, and values from one form into another.
#pragma once

#include "bytes.h"

namespace gross::cpu::GROSS_ISA {

// Channels [first, first + count) of a pixel, as numbers above the zero point.
struct ByteSourcePixels {
  using Element = uint8_t;
  float zero;
  GROSS_INLINE Vector<float> load(const uint8_t* at, int64_t, int64_t count) const {
    return (count == lanes<float> ? load_bytes(at) : load_bytes(at, count)) - zero;
  }
};
struct FloatSourcePixels {
  using Element = float;
  GROSS_INLINE Vector<float> load(const float* at, int64_t stride, int64_t count) const {
    return load_strided<float>(at, stride, count);
  }
};

// Which taps of one dimension of a window lie in the image: [begin, end), and where the first does.
struct WindowTaps {
  int64_t begin, end, at;

  WindowTaps(int64_t first, int64_t taps, int64_t dilation, int64_t size)
      : begin(first < 0 ? std::min(taps, ceil_div(-first, dilation)) : 0),
        end(std::max(begin, first < size ? std::min(taps, ceil_div(size - first, dilation)) : 0)),
        at(first + begin * dilation) {}
  int64_t count() const { return end - begin; }
};

// f(offset) of every pixel of the window of output (y, x) that is in the image.
template <class F>
GROSS_INLINE void each_of_window(const Pooling& call, const WindowTaps& rows, int64_t x, F f) {
  const Geometry& g = call.geometry;
  const Image& source = call.source;
  const WindowTaps cols(x * g.stride_w - g.padding_w, g.kernel_w, g.dilation_w, source.width);
  int64_t row = rows.at * source.stride_h + cols.at * source.stride_w;
  for (int64_t i = 0; i < rows.count(); i++, row += g.dilation_h * source.stride_h)
    for (int64_t k = 0; k < cols.count(); k++) f(row + k * g.dilation_w * source.stride_w);
}
inline WindowTaps window_rows(const Pooling& call, int64_t y) {
  const Geometry& g = call.geometry;
  return {y * g.stride_h - g.padding_h, g.kernel_h, g.dilation_h, call.source.height};
}

// One row of outputs: tile by tile the largest number, or the sum, of each window, and what
// follows.
template <class Source>
void pool_bytes_row(const Pooling& call, const Source& reads, const ByteEnding& ending,
                    int64_t image, int64_t y) {
  using Element = typename Source::Element;
  const Image &source = call.source, &target = call.target;
  const Element* const data = static_cast<const Element*>(source.data) + image * source.stride_n;
  float sums[lanes<float>];
  const WindowTaps rows = window_rows(call, y);
  for (int64_t x = 0; x < target.width; x++)
    for (size_t v = 0; v < ending.outputs.size(); v++) {
      const LaneBlock& block = ending.outputs[v];
      const Element* const at = data + block.output * source.stride_c;
      Vector<float> found{};
      bool first = true;
      each_of_window(call, rows, x, [&](int64_t offset) {
        const Vector<float> next = reads.load(at + offset, source.stride_c, block.lanes());
        found = first       ? next
                : call.mean ? found + next
                            : ((next > found) | (next != next) ? next : found);
        first = false;
      });
      store<float>(sums, found);
      end_all(ending,
              {sums, (image * target.height + y) * target.width + x, 1, static_cast<int64_t>(v)});
    }
}

// The largest bytes of windows, of a value that stays in its form.
inline void pool_largest_bytes(const Pooling& call, int64_t image, int64_t y) {
  const Image &source = call.source, &target = call.target;
  using Most __attribute__((vector_size(GROSS_VECTOR_BYTES))) = uint8_t;
  using Some __attribute__((vector_size(16))) = uint8_t;
  const uint8_t* const data = static_cast<const uint8_t*>(source.data) + image * source.stride_n;
  uint8_t* to = static_cast<uint8_t*>(target.data) + image * target.stride_n + y * target.stride_h;
  const WindowTaps rows = window_rows(call, y);
  for (int64_t x = 0; x < target.width; x++, to += target.channels) {
    int64_t c = 0;
    // As many channels at a time as `found` has bytes, while there are as many.
    const auto pool_while = [&](auto found) {
      constexpr int64_t size = sizeof found;
      for (; c + size <= target.channels; c += size) {
        found = decltype(found){};
        each_of_window(call, rows, x, [&](int64_t offset) {
          decltype(found) next;
          __builtin_memcpy(&next, data + offset + c, size);
          found = next > found ? next : found;
        });
        __builtin_memcpy(to + c, &found, size);
      }
    };
    pool_while(Most{});
    pool_while(Some{});
    pool_while(uint8_t{});
  }
}

// Rows of numbers in any strides into 8 bits, channel after channel.
inline void quantise_row(const Pooling& call, int64_t image, int64_t y) {
  const Image &source = call.source, &target = call.target;
  const Held& held = call.finish.forms.target;
  const float* const data =
      static_cast<const float*>(source.data) + image * source.stride_n + y * source.stride_h;
  uint8_t* const to =
      static_cast<uint8_t*>(target.data) + image * target.stride_n + y * target.stride_h;
  const float unit = 1 / held.scale, least = static_cast<float>(-held.zero);
  // `count` numbers, `stride` apart, to bytes that are as many apart as there are planes.
  const auto quantise = [&](const float* from, int64_t stride, int64_t count, uint8_t* at,
                            int64_t planes) {
    for (int64_t k = 0; k < count; k += lanes<float>) {
      const int64_t n = std::min<int64_t>(lanes<float>, count - k);
      const Bytes bytes =
          nearest_bytes(load_strided<float>(from + k * stride, stride, n) * unit, least, held.zero);
      if (planes == 1) {
        n == lanes<float> ? store_bytes(at + k, bytes) : store_bytes(at + k, bytes, n);
      } else {
        uint8_t part[lanes<float>];
        store_bytes(part, bytes);
        for (int64_t i = 0; i < n; i++) at[(k + i) * planes] = part[i];
      }
    }
  };
  if (source.stride_c == 1 && source.stride_w == source.channels)
    return quantise(data, 1, source.width * source.channels, to, 1);
  for (int64_t c = 0; c < source.channels; c++)
    quantise(data + c * source.stride_c, source.stride_w, source.width, to + c, source.channels);
}

inline void pool_bytes(const Pooling& call) {
  const Geometry& g = call.geometry;
  const Image& target = call.target;
  const auto& [source, residual, to] = call.finish.forms;
  const std::vector<LaneBlock> outputs = vectors_of<float>(target.channels, target.channels);
  const bool plain = call.finish.activation == Activation::none && !call.finish.residual;
  const bool same = source.scale == to.scale && source.zero == to.zero;
  const bool copies =
      g.taps() == 1 && g.stride_h == 1 && g.stride_w == 1 && !g.padding_h && !g.padding_w;
  const int64_t numbers = outputs.size() * lanes<float>;
  // A window's share of its sum, in the source's steps; no bias.
  const float share = (call.mean ? 1.0f / static_cast<float>(g.taps()) : 1.0f) *
                      (source.in_bytes() ? source.scale : 1.0f);
  const std::vector<float> scales(numbers, share), none(numbers, 0.0f);
  const ByteEnding ending{scales.data(), none.data(), none.data(), call.finish, target, outputs};
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t image = i / target.height, y = i % target.height;
      if (plain && same && source.in_bytes() && !call.mean)
        pool_largest_bytes(call, image, y);
      else if (plain && copies && !source.in_bytes() && to.in_bytes())
        quantise_row(call, image, y);
      else if (source.in_bytes())
        pool_bytes_row(call, ByteSourcePixels{static_cast<float>(source.zero)}, ending, image, y);
      else
        pool_bytes_row(call, FloatSourcePixels{}, ending, image, y);
    }
  };
  run(call.threads, g.images * target.height, work);
}

}  // namespace gross::cpu::GROSS_ISA
