// Convolutions and linear layers of 8 bits: a pixel of the output reads rows of neighbouring bytes,
// all channels of a row of the kernel, so that there is no difference between few channels and
// many, nor between one tap and several.
#pragma once

#include "bytes.h"

namespace gross::cpu::GROSS_ISA {

// How a convolution's weights are packed, in 32-bit numbers: the weights by vectors of outputs,
// what their sums begin with, scales, bias, PReLU's slopes, and whether neighbours fit 16 bits.
struct BytePacking {
  ByteRows rows;
  std::vector<LaneBlock> outputs;
  int64_t at_starts, at_scales, at_bias, at_slopes, at_fits, size;

  explicit BytePacking(const Geometry& g)
      : rows(g), outputs(vectors_of<float>(g.out_channels, g.out_channels)) {
    const int64_t vectors = outputs.size(), numbers = vectors * lanes<float>;
    at_starts = vectors * rows.packed();
    at_scales = at_starts + numbers;
    at_bias = at_scales + numbers;
    at_slopes = at_bias + numbers;
    at_fits = at_slopes + numbers;
    size = at_fits + vectors;
  }

  ByteWeights weights(const float* packed, int64_t first, int64_t last) const {
    const int32_t* const at = reinterpret_cast<const int32_t*>(packed);
    return ByteWeights{at, at + at_starts, rows.packed(), last}.from(first);
  }
  bool fits(const float* packed) const {
    return std::all_of(packed + at_fits, packed + size, [](float fits) { return fits != 0; });
  }
};

inline void pack_byte_kernel(const Kernel& kernel, float* to, const Threads& threads) {
  const BytePacking packing(kernel.geometry);
  const ByteKernel bytes(kernel.series, kernel.geometry, kernel.source.zero);
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; v++) {
      const LaneBlock& block = packing.outputs[v];
      int32_t* const at = reinterpret_cast<int32_t*>(to);
      const bool fits = pack_bytes(bytes, block, at + v * packing.rows.packed(),
                                   at + packing.at_starts + v * lanes<float>);
      to[packing.at_fits + v] = fits;
      const auto numbers = [&](const void* from, int64_t where) {
        store_outputs<float>(from, block.output, block.lanes(), to + where + v * lanes<float>);
      };
      numbers(kernel.scales, packing.at_scales);
      numbers(kernel.bias, packing.at_bias);
      numbers(kernel.slopes, packing.at_slopes);
      float* const scales = to + packing.at_scales + v * lanes<float>;
      store<float>(scales, load<float>(scales) * kernel.source.scale);
    }
  };
  run(threads, packing.outputs.size(), work);
}

// Rows [first, first + rows) of an image, with the padding around them, in `to`; they may lie
// outside.
struct PaddedRows {
  int64_t first, rows, padding;  // columns on either side
  uint8_t zero;
};
inline void pad_rows(const uint8_t* image, const Image& of, const PaddedRows& padded, uint8_t* to) {
  const int64_t side = padded.padding * of.channels, row = of.width * of.channels;
  for (int64_t y = padded.first; y < padded.first + padded.rows; y++, to += row + 2 * side) {
    const bool inside = y >= 0 && y < of.height;
    std::memset(to, padded.zero, inside ? side : row + 2 * side);
    if (!inside) continue;
    std::memcpy(to + side, image + y * row, row);
    std::memset(to + side + row, padded.zero, side);
  }
}

// The runs of pixels of strips of outputs.
class ByteStrips {
 public:
  explicit ByteStrips(const PackedConvolution& call)
      : call_(call), g_(call.geometry), rows_(call.geometry), each_(rows_.rows / g_.kernel_h) {
    row_pitch_ = (call.source.width + 2 * g_.padding_w) * call.source.channels;
    for (int64_t ky = 0; ky < g_.kernel_h; ky++)
      for (int64_t i = 0; i < each_; i++)
        offsets_.push_back(ky * g_.dilation_h * row_pitch_ +
                           i * g_.dilation_w * call.source.channels);
  }

  // Rows of outputs of a strip: as many as let weights from the third-level cache be used often.
  int64_t strip_rows() const {
    return std::clamp<int64_t>(strip_pixels / call_.target.width, 1, call_.target.height);
  }
  // Bytes that the padded rows of an image's strip take; none where there is no padding.
  int64_t padded_size() const {
    return g_.padding_h || g_.padding_w ? rows_read(strip_rows()) * row_pitch_ : 0;
  }

  BytePixels pixels() const {
    return {nullptr, g_.stride_w * call_.source.channels, offsets_.data(),
            static_cast<int64_t>(offsets_.size()), rows_.quads()};
  }

  // The runs of a strip; `memory` holds padded rows.
  void runs(const Strip& strip, uint8_t* memory, std::vector<ByteRun>& to) const {
    const Image &source = call_.source, &target = call_.target;
    const int64_t image_size = source.height * source.width * source.channels;
    to.clear();
    for (int64_t i = strip.image; i < strip.image + strip.images; i++) {
      const uint8_t* at = static_cast<const uint8_t*>(source.data) + i * image_size;
      const int64_t first = strip.row * g_.stride_h - g_.padding_h;
      if (padded_size()) {
        uint8_t* const own = memory + (i - strip.image) * padded_size();
        pad_rows(at, source,
                 {first, rows_read(strip.rows), g_.padding_w,
                  static_cast<uint8_t>(call_.finish.forms.source.zero)},
                 own);
        at = own;
      } else {
        at += first * row_pitch_;
      }
      for (int64_t y = 0; y < strip.rows; y++) {
        const auto [skipped, read] = kernel_rows(strip.row + y);
        to.push_back({at + y * g_.stride_h * row_pitch_,
                      (i * target.height + strip.row + y) * target.width, target.width,
                      skipped * each_, read * each_});
      }
    }
  }

 private:
  // Rows of an image that so many rows of outputs read.
  int64_t rows_read(int64_t rows) const {
    return (rows - 1) * g_.stride_h + g_.dilation_h * (g_.kernel_h - 1) + 1;
  }
  // Which rows of the kernel a row of outputs reads: all, or those in the image where the padding
  // is of zeros.
  std::pair<int64_t, int64_t> kernel_rows(int64_t y) const {
    if (call_.finish.forms.source.zero) return {0, g_.kernel_h};
    const int64_t top = y * g_.stride_h - g_.padding_h, height = call_.source.height;
    const int64_t first = std::min(g_.kernel_h, top < 0 ? ceil_div(-top, g_.dilation_h) : 0);
    const int64_t end = height > top ? ceil_div(height - top, g_.dilation_h) : 0;
    return {first, std::max<int64_t>(0, std::min(g_.kernel_h, end) - first)};
  }

  const PackedConvolution& call_;
  const Geometry& g_;
  const ByteRows rows_;
  const int64_t each_;  // rows of bytes of a row of the kernel
  int64_t row_pitch_;
  std::vector<int64_t> offsets_;
};

template <Dot best>
void convolve_bytes(const PackedConvolution& call) {
  const Geometry& g = call.geometry;
  const Image &source = call.source, &target = call.target;
  const float* const packed = static_cast<const float*>(call.packed);
  const BytePacking packing(g);
  const ByteStrips strips(call);
  const bool flat = is_pointwise(g);
  const int64_t pixels = g.images * target.height * target.width, vectors = packing.outputs.size(),
                pairs = ceil_div(vectors, 2);
  // Of few pixels the threads share the outputs; single pixels are cut anywhere, in whole tiles.
  const bool few = pixels <= strip_pixels;
  const int64_t rows = flat ? ceil_div(pixels, max_pixels) : target.height,
                images = flat ? 1 : g.images, row_pixels = flat ? max_pixels : target.width,
                together = flat ? 1 : std::max<int64_t>(1, strip_pixels / (rows * row_pixels)),
                strip_rows = flat ? strip_pixels / max_pixels : strips.strip_rows();
  const std::vector<std::vector<Strip>> parts =
      thread_strips(images, rows, strip_rows, together, few ? 1 : 4 * call.threads.count);
  const int64_t sets = few ? std::min<int64_t>(pairs, 4 * call.threads.count) : 1;
  const ByteEnding ending{packed + packing.at_scales,
                          packed + packing.at_bias,
                          packed + packing.at_slopes,
                          call.finish,
                          target,
                          packing.outputs};
  const BytePixels reads = strips.pixels();
  auto work = [&](int64_t begin, int64_t end) {
    float* const spare = scratch<float>(byte_spare);
    uint8_t* const memory = scratch<uint8_t>(together * strips.padded_size() + 4);
    std::vector<ByteRun> runs;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t set = unit % sets, first = 2 * (pairs * set / sets),
                    last = std::min(2 * (pairs * (set + 1) / sets), vectors);
      for (const Strip& strip : parts[unit / sets]) {
        if (flat) {
          const int64_t pixel = strip.row * max_pixels;
          runs = {{static_cast<const uint8_t*>(source.data) + pixel * source.channels, pixel,
                   std::min(strip.rows * max_pixels, pixels - pixel), 0, 1}};
        } else {
          strips.runs(strip, memory, runs);
        }
        with_dot<best>(packing.fits(packed), [&](auto dot) {
          multiply_to_end<dot>(reads, runs, packing.weights(packed, first, last), ending, first,
                               spare);
        });
      }
    }
  };
  run(call.threads, parts.size() * sets, work);
}

}  // namespace gross::cpu::GROSS_ISA
