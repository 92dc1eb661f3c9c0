// Sums of terms, and their order in the kernels.
#pragma once

#include "channels.h"
#include "memory.h"
#include "planes.h"
#include "vector.h"

namespace gross::cpu::GROSS_ISA {

// Outputs [first, first + outputs), and inputs [input, input + inputs) of their groups.
struct WeightRows {
  int64_t first, outputs, input, inputs;
};

// Add the term's share of some rows: Σ gate_i Ψ(r_i), [output][input][tap], in the sum's type.
template <class T, class S>
void add_term(const Series& series, int i, const Geometry& g, const WeightRows& rows, T* to) {
  const int64_t taps = g.taps(), s = series.group_sizes[i];
  const T gate = static_cast<T>(series.gates[i]);
  const S* term = static_cast<const S*>(series.terms[i]);
  for (int64_t o = rows.first; o < rows.first + rows.outputs; o++, to += rows.inputs * taps) {
    const int64_t at = block_start(o, g.in_channels, g.out_channels, s) -
                       block_start(o, g.in_channels, g.out_channels, g.group_size);
    const int64_t begin = std::max(at, rows.input),
                  end = std::min(at + s, rows.input + rows.inputs);
    const S* from = term + (o * s + begin - at) * taps;
    T* row = to + (begin - rows.input) * taps;
    for (int64_t k = 0; k < (end - begin) * taps; k++) row[k] += gate * widen<T>(from[k]);
  }
}
template <class T>
void sum_terms(const Series& series, const Geometry& g, const WeightRows& rows, T* to) {
  std::fill_n(to, rows.outputs * rows.inputs * g.taps(), T(0));
  for (int i = 0; i < series.active; i++) {
    if (series.type == Type::bfloat16)
      add_term<T, bfloat16>(series, i, g, rows, to);
    else if (series.type == Type::float16)
      add_term<T, float16>(series, i, g, rows, to);
    else if (series.type == Type::float32)
      add_term<T, float>(series, i, g, rows, to);
    else
      add_term<T, double>(series, i, g, rows, to);
  }
}

// A sum as the activations' type holds it: 16-bit activations see 16-bit weights.
template <class T, class S>
GROSS_INLINE Vector<T> rounded(Vector<T> value) {
  if constexpr (std::is_same_v<S, T>) return value;
  S narrow[lanes<T>];
  store<T>(narrow, value);
  return load<T>(narrow);
}

// Rows of `count` numbers, one per lane, as vectors: to[k] = (rows[0][k], rows[1][k], …). Lanes
// without a row are zeros.
template <class T, class S, class Row>
GROSS_INLINE void interleave(int64_t row_count, int64_t count, Row row, T* to) {
  constexpr int n = lanes<T>;
  for (int64_t k = 0; k < count; k += n) {
    Vector<T> square[n];
#pragma GCC unroll 64
    for (int i = 0; i < n; i++)
      square[i] = i < row_count ? load_strided<T>(row(i) + k, 1, count - k) : Vector<T>{};
    transpose<T>(square);
    for (int i = 0; i < std::min<int64_t>(n, count - k); i++)
      store<T>(to + (k + i) * n, rounded<T, S>(square[i]));
  }
}
template <class T, class Row>
GROSS_INLINE void separate(int64_t row_count, int64_t count, Row row, const T* from) {
  constexpr int n = lanes<T>;
  for (int64_t k = 0; k < count; k += n) {
    Vector<T> square[n];
#pragma GCC unroll 64
    for (int i = 0; i < n; i++)
      square[i] = k + i < count ? load<T>(from + (k + i) * n) : Vector<T>{};
    transpose<T>(square);
    for (int i = 0; i < std::min<int64_t>(n, row_count); i++)
      store_strided<T>(row(i) + k, square[i], 1, count - k);
  }
}

// The summed weights of a convolution, as one of its directions reads them.
struct SummedWeights {
  const Series& series;
  const Geometry& geometry;
  const Direction& direction;
};

// The weights of one vector of outputs, [source channel of the group][tap][lane]; `sum` holds the
// summed rows meanwhile.
template <class T, class S>
void pack_weights(const SummedWeights& of, const LaneBlock& block, T* sum, T* to) {
  const Geometry& g = of.geometry;
  const Direction& d = of.direction;
  const int64_t taps = g.taps();
  if (d.pass == Pass::forward) {
    const int64_t row = g.group_size * taps;
    sum_terms(of.series, g, {block.first(d), block.lanes(), 0, g.group_size}, sum);
    interleave<T, S>(block.lanes(), row, [&](int64_t lane) { return sum + lane * row; }, to);
    return;
  }
  // Lanes are inputs of the forward convolution, taps of one input are together: taps numbers per
  // lane and source.
  sum_terms(of.series, g,
            {block.group * d.sources, block.groups * d.sources, block.output, block.outputs}, sum);
  if (taps == 1 && block.groups == 1) {
    for (int64_t j = 0; j < d.sources; j++)
      store<T>(to + j * lanes<T>,
               rounded<T, S>(load_strided<T>(sum + j * block.outputs, 1, block.outputs)));
    return;
  }
  for (int64_t j = 0; j < d.sources; j++)
    interleave<T, S>(
        block.lanes(), taps,
        [&](int64_t lane) {
          return sum +
                 ((lane / block.outputs * d.sources + j) * block.outputs + lane % block.outputs) *
                     taps;
        },
        to + j * taps * lanes<T>);
}

// One vector of numbers of outputs, zeros where there are none.
template <class T>
void store_outputs(const void* numbers, int64_t first, int64_t count, T* to) {
  store<T>(to, numbers ? load_strided<T>(static_cast<const T*>(numbers) + first, 1, count)
                       : Vector<T>{});
}

// Those of all blocks, `packed` numbers each; a block's summed rows take `summed`.
template <class T, class S>
void pack_blocks(const SummedWeights& of, const std::vector<LaneBlock>& blocks, int64_t packed,
                 int64_t summed, T* to, const Threads& threads) {
  auto pack = [&](int64_t begin, int64_t end) {
    T* const sum = scratch<T>(summed);
    for (int64_t b = begin; b < end; b++) pack_weights<T, S>(of, blocks[b], sum, to + b * packed);
  };
  run(threads, blocks.size(), pack);
}

template <class T, class S>
void sum(const Series& series, int64_t count, S* output, const Threads& threads) {
  constexpr int64_t block = 1024;  // sums kept on the stack
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b++) {
      const int64_t first = b * block, size = std::min(block, count - first);
      T total[block] = {};
      for (int i = 0; i < series.active; i++) {
        const S* term = static_cast<const S*>(series.terms[i]) + first;
        const T gate = static_cast<T>(series.gates[i]);
        for (int64_t k = 0; k < size; k++) total[k] += gate * widen<T>(term[k]);
      }
      for (int64_t k = 0; k < size; k++) output[first + k] = narrow<S>(total[k]);
    }
  };
  run(threads, ceil_div(count, block), work);
}

}  // namespace gross::cpu::GROSS_ISA
