// bfloat16 numbers in pairs, as processors with AVX512_BF16 multiply them: a 32-bit lane is two
// source channels of a group, or in the weight gradient two neighbouring columns of one channel.
#pragma once

#include "correlate.h"
#include "memory.h"
#include "parts.h"
#include "weights.h"

namespace gross::cpu::GROSS_ISA {

// Whether two channels of a bfloat16 tensor can be read as one lane: neighbours in memory, in every
// group.
inline bool has_pairs(const Image& image, const Direction& d) {
  return image.stride_c == 1 && (image.stride_n | image.stride_h | image.stride_w) % 2 == 0 &&
         d.sources % 2 == 0;
}
inline Image in_pairs(const Image& image) {
  return {image.data, image.channels / 2, image.height,      image.width, image.stride_n / 2,
          1,          image.stride_h / 2, image.stride_w / 2};
}

// The weights of one vector of outputs in pairs of source channels, [pair][tap][lane]; `separate`
// holds them one by one meanwhile.
template <class T>
void pack_pairs(const SummedWeights& of, const LaneBlock& block, T* sum, T* separate, T* to) {
  pack_weights<T, bfloat16>(of, block, sum, separate);
  const int64_t size = of.geometry.taps() * lanes<T>;
  for (int64_t pair = 0; pair < of.direction.sources / 2; pair++)
    for (int64_t k = 0; k < size; k += lanes<T>) {
      const Words low = __builtin_bit_cast(Words, load<T>(separate + 2 * pair * size + k)),
                  high = __builtin_bit_cast(Words, load<T>(separate + (2 * pair + 1) * size + k));
      store<T>(to + pair * size + k, __builtin_bit_cast(Vector<T>, (low >> 16) | high));
    }
}

// The weight gradient in pairs of pixels: a multiply–add of bfloat16 numbers takes two, so a lane
// holds an output channel's gradient at two neighbouring columns, and a source channel's row is
// read two columns at a time, from any column on.

// Rows of gradients as pairs of columns, each row filled with zeros to whole stretches: [block][row
// of any image][pair][lane].
struct PairRows {
  int64_t pairs;      // of a stretch
  int64_t stretches;  // of a row

  explicit PairRows(int64_t columns) : pairs(0), stretches(0) {
    const int64_t count = ceil_div(columns, 2);
    for (const int64_t size : {7, 4, 2})
      if (!pairs || round_up(count, size) < pairs * stretches)
        pairs = size, stretches = ceil_div(count, size);
  }
  template <class T>
  int64_t row_size() const {
    return pairs * stretches * lanes<T>;
  }
};

// Planes of gradients, numbers of bfloat16 precision in float32, as pairs.
template <class T>
void pair_columns(const T* planes, const Plan& plan, const Strip& strip, const PairRows& rows,
                  T* to) {
  for (int64_t i = 0; i < strip.images; i++)
    for (int64_t r = 0; r < strip.rows; r++) {
      const T* row = planes + (i * plan.row_pitch + r) * plan.pitch * lanes<T>;
      for (int64_t k = 0; k < rows.pairs * rows.stretches; k++, to += lanes<T>) {
        auto column = [&](int64_t at) {
          return at < plan.cols ? __builtin_bit_cast(Words, load<T>(row + at * lanes<T>)) : Words{};
        };
        store<T>(to, __builtin_bit_cast(Vector<T>, (column(2 * k) >> 16) | column(2 * k + 1)));
      }
    }
}

// A plane of pairs of channels, [position][pair], as a row for each channel: [channel][position],
// channels `stride` apart.
template <class T>
void separate_channels(const T* plane, int64_t positions, uint16_t* to, int64_t stride) {
  constexpr int n = lanes<T>;
  for (int64_t p = 0; p < positions; p += n) {
    Vector<T> square[n];
#pragma GCC unroll 64
    for (int i = 0; i < n; i++)
      square[i] = p + i < positions ? load<T>(plane + (p + i) * n) : Vector<T>{};
    transpose<T>(square);
    for (int i = 0; i < n; i++) {
      const Words words = __builtin_bit_cast(Words, square[i]);
      const Halves low = __builtin_convertvector(words & 0xffffu, Halves),
                   high = __builtin_convertvector(words >> 16, Halves);
      __builtin_memcpy(to + 2 * i * stride + p, &low, sizeof low);
      __builtin_memcpy(to + (2 * i + 1) * stride + p, &high, sizeof high);
    }
  }
}

// What some source channels' share of D is computed from, and where it goes.
template <class T>
struct PairStencil {
  const T* grads;        // in pairs
  const uint16_t* rows;  // of the first source channel
  int64_t row_stride;    // from one source channel to the next
  T* sums;
  int64_t sum_stride;  // likewise
};

// Two columns of one channel for every lane.
template <class T>
GROSS_INLINE Vector<T> two_columns(const uint16_t* at) {
  T two;
  __builtin_memcpy(&two, at, sizeof two);
  Vector<T> value = broadcast<T>(two);
  keep_in_register(value);
  return value;
}

// D[source][tap][lane] += Σ_pair grads[pair][lane] · (two columns of from[source] at the pair and
// the tap), for a run of `Length` taps.
template <class T, int Sources, int Length, int Pairs>
__attribute__((noinline)) void correlate_pairs(const PairStencil<T>& stencil, const Run& run,
                                               const int64_t* starts, int64_t count) {
  auto [grads, from, from_stride, to, to_stride] = stencil;
  from += run.offset / lanes<T>;
  Vector<T> sum[Sources][Length]{};
  for (int64_t i = 0; i < count; i++, grads += Pairs * lanes<T>) {
    const uint16_t* at = from + starts[i];
    Vector<T> even[Sources];
#pragma GCC unroll 4
    for (int j = 0; j < Sources; j++) even[j] = two_columns<T>(at + j * from_stride);
#pragma GCC unroll 8
    for (int k = 0; k < Pairs; k++) {
      Vector<T> grad = load<T>(grads + k * lanes<T>);
      keep_in_register(grad);
#pragma GCC unroll 4
      for (int j = 0; j < Sources; j++) {
        const uint16_t* two = at + j * from_stride + 2 * k;
        multiply_add<Product::pairs, T>(sum[j][0], even[j], grad);
        if constexpr (Length > 1)
          multiply_add<Product::pairs, T>(sum[j][1], two_columns<T>(two + 1), grad);
        if (k + 1 < Pairs || Length > 2) even[j] = two_columns<T>(two + 2);
        if constexpr (Length > 2) multiply_add<Product::pairs, T>(sum[j][2], even[j], grad);
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < Sources; j++)
#pragma GCC unroll 4
    for (int c = 0; c < Length; c++) {
      T* at = to + j * to_stride + run.weight[c];
      store<T>(at, load<T>(at) + sum[j][c]);
    }
}

// D of one vector of outputs, all sources and runs of taps, from rows of which each stretch starts
// at one of `starts`.
template <class T>
void correlate_pairs_block(int64_t sources, const std::vector<Run>& runs, int64_t stretch_pairs,
                           const std::vector<int64_t>& starts, const PairStencil<T>& of) {
  const int64_t count = starts.size(),
                most = std::max<int64_t>(1, run_budget / (2 * GROSS_VECTOR_BYTES) / stretch_pairs);
  for (int64_t i = 0; i < count; i += most)
    even_parts(sources, 4, [&](int64_t first, int64_t size) {
      PairStencil<T> part = of;
      part.grads += i * stretch_pairs * lanes<T>;
      part.rows += first * of.row_stride;
      part.sums += first * of.sum_stride;
      for (const Run& run : runs)
        with_constant<4>(size, [&](auto together) {
          with_constant<max_run>(run.length, [&](auto length) {
            const auto correlate = stretch_pairs == 7   ? correlate_pairs<T, together, length, 7>
                                   : stretch_pairs == 4 ? correlate_pairs<T, together, length, 4>
                                                        : correlate_pairs<T, together, length, 2>;
            correlate(part, run, starts.data() + i, std::min(most, count - i));
          });
        });
    });
}

// The weight gradient's pairs of one strip: rows of source channels, and where stretches of
// gradients start in them.
template <class T>
class PairedStrip {
 public:
  PairedStrip(const Planes& planes)
      : planes_(planes),
        rows_(planes.plan->cols),
        sources_(planes.plan->sources.size()),
        stride_(round_up(planes.source_stride / lanes<T>, lanes<T>)) {
    const Plan& plan = *planes.plan;
    const Strip& strip = planes.strip;
    for (int64_t i = 0; i < strip.images; i++)
      for (int64_t r = 0; r < strip.rows; r++)
        for (int64_t k = 0; k < rows_.stretches; k++)
          starts_.push_back((i * plan.row_pitch + r) * plan.pitch + 2 * k * rows_.pairs);
    Planes row_planes = planes;
    row_planes.source_stride = stride_ * lanes<T>;
    runs_ = runs_of<T>(plan.targets[0], row_planes);
  }

  // Numbers that the rows of a plane of pairs take beside it, and a block's gradients in pairs.
  static int64_t row_numbers(const Planes& planes) {
    return planes.vector_stride +
           lanes<T> * lanes<T> * static_cast<int64_t>(planes.plan->sources.size());
  }
  static int64_t grad_numbers(const Planes& planes) {
    return planes.strip.images * planes.strip.rows *
           PairRows(planes.plan->cols).template row_size<T>();
  }

  // Rows of channels from `vectors` planes of pairs. A channel's row: its phases one after the
  // other, like the planes'.
  void separate(const T* planes, int64_t vectors, uint16_t* rows) const {
    for (int64_t v = 0; v < vectors; v++)
      for (int64_t source = 0; source < sources_; source++)
        separate_channels(
            planes + v * planes_.vector_stride + source * planes_.source_stride, planes_.positions,
            rows + (2 * lanes<T> * v * sources_ + source) * stride_, sources_ * stride_);
  }

  // D of one vector of outputs, whose source channels' rows begin with `channel`.
  void add(const T* grads, T* paired, const uint16_t* rows, int64_t channel, int64_t sources,
           const WeightSums<T>& to) const {
    pair_columns(grads, *planes_.plan, planes_.strip, rows_, paired);
    const int64_t row = sources_ * stride_;
    correlate_pairs_block<T>(sources, runs_.all, rows_.pairs, starts_,
                             {paired, rows + channel * row, row, to.at, to.stride});
  }

 private:
  const Planes& planes_;
  PairRows rows_;
  int64_t sources_, stride_;  // phases of a channel, and columns from one to the next
  std::vector<int64_t> starts_;
  Runs runs_;
};

}  // namespace gross::cpu::GROSS_ISA
