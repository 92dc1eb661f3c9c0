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

// The gradients of the terms and the gates' shares from D of some outputs, [output][input in
// group][tap].
template <class T, class S>
void write_term(const Series& series, const SeriesGradient& gradient, int i, const Geometry& g,
                int64_t first, int64_t outputs, const T* from, double* share) {
  const int64_t taps = g.taps(), size = series.group_sizes[i] * taps;
  const S* term = static_cast<const S*>(series.terms[i]);
  S* to = static_cast<S*>(gradient.terms[i]);
  const T gate = static_cast<T>(series.gates[i]);
  double product = 0;
  for (int64_t o = first; o < first + outputs; o++) {
    const int64_t at = block_start(o, g.in_channels, g.out_channels, series.group_sizes[i]) -
                       block_start(o, g.in_channels, g.out_channels, g.group_size);
    const T* row = from + (o - first) * g.group_size * taps + at * taps;
    if (to)
      for (int64_t k = 0; k < size; k++) to[o * size + k] = narrow<S>(gate * row[k]);
    if (share)
      for (int64_t k = 0; k < size; k++)
        product += static_cast<double>(row[k]) * widen<T>(term[o * size + k]);
  }
  if (share) share[i] = product;
}
// From D of one vector of outputs, [input][tap][lane]; `rows` holds the lanes' rows meanwhile.
template <class T>
void write_gradients(const Series& series, const SeriesGradient& gradient, const Geometry& g,
                     const Direction& d, const LaneBlock& block, const T* from, T* rows,
                     double* share) {
  const int64_t first = block.first(d), outputs = block.lanes(), row = g.group_size * g.taps();
  separate<T>(outputs, row, [&](int64_t lane) { return rows + lane * row; }, from);
  for (int i = 0; i < series.active; i++) {
    if (series.type == Type::bfloat16)
      write_term<T, bfloat16>(series, gradient, i, g, first, outputs, rows, share);
    else if (series.type == Type::float16)
      write_term<T, float16>(series, gradient, i, g, first, outputs, rows, share);
    else if (series.type == Type::float32)
      write_term<T, float>(series, gradient, i, g, first, outputs, rows, share);
    else
      write_term<T, double>(series, gradient, i, g, first, outputs, rows, share);
  }
}

// Where D of every block goes: to the gradients of the terms, and to the gates' shares.
template <class T>
class GradientBlocks {
 public:
  GradientBlocks(const Channels<T>& channels, const Series& series, const SeriesGradient& gradient,
                 const Geometry& g)
      : channels_(channels),
        series_(series),
        gradient_(gradient),
        g_(g),
        count_(channels.blocks.size()),
        shares_(gradient.gates ? count_ * max_terms : 0) {}

  void write(int64_t block, const T* from, T* rows) {
    write_gradients(series_, gradient_, g_, channels_, channels_.blocks[block], from, rows,
                    gradient_.gates ? &shares_[block * max_terms] : nullptr);
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
    for (int i = 0; gradient_.gates && i < series_.active; i++) {
      gradient_.gates[i] = 0;
      for (int64_t b = 0; b < count_; b++) gradient_.gates[i] += shares_[b * max_terms + i];
    }
  }

 private:
  const Channels<T>& channels_;
  const Series& series_;
  const SeriesGradient& gradient_;
  const Geometry& g_;
  int64_t count_;
  std::vector<double> shares_;
};

}  // namespace gross::cpu::GROSS_ISA
