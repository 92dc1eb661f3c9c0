// A layer of 8 bits: how its weights are packed, and R and p as whole numbers of 16 bits.
//
// P's sums of integers are divided by a power of two, each channel by its own, so that 16 bits hold
// the largest that any input gives. R becomes whole numbers of 16 bits, times as much for each
// output as lets 32 bits hold the largest sum that any such p gives: nothing saturates, and all of
// it is exact. A lane holds two source channels, whose products are added at once: half the
// multiply–adds of float32.
#pragma once

#include "bytes.h"
#include "correlate.h"
#include "weights.h"

namespace gross::cpu::GROSS_ISA {

template <Dot dot>
constexpr Product words_product =
    dot == Dot::instruction ? Product::words_by_instruction : Product::words;

// P and Q by vectors of outputs, R by the grouped convolution's blocks, in 32-bit numbers; what
// divides P's sums, steps of r for each of R's.
struct ByteLayerPacking {
  Channels<int32_t> grouped;
  Geometry first, last;
  std::vector<LaneBlock> inner, outputs;
  ByteRows first_rows, last_rows;
  int64_t together;    // source channels of R that a lane holds
  int64_t block_size;  // numbers of a block of R
  int64_t at_starts, at_shifts, at_grouped, at_steps, at_last, at_last_starts, at_scales, at_bias,
      at_slopes, at_fits, size;

  explicit ByteLayerPacking(const Layer& layer)
      : grouped(layer.geometry, Pass::forward),
        first(pointwise_geometry(layer.in_channels, layer.geometry.in_channels)),
        last(pointwise_geometry(layer.geometry.out_channels, layer.out_channels)),
        inner(vectors_of<float>(layer.geometry.in_channels, grouped.together * grouped.sources)),
        outputs(vectors_of<float>(layer.out_channels, layer.out_channels)),
        first_rows(first),
        last_rows(last),
        together(layer.geometry.group_size % 2 ? 1 : 2),
        block_size(grouped.packed / together) {
    const int64_t vectors = outputs.size(), numbers = vectors * lanes<float>,
                  blocks = grouped.blocks.size(), inner_numbers = inner.size() * lanes<float>;
    at_starts = inner.size() * first_rows.packed();
    at_shifts = at_starts + inner_numbers;
    at_grouped = at_shifts + inner_numbers;
    at_steps = at_grouped + blocks * block_size;
    at_last = at_steps + blocks * lanes<float>;
    at_last_starts = at_last + vectors * last_rows.packed();
    at_scales = at_last_starts + numbers;
    at_bias = at_scales + numbers;
    at_slopes = at_bias + numbers;
    at_fits = at_slopes + numbers;
    size = at_fits + inner.size() + vectors;
  }

  ByteWeights first_weights(const int32_t* packed, int64_t vector, int64_t vectors) const {
    return ByteWeights{packed, packed + at_starts, first_rows.packed(), vector + vectors}.from(
        vector);
  }
  ByteWeights last_weights(const int32_t* packed, int64_t vector, int64_t vectors) const {
    return ByteWeights{packed + at_last, packed + at_last_starts, last_rows.packed(),
                       vector + vectors}
        .from(vector);
  }
  const int32_t* block_weights(const int32_t* packed, int64_t block) const {
    return packed + at_grouped + block * block_size;
  }
  // Of the packed numbers those that are float32, of vector `vector` on.
  static const float* numbers(const int32_t* packed, int64_t at, int64_t vector = 0) {
    return reinterpret_cast<const float*>(packed) + at + vector * lanes<float>;
  }
  bool fits(const int32_t* packed) const {
    return std::all_of(packed + at_fits, packed + size, [](int32_t fits) { return fits != 0; });
  }
};

// r in the cache: whole numbers of −127 … 127 as bytes above this.
constexpr int32_t byte_zero = 128;

// R as whole numbers, and what p's sums are divided by.
struct LayerWords {
  std::vector<int32_t> shifts;  // of each input of R: the exponent
  std::vector<float> middle;    // R, whole
  std::vector<float> steps;     // of each output of R

  explicit LayerWords(const Layer& layer)
      : shifts(layer.geometry.in_channels),
        middle(layer.geometry.out_channels * terms_of(layer)),
        steps(layer.geometry.out_channels) {
    const Geometry& g = layer.geometry;
    const int64_t terms = terms_of(layer), taps = g.taps();
    // Where sums have many terms, p and R share what is left of 32 bits.
    const int64_t largest = std::min<int64_t>(
        32767, static_cast<int64_t>((1 << 19) / std::sqrt(static_cast<double>(terms))));
    std::vector<double> bounds(g.in_channels);
    for (int64_t c = 0; c < g.in_channels; c++) {
      const int64_t reach = reach_of(layer, c);
      int32_t& n = shifts[c];
      while ((reach + rounding(n)) >> n > largest) n++;
      bounds[c] = static_cast<double>((reach + rounding(n)) >> n);
    }
    const float* const from = static_cast<const float*>(layer.grouped.terms[0]);
    std::vector<double> row(terms);
    for (int64_t o = 0; o < g.out_channels; o++) {
      double most = 0, sum = 0, rounded = 0;
      for (int64_t i = 0; i < terms; i++) {
        const int64_t input = o / g.outputs_per_group() * g.group_size + i / taps;
        const double unit = static_cast<double>(layer.source.scale) * layer.scales[0][input] *
                            std::exp2(shifts[input]) / layer.scales[1][o];
        // Of a channel whose steps are 0 every r is.
        row[i] = layer.scales[1][o] > 0 ? from[o * terms + i] * unit : 0;
        most = std::max(most, std::abs(row[i]));
        sum += std::abs(row[i]) * bounds[input];
        rounded += 0.5 * bounds[input];
      }
      // Rounding may add a half to each number.
      constexpr double largest_sum = 2147483647.0;
      const double times = sum > 0 ? std::min(32767 / most, (largest_sum - rounded) / sum) : 1;
      for (int64_t i = 0; i < terms; i++)
        middle[o * terms + i] = static_cast<float>(std::nearbyint(row[i] * times));
      steps[o] = static_cast<float>(1 / times);
    }
  }

  // What rounds to the nearest where 2ⁿ divides.
  static int64_t rounding(int32_t n) { return n ? int64_t{1} << (n - 1) : 0; }

 private:
  static int64_t terms_of(const Layer& layer) {
    return layer.geometry.group_size * layer.geometry.taps();
  }
  // The largest |sum| of P's output c.
  static int64_t reach_of(const Layer& layer, int64_t c) {
    const int8_t* const weights =
        static_cast<const int8_t*>(layer.pointwise_in.terms[0]) + c * layer.in_channels;
    int64_t above = 0, below = 0;
    for (int64_t j = 0; j < layer.in_channels; j++)
      (weights[j] > 0 ? above : below) += std::abs(int64_t{weights[j]});
    const int64_t zero = layer.source.zero;
    return std::max(above * (255 - zero) + below * zero, above * zero + below * (255 - zero));
  }
};

// correlate() of groups of 2 or 4 channels in whole numbers, of which two lanes or all four read a
// pair: with the runs outside and the pairs by name a shuffle needs no index, and the loop a third
// of the time less.
template <int Quad, int J, int... L>
constexpr Vector<int32_t> lane_of_quad(std::integer_sequence<int, L...>) {
  return Vector<int32_t>{(L / Quad * Quad + J)...};
}
template <Product product, int Quad, int Columns, int Segments>
__attribute__((noinline)) void correlate_quads(const Stencil<int32_t>& stencil,
                                               const int32_t* const* from, int32_t* const* to,
                                               int64_t col_stride) {
  using T = int32_t;
  constexpr auto all = std::make_integer_sequence<int, lanes<T>>{};
  Vector<T> sum[Segments][Columns]{};
  const auto add = [&](const Run& run, auto length) __attribute__((always_inline)) {
    constexpr int n = decltype(length)::value;
    add_run<T, Fetch::permuted, product, Columns, Segments, n>(
        from, run.offset, stencil.weights, run, lane_of_quad<Quad, 0>(all), sum);
    if constexpr (Quad == 4)
      add_run<T, Fetch::permuted, product, Columns, Segments, n>(
          from, run.offset, stencil.weights + stencil.weight_stride, run,
          lane_of_quad<Quad, 2>(all), sum);
  };
  const Run* run = stencil.runs.all.data();
  for (const Run* end = run + stencil.runs.longest; run != end; run++)
    add(*run, std::integral_constant<int, 3>{});
  for (const Run* end = run + stencil.runs.middle; run != end; run++)
    add(*run, std::integral_constant<int, 2>{});
  for (const Run* end = stencil.runs.all.data() + stencil.runs.all.size(); run != end; run++)
    add(*run, std::integral_constant<int, 1>{});
#pragma GCC unroll 8
  for (int segment = 0; segment < Segments; segment++)
#pragma GCC unroll 16
    for (int k = 0; k < Columns; k++) store<T>(to[segment] + k * col_stride, sum[segment][k]);
}
template <Product product>
Tile<int32_t> word_tile_for(const Channels<int32_t>& channels, int64_t width) {
  const auto quads = [&](auto quad) {
    return narrowest_tile<Tile<int32_t>>(
        width, std::integer_sequence<int, 16, 14, 8, 7, 4, 2, 1>{}, [](auto columns) {
          constexpr int c = columns, segments = std::min(max_segments, max_sums / c);
          return Tile<int32_t>{c, segments,
                               correlate_quads<product, decltype(quad)::value, c, segments>};
        });
  };
  if (channels.fetch == Fetch::within_quads && channels.sources == 4)
    return quads(std::integral_constant<int, 4>{});
  if (channels.fetch == Fetch::within_quads && channels.sources == 2)
    return quads(std::integral_constant<int, 2>{});
  return tile_for<int32_t, product>(channels.fetch, width);
}

// The weights of a block of R, [source channel or pair of them][tap][lane]; `sum` and `separate`
// hold them as numbers, one by one, meanwhile.
inline void pack_words(const SummedWeights& of, const LaneBlock& block, float* sum, float* separate,
                       int64_t together, int32_t* to) {
  pack_weights<float, float>(of, block, sum, separate);
  const int64_t size = of.geometry.taps() * lanes<float>;
  for (int64_t j = 0; j < of.direction.sources; j += together)
    for (int64_t k = 0; k < size; k += lanes<float>, to += lanes<float>) {
      const auto words = [&](int64_t source) __attribute__((always_inline)) {
        return __builtin_convertvector(load<float>(separate + source * size + k), Vector<int32_t>);
      };
      Vector<int32_t> both = words(j) & 0xffff;
      if (together == 2) both |= words(j + 1) << 16;
      store<int32_t>(to, both);
    }
}

inline void pack_byte_layer(const Layer& layer, int32_t* to, const Threads& threads) {
  const ByteLayerPacking packing(layer);
  const Geometry& g = layer.geometry;
  const ByteKernel first(layer.pointwise_in, packing.first, layer.source.zero),
      last(layer.pointwise_out, packing.last, byte_zero);
  const LayerWords words(layer);
  Series whole = layer.grouped;
  whole.terms[0] = words.middle.data();
  const int64_t inner = packing.inner.size(), blocks = packing.grouped.blocks.size(),
                outputs = packing.outputs.size();
  float* const numbers = reinterpret_cast<float*>(to);
  auto work = [&](int64_t begin, int64_t end) {
    float* const sum = scratch<float>(packing.grouped.summed + packing.grouped.packed);
    for (int64_t i = begin; i < end; i++) {
      if (i < inner) {
        int32_t *const starts = to + packing.at_starts + i * lanes<float>, *const shifts =
                                                                               to +
                                                                               packing.at_shifts +
                                                                               i * lanes<float>;
        const LaneBlock& block = packing.inner[i];
        to[packing.at_fits + i] =
            pack_bytes(first, block, to + i * packing.first_rows.packed(), starts);
        for (int64_t lane = 0; lane < lanes<float>; lane++) {
          const int32_t n = lane < block.lanes() ? words.shifts[block.output + lane] : 0;
          shifts[lane] = n;
          starts[lane] += static_cast<int32_t>(LayerWords::rounding(n));
        }
      } else if (i < inner + blocks) {
        const int64_t b = i - inner;
        const LaneBlock& block = packing.grouped.blocks[b];
        pack_words({whole, g, packing.grouped}, block, sum, sum + packing.grouped.summed,
                   packing.together, to + packing.at_grouped + b * packing.block_size);
        store_outputs<float>(words.steps.data(), block.first(packing.grouped), block.lanes(),
                             numbers + packing.at_steps + b * lanes<float>);
      } else {
        const int64_t v = i - inner - blocks;
        const LaneBlock& block = packing.outputs[v];
        to[packing.at_fits + inner + v] =
            pack_bytes(last, block, to + packing.at_last + v * packing.last_rows.packed(),
                       to + packing.at_last_starts + v * lanes<float>);
        const auto store_numbers = [&](const void* given, int64_t where) {
          store_outputs<float>(given, block.output, block.lanes(),
                               numbers + where + v * lanes<float>);
        };
        store_numbers(layer.scales[2], packing.at_scales);
        store_numbers(layer.bias, packing.at_bias);
        store_numbers(layer.slopes, packing.at_slopes);
      }
    }
  };
  run(threads, inner + blocks + outputs, work);
}

}  // namespace gross::cpu::GROSS_ISA
