// The convolution and its input gradient from planes.
#pragma once

#include "correlate.h"
#include "pairs.h"
#include "weights.h"

namespace gross::cpu::GROSS_ISA {

template <class T, class S, Product product = Product::numbers>
void convolve(const Plan& plan, const Image& source, const Series& series,
              const Image& target_image, const Geometry& g, bool backward, const Threads& threads) {
  constexpr bool pairs = product == Product::pairs;
  const Direction direction(g, backward);
  const Channels<T> channels(g, backward, product);
  // Units of work: a set of channels times a strip. More sets than the budgets ask for where strips
  // are few.
  std::vector<Set> sets = sets_of(channels, set_vectors, 1);
  const std::vector<Strip> strips =
      plan_strips(plan, g.images, source_vectors(channels, sets) * GROSS_VECTOR_BYTES,
                  ceil_div(4 * threads.count, sets.size()));
  const int64_t strip_count = strips.size();
  sets = sets_of(channels, set_vectors,
                 std::max<int64_t>(sets.size(), ceil_div(4 * threads.count, strip_count)));
  const int64_t vectors = source_vectors(channels, sets),
                weight_size = largest(sets) * channels.packed;
  int64_t plane_size = 0;
  for (const Strip& strip : strips)
    plane_size = std::max(plane_size, vectors * Planes::of<T>(plan, strip).vector_stride);
  constexpr int64_t spare_size = max_segments * max_columns * lanes<T>;
  const bool alike = source.stride_c == 1 && source.stride_w == target_image.stride_w &&
                     source.stride_h == target_image.stride_h &&
                     source.stride_n == target_image.stride_n;

  auto work = [&](int64_t begin, int64_t end) {
    T* const planes_at =
        scratch<T>(plane_size + spare_size + weight_size +
                   (pairs ? 2 * (channels.summed + channels.packed) : channels.summed));
    T* const spare = planes_at + plane_size;
    T* const weights = spare + spare_size;
    T* const sum = weights + weight_size;
    std::vector<Segment> segments;
    int64_t assembled = -1;
    for (int64_t unit = begin; unit < end; unit++) {
      const Set& set = sets[unit / strip_count];
      const Strip& strip = strips[unit % strip_count];
      if (assembled != unit / strip_count)
        for (int64_t b = set.first; b < set.last; b++) {
          T* const to = weights + (b - set.first) * channels.packed;
          if constexpr (pairs)
            pack_pairs(series, g, direction, channels.blocks[b], sum, sum + 2 * channels.summed,
                       to);
          else
            pack_weights<T, S>(series, g, direction, channels.blocks[b], sum, to);
        }
      assembled = unit / strip_count;
      const Planes planes = Planes::of<T>(plan, strip);
      if constexpr (pairs)
        load_sources<T, T>(in_pairs(source), plan, strip, planes, channels, set, planes_at);
      else
        load_sources<T, S>(source, plan, strip, planes, channels, set, planes_at);
      for (const Target& target : plan.targets) {
        const Runs runs = runs_of<T>(plan, target, planes);
        const Tile<T> tile = tile_for<T, product>(channels.fetch, target.cols);
        segments_of<T>(target_image, plan, target, strip, tile.columns, segments);
        for (int64_t b = set.first; b < set.last; b++) {
          const Stencil<T> stencil{channels.sources, planes.vector_stride, runs,
                                   g.taps() * lanes<T>, channels.permutation_of(b)};
          const T* from = planes_at +
                          (channels.cluster(b) - channels.cluster(set.first)) * channels.vectors *
                              planes.vector_stride +
                          channels.first_lane(b);
          const T* weight = weights + (b - set.first) * channels.packed;
          const LaneBlock& block = channels.blocks[b];
          S* const to = static_cast<S*>(target_image.data) + strip.image * target_image.stride_n +
                        block.first(channels) * target_image.stride_c;
          const int64_t col_stride = target.lattice.col_step * target_image.stride_w;
          if constexpr (std::is_same_v<S, T>)
            if (target_image.stride_c == 1 && block.lanes() == lanes<T>) {
              // The source's pixels one strip further, where they lie as the target's do.
              const T* ahead = alike ? static_cast<const T*>(source.data) +
                                           (to - static_cast<T*>(target_image.data)) +
                                           (strip.images > 1 ? strip.images * source.stride_n
                                                             : (strip.rows + 1) * source.stride_h)
                                     : nullptr;
              correlate_tiles(stencil, weight, tile, segments, from, to, col_stride, ahead);
              continue;
            }
          correlate_converted<T, S>(stencil, weight, tile, segments, from, to, col_stride,
                                    target_image.stride_c, block.lanes(), spare);
        }
      }
    }
  };
  run(threads, sets.size() * strip_count, work);
}

}  // namespace gross::cpu::GROSS_ISA
