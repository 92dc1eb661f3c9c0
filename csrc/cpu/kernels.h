// The kernels, written once for every instruction set: included by portable.cpp, avx2.cpp and
// avx512.cpp.
//
// Lanes are consecutive output channels. A source channel reaches them as a broadcast where all of
// them are of one group, and as a permutation of one vector of source channels where they are of
// several. Along a row of the kernel one such vector serves three multiply–adds: 14 columns × 3
// taps are 42 multiply–adds for 19 loads, at any group size.
#include "vector.h"

#include "planes.h"

namespace gross::cpu::GROSS_ISA {

// Bytes that one thread's planes, and its assembled weights, may take: both stay in a 1 MB
// second-level cache.
constexpr int64_t plane_budget = 384 << 10, weight_budget = 256 << 10;
// Vectors of outputs that are computed from the pixels read at once. Of two at a time the weight
// gradient of 64 channels at 56×56 (s = 4) took 7.4 instead of 4.2 ms: a pixel's neighbouring lines
// were fetched in passes far apart.
constexpr int64_t set_vectors = 8;
// Bytes of planes that the weight gradient passes over at once: three quarters of a 32 KB
// first-level cache.
constexpr int64_t run_budget = 24 << 10;

// Memory aligned like pages. Tests define GROSS_POISON: what is read before it is written must
// show, as NaN.
class Block {
 public:
  Block() = default;
  explicit Block(size_t size) : memory_(std::aligned_alloc(4096, size)), size_(size) {
    if (!memory_) throw std::bad_alloc();
  }
  Block(Block&& other) noexcept { *this = std::move(other); }
  Block& operator=(Block&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Block() { std::free(memory_); }

  size_t size() const { return size_; }
  void* memory() const {
#ifdef GROSS_POISON
    std::memset(memory_, 0xff, size_);
#endif
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Memory of one thread, kept from call to call and grown as needed; contents are not kept.
template <class T>
T* scratch(int64_t count) {
  static thread_local Block block;
  const size_t need = round_up(count * sizeof(T), 4096);
  if (block.size() < need) {
    block = Block();
    block = Block(need);
  }
  return static_cast<T*>(block.memory());
}

// Memory of one call; contents are undefined. The calling thread keeps the two last blocks: fresh
// pages cost more than what is written to them (8 MB: 1 to 2 ms).
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t need = round_up(std::max<int64_t>(count, 1) * sizeof(T), 4096);
    for (Block& block : spare())
      if (block.size() >= need && (!block_.size() || block.size() < block_.size()))
        std::swap(block, block_);
    if (!block_.size()) block_ = Block(need);
    memory_ = static_cast<T*>(block_.memory());
  }
  ~Buffer() {
    Block* smallest = &spare()[0];
    for (Block& block : spare())
      if (block.size() < smallest->size()) smallest = &block;
    if (smallest->size() < block_.size()) std::swap(*smallest, block_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return memory_; }

 private:
  static Block (&spare())[2] {
    static thread_local Block blocks[2];
    return blocks;
  }
  Block block_;
  T* memory_;
};

// Split `count` into as few parts of at most `most` as possible, of nearly equal size; calls
// f(begin, size).
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

// Channels ----------------------------------------------------------------------------------------

// How source channels reach the lanes: each lane its own, a permutation of a vector (within 16
// bytes or over all of it), or one channel for all lanes.
enum class Fetch { lanes, within_quads, permuted, broadcast };

constexpr bool is_permuted(Fetch fetch) {
  return fetch == Fetch::within_quads || fetch == Fetch::permuted;
}

// One direction of the grouped convolution. Backward, sources are the outputs of the forward
// convolution and outputs its inputs.
struct Direction {
  bool backward;
  int64_t groups, sources, outputs;  // sources and outputs per group

  Direction(const Geometry& g, bool backward)
      : backward(backward),
        groups(g.groups()),
        sources(backward ? g.outputs_per_group() : g.group_size),
        outputs(backward ? g.group_size : g.outputs_per_group()) {}
};

// A convolution of single pixels with all channels.
inline bool is_pointwise(const Geometry& g) {
  return g.taps() == 1 && g.groups() == 1 && g.stride_h == 1 && g.stride_w == 1 &&
         g.padding_h == 0 && g.padding_w == 0;
}

// The outputs of one vector of lanes: `outputs` of each of `groups` groups, from `output` on.
struct LaneBlock {
  int64_t group, groups, output, outputs;

  int64_t lanes() const { return groups * outputs; }
  int64_t first(const Direction& d) const { return group * d.outputs + output; }
};

// How the channels of one direction fall on lanes. A cluster is as many groups as have their
// sources in one vector, or one group whose sources take several. A block is as many groups of a
// cluster as have their outputs in one vector, or a part of one group.
template <class T>
struct Channels : Direction {
  int64_t together, per_block;  // groups of a cluster, and of a block
  int64_t vectors;              // of source channels of a cluster
  Fetch fetch;
  std::vector<LaneBlock> blocks;
  int64_t packed, summed;  // numbers that the weights of a block take, packed and as rows

  // With pairs, a source is two channels in one lane.
  Channels(const Geometry& g, bool backward, Product product = Product::numbers)
      : Direction(g, backward) {
    constexpr int64_t n = lanes<T>;
    if (product == Product::pairs) sources /= 2;
    together = std::clamp<int64_t>(n / sources, 1, groups);
    vectors = ceil_div(together * sources, n);
    per_block = std::clamp<int64_t>(n / outputs, 1, together);
    fetch = per_block == 1                 ? Fetch::broadcast
            : sources == 1 && outputs == 1 ? Fetch::lanes
                                           : Fetch::permuted;
    for (int64_t first = 0; first < groups; first += together)
      for (int64_t group = first, end = std::min(groups, first + together); group < end;
           group += per_block)
        for (int64_t output = 0; output < outputs; output += n)
          blocks.push_back(
              {group, std::min(per_block, end - group), output, std::min(n, outputs - output)});
    packed = sources * g.taps() * n;
    summed = per_block * std::min(outputs, n) * sources * g.taps();
    if (!is_permuted(fetch)) return;
    permutation.assign(ceil_div(together, per_block) * sources * n, 0);
    for (int64_t group = 0; group < together; group++)
      for (int64_t j = 0; j < sources; j++)
        for (int64_t l = 0; l < outputs; l++)
          permutation[(group / per_block * sources + j) * n + group % per_block * outputs + l] =
              static_cast<Index<T>>(group * sources + j);
    constexpr int64_t quad = 16 / sizeof(T);
    if (sources == outputs && quad % sources == 0) fetch = Fetch::within_quads;
  }

  int64_t cluster(int64_t block) const { return blocks[block].group / together; }
  int64_t clusters(int64_t first, int64_t last) const {
    return cluster(last - 1) - cluster(first) + 1;
  }

  // Of a block that is part of one group: its first source's lane in the cluster's vector.
  int64_t first_lane(int64_t block) const {
    return fetch == Fetch::broadcast ? blocks[block].group % together * sources : 0;
  }
  // Of a block of several groups, [source][lane]: where in the cluster's vector the lane finds that
  // source of its group.
  const Index<T>* permutation_of(int64_t block) const {
    if (!is_permuted(fetch)) return nullptr;
    return permutation.data() + blocks[block].group % together / per_block * sources * lanes<T>;
  }

 private:
  std::vector<Index<T>> permutation;
};

// `channels` in vectors, a new one every `cluster` channels.
template <class T>
std::vector<LaneBlock> vectors_of(int64_t channels, int64_t cluster) {
  std::vector<LaneBlock> vectors;
  for (int64_t start = 0; start < channels; start += cluster)
    for (int64_t at = start, end = std::min(channels, start + cluster); at < end; at += lanes<T>)
      vectors.push_back({0, 1, at, std::min<int64_t>(lanes<T>, end - at)});
  return vectors;
}

// Blocks [first, last) of channels that a thread works on together: their pixels are read at once,
// and their weights assembled.
struct Set {
  int64_t first, last;
};
template <class T>
std::vector<Set> sets_of(const Channels<T>& channels, int64_t vectors, int64_t at_least) {
  const int64_t count = channels.blocks.size();
  const int64_t most = std::clamp<int64_t>(
      weight_budget / static_cast<int64_t>(channels.packed * sizeof(T)), 1, vectors);
  const int64_t parts = std::min(count, std::max(at_least, ceil_div(count, most)));
  std::vector<Set> sets;
  for (int64_t i = 0; i < parts; i++) sets.push_back({count * i / parts, count * (i + 1) / parts});
  return sets;
}
// Vectors of source channels that the largest set reads.
template <class T>
int64_t source_vectors(const Channels<T>& channels, const std::vector<Set>& sets) {
  int64_t most = 0;
  for (const Set& set : sets)
    most = std::max(most, channels.clusters(set.first, set.last) * channels.vectors);
  return most;
}
inline int64_t largest(const std::vector<Set>& sets) {
  int64_t most = 0;
  for (const Set& set : sets) most = std::max(most, set.last - set.first);
  return most;
}

// Weights -----------------------------------------------------------------------------------------

// Add the term's share of inputs [input, input + inputs) of the outputs' groups: Σ gate_i Ψ(r_i),
// [output][input][tap], in the sum's type.
template <class T, class S>
void add_term(const Series& series, int i, const Geometry& g, int64_t first, int64_t outputs,
              int64_t input, int64_t inputs, T* to) {
  const int64_t taps = g.taps(), s = series.group_sizes[i];
  const T gate = static_cast<T>(series.gates[i]);
  const S* term = static_cast<const S*>(series.terms[i]);
  for (int64_t o = first; o < first + outputs; o++, to += inputs * taps) {
    const int64_t at = block_start(o, g.in_channels, g.out_channels, s) -
                       block_start(o, g.in_channels, g.out_channels, g.group_size);
    const int64_t begin = std::max(at, input), end = std::min(at + s, input + inputs);
    const S* from = term + (o * s + begin - at) * taps;
    T* row = to + (begin - input) * taps;
    for (int64_t k = 0; k < (end - begin) * taps; k++) row[k] += gate * widen<T>(from[k]);
  }
}
template <class T>
void sum_terms(const Series& series, const Geometry& g, int64_t first, int64_t outputs,
               int64_t input, int64_t inputs, T* to) {
  std::fill_n(to, outputs * inputs * g.taps(), T(0));
  for (int i = 0; i < series.active; i++) {
    if (series.type == Type::bfloat16)
      add_term<T, bfloat16>(series, i, g, first, outputs, input, inputs, to);
    else if (series.type == Type::float16)
      add_term<T, float16>(series, i, g, first, outputs, input, inputs, to);
    else if (series.type == Type::float32)
      add_term<T, float>(series, i, g, first, outputs, input, inputs, to);
    else
      add_term<T, double>(series, i, g, first, outputs, input, inputs, to);
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

// The weights of one vector of outputs, [source channel of the group][tap][lane]; `sum` holds the
// summed rows meanwhile.
template <class T, class S>
void pack_weights(const Series& series, const Geometry& g, const Direction& d,
                  const LaneBlock& block, T* sum, T* to) {
  const int64_t taps = g.taps();
  if (!d.backward) {
    const int64_t row = g.group_size * taps;
    sum_terms(series, g, block.first(d), block.lanes(), 0, g.group_size, sum);
    interleave<T, S>(block.lanes(), row, [&](int64_t lane) { return sum + lane * row; }, to);
    return;
  }
  // Lanes are inputs of the forward convolution, taps of one input are together: taps numbers per
  // lane and source.
  sum_terms(series, g, block.group * d.sources, block.groups * d.sources, block.output,
            block.outputs, sum);
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

// Those of all blocks, `packed` numbers each; a block's summed rows take `summed`.
template <class T, class S>
void pack_blocks(const Series& series, const Geometry& g, const Direction& d,
                 const std::vector<LaneBlock>& blocks, int64_t packed, int64_t summed, T* to,
                 const Threads& threads) {
  auto pack = [&](int64_t begin, int64_t end) {
    T* const sum = scratch<T>(summed);
    for (int64_t b = begin; b < end; b++)
      pack_weights<T, S>(series, g, d, blocks[b], sum, to + b * packed);
  };
  run(threads, blocks.size(), pack);
}

// The same in pairs of source channels, [pair][tap][lane]; `separate` holds them one by one
// meanwhile.
template <class T>
void pack_pairs(const Series& series, const Geometry& g, const Direction& d, const LaneBlock& block,
                T* sum, T* separate, T* to) {
  pack_weights<T, bfloat16>(series, g, d, block, sum, separate);
  const int64_t size = g.taps() * lanes<T>;
  for (int64_t pair = 0; pair < d.sources / 2; pair++)
    for (int64_t k = 0; k < size; k += lanes<T>) {
      const Words low = __builtin_bit_cast(Words, load<T>(separate + 2 * pair * size + k)),
                  high = __builtin_bit_cast(Words, load<T>(separate + (2 * pair + 1) * size + k));
      store<T>(to + pair * size + k, __builtin_bit_cast(Vector<T>, (low >> 16) | high));
    }
}

// Forward and input gradient ----------------------------------------------------------------------

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
Runs runs_of(const Plan& plan, const Target& target, const Planes& planes) {
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

// What one tile computes from: source channels and taps.
template <class T>
struct Stencil {
  int64_t sources;        // channels per output
  int64_t vector_stride;  // from one vector of source channels to the next
  const Runs& runs;
  int64_t weight_stride;  // from one source channel to the next
  const Index<T>* permutation;
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
__attribute__((noinline)) void correlate(const Stencil<T>& stencil, const T* weights,
                                         const T* const* from, T* const* to, int64_t col_stride) {
  Vector<T> sum[Segments][Columns]{};
  for (int64_t first = 0, plane = 0; first < stencil.sources;
       first += lanes<T>, plane += stencil.vector_stride)
    for (int64_t j = 0; j < std::min<int64_t>(lanes<T>, stencil.sources - first);
         j++, weights += stencil.weight_stride) {
      Vector<Index<T>> index{};
      if constexpr (is_permuted(fetch))
        __builtin_memcpy(&index, stencil.permutation + j * lanes<T>, sizeof index);
      const int64_t channel = plane + (fetch == Fetch::broadcast ? j : 0);
      // A loop for each length: branches within one loop made the compiler share code between them,
      // 24 cycles where these take 20.
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
  void (*correlate)(const Stencil<T>&, const T*, const T* const*, T* const*, int64_t);
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

// All tiles of one target for one vector of outputs, to `to` + Segment::to, columns `col_stride`
// apart. While a tile is computed memory is asked for the lines at the same places from `ahead` on,
// unless it is null: 1.6 instead of 1.8 ms for 64 channels at 56×56, s = 1.
template <class T>
GROSS_INLINE void correlate_tiles(const Stencil<T>& stencil, const T* weights, const Tile<T>& tile,
                                  const std::vector<Segment>& segments, const T* planes, T* to,
                                  int64_t col_stride, const T* ahead = nullptr) {
  const int64_t count = segments.size();
  auto segment = [&](int64_t i) -> const Segment& { return segments[std::min(i, count - 1)]; };
  for (int64_t first = 0; first < count; first += tile.segments) {
    const T* sources[max_segments];
    T* targets[max_segments];
    for (int64_t i = 0; i < tile.segments; i++) {
      sources[i] = planes + segment(first + i).from;
      targets[i] = to + segment(first + i).to;
    }
    // The next tile's lines are fetched for writing meanwhile: 32 instead of 42 cycles per vector
    // (64 channels at 56×56, s = 4).
    if (first + tile.segments < count)
      for (int64_t i = 0; i < tile.segments; i++)
        for (int64_t k = 0; k < tile.columns; k++)
          __builtin_prefetch(to + segment(first + tile.segments + i).to + k * col_stride, 1);
    if (ahead)
      for (int64_t i = 0; i < tile.segments; i++)
        for (int64_t k = 0; k < tile.columns; k++)
          __builtin_prefetch(ahead + segment(first + i).to + k * col_stride, 0, 2);
    tile.correlate(stencil, weights, sources, targets, col_stride);
  }
}

// The same to a tensor that does not hold whole vectors of channels in the sum's type: tile by tile
// through `spare`.
template <class T, class S>
void correlate_converted(const Stencil<T>& stencil, const T* weights, const Tile<T>& tile,
                         const std::vector<Segment>& segments, const T* planes, S* to,
                         int64_t col_stride, int64_t channel_stride, int64_t channels, T* spare) {
  const int64_t count = segments.size();
  for (int64_t first = 0; first < count; first += tile.segments) {
    const T* sources[max_segments];
    T* targets[max_segments];
    for (int64_t i = 0; i < tile.segments; i++) {
      sources[i] = planes + segments[std::min(first + i, count - 1)].from;
      targets[i] = spare + i * tile.columns * lanes<T>;
    }
    tile.correlate(stencil, weights, sources, targets, lanes<T>);
    for (int64_t i = 0; i < std::min(tile.segments, count - first); i++)
      store_columns<T>(targets[i], tile.columns, channels, to + segments[first + i].to, col_stride,
                       channel_stride);
  }
}

// The planes of the source channels of a set, cluster by cluster.
template <class T, class S>
void load_sources(const Image& image, const Plan& plan, const Strip& strip, const Planes& planes,
                  const Channels<T>& channels, const Set& set, T* to) {
  const int64_t cluster = channels.together * channels.sources;
  const int64_t begin = channels.cluster(set.first) * cluster,
                end = std::min(channels.groups * channels.sources,
                               (channels.cluster(set.last - 1) + 1) * cluster);
  // Clusters that fill their vectors lie side by side.
  const int64_t step = cluster % lanes<T> == 0 ? end - begin : cluster;
  for (int64_t at = begin; at < end; at += step, to += channels.vectors * planes.vector_stride)
    load_planes<T, S>(image, plan, strip, planes, at, std::min(step, end - at), to);
}

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

template <class T, class S, Product product = Product::numbers>
void convolve(const Plan& plan, const Image& source, const Series& series,
              const Image& target_image, const Geometry& g, bool backward, const Threads& threads) {
  constexpr bool pairs = product == Product::pairs;
  const Direction direction(g, backward);
  const Channels<T> channels(g, backward, product);
  // Units of work: a set of channels times a strip. More sets than the budgets ask for where strips
  // are few.
  std::vector<Set> sets = sets_of(channels, set_vectors, 1);
  const std::vector<Strip> strips =
      plan_strips(plan, g.images, source_vectors(channels, sets) * GROSS_VECTOR_BYTES,
                  ceil_div(4 * threads.count, sets.size()));
  const int64_t strip_count = strips.size();
  sets = sets_of(channels, set_vectors,
                 std::max<int64_t>(sets.size(), ceil_div(4 * threads.count, strip_count)));
  const int64_t vectors = source_vectors(channels, sets),
                weight_size = largest(sets) * channels.packed;
  int64_t plane_size = 0;
  for (const Strip& strip : strips)
    plane_size = std::max(plane_size, vectors * Planes::of<T>(plan, strip).vector_stride);
  constexpr int64_t spare_size = max_segments * max_columns * lanes<T>;
  const bool alike = source.stride_c == 1 && source.stride_w == target_image.stride_w &&
                     source.stride_h == target_image.stride_h &&
                     source.stride_n == target_image.stride_n;

  auto work = [&](int64_t begin, int64_t end) {
    T* const planes_at =
        scratch<T>(plane_size + spare_size + weight_size +
                   (pairs ? 2 * (channels.summed + channels.packed) : channels.summed));
    T* const spare = planes_at + plane_size;
    T* const weights = spare + spare_size;
    T* const sum = weights + weight_size;
    std::vector<Segment> segments;
    int64_t assembled = -1;
    for (int64_t unit = begin; unit < end; unit++) {
      const Set& set = sets[unit / strip_count];
      const Strip& strip = strips[unit % strip_count];
      if (assembled != unit / strip_count)
        for (int64_t b = set.first; b < set.last; b++) {
          T* const to = weights + (b - set.first) * channels.packed;
          if constexpr (pairs)
            pack_pairs(series, g, direction, channels.blocks[b], sum, sum + 2 * channels.summed,
                       to);
          else
            pack_weights<T, S>(series, g, direction, channels.blocks[b], sum, to);
        }
      assembled = unit / strip_count;
      const Planes planes = Planes::of<T>(plan, strip);
      if constexpr (pairs)
        load_sources<T, T>(in_pairs(source), plan, strip, planes, channels, set, planes_at);
      else
        load_sources<T, S>(source, plan, strip, planes, channels, set, planes_at);
      for (const Target& target : plan.targets) {
        const Runs runs = runs_of<T>(plan, target, planes);
        const Tile<T> tile = tile_for<T, product>(channels.fetch, target.cols);
        segments_of<T>(target_image, plan, target, strip, tile.columns, segments);
        for (int64_t b = set.first; b < set.last; b++) {
          const Stencil<T> stencil{channels.sources, planes.vector_stride, runs,
                                   g.taps() * lanes<T>, channels.permutation_of(b)};
          const T* from = planes_at +
                          (channels.cluster(b) - channels.cluster(set.first)) * channels.vectors *
                              planes.vector_stride +
                          channels.first_lane(b);
          const T* weight = weights + (b - set.first) * channels.packed;
          const LaneBlock& block = channels.blocks[b];
          S* const to = static_cast<S*>(target_image.data) + strip.image * target_image.stride_n +
                        block.first(channels) * target_image.stride_c;
          const int64_t col_stride = target.lattice.col_step * target_image.stride_w;
          if constexpr (std::is_same_v<S, T>)
            if (target_image.stride_c == 1 && block.lanes() == lanes<T>) {
              // The source's pixels one strip further, where they lie as the target's do.
              const T* ahead = alike ? static_cast<const T*>(source.data) +
                                           (to - static_cast<T*>(target_image.data)) +
                                           (strip.images > 1 ? strip.images * source.stride_n
                                                             : (strip.rows + 1) * source.stride_h)
                                     : nullptr;
              correlate_tiles(stencil, weight, tile, segments, from, to, col_stride, ahead);
              continue;
            }
          correlate_converted<T, S>(stencil, weight, tile, segments, from, to, col_stride,
                                    target_image.stride_c, block.lanes(), spare);
        }
      }
    }
  };
  run(threads, sets.size() * strip_count, work);
}

// Weight gradient ---------------------------------------------------------------------------------

// D[source][tap][lane] += Σ_position grads[position][lane] · from[position + tap][source], for
// `Sources` source channels and `Runs` runs of `Length` taps, over stretches of `columns`
// positions: the sums are chains of additions, and two units of four cycles' latency want eight.
template <class T, Fetch fetch, int Sources, int Runs, int Length, int columns>
__attribute__((noinline)) void correlate_weights(const T* grads, const T* planes, const Run* runs,
                                                 const Index<T>* permutation,
                                                 const int64_t* stretches, int64_t count, T* to,
                                                 int64_t to_stride) {
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
#pragma GCC unroll 8
    for (int k = 0; k < columns; k++) {
      grad[k] = load<T>(grads + p + k * lanes<T>);
      keep_in_register(grad[k]);
    }
    // Consecutive multiply–adds go to different sums.
#pragma GCC unroll 16
    for (int k = 0; k < columns + Length - 1; k++)
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
constexpr int max_grad_sources = registers == 32 ? 4 : 2;

template <class T>
using CorrelateWeights = void (*)(const T*, const T*, const Run*, const Index<T>*, const int64_t*,
                                  int64_t, T*, int64_t);

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
    if constexpr (max_grad_sources == 4)
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
  if constexpr (slack == 8) {
    if (columns == 8) return correlate_weights_of<T, 8>(fetch, sources, runs, length);
    if (columns == 7) return correlate_weights_of<T, 7>(fetch, sources, runs, length);
  }
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
      if (columns <= slack && plan.cols % columns == 0) {
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

// D of one vector of outputs from the planes of its gradients and of its sources.
template <class T>
void correlate_block(const Channels<T>& channels, int64_t block, int64_t taps,
                     const std::vector<Run>& runs, const Stretches& stretches, const T* grads,
                     const T* planes, int64_t vector_stride, T* to) {
  const bool broadcasting = channels.fetch == Fetch::broadcast;
  const int64_t run_count = runs.size();
  // So many stretches stay in the first-level cache while every source channel and tap passes over
  // them.
  const int64_t count = stretches.starts.size(),
                most = run_budget / (2 * GROSS_VECTOR_BYTES) / stretches.columns;
  for (int64_t i = 0; i < count; i += most)
    for (int64_t first = 0; first < channels.sources; first += lanes<T>) {
      const T* plane = planes + first / lanes<T> * vector_stride;
      even_parts(
          std::min<int64_t>(lanes<T>, channels.sources - first), max_grad_sources,
          [&](int64_t j, int64_t size) {
            for (int64_t r = 0, together; r < run_count; r += together) {
              // With one source channel three runs are needed for enough chains of additions.
              together =
                  size == 1 && r + 3 <= run_count && runs[r + 2].length == runs[r].length ? 3 : 1;
              const Index<T>* permutation = channels.permutation_of(block);
              correlate_weights_for<T>(stretches.columns, channels.fetch, size, together,
                                       runs[r].length)(
                  grads, plane + (broadcasting ? j : 0), &runs[r],
                  permutation ? permutation + j * lanes<T> : nullptr, stretches.starts.data() + i,
                  std::min(most, count - i), to + (first + j) * taps * lanes<T>, taps * lanes<T>);
            }
          });
    }
}

// D[source][lane] += Σ_pixel grads[pixel][lane] · from[pixel][source] for one or two vectors of
// outputs of a pointwise convolution: its single tap gives a fetched channel no second use, a
// second vector does.
template <class T, int Sources, int Vectors>
__attribute__((noinline)) void multiply_weights(const T* grads, int64_t grad_stride, const T* from,
                                                int64_t count, T* to, int64_t to_stride) {
  Vector<T> sum[Vectors][Sources]{};
  for (int64_t p = 0; p < count * lanes<T>; p += lanes<T>) {
    Vector<T> grad[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; v++) {
      grad[v] = load<T>(grads + v * grad_stride + p);
      keep_in_register(grad[v]);
    }
#pragma GCC unroll 16
    for (int j = 0; j < Sources; j++) {
      Vector<T> value = broadcast<T>(from[p + j]);
      if constexpr (Vectors > 1) keep_in_register(value);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; v++) sum[v][j] += grad[v] * value;
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; v++)
#pragma GCC unroll 16
    for (int j = 0; j < Sources; j++) {
      T* at = to + v * to_stride + j * lanes<T>;
      store<T>(at, load<T>(at) + sum[v][j]);
    }
}
// The same for `vectors` vectors of gradients and all `sources`, over `count` consecutive pixels:
// to[vector][source][lane]. So many pixels at once that they stay in the first-level cache while
// every source channel passes over them.
template <class T>
void multiply_all_weights(const T* grads, int64_t grad_stride, int64_t vectors, const T* from,
                          int64_t from_stride, const std::vector<LaneBlock>& sources, int64_t count,
                          T* to, int64_t to_stride) {
  constexpr int most_sources = registers == 32 ? 12 : 4;
  even_parts(count, run_budget / (3 * GROSS_VECTOR_BYTES), [&](int64_t first, int64_t taken) {
    for (int64_t v = 0, together; v < vectors; v += together) {
      together = v + 1 < vectors ? 2 : 1;
      const T* grad = grads + v * grad_stride + first * lanes<T>;
      const T* source = from + first * lanes<T>;
      T* at = to + v * to_stride;
      for (const LaneBlock& block : sources) {
        even_parts(block.lanes(), most_sources, [&](int64_t j, int64_t size) {
          with_constant<most_sources>(size, [&](auto constant) {
            if (together == 2)
              multiply_weights<T, constant, 2>(grad, grad_stride, source + j, taken,
                                               at + j * lanes<T>, to_stride);
            else
              multiply_weights<T, constant, 1>(grad, grad_stride, source + j, taken,
                                               at + j * lanes<T>, to_stride);
          });
        });
        source += from_stride;
        at += block.lanes() * lanes<T>;
      }
    }
  });
}

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

// D[source][tap][lane] += Σ_pair grads[pair][lane] · (two columns of from[source] at the pair and
// the tap), for a run of `Length` taps.
template <class T, int Sources, int Length, int Pairs>
__attribute__((noinline)) void correlate_pairs(const T* grads, const uint16_t* from,
                                               int64_t from_stride, const int64_t* starts,
                                               int64_t count, const Run& run, T* to,
                                               int64_t to_stride) {
  Vector<T> sum[Sources][Length]{};
  auto columns = [](const uint16_t* at) {
    T two;
    __builtin_memcpy(&two, at, sizeof two);
    Vector<T> value = broadcast<T>(two);
    keep_in_register(value);
    return value;
  };
  for (int64_t i = 0; i < count; i++, grads += Pairs * lanes<T>) {
    const uint16_t* at = from + starts[i];
    Vector<T> even[Sources];
#pragma GCC unroll 4
    for (int j = 0; j < Sources; j++) even[j] = columns(at + j * from_stride);
#pragma GCC unroll 8
    for (int k = 0; k < Pairs; k++) {
      Vector<T> grad = load<T>(grads + k * lanes<T>);
      keep_in_register(grad);
#pragma GCC unroll 4
      for (int j = 0; j < Sources; j++) {
        const uint16_t* two = at + j * from_stride + 2 * k;
        multiply_add<Product::pairs, T>(sum[j][0], even[j], grad);
        if constexpr (Length > 1)
          multiply_add<Product::pairs, T>(sum[j][1], columns(two + 1), grad);
        if (k + 1 < Pairs || Length > 2) even[j] = columns(two + 2);
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

// D of one vector of outputs, all sources and runs; `from` is the first source's row, with the
// taps' offsets in columns.
template <class T>
void correlate_pairs_block(int64_t sources, int64_t taps, const std::vector<Run>& runs,
                           const PairRows& rows, const std::vector<int64_t>& starts, const T* grads,
                           const uint16_t* from, int64_t from_stride, T* to) {
  const int64_t count = starts.size(),
                most = std::max<int64_t>(1, run_budget / (2 * GROSS_VECTOR_BYTES) / rows.pairs);
  for (int64_t i = 0; i < count; i += most)
    even_parts(sources, 4, [&](int64_t first, int64_t size) {
      for (const Run& run : runs)
        with_constant<4>(size, [&](auto together) {
          with_constant<max_run>(run.length, [&](auto length) {
            const auto correlate = rows.pairs == 7   ? correlate_pairs<T, together, length, 7>
                                   : rows.pairs == 4 ? correlate_pairs<T, together, length, 4>
                                                     : correlate_pairs<T, together, length, 2>;
            correlate(grads + i * rows.pairs * lanes<T>,
                      from + first * from_stride + run.offset / lanes<T>, from_stride,
                      starts.data() + i, std::min(most, count - i), run,
                      to + first * taps * lanes<T>, taps * lanes<T>);
          });
        });
    });
}

// Where few vectors of outputs would leave threads idle, strips are split into this many slices.
// Fixed, not the number of threads: the slices are summed in order, so results are the same bits
// for any number of threads.
constexpr int64_t grad_tasks = 32;

template <class T, class S, Product product = Product::numbers>
void weight_grad(const Image& grad, const Image& input, const Series& series,
                 const SeriesGradient& gradient, const Geometry& g, const Threads& threads) {
  const Plan plan = forward_plan(g, input.height, input.width, grad.height, grad.width);
  Plan grad_plan = plan;  // the same grid, holding the gradient itself
  grad_plan.sources = {{0, 1, 0, 1}};
  grad_plan.source_height = grad.height;
  grad_plan.source_width = grad.width;
  grad_plan.min_row = grad_plan.max_row = grad_plan.min_col = grad_plan.max_col = 0;

  constexpr bool pairs = product == Product::pairs;
  const Channels<T> channels(g, false), read(g, false, product);
  const std::vector<LaneBlock> sources = vectors_of<T>(channels.sources, channels.sources);
  const int64_t count = channels.blocks.size(), packed = channels.packed;
  const std::vector<Set> sets = sets_of(channels, set_vectors, 1);
  const int64_t set_count = sets.size(), vectors = source_vectors(read, sets),
                blocks = largest(sets);
  const std::vector<Strip> strips = plan_strips(
      plan, g.images, (vectors + blocks) * GROSS_VECTOR_BYTES, ceil_div(grad_tasks, set_count));
  const int64_t strip_count = strips.size(),
                slices = std::clamp<int64_t>(ceil_div(grad_tasks, set_count), 1, strip_count);
  const PairRows pair_rows(plan.cols);
  int64_t plane_size = 0, grad_size = 0;
  for (const Strip& strip : strips) {
    // In pairs the planes are needed once more, as rows of channels and of pairs.
    plane_size = std::max(
        plane_size,
        (pairs ? 2 : 1) * vectors *
            (Planes::of<T>(plan, strip).vector_stride +
             (pairs ? lanes<T> * lanes<T> * static_cast<int64_t>(plan.sources.size()) : 0)));
    grad_size = std::max(
        grad_size, blocks * (Planes::of<T>(grad_plan, strip).vector_stride +
                             (pairs ? strip.images * strip.rows * pair_rows.row_size<T>() : 0)));
  }
  Buffer<T> partial(slices > 1 ? slices * count * packed : 0);

  // D of the blocks of a set over the strips of one slice.
  auto accumulate = [&](const Set& set, int64_t slice, T* planes_at, T* grads_at, T* to) {
    const LaneBlock &front = channels.blocks[set.first], &back = channels.blocks[set.last - 1];
    const int64_t first_output = front.first(channels),
                  outputs = back.first(channels) + back.lanes() - first_output;
    std::fill_n(to, (set.last - set.first) * packed, T(0));
    for (int64_t i = strip_count * slice / slices; i < strip_count * (slice + 1) / slices; i++) {
      const Strip& strip = strips[i];
      const Planes planes = Planes::of<T>(plan, strip), grads = Planes::of<T>(grad_plan, strip);
      if constexpr (pairs)
        load_sources<T, T>(in_pairs(input), plan, strip, planes, read, set, planes_at);
      else
        load_sources<T, S>(input, plan, strip, planes, channels, set, planes_at);
      if (outputs == (set.last - set.first) * lanes<T>) {
        load_planes<T, S>(grad, grad_plan, strip, grads, first_output, outputs, grads_at);
      } else {
        for (int64_t b = set.first; b < set.last; b++)
          load_planes<T, S>(grad, grad_plan, strip, grads, channels.blocks[b].first(channels),
                            channels.blocks[b].lanes(),
                            grads_at + (b - set.first) * grads.vector_stride);
      }
      const Runs runs = runs_of<T>(plan, plan.targets[0], planes);
      if constexpr (pairs) {
        const int64_t set_planes = read.clusters(set.first, set.last) * read.vectors,
                      stride = round_up(planes.source_stride / lanes<T>, lanes<T>);
        const int64_t sources_count = plan.sources.size();
        auto* const channel_rows =
            reinterpret_cast<uint16_t*>(planes_at + set_planes * planes.vector_stride);
        // A channel's row: its phases one after the other, like the planes'.
        for (int64_t v = 0; v < set_planes; v++)
          for (int64_t source = 0; source < sources_count; source++)
            separate_channels(planes_at + v * planes.vector_stride + source * planes.source_stride,
                              planes.positions,
                              channel_rows + (2 * lanes<T> * v * sources_count + source) * stride,
                              sources_count * stride);
        T* const pair_rows_at = grads_at + (set.last - set.first) * grads.vector_stride;
        std::vector<int64_t> starts;
        for (int64_t i = 0; i < strip.images; i++)
          for (int64_t r = 0; r < strip.rows; r++)
            for (int64_t k = 0; k < pair_rows.stretches; k++)
              starts.push_back((i * plan.row_pitch + r) * plan.pitch + 2 * k * pair_rows.pairs);
        Planes row_planes = planes;
        row_planes.source_stride = stride * lanes<T>;
        const Runs row_runs = runs_of<T>(plan, plan.targets[0], row_planes);
        for (int64_t b = set.first; b < set.last; b++) {
          pair_columns(grads_at + (b - set.first) * grads.vector_stride, plan, strip, pair_rows,
                       pair_rows_at);
          const int64_t channel =
              2 * ((read.cluster(b) - read.cluster(set.first)) * read.vectors * lanes<T> +
                   read.first_lane(b));
          correlate_pairs_block(channels.sources, g.taps(), row_runs.all, pair_rows, starts,
                                pair_rows_at, channel_rows + channel * sources_count * stride,
                                sources_count * stride, to + (b - set.first) * packed);
        }
        continue;
      }
      const Stretches stretches = Stretches::of<T>(plan, strip);
      const bool pointwise = is_pointwise(g);
      for (int64_t b = set.first, together; b < set.last; b += together) {
        const T* from = planes_at +
                        (channels.cluster(b) - channels.cluster(set.first)) * channels.vectors *
                            planes.vector_stride +
                        channels.first_lane(b);
        const T* grads_of = grads_at + (b - set.first) * grads.vector_stride;
        T* sums = to + (b - set.first) * packed;
        together = pointwise ? set.last - b : 1;
        if (pointwise)  // without padding rows lie side by side
          multiply_all_weights(grads_of, grads.vector_stride, together, from, planes.vector_stride,
                               sources, strip.images * strip.rows * plan.cols, sums, packed);
        else
          correlate_block<T>(channels, b, g.taps(), runs.all, stretches, grads_of, from,
                             planes.vector_stride, sums);
      }
    }
  };
  GradientBlocks<T> output(channels, series, gradient, g);
  auto work = [&](int64_t begin, int64_t end) {
    T* const planes_at = scratch<T>(plane_size + grad_size + blocks * packed + channels.summed);
    T* const grads_at = planes_at + plane_size;
    T* const sums = grads_at + grad_size;
    T* const rows = sums + blocks * packed;
    for (int64_t unit = begin; unit < end; unit++) {
      const Set& set = sets[unit / slices];
      const int64_t slice = unit % slices;
      if (slices > 1) {
        accumulate(set, slice, planes_at, grads_at,
                   partial.data() + (slice * count + set.first) * packed);
        continue;
      }
      accumulate(set, 0, planes_at, grads_at, sums);
      for (int64_t b = set.first; b < set.last; b++)
        output.write(b, sums + (b - set.first) * packed, rows);
    }
  };
  run(threads, set_count * slices, work);
  if (slices > 1) output.write_slices(partial.data(), slices, threads);
  output.write_gates();
}

// Plain sum ---------------------------------------------------------------------------------------

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

#include "in_place.h"

#include "bottleneck.h"

#include "bottleneck_backward.h"

namespace gross::cpu::GROSS_ISA {

// Entries -----------------------------------------------------------------------------------------

template <class F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::float32: return f(float{});
    case Type::float64: return f(double{});
    case Type::bfloat16: return f(bfloat16{});
    case Type::float16: return f(float16{});
  }
}

template <Product product>
void convolve_entry(Type type, const Plan& plan, const Image& source, const Series& series,
                    const Image& target, const Geometry& g, bool backward, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    if (is_pointwise(g))
      return convolve_pointwise<Sum<S>, S>(source, series, target, g, backward, threads);
    const Channels<Sum<S>> channels(g, backward);
    const std::vector<RowTarget> rows = row_targets<Sum<S>, S>(plan, source, target, channels);
    if (is_faster_in_place(rows, channels))
      return convolve_in_place<Sum<S>, S>(rows, channels, source, series, target, g, threads);
    if constexpr (product == Product::pairs && std::is_same_v<S, bfloat16>)
      if (has_pairs(source, Direction(g, backward)))
        return convolve<float, S, product>(plan, source, series, target, g, backward, threads);
    convolve<Sum<S>, S>(plan, source, series, target, g, backward, threads);
  });
}

template <Product product>
void forward_entry(Type type, const Image& input, const Series& series, const Image& output,
                   const Geometry& g, const Threads& threads) {
  convolve_entry<product>(type,
                          forward_plan(g, input.height, input.width, output.height, output.width),
                          input, series, output, g, false, threads);
}

template <Product product>
void input_grad_entry(Type type, const Image& grad, const Series& series, const Image& grad_input,
                      const Geometry& g, const Threads& threads) {
  convolve_entry<product>(
      type, input_grad_plan(g, grad_input.height, grad_input.width, grad.height, grad.width), grad,
      series, grad_input, g, true, threads);
}

template <Product product>
void weight_grad_entry(Type type, const Image& grad, const Image& input, const Series& series,
                       const SeriesGradient& gradient, const Geometry& g, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    if constexpr (product == Product::pairs && std::is_same_v<S, bfloat16>)
      // Rows of channels are read by broadcasts alone.
      if (has_pairs(input, Direction(g, false)) && !is_pointwise(g) &&
          Channels<float>(g, false).fetch == Fetch::broadcast &&
          Channels<float>(g, false, product).fetch == Fetch::broadcast)
        return weight_grad<float, S, product>(grad, input, series, gradient, g, threads);
    const Channels<Sum<S>> channels(g, false);
    const std::vector<RowTarget> rows = row_targets<Sum<S>, S>(
        forward_plan(g, input.height, input.width, grad.height, grad.width), input, grad, channels);
    if (has_row_weights(rows, channels.fetch))
      return weight_grad_in_place<Sum<S>, S>(rows[0], channels, grad, input, series, gradient, g,
                                             threads);
    weight_grad<Sum<S>, S>(grad, input, series, gradient, g, threads);
  });
}

inline int64_t packed_size_entry(Type type, const Layer& layer) {
  int64_t size = 0;
  with_type(type, [&](auto s) { size = Packing<Sum<decltype(s)>>(layer).size; });
  return size;
}

inline void pack_entry(Type type, const Layer& layer, void* packed, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    pack_layer<Sum<S>, S>(layer, static_cast<Sum<S>*>(packed), threads);
  });
}

inline void layer_entry(Type type, const Image& input, const Layer& layer, const void* packed,
                        const Image& inner, const Image& output, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    run_layer<Sum<S>, S>(input, layer, static_cast<const Sum<S>*>(packed), inner, output, threads);
  });
}

inline void layer_backward_entry(Type type, const Image& grad, const Image& input,
                                 const Layer& layer, const Image& inner, const Image& output,
                                 const LayerGradient& gradient, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    run_layer_backward<Sum<S>, S>(grad, input, layer, inner, output, gradient, threads);
  });
}

inline void sum_entry(const Series& series, int64_t count, void* output, const Threads& threads) {
  with_type(series.type, [&](auto s) {
    using S = decltype(s);
    sum<Sum<S>, S>(series, count, static_cast<S*>(output), threads);
  });
}

// The kernels of a unit; with pairs where its processors multiply pairs of bfloat16 numbers.
template <Product product = Product::numbers>
constexpr Kernels kernels_of(const char* name) {
  return {name,
          GROSS_VECTOR_BYTES,
          forward_entry<product>,
          input_grad_entry<product>,
          weight_grad_entry<product>,
          packed_size_entry,
          pack_entry,
          layer_entry,
          layer_backward_entry,
          sum_entry};
}

}  // namespace gross::cpu::GROSS_ISA
