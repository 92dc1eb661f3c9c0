// All gradients of a layer, strip by strip like the layer itself: of the tensors between input and
// output none is ever whole.
//
// With p = P x, r = R ∗ p, y = Q r + bias, a strip computes p and r again, then
//   dQ += dy rᵀ,   dr = Qᵀ dy,   dp = Rᵀ ∗ dr,   dR += corr(dr, p),   dx = Pᵀ dp,   dP += dp xᵀ.
// dr is computed with the rows around the strip that dp reads. Rows are cut into slices by shape
// alone; a slice's sums of weight gradients are its own, and slices are added in order: the bits do
// not depend on the number of threads.
#pragma once

#include "bottleneck.h"
#include "correlate_weights.h"
#include "gradients.h"

namespace gross::cpu::GROSS_ISA {

// Bytes that all slices' sums may take together, as long as there are `least_slices`.
constexpr int64_t sums_budget = 8 << 20, least_slices = 4, most_slices = 32;

// The sums of one slice, as numbers from its first: dP by vectors of dp, dR by blocks, dQ and the
// bias's gradient by vectors of outputs.
struct LayerSums {
  int64_t of_first, of_grouped, of_last, of_bias;  // numbers per vector, or block
  int64_t at_grouped, at_last, at_bias, size;
};

// A layer's weights as the backward pass reads them: P and R as forward, and all three transposed.
template <class T>
struct BackwardPacking {
  Packing<T> forward;
  Channels<T> turned;               // the grouped convolution's input gradient
  std::vector<LaneBlock> middle;    // r in vectors, as the forward convolution writes it
  std::vector<LaneBlock> sources;   // dr in vectors, as the input gradient reads it
  std::vector<LaneBlock> slopes;    // dp in vectors, as the input gradient writes it
  bool same;                        // whether `middle` and `sources` are the same vectors
  int64_t middle_size, input_size;  // numbers per vector of Qᵀ and Pᵀ
  int64_t at_middle, at_sources, at_turned, at_inputs, size;
  LayerSums sums;

  explicit BackwardPacking(const Layer& layer)
      : forward(layer), turned(layer.geometry, Pass::backward) {
    const Geometry& g = layer.geometry;
    for (const LaneBlock& block : forward.grouped.blocks)
      middle.push_back({0, 1, block.first(forward.grouped), block.lanes()});
    for (const LaneBlock& block : turned.blocks)
      slopes.push_back({0, 1, block.first(turned), block.lanes()});
    sources = vectors_of<T>(g.out_channels, turned.together * turned.sources);
    same = sources.size() == middle.size();
    for (size_t v = 0; same && v < middle.size(); v++) same = sources[v].output == middle[v].output;
    middle_size = layer.out_channels * lanes<T>;
    input_size = g.in_channels * lanes<T>;
    at_middle = forward.at_last;
    at_sources = same ? at_middle : at_middle + Packing<T>::count(middle) * middle_size;
    at_turned = at_sources + Packing<T>::count(sources) * middle_size;
    at_inputs = at_turned + Packing<T>::count(turned.blocks) * turned.packed;
    size = at_inputs + Packing<T>::count(forward.inputs) * input_size;

    sums.of_first = layer.in_channels * lanes<T>;
    sums.of_grouped = forward.grouped.packed;
    sums.of_last = g.out_channels * lanes<T>;
    sums.of_bias = lanes<T>;
    sums.at_grouped = Packing<T>::count(slopes) * sums.of_first;
    sums.at_last = sums.at_grouped + Packing<T>::count(middle) * sums.of_grouped;
    sums.at_bias = sums.at_last + Packing<T>::count(forward.outputs) * sums.of_last;
    sums.size = sums.at_bias + Packing<T>::count(forward.outputs) * sums.of_bias;
  }
};

// Which of the products a call takes, and so which weights it packs: p (not where it was kept), r,
// dr by r's vectors and by its readers', dp, dx.
struct Needed {
  bool inner, middle, middle_grad, sources, slopes, input;
};

template <class T, class S>
void pack_backward(const Layer& layer, const BackwardPacking<T>& packing, const Needed& needed,
                   T* to, const Threads& threads) {
  const Packing<T>& forward = packing.forward;
  const Direction first(forward.first, Pass::forward), first_turned(forward.first, Pass::backward),
      last_turned(forward.last, Pass::backward);
  struct Piece {
    SummedWeights of;
    LaneBlock block;
    int64_t at;
  };
  std::vector<Piece> pieces;
  auto add = [&](const SummedWeights& of, const std::vector<LaneBlock>& blocks, int64_t at,
                 int64_t step) {
    for (const LaneBlock& block : blocks) {
      pieces.push_back({of, block, at});
      at += step;
    }
  };
  const SummedWeights grouped{layer.grouped, layer.geometry, forward.grouped},
      turned{layer.grouped, layer.geometry, packing.turned},
      last{layer.pointwise_out, forward.last, last_turned};
  if (needed.inner)
    add({layer.pointwise_in, forward.first, first}, forward.inner, 0, forward.inner_size);
  if (needed.middle)
    add(grouped, forward.grouped.blocks, forward.at_grouped, forward.grouped.packed);
  if (needed.middle_grad && !packing.same)
    add(last, packing.middle, packing.at_middle, packing.middle_size);
  if (needed.sources) add(last, packing.sources, packing.at_sources, packing.middle_size);
  if (needed.slopes) add(turned, packing.turned.blocks, packing.at_turned, packing.turned.packed);
  if (needed.input)
    add({layer.pointwise_in, forward.first, first_turned}, forward.inputs, packing.at_inputs,
        packing.input_size);
  const int64_t rows = std::max({forward.inner_size, forward.grouped.summed, packing.middle_size,
                                 packing.turned.summed, packing.input_size});
  auto work = [&](int64_t begin, int64_t end) {
    T* const sum = scratch<T>(rows);
    for (int64_t i = begin; i < end; i++) {
      const Piece& piece = pieces[i];
      pack_weights<T, S>(piece.of, piece.block, sum, to + piece.at);
    }
  };
  run(threads, pieces.size(), work);
}

// to[lane] += Σ_pixel from[pixel][lane], in four chains of additions.
template <class T>
void add_pixels(const T* from, int64_t count, T* to) {
  Vector<T> sum[4]{};
  for (int64_t p = 0; p < count; p++) sum[p % 4] += load<T>(from + p * lanes<T>);
  store<T>(to, load<T>(to) + ((sum[0] + sum[1]) + (sum[2] + sum[3])));
}

// Zeros where the weight gradient reads past the planes' last pixel.
template <class T>
void zero_slack(const Planes& planes, int64_t vectors, T* to) {
  const int64_t used = planes.used();
  for (int64_t v = 0; v < vectors; v++)
    for (size_t source = 0; source < planes.plan->sources.size(); source++)
      zero_positions<T>(
          to + v * planes.vector_stride + source * planes.source_stride + used * lanes<T>,
          planes.positions - used);
}

// Rows of a strip in every tensor, and where they start.
struct StripRows {
  Rows output, grad;   // r of the strip; dy with the rows around it that dp reads
  Rows input, source;  // dp of the strip; x with the rows around it that r reads
};

// The two convolutions' plans on one grid: position p of dr is position p of r, and planes of both
// have the same pitches.
struct LayerPlans {
  Plan forward, turned;
  int64_t rows;   // of the grid
  int64_t shift;  // positions from dr's planes to the first pixel of r's first row

  LayerPlans(const Geometry& g, const Image& input, const Image& grad)
      : forward(forward_plan(g, input.height, input.width, grad.height, grad.width)),
        turned(input_grad_plan(g, input.height, input.width, grad.height, grad.width)) {
    // As a target that reads dr in place, r makes its planes hold r's own rows and columns too.
    turned.targets.push_back({{0, 1, 0, 1}, grad.height, grad.width, {{0, 0, 0, 0}}});
    turned.layout();
    turned.targets.pop_back();
    forward.pitch = turned.pitch = std::max(forward.pitch, turned.pitch);
    forward.row_pitch = turned.row_pitch = std::max(forward.row_pitch, turned.row_pitch);
    rows = turned.rows;
    shift = -turned.min_row * turned.pitch - turned.min_col;
  }

  // The strip as far as it has rows of r.
  Strip outputs(const Strip& strip) const {
    return {strip.image, strip.images, strip.row,
            std::clamp<int64_t>(turned.source_height - strip.row, 0, strip.rows)};
  }

  template <class T>
  StripRows rows_of(const Geometry& g, const Strip& strip) const {
    StripRows of;
    const Strip out = outputs(strip);
    of.output = {out.row, out.row + out.rows};
    of.grad = source_rows(Planes::of<T>(turned, strip), 0);
    if (out.rows)
      of.grad = {std::min(of.grad.begin, of.output.begin), std::max(of.grad.end, of.output.end)};
    of.input = {std::min(strip.row * g.stride_h, forward.source_height),
                std::min((strip.row + strip.rows) * g.stride_h, forward.source_height)};
    of.source = of.input;
    if (out.rows) {
      const Rows needed = source_rows(Planes::of<T>(forward, out), 0);
      if (needed.begin < needed.end)
        of.source = {std::min(of.input.begin, needed.begin), std::max(of.input.end, needed.end)};
    }
    return of;
  }
};

// Slices of all images' rows: as many as have a few tiles of pixels each, and more where weights
// are wide, for every slice pays for its sums.
inline int64_t slice_count(const Layer& layer, int64_t pixels_per_image, int64_t sums_bytes) {
  const Geometry& g = layer.geometry;
  const int64_t pixels = g.images * pixels_per_image,
                widest = std::max(
                    {layer.in_channels, g.in_channels, g.out_channels, layer.out_channels});
  int64_t slices = 1;
  while (slices < most_slices && pixels >= 2 * slices * std::max<int64_t>(64, widest / 4) &&
         (slices < least_slices || 2 * slices * sums_bytes <= sums_budget))
    slices *= 2;
  return slices;
}

// A layer's backward pass: the plan, the walk over the strips, and the sums' way out.
template <class T, class S>
class LayerBackwardWalk {
 public:
  // The plan: what is asked for, how rows are cut, and what a strip of them takes.
  explicit LayerBackwardWalk(const LayerBackward& call)
      : call_(call),
        g_(call.layer.geometry),
        packing_(call.layer),
        plans_(g_, call.input, call.grad),
        for_last_(call.gradient.pointwise_out.wanted()),
        for_grouped_(call.gradient.grouped.wanted()),
        for_first_(call.gradient.pointwise_in.wanted()),
        for_inner_(for_first_ || call.gradient.input.data),
        for_middle_(for_inner_ || for_grouped_),
        inner_vectors_(packing_.forward.inner.size()),
        blocks_(packing_.middle.size()),
        source_vectors_(packing_.sources.size()),
        slope_vectors_(packing_.slopes.size()),
        outputs_(packing_.forward.outputs.size()),
        inputs_(packing_.forward.inputs.size()),
        slices_(slice_count(call.layer, call.grad.height * call.grad.width,
                            packing_.sums.size * sizeof(T))),
        packed_(packing_.size),
        totals_(slices_ * packing_.sums.size) {
    cut();
    measure();
  }

  void run() {
    const bool reads_inner = for_last_ || for_grouped_;
    pack_backward<T, S>(call_.layer, packing_,
                        {!call_.inner.data && reads_inner, for_last_, for_grouped_, for_middle_,
                         for_inner_, call_.gradient.input.data != nullptr},
                        packed_.data(), call_.threads);
    walk();
    write();
  }

 private:
  static constexpr int n = lanes<T>;

  // Tensors between input and output of one strip.
  struct Between {
    T* inner;                   // planes of p
    T *sources, *middle_grad;   // planes of dr, by its readers' vectors and by r's
    T *middle, *grad, *output;  // pixels of r, dy and the output
    T *slopes, *input;          // pixels of dp and x
    T* spare;
  };
  // A strip, and where its rows are.
  struct StripAt {
    Strip grid, out;  // of the grid, and as far as it has rows of r
    StripRows rows;
    Planes inner, middle;
    int64_t out_count, in_count;    // pixels of r and of dp
    int64_t out_stride, in_stride;  // from one vector of them to the next
    T* sums;
  };

  // Plan ----------------------------------------------------------------------------------------

  void cut() {
    const int64_t row_bytes =
        sizeof(T) *
        (g_.stride_h * call_.input.width * (call_.layer.in_channels + 2 * g_.in_channels) +
         call_.grad.width * (2 * g_.out_channels + call_.layer.out_channels));
    const int64_t rows = std::clamp<int64_t>(
        std::min(strip_budget / row_bytes, ceil_div(strip_pixels, call_.grad.width)), 1,
        plans_.rows);
    const int64_t together = rows < plans_.rows
                                 ? 1
                                 : std::max<int64_t>(1, std::min(strip_budget / row_bytes,
                                                                 strip_pixels / call_.grad.width) /
                                                            plans_.rows);
    parts_ = thread_strips(g_.images, plans_.rows, rows, together, slices_);
  }

  void measure() {
    for (const std::vector<Strip>& part : parts_)
      for (const Strip& strip : part) {
        const StripRows of = plans_.rows_of<T>(g_, strip);
        auto grow = [&](int64_t& pixels, const Rows& rows, int64_t width) {
          pixels = std::max(pixels, (strip.images * (rows.end - rows.begin) * width | 1) * n);
        };
        inner_size_ = std::max(
            inner_size_,
            inner_vectors_ * Planes::of<T>(plans_.forward, plans_.outputs(strip)).vector_stride);
        middle_size_ =
            std::max(middle_size_, std::max(blocks_, source_vectors_) *
                                       Planes::of<T>(plans_.turned, strip).vector_stride);
        grow(output_pixels_, of.output, call_.grad.width);
        grow(grad_pixels_, of.grad, call_.grad.width);
        grow(input_pixels_, of.input, call_.input.width);
        grow(source_pixels_, of.source, call_.input.width);
      }
  }

  Between memory() const {
    const int64_t output_size = call_.output.data ? outputs_ * grad_pixels_ : 0;
    Between at;
    at.inner =
        scratch<T>(inner_size_ + (packing_.same ? 1 : 2) * middle_size_ + blocks_ * output_pixels_ +
                   outputs_ * grad_pixels_ + output_size + slope_vectors_ * input_pixels_ +
                   inputs_ * source_pixels_ + 2 * max_pixels * n);
    at.sources = at.inner + inner_size_;
    at.middle_grad = packing_.same ? at.sources : at.sources + middle_size_;
    at.middle = at.middle_grad + middle_size_;
    at.grad = at.middle + blocks_ * output_pixels_;
    at.output = at.grad + outputs_ * grad_pixels_;
    at.slopes = at.output + output_size;
    at.input = at.slopes + slope_vectors_ * input_pixels_;
    at.spare = at.input + inputs_ * source_pixels_;
    return at;
  }

  // Walk ----------------------------------------------------------------------------------------

  void walk() {
    auto march = [&](int64_t begin, int64_t end) {
      const Between at = memory();
      for (int64_t slice = begin; slice < end; slice++) {
        T* const sums = totals_.data() + slice * packing_.sums.size;
        std::fill_n(sums, packing_.sums.size, T(0));
        for (const Strip& strip : parts_[slice]) add(strip_at(strip, sums), at);
      }
    };
    gross::cpu::run(call_.threads, slices_, march);
  }

  StripAt strip_at(const Strip& strip, T* sums) const {
    StripAt of;
    of.grid = strip;
    of.out = plans_.outputs(strip);
    of.rows = plans_.rows_of<T>(g_, strip);
    of.inner = Planes::of<T>(plans_.forward, of.out);
    of.middle = Planes::of<T>(plans_.turned, strip);
    of.out_count = strip.images * of.out.rows * call_.grad.width;
    of.in_count = strip.images * (of.rows.input.end - of.rows.input.begin) * call_.input.width;
    of.out_stride = (of.out_count | 1) * n;
    of.in_stride = (of.in_count | 1) * n;
    of.sums = sums;
    return of;
  }

  // All that a strip adds to the gradients.
  void add(const StripAt& strip, const Between& at) {
    const Pixels<T> source = copied_pixels<T, S>(call_.input, rows_of(strip, strip.rows.source),
                                                 packing_.forward.inputs, at.input);
    const Pixels<T> slope = load_slope(strip, at);
    const T* const own_slope =
        at.grad + (strip.rows.output.begin - strip.rows.grad.begin) * call_.grad.width * n;
    const bool any = strip.out.rows;
    if (call_.gradient.bias) add_bias(strip, own_slope, slope.vector_stride);
    if (any && (for_last_ || for_grouped_)) load_inner(strip, source, at);
    if (any && for_last_) {
      convolve_middle(strip, at);
      multiply_all_weights<T>({own_slope, slope.vector_stride, outputs_},
                              {at.middle, n, strip.out_stride, &packing_.middle}, strip.out_count,
                              {strip.sums + packing_.sums.at_last, packing_.sums.of_last});
    }
    if (!for_middle_) return;
    multiply_middle_grad(strip, slope, packing_.at_sources, source_vectors_, at.sources);
    if (for_inner_) add_inner(strip, source, at);
    if (any && for_grouped_) {
      if (!packing_.same)
        multiply_middle_grad(strip, slope, packing_.at_middle, blocks_, at.middle_grad);
      add_grouped(strip, at);
    }
  }

  // The same images' rows of another tensor.
  static Strip rows_of(const StripAt& strip, const Rows& rows) {
    return {strip.grid.image, strip.grid.images, rows.begin, rows.end - rows.begin};
  }

  // dy with the rows around the strip; zeros where relu cut the output off.
  Pixels<T> load_slope(const StripAt& strip, const Between& at) const {
    const Strip rows = rows_of(strip, strip.rows.grad);
    const std::vector<LaneBlock>& vectors = packing_.forward.outputs;
    const Pixels<T> slope = copied_pixels<T, S>(call_.grad, rows, vectors, at.grad);
    if (!call_.output.data) return slope;
    copied_pixels<T, S>(call_.output, rows, vectors, at.output);
    for (int64_t k = 0; k < outputs_ * slope.vector_stride; k += n)
      store<T>(at.grad + k,
               load<T>(at.output + k) <= Vector<T>{} ? Vector<T>{} : load<T>(at.grad + k));
    return slope;
  }

  void add_bias(const StripAt& strip, const T* slope, int64_t stride) const {
    for (int64_t v = 0; v < outputs_; v++)
      add_pixels(slope + v * stride, strip.out_count, strip.sums + packing_.sums.at_bias + v * n);
  }

  // p: as it was kept, or computed again.
  void load_inner(const StripAt& strip, const Pixels<T>& source, const Between& at) const {
    if (call_.inner.data)
      return load_sources<T, S>(call_.inner, strip.inner, packing_.forward.grouped, {0, blocks_},
                                at.inner);
    std::vector<int64_t> places;
    place_pixels(strip.inner, 0, strip.rows.source, inner_vectors_, at.inner, places);
    multiply_to_planes(source, packing_.forward.first_weights(packed_.data(), 0, inner_vectors_),
                       places, at.inner, strip.inner.vector_stride);
    zero_slack(strip.inner, inner_vectors_, at.inner);
  }

  // r = R ∗ p.
  void convolve_middle(const StripAt& strip, const Between& at) {
    const Channels<T>& channels = packing_.forward.grouped;
    const Target& target = plans_.forward.targets[0];
    const Runs runs = runs_of<T>(target, strip.inner);
    const Tile<T> tile = tile_for<T>(channels.fetch, call_.grad.width);
    std::vector<Segment> segments;
    segments_between<T>(strip.inner, target, strip.out.rows, call_.grad.width, tile.columns,
                        segments);
    for (int64_t b = 0; b < blocks_; b++)
      correlate_tiles<T>(stencil(channels, b, at.inner, strip.inner, runs,
                                 packed_.data() + packing_.forward.at_grouped),
                         tile, segments, {at.middle + b * strip.out_stride, n});
  }

  Stencil<T> stencil(const Channels<T>& channels, int64_t block, const T* planes_at,
                     const Planes& planes, const Runs& runs, const T* weights) const {
    return {
        planes_at + channels.plane_of(block, 0) * planes.vector_stride + channels.first_lane(block),
        planes.vector_stride,
        channels.sources,
        runs,
        weights + block * channels.packed,
        g_.taps() * n,
        channels.permutation_of(block)};
  }

  // dr = Qᵀ dy, in some order of its channels.
  void multiply_middle_grad(const StripAt& strip, const Pixels<T>& slope, int64_t weights,
                            int64_t vectors, T* to) {
    std::vector<int64_t> places;
    place_pixels(strip.middle, 0, strip.rows.grad, vectors, to, places);
    multiply_to_planes(slope, {packed_.data() + weights, packing_.middle_size, vectors}, places, to,
                       strip.middle.vector_stride);
  }

  // dp = Rᵀ ∗ dr, dx = Pᵀ dp, dP += dp xᵀ.
  void add_inner(const StripAt& strip, const Pixels<T>& source, const Between& at) {
    for (const Target& target : plans_.turned.targets) convolve_slopes(strip, target, at);
    const int64_t width = call_.input.width, first = strip.rows.input.begin;
    if (call_.gradient.input.data)
      multiply_to_tensor<T, S>(
          {at.slopes, n, strip.in_stride, &packing_.slopes},
          {packed_.data() + packing_.at_inputs, packing_.input_size, inputs_}, {},
          packing_.forward.inputs,
          {call_.gradient.input, strip.grid.image, first * width, strip.in_count}, at.spare);
    if (!for_first_) return;
    Pixels<T> own = source;
    own.at += (first - strip.rows.source.begin) * width * n;
    multiply_all_weights<T>({at.slopes, strip.in_stride, slope_vectors_}, own, strip.in_count,
                            {strip.sums, packing_.sums.of_first});
  }

  void convolve_slopes(const StripAt& strip, const Target& target, const Between& at) {
    const Channels<T>& turned = packing_.turned;
    const int64_t width = call_.input.width * n;
    const Rows& rows = strip.rows.input;
    const Runs runs = runs_of<T>(target, strip.middle);
    const Tile<T> tile = tile_for<T>(turned.fetch, target.cols);
    std::vector<Segment> segments;
    segments_of<T>({nullptr, 0, 0, 0, (rows.end - rows.begin) * width, 1, width, n}, plans_.turned,
                   target, strip.grid, tile.columns, segments);
    for (Segment& segment : segments) segment.to -= rows.begin * width;
    for (int64_t b = 0; b < slope_vectors_; b++)
      correlate_tiles<T>(
          stencil(turned, b, at.sources, strip.middle, runs, packed_.data() + packing_.at_turned),
          tile, segments, {at.slopes + b * strip.in_stride, target.lattice.col_step * n});
  }

  // dR += corr(dr, p).
  void add_grouped(const StripAt& strip, const Between& at) const {
    const Channels<T>& channels = packing_.forward.grouped;
    const Plan& plan = plans_.forward;
    const Runs runs = runs_of<T>(plan.targets[0], strip.inner);
    const Stretches stretches = Stretches::of<T>(plan, strip.out);
    // The last stretch may reach into the row below the strip, which belongs to another.
    const int64_t end =
        plans_.shift +
        ((strip.grid.images - 1) * plan.row_pitch + strip.out.rows - 1) * plan.pitch + plan.cols;
    for (int64_t b = 0; b < blocks_; b++) {
      T* const plane = at.middle_grad + b * strip.middle.vector_stride;
      zero_positions<T>(plane + end * n, slack);
      correlate_block<T>(
          channels, b, g_.taps(), runs.all, stretches,
          {plane + plans_.shift * n,
           at.inner + channels.plane_of(b, 0) * strip.inner.vector_stride + channels.first_lane(b),
           strip.inner.vector_stride,
           strip.sums + packing_.sums.at_grouped + b * packing_.sums.of_grouped});
    }
  }

  // The sums' way out ---------------------------------------------------------------------------

  // The sum of all slices, in order.
  T* total(int64_t at, int64_t size) {
    T* to = totals_.data() + at;
    for (int64_t slice = 1; slice < slices_; slice++)
      for (int64_t k = 0; k < size; k += n)
        store<T>(to + k, load<T>(to + k) + load<T>(to + slice * packing_.sums.size + k));
    return to;
  }

  // dP by vectors of dp, dR by blocks, dQ and the bias's gradient by vectors of outputs.
  void write() {
    const Packing<T>& forward = packing_.forward;
    const LayerSums& sums = packing_.sums;
    const LayerGradient& gradient = call_.gradient;
    const Direction first(forward.first, Pass::forward), last(forward.last, Pass::forward);
    std::vector<double> shares(max_terms * (slope_vectors_ + blocks_ + outputs_));

    auto write_vector = [&](const SeriesBackward& of, const Direction& d, const LaneBlock& block,
                            T* sum, double* share) {
      T* const rows = scratch<T>(std::max({sums.of_first, forward.grouped.summed, sums.of_last}));
      write_gradients(of, d, block, sum, rows, of.gradient.gates ? share : nullptr);
    };
    auto work = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t b = i - slope_vectors_, v = b - blocks_;
        double* const share = &shares[i * max_terms];
        if (b < 0) {
          if (for_first_)
            write_vector({call_.layer.pointwise_in, gradient.pointwise_in, forward.first}, first,
                         packing_.slopes[i], total(i * sums.of_first, sums.of_first), share);
        } else if (v < 0) {
          if (for_grouped_)
            write_vector({call_.layer.grouped, gradient.grouped, g_}, forward.grouped,
                         forward.grouped.blocks[b],
                         total(sums.at_grouped + b * sums.of_grouped, sums.of_grouped), share);
        } else {
          const LaneBlock& block = forward.outputs[v];
          if (for_last_)
            write_vector({call_.layer.pointwise_out, gradient.pointwise_out, forward.last}, last,
                         block, total(sums.at_last + v * sums.of_last, sums.of_last), share);
          if (gradient.bias)
            store_strided<T>(static_cast<T*>(gradient.bias) + block.output,
                             load<T>(total(sums.at_bias + v * n, n)), 1, block.outputs);
        }
      }
    };
    gross::cpu::run(call_.threads, slope_vectors_ + blocks_ + outputs_, work);
    const double* share = shares.data();
    const int active = call_.layer.grouped.active;
    add_shares(share, slope_vectors_, active, gradient.pointwise_in.gates);
    add_shares(share += max_terms * slope_vectors_, blocks_, active, gradient.grouped.gates);
    add_shares(share += max_terms * blocks_, outputs_, active, gradient.pointwise_out.gates);
  }

  const LayerBackward& call_;
  const Geometry& g_;
  const BackwardPacking<T> packing_;
  const LayerPlans plans_;
  // Gradients that are asked for, and those that they are made from.
  const bool for_last_, for_grouped_, for_first_, for_inner_, for_middle_;
  // Vectors of p, r, dr as its readers have it, dp, the output and the input.
  const int64_t inner_vectors_, blocks_, source_vectors_, slope_vectors_, outputs_, inputs_;
  const int64_t slices_;
  std::vector<std::vector<Strip>> parts_;
  // Numbers of the largest strip: planes of p and dr, one vector of the others' pixels.
  int64_t inner_size_ = 0, middle_size_ = 0;
  int64_t output_pixels_ = 0, grad_pixels_ = 0, input_pixels_ = 0, source_pixels_ = 0;
  Buffer<T> packed_, totals_;
};

}  // namespace gross::cpu::GROSS_ISA
