// Convolutions that read the pixels of a channels-last tensor where they lie, without planes.
//
// Their kernels are three columns wide: the one left of, at and right of a pixel. An output vector
// reads one vector of source channels (group size 1, and those that divide the lanes), or channels
// that are broadcast. One load of a pixel serves two of its channels and three taps: 14 columns are
// 84 multiply–adds for 16 loads and 32 shuffles, and there is no copy, which takes long where group
// sizes are small.
#pragma once

#include "correlate.h"
#include "gradients.h"
#include "weights.h"

namespace gross::cpu::GROSS_ISA {

// Bytes of pixels that are read and written at once, for one vector of outputs after the other:
// they stay in the second-level cache.
constexpr int64_t rows_budget = 128 << 10;

// Rows of a kernel that is applied in place.
constexpr int max_kernel_rows = 7;

// One row of a kernel: target row i reads source row i · step + `row`, with the weights of columns
// −1, 0 and 1.
struct KernelRow {
  int64_t row;
  int64_t weight[3];
};

// One target of a plan in such rows: target column k reads the columns around k · step.
struct RowTarget {
  Lattice lattice;
  int64_t rows, cols, row_step, step;
  bool right;  // the last column reads the one beyond the border
  int taps;    // which columns the kernel has: 1 for −1, 2 for 0, 4 for 1
  std::vector<KernelRow> kernel;
};

// The plan's targets, where pixels can be read in place; none where they cannot.
template <class T, class S>
std::vector<RowTarget> row_targets(const Plan& plan, const Image& source, const Image& target_image,
                                   const Channels<T>& channels) {
  if (source.stride_c != 1 || target_image.stride_c != 1) return {};
  if (channels.fetch == Fetch::broadcast) {
    if (!std::is_same_v<S, T>) return {};
  } else {
    if (is_permuted(channels.fetch) && !std::is_same_v<S, float>) return {};
    // Over a whole vector: two channels' permutations, weights and sums take more than 16
    // registers.
    if (channels.fetch == Fetch::permuted && registers < 32) return {};
    // One vector of source channels, and all of its lanes.
    if (channels.together * channels.sources != lanes<T> ||
        channels.groups % channels.together != 0)
      return {};
    if (channels.fetch == Fetch::permuted && channels.sources % 2 != 0) return {};
    for (const LaneBlock& block : channels.blocks)
      if (block.lanes() != lanes<T>) return {};
  }
  std::vector<RowTarget> targets;
  for (const Target& target : plan.targets) {
    RowTarget rows{target.lattice,           target.rows, target.cols, plan.sources[0].row_step,
                   plan.sources[0].col_step, false,       0,           {}};
    const int64_t last = (target.cols - 1) * rows.step + 1;
    if (target.cols < 2 || last > source.width) return {};
    rows.right = last == source.width;
    for (const Tap& tap : target.taps) {
      const Lattice& lattice = plan.sources[tap.source];
      const int64_t row = lattice.first_row + tap.row * lattice.row_step,
                    col = lattice.first_col + tap.col * lattice.col_step;
      if (col < -1 || col > 1) return {};
      auto found = std::find_if(rows.kernel.begin(), rows.kernel.end(),
                                [&](const KernelRow& other) { return other.row == row; });
      if (found == rows.kernel.end()) found = rows.kernel.insert(found, {row, {}});
      found->weight[col + 1] = tap.index * lanes<T>;
      rows.taps |= 1 << (col + 1);
    }
    // Those of a kernel three columns wide at strides 1 and 2, and of its input gradient.
    if (!(rows.taps == 7 && rows.step <= 2) &&
        !(rows.step == 1 && (rows.taps == 2 || rows.taps == 3 || rows.taps == 6)))
      return {};
    // Downwards: the last row is what a later target row has yet to read.
    std::sort(rows.kernel.begin(), rows.kernel.end(),
              [](const KernelRow& a, const KernelRow& b) { return a.row < b.row; });
    if (rows.kernel.size() > max_kernel_rows) return {};
    targets.push_back(rows);
  }
  return targets;
}

// Whether the convolution has tiles for it, and is faster in place. In planes, tiles of several
// short rows are where few channels are added, and phases of one tap where channels are broadcast.
template <class T>
bool is_faster_in_place(const std::vector<RowTarget>& targets, const Channels<T>& channels) {
  auto faster = [&](const RowTarget& target) {
    if (channels.fetch == Fetch::lanes) return true;
    if (channels.fetch == Fetch::broadcast &&
        (target.taps != 7 || (target.cols < 7 && channels.sources < 32)))
      return false;
    return target.cols >= 4;  // the least of their tiles
  };
  return !targets.empty() && std::all_of(targets.begin(), targets.end(), faster);
}

// One vector of a pixel beyond the borders.
template <class T, class S>
inline constexpr S no_pixel[lanes<T>] = {};

// One row of source pixels; beyond the image's borders zeros that no offset leaves.
template <class S>
struct PixelRow {
  const S* at;
  int64_t pitch, mask;
};
// One row of a target, the source rows that it goes with, and rows of both that come later.
template <class S>
struct OutputRow {
  PixelRow<S> from[max_kernel_rows];
  S* to;
  const S *ahead, *ahead_to;
};

// The first source channel that a vector of outputs reads.
template <class T>
int64_t first_channel(const Channels<T>& channels, const LaneBlock& block) {
  const bool broadcasting = channels.fetch == Fetch::broadcast;
  return (broadcasting ? block.group : block.group / channels.together * channels.together) *
         channels.sources;
}

// What one vector of outputs is computed from.
template <class T>
struct RowStencil {
  const std::vector<KernelRow>& kernel;
  const T* weights;
  int64_t weight_stride;  // from one source channel to the next
  const Index<T>* permutation;
  int64_t sources;     // channels per output
  int64_t row_stride;  // from one source row to the next
  int64_t outputs;     // how many lanes have outputs
};

// Where in its rows a tile lies.
struct TileAt {
  int64_t from;   // in the source's rows: the column left of its first
  int64_t ahead;  // in the rows that come later: what memory is asked for
  int64_t to, to_pitch;
  bool left, right;  // whether the outermost columns lie beyond the border
};

// Source channel j of each lane's group, of groups of `Quad` channels within 16 bytes. With a
// constant j this is one instruction without an index.
template <class T, int Quad, int J, int... L>
GROSS_INLINE Vector<T> spread(Vector<T> v, std::integer_sequence<int, L...>) {
  return shuffle<T>(v, v, std::integer_sequence<int, (L / Quad * Quad + J)...>{});
}
template <class T, int Quad>
GROSS_INLINE Vector<T> spread(Vector<T> v, int j) {
  constexpr auto all = std::make_integer_sequence<int, lanes<T>>{};
  return j == 0   ? spread<T, Quad, 0>(v, all)
         : j == 1 ? spread<T, Quad, 1>(v, all)
         : j == 2 ? spread<T, Quad, 2>(v, all)
                  : spread<T, Quad, 3>(v, all);
}

// to[segment][column][lane] = Σ_row Σ_source Σ_tap weight[source][row, tap][lane] ·
// from[segment][row][step · column + tap][source], two source channels at a time: with four the
// chains of additions to one sum would be too long to overlap; one that is broadcast. Groups of
// `Quad` channels lie within 16 bytes.
template <class T, class S, Fetch fetch, int Quad, int Taps, int Step, int Columns, int Segments>
__attribute__((noinline)) void correlate_rows(const RowStencil<T>& stencil,
                                              const OutputRow<S>* rows, const TileAt& tile) {
  const T* const weights = stencil.weights;
  const auto [from, ahead, to, to_pitch, left, right] = tile;
  constexpr int together = is_permuted(fetch) ? 2 : 1, last = (Columns - 1) * Step + 2;
  // Beside 12 sums two weights and a pixel: with a third weight the compiler would keep sums in
  // memory. That one is an operand in memory.
  constexpr int kept = Segments * Columns + 4 > registers - 1 && fetch == Fetch::broadcast ? 2 : 3;
  Vector<T> sum[Segments][Columns]{};
  const int64_t count = stencil.kernel.size();
#pragma GCC unroll 8
  for (int segment = 0; segment < Segments; segment++)
#pragma GCC unroll 2
    for (int row = 0; row < Step; row++) {
      const S* at = rows[segment].ahead + ahead - row * stencil.row_stride;
#pragma GCC unroll 32
      for (int k = 0; k < Columns * Step; k++) __builtin_prefetch(at + k * lanes<T>, 0, 2);
    }
  for (int64_t r = 0; r < count; r++) {
    auto add = [&](int64_t j) __attribute__((always_inline)) {
      Vector<T> weight[together][3];
      const T* last_weight = weights + j * stencil.weight_stride + stencil.kernel[r].weight[2];
      [[maybe_unused]] Vector<Index<T>> index[together];
#pragma GCC unroll 2
      for (int i = 0; i < together; i++) {
#pragma GCC unroll 3
        for (int c = 0; c < kept; c++)
          if (Taps >> c & 1) {
            weight[i][c] =
                load<T>(weights + (j + i) * stencil.weight_stride + stencil.kernel[r].weight[c]);
            keep_in_register(weight[i][c]);
          }
        if constexpr (fetch == Fetch::permuted)
          __builtin_memcpy(&index[i], stencil.permutation + (j + i) * lanes<T>, sizeof index[i]);
      }
#pragma GCC unroll 8
      for (int segment = 0; segment < Segments; segment++) {
        const PixelRow<S>& row = rows[segment].from[r];
        if (!row.mask) continue;  // of a 4×4 map a sixth of the multiply–adds
        const S* at = row.at + (fetch == Fetch::broadcast ? from + j : from);
        // Or the compiler would load all pixels before a loop over channels, and keep them in
        // memory.
        asm volatile("" : "+r"(at));
#pragma GCC unroll 32
        for (int k = 0; k <= last; k++, at += row.pitch) {
          const bool beyond = (k == 0 && left) || (k == last && right);
          if (kept < 3 && beyond) continue;
          const S* const place = beyond ? no_pixel<T, S> : at;
          Vector<T> pixel;
          if constexpr (fetch == Fetch::broadcast)
            pixel = broadcast<T>(*place);
          else
            pixel = load<T>(place);
          keep_in_register(pixel);
#pragma GCC unroll 2
          for (int i = 0; i < together; i++) {
            Vector<T> value = pixel;
            if constexpr (fetch == Fetch::within_quads) value = spread<T, Quad>(pixel, j + i);
            if constexpr (fetch == Fetch::permuted) value = permute<T>(pixel, index[i]);
            if constexpr (is_permuted(fetch)) keep_in_register(value);
#pragma GCC unroll 3
            for (int c = 0; c < 3; c++)
              if ((Taps >> c & 1) && k >= c && (k - c) % Step == 0 && (k - c) / Step < Columns) {
                Vector<T> by = weight[i][c];
                if (c >= kept) {
                  asm volatile("" : "+r"(last_weight));
                  by = load<T>(last_weight);
                }
                sum[segment][(k - c) / Step] += value * by;
              }
          }
        }
      }
    };
    if constexpr (fetch == Fetch::permuted || fetch == Fetch::broadcast) {
      for (int64_t j = 0; j < stencil.sources; j += together) add(j);
    } else {
#pragma GCC unroll 2
      for (int j = 0; j < Quad; j += together) add(j);
    }
  }
#pragma GCC unroll 8
  for (int segment = 0; segment < Segments; segment++)
#pragma GCC unroll 16
    for (int k = 0; k < Columns; k++) {
      S* const at = rows[segment].to + to + k * to_pitch;
      if (fetch != Fetch::broadcast || stencil.outputs == lanes<T>)
        store<T>(at, sum[segment][k]);
      else
        store_first<T>(at, sum[segment][k], stencil.outputs);
    }
}

// Rows of a tile of so many columns. Where a pixel serves several channels 7 chains of additions
// are enough, and two rows of 7 columns are slower at stride 2; where it serves one, weights are
// read less often by larger tiles.
template <Fetch fetch, int columns>
constexpr int row_segments =
    fetch != Fetch::broadcast && columns >= 7 ? 1 : std::min(max_segments, max_sums / columns);

template <class T, class S>
struct RowTile {
  int64_t columns, segments;
  void (*correlate)(const RowStencil<T>&, const OutputRow<S>*, const TileAt&);
};
template <class T, class S, Fetch fetch, int Quad, int Taps, int Step>
RowTile<T, S> row_tile_of(int64_t width) {
  using Columns = std::conditional_t<
      fetch == Fetch::broadcast, std::integer_sequence<int, 16, 14, 8, 7, 4>,
      std::conditional_t<fetch == Fetch::lanes, std::integer_sequence<int, 14, 8, 7, 4, 2>,
                         std::integer_sequence<int, 14, 8, 7, 4>>>;
  return narrowest_tile<RowTile<T, S>>(width, Columns{}, [](auto columns) {
    constexpr int c = columns, segments = row_segments<fetch, c>;
    return RowTile<T, S>{c, segments, correlate_rows<T, S, fetch, Quad, Taps, Step, c, segments>};
  });
}
// Where channels are broadcast 16 registers hold 12 sums beside three weights and a pixel: two
// multiply–add units of four cycles' latency want eight at least, and each row of 7 columns alone
// would be less. Tiles of 12, 6, 4 and 3 columns make up any row of six or more, none computed
// twice.
constexpr bool by_twelve(Fetch fetch) { return registers < 32 && fetch == Fetch::broadcast; }
template <class T, class S, int Step>
RowTile<T, S> tile_of_twelve(int64_t rest) {
  auto tile = [](auto columns) {
    constexpr int c = columns, segments = 12 / c;
    return RowTile<T, S>{c, segments,
                         correlate_rows<T, S, Fetch::broadcast, 1, 7, Step, c, segments>};
  };
  if (rest % 4 == 3) return tile(std::integral_constant<int, 3>{});
  if (rest % 4 != 0 && rest >= 6) return tile(std::integral_constant<int, 6>{});
  return rest >= 12 ? tile(std::integral_constant<int, 12>{})
                    : tile(std::integral_constant<int, 4>{});
}
template <class T, class S, Fetch fetch, int Quad>
RowTile<T, S> row_tile_of(const RowTarget& target, int64_t rest) {
  const bool halves = target.step == 2;
  if constexpr (by_twelve(fetch)) {
    return halves ? tile_of_twelve<T, S, 2>(rest) : tile_of_twelve<T, S, 1>(rest);
  } else {
    if (halves) return row_tile_of<T, S, fetch, Quad, 7, 2>(target.cols);
    if constexpr (fetch != Fetch::broadcast) switch (target.taps) {
        case 2: return row_tile_of<T, S, fetch, Quad, 2, 1>(target.cols);
        case 3: return row_tile_of<T, S, fetch, Quad, 3, 1>(target.cols);
        case 6: return row_tile_of<T, S, fetch, Quad, 6, 1>(target.cols);
      }
    return row_tile_of<T, S, fetch, Quad, 7, 1>(target.cols);
  }
}
// The next tile of a row of which `rest` columns are left.
template <class T, class S>
RowTile<T, S> row_tile_for(const Channels<T>& channels, const RowTarget& target, int64_t rest) {
  if constexpr (std::is_same_v<S, float>) {
    if constexpr (registers == 32)
      if (channels.fetch == Fetch::permuted)
        return row_tile_of<T, S, Fetch::permuted, 2>(target, rest);
    if (channels.fetch == Fetch::within_quads)
      return channels.sources == 4 ? row_tile_of<T, S, Fetch::within_quads, 4>(target, rest)
                                   : row_tile_of<T, S, Fetch::within_quads, 2>(target, rest);
  }
  if constexpr (std::is_same_v<S, T>)
    if (channels.fetch == Fetch::broadcast)
      return row_tile_of<T, S, Fetch::broadcast, 1>(target, rest);
  return row_tile_of<T, S, Fetch::lanes, 1>(target, rest);
}

// The rows of targets, those of all images one after the other, in units that stay in the cache.
template <class T, class S>
struct RowUnits {
  const Image &source, &target_image;
  int64_t height, total, together, count;

  // Of a multiple of `even` rows each, if they are as many.
  RowUnits(const std::vector<RowTarget>& targets, const Image& source, const Image& target_image,
           int64_t images, int64_t at_least, int64_t even = 1)
      : source(source), target_image(target_image), height(0) {
    for (const RowTarget& target : targets) height = std::max(height, target.rows);
    total = images * height;
    const int64_t row_bytes = sizeof(S) *
                              (source.height * source.width * source.channels +
                               target_image.height * target_image.width * target_image.channels) /
                              height;
    together = std::max<int64_t>(
        1,
        std::min(round_up(std::max<int64_t>(1, rows_budget / row_bytes), even), total / at_least));
    count = ceil_div(total, together);
  }

  // The target's rows of one unit, and how many they are; the last of them follows them `segments`
  // − 1 times more, for tiles of so many rows.
  int64_t rows_of(int64_t unit, const RowTarget& target, int64_t segments,
                  std::vector<OutputRow<S>>& rows) const {
    const S* const from = static_cast<const S*>(source.data);
    S* const to = static_cast<S*>(target_image.data);
    auto target_row = [&](int64_t n, int64_t y) {
      return to + n * target_image.stride_n +
             (target.lattice.first_row + y * target.lattice.row_step) * target_image.stride_h +
             target.lattice.first_col * target_image.stride_w;
    };
    rows.clear();
    for (int64_t i = unit * together; i < std::min(total, (unit + 1) * together); i++) {
      const int64_t n = i / height, y = i % height, later = std::min(i + together, total - 1),
                    later_y = std::min(later % height, target.rows - 1);
      if (y >= target.rows) continue;
      OutputRow<S> row{};
      for (size_t r = 0; r < target.kernel.size(); r++) {
        const int64_t at = y * target.row_step + target.kernel[r].row;
        const bool inside = at >= 0 && at < source.height;
        row.from[r] =
            inside
                ? PixelRow<S>{from + n * source.stride_n + at * source.stride_h - source.stride_w,
                              source.stride_w, -1}
                : PixelRow<S>{no_pixel<T, S>, 0, 0};
      }
      row.to = target_row(n, y);
      row.ahead = from + later / height * source.stride_n +
                  std::clamp<int64_t>(later_y * target.row_step + target.kernel.back().row, 0,
                                      source.height - 1) *
                      source.stride_h;
      row.ahead_to = target_row(later / height, later_y);
      rows.push_back(row);
    }
    const int64_t different = rows.size();
    if (different) rows.insert(rows.end(), segments - 1, OutputRow<S>(rows.back()));
    return different;
  }
};

template <class T, class S>
void convolve_in_place(const std::vector<RowTarget>& targets, const Channels<T>& channels,
                       const Convolution& call, const Prepared<T>* prepared = nullptr) {
  const Image &source = call.source, &target_image = call.target;
  const Geometry& g = call.geometry;
  const Threads& threads = call.threads;
  const int64_t blocks = channels.blocks.size();
  Buffer<T> packed(prepared ? 0 : blocks * channels.packed);
  if (!prepared)
    pack_blocks<T, S>({call.series, g, channels}, channels.blocks, channels.packed, channels.summed,
                      packed.data(), threads);
  const T* const weights = prepared ? prepared->weights : packed.data();
  Epilogue<T> all = prepared ? prepared->epilogue : Epilogue<T>{};
  displaces<T, S>(all, target_image);

  // Tiles of 12 sums have rows that divide 12.
  const int64_t twelve = 12, even = by_twelve(channels.fetch) ? twelve : 1;
  const RowUnits<T, S> units(targets, source, target_image, g.images, 4 * threads.count, even);
  // A few rows are shared by blocks.
  const int64_t parts = std::clamp<int64_t>(4 * threads.count / units.count, 1, blocks);
  auto work = [&](int64_t begin, int64_t end) {
    std::vector<OutputRow<S>> rows;
    for (int64_t i = begin; i < end; i++)
      for (const RowTarget& target : targets) {
        const int64_t to_pitch = target.lattice.col_step * target_image.stride_w, part = i % parts;
        const int64_t different = units.rows_of(i / parts, target, max_segments, rows),
                      height = by_twelve(channels.fetch)
                                   ? twelve
                                   : row_tile_for<T, S>(channels, target, target.cols).segments;
        for (int64_t b = blocks * part / parts; b < blocks * (part + 1) / parts; b++) {
          const Epilogue<T> epilogue = all.from(b);
          const LaneBlock& block = channels.blocks[b];
          const RowStencil<T> stencil{target.kernel,       weights + b * channels.packed,
                                      g.taps() * lanes<T>, channels.permutation_of(b),
                                      channels.sources,    source.stride_h,
                                      block.lanes()};
          const int64_t channel = first_channel(channels, block);
          for (int64_t top = 0; top < different; top += height)
            for (int64_t k = 0, columns; k < target.cols; k += columns) {
              const RowTile<T, S> tile = row_tile_for<T, S>(channels, target, target.cols - k);
              columns = tile.columns;
              const int64_t col = std::min(k, target.cols - tile.columns),
                            end = std::min(different, top + height);
              for (int64_t first = top; first < end; first += tile.segments) {
                tile.correlate(stencil, &rows[first],
                               {col * target.step * source.stride_w + channel,
                                (b * target.cols + col) * target.step * lanes<T>,
                                col * to_pitch + block.first(channels), to_pitch, col == 0,
                                target.right && col + tile.columns == target.cols});
                if constexpr (std::is_same_v<S, T>)
                  for (int64_t r = first;
                       !epilogue.is_empty() && r < std::min(end, first + tile.segments); r++)
                    finish<T>(rows[r].to + col * to_pitch + block.first(channels), tile.columns,
                              to_pitch, epilogue, block.lanes());
              }
            }
        }
      }
  };
  run(threads, units.count * parts, work);
}

// D[source][row, tap][lane] += Σ_column grads[column][lane] · from[row][step · column +
// tap][source] over rows of gradients, for `Rows` rows of the kernel and `Sources` channels at a
// time: so many chains of additions that they overlap, and no more than registers hold. Channels
// are broadcast, or those of groups of `Quad`.
template <class T, class S>
struct RowWeights {
  const OutputRow<S>* rows;
  int64_t count;
  int64_t row_stride;  // from one source row to the next
  const std::vector<KernelRow>& kernel;
  int64_t sources;  // channels per output
  WeightSums<T> sums;
};
template <class T, class S, Fetch fetch, int Quad, int Sources, int Rows, int Step, int Columns>
__attribute__((noinline)) void correlate_row_weights(const RowWeights<T, S>& of,
                                                     const TileAt& tile) {
  const auto [from, ahead, to, to_pitch, left, right] = tile;
  constexpr int last = (Columns - 1) * Step + 2;
  auto add = [&](int first, int source) __attribute__((always_inline)) {
    Vector<T> sum[Rows][Sources][3]{};
    for (int64_t i = 0; i < of.count; i++) {
      const OutputRow<S>& row = of.rows[i];
      if (first == 0 && source == 0) {
#pragma GCC unroll 2
        for (int r = 0; r < Step; r++) {
          const S* at = row.ahead + ahead * Step - r * of.row_stride;
#pragma GCC unroll 32
          for (int k = 0; k < Columns * Step; k++) __builtin_prefetch(at + k * lanes<T>, 0, 2);
        }
#pragma GCC unroll 16
        for (int k = 0; k < Columns; k++)
          __builtin_prefetch(row.ahead_to + ahead + k * lanes<T>, 0, 2);
      }
      const PixelRow<S>* const pixels = row.from + first;
      if (Rows == 1 && !pixels->mask) continue;
      Vector<T> grad[Columns];
      auto load_grad = [&](int k) __attribute__((always_inline)) {
        Vector<T> loaded = load<T>(row.to + to + k * to_pitch);
        keep_in_register(loaded);
        grad[k] = loaded;
      };
      // All where registers hold them; else where its first tap meets each, three at a time.
      if constexpr (registers == 32) {
#pragma GCC unroll 16
        for (int k = 0; k < Columns; k++) load_grad(k);
      }
      const S* at[Rows];
#pragma GCC unroll 3
      for (int r = 0; r < Rows; r++)
        at[r] =
            pixels[r].at + ((fetch == Fetch::broadcast ? from + source : from) & pixels[r].mask);
#pragma GCC unroll 32
      for (int k = 0; k <= last; k++) {
        const bool beyond = (k == 0 && left) || (k == last && right);
        if (registers < 32 && k % Step == 0 && k / Step < Columns) load_grad(k / Step);
#pragma GCC unroll 3
        for (int r = 0; r < Rows; r++) {
          const S* const place = beyond ? no_pixel<T, S> : at[r];
          at[r] += pixels[r].pitch;
          if (fetch == Fetch::broadcast && beyond) continue;
          Vector<T> pixel;
          if constexpr (fetch == Fetch::lanes || registers == 32) {
            pixel = load<T>(place);
            keep_in_register(pixel);
          }
#pragma GCC unroll 4
          for (int j = 0; j < Sources; j++) {
            Vector<T> value;
            if constexpr (fetch == Fetch::broadcast) {
              value = broadcast<T>(place[j]);
            } else if constexpr (fetch == Fetch::within_quads) {
              if constexpr (registers < 32) {
                // Loaded with each permutation: there is no register to keep it in.
                const S* again = place;
                asm volatile("" : "+r"(again));
                pixel = load<T>(again);
              }
              value = spread<T, Quad>(pixel, source + j);
            } else {
              value = pixel;
            }
            if constexpr (fetch != Fetch::lanes) keep_in_register(value);
#pragma GCC unroll 3
            for (int c = 0; c < 3; c++)
              if (k >= c && (k - c) % Step == 0 && (k - c) / Step < Columns)
                sum[r][j][c] += grad[(k - c) / Step] * value;
          }
        }
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
      for (int j = 0; j < Sources; j++)
#pragma GCC unroll 3
        for (int c = 0; c < 3; c++) {
          T* const at = of.sums.at + (source + j) * of.sums.stride + of.kernel[first + r].weight[c];
          store<T>(at, load<T>(at) + sum[r][j][c]);
        }
  };
  for (int first = 0; first < 3; first += Rows)
    if constexpr (fetch == Fetch::broadcast) {
      for (int source = 0; source < of.sources; source += Sources) add(first, source);
    } else {
#pragma GCC unroll 4
      for (int source = 0; source < Quad; source += Sources) add(first, source);
    }
}

template <class T, class S>
struct RowWeightsTile {
  int64_t columns;
  void (*correlate)(const RowWeights<T, S>&, const TileAt&);
};
// The next tile of a row of which `rest` columns are left: one that divides them, or the widest.
template <class T, class S, Fetch fetch, int Quad, int Sources, int Rows>
RowWeightsTile<T, S> row_weights_tile(int64_t rest, int64_t step) {
  constexpr int sums = Rows * Sources * 3;
  static_assert(sums + 3 + 1 <= registers, "sums, gradients and a value");
  RowWeightsTile<T, S> tile{};
  auto consider = [&](auto columns, bool divides) {
    constexpr int c = columns;
    if (registers == 32 && sums + c + 2 > registers && c > 4) return;
    if (!tile.correlate && (divides ? c > 4 && rest % c == 0 : c <= rest))
      tile = {c, step == 1 ? correlate_row_weights<T, S, fetch, Quad, Sources, Rows, 1, c>
                           : correlate_row_weights<T, S, fetch, Quad, Sources, Rows, 2, c>};
  };
  auto consider_all = [&](auto... columns) {
    (consider(columns, true), ...);
    (consider(columns, false), ...);
  };
  consider_all(std::integral_constant<int, 14>{}, std::integral_constant<int, 8>{},
               std::integral_constant<int, 7>{}, std::integral_constant<int, 4>{},
               std::integral_constant<int, 2>{}, std::integral_constant<int, 1>{});
  return tile;
}
template <class T, class S>
RowWeightsTile<T, S> row_weights_tile(const Channels<T>& channels, int64_t rest, int64_t step) {
  constexpr Fetch quads = Fetch::within_quads;
  constexpr int of_two = registers == 32 ? 2 : 1;
  if constexpr (std::is_same_v<S, float>)
    if (channels.fetch == quads)
      return channels.sources == 4 ? row_weights_tile<T, S, quads, 4, 4, 1>(rest, step)
                                   : row_weights_tile<T, S, quads, 2, of_two, 3>(rest, step);
  if constexpr (std::is_same_v<S, T>)
    if (channels.fetch == Fetch::broadcast)
      return row_weights_tile<T, S, Fetch::broadcast, 1, 4, 1>(rest, step);
  return row_weights_tile<T, S, Fetch::lanes, 1, 1, 3>(rest, step);
}

// Whether the weight gradient can be computed in place, and is faster so: kernels of 3 × 3 at group
// size 1, within 16 bytes or, where channels are broadcast four at a time, where planes would have
// runs of one tap, or rows beyond the borders are many.
template <class T>
bool has_row_weights(const std::vector<RowTarget>& targets, const Channels<T>& channels) {
  if (targets.size() != 1 || targets[0].kernel.size() != 3 || targets[0].taps != 7) return false;
  if (channels.fetch != Fetch::broadcast)
    return channels.fetch == Fetch::lanes || channels.fetch == Fetch::within_quads;
  return registers < 32 && channels.sources % std::max(4, lanes<T>) == 0 &&
         channels.outputs % lanes<T> == 0 && (targets[0].step == 2 || targets[0].cols <= 4);
}

// Rows whose pixels are those of `rows`, `channels` channels of each from `channel` on, one pixel
// after the other in `to`: where they lie, pixels of a power of two of channels fall on few sets of
// the first-level cache, and channels that are broadcast four at a time read them often.
template <class T, class S>
void gather_rows(const std::vector<OutputRow<S>>& rows, int64_t width, int64_t channel,
                 int64_t channels, S* to, std::vector<OutputRow<S>>& gathered) {
  gathered = rows;
  for (size_t i = 0; i < rows.size(); i++)
    for (int r = 0; r < 3; r++) {
      const PixelRow<S>& from = rows[i].from[r];
      PixelRow<S>& row = gathered[i].from[r];
      if (!from.mask) continue;
      if (i && r == 0 && from.at == rows[i - 1].from[2].at) {
        row = gathered[i - 1].from[2];
        continue;
      }
      row = {to - channels, channels, -1};
      const S* pixel = from.at + from.pitch + channel;
      for (int64_t k = 0; k < width; k++, pixel += from.pitch)
        for (int64_t c = 0; c < channels; c += lanes<T>, to += lanes<T>)
          store<T>(to, load<T>(pixel + c));
    }
}

template <class T, class S>
void weight_grad_in_place(const RowTarget& target, const Channels<T>& channels,
                          const WeightGradient& call) {
  const Image &grad = call.grad, &input = call.input;
  const Geometry& g = call.geometry;
  const int64_t blocks = channels.blocks.size(), packed = channels.packed;
  const bool gathering = channels.fetch == Fetch::broadcast;
  const RowUnits<T, S> units({target}, input, grad, g.images, 1);
  // No more slices than their sums, which are written and read, are small beside the tensors.
  const int64_t pixels =
      input.height * input.width * input.channels + grad.height * grad.width * grad.channels;
  const int64_t slices = std::min(
      units.count, std::clamp<int64_t>(g.images * pixels / (2 * blocks * packed), 8, grad_tasks));
  // So many rows of a tile stay in the first-level cache while every source channel and row of the
  // kernel passes over them.
  const int64_t column_bytes =
      target.step * target.step * (gathering ? channels.sources : lanes<T>)*sizeof(S) +
      GROSS_VECTOR_BYTES;
  Buffer<T> partial(slices * blocks * packed);
  auto work = [&](int64_t begin, int64_t end) {
    std::vector<OutputRow<S>> rows, gathered;
    S* const pixels_of_group =
        gathering ? scratch<S>(3 * units.together * input.width * channels.sources) : nullptr;
    for (int64_t slice = begin; slice < end; slice++) {
      T* const sums = partial.data() + slice * blocks * packed;
      std::fill_n(sums, blocks * packed, T(0));
      for (int64_t unit = units.count * slice / slices; unit < units.count * (slice + 1) / slices;
           unit++) {
        const int64_t count = units.rows_of(unit, target, 1, rows);
        for (int64_t b = 0; b < blocks; b++) {
          const LaneBlock& block = channels.blocks[b];
          const int64_t channel = first_channel(channels, block);
          if (gathering && block.output == 0)
            gather_rows<T>(rows, input.width, channel, channels.sources, pixels_of_group, gathered);
          const OutputRow<S>* const read = gathering ? gathered.data() : rows.data();
          for (int64_t col = 0, columns; col < target.cols; col += columns) {
            const RowWeightsTile<T, S> tile =
                row_weights_tile<T, S>(channels, target.cols - col, target.step);
            columns = tile.columns;
            const int64_t most = std::max<int64_t>(1, run_budget / (columns * column_bytes));
            for (int64_t i = 0; i < count; i += most)
              tile.correlate(
                  {read + i,
                   std::min(most, count - i),
                   input.stride_h,
                   target.kernel,
                   channels.sources,
                   {sums + b * packed, g.taps() * lanes<T>}},
                  {gathering ? col * target.step * channels.sources
                             : col * target.step * input.stride_w + channel,
                   (b * target.cols + col) * lanes<T>, col * grad.stride_w + block.first(channels),
                   grad.stride_w, col == 0, target.right && col + columns == target.cols});
          }
        }
      }
    }
  };
  run(call.threads, slices, work);
  GradientBlocks<T> output(channels, {call.series, call.gradient, g});
  output.write_slices(partial.data(), slices, call.threads);
  output.write_gates();
}

}  // namespace gross::cpu::GROSS_ISA
