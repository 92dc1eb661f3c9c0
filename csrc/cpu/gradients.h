// From the gradient of summed weights to those of the terms and of the gates.
#pragma once

#include "channels.h"
#include "memory.h"
#include "weights.h"

namespace gross::cpu::GROSS_ISA {

// Where few vectors of outputs would leave threads idle, strips are split into this many slices.
// Fixed, not the number of threads: the slices are summed in order, so results are the same bits
// for any number of threads.
constexpr int64_t grad_tasks = 32;

// Which gradients of a series are asked for.
struct SeriesBackward {
  const Series& series;
  const SeriesGradient& gradient;
  const Geometry& geometry;
};

// The gradient of term i and its gate's share from D of some outputs, [output][input in
// group][tap].
template <class T, class S>
void write_term(const SeriesBackward& of, int i, const WeightRows& rows, const T* from,
                double* share) {
  const Geometry& g = of.geometry;
  const int64_t taps = g.taps(), size = of.series.group_sizes[i] * taps;
  const S* term = static_cast<const S*>(of.series.terms[i]);
  S* to = static_cast<S*>(of.gradient.terms[i]);
  const T gate = static_cast<T>(of.series.gates[i]);
  double product = 0;
  for (int64_t o = rows.first; o < rows.first + rows.outputs; o++) {
    const int64_t at = block_start(o, g.in_channels, g.out_channels, of.series.group_sizes[i]) -
                       block_start(o, g.in_channels, g.out_channels, g.group_size);
    const T* row = from + (o - rows.first) * g.group_size * taps + at * taps;
    if (to)
      for (int64_t k = 0; k < size; k++) to[o * size + k] = narrow<S>(gate * row[k]);
    if (share)
      for (int64_t k = 0; k < size; k++)
        product += static_cast<double>(row[k]) * widen<T>(term[o * size + k]);
  }
  if (share) share[i] = product;
}
// Those of all terms from D of one vector of outputs, [input][tap][lane]; `rows_at` holds the
// lanes' rows meanwhile.
template <class T>
void write_gradients(const SeriesBackward& of, const Direction& d, const LaneBlock& block,
                     const T* from, T* rows_at, double* share) {
  const int64_t row = of.geometry.group_size * of.geometry.taps();
  const WeightRows rows{block.first(d), block.lanes(), 0, of.geometry.group_size};
  separate<T>(rows.outputs, row, [&](int64_t lane) { return rows_at + lane * row; }, from);
  for (int i = 0; i < of.series.active; i++) {
    if (of.series.type == Type::bfloat16)
      write_term<T, bfloat16>(of, i, rows, rows_at, share);
    else if (of.series.type == Type::float16)
      write_term<T, float16>(of, i, rows, rows_at, share);
    else if (of.series.type == Type::float32)
      write_term<T, float>(of, i, rows, rows_at, share);
    else
      write_term<T, double>(of, i, rows, rows_at, share);
  }
}

// The gates' gradients from the shares of `count` blocks, in order.
inline void add_shares(const double* shares, int64_t count, int active, double* gates) {
  for (int i = 0; gates && i < active; i++) {
    gates[i] = 0;
    for (int64_t b = 0; b < count; b++) gates[i] += shares[b * max_terms + i];
  }
}

// Where D of every block goes: to the gradients of the terms, and to the gates' shares.
template <class T>
class GradientBlocks {
 public:
  GradientBlocks(const Channels<T>& channels, const SeriesBackward& of)
      : channels_(channels),
        of_(of),
        count_(channels.blocks.size()),
        shares_(of.gradient.gates ? count_ * max_terms : 0) {}

  void write(int64_t block, const T* from, T* rows) {
    write_gradients(of_, channels_, channels_.blocks[block], from, rows,
                    of_.gradient.gates ? &shares_[block * max_terms] : nullptr);
  }
  // All blocks from [slice][block], summed in one order for any number of threads; `partial` is
  // changed.
  void write_slices(T* partial, int64_t slices, const Threads& threads) {
    const int64_t packed = channels_.packed;
    auto reduce = [&](int64_t begin, int64_t end) {
      T* const rows = scratch<T>(channels_.summed);
      for (int64_t b = begin; b < end; b++) {
        T* total = partial + b * packed;
        for (int64_t slice = 1; slice < slices; slice++)
          for (int64_t k = 0; k < packed; k++) total[k] += total[slice * count_ * packed + k];
        write(b, total, rows);
      }
    };
    run(threads, count_, reduce);
  }
  // The gates' gradients; after all blocks.
  void write_gates() const {
    add_shares(shares_.data(), count_, of_.series.active, of_.gradient.gates);
  }

 private:
  const Channels<T>& channels_;
  const SeriesBackward of_;
  int64_t count_;
  std::vector<double> shares_;
};

}  // namespace gross::cpu::GROSS_ISA
