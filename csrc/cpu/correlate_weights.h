// The inner loop of the weight gradient.
#pragma once

#include "correlate.h"
#include "memory.h"
#include "parts.h"

namespace gross::cpu::GROSS_ISA {

// What some source channels' share of D is computed from, and where it goes.
template <class T>
struct WeightStencil {
  const T* grads;
  const T* planes;  // of the first source channel
  const Index<T>* permutation;
  T* sums;
  int64_t sum_stride;  // from one source channel to the next
};

// D[source][tap][lane] += Σ_position grads[position][lane] · from[position + tap][source], for
// `Sources` source channels and `Runs` runs of `Length` taps, over stretches of `columns`
// positions: the sums are chains of additions, and two units of four cycles' latency want eight.
template <class T, Fetch fetch, int Sources, int Runs, int Length, int columns>
__attribute__((noinline)) void correlate_weights(const WeightStencil<T>& stencil, const Run* runs,
                                                 const int64_t* stretches, int64_t count) {
  const auto [grads, planes, permutation, to, to_stride] = stencil;
  Vector<T> sum[Sources][Runs][Length]{};
  const T* from[Runs];
  for (int r = 0; r < Runs; r++) from[r] = planes + runs[r].offset;
  Vector<Index<T>> index[Sources];
#pragma GCC unroll 8
  for (int j = 0; j < Sources; j++) {
    if constexpr (is_permuted(fetch))
      __builtin_memcpy(&index[j], permutation + j * lanes<T>, sizeof index[j]);
  }
  for (int64_t i = 0; i < count; i++) {
    const int64_t p = stretches[i];
    Vector<T> grad[columns];
    // Consecutive multiply–adds go to different sums. A gradient is loaded where its first tap
    // meets it: as many of them as a run has taps are in registers at a time.
#pragma GCC unroll 16
    for (int k = 0; k < columns + Length - 1; k++) {
      if (k < columns) {
        grad[k] = load<T>(grads + p + k * lanes<T>);
        keep_in_register(grad[k]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < Runs; r++)
#pragma GCC unroll 8
        for (int j = 0; j < Sources; j++) {
          Vector<T> value = fetched<T, fetch>(
              from[r] + p + k * lanes<T> + (fetch == Fetch::broadcast ? j : 0), index[j]);
          if constexpr (Length > 1) keep_in_register(value);
#pragma GCC unroll 4
          for (int c = 0; c < Length; c++)
            if (k - c >= 0 && k - c < columns) sum[j][r][c] += grad[k - c] * value;
        }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < Sources; j++)
#pragma GCC unroll 4
    for (int r = 0; r < Runs; r++)
#pragma GCC unroll 4
      for (int c = 0; c < Length; c++) {
        T* at = to + j * to_stride + runs[r].weight[c];
        store<T>(at, load<T>(at) + sum[j][r][c]);
      }
}

// Source channels at once: 4 have 12 sums, which leave room for 3 gradients and one value in 16
// registers, but not for permutations.
constexpr int max_grad_sources(Fetch fetch) {
  return registers == 32 || !is_permuted(fetch) ? 4 : 2;
}

template <class T>
using CorrelateWeights = void (*)(const WeightStencil<T>&, const Run* runs,
                                  const int64_t* stretches, int64_t count);

template <class T, Fetch fetch, int Columns, int Sources, int Runs>
CorrelateWeights<T> correlate_weights_of(int64_t length) {
  return length == 3   ? correlate_weights<T, fetch, Sources, Runs, 3, Columns>
         : length == 2 ? correlate_weights<T, fetch, Sources, Runs, 2, Columns>
                       : correlate_weights<T, fetch, Sources, Runs, 1, Columns>;
}
template <class T, Fetch fetch, int Columns>
CorrelateWeights<T> correlate_weights_of(int64_t sources, int64_t runs, int64_t length) {
  if (sources == 1)
    return runs == 3 ? correlate_weights_of<T, fetch, Columns, 1, 3>(length)
                     : correlate_weights_of<T, fetch, Columns, 1, 1>(length);
  if constexpr (fetch != Fetch::lanes) {
    if (sources == 2) return correlate_weights_of<T, fetch, Columns, 2, 1>(length);
    if constexpr (max_grad_sources(fetch) == 4)
      return sources == 3 ? correlate_weights_of<T, fetch, Columns, 3, 1>(length)
                          : correlate_weights_of<T, fetch, Columns, 4, 1>(length);
  }
  return nullptr;
}
template <class T, int Columns>
CorrelateWeights<T> correlate_weights_of(Fetch fetch, int64_t sources, int64_t runs,
                                         int64_t length) {
  switch (fetch) {
    case Fetch::lanes: return correlate_weights_of<T, Fetch::lanes, Columns>(sources, runs, length);
    case Fetch::within_quads:
      return correlate_weights_of<T, Fetch::within_quads, Columns>(sources, runs, length);
    case Fetch::permuted:
      return correlate_weights_of<T, Fetch::permuted, Columns>(sources, runs, length);
    default: return correlate_weights_of<T, Fetch::broadcast, Columns>(sources, runs, length);
  }
}
template <class T>
CorrelateWeights<T> correlate_weights_for(int64_t columns, Fetch fetch, int64_t sources,
                                          int64_t runs, int64_t length) {
  if (columns == 8) return correlate_weights_of<T, 8>(fetch, sources, runs, length);
  if (columns == 7) return correlate_weights_of<T, 7>(fetch, sources, runs, length);
  if (columns == 4) return correlate_weights_of<T, 4>(fetch, sources, runs, length);
  return correlate_weights_of<T, 2>(fetch, sources, runs, length);
}

// Where a strip's stretches of positions start. Rows are cut into whole stretches where their width
// allows it; else stretches run over all positions, those between rows included: their gradients
// are zeros.
struct Stretches {
  int64_t columns = slack;
  std::vector<int64_t> starts;

  template <class T>
  static Stretches of(const Plan& plan, const Strip& strip) {
    Stretches stretches;
    const int64_t positions =
        ((strip.images - 1) * plan.row_pitch + strip.rows - 1) * plan.pitch + plan.cols;
    for (const int64_t columns : {8, 7, 4, 2})
      if (plan.cols % columns == 0) {
        stretches.columns = columns;
        for (int64_t i = 0; i < strip.images; i++)
          for (int64_t r = 0; r < strip.rows; r++)
            for (int64_t k = 0; k < plan.cols; k += columns)
              stretches.starts.push_back(((i * plan.row_pitch + r) * plan.pitch + k) * lanes<T>);
        return stretches;
      }
    for (int64_t p = 0; p < positions; p += slack) stretches.starts.push_back(p * lanes<T>);
    return stretches;
  }
};

// The planes that D of one vector of outputs comes from, and D.
template <class T>
struct WeightBlock {
  const T* grads;
  const T* planes;        // of its first source channel
  int64_t vector_stride;  // from one vector of source channels to the next
  T* sums;
};

template <class T>
void correlate_block(const Channels<T>& channels, int64_t block, int64_t taps,
                     const std::vector<Run>& runs, const Stretches& stretches,
                     const WeightBlock<T>& of) {
  const bool broadcasting = channels.fetch == Fetch::broadcast;
  const int64_t run_count = runs.size();
  // So many stretches stay in the first-level cache while every source channel and tap passes over
  // them.
  const int64_t count = stretches.starts.size(),
                most = run_budget / (2 * GROSS_VECTOR_BYTES) / stretches.columns;
  for (int64_t i = 0; i < count; i += most)
    for (int64_t first = 0; first < channels.sources; first += lanes<T>) {
      const T* plane = of.planes + first / lanes<T> * of.vector_stride;
      even_parts(
          std::min<int64_t>(lanes<T>, channels.sources - first), max_grad_sources(channels.fetch),
          [&](int64_t j, int64_t size) {
            for (int64_t r = 0, together; r < run_count; r += together) {
              // With one source channel three runs are needed for enough chains of additions.
              together =
                  size == 1 && r + 3 <= run_count && runs[r + 2].length == runs[r].length ? 3 : 1;
              const Index<T>* permutation = channels.permutation_of(block);
              const auto correlate = correlate_weights_for<T>(stretches.columns, channels.fetch,
                                                              size, together, runs[r].length);
              correlate({of.grads, plane + (broadcasting ? j : 0),
                         permutation ? permutation + j * lanes<T> : nullptr,
                         of.sums + (first + j) * taps * lanes<T>, taps * lanes<T>},
                        &runs[r], stretches.starts.data() + i, std::min(most, count - i));
            }
          });
    }
}

}  // namespace gross::cpu::GROSS_ISA
