// The inner loop of the convolution and of its input gradient, and its tiles.
//
// Along a row of the kernel one vector of source channels serves three multiply–adds: 14 columns ×
// 3 taps are 42 multiply–adds for 19 loads, at any group size.
#pragma once

#include "channels.h"
#include "epilogue.h"
#include "memory.h"
#include "planes.h"
#include "vector.h"

namespace gross::cpu::GROSS_ISA {

// Consecutive columns of one kernel row (within a phase): tap c reads `offset` + c positions
// further, with weight[c].
constexpr int max_run = 3;
struct Run {
  int64_t offset;  // elements from the position written
  int64_t length;
  int64_t weight[max_run];  // elements from the source channel's weights
};

// Runs by length: `longest` of 3, then `middle` of 2, then those of 1.
struct Runs {
  std::vector<Run> all;
  int64_t longest = 0, middle = 0;
};

// The taps of a target as runs.
template <class T>
Runs runs_of(const Target& target, const Planes& planes) {
  const Plan& plan = *planes.plan;
  struct Entry {
    int64_t offset, weight;
  };
  std::vector<Entry> entries;
  for (const Tap& tap : target.taps)
    entries.push_back(
        {tap.source * planes.source_stride +
             ((tap.row - plan.min_row) * plan.pitch + tap.col - plan.min_col) * lanes<T>,
         tap.index * lanes<T>});
  std::sort(entries.begin(), entries.end(),
            [](const Entry& a, const Entry& b) { return a.offset < b.offset; });
  Runs runs;
  for (const Entry& entry : entries) {
    std::vector<Run>& all = runs.all;
    const bool follows = !all.empty() && all.back().length < max_run &&
                         entry.offset == all.back().offset + all.back().length * lanes<T>;
    if (!follows) all.push_back({entry.offset, 0, {}});
    all.back().weight[all.back().length++] = entry.weight;
  }
  std::stable_sort(runs.all.begin(), runs.all.end(),
                   [](const Run& a, const Run& b) { return a.length > b.length; });
  for (const Run& run : runs.all) {
    runs.longest += run.length == 3;
    runs.middle += run.length == 2;
  }
  return runs;
}

// What one vector of outputs is computed from: source channels, taps and weights.
template <class T>
struct Stencil {
  const T* planes;        // of its first source channel
  int64_t vector_stride;  // from one vector of source channels to the next
  int64_t sources;        // channels per output
  const Runs& runs;
  const T* weights;
  int64_t weight_stride;  // from one source channel, or pair of them, to the next
  const Index<T>* permutation;
  int64_t together = 1;  // source channels that a lane holds: itself and those of its next ones
};

template <class T, Fetch fetch>
GROSS_INLINE Vector<T> fetched(const T* from, [[maybe_unused]] Vector<Index<T>> index) {
  if constexpr (fetch == Fetch::broadcast)
    return broadcast<T>(*from);
  else if constexpr (fetch == Fetch::within_quads)
    return permute_within_quads<T>(load<T>(from), index);
  else if constexpr (fetch == Fetch::permuted)
    return permute<T>(load<T>(from), index);
  else
    return load<T>(from);
}

// One run of taps for one source channel: each fetched vector serves every tap that reads it.
template <class T, Fetch fetch, Product product, int Columns, int Segments, int Length>
GROSS_INLINE void add_run(const T* const* from, int64_t offset, const T* weights, const Run& run,
                          Vector<Index<T>> index, Vector<T> (&sum)[Segments][Columns]) {
  Vector<T> weight[Length];
#pragma GCC unroll 4
  for (int c = 0; c < Length; c++) {
    weight[c] = load<T>(weights + run.weight[c]);
    keep_in_register(weight[c]);
  }
#pragma GCC unroll 8
  for (int segment = 0; segment < Segments; segment++)
#pragma GCC unroll 32
    for (int k = 0; k < Columns + Length - 1; k++) {
      Vector<T> value = fetched<T, fetch>(from[segment] + offset + k * lanes<T>, index);
      if constexpr (Length > 1) keep_in_register(value);
#pragma GCC unroll 4
      for (int c = 0; c < Length; c++)
        if (k - c >= 0 && k - c < Columns)
          multiply_add<product, T>(sum[segment][k - c], value, weight[c]);
    }
}

// to[segment][column][lane] = Σ_source Σ_tap weight[source][tap][lane] · from[segment][column +
// tap][source].
template <class T, Fetch fetch, Product product, int Columns, int Segments>
__attribute__((noinline)) void correlate(const Stencil<T>& stencil, const T* const* from,
                                         T* const* to, int64_t col_stride) {
  Vector<T> sum[Segments][Columns]{};
  const T* weights = stencil.weights;
  for (int64_t first = 0, plane = 0; first < stencil.sources;
       first += lanes<T>, plane += stencil.vector_stride)
    for (int64_t j = 0; j < std::min<int64_t>(lanes<T>, stencil.sources - first);
         j += stencil.together, weights += stencil.weight_stride) {
      Vector<Index<T>> index{};
      if constexpr (is_permuted(fetch))
        __builtin_memcpy(&index, stencil.permutation + j * lanes<T>, sizeof index);
      const int64_t channel = plane + (fetch == Fetch::broadcast ? j : 0);
      // A loop for each length: branches within one loop made the compiler share code between them.
      const Run* run = stencil.runs.all.data();
      for (const Run* end = run + stencil.runs.longest; run != end; run++)
        add_run<T, fetch, product, Columns, Segments, 3>(from, channel + run->offset, weights, *run,
                                                         index, sum);
      for (const Run* end = run + stencil.runs.middle; run != end; run++)
        add_run<T, fetch, product, Columns, Segments, 2>(from, channel + run->offset, weights, *run,
                                                         index, sum);
      for (const Run* end = stencil.runs.all.data() + stencil.runs.all.size(); run != end; run++)
        add_run<T, fetch, product, Columns, Segments, 1>(from, channel + run->offset, weights, *run,
                                                         index, sum);
    }
#pragma GCC unroll 8
  for (int segment = 0; segment < Segments; segment++)
#pragma GCC unroll 16
    for (int k = 0; k < Columns; k++) store<T>(to[segment] + k * col_stride, sum[segment][k]);
}

// A tile: so many columns of so many row segments at once. Segments shorter than a row overlap at
// its end.
template <class T>
struct Tile {
  int64_t columns, segments;
  void (*correlate)(const Stencil<T>&, const T* const* from, T* const* to, int64_t col_stride);
};
constexpr int max_segments = 8, max_columns = 16;

// Sums that the registers hold beside a fetched vector and the weights of a run.
constexpr int max_sums = registers == 32 ? 16 : 8;

// Of tiles of so many columns, as make(columns) has them, the one that computes a row of `width`
// columns with the fewest of them twice.
template <class Made, class Make, int... Columns>
Made narrowest_tile(int64_t width, std::integer_sequence<int, Columns...>, Make make) {
  Made best{};
  int64_t least = 0;
  auto consider = [&](auto columns) {
    constexpr int c = columns;
    if constexpr (c <= max_sums) {
      const int64_t computed = round_up(width, c);
      if (c <= width && (!best.correlate || computed < least)) {
        least = computed;
        best = make(columns);
      }
    }
  };
  (consider(std::integral_constant<int, Columns>{}), ...);
  return best;
}

template <class T, Fetch fetch, Product product>
Tile<T> tile_of(int64_t width) {
  return narrowest_tile<Tile<T>>(
      width, std::integer_sequence<int, 16, 14, 8, 7, 4, 2, 1>{}, [](auto columns) {
        constexpr int c = columns, segments = std::min(max_segments, max_sums / c);
        return Tile<T>{c, segments, correlate<T, fetch, product, c, segments>};
      });
}
template <class T, Product product = Product::numbers>
Tile<T> tile_for(Fetch fetch, int64_t width) {
  switch (fetch) {
    case Fetch::lanes: return tile_of<T, Fetch::lanes, product>(width);
    case Fetch::within_quads: return tile_of<T, Fetch::within_quads, product>(width);
    case Fetch::permuted: return tile_of<T, Fetch::permuted, product>(width);
    default: return tile_of<T, Fetch::broadcast, product>(width);
  }
}

// A stretch of `Tile::columns` columns of one row: where it starts in a plane, and in the tensor
// from the strip's first image on.
struct Segment {
  int64_t from, to;
};
template <class T>
void segments_of(const Image& image, const Plan& plan, const Target& target, const Strip& strip,
                 int64_t columns, std::vector<Segment>& segments) {
  segments.clear();
  const Lattice& lattice = target.lattice;
  for (int64_t i = 0; i < strip.images; i++)
    for (int64_t r = 0; r < std::min(strip.rows, target.rows - strip.row); r++)
      for (int64_t at = 0; at < target.cols; at += columns) {
        const int64_t k = std::min(at, target.cols - columns);
        segments.push_back(
            {((i * plan.row_pitch + r) * plan.pitch + k) * lanes<T>,
             i * image.stride_n +
                 (lattice.first_row + (strip.row + r) * lattice.row_step) * image.stride_h +
                 (lattice.first_col + k * lattice.col_step) * image.stride_w});
      }
}

// Strips of as many rows, or images, as fit the budget; fewer where threads would be idle.
inline std::vector<Strip> plan_strips(const Plan& plan, int64_t images, int64_t position_size,
                                      int64_t at_least) {
  const int64_t positions = std::max<int64_t>(
      plane_budget / (position_size * static_cast<int64_t>(plan.sources.size())), plan.pitch);
  const int64_t image_positions = plan.row_pitch * plan.pitch;
  int64_t rows = std::clamp<int64_t>(positions / plan.pitch - plan.halo(), 1, plan.rows);
  int64_t together =
      rows == plan.rows ? std::clamp<int64_t>(positions / image_positions, 1, images) : 1;
  if (ceil_div(images, together) < at_least) together = std::max<int64_t>(1, images / at_least);
  if (together == 1 && images * ceil_div(plan.rows, rows) < at_least)
    rows =
        std::max<int64_t>(std::min(rows, plan.halo() + 1), plan.rows / ceil_div(at_least, images));
  rows = std::clamp<int64_t>(rows, 1, plan.rows);
  // Equal strips: a short last one would waste its halo.
  if (rows < plan.rows) rows = ceil_div(plan.rows, ceil_div(plan.rows, rows));
  if (together > 1) together = ceil_div(images, ceil_div(images, together));
  return strips(images, plan.rows, rows, together);
}

// Where one vector of outputs goes: to `to` + Segment::to, columns `col_stride` apart.
template <class T>
struct Whole {
  T* to;
  int64_t col_stride;
  const T* ahead = nullptr;  // what memory is asked for meanwhile, at the same places from here on
  const Epilogue<T>* epilogue = nullptr;
};

// All tiles of one target for one vector of outputs.
template <class T>
GROSS_INLINE void correlate_tiles(const Stencil<T>& stencil, const Tile<T>& tile,
                                  const std::vector<Segment>& segments, const Whole<T>& target) {
  const auto [to, col_stride, ahead, epilogue] = target;
  const int64_t count = segments.size();
  auto segment = [&](int64_t i) -> const Segment& { return segments[std::min(i, count - 1)]; };
  for (int64_t first = 0; first < count; first += tile.segments) {
    const T* sources[max_segments];
    T* targets[max_segments];
    for (int64_t i = 0; i < tile.segments; i++) {
      sources[i] = stencil.planes + segment(first + i).from;
      targets[i] = to + segment(first + i).to;
    }
    // The next tile's lines are fetched for writing meanwhile.
    if (first + tile.segments < count)
      for (int64_t i = 0; i < tile.segments; i++)
        for (int64_t k = 0; k < tile.columns; k++)
          __builtin_prefetch(to + segment(first + tile.segments + i).to + k * col_stride, 1);
    if (ahead)
      for (int64_t i = 0; i < tile.segments; i++)
        for (int64_t k = 0; k < tile.columns; k++)
          __builtin_prefetch(ahead + segment(first + i).to + k * col_stride, 0, 2);
    tile.correlate(stencil, sources, targets, col_stride);
    if (epilogue)
      for (int64_t i = 0; i < std::min(tile.segments, count - first); i++)
        finish<T>(targets[i], tile.columns, col_stride, *epilogue);
  }
}

// Rows of a residual, and where its segments are.
template <class T, class S>
struct Finishing {
  const Epilogue<T>* epilogue = nullptr;
  TensorRow<const S> residual{};
  const std::vector<Segment>* segments = nullptr;
};

// The same through `spare`, tile by tile; done(segment, sums) takes those of a segment.
template <class T, class Done>
GROSS_INLINE void correlate_through(const Stencil<T>& stencil, const Tile<T>& tile,
                                    const std::vector<Segment>& segments, T* spare, Done done) {
  const int64_t count = segments.size();
  for (int64_t first = 0; first < count; first += tile.segments) {
    const T* sources[max_segments];
    T* targets[max_segments];
    for (int64_t i = 0; i < tile.segments; i++) {
      sources[i] = stencil.planes + segments[std::min(first + i, count - 1)].from;
      targets[i] = spare + i * tile.columns * lanes<T>;
    }
    tile.correlate(stencil, sources, targets, lanes<T>);
    for (int64_t i = 0; i < std::min(tile.segments, count - first); i++)
      done(first + i, targets[i]);
  }
}

// The same to a tensor that does not hold whole vectors of channels in the sum's type.
template <class T, class S>
void correlate_converted(const Stencil<T>& stencil, const Tile<T>& tile,
                         const std::vector<Segment>& segments, const TensorRow<S>& target, T* spare,
                         const Finishing<T, S>& finishing = {}) {
  const auto& [epilogue, residual, residual_segments] = finishing;
  correlate_through(stencil, tile, segments, spare, [&](int64_t segment, T* sums) {
    if (epilogue) {
      const S* const others =
          epilogue->residual ? residual.at + (*residual_segments)[segment].to : nullptr;
      finish_sums<T>(sums, tile.columns, lanes<T>, *epilogue, [&](int64_t k) {
        return load_strided<T>(others + k * residual.col_stride, residual.channel_stride,
                               residual.channels);
      });
    }
    TensorRow<S> row = target;
    row.at += segments[segment].to;
    store_columns<T>(sums, tile.columns, row);
  });
}

}  // namespace gross::cpu::GROSS_ISA
