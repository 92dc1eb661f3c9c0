// Pointwise convolutions, and their weight gradient: 14 pixels × 2 vectors of channels at once, 28
// multiply–adds for 16 loads.
#pragma once

#include "channels.h"
#include "memory.h"
#include "parts.h"
#include "planes.h"
#include "weights.h"

namespace gross::cpu::GROSS_ISA {

// Pixels of a strip: enough to use weights that come from the third-level cache many times.
constexpr int64_t strip_pixels = 448;

// Pixels with their channels in vectors: tensors (pitch: channels of a pixel) and rows of planes
// (pitch: one vector) alike.
template <class T>
struct Pixels {
  const T* at;
  int64_t pitch, vector_stride;
  const std::vector<LaneBlock>* vectors;  // how many lanes of each hold channels
};

// to[pixel] = bias + Σ_channel weight[channel][lane] · from[pixel][channel], for `Vectors` vectors
// of outputs; clamped at zero for relu.
template <class T, int Count, int Vectors>
__attribute__((noinline)) void multiply(const Pixels<T>& source, const T* from, const T* weights,
                                        int64_t weight_stride, T* const* to, int64_t to_stride,
                                        const T* bias, bool relu, const T* ahead,
                                        int64_t ahead_step) {
  Vector<T> sum[Vectors][Count]{};
  if (bias)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++)
#pragma GCC unroll 16
      for (int k = 0; k < Count; k++) sum[v][k] = load<T>(bias + v * lanes<T>);
  const int64_t pitch = source.pitch;
  for (const LaneBlock& block : *source.vectors) {
    const int64_t channels = block.lanes();
    // Three pixels of one base register: base, base + pitch, base + 2 pitch.
    const T* base[(Count + 2) / 3];
#pragma GCC unroll 8
    for (int i = 0; i < (Count + 2) / 3; i++) base[i] = from + 3 * i * pitch;
    for (int64_t j = 0; j < channels; j++, weights += lanes<T>, ahead += ahead_step) {
      __builtin_prefetch(ahead, 0, 2);
      Vector<T> weight[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; v++) {
        weight[v] = load<T>(weights + v * weight_stride);
        keep_in_register(weight[v]);
      }
#pragma GCC unroll 16
      for (int k = 0; k < Count; k++) {
        Vector<T> value = broadcast<T>(base[k / 3][k % 3 * pitch + j]);
        if constexpr (Vectors > 1) keep_in_register(value);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) sum[v][k] += value * weight[v];
      }
    }
    from += source.vector_stride;
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; v++)
#pragma GCC unroll 16
    for (int k = 0; k < Count; k++) {
      const Vector<T> value = sum[v][k];
      store<T>(to[k] + v * to_stride, relu ? (value < Vector<T>{} ? Vector<T>{} : value) : value);
    }
}

constexpr int max_pixels = registers == 32 ? 14 : 6;
// Memory that the first vectors' tiles ask for, `pitch` numbers for each of their pixels; none at
// null.
template <class T>
struct Ahead {
  const T* at = nullptr;
  int64_t pitch = 0;
};
// `count` pixels from `source` to `outputs` vectors, pair by pair. Before each tile place(pixel,
// pixels, vector, to) says where its pixels go, the second vector `to_stride` further; done(pixel,
// pixels, vector, vectors) follows it.
template <class T, int Vectors, class Place, class Done>
void multiply_vectors(const Pixels<T>& source, int64_t count, const T* weights,
                      int64_t weight_stride, int64_t vector, int64_t to_stride, const T* bias,
                      bool relu, const Ahead<T>& next, Place place, Done done) {
  const int64_t channels = weight_stride / lanes<T>;
  // The first tiles ask for the next vectors' weights, which follow these: from memory the layer of
  // one 7×7 image (512 channels) takes 329 instead of 416 µs.
  const int64_t tiles = std::min<int64_t>(ceil_div(count, max_pixels), 4);
  int64_t tile = 0;
  even_parts(count, max_pixels, [&](int64_t first, int64_t taken) {
    T* to[max_pixels];
    place(first, taken, vector, to);
    // One line per channel: asking for a tile's lines at once held up its first loads, 193 instead
    // of 221 GFLOP/s (64 channels at 56×56).
    const T* ahead = weights;
    int64_t step = 0;
    if (vector == 0 && next.at) {
      ahead = next.at + first * next.pitch;
      step = taken * next.pitch / channels;
    } else if (tile < tiles) {
      step = Vectors * lanes<T> / tiles;
      ahead = weights + Vectors * weight_stride + tile * channels * step;
    }
    with_constant<max_pixels>(taken, [&](auto pixels) {
      multiply<T, pixels, Vectors>(source, source.at + first * source.pitch, weights, weight_stride,
                                   to, to_stride, bias, relu, ahead, step);
    });
    tile++;
    done(first, taken, vector, Vectors);
  });
}
template <class T, class Place, class Done>
void multiply_all(const Pixels<T>& source, int64_t count, const T* weights, int64_t weight_stride,
                  int64_t outputs, int64_t to_stride, const T* bias, bool relu,
                  const Ahead<T>& next, Place place, Done done) {
  int64_t v = 0;
  for (; v + 2 <= outputs; v += 2)
    multiply_vectors<T, 2>(source, count, weights + v * weight_stride, weight_stride, v, to_stride,
                           bias ? bias + v * lanes<T> : nullptr, relu, next, place, done);
  if (v < outputs)
    multiply_vectors<T, 1>(source, count, weights + v * weight_stride, weight_stride, v, to_stride,
                           bias ? bias + v * lanes<T> : nullptr, relu, next, place, done);
}

// A pointwise convolution of `pixels` into planes, at `places`.
template <class T>
void multiply_to_planes(const Pixels<T>& pixels, const T* weights, int64_t weight_stride,
                        int64_t vectors, const std::vector<int64_t>& places, T* planes,
                        int64_t vector_stride, const Ahead<T>& next = {}) {
  multiply_all<T>(
      pixels, places.size(), weights, weight_stride, vectors, vector_stride, nullptr, false, next,
      [&](int64_t first, int64_t taken, int64_t vector, T** to) {
        for (int64_t k = 0; k < taken; k++)
          to[k] = planes + vector * vector_stride + places[first + k];
      },
      [](int64_t, int64_t, int64_t, int64_t) {});
}

// How many pixels ahead memory is asked for: what 4096 multiplications of a vector take, 0.5 µs,
// several times the latency of memory. It runs into the rows of the next strip, which are next in
// memory.
inline int64_t pixels_ahead(int64_t channels) {
  return std::max<int64_t>(max_pixels, 4096 / channels);
}

// `count` pixels to the tensor, from pixel `pixel` of image `image_index` on in the order of rows
// and images: `source` by a packed pointwise convolution. `spare` holds a tile where the tensor has
// another type, another format or part of a vector.
template <class T, class S>
void multiply_to_tensor(const Pixels<T>& source, const T* weights, int64_t weight_stride,
                        const std::vector<LaneBlock>& vectors, const T* bias, bool relu,
                        const Image& image, int64_t image_index, int64_t pixel, int64_t count,
                        T* spare) {
  const int64_t pixels = image.height * image.width, outputs = vectors.size();
  S* const data = static_cast<S*>(image.data) + image_index * image.stride_n;
  int64_t direct = 0;
  if constexpr (std::is_same_v<S, T>)
    if (image.stride_c == 1 && image.stride_n == pixels * image.stride_w) {
      while (direct < outputs && vectors[direct].outputs == lanes<T>) direct++;
      T* const to = data + pixel * image.stride_w + vectors[0].output;
      multiply_all<T>(
          source, count, weights, weight_stride, direct, lanes<T>, bias, relu,
          outputs * lanes<T> < image.channels
              ? Ahead<T>{}
              : Ahead<T>{to + pixels_ahead(weight_stride / lanes<T>) * image.stride_w,
                         image.stride_w},
          [&](int64_t first, int64_t taken, int64_t vector, T** at) {
            for (int64_t k = 0; k < taken; k++)
              at[k] = to + (first + k) * image.stride_w + vector * lanes<T>;
          },
          [](int64_t, int64_t, int64_t, int64_t) {});
    }
  multiply_all<T>(
      source, count, weights + direct * weight_stride, weight_stride, outputs - direct,
      max_pixels * lanes<T>, bias ? bias + direct * lanes<T> : nullptr, relu, {},
      [&](int64_t, int64_t taken, int64_t, T** at) {
        for (int64_t k = 0; k < taken; k++) at[k] = spare + k * lanes<T>;
      },
      [&](int64_t first, int64_t taken, int64_t vector, int64_t together) {
        for (int64_t v = 0; v < together; v++) {
          const LaneBlock& block = vectors[direct + vector + v];
          for (int64_t k = 0, run; k < taken; k += run) {
            const int64_t at = pixel + first + k;
            run = std::min(taken - k, pixels - at % pixels);
            store_columns<T>(spare + (v * max_pixels + k) * lanes<T>, run, block.outputs,
                             data + at / pixels * image.stride_n + at % pixels * image.stride_w +
                                 block.output * image.stride_c,
                             image.stride_w, image.stride_c);
          }
        }
      });
}

// The pixels of rows [row, row + rows) of `images` images, in vectors of channels, in `to`.
template <class T, class S>
Pixels<T> copied_pixels(const Image& image, int64_t image_index, int64_t images, int64_t row,
                        int64_t rows, const std::vector<LaneBlock>& vectors, T* to) {
  const S* data =
      static_cast<const S*>(image.data) + image_index * image.stride_n + row * image.stride_h;
  const int64_t stride = (images * rows * image.width | 1) * lanes<T>;
  for (int64_t i = 0; i < images; i++)
    for (int64_t y = 0; y < rows; y++)
      load_columns<T>(data + i * image.stride_n + y * image.stride_h, image.stride_w,
                      image.stride_c, image.width, image.channels,
                      to + (i * rows + y) * image.width * lanes<T>, stride);
  return {to, lanes<T>, stride, &vectors};
}
// The same as a pointwise convolution reads them: in place where the tensor allows it, which means
// that the rows of several images follow one another.
template <class T, class S>
Pixels<T> source_pixels(const Image& image, int64_t image_index, int64_t images, int64_t row,
                        int64_t rows, const std::vector<LaneBlock>& vectors, T* to) {
  const S* data =
      static_cast<const S*>(image.data) + image_index * image.stride_n + row * image.stride_h;
  if constexpr (std::is_same_v<S, T>)
    if (image.stride_c == 1 && image.stride_h == image.width * image.stride_w &&
        (images == 1 || image.stride_n == rows * image.stride_h))
      return {data, image.stride_w, lanes<T>, &vectors};
  return copied_pixels<T, S>(image, image_index, images, row, rows, vectors, to);
}

// Rows in parts, cut into strips: image by image, or several whole images together.
inline std::vector<std::vector<Strip>> thread_strips(int64_t images, int64_t rows,
                                                     int64_t rows_per_strip,
                                                     int64_t images_per_strip, int64_t parts) {
  std::vector<std::vector<Strip>> all(parts);
  for (int64_t part = 0; part < parts; part++) {
    const int64_t end = images * rows * (part + 1) / parts;
    for (int64_t at = images * rows * part / parts; at < end;) {
      const int64_t image = at / rows, row = at % rows;
      if (row == 0 && end - at >= rows && rows_per_strip >= rows) {
        const int64_t together = std::min(images_per_strip, (end - at) / rows);
        all[part].push_back({image, together, 0, rows});
        at += together * rows;
        continue;
      }
      // Equal strips of what this part has of the image.
      const int64_t left = std::min(end - at, rows - row),
                    taken = ceil_div(left, ceil_div(left, rows_per_strip));
      all[part].push_back({image, 1, row, taken});
      at += taken;
    }
  }
  return all;
}

// A packed pointwise convolution of whole images.
template <class T, class S>
void multiply_image(const Image& source, const T* packed, int64_t packed_stride,
                    const std::vector<LaneBlock>& inputs, const std::vector<LaneBlock>& outputs,
                    const Image& target, int64_t images, const Threads& threads) {
  constexpr int64_t spare_size = 2 * max_pixels * lanes<T>;
  const int64_t together = std::max<int64_t>(1, strip_pixels / (source.height * source.width)),
                rows = std::max<int64_t>(1, strip_pixels / source.width);
  const std::vector<std::vector<Strip>> parts =
      thread_strips(images, source.height, rows, together, 4 * threads.count);
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++)
      for (const Strip& strip : parts[part]) {
        const int64_t count = strip.images * strip.rows * source.width;
        T* const spare =
            scratch<T>(spare_size + static_cast<int64_t>(inputs.size()) * (count | 1) * lanes<T>);
        const Pixels<T> pixels = source_pixels<T, S>(source, strip.image, strip.images, strip.row,
                                                     strip.rows, inputs, spare + spare_size);
        multiply_to_tensor<T, S>(pixels, packed, packed_stride, outputs, nullptr, false, target,
                                 strip.image, strip.row * source.width, count, spare);
      }
  };
  run(threads, parts.size(), work);
}

// A pointwise convolution, or its input gradient.
template <class T, class S>
void convolve_pointwise(const Image& source, const Series& series, const Image& target,
                        const Geometry& g, bool backward, const Threads& threads) {
  const Direction d(g, backward);
  const std::vector<LaneBlock> inputs = vectors_of<T>(d.sources, d.sources),
                               outputs = vectors_of<T>(d.outputs, d.outputs);
  const int64_t size = d.sources * lanes<T>;
  Buffer<T> packed(static_cast<int64_t>(outputs.size()) * size);
  pack_blocks<T, S>(series, g, d, outputs, size, size, packed.data(), threads);
  multiply_image<T, S>(source, packed.data(), size, inputs, outputs, target, g.images, threads);
}

// D[source][lane] += Σ_pixel grads[pixel][lane] · from[pixel][source] for one or two vectors of
// outputs of a pointwise convolution: its single tap gives a fetched channel no second use, a
// second vector does.
template <class T, int Sources, int Vectors>
__attribute__((noinline)) void multiply_weights(const T* grads, int64_t grad_stride, const T* from,
                                                int64_t count, T* to, int64_t to_stride) {
  Vector<T> sum[Vectors][Sources]{};
  for (int64_t p = 0; p < count * lanes<T>; p += lanes<T>) {
    Vector<T> grad[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v++) {
      grad[v] = load<T>(grads + v * grad_stride + p);
      keep_in_register(grad[v]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < Sources; j++) {
      Vector<T> value = broadcast<T>(from[p + j]);
      if constexpr (Vectors > 1) keep_in_register(value);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; v++) sum[v][j] += grad[v] * value;
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; v++)
#pragma GCC unroll 16
    for (int j = 0; j < Sources; j++) {
      T* at = to + v * to_stride + j * lanes<T>;
      store<T>(at, load<T>(at) + sum[v][j]);
    }
}
// The same for `vectors` vectors of gradients and all `sources`, over `count` consecutive pixels:
// to[vector][source][lane]. So many pixels at once that they stay in the first-level cache while
// every source channel passes over them.
template <class T>
void multiply_all_weights(const T* grads, int64_t grad_stride, int64_t vectors, const T* from,
                          int64_t from_stride, const std::vector<LaneBlock>& sources, int64_t count,
                          T* to, int64_t to_stride) {
  constexpr int most_sources = registers == 32 ? 12 : 4;
  even_parts(count, run_budget / (3 * GROSS_VECTOR_BYTES), [&](int64_t first, int64_t taken) {
    for (int64_t v = 0, together; v < vectors; v += together) {
      together = v + 1 < vectors ? 2 : 1;
      const T* grad = grads + v * grad_stride + first * lanes<T>;
      const T* source = from + first * lanes<T>;
      T* at = to + v * to_stride;
      for (const LaneBlock& block : sources) {
        even_parts(block.lanes(), most_sources, [&](int64_t j, int64_t size) {
          with_constant<most_sources>(size, [&](auto constant) {
            if (together == 2)
              multiply_weights<T, constant, 2>(grad, grad_stride, source + j, taken,
                                               at + j * lanes<T>, to_stride);
            else
              multiply_weights<T, constant, 1>(grad, grad_stride, source + j, taken,
                                               at + j * lanes<T>, to_stride);
          });
        });
        source += from_stride;
        at += block.lanes() * lanes<T>;
      }
    }
  });
}

}  // namespace gross::cpu::GROSS_ISA
