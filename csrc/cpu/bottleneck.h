// A whole layer, pointwise → grouped → pointwise, strip by strip: everything between input and
// output stays in the second-level cache.
//
// A thread marches down its rows. The first pointwise writes the planes that the grouped
// convolution reads, and the rows that the next strip needs again are moved, not recomputed; the
// grouped convolution writes vectors of channels, pixel after pixel, which the last pointwise
// reads. Of one small image all threads compute the same strip, each some of its channels. Both
// pointwise convolutions are one kernel: 14 pixels × 32 channels, 28 multiply–adds for 16 loads.
namespace gross::cpu::GROSS_ISA {

// Bytes of input, inner and output pixels that a strip may take in a 1 MB second-level cache,
// beside weights.
constexpr int64_t strip_budget = 640 << 10;
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

// How a layer's weights are packed: P by vectors of the grouped convolution's sources, R by its
// blocks, Q by vectors of outputs, the bias.
template <class T>
struct Packing {
  Channels<T> grouped;
  Geometry first, last;  // the pointwise convolutions'
  std::vector<LaneBlock> inputs, inner, outputs;
  int64_t inner_size, output_size;  // numbers per vector of P and Q
  int64_t at_grouped, at_last, at_bias, size;

  explicit Packing(const Layer& layer)
      : grouped(layer.geometry, false),
        first{1,
              layer.in_channels,
              layer.geometry.in_channels,
              layer.in_channels,
              1,
              1,
              1,
              1,
              0,
              0,
              1,
              1},
        last{1,
             layer.geometry.out_channels,
             layer.out_channels,
             layer.geometry.out_channels,
             1,
             1,
             1,
             1,
             0,
             0,
             1,
             1},
        inputs(vectors_of<T>(layer.in_channels, layer.in_channels)),
        inner(vectors_of<T>(layer.geometry.in_channels, grouped.together * grouped.sources)),
        outputs(vectors_of<T>(layer.out_channels, layer.out_channels)) {
    inner_size = layer.in_channels * lanes<T>;
    output_size = layer.geometry.out_channels * lanes<T>;
    at_grouped = count(inner) * inner_size;
    at_last = at_grouped + count(grouped.blocks) * grouped.packed;
    at_bias = at_last + count(outputs) * output_size;
    size = at_bias + count(outputs) * lanes<T>;
  }

  static int64_t count(const std::vector<LaneBlock>& blocks) {
    return static_cast<int64_t>(blocks.size());
  }
};

template <class T, class S>
void pack_layer(const Layer& layer, T* to, const Threads& threads) {
  const Packing<T> packing(layer);
  const Direction first(packing.first, false), last(packing.last, false);
  const int64_t inner = packing.inner.size(), blocks = packing.grouped.blocks.size(),
                outputs = packing.outputs.size();
  const int64_t rows = std::max({packing.inner_size, packing.output_size, packing.grouped.summed});
  auto work = [&](int64_t begin, int64_t end) {
    T* const sum = scratch<T>(rows);
    for (int64_t i = begin; i < end; i++) {
      if (i < inner) {
        pack_weights<T, S>(layer.pointwise_in, packing.first, first, packing.inner[i], sum,
                           to + i * packing.inner_size);
      } else if (i < inner + blocks) {
        const int64_t b = i - inner;
        pack_weights<T, S>(layer.grouped, layer.geometry, packing.grouped,
                           packing.grouped.blocks[b], sum,
                           to + packing.at_grouped + b * packing.grouped.packed);
      } else {
        const int64_t v = i - inner - blocks;
        const LaneBlock& block = packing.outputs[v];
        pack_weights<T, S>(layer.pointwise_out, packing.last, last, block, sum,
                           to + packing.at_last + v * packing.output_size);
        T* bias = to + packing.at_bias + v * lanes<T>;
        store<T>(bias, layer.bias
                           ? load_strided<T>(static_cast<const T*>(layer.bias) + block.output, 1,
                                             block.outputs)
                           : Vector<T>{});
      }
    }
  };
  run(threads, inner + blocks + outputs, work);
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

// Which rows of the image the rows [from, planes.rows) of a strip's planes come from: [begin, end).
struct Rows {
  int64_t begin, end;
};
inline Rows source_rows(const Plan& plan, const Strip& strip, const Planes& planes, int64_t from) {
  Rows rows{plan.source_height, 0};
  for (const Lattice& lattice : plan.sources) {
    rows.begin = std::min(rows.begin,
                          lattice.first_row + (strip.row + plan.min_row + from) * lattice.row_step);
    rows.end =
        std::max(rows.end, lattice.first_row +
                               (strip.row + plan.min_row + planes.rows - 1) * lattice.row_step + 1);
  }
  rows.begin = std::clamp<int64_t>(rows.begin, 0, plan.source_height);
  rows.end = std::clamp<int64_t>(rows.end, rows.begin, plan.source_height);
  return rows;
}

// For rows [from, planes.rows) of every image of a strip: zeros where the padding is, in `vectors`
// planes, and for each pixel of `rows` its place in a plane; what the convolution does not read
// goes to the plane's last position, which nothing reads.
template <class T>
void place_pixels(const Plan& plan, const Strip& strip, const Planes& planes, int64_t from,
                  const Rows& rows, int64_t vectors, T* to, std::vector<int64_t>& places) {
  places.assign(strip.images * (rows.end - rows.begin) * plan.source_width,
                (planes.positions - 1) * lanes<T>);
  int64_t source = 0;
  for (const Lattice& lattice : plan.sources) {
    const Columns columns(lattice, plan, plan.source_width);
    auto zero = [&](int64_t position, int64_t count) {
      for (int64_t v = 0; count > 0 && v < vectors; v++)
        zero_positions(to + v * planes.vector_stride + source + position * lanes<T>, count);
    };
    for (int64_t i = 0; i < strip.images; i++)
      for (int64_t r = from; r < planes.rows_of(i, strip); r++) {
        const int64_t position = (i * planes.image_rows + r) * plan.pitch;
        const int64_t y = lattice.first_row + (strip.row + plan.min_row + r) * lattice.row_step;
        if (r >= planes.rows || y < 0 || y >= plan.source_height) {
          zero(position, plan.pitch);
          continue;
        }
        zero(position, columns.lead);
        zero(position + columns.end, plan.pitch - columns.end);
        int64_t* place = places.data() +
                         (i * (rows.end - rows.begin) + y - rows.begin) * plan.source_width +
                         columns.first;
        for (int64_t k = columns.lead; k < columns.end; k++)
          place[(k - columns.lead) * lattice.col_step] = source + (position + k) * lanes<T>;
      }
    zero(((strip.images - 1) * planes.image_rows + planes.rows) * plan.pitch,
         plan.max_col - plan.min_col);
    source += planes.source_stride;
  }
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

// The layer from packed weights. Where `inner` has data, the first pointwise convolution is
// computed into it beforehand, and read from there.
template <class T, class S>
void run_layer(const Image& input, const Layer& layer, const T* packed, const Image& inner,
               const Image& output, const Threads& threads) {
  const Packing<T> packing(layer);
  const Channels<T>& channels = packing.grouped;
  const Geometry& g = layer.geometry;
  const Plan plan = forward_plan(g, input.height, input.width, output.height, output.width);
  const Target& target = plan.targets[0];
  const int64_t inner_vectors = packing.inner.size(), blocks = channels.blocks.size(),
                outputs = packing.outputs.size();
  const int64_t clusters = channels.clusters(0, blocks),
                cluster_blocks = ceil_div(channels.together, channels.per_block) *
                                 ceil_div(channels.outputs, lanes<T>);
  const Tile<T> tile = tile_for<T>(channels.fetch, output.width);
  constexpr int64_t spare_size = 2 * max_pixels * lanes<T>;
  const int64_t ahead = pixels_ahead(layer.in_channels);

  if (inner.data)
    multiply_image<T, S>(input, packed, packing.inner_size, packing.inputs, packing.inner, inner,
                         g.images, threads);

  // Strips: the pixels that one row of outputs brings into the cache.
  const int64_t row_bytes =
      sizeof(T) * (g.stride_h * input.width * (layer.in_channels + g.in_channels) +
                   output.width * (g.out_channels + layer.out_channels));
  // Few rows of large weights, and too few images to go round: the threads share one strip, each
  // has some of the channels. By rows they would each read all weights, compute the halo's rows
  // twice and have one row more or less of seven: 512 channels at 7×7 take 113 or 126 instead of
  // 138 µs, by how far apart the two cores are. From four rows a thread on, handing over the
  // grouped convolution's outputs can cost more: 8×8, 256 channels, 8 % less or 14 % more.
  const int64_t pixel_bytes = g.images * output.height * row_bytes;
  const bool shared =
      g.images < threads.count && g.images * output.height < 4 * threads.count &&
      std::min(clusters, outputs / 2) >= threads.count &&
      pixel_bytes <=
          2 * std::min<int64_t>(strip_budget, packing.size * static_cast<int64_t>(sizeof(T)));
  const int64_t rows = shared ? output.height
                              : std::clamp<int64_t>(std::min(strip_budget / row_bytes,
                                                             ceil_div(strip_pixels, output.width)),
                                                    1, output.height);
  const int64_t together =
      shared ? g.images
      : rows < output.height
          ? 1
          : std::max<int64_t>(
                1, std::min(strip_budget / row_bytes, strip_pixels / output.width) / output.height);
  // Several parts a thread where images are many: cut between images, and between strips of
  // several.
  const int64_t each = std::clamp<int64_t>(g.images / together / threads.count, 1, 4);
  const std::vector<std::vector<Strip>> parts =
      thread_strips(g.images, output.height, rows, together, shared ? 1 : each * threads.count);
  // All strips have planes of one size, so that rows can move from one to the next.
  Planes largest{};
  int64_t input_pixels = 0, output_pixels = 0;
  for (const std::vector<Strip>& part : parts)
    for (const Strip& strip : part) {
      const Planes planes = Planes::of<T>(plan, strip);
      const Rows needed = source_rows(plan, strip, planes, 0);
      if (planes.positions > largest.positions) largest = planes;
      input_pixels =
          std::max(input_pixels, strip.images * (needed.end - needed.begin) * input.width);
      output_pixels = std::max(output_pixels, strip.images * strip.rows * output.width);
    }
  const int64_t plane_size = inner_vectors * largest.vector_stride,
                stride = (output_pixels | 1) * lanes<T>;
  const int64_t input_size =
      static_cast<int64_t>(packing.inputs.size()) * (input_pixels | 1) * lanes<T>;

  // Clusters [first, last) of a strip's inner channels, from the input to the grouped convolution's
  // outputs.
  auto convolve_inner = [&](const Strip& strip, const Strip* above, int64_t first, int64_t last,
                            T* const planes_at, T* const grouped_at, T* const input_at) {
    Planes planes = Planes::of<T>(plan, strip);
    planes.positions = largest.positions;
    planes.source_stride = largest.source_stride;
    planes.vector_stride = largest.vector_stride;
    const int64_t first_vector = first * channels.vectors,
                  vectors = std::min(last * channels.vectors, inner_vectors) - first_vector;
    const int64_t first_block = first * cluster_blocks,
                  last_block = std::min(last * cluster_blocks, blocks);
    T* const own_planes = planes_at + first_vector * planes.vector_stride;

    if (inner.data) {
      load_sources<T, S>(inner, plan, strip, planes, channels, {first_block, last_block},
                         own_planes);
    } else {
      // Rows that the strip above has computed already are moved to where this one has them.
      const bool follows =
          above && above->image == strip.image && above->row + above->rows == strip.row;
      const int64_t kept = follows ? plan.halo() : 0;
      for (int64_t v = 0; kept > 0 && v < vectors; v++)
        for (size_t source = 0; source < plan.sources.size(); source++) {
          T* plane = own_planes + v * planes.vector_stride + source * planes.source_stride;
          std::copy_n(plane + above->rows * plan.pitch * lanes<T>, kept * plan.pitch * lanes<T>,
                      plane);
        }
      const Rows needed = source_rows(plan, strip, planes, kept);
      std::vector<int64_t> places;
      place_pixels(plan, strip, planes, kept, needed, vectors, own_planes, places);
      const Pixels<T> source =
          source_pixels<T, S>(input, strip.image, strip.images, needed.begin,
                              needed.end - needed.begin, packing.inputs, input_at);
      // Line by line: the processor's own prefetching does not follow 14 pixels at once.
      const bool in_place = source.pitch > lanes<T>;
      multiply_to_planes(
          source, packed + first_vector * packing.inner_size, packing.inner_size, vectors, places,
          own_planes, planes.vector_stride,
          in_place ? Ahead<T>{source.at + ahead * source.pitch, source.pitch} : Ahead<T>{});
    }

    const Runs runs = runs_of<T>(plan, target, planes);
    const int64_t width = output.width * lanes<T>;
    std::vector<Segment> segments;
    segments_of<T>({nullptr, 0, 0, 0, strip.rows * width, 1, width, lanes<T>}, plan, target,
                   {0, strip.images, 0, strip.rows}, tile.columns, segments);
    for (int64_t b = first_block; b < last_block; b++) {
      const Stencil<T> stencil{channels.sources, planes.vector_stride, runs, g.taps() * lanes<T>,
                               channels.permutation_of(b)};
      correlate_tiles(stencil, packed + packing.at_grouped + b * channels.packed, tile, segments,
                      planes_at + channels.cluster(b) * channels.vectors * planes.vector_stride +
                          channels.first_lane(b),
                      grouped_at + b * stride, lanes<T>);
    }
  };
  // Vectors [first, last) of a strip's outputs.
  auto multiply_last = [&](const Strip& strip, int64_t first, int64_t last, const T* grouped_at,
                           T* spare) {
    multiply_to_tensor<T, S>(
        {grouped_at, lanes<T>, stride, &channels.blocks},
        packed + packing.at_last + first * packing.output_size, packing.output_size,
        {packing.outputs.begin() + first, packing.outputs.begin() + last},
        packed + packing.at_bias + first * lanes<T>, layer.relu, output, strip.image,
        strip.row * output.width, strip.images * strip.rows * output.width, spare);
  };

  if (shared) {
    Buffer<T> between(plane_size + blocks * stride);
    T* const planes_at = between.data();
    T* const grouped_at = planes_at + plane_size;
    const Strip& strip = parts[0][0];
    auto inner_work = [&](int64_t begin, int64_t end) {
      convolve_inner(strip, nullptr, begin, end, planes_at, grouped_at, scratch<T>(input_size));
    };
    run(threads, clusters, inner_work);
    auto last_work = [&](int64_t begin, int64_t end) {
      multiply_last(strip, 2 * begin, std::min(2 * end, outputs), grouped_at,
                    scratch<T>(spare_size));
    };
    run(threads, ceil_div(outputs, 2), last_work);
    return;
  }
  auto work = [&](int64_t begin, int64_t end) {
    T* const planes_at = scratch<T>(plane_size + input_size + blocks * stride + spare_size);
    T* const input_at = planes_at + plane_size;
    T* const grouped_at = input_at + input_size;
    T* const spare = grouped_at + blocks * stride;
    for (int64_t part = begin; part < end; part++) {
      const Strip* above = nullptr;
      for (const Strip& strip : parts[part]) {
        convolve_inner(strip, above, 0, clusters, planes_at, grouped_at, input_at);
        multiply_last(strip, 0, outputs, grouped_at, spare);
        above = &strip;
      }
    }
  };
  run(threads, parts.size(), work);
}

}  // namespace gross::cpu::GROSS_ISA
