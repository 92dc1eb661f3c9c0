// Which channels fall on which lanes.
//
// Lanes are consecutive output channels. A source channel reaches them as a broadcast where all of
// them are of one group, and as a permutation of one vector of source channels where they are of
// several.
#pragma once

#include "memory.h"
#include "vector.h"

namespace gross::cpu::GROSS_ISA {

// Vectors of outputs that are computed from the pixels read at once: of fewer, a pixel's
// neighbouring lines are fetched in passes far apart.
constexpr int64_t set_vectors = 8;

// How source channels reach the lanes: each lane its own, a permutation of a vector (within 16
// bytes or over all of it), or one channel for all lanes.
enum class Fetch { lanes, within_quads, permuted, broadcast };

constexpr bool is_permuted(Fetch fetch) {
  return fetch == Fetch::within_quads || fetch == Fetch::permuted;
}

// One direction of the grouped convolution. Backward, sources are the outputs of the forward
// convolution and outputs its inputs.
struct Direction {
  Pass pass;
  int64_t groups, sources, outputs;  // sources and outputs per group

  Direction(const Geometry& g, Pass pass)
      : pass(pass),
        groups(g.groups()),
        sources(pass == Pass::backward ? g.outputs_per_group() : g.group_size),
        outputs(pass == Pass::backward ? g.group_size : g.outputs_per_group()) {}
};

// A convolution of single pixels with all channels, at any stride or at each pixel.
inline bool reads_pixels(const Geometry& g) {
  return g.taps() == 1 && g.groups() == 1 && g.padding_h == 0 && g.padding_w == 0;
}
inline bool is_pointwise(const Geometry& g) {
  return reads_pixels(g) && g.stride_h == 1 && g.stride_w == 1;
}

inline Geometry pointwise_geometry(int64_t from, int64_t to) {
  return {1, from, to, from, 1, 1, 1, 1, 0, 0, 1, 1};
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
  Channels(const Geometry& g, Pass pass, Product product = Product::numbers) : Direction(g, pass) {
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

  // The first of a block's vectors of source channels, counted from those of block `first` on.
  int64_t plane_of(int64_t block, int64_t first) const {
    return (cluster(block) - cluster(first)) * vectors;
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
// D, the gradient of summed weights, of one vector of outputs or of several.
template <class T>
struct WeightSums {
  T* at;
  int64_t stride;  // from one source channel, or one vector, to the next
};
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

}  // namespace gross::cpu::GROSS_ISA
