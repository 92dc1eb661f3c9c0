// A whole layer, pointwise → grouped → pointwise, strip by strip: everything between input and
// output stays in the second-level cache.
//
// A thread marches down its rows. The first pointwise writes the planes that the grouped
// convolution reads, and the rows that the next strip needs again are moved, not recomputed; the
// grouped convolution writes vectors of channels, pixel after pixel, which the last pointwise
// reads. Of one small image all threads compute the same strip, each some of its channels. Both
// pointwise convolutions are one kernel: 14 pixels × 32 channels, 28 multiply–adds for 16 loads.
#pragma once

#include "bytes_layer.h"
#include "correlate.h"
#include "pointwise.h"
#include "weights.h"

namespace gross::cpu::GROSS_ISA {

// Bytes of input, inner and output pixels that a strip may take in a 1 MB second-level cache,
// beside weights.
constexpr int64_t strip_budget = 640 << 10;

// How a layer's weights are packed: P by vectors of the grouped convolution's sources, R by its
// blocks, Q by vectors of outputs, the bias, PReLU's slopes.
template <class T>
struct Packing {
  Channels<T> grouped;
  Geometry first, last;  // the pointwise convolutions'
  std::vector<LaneBlock> inputs, inner, outputs;
  int64_t inner_size, output_size;  // numbers per vector of P and Q
  int64_t at_grouped, at_last, at_bias, at_slopes, size;

  explicit Packing(const Layer& layer)
      : grouped(layer.geometry, Pass::forward),
        first(pointwise_geometry(layer.in_channels, layer.geometry.in_channels)),
        last(pointwise_geometry(layer.geometry.out_channels, layer.out_channels)),
        inputs(vectors_of<T>(layer.in_channels, layer.in_channels)),
        inner(vectors_of<T>(layer.geometry.in_channels, grouped.together * grouped.sources)),
        outputs(vectors_of<T>(layer.out_channels, layer.out_channels)) {
    inner_size = layer.in_channels * lanes<T>;
    output_size = layer.geometry.out_channels * lanes<T>;
    at_grouped = count(inner) * inner_size;
    at_last = at_grouped + count(grouped.blocks) * grouped.packed;
    at_bias = at_last + count(outputs) * output_size;
    at_slopes = at_bias + count(outputs) * lanes<T>;
    size = at_slopes + count(outputs) * lanes<T>;
  }

  PackedWeights<T> first_weights(const T* packed, int64_t vector, int64_t vectors) const {
    return {packed + vector * inner_size, inner_size, vectors};
  }
  PackedWeights<T> last_weights(const T* packed, int64_t vector, int64_t vectors) const {
    return {packed + at_last + vector * output_size, output_size, vectors};
  }

  const T* block_weights(const T* packed, int64_t block) const {
    return packed + at_grouped + block * grouped.packed;
  }

  static int64_t count(const std::vector<LaneBlock>& blocks) {
    return static_cast<int64_t>(blocks.size());
  }
};

template <class T, class S>
void pack_layer(const Layer& layer, T* to, const Threads& threads) {
  const Packing<T> packing(layer);
  const Direction first(packing.first, Pass::forward), last(packing.last, Pass::forward);
  const int64_t inner = packing.inner.size(), blocks = packing.grouped.blocks.size(),
                outputs = packing.outputs.size();
  const int64_t rows = std::max({packing.inner_size, packing.output_size, packing.grouped.summed});
  auto work = [&](int64_t begin, int64_t end) {
    T* const sum = scratch<T>(rows);
    for (int64_t i = begin; i < end; i++) {
      if (i < inner) {
        pack_weights<T, S>({layer.pointwise_in, packing.first, first}, packing.inner[i], sum,
                           to + i * packing.inner_size);
      } else if (i < inner + blocks) {
        const int64_t b = i - inner;
        pack_weights<T, S>({layer.grouped, layer.geometry, packing.grouped},
                           packing.grouped.blocks[b], sum,
                           to + packing.at_grouped + b * packing.grouped.packed);
      } else {
        const int64_t v = i - inner - blocks;
        const LaneBlock& block = packing.outputs[v];
        pack_weights<T, S>({layer.pointwise_out, packing.last, last}, block, sum,
                           to + packing.at_last + v * packing.output_size);
        store_outputs(layer.bias, block.output, block.outputs, to + packing.at_bias + v * lanes<T>);
        store_outputs(layer.slopes, block.output, block.outputs,
                      to + packing.at_slopes + v * lanes<T>);
      }
    }
  };
  run(threads, inner + blocks + outputs, work);
}

// Which rows of the image the rows [from, planes.rows) of a strip's planes come from: [begin, end).
struct Rows {
  int64_t begin, end;
};
inline Rows source_rows(const Planes& planes, int64_t from) {
  const Plan& plan = *planes.plan;
  const Strip& strip = planes.strip;
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
void place_pixels(const Planes& planes, int64_t from, const Rows& rows, int64_t vectors, T* to,
                  std::vector<int64_t>& places) {
  const Plan& plan = *planes.plan;
  const Strip& strip = planes.strip;
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
      for (int64_t r = from; r < planes.rows_of(i); r++) {
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
    zero(planes.used(), plan.max_col - plan.min_col);
    source += planes.source_stride;
  }
}

// The tiles of one strip into vectors of channels, pixel after pixel, `width` pixels to a row:
// where its segments go.
template <class T>
void segments_between(const Planes& planes, const Target& target, int64_t rows, int64_t width,
                      int64_t columns, std::vector<Segment>& segments) {
  const int64_t pitch = width * lanes<T>;
  segments_of<T>({nullptr, 0, 0, 0, rows * pitch, 1, pitch, lanes<T>}, *planes.plan, target,
                 {0, planes.strip.images, 0, rows}, columns, segments);
}

// A layer's forward pass. Where the call keeps `inner`, the first pointwise convolution is computed
// into it beforehand, and read from there. Of 8 bits (S is uint8_t, T int32_t) all sums are of
// integers, and what the grouped convolution writes becomes bytes, [pixel][channel], block by
// block.
template <class T, class S, Dot dot = Dot::exact>
class LayerWalk {
 public:
  // The plan: how rows are cut, and what a strip of them takes.
  explicit LayerWalk(const LayerForward& call)
      : call_(call),
        packed_(static_cast<const T*>(call.packed)),
        packing_(call.layer),
        plan_(forward_plan(call.layer.geometry, call.input.height, call.input.width,
                           call.output.height, call.output.width)),
        tile_(tile_of_grouped()),
        inner_vectors_(packing_.inner.size()),
        blocks_(packing_.grouped.blocks.size()),
        outputs_(packing_.outputs.size()),
        clusters_(packing_.grouped.clusters(0, blocks_)) {
    cut();
    measure();
  }

  void run() const {
    if constexpr (!in_bytes)
      if (call_.inner.data)
        multiply_image<T, S>({call_.input, packing_.inputs, call_.inner, packing_.inner,
                              call_.layer.geometry.images},
                             packing_.first_weights(packed_, 0, inner_vectors_), {}, call_.threads);
    if (shared_)
      walk_together();
    else
      walk();
  }

 private:
  static constexpr bool in_bytes = std::is_same_v<S, uint8_t>;
  using Weights = std::conditional_t<in_bytes, ByteLayerPacking, Packing<T>>;
  static constexpr int64_t spare_size = 2 * max_pixels * lanes<T>;

  // Tensors between input and output of one strip. `grouped` holds all blocks or, of 8 bits, a
  // tile of one that then becomes bytes.
  struct Between {
    T *planes, *grouped, *input;
    uint8_t* bytes;
  };

  // Plan ----------------------------------------------------------------------------------------

  Tile<T> tile_of_grouped() const {
    if constexpr (in_bytes)
      return word_tile_for<words_product<dot>>(packing_.grouped, call_.output.width);
    else
      return tile_for<T>(packing_.grouped.fetch, call_.output.width);
  }

  void cut() {
    const Geometry& g = call_.layer.geometry;
    const Image& output = call_.output;
    const int64_t threads = call_.threads.count;
    // The pixels that one row of outputs brings into the cache.
    const bool numbers = !in_bytes || !call_.finish.forms.target.in_bytes();
    const int64_t outer = in_bytes ? 1 : sizeof(T), last = numbers ? sizeof(T) : 1;
    const int64_t row_bytes =
        g.stride_h * call_.input.width *
            (outer * call_.layer.in_channels + static_cast<int64_t>(sizeof(T)) * g.in_channels) +
        output.width * (outer * g.out_channels + last * call_.layer.out_channels);
    // Few rows of large weights, and too few images to go round: the threads share one strip, each
    // has some of the channels. By rows they would each read all weights, compute the halo's rows
    // twice and have one row more or less of seven. From four rows a thread on, handing over the
    // grouped convolution's outputs can cost more.
    shared_ =
        g.images < threads && g.images * output.height < 4 * threads &&
        std::min(clusters_, outputs_ / 2) >= threads &&
        g.images * output.height * row_bytes <=
            2 * std::min<int64_t>(strip_budget, packing_.size * static_cast<int64_t>(sizeof(T)));
    if (shared_) {
      parts_ = thread_strips(g.images, output.height, output.height, g.images, 1);
      return;
    }
    const int64_t rows = std::clamp<int64_t>(
        std::min(strip_budget / row_bytes, ceil_div(strip_pixels, output.width)), 1, output.height);
    const int64_t together =
        rows < output.height
            ? 1
            : std::max<int64_t>(1, std::min(strip_budget / row_bytes, strip_pixels / output.width) /
                                       output.height);
    // Several parts a thread where images are many: cut between images, and between strips of
    // several.
    const int64_t each = std::clamp<int64_t>(g.images / together / threads, 1, 4);
    parts_ = thread_strips(g.images, output.height, rows, together, each * threads);
  }

  // All strips have planes of one size, so that rows can move from one to the next.
  void measure() {
    int64_t input_pixels = 0, output_pixels = 0;
    for (const std::vector<Strip>& part : parts_)
      for (const Strip& strip : part) {
        const Planes planes = Planes::of<T>(plan_, strip);
        const Rows needed = source_rows(planes, 0);
        if (planes.positions > largest_.positions) largest_ = planes;
        input_pixels =
            std::max(input_pixels, strip.images * (needed.end - needed.begin) * call_.input.width);
        output_pixels = std::max(output_pixels, strip.images * strip.rows * call_.output.width);
      }
    plane_size_ = inner_vectors_ * largest_.vector_stride;
    stride_ = (output_pixels | 1) * lanes<T>;
    if constexpr (in_bytes) {
      pitch_ = round_up(call_.layer.geometry.out_channels, 4);
      bytes_size_ = ceil_div(output_pixels * pitch_, sizeof(T) * lanes<T>) * lanes<T>;
    } else {
      input_size_ = static_cast<int64_t>(packing_.inputs.size()) * (input_pixels | 1) * lanes<T>;
    }
    grouped_size_ = in_bytes ? max_segments * max_columns * lanes<T> : blocks_ * stride_;
  }

  // Walk ----------------------------------------------------------------------------------------

  // Each thread marches down its own strips.
  void walk() const {
    auto work = [&](int64_t begin, int64_t end) {
      T* const memory =
          scratch<T>(plane_size_ + input_size_ + grouped_size_ + bytes_size_ + spare_size);
      T* const grouped = memory + plane_size_ + input_size_;
      const Between at{memory, grouped, memory + plane_size_,
                       reinterpret_cast<uint8_t*>(grouped + grouped_size_)};
      T* const spare = grouped + grouped_size_ + bytes_size_;
      for (int64_t part = begin; part < end; part++) {
        const Strip* above = nullptr;
        for (const Strip& strip : parts_[part]) {
          convolve_inner(planes_of(strip), above, {0, clusters_}, at);
          multiply_last(strip, 0, outputs_, at, spare);
          above = &strip;
        }
      }
    };
    gross::cpu::run(call_.threads, parts_.size(), work);
  }

  // All threads work on one strip, each on some of its channels.
  void walk_together() const {
    // Of 8 bits each thread has a block of its own, and all have the bytes.
    Buffer<T> between(plane_size_ + (in_bytes ? bytes_size_ : grouped_size_));
    T* const shared = between.data() + plane_size_;
    const Strip& strip = parts_[0][0];
    const auto at = [&](T* own) {
      return Between{between.data(), in_bytes ? own : shared, own,
                     reinterpret_cast<uint8_t*>(shared)};
    };
    auto inner_work = [&](int64_t begin, int64_t end) {
      convolve_inner(planes_of(strip), nullptr, {begin, end},
                     at(scratch<T>(in_bytes ? grouped_size_ : input_size_)));
    };
    gross::cpu::run(call_.threads, clusters_, inner_work);
    auto last_work = [&](int64_t begin, int64_t end) {
      multiply_last(strip, 2 * begin, std::min(2 * end, outputs_), at(nullptr),
                    scratch<T>(spare_size));
    };
    gross::cpu::run(call_.threads, ceil_div(outputs_, 2), last_work);
  }

  Planes planes_of(const Strip& strip) const {
    Planes planes = Planes::of<T>(plan_, strip);
    planes.positions = largest_.positions;
    planes.source_stride = largest_.source_stride;
    planes.vector_stride = largest_.vector_stride;
    return planes;
  }

  // Some clusters of a strip's inner channels, from the input to the grouped convolution's outputs.
  void convolve_inner(const Planes& planes, const Strip* above, const Set& clusters,
                      const Between& at) const {
    const Channels<T>& channels = packing_.grouped;
    const int64_t cluster_blocks =
        ceil_div(channels.together, channels.per_block) * ceil_div(channels.outputs, lanes<T>);
    const Set blocks{clusters.first * cluster_blocks,
                     std::min(clusters.last * cluster_blocks, blocks_)};
    const int64_t first = clusters.first * channels.vectors,
                  vectors = std::min(clusters.last * channels.vectors, inner_vectors_) - first;
    T* const own_planes = at.planes + first * planes.vector_stride;
    const auto multiply = [&] {
      multiply_first(planes, keep_rows(planes, above, vectors, own_planes),
                     {first, first + vectors}, own_planes, at.input);
    };
    if constexpr (in_bytes)
      multiply();
    else if (call_.inner.data)
      load_sources<T, S>(call_.inner, planes, channels, blocks, own_planes);
    else
      multiply();
    convolve_grouped(planes, blocks, at);
  }

  // Rows that the strip above has computed already are moved to where this one has them; how many.
  int64_t keep_rows(const Planes& planes, const Strip* above, int64_t vectors, T* to) const {
    const bool follows =
        above && above->image == planes.strip.image && above->row + above->rows == planes.strip.row;
    const int64_t kept = follows ? plan_.halo() : 0;
    for (int64_t v = 0; kept > 0 && v < vectors; v++)
      for (size_t source = 0; source < plan_.sources.size(); source++) {
        T* plane = to + v * planes.vector_stride + source * planes.source_stride;
        std::copy_n(plane + above->rows * plan_.pitch * lanes<T>, kept * plan_.pitch * lanes<T>,
                    plane);
      }
    return kept;
  }

  // The first pointwise convolution into some vectors' planes, from row `kept` on.
  void multiply_first(const Planes& planes, int64_t kept, const Set& vectors, T* to,
                      T* input_at) const {
    const int64_t count = vectors.last - vectors.first;
    const Rows needed = source_rows(planes, kept);
    std::vector<int64_t> places;
    place_pixels(planes, kept, needed, count, to, places);
    const Strip rows{planes.strip.image, planes.strip.images, needed.begin,
                     needed.end - needed.begin};
    if constexpr (in_bytes)
      return multiply_first_bytes(rows, vectors, places, planes, to);
    else {
      const Pixels<T> source = source_pixels<T, S>(call_.input, rows, packing_.inputs, input_at);
      // Line by line: the processor's own prefetching does not follow 14 pixels at once.
      Ahead<T> next;
      if (source.pitch > lanes<T>)
        next = {source.at + pixels_ahead(call_.layer.in_channels) * source.pitch, source.pitch};
      multiply_to_planes(source, packing_.first_weights(packed_, vectors.first, count), places, to,
                         planes.vector_stride, next);
    }
  }
  void multiply_first_bytes(const Strip& rows, const Set& vectors,
                            const std::vector<int64_t>& places, const Planes& planes, T* to) const {
    const Image& input = call_.input;
    const int64_t pixels = rows.rows * input.width, whole = input.height * input.width;
    const uint8_t* const from = static_cast<const uint8_t*>(input.data) +
                                (rows.image * whole + rows.row * input.width) * input.channels;
    std::vector<ByteRun> runs;
    for (int64_t i = 0; i < rows.images; i++)
      if (i && pixels == whole)
        runs.back().count += pixels;
      else
        runs.push_back({from + i * whole * input.channels, i * pixels, pixels, 0, 1});
    const int64_t none = 0;
    multiply_all_runs<dot>(
        {nullptr, input.channels, &none, 1, packing_.first_rows.quads()}, runs,
        packing_.first_weights(packed_, vectors.first, vectors.last - vectors.first),
        [&](int64_t first, int64_t vector) {
          return ToPlanes{to + vector * planes.vector_stride,
                          places.data() + first,
                          planes.vector_stride,
                          packed_ + packing_.at_shifts + (vectors.first + vector) * lanes<T>,
                          {}};
        },
        [](int64_t, int64_t, int64_t, int64_t) {});
  }

  void convolve_grouped(const Planes& planes, const Set& blocks, const Between& at) const {
    const Channels<T>& channels = packing_.grouped;
    const Target& target = plan_.targets[0];
    const Runs runs = runs_of<T>(target, planes);
    const int64_t width = call_.output.width, pitch = in_bytes ? pitch_ : lanes<T>;
    std::vector<Segment> segments;
    segments_of<T>({nullptr, 0, 0, 0, planes.strip.rows * width * pitch, 1, width * pitch, pitch},
                   plan_, target, {0, planes.strip.images, 0, planes.strip.rows}, tile_.columns,
                   segments);
    for (int64_t b = blocks.first; b < blocks.last; b++) {
      Stencil<T> stencil{
          at.planes + channels.plane_of(b, 0) * planes.vector_stride + channels.first_lane(b),
          planes.vector_stride,
          channels.sources,
          runs,
          packing_.block_weights(packed_, b),
          call_.layer.geometry.taps() * lanes<T>,
          channels.permutation_of(b)};
      if constexpr (in_bytes) {
        const LaneBlock& block = channels.blocks[b];
        uint8_t* const to = at.bytes + block.first(channels);
        const Vector<float> step = load<float>(packing_.numbers(packed_, packing_.at_steps, b));
        stencil.together = packing_.together;
        correlate_through(stencil, tile_, segments, at.grouped, [&](int64_t segment, const T* r) {
          round_to_bytes({r, tile_.columns, step}, to + segments[segment].to, pitch, block.lanes());
        });
      } else {
        correlate_tiles<T>(stencil, tile_, segments, {at.grouped + b * stride_, lanes<T>});
      }
    }
  }

  // Sums of a block of r, pixel after pixel, in so many of its steps each, as bytes.
  struct Sums {
    const T* at;
    int64_t pixels;
    Vector<float> step;
  };
  GROSS_INLINE static void round_to_bytes(const Sums& sums, uint8_t* to, int64_t pitch,
                                          int64_t channels) {
    const auto r = [&](int64_t k) __attribute__((always_inline)) {
      return __builtin_convertvector(load<T>(sums.at + k * lanes<T>), Vector<float>) * sums.step;
    };
    int64_t k = 0;
    for (; channels == lanes<T> && k + 4 <= sums.pixels; k += 4)
      store_nearest({r(k), r(k + 1), r(k + 2), r(k + 3)}, -127, byte_zero, to + k * pitch, pitch);
    for (; k < sums.pixels; k++)
      store_bytes(to + k * pitch, nearest_bytes(r(k), -127, byte_zero), channels);
  }

  // Vectors [first, last) of a strip's outputs.
  void multiply_last(const Strip& strip, int64_t first, int64_t last, const Between& at,
                     T* spare) const {
    const int64_t width = call_.output.width;
    if constexpr (in_bytes) {
      const int64_t none = 0;
      const ByteEnding ending{packing_.numbers(packed_, packing_.at_scales),
                              packing_.numbers(packed_, packing_.at_bias),
                              packing_.numbers(packed_, packing_.at_slopes),
                              call_.finish,
                              call_.output,
                              packing_.outputs};
      multiply_to_end<dot>({nullptr, pitch_, &none, 1, packing_.last_rows.quads()},
                           {{at.bytes, (strip.image * call_.output.height + strip.row) * width,
                             strip.images * strip.rows * width, 0, 1}},
                           packing_.last_weights(packed_, first, last - first), ending, first,
                           reinterpret_cast<float*>(spare));
    } else {
      const auto& [activation, residual, residual_last, forms] = call_.finish;
      const Epilogue<T> epilogue{packed_ + packing_.at_bias + first * lanes<T>,
                                 packed_ + packing_.at_slopes + first * lanes<T>, activation,
                                 residual_last, residual};
      multiply_to_tensor<T, S>(
          {at.grouped, lanes<T>, stride_, &packing_.grouped.blocks},
          packing_.last_weights(packed_, first, last - first), epilogue,
          {packing_.outputs.begin() + first, packing_.outputs.begin() + last},
          {call_.output, strip.image, strip.row * width, strip.images * strip.rows * width}, spare);
    }
  }

  const LayerForward& call_;
  const T* packed_;
  const Weights packing_;
  const Plan plan_;
  const Tile<T> tile_;
  const int64_t inner_vectors_, blocks_, outputs_, clusters_;
  bool shared_;  // whether all threads work on one strip
  std::vector<std::vector<Strip>> parts_;
  Planes largest_{};
  // Numbers of planes, of a vector of outputs, of all of them, of the input's copy, and of bytes,
  // `pitch_` of them to a pixel.
  int64_t plane_size_, stride_, grouped_size_, input_size_ = 0, bytes_size_ = 0, pitch_ = 0;
};

}  // namespace gross::cpu::GROSS_ISA
