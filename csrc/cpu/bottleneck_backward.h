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

  explicit BackwardPacking(const Layer& layer) : forward(layer), turned(layer.geometry, true) {
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
  const Direction first(forward.first, false), first_turned(forward.first, true),
      last_turned(forward.last, true);
  struct Piece {
    const Series* series;
    const Geometry* geometry;
    const Direction* direction;
    LaneBlock block;
    int64_t at;
  };
  std::vector<Piece> pieces;
  auto add = [&](const Series& series, const Geometry& geometry, const Direction& direction,
                 const std::vector<LaneBlock>& blocks, int64_t at, int64_t step) {
    for (const LaneBlock& block : blocks) {
      pieces.push_back({&series, &geometry, &direction, block, at});
      at += step;
    }
  };
  if (needed.inner)
    add(layer.pointwise_in, forward.first, first, forward.inner, 0, forward.inner_size);
  if (needed.middle)
    add(layer.grouped, layer.geometry, forward.grouped, forward.grouped.blocks, forward.at_grouped,
        forward.grouped.packed);
  if (needed.middle_grad && !packing.same)
    add(layer.pointwise_out, forward.last, last_turned, packing.middle, packing.at_middle,
        packing.middle_size);
  if (needed.sources)
    add(layer.pointwise_out, forward.last, last_turned, packing.sources, packing.at_sources,
        packing.middle_size);
  if (needed.slopes)
    add(layer.grouped, layer.geometry, packing.turned, packing.turned.blocks, packing.at_turned,
        packing.turned.packed);
  if (needed.input)
    add(layer.pointwise_in, forward.first, first_turned, forward.inputs, packing.at_inputs,
        packing.input_size);
  const int64_t rows = std::max({forward.inner_size, forward.grouped.summed, packing.middle_size,
                                 packing.turned.summed, packing.input_size});
  auto work = [&](int64_t begin, int64_t end) {
    T* const sum = scratch<T>(rows);
    for (int64_t i = begin; i < end; i++) {
      const Piece& piece = pieces[i];
      pack_weights<T, S>(*piece.series, *piece.geometry, *piece.direction, piece.block, sum,
                         to + piece.at);
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
void zero_slack(const Plan& plan, const Strip& strip, const Planes& planes, int64_t vectors,
                T* to) {
  const int64_t used = ((strip.images - 1) * planes.image_rows + planes.rows) * plan.pitch;
  for (int64_t v = 0; v < vectors; v++)
    for (size_t source = 0; source < plan.sources.size(); source++)
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
    of.grad = source_rows(turned, strip, Planes::of<T>(turned, strip), 0);
    if (out.rows)
      of.grad = {std::min(of.grad.begin, of.output.begin), std::max(of.grad.end, of.output.end)};
    of.input = {std::min(strip.row * g.stride_h, forward.source_height),
                std::min((strip.row + strip.rows) * g.stride_h, forward.source_height)};
    of.source = of.input;
    if (out.rows) {
      const Rows needed = source_rows(forward, out, Planes::of<T>(forward, out), 0);
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

template <class T, class S>
void run_layer_backward(const Image& grad, const Image& input, const Layer& layer,
                        const Image& inner, const Image& output, const LayerGradient& gradient,
                        const Threads& threads) {
  constexpr int n = lanes<T>;
  const Geometry& g = layer.geometry;
  const BackwardPacking<T> packing(layer);
  const Packing<T>& forward = packing.forward;
  const Channels<T>&channels = forward.grouped, &turned = packing.turned;
  const LayerSums& sums = packing.sums;
  const LayerPlans plans(g, input, grad);
  const bool for_last = gradient.pointwise_out.wanted(), for_grouped = gradient.grouped.wanted(),
             for_first = gradient.pointwise_in.wanted();
  const bool for_inner = for_first || gradient.input.data, for_middle = for_inner || for_grouped;
  const int64_t inner_vectors = forward.inner.size(), blocks = packing.middle.size(),
                slope_vectors = packing.slopes.size(), outputs = forward.outputs.size();

  Buffer<T> packed(packing.size);
  pack_backward<T, S>(layer, packing,
                      {!inner.data && (for_last || for_grouped), for_last, for_grouped, for_middle,
                       for_inner, gradient.input.data != nullptr},
                      packed.data(), threads);

  const int64_t slices = slice_count(layer, grad.height * grad.width, sums.size * sizeof(T));
  const int64_t row_bytes =
      sizeof(T) * (g.stride_h * input.width * (layer.in_channels + 2 * g.in_channels) +
                   grad.width * (2 * g.out_channels + layer.out_channels));
  const int64_t rows = std::clamp<int64_t>(
      std::min(strip_budget / row_bytes, ceil_div(strip_pixels, grad.width)), 1, plans.rows);
  const int64_t together =
      rows < plans.rows
          ? 1
          : std::max<int64_t>(
                1, std::min(strip_budget / row_bytes, strip_pixels / grad.width) / plans.rows);
  const std::vector<std::vector<Strip>> parts =
      thread_strips(g.images, plans.rows, rows, together, slices);

  int64_t inner_size = 0, middle_size = 0, output_pixels = 0, grad_pixels = 0, input_pixels = 0,
          source_pixels = 0;
  for (const std::vector<Strip>& part : parts)
    for (const Strip& strip : part) {
      const StripRows of = plans.rows_of<T>(g, strip);
      auto count = [&](const Rows& rows, int64_t width) {
        return (strip.images * (rows.end - rows.begin) * width | 1) * n;
      };
      inner_size = std::max(
          inner_size,
          inner_vectors * Planes::of<T>(plans.forward, plans.outputs(strip)).vector_stride);
      middle_size = std::max(middle_size, std::max<int64_t>(blocks, packing.sources.size()) *
                                              Planes::of<T>(plans.turned, strip).vector_stride);
      output_pixels = std::max(output_pixels, count(of.output, grad.width));
      grad_pixels = std::max(grad_pixels, count(of.grad, grad.width));
      input_pixels = std::max(input_pixels, count(of.input, input.width));
      source_pixels = std::max(source_pixels, count(of.source, input.width));
    }
  constexpr int64_t spare_size = 2 * max_pixels * n;
  Buffer<T> totals(slices * sums.size);

  auto march = [&](int64_t begin, int64_t end) {
    T* const inner_at =
        scratch<T>(inner_size + (packing.same ? 1 : 2) * middle_size + blocks * output_pixels +
                   (output.data ? 2 : 1) * outputs * grad_pixels + slope_vectors * input_pixels +
                   static_cast<int64_t>(forward.inputs.size()) * source_pixels + spare_size);
    T* const sources_at = inner_at + inner_size;
    T* const middle_grad_at = packing.same ? sources_at : sources_at + middle_size;
    T* const middle_at = middle_grad_at + middle_size;
    T* const grad_at = middle_at + blocks * output_pixels;
    T* const output_at = grad_at + outputs * grad_pixels;
    T* const slopes_at = output_at + (output.data ? outputs * grad_pixels : 0);
    T* const input_at = slopes_at + slope_vectors * input_pixels;
    T* const spare = input_at + static_cast<int64_t>(forward.inputs.size()) * source_pixels;
    std::vector<int64_t> places;
    std::vector<Segment> segments;
    for (int64_t slice = begin; slice < end; slice++) {
      T* const sum = totals.data() + slice * sums.size;
      std::fill_n(sum, sums.size, T(0));
      for (const Strip& strip : parts[slice]) {
        const StripRows of = plans.rows_of<T>(g, strip);
        const Strip out = plans.outputs(strip);
        const Planes inner_planes = Planes::of<T>(plans.forward, out),
                     middle_planes = Planes::of<T>(plans.turned, strip);
        const int64_t out_count = strip.images * out.rows * grad.width,
                      in_count = strip.images * (of.input.end - of.input.begin) * input.width;
        const int64_t out_stride = (out_count | 1) * n, in_stride = (in_count | 1) * n;

        const Pixels<T> source =
            copied_pixels<T, S>(input, strip.image, strip.images, of.source.begin,
                                of.source.end - of.source.begin, forward.inputs, input_at);
        const Pixels<T> slope =
            copied_pixels<T, S>(grad, strip.image, strip.images, of.grad.begin,
                                of.grad.end - of.grad.begin, forward.outputs, grad_at);
        if (output.data) {  // where relu cut the output off
          copied_pixels<T, S>(output, strip.image, strip.images, of.grad.begin,
                              of.grad.end - of.grad.begin, forward.outputs, output_at);
          for (int64_t k = 0; k < outputs * slope.vector_stride; k += n)
            store<T>(grad_at + k,
                     load<T>(output_at + k) <= Vector<T>{} ? Vector<T>{} : load<T>(grad_at + k));
        }
        const T* const own_slope = grad_at + (of.output.begin - of.grad.begin) * grad.width * n;

        if (gradient.bias)
          for (int64_t v = 0; v < outputs; v++)
            add_pixels(own_slope + v * slope.vector_stride, out_count, sum + sums.at_bias + v * n);
        const Runs runs = runs_of<T>(plans.forward, plans.forward.targets[0], inner_planes);
        if (out.rows && (for_last || for_grouped)) {
          if (inner.data) {
            load_sources<T, S>(inner, plans.forward, out, inner_planes, channels, {0, blocks},
                               inner_at);
          } else {
            place_pixels(plans.forward, out, inner_planes, 0, of.source, inner_vectors, inner_at,
                         places);
            multiply_to_planes(source, packed.data(), forward.inner_size, inner_vectors, places,
                               inner_at, inner_planes.vector_stride);
            zero_slack(plans.forward, out, inner_planes, inner_vectors, inner_at);
          }
        }
        if (out.rows && for_last) {
          const Tile<T> tile = tile_for<T>(channels.fetch, grad.width);
          const int64_t width = grad.width * n;
          segments_of<T>({nullptr, 0, 0, 0, out.rows * width, 1, width, n}, plans.forward,
                         plans.forward.targets[0], {0, strip.images, 0, out.rows}, tile.columns,
                         segments);
          for (int64_t b = 0; b < blocks; b++) {
            const Stencil<T> stencil{channels.sources, inner_planes.vector_stride, runs,
                                     g.taps() * n, channels.permutation_of(b)};
            correlate_tiles(
                stencil, packed.data() + forward.at_grouped + b * channels.packed, tile, segments,
                inner_at + channels.cluster(b) * channels.vectors * inner_planes.vector_stride +
                    channels.first_lane(b),
                middle_at + b * out_stride, n);
          }
          multiply_all_weights(own_slope, slope.vector_stride, outputs, middle_at, out_stride,
                               packing.middle, out_count, sum + sums.at_last, sums.of_last);
        }
        if (!for_middle) continue;

        place_pixels(plans.turned, strip, middle_planes, 0, of.grad, packing.sources.size(),
                     sources_at, places);
        multiply_to_planes(slope, packed.data() + packing.at_sources, packing.middle_size,
                           packing.sources.size(), places, sources_at, middle_planes.vector_stride);
        if (for_inner) {
          const int64_t width = input.width * n;
          for (const Target& target : plans.turned.targets) {
            const Runs turned_runs = runs_of<T>(plans.turned, target, middle_planes);
            const Tile<T> tile = tile_for<T>(turned.fetch, target.cols);
            segments_of<T>({nullptr, 0, 0, 0, (of.input.end - of.input.begin) * width, 1, width, n},
                           plans.turned, target, strip, tile.columns, segments);
            for (Segment& segment : segments) segment.to -= of.input.begin * width;
            for (int64_t b = 0; b < slope_vectors; b++) {
              const Stencil<T> stencil{turned.sources, middle_planes.vector_stride, turned_runs,
                                       g.taps() * n, turned.permutation_of(b)};
              correlate_tiles(
                  stencil, packed.data() + packing.at_turned + b * turned.packed, tile, segments,
                  sources_at + turned.cluster(b) * turned.vectors * middle_planes.vector_stride +
                      turned.first_lane(b),
                  slopes_at + b * in_stride, target.lattice.col_step * n);
            }
          }
          if (gradient.input.data)
            multiply_to_tensor<T, S>({slopes_at, n, in_stride, &packing.slopes},
                                     packed.data() + packing.at_inputs, packing.input_size,
                                     forward.inputs, nullptr, false, gradient.input, strip.image,
                                     of.input.begin * input.width, in_count, spare);
          if (for_first)
            multiply_all_weights(slopes_at, in_stride, slope_vectors,
                                 source.at + (of.input.begin - of.source.begin) * input.width * n,
                                 source.vector_stride, forward.inputs, in_count, sum,
                                 sums.of_first);
        }
        if (out.rows && for_grouped) {
          if (!packing.same) {
            place_pixels(plans.turned, strip, middle_planes, 0, of.grad, blocks, middle_grad_at,
                         places);
            multiply_to_planes(slope, packed.data() + packing.at_middle, packing.middle_size,
                               blocks, places, middle_grad_at, middle_planes.vector_stride);
          }
          const Stretches stretches = Stretches::of<T>(plans.forward, out);
          // The last stretch may reach into the row below the strip, which belongs to another.
          const int64_t end =
              plans.shift +
              ((strip.images - 1) * plans.forward.row_pitch + out.rows - 1) * plans.forward.pitch +
              plans.forward.cols;
          for (int64_t b = 0; b < blocks; b++) {
            T* const plane = middle_grad_at + b * middle_planes.vector_stride;
            zero_positions<T>(plane + end * n, slack);
            correlate_block<T>(
                channels, b, g.taps(), runs.all, stretches, plane + plans.shift * n,
                inner_at + channels.cluster(b) * channels.vectors * inner_planes.vector_stride +
                    channels.first_lane(b),
                inner_planes.vector_stride, sum + sums.at_grouped + b * sums.of_grouped);
          }
        }
      }
    }
  };
  run(threads, slices, march);

  // Slices are added in order, and written: dP by vectors of dp, dR by blocks, dQ by vectors of
  // outputs.
  const Direction first(forward.first, false), last(forward.last, false);
  std::vector<double> shares(max_terms * (slope_vectors + blocks + outputs));
  auto write = [&](int64_t begin, int64_t end) {
    T* const rows_at = scratch<T>(std::max({sums.of_first, channels.summed, sums.of_last}));
    for (int64_t i = begin; i < end; i++) {
      auto total = [&](int64_t at, int64_t size) {
        T* to = totals.data() + at;
        for (int64_t slice = 1; slice < slices; slice++)
          for (int64_t k = 0; k < size; k += n)
            store<T>(to + k, load<T>(to + k) + load<T>(to + slice * sums.size + k));
        return to;
      };
      double* const share = &shares[i * max_terms];
      if (i < slope_vectors) {
        if (for_first)
          write_gradients(layer.pointwise_in, gradient.pointwise_in, forward.first, first,
                          packing.slopes[i], total(i * sums.of_first, sums.of_first), rows_at,
                          gradient.pointwise_in.gates ? share : nullptr);
      } else if (i < slope_vectors + blocks) {
        const int64_t b = i - slope_vectors;
        if (for_grouped)
          write_gradients(layer.grouped, gradient.grouped, g, channels, channels.blocks[b],
                          total(sums.at_grouped + b * sums.of_grouped, sums.of_grouped), rows_at,
                          gradient.grouped.gates ? share : nullptr);
      } else {
        const int64_t v = i - slope_vectors - blocks;
        const LaneBlock& block = forward.outputs[v];
        if (for_last)
          write_gradients(layer.pointwise_out, gradient.pointwise_out, forward.last, last, block,
                          total(sums.at_last + v * sums.of_last, sums.of_last), rows_at,
                          gradient.pointwise_out.gates ? share : nullptr);
        if (gradient.bias)
          store_strided<T>(static_cast<T*>(gradient.bias) + block.output,
                           load<T>(total(sums.at_bias + v * n, n)), 1, block.outputs);
      }
    }
  };
  run(threads, slope_vectors + blocks + outputs, write);
  auto add_shares = [&](double* gates, int64_t from, int64_t to) {
    for (int i = 0; gates && i < layer.grouped.active; i++) {
      gates[i] = 0;
      for (int64_t k = from; k < to; k++) gates[i] += shares[k * max_terms + i];
    }
  };
  add_shares(gradient.pointwise_in.gates, 0, slope_vectors);
  add_shares(gradient.grouped.gates, slope_vectors, slope_vectors + blocks);
  add_shares(gradient.pointwise_out.gates, slope_vectors + blocks,
             slope_vectors + blocks + outputs);
}

}  // namespace gross::cpu::GROSS_ISA
