// Convolutions from weights that were packed beforehand, with all that follows them.
#pragma once

#include "convolve.h"
#include "in_place.h"
#include "pointwise.h"

namespace gross::cpu::GROSS_ISA {

// How a convolution's weights are packed: block after block of channels, the bias, PReLU's slopes.
template <class T>
struct KernelPacking {
  Channels<T> channels;
  int64_t at_bias, at_slopes, size;

  explicit KernelPacking(const Geometry& g) : channels(g, Pass::forward) {
    const int64_t blocks = channels.blocks.size();
    at_bias = blocks * channels.packed;
    at_slopes = at_bias + blocks * lanes<T>;
    size = at_slopes + blocks * lanes<T>;
  }
};

template <class T, class S>
void pack_kernel(const Kernel& kernel, T* to, const Threads& threads) {
  const KernelPacking<T> packing(kernel.geometry);
  const Channels<T>& channels = packing.channels;
  pack_blocks<T, S>({kernel.series, kernel.geometry, channels}, channels.blocks, channels.packed,
                    channels.summed, to, threads);
  for (size_t b = 0; b < channels.blocks.size(); b++) {
    const LaneBlock& block = channels.blocks[b];
    const int64_t first = block.first(channels);
    store_outputs(kernel.bias, first, block.lanes(), to + packing.at_bias + b * lanes<T>);
    store_outputs(kernel.slopes, first, block.lanes(), to + packing.at_slopes + b * lanes<T>);
  }
}

template <class T, class S>
void convolve_prepared(const PackedConvolution& of) {
  const Geometry& g = of.geometry;
  const Image &source = of.source, &target = of.target;
  const Series none{};
  const Convolution call{source, none, target, g, Pass::forward, of.threads};
  const KernelPacking<T> packing(g);
  const T* const packed = static_cast<const T*>(of.packed);
  const auto& [activation, residual, residual_last, forms] = of.finish;
  const Prepared<T> prepared{
      packed,
      {packed + packing.at_bias, packed + packing.at_slopes, activation, residual_last, residual}};
  if (reads_pixels(g)) return convolve_pointwise<T, S>(call, &prepared);
  const Plan plan = forward_plan(g, source.height, source.width, target.height, target.width);
  if (std::is_same_v<S, T> && (!residual || lie_alike(*residual, target))) {
    const std::vector<RowTarget> rows = row_targets<T, S>(plan, source, target, packing.channels);
    if (is_faster_in_place(rows, packing.channels))
      return convolve_in_place<T, S>(rows, packing.channels, call, &prepared);
  }
  convolve<T, S>(plan, call, &prepared);
}

}  // namespace gross::cpu::GROSS_ISA
