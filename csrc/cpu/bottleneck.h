// A whole layer, pointwise → grouped → pointwise, strip by strip: everything between input and
// output stays in the second-level cache.
//
// A thread marches down its rows. The first pointwise writes the planes that the grouped
// convolution reads, and the rows that the next strip needs again are moved, not recomputed; the
// grouped convolution writes vectors of channels, pixel after pixel, which the last pointwise
// reads. Of one small image all threads compute the same strip, each some of its channels. Both
// pointwise convolutions are one kernel: 14 pixels × 32 channels, 28 multiply–adds for 16 loads.
#pragma once

#include "correlate.h"
#include "pointwise.h"
#include "weights.h"

namespace gross::cpu::GROSS_ISA {

// Bytes of input, inner and output pixels that a strip may take in a 1 MB second-level cache,
// beside weights.
constexpr int64_t strip_budget = 640 << 10;

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
