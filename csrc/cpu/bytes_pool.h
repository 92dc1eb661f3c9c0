// Windows of 8 bits, and values from one form into another.
#pragma once

#include "bytes.h"

namespace gross::cpu::GROSS_ISA {

// Which taps of one dimension of a window lie in the image: so many, the first of them at `at`.
struct WindowTaps {
  int64_t at, count;

  WindowTaps(int64_t first, int64_t taps, int64_t dilation, int64_t size) {
    const int64_t begin = first < 0 ? std::min(taps, ceil_div(-first, dilation)) : 0,
                  end = first < size ? std::min(taps, ceil_div(size - first, dilation)) : 0;
    at = first + begin * dilation;
    count = std::max<int64_t>(0, end - begin);
  }
};

// The windows of all outputs.
struct Windows {
  const Pooling& call;
  int64_t row_step, column_step;  // from one tap to the next, in numbers of the source
  std::vector<WindowTaps> rows, columns;

  explicit Windows(const Pooling& call)
      : call(call),
        row_step(call.geometry.dilation_h * call.source.stride_h),
        column_step(call.geometry.dilation_w * call.source.stride_w) {
    const Geometry& g = call.geometry;
    for (int64_t y = 0; y < call.target.height; y++)
      rows.emplace_back(y * g.stride_h - g.padding_h, g.kernel_h, g.dilation_h, call.source.height);
    for (int64_t x = 0; x < call.target.width; x++)
      columns.emplace_back(x * g.stride_w - g.padding_w, g.kernel_w, g.dilation_w,
                           call.source.width);
  }

  // f(offset) of every pixel of the window of output (y, x) that is in the image.
  template <class F>
  GROSS_INLINE void each(int64_t y, int64_t x, F f) const {
    const WindowTaps &down = rows[y], &across = columns[x];
    int64_t row = down.at * call.source.stride_h + across.at * call.source.stride_w;
    for (int64_t i = 0; i < down.count; i++, row += row_step)
      for (int64_t k = 0; k < across.count; k++) f(row + k * column_step);
  }
};

// The largest of `count` runs of `size` bytes, `step` apart: as many at a time as `Bytes` has, the
// last of them once more where they do not divide the run.
template <class Bytes, class Count>
GROSS_INLINE void largest_of(const uint8_t* from, int64_t step, Count count, int64_t size,
                             uint8_t* to) {
  constexpr int64_t taken = sizeof(Bytes);
  for (int64_t k = 0; k < size; k += taken) {
    const int64_t first = std::min(k, size - taken);
    const uint8_t* const at = from + first;
    Bytes found{};
    for (int64_t i = 0; i < count; i++) {
      Bytes next;
      __builtin_memcpy(&next, at + i * step, taken);
      found = next > found ? next : found;
    }
    __builtin_memcpy(to + first, &found, taken);
  }
}
template <class Bytes>
GROSS_INLINE void largest_of_runs(const uint8_t* from, int64_t step, int64_t count, int64_t size,
                                  uint8_t* to) {
  if (count == 2)
    largest_of<Bytes>(from, step, std::integral_constant<int64_t, 2>{}, size, to);
  else if (count == 3)
    largest_of<Bytes>(from, step, std::integral_constant<int64_t, 3>{}, size, to);
  else
    largest_of<Bytes>(from, step, count, size, to);
}
// Calls f with the most bytes at a time that are not more than `size`.
template <class F>
GROSS_INLINE void with_bytes(int64_t size, F f) {
  using Most __attribute__((vector_size(GROSS_VECTOR_BYTES))) = uint8_t;
  using Sixteen __attribute__((vector_size(16))) = uint8_t;
  using Eight __attribute__((vector_size(8))) = uint8_t;
  using Four __attribute__((vector_size(4))) = uint8_t;
  if (size >= GROSS_VECTOR_BYTES) return f(Named<Most>{});
  if (size >= 16) return f(Named<Sixteen>{});
  if (size >= 8) return f(Named<Eight>{});
  if (size >= 4) return f(Named<Four>{});
  f(Named<uint8_t>{});
}

// The largest bytes of the windows of a row of outputs: of the rows, which are runs of all columns,
// to `down`, and of those the columns.
inline void largest_bytes_row(const Windows& windows, const uint8_t* data, int64_t y, uint8_t* down,
                              uint8_t* to) {
  const Image& source = windows.call.source;
  const int64_t channels = source.channels, size = source.width * channels;
  const WindowTaps& rows = windows.rows[y];
  with_bytes(size, [&](auto bytes) {
    largest_of_runs<typename decltype(bytes)::type>(data + rows.at * source.stride_h,
                                                    windows.row_step, rows.count, size, down);
  });
  with_bytes(channels, [&](auto bytes) {
    for (const WindowTaps& taps : windows.columns) {
      largest_of_runs<typename decltype(bytes)::type>(
          down + taps.at * channels, windows.column_step, taps.count, channels, to);
      to += channels;
    }
  });
}

// What is found in the window of output (y, x), of one vector of channels, in numbers above the
// zero point. Of a row of bytes that are the largest already:
struct LargestBytes {
  const uint8_t* row;
  int64_t channels;
  float zero;

  GROSS_INLINE Vector<float> find(int64_t, int64_t x, const LaneBlock& block) const {
    const uint8_t* const at = row + x * channels + block.output;
    return (block.lanes() == lanes<float> ? load_bytes(at) : load_bytes(at, block.lanes())) - zero;
  }
};
// The sum of bytes, which is exact:
struct SummedBytes {
  const Windows& windows;
  const uint8_t* data;
  int32_t zero;

  GROSS_INLINE Vector<float> find(int64_t y, int64_t x, const LaneBlock& block) const {
    const uint8_t* const at = data + block.output;
    const int64_t n = block.lanes(), count = windows.rows[y].count * windows.columns[x].count;
    Vector<int32_t> sum{};
    if (n == lanes<float>)
      windows.each(y, x, [&](int64_t offset) { sum += load_whole_bytes(at + offset); });
    else
      windows.each(y, x, [&](int64_t offset) { sum += load_whole_bytes(at + offset, n); });
    return __builtin_convertvector(sum - zero * static_cast<int32_t>(count), Vector<float>);
  }
};
// The largest of numbers, or their sum:
struct FoundNumbers {
  const Windows& windows;
  const float* data;

  GROSS_INLINE Vector<float> find(int64_t y, int64_t x, const LaneBlock& block) const {
    const int64_t stride = windows.call.source.stride_c;
    const bool mean = windows.call.mean;
    Vector<float> found{};
    bool first = true;
    windows.each(y, x, [&](int64_t offset) {
      const Vector<float> next =
          load_strided<float>(data + block.output * stride + offset, stride, block.lanes());
      found = first ? next : mean ? found + next : ((next > found) | (next != next) ? next : found);
      first = false;
    });
    return found;
  }
};

// What follows what is found in the windows of a row of outputs: of some pixels at a time.
template <class Found>
void end_windows(const Found& found, const ByteEnding& ending, int64_t image, int64_t y) {
  const int64_t width = ending.target.width, vectors = ending.outputs.size();
  float sums[max_pixels * lanes<float>];
  for (int64_t x = 0; x < width; x += max_pixels)
    for (int64_t v = 0; v < vectors; v++) {
      const int64_t count = std::min<int64_t>(max_pixels, width - x);
      for (int64_t k = 0; k < count; k++)
        store<float>(sums + k * lanes<float>, found.find(y, x + k, ending.outputs[v]));
      end_all(ending, {sums, (image * ending.target.height + y) * width + x, count, v});
    }
}

// `count` neighbours from one form into another; at least one of them is of bytes.
template <class From, class To>
__attribute__((noinline)) void convert_run(const Forms& forms, const From* from, int64_t count,
                                           To* to) {
  constexpr bool reads_bytes = std::is_same_v<From, uint8_t>,
                 writes_bytes = std::is_same_v<To, uint8_t>;
  constexpr int64_t n = lanes<float>;
  const auto& [source, residual, target] = forms;
  const float factor = (reads_bytes ? source.scale : 1) * (writes_bytes ? 1 / target.scale : 1),
              offset = static_cast<float>(source.zero), least = static_cast<float>(-target.zero);
  const int32_t zero = target.zero;
  const auto convert = [&](int64_t k, auto whole) __attribute__((always_inline)) {
    Vector<float> value;
    if constexpr (reads_bytes)
      value = (whole ? load_bytes(from + k) : load_bytes(from + k, count - k)) - offset;
    else
      value = whole ? load<float>(from + k) : load_first<float>(from + k, count - k);
    value *= factor;
    if constexpr (writes_bytes) {
      const Bytes bytes = nearest_bytes(value, least, zero);
      whole ? store_bytes(to + k, bytes) : store_bytes(to + k, bytes, count - k);
    } else {
      whole ? store<float>(to + k, value) : store_first<float>(to + k, value, count - k);
    }
  };
  int64_t k = 0;
  for (; k + n <= count; k += n) convert(k, std::true_type{});
  if (k < count) convert(k, std::false_type{});
}

// How numbers become bytes.
struct ByteScale {
  float unit, least, most;
  uint32_t zero;

  explicit ByteScale(const Held& held)
      : unit(1 / held.scale),
        least(static_cast<float>(-held.zero)),
        most(static_cast<float>(255 - held.zero)),
        zero(static_cast<uint32_t>(held.zero)) {}
};

// Up to four planes of a vector of pixels or more, `stride` apart, into bytes of a pixel that lie
// side by side: of a vector of pixels each lane holds one's. Each but the last pixel is written in
// four bytes, which the next ones write again; the last pixels once more where vectors do not
// divide them.
template <int Planes>
__attribute__((noinline)) void interleave(const float* from, int64_t stride, int64_t pixels,
                                          const ByteScale& scale, uint8_t* to, int64_t channels) {
  constexpr int n = lanes<float>;
  const float unit = scale.unit, least = scale.least, most = scale.most;
  const Words zeros = Words{} + 0x01010101u * scale.zero;
  for (int64_t k = 0; k < pixels; k += n) {
    const int64_t first = std::min(k, pixels - n);
    Words quads = zeros;
#pragma GCC unroll 4
    for (int c = 0; c < Planes; c++)
      quads += __builtin_bit_cast(
                   Words, nearest_whole(load<float>(from + first + c * stride) * unit, least, most))
               << 8 * c;
    uint32_t words[n];
    store<uint32_t>(words, quads);
    uint8_t* const at = to + first * channels;
#pragma GCC unroll 16
    for (int i = 0; i < n - 1; i++) std::memcpy(at + i * channels, words + i, 4);
    const bool last = first + n == pixels;
    std::memcpy(at + (n - 1) * channels, words + n - 1, last ? Planes : 4);
  }
}

// `pixels` neighbours into 8 bits, from planes: some of the pixels at a time, so that what is
// written stays in the first-level cache until it is whole. The last four channels once more where
// four do not divide them.
inline void quantise_planes(const float* from, int64_t stride, int64_t pixels,
                            const ByteScale& scale, uint8_t* to, int64_t channels) {
  const int64_t together = std::max<int64_t>(16384 / channels, 64);
  even_parts(pixels, together, [&](int64_t begin, int64_t count) {
    const float* const at = from + begin;
    uint8_t* const bytes = to + begin * channels;
    if (channels < 4)
      return with_constant<3>(channels, [&](auto planes) {
        interleave<planes>(at, stride, count, scale, bytes, channels);
      });
    for (int64_t c = 0; c < channels; c += 4) {
      const int64_t first = std::min(c, channels - 4);
      interleave<4>(at + first * stride, stride, count, scale, bytes + first, channels);
    }
  });
}

// The same of any strides, number by number.
inline void quantise_strided(const Image& source, const float* from, int64_t pixels,
                             const ByteScale& scale, uint8_t* to) {
  for (int64_t c = 0; c < source.channels; c++)
    for (int64_t k = 0; k < pixels; k += lanes<float>) {
      const int64_t taken = std::min<int64_t>(lanes<float>, pixels - k);
      const Vector<float> value = load_strided<float>(
          from + c * source.stride_c + k * source.stride_w, source.stride_w, taken);
      uint8_t part[lanes<float>];
      store_bytes(part,
                  nearest_bytes(value * scale.unit, scale.least, static_cast<int32_t>(scale.zero)));
      for (int64_t i = 0; i < taken; i++) to[(k + i) * source.channels + c] = part[i];
    }
}

// Rows [y, y + rows) of an image from one form into another.
inline void convert_rows(const Pooling& call, int64_t image, int64_t y, int64_t rows) {
  const Image &source = call.source, &target = call.target;
  const Forms& forms = call.finish.forms;
  const auto run = [&](const auto* from, auto* to) {
    convert_run(forms, from, rows * target.stride_h, to);
  };
  const int64_t to = image * target.stride_n + y * target.stride_h;
  uint8_t* const bytes = static_cast<uint8_t*>(target.data) + to;
  if (forms.source.in_bytes()) {
    const uint8_t* const from = static_cast<const uint8_t*>(source.data) + to;
    forms.target.in_bytes() ? run(from, bytes) : run(from, static_cast<float*>(target.data) + to);
    return;
  }
  const float* from =
      static_cast<const float*>(source.data) + image * source.stride_n + y * source.stride_h;
  // Rows that follow each other are one.
  const bool joined = source.stride_h == source.width * source.stride_w;
  const int64_t runs = joined ? 1 : rows, pixels = source.width * (joined ? rows : 1);
  const bool together = (source.stride_c == 1 || source.channels == 1) &&
                        (source.stride_w == source.channels || pixels == 1);
  const ByteScale scale(forms.target);
  for (int64_t i = 0; i < runs; i++) {
    const float* const row = from + i * source.stride_h;
    uint8_t* const at = bytes + i * target.stride_h;
    if (together)
      convert_run(forms, row, pixels * source.channels, at);
    else if (source.stride_w == 1 && pixels >= lanes<float>)
      quantise_planes(row, source.stride_c, pixels, scale, at, source.channels);
    else
      quantise_strided(source, row, pixels, scale, at);
  }
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
  if (plain && copies) {
    auto work = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin, rows; i < end; i += rows) {
        const int64_t y = i % target.height;
        rows = std::min(end - i, target.height - y);
        convert_rows(call, i / target.height, y, rows);
      }
    };
    return run(call.threads, g.images * target.height, work);
  }
  const Windows windows(call);
  const int64_t row = target.width * target.channels, read = call.source.width * target.channels;
  const float* const from = static_cast<const float*>(call.source.data);
  auto work = [&](int64_t begin, int64_t end) {
    uint8_t* const down = scratch<uint8_t>(read + row);
    for (int64_t i = begin; i < end; i++) {
      const int64_t image = i / target.height, y = i % target.height,
                    at = image * call.source.stride_n;
      const uint8_t* const bytes = static_cast<const uint8_t*>(call.source.data) + at;
      if (!source.in_bytes()) {
        end_windows(FoundNumbers{windows, from + at}, ending, image, y);
      } else if (call.mean) {
        end_windows(SummedBytes{windows, bytes, source.zero}, ending, image, y);
      } else if (plain && same) {
        largest_bytes_row(windows, bytes, y, down, static_cast<uint8_t*>(target.data) + i * row);
      } else {
        uint8_t* const largest = down + read;
        largest_bytes_row(windows, bytes, y, down, largest);
        end_windows(LargestBytes{largest, target.channels, static_cast<float>(source.zero)}, ending,
                    image, y);
      }
    }
  };
  run(call.threads, g.images * target.height, work);
}

}  // namespace gross::cpu::GROSS_ISA
