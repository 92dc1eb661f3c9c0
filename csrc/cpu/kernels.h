// The kernels, written once for every instruction set: included by portable.cpp, avx2.cpp and avx512.cpp.
//
// The inner loop keeps `outputs × vectors` sums in registers and adds, for every source channel and tap, a broadcast weight times a
// shifted vector of positions: with 32 registers 4 × 6 sums need 6 loads for 24 multiply–adds, at any group size of 3 and more.
#include "vector.h"

#include "planes.h"

namespace gross::cpu::GROSS_ISA {

// Vectors of positions that go with 1, 2, 3, 4 outputs: as many sums as the registers hold.
constexpr int max_outputs = 4;
template <int Outputs>
constexpr int max_vectors = registers == 32 ? (Outputs <= 2 ? 12 : 6) : (Outputs == 1 ? 8 : Outputs == 2 ? 6 : 3);

// Bytes that one thread's planes, and its assembled weights, may take: both stay in a 1 MB second-level cache.
constexpr int64_t plane_budget = 256 << 10, weight_budget = 128 << 10;
// Bytes of gradients that the weight gradient passes over at once: three quarters of a 32 KB first-level cache.
constexpr int64_t run_budget = 24 << 10;

// Memory of one thread, kept from call to call and grown as needed; contents are not kept.
template <class T>
T* scratch(int64_t count) {
  struct Block {
    void* memory = nullptr;
    size_t size = 0;
    ~Block() { std::free(memory); }
  };
  static thread_local Block block;
  const size_t need = round_up(count * sizeof(T), 4096);
  if (block.size < need) {
    std::free(block.memory);
    block = {nullptr, 0};
    block.memory = std::aligned_alloc(4096, need);
    if (!block.memory) throw std::bad_alloc();
    block.size = need;
  }
  return static_cast<T*>(block.memory);
}

// Split `count` into as few parts of at most `most` as possible, of nearly equal size; calls f(begin, size).
template <class F>
GROSS_INLINE void even_parts(int64_t count, int64_t most, F f) {
  const int64_t parts = ceil_div(count, most);
  for (int64_t i = 0; i < parts; i++) {
    const int64_t begin = count * i / parts, end = count * (i + 1) / parts;
    f(begin, end - begin);
  }
}

// Call f with a compile-time constant equal to `value`, which is 1 … N.
template <int N, class F>
GROSS_INLINE void with_constant(int64_t value, F f) {
  if constexpr (N > 1) {
    if (value < N) return with_constant<N - 1>(value, f);
  }
  f(std::integral_constant<int, N>{});
}

// Weights -----------------------------------------------------------------------------------------------------------------

// Sum the terms for the outputs of a block: R[output][input in group][tap], Σ gate_i Ψ(r_i), in the sum's type.
template <class T, class S>
void add_term(const Series& series, int i, const Geometry& g, int64_t first, int64_t outputs, T* to) {
  const int64_t taps = g.taps(), size = series.group_sizes[i] * taps;
  const T gate = static_cast<T>(series.gates[i]);
  const S* term = static_cast<const S*>(series.terms[i]);
  for (int64_t o = first; o < first + outputs; o++) {
    const int64_t at = block_start(o, g.in_channels, g.out_channels, series.group_sizes[i]) -
                       block_start(o, g.in_channels, g.out_channels, g.group_size);
    T* row = to + (o - first) * g.group_size * taps + at * taps;
    const S* from = term + o * size;
    for (int64_t k = 0; k < size; k++) row[k] += gate * widen<T>(from[k]);
  }
}
template <class T>
void sum_terms(const Series& series, const Geometry& g, int64_t first, int64_t outputs, T* to) {
  std::fill_n(to, outputs * g.group_size * g.taps(), T(0));
  for (int i = 0; i < series.active; i++) {
    if (series.type == Type::bfloat16)
      add_term<T, bfloat16>(series, i, g, first, outputs, to);
    else if (series.type == Type::float16)
      add_term<T, float16>(series, i, g, first, outputs, to);
    else if (series.type == Type::float32)
      add_term<T, float>(series, i, g, first, outputs, to);
    else
      add_term<T, double>(series, i, g, first, outputs, to);
  }
}

// A sum as the activations' type holds it: 16-bit activations see 16-bit weights.
template <class T, class S>
GROSS_INLINE T rounded(T value) {
  return widen<T>(narrow<S>(value));
}

// The weights of one channel block in the order the inner loop reads them: [target][group][up to 4 outputs][source channel][tap][output].
// Backward, sources are the outputs of the forward convolution and outputs its inputs.
template <class T, class S>
T* pack_weights(const Plan& plan, const Series& series, const Geometry& g, const ChannelBlock& block, bool backward,
                T* sum, T* to) {
  const int64_t taps = g.taps(), m = g.outputs_per_group(), s = g.group_size;
  for (const Target& target : plan.targets)
    for (int64_t group = block.group; group < block.group + block.groups; group++) {
      if (backward)
        sum_terms(series, g, group * m, m, sum);
      else
        sum_terms(series, g, group * m + block.output, block.outputs, sum);
      even_parts(block.outputs, max_outputs, [&](int64_t first, int64_t count) {
        if (!backward) {
          // Forward every tap counts, in order: rows of the sum, interleaved.
          for (int64_t o = 0; o < count; o++)
            for (int64_t k = 0; k < s * taps; k++) to[k * count + o] = rounded<T, S>(sum[(first + o) * s * taps + k]);
          to += count * s * taps;
          return;
        }
        for (int64_t source = 0; source < m; source++)
          for (const Tap& tap : target.taps)
            for (int64_t o = first; o < first + count; o++)
              *to++ = rounded<T, S>(sum[(source * s + block.output + o) * taps + tap.index]);
      });
    }
  return to;
}

// Forward and input gradient ------------------------------------------------------------------------------------------------

// sums[o][position] = Σ_source Σ_tap weight[source][tap][o] · planes[source][position + offset[tap]].
template <class T, int Outputs, int Vectors>
__attribute__((noinline)) void correlate(const T* planes, int64_t channel_stride, int64_t sources, const int64_t* offsets,
                                         int64_t taps, const T* weights, T* sums, int64_t sums_stride) {
  Vector<T> sum[Outputs][Vectors]{};
  for (int64_t source = 0; source < sources; source++, planes += channel_stride)
    for (int64_t tap = 0; tap < taps; tap++, weights += Outputs) {
      const T* from = planes + offsets[tap];
      Vector<T> positions[Vectors];
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; v++) positions[v] = load<T>(from + v * lanes<T>);
#pragma GCC unroll 4
      for (int o = 0; o < Outputs; o++)
#pragma GCC unroll 16
        for (int v = 0; v < Vectors; v++) sum[o][v] += positions[v] * weights[o];
    }
#pragma GCC unroll 4
  for (int o = 0; o < Outputs; o++)
#pragma GCC unroll 16
    for (int v = 0; v < Vectors; v++) store<T>(sums + o * sums_stride + v * lanes<T>, sum[o][v]);
}

// How a kernel's work is cut: channel blocks, joined into sets whose weights are assembled together, times strips.
struct Schedule {
  std::vector<ChannelBlock> blocks;
  std::vector<int64_t> sets;  // first block of each set, and the end
  std::vector<Strip> strips;

  int64_t units() const { return static_cast<int64_t>((sets.size() - 1) * strips.size()); }
};

// Channel blocks: whole groups until a vector of channels is full, or some outputs of a large group.
inline std::vector<ChannelBlock> channel_blocks(int64_t groups, int64_t sources, int64_t outputs, int64_t taps,
                                                int64_t width, int64_t size_of_weight) {
  std::vector<ChannelBlock> blocks;
  const int64_t fitting = std::max<int64_t>(max_outputs, weight_budget / (sources * taps * size_of_weight));
  if (outputs > fitting) {
    for (int64_t group = 0; group < groups; group++)
      even_parts(outputs, fitting, [&](int64_t first, int64_t count) { blocks.push_back({group, 1, first, count}); });
  } else {
    const int64_t together = std::min(groups, ceil_div(width, std::min(sources, outputs)));
    for (int64_t group = 0; group < groups; group += together)
      blocks.push_back({group, std::min(together, groups - group), 0, outputs});
  }
  return blocks;
}

// Strips of as many rows, or images, as fit the budget; fewer where threads would be idle.
inline std::vector<Strip> plan_strips(const Plan& plan, int64_t images, int64_t channels, int64_t size_of_sum,
                                      int64_t at_least) {
  const int64_t positions = std::max<int64_t>(
      plane_budget / (channels * static_cast<int64_t>(plan.sources.size()) * size_of_sum), plan.pitch);
  const int64_t image_positions = plan.row_pitch * plan.pitch;
  int64_t rows = std::clamp<int64_t>(positions / plan.pitch - plan.halo(), 1, plan.rows);
  int64_t together = rows == plan.rows ? std::clamp<int64_t>(positions / image_positions, 1, images) : 1;
  if (ceil_div(images, together) < at_least) together = std::max<int64_t>(1, images / at_least);
  if (together == 1 && images * ceil_div(plan.rows, rows) < at_least)
    rows = std::max<int64_t>(std::min(rows, plan.halo() + 1), plan.rows / ceil_div(at_least, images));
  rows = std::clamp<int64_t>(rows, 1, plan.rows);
  // Equal strips: a short last one would waste its halo.
  if (rows < plan.rows) rows = ceil_div(plan.rows, ceil_div(plan.rows, rows));
  if (together > 1) together = ceil_div(images, ceil_div(images, together));
  return strips(images, plan.rows, rows, together);
}

// Where each tap of a target reads, relative to the position it writes.
inline void tap_offsets(const Plan& plan, const Target& target, const Planes& planes, int64_t* to) {
  for (const Tap& tap : target.taps)
    *to++ = tap.source * planes.source_stride + (tap.row - plan.min_row) * plan.pitch + tap.col - plan.min_col;
}

inline void fill_tables(const Image& source, const Image& target, const Plan& plan, const Strip& strip,
                        const Planes& planes, int64_t positions, std::vector<std::vector<int64_t>>& source_tables,
                        std::vector<std::vector<int64_t>>& target_tables) {
  for (size_t i = 0; source.stride_c == 1 && i < plan.sources.size(); i++)
    source_table(source, plan, plan.sources[i], strip, planes, source_tables[i]);
  for (size_t i = 0; i < plan.targets.size(); i++)
    target_table(target, plan, plan.targets[i], strip, positions, target_tables[i]);
}

// Group size 1 with one output per channel, channels-last: lanes are channels, so nothing is transposed. Planes are
// [source][position][lane] for one vector of channels, and weights one vector per tap.
template <class T, class S, int Positions>
__attribute__((noinline)) void correlate_lanes(const T* planes, const int64_t* offsets, int64_t taps, const T* weights,
                                               const int64_t* table, int64_t channels, S* to) {
  Vector<T> sum[Positions]{};
  for (int64_t tap = 0; tap < taps; tap++, weights += lanes<T>) {
    const T* from = planes + offsets[tap] * lanes<T>;
    const Vector<T> weight = load<T>(weights);
#pragma GCC unroll 16
    for (int p = 0; p < Positions; p++) sum[p] += load<T>(from + p * lanes<T>) * weight;
  }
#pragma GCC unroll 16
  for (int p = 0; p < Positions; p++) store_pixel<T>(to, table[p], channels, sum[p]);
}

template <class T, class S>
void load_lanes(const Image& image, const Strip& strip, const std::vector<std::vector<int64_t>>& tables, int64_t channel,
                int64_t channels, T* to) {
  const S* data = static_cast<const S*>(image.data) + strip.image * image.stride_n + channel;
  for (const std::vector<int64_t>& table : tables)
    for (const int64_t offset : table) {
      store<T>(to, load_pixel<T>(data, offset, channels));
      to += lanes<T>;
    }
}

// Lanes of weights, [target][tap][lane], of the channels [first, first + count).
template <class T, class S>
void pack_lanes(const Plan& plan, const Series& series, const Geometry& g, int64_t first, int64_t count, T* sum, T* to) {
  sum_terms(series, g, first, count, sum);
  for (const Target& target : plan.targets)
    for (const Tap& tap : target.taps)
      for (int64_t lane = 0; lane < lanes<T>; lane++)
        *to++ = lane < count ? rounded<T, S>(sum[lane * g.taps() + tap.index]) : T(0);
}

template <class T, class S>
void convolve_depthwise(const Plan& plan, const Image& source, const Series& series, const Image& target_image,
                        const Geometry& g, const Threads& threads) {
  constexpr int most = registers == 32 ? 12 : 8;
  const int64_t taps = g.taps(), channels = g.in_channels, blocks = ceil_div(channels, lanes<T>);
  // One set of blocks as long as there are strips enough for the threads: whole pixels are then read together.
  const std::vector<Strip> all = plan_strips(plan, g.images, lanes<T>, sizeof(T), 4 * threads.count);
  const int64_t parts = std::min(blocks, ceil_div(4 * threads.count, all.size()));
  int64_t plane_size = 0;
  for (const Strip& strip : all)
    plane_size = std::max<int64_t>(plane_size, Planes::of<T>(plan, strip).source_stride * plan.sources.size() * lanes<T>);

  auto work = [&](int64_t begin, int64_t end) {
    T* const planes_at = scratch<T>(plane_size + blocks * taps * lanes<T> + taps * lanes<T>);
    T* const weights = planes_at + plane_size;
    T* const sum = weights + blocks * taps * lanes<T>;
    std::vector<int64_t> offsets(taps);
    std::vector<std::vector<int64_t>> source_tables(plan.sources.size()), target_tables(plan.targets.size());
    int64_t assembled = -1;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t part = unit / static_cast<int64_t>(all.size());
      const Strip& strip = all[unit % all.size()];
      const int64_t first = blocks * part / parts, last = blocks * (part + 1) / parts;
      if (part != assembled)
        for (int64_t b = first; b < last; b++)
          pack_lanes<T, S>(plan, series, g, b * lanes<T>, std::min<int64_t>(lanes<T>, channels - b * lanes<T>), sum,
                           weights + b * taps * lanes<T>);
      assembled = part;
      const Planes planes = Planes::of<T>(plan, strip);
      const int64_t positions = ((strip.images - 1) * plan.row_pitch + strip.rows - 1) * plan.pitch + plan.cols;
      fill_tables(source, target_image, plan, strip, planes, positions, source_tables, target_tables);
      for (int64_t b = first; b < last; b++) {
        const int64_t left = channels - b * lanes<T>;
        load_lanes<T, S>(source, strip, source_tables, b * lanes<T>, left, planes_at);
        S* const data = static_cast<S*>(target_image.data) + strip.image * target_image.stride_n + b * lanes<T>;
        const T* weight = weights + b * taps * lanes<T>;
        for (size_t which = 0; which < plan.targets.size(); which++) {
          const Target& target = plan.targets[which];
          const int64_t target_taps = target.taps.size();
          tap_offsets(plan, target, planes, offsets.data());
          even_parts(positions, most, [&](int64_t at, int64_t count) {
            with_constant<most>(count, [&](auto p) {
              correlate_lanes<T, S, p>(planes_at + at * lanes<T>, offsets.data(), target_taps, weight,
                                       target_tables[which].data() + at, left, data);
            });
          });
          weight += target_taps * lanes<T>;
        }
      }
    }
  };
  run(threads, parts * all.size(), work);
}

template <class T, class S>
void convolve(const Plan& plan, const Image& source, const Series& series, const Image& target_image, const Geometry& g,
              bool backward, const Threads& threads) {
  const int64_t sources = backward ? g.outputs_per_group() : g.group_size;
  const int64_t outputs = backward ? g.group_size : g.outputs_per_group();
  const int64_t taps = g.taps();
  if (sources == 1 && outputs == 1 && source.stride_c == 1 && target_image.stride_c == 1)
    return convolve_depthwise<T, S>(plan, source, series, target_image, g, threads);

  Schedule schedule;
  schedule.blocks = channel_blocks(g.groups(), sources, outputs, taps, lanes<T>, sizeof(T));
  int64_t plane_channels = 0, target_channels = 0, most_weights = 0;
  for (size_t i = 0, weights = 0; i < schedule.blocks.size(); i++) {
    const ChannelBlock& block = schedule.blocks[i];
    const int64_t size = block.blocks() * sources * taps;
    if (i == 0 || (weights + size) * sizeof(T) > weight_budget) {
      schedule.sets.push_back(i);
      weights = 0;
    }
    weights += size;
    most_weights = std::max<int64_t>(most_weights, weights);
    plane_channels = std::max(plane_channels, block.groups * sources);
    target_channels = std::max(target_channels, block.blocks());
  }
  schedule.sets.push_back(schedule.blocks.size());
  const int64_t sets = schedule.sets.size() - 1;
  schedule.strips = plan_strips(plan, g.images, plane_channels, sizeof(T), ceil_div(4 * threads.count, sets));

  const int64_t vectors = outputs == 1 ? max_vectors<1> : outputs == 2 ? max_vectors<2> : max_vectors<max_outputs>;
  const int64_t strip_count = schedule.strips.size();
  int64_t plane_size = 0;
  for (const Strip& strip : schedule.strips)
    plane_size = std::max(plane_size, plane_channels * Planes::of<T>(plan, strip).channel_stride);
  const int64_t sums_stride = vectors * lanes<T>;
  const int64_t sum_size = (backward ? g.outputs_per_group() : outputs) * g.group_size * taps;

  auto work = [&](int64_t begin, int64_t end) {
    T* const planes_at = scratch<T>(plane_size + target_channels * sums_stride + most_weights + sum_size);
    T* const sums = planes_at + plane_size;
    T* const weights = sums + target_channels * sums_stride;
    T* const sum = weights + most_weights;
    std::vector<int64_t> offsets(taps);
    std::vector<std::vector<int64_t>> source_tables(plan.sources.size()), target_tables(plan.targets.size());
    int64_t assembled = -1;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t set = unit / strip_count;
      const Strip& strip = schedule.strips[unit % strip_count];
      if (set != assembled) {
        T* to = weights;
        for (int64_t b = schedule.sets[set]; b < schedule.sets[set + 1]; b++)
          to = pack_weights<T, S>(plan, series, g, schedule.blocks[b], backward, sum, to);
        assembled = set;
      }
      const Planes planes = Planes::of<T>(plan, strip);
      const int64_t positions =
          round_up(((strip.images - 1) * plan.row_pitch + strip.rows - 1) * plan.pitch + plan.cols, lanes<T>);
      fill_tables(source, target_image, plan, strip, planes, positions, source_tables, target_tables);
      const T* weight = weights;
      for (int64_t b = schedule.sets[set]; b < schedule.sets[set + 1]; b++) {
        const ChannelBlock& block = schedule.blocks[b];
        load_planes<T, S>(source, plan, strip, planes, source_tables, block.group * sources, block.groups * sources,
                          planes_at);
        for (size_t which = 0; which < plan.targets.size(); which++) {
          const Target& target = plan.targets[which];
          tap_offsets(plan, target, planes, offsets.data());
          const int64_t target_taps = target.taps.size();
          even_parts(positions / lanes<T>, vectors, [&](int64_t first, int64_t count) {
            const T* w = weight;
            T* out = sums;
            for (int64_t group = 0; group < block.groups; group++) {
              const T* in = planes_at + group * sources * planes.channel_stride + first * lanes<T>;
              even_parts(block.outputs, max_outputs, [&](int64_t, int64_t size) {
                with_constant<max_outputs>(size, [&](auto o) {
                  with_constant<max_vectors<o>>(count, [&](auto v) {
                    correlate<T, o, v>(in, planes.channel_stride, sources, offsets.data(), target_taps, w, out, sums_stride);
                  });
                });
                w += size * sources * target_taps;
                out += size * sums_stride;
              });
            }
            store_planes<T, S>(sums, sums_stride, first * lanes<T>, count * lanes<T>, target_image, plan, target, strip,
                               target_tables[which], block.group * outputs + block.output, block.blocks());
          });
          weight += block.blocks() * sources * target_taps;
        }
      }
    }
  };
  run(threads, schedule.units(), work);
}

// Weight gradient -----------------------------------------------------------------------------------------------------------

// D[o][tap] += Σ_position grads[o][position] · planes[position + offset[tap]]
template <class T, int Outputs, int Taps>
__attribute__((noinline)) void correlate_weights(const T* grads, int64_t grad_stride, const T* planes,
                                                 const int64_t* offsets, int64_t vectors, T* to, int64_t to_stride) {
  Vector<T> sum[Outputs][Taps]{};
  for (int64_t p = 0; p < vectors * lanes<T>; p += lanes<T>) {
    Vector<T> position[Taps];
#pragma GCC unroll 16
    for (int t = 0; t < Taps; t++) position[t] = load<T>(planes + offsets[t] + p);
#pragma GCC unroll 8
    for (int o = 0; o < Outputs; o++) {
      Vector<T> grad = load<T>(grads + o * grad_stride + p);
      keep_in_register(grad);
#pragma GCC unroll 16
      for (int t = 0; t < Taps; t++) sum[o][t] += grad * position[t];
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < Outputs; o++)
#pragma GCC unroll 16
    for (int t = 0; t < Taps; t++) to[o * to_stride + t] += sum_of_lanes<T>(sum[o][t]);
}

// Sums that the registers hold beside the gradients: of 32 registers 8 outputs × 3 taps, so that 8 aligned loads and 3 that
// straddle cache lines feed 24 multiply–adds.
constexpr int max_grad_outputs = registers == 32 ? 8 : 4;
template <int Outputs>
constexpr int max_taps = std::min(9, (registers == 32 ? 30 : 14) / (Outputs + 1));

// The same with lanes of channels: D[lane][tap] += Σ_position grads[position][lane] · planes[position + offset[tap]][lane].
constexpr int max_lane_taps = 9;
template <class T, int Taps>
__attribute__((noinline)) void correlate_lane_weights(const T* grads, const T* planes, const int64_t* offsets, int64_t positions,
                                                      int64_t channels, T* to, int64_t to_stride) {
  Vector<T> sum[Taps]{};
  const T* from[Taps];
  for (int t = 0; t < Taps; t++) from[t] = planes + offsets[t] * lanes<T>;
  for (int64_t p = 0; p < positions * lanes<T>; p += lanes<T>) {
    Vector<T> grad = load<T>(grads + p);
    keep_in_register(grad);
#pragma GCC unroll 16
    for (int t = 0; t < Taps; t++) sum[t] += grad * load<T>(from[t] + p);
  }
  for (int t = 0; t < Taps; t++)
    for (int64_t lane = 0; lane < channels; lane++) to[lane * to_stride + t] += sum[t][lane];
}

// The gradients of the terms and the gates' shares from D of a block's outputs, [output][input in group][tap].
template <class T, class S>
void write_term(const Series& series, const SeriesGradient& gradient, int i, const Geometry& g, int64_t first,
                int64_t outputs, const T* from, double* share) {
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
      for (int64_t k = 0; k < size; k++) product += static_cast<double>(row[k]) * widen<T>(term[o * size + k]);
  }
  if (share) share[i] = product;
}
template <class T>
void write_gradients(const Series& series, const SeriesGradient& gradient, const Geometry& g, const ChannelBlock& block,
                     const T* from, double* share) {
  const int64_t first = block.group * g.outputs_per_group() + block.output, outputs = block.blocks();
  for (int i = 0; i < series.active; i++) {
    if (series.type == Type::bfloat16)
      write_term<T, bfloat16>(series, gradient, i, g, first, outputs, from, share);
    else if (series.type == Type::float16)
      write_term<T, float16>(series, gradient, i, g, first, outputs, from, share);
    else if (series.type == Type::float32)
      write_term<T, float>(series, gradient, i, g, first, outputs, from, share);
    else
      write_term<T, double>(series, gradient, i, g, first, outputs, from, share);
  }
}

// Where few channel blocks would leave threads idle, strips are split into this many slices. Fixed, not the number of threads: the
// slices are summed in order, so results are the same bits for any number of threads.
constexpr int64_t grad_tasks = 32;

template <class T, class S>
void weight_grad(const Image& grad, const Image& input, const Series& series, const SeriesGradient& gradient,
                 const Geometry& g, const Threads& threads) {
  const Plan plan = forward_plan(g, input.height, input.width, grad.height, grad.width);
  Plan grad_plan = plan;  // the same grid, holding the gradient itself
  grad_plan.sources = {{0, 1, 0, 1}};
  grad_plan.source_height = grad.height;
  grad_plan.source_width = grad.width;
  grad_plan.min_row = grad_plan.max_row = grad_plan.min_col = grad_plan.max_col = 0;

  const int64_t s = g.group_size, m = g.outputs_per_group(), taps = g.taps();
  const std::vector<ChannelBlock> blocks = channel_blocks(g.groups(), s, m, taps, lanes<T>, sizeof(T));
  const bool by_lanes = s == 1 && m == 1 && input.stride_c == 1 && grad.stride_c == 1;
  int64_t plane_channels = by_lanes ? lanes<T> : 0, grad_channels = plane_channels;
  for (const ChannelBlock& block : blocks) {
    plane_channels = std::max(plane_channels, block.groups * s);
    grad_channels = std::max(grad_channels, block.blocks());
  }
  const int64_t count = blocks.size();
  const std::vector<Strip> all = plan_strips(plan, g.images, plane_channels + grad_channels, sizeof(T),
                                             ceil_div(grad_tasks, count));
  const int64_t slices = std::clamp<int64_t>(ceil_div(grad_tasks, count), 1, all.size());
  int64_t plane_size = 0, grad_size = 0;
  for (const Strip& strip : all) {
    plane_size = std::max(plane_size, plane_channels * Planes::of<T>(plan, strip).channel_stride);
    grad_size = std::max(grad_size, grad_channels * Planes::of<T>(grad_plan, strip).channel_stride);
  }
  const int64_t block_size = grad_channels * s * taps;
  std::vector<T> partial(slices > 1 ? slices * count * block_size : 0);
  std::vector<double> shares(gradient.gates ? count * max_terms : 0);

  // D of one block over the strips of one slice.
  auto accumulate = [&](const ChannelBlock& block, int64_t slice, T* planes_at, T* grads_at, T* to) {
    std::vector<int64_t> offsets(taps);
    std::vector<std::vector<int64_t>> input_tables(plan.sources.size()), grad_tables(1);
    std::fill_n(to, block.blocks() * s * taps, T(0));
    const int64_t strip_count = all.size();
    for (int64_t i = strip_count * slice / slices; i < strip_count * (slice + 1) / slices; i++) {
      const Strip& strip = all[i];
      const Planes planes = Planes::of<T>(plan, strip), grads = Planes::of<T>(grad_plan, strip);
      for (size_t k = 0; input.stride_c == 1 && k < plan.sources.size(); k++)
        source_table(input, plan, plan.sources[k], strip, planes, input_tables[k]);
      if (grad.stride_c == 1) source_table(grad, grad_plan, grad_plan.sources[0], strip, grads, grad_tables[0]);
      tap_offsets(plan, plan.targets[0], planes, offsets.data());
      const int64_t positions = ((strip.images - 1) * plan.row_pitch + strip.rows - 1) * plan.pitch + plan.cols;
      if (by_lanes) {
        load_lanes<T, S>(input, strip, input_tables, block.group, block.groups, planes_at);
        load_lanes<T, S>(grad, strip, grad_tables, block.group, block.groups, grads_at);
        even_parts(taps, max_lane_taps, [&](int64_t first, int64_t count) {
          with_constant<max_lane_taps>(count, [&](auto these) {
            correlate_lane_weights<T, these>(grads_at, planes_at, offsets.data() + first, positions, block.groups, to + first, taps);
          });
        });
        continue;
      }
      load_planes<T, S>(input, plan, strip, planes, input_tables, block.group * s, block.groups * s, planes_at);
      load_planes<T, S>(grad, grad_plan, strip, grads, grad_tables, block.group * m + block.output, block.blocks(),
                        grads_at);
      for (int64_t group = 0; group < block.groups; group++)
        even_parts(block.outputs, max_grad_outputs, [&](int64_t first, int64_t size) {
          const int64_t o = group * block.outputs + first;
          // Runs whose gradients stay in the first-level cache while every input channel and tap passes over them.
          even_parts(ceil_div(positions, lanes<T>), run_budget / ((size + 1) * GROSS_VECTOR_BYTES), [&](int64_t at, int64_t vectors) {
            const T* run = grads_at + o * grads.channel_stride + at * lanes<T>;
            for (int64_t j = 0; j < s; j++) {
              const T* plane = planes_at + (group * s + j) * planes.channel_stride + at * lanes<T>;
              with_constant<max_grad_outputs>(size, [&](auto outputs) {
                even_parts(taps, max_taps<outputs>, [&](int64_t first_tap, int64_t tap_count) {
                  with_constant<max_taps<outputs>>(tap_count, [&](auto these) {
                    correlate_weights<T, outputs, these>(run, grads.channel_stride, plane, offsets.data() + first_tap,
                                                         vectors, to + (o * s + j) * taps + first_tap, s * taps);
                  });
                });
              });
            }
          });
        });
    }
  };

  auto work = [&](int64_t begin, int64_t end) {
    T* const planes_at = scratch<T>(plane_size + grad_size + block_size);
    T* const grads_at = planes_at + plane_size;
    T* const block_at = grads_at + grad_size;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t b = unit / slices, slice = unit % slices;
      if (slices > 1) {
        accumulate(blocks[b], slice, planes_at, grads_at, partial.data() + unit * block_size);
      } else {
        accumulate(blocks[b], 0, planes_at, grads_at, block_at);
        write_gradients(series, gradient, g, blocks[b], block_at, gradient.gates ? &shares[b * max_terms] : nullptr);
      }
    }
  };
  run(threads, count * slices, work);
  if (slices > 1) {
    auto reduce = [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) {
        T* total = partial.data() + b * slices * block_size;
        for (int64_t slice = 1; slice < slices; slice++)
          for (int64_t k = 0; k < block_size; k++) total[k] += total[slice * block_size + k];
        write_gradients(series, gradient, g, blocks[b], total, gradient.gates ? &shares[b * max_terms] : nullptr);
      }
    };
    run(threads, count, reduce);
  }
  if (gradient.gates)
    for (int i = 0; i < series.active; i++) {
      gradient.gates[i] = 0;
      for (int64_t b = 0; b < count; b++) gradient.gates[i] += shares[b * max_terms + i];
    }
}

// Plain sum -------------------------------------------------------------------------------------------------------------------

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

// Entries ---------------------------------------------------------------------------------------------------------------------

template <class F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::float32: return f(float{});
    case Type::float64: return f(double{});
    case Type::bfloat16: return f(bfloat16{});
    case Type::float16: return f(float16{});
  }
}

inline void forward_entry(Type type, const Image& input, const Series& series, const Image& output, const Geometry& g,
                          const Threads& threads) {
  const Plan plan = forward_plan(g, input.height, input.width, output.height, output.width);
  with_type(type, [&](auto s) {
    using S = decltype(s);
    convolve<Sum<S>, S>(plan, input, series, output, g, false, threads);
  });
}

inline void input_grad_entry(Type type, const Image& grad, const Series& series, const Image& grad_input,
                             const Geometry& g, const Threads& threads) {
  const Plan plan = input_grad_plan(g, grad_input.height, grad_input.width, grad.height, grad.width);
  with_type(type, [&](auto s) {
    using S = decltype(s);
    convolve<Sum<S>, S>(plan, grad, series, grad_input, g, true, threads);
  });
}

inline void weight_grad_entry(Type type, const Image& grad, const Image& input, const Series& series,
                              const SeriesGradient& gradient, const Geometry& g, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    weight_grad<Sum<S>, S>(grad, input, series, gradient, g, threads);
  });
}

inline void sum_entry(const Series& series, int64_t count, void* output, const Threads& threads) {
  with_type(series.type, [&](auto s) {
    using S = decltype(s);
    sum<Sum<S>, S>(series, count, static_cast<S*>(output), threads);
  });
}

}  // namespace gross::cpu::GROSS_ISA
