// What the kernels know of a call, and how its channels are packed into matrix products: plain
// arithmetic for host and device.
//
// The forward and the input gradient are one computation between a source (input; output gradient)
// and a destination (output; input gradient). A group has `source_group` channels of one and
// `destination_group` of the other, so Ψ's formula gives what a destination channel sees in both
// directions.
#pragma once

#include <numeric>

#include "../series.h"
#include "primitives.h"

namespace gross::cuda {

constexpr int tile_channels = 16;  // of the destination: the rows of one warp's matrix product
constexpr int most_steps = 4;      // matrix products in k that a warp's weights may take: 9 · 4 ·
                                   // most_steps registers of a thread
constexpr int most_active = 7;     // nested group sizes from 1 to 64

GROSS_HOST_DEVICE_INLINE constexpr int round_up(int value, int to) {
  return (value + to - 1) / to * to;
}
GROSS_HOST_DEVICE_INLINE constexpr int divide_up(int value, int by) {
  return (value + by - 1) / by;
}
GROSS_HOST_DEVICE_INLINE constexpr int smaller(int a, int b) { return a < b ? a : b; }
GROSS_HOST_DEVICE_INLINE constexpr int larger(int a, int b) { return a > b ? a : b; }

// Channels of one kind: a chunk is 16 bytes of a pixel, a step the 32 bytes of k in one product.
GROSS_HOST_DEVICE_INLINE constexpr int chunk_channels(Type type) { return 16 / bytes_of(type); }
GROSS_HOST_DEVICE_INLINE constexpr int step_channels(Type type) { return 32 / bytes_of(type); }

// Of threads that move pixels in pieces of 16 bytes, `lanes` (a power of two) to a pixel: the pixel
// of the place-th such group. Pixels lie one piece more than `lanes` apart, so pieces of
// neighbouring pixels share banks; eight threads in a row meet every bank once if they take pixels
// `lanes` apart.
GROSS_HOST_DEVICE_INLINE constexpr int pixel_of(int place, int lanes) {
  if (lanes >= 8) return place;
  const int together = 8 / lanes;
  return place / 8 * 8 + place % together * lanes + place % 8 / together;
}

struct Range {
  int begin, end;
  GROSS_HOST_DEVICE_INLINE int size() const { return end - begin; }
};

// The channels of a call, seen from its destination.
struct Channels {
  int source, destination;
  int source_group, destination_group;
  int chunk;  // chunk_channels

  // What the destination channels [first, last] see: whole groups, widened to whole chunks.
  GROSS_HOST_DEVICE_INLINE Range seen_by(int first, int last) const {
    const int begin = static_cast<int>(block_start(first, source, destination, source_group));
    const int end =
        static_cast<int>(block_start(last, source, destination, source_group)) + source_group;
    return {begin / chunk * chunk, round_up(end, chunk)};
  }
  // What `tiles` tiles from destination channel `first` on see together, at least `columns`
  // channels: a slab of the source. It may reach beyond the last source channel: those are zeros.
  GROSS_HOST_DEVICE_INLINE Range slab(int first, int tiles, int columns) const {
    const Range seen = seen_by(first, smaller(first + tiles * tile_channels, destination) - 1);
    return {seen.begin, larger(seen.end, seen.begin + columns)};
  }
  // The first of the `columns` source channels that the tile from `first` on multiplies, within its
  // slab.
  GROSS_HOST_DEVICE_INLINE int tile_begin(Range slab, int first, int columns) const {
    if (first >= destination) return slab.begin;
    return smaller(seen_by(first, smaller(first + tile_channels, destination) - 1).begin,
                   slab.end - columns);
  }
};

inline Channels channels_of(const Geometry& geometry, bool transposed, Type type) {
  const int in = static_cast<int>(geometry.in_channels),
            out = static_cast<int>(geometry.out_channels);
  const int in_group = geometry.group_size,
            out_group = static_cast<int>(geometry.out_channels * geometry.group_size /
                                         geometry.in_channels);
  const int chunk = chunk_channels(type);
  return transposed ? Channels{out, in, out_group, in_group, chunk}
                    : Channels{in, out, in_group, out_group, chunk};
}

// Destination channels from which on everything in steps of `stride` repeats itself, whole chunks
// further in the source.
inline int period(const Channels& channels, int stride) {
  return std::lcm(stride, channels.destination_group *
                              (channels.chunk / std::gcd(channels.source_group, channels.chunk)));
}

// Steps in k of the widest tile; a kernel that has at least as many serves the call.
inline int steps_needed(const Channels& channels) {
  int widest = 0;
  for (int first = 0; first < smaller(channels.destination, period(channels, tile_channels));
       first += tile_channels)
    widest = larger(
        widest,
        channels.seen_by(first, smaller(first + tile_channels, channels.destination) - 1).size());
  return divide_up(widest, 2 * channels.chunk);
}

// The series as kernels take it: the active terms.
struct Terms {
  const void* data[most_active];
  int group_sizes[most_active];  // in input channels
  int out_sizes[most_active];    // in output channels
  int active;
  bool wide;  // float32 terms of 16-bit images
  const float* gates;
};

inline Terms active_terms(const Series& series, const Geometry& geometry, Type type) {
  Terms terms{};
  for (int i = 0; i < series.active; i++) {
    terms.data[i] = series.terms[i];
    terms.group_sizes[i] = series.group_sizes[i];
    terms.out_sizes[i] =
        static_cast<int>(geometry.out_channels * series.group_sizes[i] / geometry.in_channels);
  }
  terms.active = series.active;
  terms.wide = series.type == Type::float32 && type != Type::float32;
  terms.gates = series.gates;
  return terms;
}

}  // namespace gross::cuda
