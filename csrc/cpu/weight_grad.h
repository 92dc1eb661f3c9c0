// The weight gradient from planes.
#pragma once

#include "correlate_weights.h"
#include "gradients.h"
#include "pairs.h"
#include "pointwise.h"

namespace gross::cpu::GROSS_ISA {

template <class T, class S, Product product = Product::numbers>
void weight_grad(const Image& grad, const Image& input, const Series& series,
                 const SeriesGradient& gradient, const Geometry& g, const Threads& threads) {
  const Plan plan = forward_plan(g, input.height, input.width, grad.height, grad.width);
  Plan grad_plan = plan;  // the same grid, holding the gradient itself
  grad_plan.sources = {{0, 1, 0, 1}};
  grad_plan.source_height = grad.height;
  grad_plan.source_width = grad.width;
  grad_plan.min_row = grad_plan.max_row = grad_plan.min_col = grad_plan.max_col = 0;

  constexpr bool pairs = product == Product::pairs;
  const Channels<T> channels(g, false), read(g, false, product);
  const std::vector<LaneBlock> sources = vectors_of<T>(channels.sources, channels.sources);
  const int64_t count = channels.blocks.size(), packed = channels.packed;
  const std::vector<Set> sets = sets_of(channels, set_vectors, 1);
  const int64_t set_count = sets.size(), vectors = source_vectors(read, sets),
                blocks = largest(sets);
  const std::vector<Strip> strips = plan_strips(
      plan, g.images, (vectors + blocks) * GROSS_VECTOR_BYTES, ceil_div(grad_tasks, set_count));
  const int64_t strip_count = strips.size(),
                slices = std::clamp<int64_t>(ceil_div(grad_tasks, set_count), 1, strip_count);
  const PairRows pair_rows(plan.cols);
  int64_t plane_size = 0, grad_size = 0;
  for (const Strip& strip : strips) {
    // In pairs the planes are needed once more, as rows of channels and of pairs.
    plane_size = std::max(
        plane_size,
        (pairs ? 2 : 1) * vectors *
            (Planes::of<T>(plan, strip).vector_stride +
             (pairs ? lanes<T> * lanes<T> * static_cast<int64_t>(plan.sources.size()) : 0)));
    grad_size = std::max(
        grad_size, blocks * (Planes::of<T>(grad_plan, strip).vector_stride +
                             (pairs ? strip.images * strip.rows * pair_rows.row_size<T>() : 0)));
  }
  Buffer<T> partial(slices > 1 ? slices * count * packed : 0);

  // D of the blocks of a set over the strips of one slice.
  auto accumulate = [&](const Set& set, int64_t slice, T* planes_at, T* grads_at, T* to) {
    const LaneBlock &front = channels.blocks[set.first], &back = channels.blocks[set.last - 1];
    const int64_t first_output = front.first(channels),
                  outputs = back.first(channels) + back.lanes() - first_output;
    std::fill_n(to, (set.last - set.first) * packed, T(0));
    for (int64_t i = strip_count * slice / slices; i < strip_count * (slice + 1) / slices; i++) {
      const Strip& strip = strips[i];
      const Planes planes = Planes::of<T>(plan, strip), grads = Planes::of<T>(grad_plan, strip);
      if constexpr (pairs)
        load_sources<T, T>(in_pairs(input), plan, strip, planes, read, set, planes_at);
      else
        load_sources<T, S>(input, plan, strip, planes, channels, set, planes_at);
      if (outputs == (set.last - set.first) * lanes<T>) {
        load_planes<T, S>(grad, grad_plan, strip, grads, first_output, outputs, grads_at);
      } else {
        for (int64_t b = set.first; b < set.last; b++)
          load_planes<T, S>(grad, grad_plan, strip, grads, channels.blocks[b].first(channels),
                            channels.blocks[b].lanes(),
                            grads_at + (b - set.first) * grads.vector_stride);
      }
      const Runs runs = runs_of<T>(plan, plan.targets[0], planes);
      if constexpr (pairs) {
        const int64_t set_planes = read.clusters(set.first, set.last) * read.vectors,
                      stride = round_up(planes.source_stride / lanes<T>, lanes<T>);
        const int64_t sources_count = plan.sources.size();
        auto* const channel_rows =
            reinterpret_cast<uint16_t*>(planes_at + set_planes * planes.vector_stride);
        // A channel's row: its phases one after the other, like the planes'.
        for (int64_t v = 0; v < set_planes; v++)
          for (int64_t source = 0; source < sources_count; source++)
            separate_channels(planes_at + v * planes.vector_stride + source * planes.source_stride,
                              planes.positions,
                              channel_rows + (2 * lanes<T> * v * sources_count + source) * stride,
                              sources_count * stride);
        T* const pair_rows_at = grads_at + (set.last - set.first) * grads.vector_stride;
        std::vector<int64_t> starts;
        for (int64_t i = 0; i < strip.images; i++)
          for (int64_t r = 0; r < strip.rows; r++)
            for (int64_t k = 0; k < pair_rows.stretches; k++)
              starts.push_back((i * plan.row_pitch + r) * plan.pitch + 2 * k * pair_rows.pairs);
        Planes row_planes = planes;
        row_planes.source_stride = stride * lanes<T>;
        const Runs row_runs = runs_of<T>(plan, plan.targets[0], row_planes);
        for (int64_t b = set.first; b < set.last; b++) {
          pair_columns(grads_at + (b - set.first) * grads.vector_stride, plan, strip, pair_rows,
                       pair_rows_at);
          const int64_t channel =
              2 * ((read.cluster(b) - read.cluster(set.first)) * read.vectors * lanes<T> +
                   read.first_lane(b));
          correlate_pairs_block(channels.sources, g.taps(), row_runs.all, pair_rows, starts,
                                pair_rows_at, channel_rows + channel * sources_count * stride,
                                sources_count * stride, to + (b - set.first) * packed);
        }
        continue;
      }
      const Stretches stretches = Stretches::of<T>(plan, strip);
      const bool pointwise = is_pointwise(g);
      for (int64_t b = set.first, together; b < set.last; b += together) {
        const T* from = planes_at +
                        (channels.cluster(b) - channels.cluster(set.first)) * channels.vectors *
                            planes.vector_stride +
                        channels.first_lane(b);
        const T* grads_of = grads_at + (b - set.first) * grads.vector_stride;
        T* sums = to + (b - set.first) * packed;
        together = pointwise ? set.last - b : 1;
        if (pointwise)  // without padding rows lie side by side
          multiply_all_weights(grads_of, grads.vector_stride, together, from, planes.vector_stride,
                               sources, strip.images * strip.rows * plan.cols, sums, packed);
        else
          correlate_block<T>(channels, b, g.taps(), runs.all, stretches, grads_of, from,
                             planes.vector_stride, sums);
      }
    }
  };
  GradientBlocks<T> output(channels, series, gradient, g);
  auto work = [&](int64_t begin, int64_t end) {
    T* const planes_at = scratch<T>(plane_size + grad_size + blocks * packed + channels.summed);
    T* const grads_at = planes_at + plane_size;
    T* const sums = grads_at + grad_size;
    T* const rows = sums + blocks * packed;
    for (int64_t unit = begin; unit < end; unit++) {
      const Set& set = sets[unit / slices];
      const int64_t slice = unit % slices;
      if (slices > 1) {
        accumulate(set, slice, planes_at, grads_at,
                   partial.data() + (slice * count + set.first) * packed);
        continue;
      }
      accumulate(set, 0, planes_at, grads_at, sums);
      for (int64_t b = set.first; b < set.last; b++)
        output.write(b, sums + (b - set.first) * packed, rows);
    }
  };
  run(threads, set_count * slices, work);
  if (slices > 1) output.write_slices(partial.data(), slices, threads);
  output.write_gates();
}

}  // namespace gross::cpu::GROSS_ISA
