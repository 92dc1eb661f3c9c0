// Pointwise convolutions, and their weight gradient: 14 pixels × 2 vectors of channels at once, 28
// multiply–adds for 16 loads.
#pragma once

#include "channels.h"
#include "epilogue.h"

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

// Packed weights: [vector of outputs][channel][lane].
template <class T>
struct PackedWeights {
  const T* at;
  int64_t stride;   // from one vector to the next
  int64_t vectors;  // of outputs

  int64_t channels() const { return stride / lanes<T>; }
  PackedWeights from(int64_t vector) const {
    return {at + vector * stride, stride, vectors - vector};
  }
};

// Lines that memory is asked for while a tile is computed, one per channel.
template <class T>
struct Lines {
  const T* at;
  int64_t step;
};

// to[pixel] = bias + Σ_channel weight[channel][lane] · source[pixel][channel], for `Vectors`
// vectors of outputs, `to_stride` apart.
template <class T, int Count, int Vectors>
__attribute__((noinline)) void multiply(const Pixels<T>& source, const PackedWeights<T>& packed,
                                        T* const* to, int64_t to_stride,
                                        const Epilogue<T>& epilogue, Lines<T> ahead) {
  Vector<T> sum[Vectors][Count]{};
  if (epilogue.bias)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++)
#pragma GCC unroll 16
      for (int k = 0; k < Count; k++) sum[v][k] = load<T>(epilogue.bias + v * lanes<T>);
  if (epilogue.residual && !epilogue.residual_last)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++)
#pragma GCC unroll 16
      for (int k = 0; k < Count; k++)
        sum[v][k] += load<T>(displaced(to[k] + v * to_stride, epilogue.displacement));
  const T *from = source.at, *weights = packed.at;
  const int64_t pitch = source.pitch, weight_stride = packed.stride;
  for (const LaneBlock& block : *source.vectors) {
    const int64_t channels = block.lanes();
    // Three pixels of one base register: base, base + pitch, base + 2 pitch.
    const T* base[(Count + 2) / 3];
#pragma GCC unroll 8
    for (int i = 0; i < (Count + 2) / 3; i++) base[i] = from + 3 * i * pitch;
    for (int64_t j = 0; j < channels; j++, weights += lanes<T>, ahead.at += ahead.step) {
      __builtin_prefetch(ahead.at, 0, 2);
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
  auto store_all = [&](auto activation) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; v++) {
      const Vector<T> slope =
          activation == Activation::prelu ? load<T>(epilogue.slopes + v * lanes<T>) : Vector<T>{};
#pragma GCC unroll 16
      for (int k = 0; k < Count; k++)
        store<T>(to[k] + v * to_stride, activated<activation, T>(sum[v][k], slope));
    }
  };
  if (!epilogue.in_registers()) {
    store_all(std::integral_constant<Activation, Activation::none>{});
    const Epilogue<T> rest = epilogue.after_sum();
    for (int v = 0; v < Vectors; v++)
      for (int k = 0; k < Count; k++) finish<T>(to[k] + v * to_stride, 1, 0, rest.from(v));
  } else if (epilogue.activation == Activation::none) {
    store_all(std::integral_constant<Activation, Activation::none>{});
  } else if (epilogue.activation == Activation::relu) {
    store_all(std::integral_constant<Activation, Activation::relu>{});
  } else {
    store_all(std::integral_constant<Activation, Activation::prelu>{});
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

// A pointwise convolution of `count` pixels.
template <class T>
struct PixelProduct {
  const Pixels<T>& source;
  int64_t count;
  PackedWeights<T> weights;
  int64_t to_stride;  // from one vector of outputs to the next
  Epilogue<T> epilogue;
  Ahead<T> next;
};

// `Vectors` vectors of outputs from `vector` on. Before each tile place(pixel, pixels, vector, to)
// says where its pixels go; done(pixel, pixels, vector, vectors) follows it.
template <class T, int Vectors, class Place, class Done>
void multiply_vectors(const PixelProduct<T>& of, int64_t vector, Place place, Done done) {
  const PackedWeights<T> weights = of.weights.from(vector);
  const Epilogue<T> epilogue = of.epilogue.from(vector);
  const int64_t channels = weights.channels();
  // The first tiles ask for the next vectors' weights, which follow these.
  const int64_t tiles = std::min<int64_t>(ceil_div(of.count, max_pixels), 4);
  int64_t tile = 0;
  even_parts(of.count, max_pixels, [&](int64_t first, int64_t taken) {
    T* to[max_pixels];
    place(first, taken, vector, to);
    // One line per channel: asking for a tile's lines at once would hold up its first loads.
    Lines<T> ahead{weights.at, 0};
    if (vector == 0 && of.next.at) {
      ahead = {of.next.at + first * of.next.pitch, taken * of.next.pitch / channels};
    } else if (tile < tiles) {
      ahead.step = Vectors * lanes<T> / tiles;
      ahead.at = weights.at + Vectors * weights.stride + tile * channels * ahead.step;
    }
    Pixels<T> source = of.source;
    source.at += first * source.pitch;
    with_constant<max_pixels>(taken, [&](auto pixels) {
      multiply<T, pixels, Vectors>(source, weights, to, of.to_stride, epilogue, ahead);
    });
    tile++;
    done(first, taken, vector, Vectors);
  });
}
template <class T, class Place, class Done>
void multiply_all(const PixelProduct<T>& of, Place place, Done done) {
  int64_t v = 0;
  for (; v + 2 <= of.weights.vectors; v += 2) multiply_vectors<T, 2>(of, v, place, done);
  if (v < of.weights.vectors) multiply_vectors<T, 1>(of, v, place, done);
}

// A pointwise convolution of `pixels` into planes, at `places`.
template <class T>
void multiply_to_planes(const Pixels<T>& pixels, const PackedWeights<T>& weights,
                        const std::vector<int64_t>& places, T* planes, int64_t vector_stride,
                        const Ahead<T>& next = {}) {
  multiply_all<T>(
      {pixels, static_cast<int64_t>(places.size()), weights, vector_stride, {}, next},
      [&](int64_t first, int64_t taken, int64_t vector, T** to) {
        for (int64_t k = 0; k < taken; k++)
          to[k] = planes + vector * vector_stride + places[first + k];
      },
      [](int64_t, int64_t, int64_t, int64_t) {});
}

// How many pixels ahead memory is asked for: what 4096 multiplications of a vector take, several
// times the latency of memory. It runs into the rows of the next strip, which are next in memory.
inline int64_t pixels_ahead(int64_t channels) {
  return std::max<int64_t>(max_pixels, 4096 / channels);
}

// `count` pixels of a tensor in the order of rows and images, from pixel `pixel` of an image on.
struct TensorPixels {
  const Image& tensor;
  int64_t image, pixel, count;
};

// A packed pointwise convolution of `source` to a tensor, whose channels are `vectors`. `spare`
// holds a tile where the tensor has another type, another format or part of a vector.
template <class T, class S>
void multiply_to_tensor(const Pixels<T>& source, const PackedWeights<T>& weights,
                        Epilogue<T> epilogue, const std::vector<LaneBlock>& vectors,
                        const TensorPixels& target, T* spare) {
  const Image& image = target.tensor;
  const int64_t pixels = image.height * image.width;
  S* const data = static_cast<S*>(image.data) + target.image * image.stride_n;
  int64_t direct = 0;
  if constexpr (std::is_same_v<S, T>)
    if (image.stride_c == 1 && image.stride_n == pixels * image.stride_w &&
        displaces<T, S>(epilogue, image)) {
      while (direct < weights.vectors && vectors[direct].outputs == lanes<T>) direct++;
      T* const to = data + target.pixel * image.stride_w + vectors[0].output;
      Ahead<T> next;
      if (weights.vectors * lanes<T> >= image.channels)
        next = {to + pixels_ahead(weights.channels()) * image.stride_w, image.stride_w};
      multiply_all<T>(
          {source, target.count, {weights.at, weights.stride, direct}, lanes<T>, epilogue, next},
          [&](int64_t first, int64_t taken, int64_t vector, T** at) {
            for (int64_t k = 0; k < taken; k++)
              at[k] = to + (first + k) * image.stride_w + vector * lanes<T>;
          },
          [](int64_t, int64_t, int64_t, int64_t) {});
    }
  // A residual is read where it lies, for a tile of finished sums.
  Epilogue<T> before = epilogue.from(direct), after;
  if (epilogue.residual) {
    after = before.after_sum();
    after.residual = epilogue.residual;
    before.activation = Activation::none;
    before.residual = nullptr;
  }
  multiply_all<T>(
      {source, target.count, weights.from(direct), max_pixels * lanes<T>, before, {}},
      [&](int64_t, int64_t taken, int64_t, T** at) {
        for (int64_t k = 0; k < taken; k++) at[k] = spare + k * lanes<T>;
      },
      [&](int64_t first, int64_t taken, int64_t vector, int64_t together) {
        for (int64_t v = 0; v < together; v++) {
          const LaneBlock& block = vectors[direct + vector + v];
          for (int64_t k = 0, run; k < taken; k += run) {
            const int64_t at = target.pixel + first + k, n = target.image + at / pixels,
                          pixel = at % pixels;
            run = std::min(taken - k, pixels - pixel);
            T* const sums = spare + (v * max_pixels + k) * lanes<T>;
            if (after.residual)
              finish_sums<T>(sums, run, lanes<T>, after.from(vector + v), [&](int64_t i) {
                const Image& residual = *after.residual;
                return load_strided<T>(static_cast<const S*>(residual.data) +
                                           n * residual.stride_n +
                                           (pixel + i) / residual.width * residual.stride_h +
                                           (pixel + i) % residual.width * residual.stride_w +
                                           block.output * residual.stride_c,
                                       residual.stride_c, block.outputs);
              });
            store_columns<T, S>(sums, run,
                                {data + at / pixels * image.stride_n + pixel * image.stride_w +
                                     block.output * image.stride_c,
                                 image.stride_w, image.stride_c, block.outputs});
          }
        }
      });
}

// The pixels of a strip of the tensor, in vectors of channels, in `to`.
template <class T, class S>
Pixels<T> copied_pixels(const Image& image, const Strip& strip,
                        const std::vector<LaneBlock>& vectors, T* to) {
  const S* data =
      static_cast<const S*>(image.data) + strip.image * image.stride_n + strip.row * image.stride_h;
  const int64_t stride = (strip.images * strip.rows * image.width | 1) * lanes<T>;
  for (int64_t i = 0; i < strip.images; i++)
    for (int64_t y = 0; y < strip.rows; y++)
      load_columns<T, S>({data + i * image.stride_n + y * image.stride_h, image.stride_w,
                          image.stride_c, image.channels},
                         image.width, to + (i * strip.rows + y) * image.width * lanes<T>, stride);
  return {to, lanes<T>, stride, &vectors};
}
// The same as a pointwise convolution reads them: in place where the tensor allows it, which means
// that the rows of several images follow one another.
template <class T, class S>
Pixels<T> source_pixels(const Image& image, const Strip& strip,
                        const std::vector<LaneBlock>& vectors, T* to) {
  if constexpr (std::is_same_v<S, T>)
    if (image.stride_c == 1 && image.stride_h == image.width * image.stride_w &&
        (strip.images == 1 || image.stride_n == strip.rows * image.stride_h))
      return {static_cast<const S*>(image.data) + strip.image * image.stride_n +
                  strip.row * image.stride_h,
              image.stride_w, lanes<T>, &vectors};
  return copied_pixels<T, S>(image, strip, vectors, to);
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

// Whole images that a pointwise convolution reads and writes, and how their channels fall on
// vectors.
struct PointwiseImages {
  const Image& source;
  const std::vector<LaneBlock>& inputs;
  const Image& target;
  const std::vector<LaneBlock>& outputs;
  int64_t images;
};

// A packed pointwise convolution of whole images: threads share the strips, and of few pixels the
// vectors of outputs.
template <class T, class S>
void multiply_image(const PointwiseImages& of, const PackedWeights<T>& weights,
                    const Epilogue<T>& epilogue, const Threads& threads) {
  const Image& source = of.source;
  constexpr int64_t spare_size = 2 * max_pixels * lanes<T>;
  const int64_t pixels = source.height * source.width,
                together = std::max<int64_t>(1, strip_pixels / pixels),
                rows = std::max<int64_t>(1, strip_pixels / source.width);
  const bool few = of.images * pixels <= max_pixels * threads.count;
  const std::vector<std::vector<Strip>> parts =
      thread_strips(of.images, source.height, rows, together, few ? 1 : 4 * threads.count);
  const int64_t pairs = ceil_div(weights.vectors, 2),
                sets = few ? std::min<int64_t>(pairs, 4 * threads.count) : 1;
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t set = unit % sets, first = 2 * (pairs * set / sets),
                    last = std::min(2 * (pairs * (set + 1) / sets), weights.vectors);
      PackedWeights<T> some = weights.from(first);
      some.vectors = last - first;
      const std::vector<LaneBlock> outputs(of.outputs.begin() + first, of.outputs.begin() + last);
      for (const Strip& strip : parts[unit / sets]) {
        const int64_t count = strip.images * strip.rows * source.width;
        T* const spare = scratch<T>(spare_size + static_cast<int64_t>(of.inputs.size()) *
                                                     (count | 1) * lanes<T>);
        const Pixels<T> from = source_pixels<T, S>(source, strip, of.inputs, spare + spare_size);
        multiply_to_tensor<T, S>(from, some, epilogue.from(first), outputs,
                                 {of.target, strip.image, strip.row * source.width, count}, spare);
      }
    }
  };
  run(threads, parts.size() * sets, work);
}

// The pixels of a tensor that a pointwise convolution at a stride reads.
inline Image strided_pixels(const Image& image, const Geometry& g) {
  Image some = image;
  some.height = ceil_div(image.height, g.stride_h);
  some.width = ceil_div(image.width, g.stride_w);
  some.stride_h *= g.stride_h;
  some.stride_w *= g.stride_w;
  return some;
}

// A pointwise convolution, or its input gradient at stride 1.
template <class T, class S>
void convolve_pointwise(const Convolution& call, const Prepared<T>* prepared = nullptr) {
  const Direction d(call.geometry, call.pass);
  const std::vector<LaneBlock> inputs = vectors_of<T>(d.sources, d.sources),
                               outputs = vectors_of<T>(d.outputs, d.outputs);
  const int64_t size = d.sources * lanes<T>, vectors = outputs.size();
  Buffer<T> packed(prepared ? 0 : vectors * size);
  if (!prepared)
    pack_blocks<T, S>({call.series, call.geometry, d}, outputs, size, size, packed.data(),
                      call.threads);
  multiply_image<T, S>({strided_pixels(call.source, call.geometry), inputs, call.target, outputs,
                        call.geometry.images},
                       {prepared ? prepared->weights : packed.data(), size, vectors},
                       prepared ? prepared->epilogue : Epilogue<T>{}, call.threads);
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
// Vectors of output gradients.
template <class T>
struct GradVectors {
  const T* at;
  int64_t stride, count;
};

// The same for all vectors of gradients and all source channels, over `count` consecutive pixels:
// to[vector][source][lane]. So many pixels at once that they stay in the first-level cache while
// every source channel passes over them.
template <class T>
void multiply_all_weights(const GradVectors<T>& grads, const Pixels<T>& from, int64_t count,
                          const WeightSums<T>& to) {
  constexpr int most_sources = registers == 32 ? 12 : 4;
  even_parts(count, run_budget / (3 * GROSS_VECTOR_BYTES), [&](int64_t first, int64_t taken) {
    for (int64_t v = 0, together; v < grads.count; v += together) {
      together = v + 1 < grads.count ? 2 : 1;
      const T* grad = grads.at + v * grads.stride + first * lanes<T>;
      const T* source = from.at + first * lanes<T>;
      T* at = to.at + v * to.stride;
      for (const LaneBlock& block : *from.vectors) {
        even_parts(block.lanes(), most_sources, [&](int64_t j, int64_t size) {
          with_constant<most_sources>(size, [&](auto constant) {
            if (together == 2)
              multiply_weights<T, constant, 2>(grad, grads.stride, source + j, taken,
                                               at + j * lanes<T>, to.stride);
            else
              multiply_weights<T, constant, 1>(grad, grads.stride, source + j, taken,
                                               at + j * lanes<T>, to.stride);
          });
        });
        source += from.vector_stride;
        at += block.lanes() * lanes<T>;
      }
    }
  });
}

}  // namespace gross::cpu::GROSS_ISA
