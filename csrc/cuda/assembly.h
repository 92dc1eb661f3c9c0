// A thread block's weights: assembled once from the terms, R = Σ gate_i Ψ(term_i), and kept in
// registers as the A operand of products.
//
// The terms' rows are copied to shared memory as they lie, `piece` output channels at a time. A
// thread then owns two neighbouring input channels of one output channel, with all nine taps: it
// sums what the terms have there in float32, rounds once, and writes a matrix [tap][destination
// channel][source channel] from which ldmatrix takes the fragments. Outside the groups the matrix
// is zero. For the input gradient the roles of rows and columns are exchanged and the taps turned.
#pragma once

#include "problem.h"

namespace gross::cuda {

// `tiles` tiles of 16 destination channels from `first` on.
struct Slab {
  int first, tiles;
  Range source;
};

template <Type type, int steps>
struct Assembly {
  static constexpr int columns = steps * step_channels(type);
  // 16 bytes more than the row: eight rows of a fragment then lie in eight different groups of
  // banks.
  static constexpr int pitch = steps * 32 + 16;
  static constexpr Type narrow = type == Type::float32
                                     ? Type::bfloat16
                                     : type;  // of 16-bit terms: never read for float32 images

  static GROSS_HOST_DEVICE_INLINE int matrix_bytes(int tiles) {
    return 9 * tiles * tile_channels * pitch;
  }

  // Output channels that neighbouring lanes take: for the input gradient as many as lie in 16 bytes
  // of the matrix, so that a warp's stores fill whole words of different banks.
  static GROSS_HOST_DEVICE_INLINE int side_by_side(bool transposed) {
    return transposed ? chunk_channels(type) : 1;
  }
  // Bytes from a term's weights of one output channel to the next's, in shared memory. Outputs that
  // are read side by side are moved to different banks, where whole pieces of 16 bytes allow that:
  // by an odd number of them, or for four outputs by twice that.
  static GROSS_HOST_DEVICE_INLINE int raw_pitch(const Terms& terms, int i, bool transposed) {
    const int bytes = terms.group_sizes[i] * 9 * term_bytes(terms), pieces = bytes / 16;
    if (!transposed || bytes % 16) return bytes;
    return 16 * (side_by_side(true) == 8 ? pieces | 1 : pieces + (6 - pieces % 4) % 4);
  }
  // Of all terms.
  static GROSS_HOST_DEVICE_INLINE int raw_bytes(const Terms& terms, bool transposed) {
    int bytes = 0;
    for (int i = 0; i < terms.active; i++) bytes += raw_pitch(terms, i, transposed);
    return bytes;
  }
  static GROSS_HOST_DEVICE_INLINE int term_bytes(const Terms& terms) {
    return type == Type::float32 || terms.wide ? 4 : 2;
  }

  // The output channels whose weights the slab needs.
  static GROSS_HOST_DEVICE_INLINE Range outputs(const Channels& channels, bool transposed,
                                                const Slab& slab) {
    if (transposed) return {slab.source.begin, smaller(slab.source.end, channels.source)};
    return {slab.first, smaller(slab.first + slab.tiles * tile_channels, channels.destination)};
  }

  static GROSS_DEVICE void request(const Terms& terms, bool transposed, Range piece, uint32_t raw,
                                   int thread, int threads) {
    for (int i = 0; i < terms.active; i++) {
      const int bytes = terms.group_sizes[i] * 9 * term_bytes(terms),
                pitch = raw_pitch(terms, i, transposed), gap = pitch - bytes;
      const char* from =
          static_cast<const char*>(terms.data[i]) + static_cast<long long>(piece.begin) * bytes;
      const int count = piece.size() * bytes / 16, rounds = divide_up(count, threads);
      // Only where there are gaps does it matter in which row a piece lies.
      const int row_pieces = gap > 0 ? bytes / 16 : count + threads, rows = threads / row_pieces,
                rest = threads - rows * row_pieces;
      int row = thread / row_pieces, column = thread - row * row_pieces;
      for (int r = 0; r < rounds; r++) {
        const int k = r * threads + thread;
        copy_async_16(raw + 16 * k + row * gap, from + 16 * static_cast<size_t>(k), true,
                      k < count);
        row += rows;
        column += rest;
        if (column >= row_pieces) column -= row_pieces, row++;
      }
      raw += piece.size() * pitch;
    }
    copy_async_commit();
  }

  static GROSS_DEVICE void clear(int tiles, uint32_t matrix, int thread, int threads) {
    const int count = matrix_bytes(tiles) / 16, rounds = divide_up(count, threads);
    for (int r = 0; r < rounds; r++)
      store_shared_128(matrix + 16 * (r * threads + thread), {0, 0, 0, 0},
                       r * threads + thread < count);
  }

  // Adds nine taps of two neighbouring channels, 18 values in a row.
  static GROSS_DEVICE void add_pair(float (&sum)[18], uint32_t address, int bytes, float gate,
                                    bool on) {
    GROSS_UNROLL
    for (int j = 0; j < 9; j++) {
      if (bytes == 2) {
        const uint32_t v = load_shared_32(address + 4 * j, on);
        sum[2 * j] += gate * low_half<narrow>(v);
        sum[2 * j + 1] += gate * high_half<narrow>(v);
      } else {
        uint32_t v[2];
        load_shared_64(v, address + 8 * j, on);
        sum[2 * j] += gate * as_float(v[0]);
        sum[2 * j + 1] += gate * as_float(v[1]);
      }
    }
  }
  // Nine taps of one channel.
  static GROSS_DEVICE void add_one(float* sum, uint32_t address, int bytes, float gate, bool on) {
    GROSS_UNROLL
    for (int j = 0; j < 9; j++)
      sum[j] += gate * (bytes == 2 ? low_half<narrow>(load_shared_16(address + 2 * j, on))
                                   : as_float(load_shared_32(address + 4 * j, on)));
  }

  // Rows of a tile hold the even channels, then the odd ones: the two rows that a thread has of a
  // result are neighbouring channels.
  static GROSS_DEVICE int tile_row(int channel) {
    return channel / 16 * 16 + channel % 2 * 8 + channel % 16 / 2;
  }

  static GROSS_DEVICE void combine(const Terms& terms, const Channels& channels, bool transposed,
                                   const Slab& slab, Range piece, uint32_t matrix, uint32_t raw,
                                   int thread, int threads) {
    const int size = transposed ? channels.destination_group
                                : channels.source_group;  // of the group, in input channels
    const int out_size = transposed ? channels.source_group : channels.destination_group;
    const int rows = slab.tiles * tile_channels,
              last_row = smaller(slab.first + rows, channels.destination) - 1;
    const int pairs = (size + 1) / 2, bytes = term_bytes(terms), across = side_by_side(transposed);
    const int items = round_up(piece.size(), across) * pairs;
    const int shift = across == 8 ? 3 : across == 4 ? 2 : 0;
    GROSS_NO_UNROLL
    for (int k = thread; k < round_up(items, threads); k += threads) {
      const int pair = k >> shift,
                wanted = piece.begin + (pair / pairs << shift) + (k & (across - 1));
      const int o = smaller(wanted, piece.end - 1), block = o / out_size * size;
      const int c =
          block / 2 * 2 +
          pair % pairs * 2;  // with odd sizes one of c and c + 1 may lie outside the block
      const bool inside =
          k < items && wanted < piece.end && (!transposed || (c >= slab.first && c <= last_row));
      float sum[18];  // [channel][tap]
      GROSS_UNROLL
      for (int j = 0; j < 18; j++) sum[j] = 0.f;
      uint32_t at = raw;
      GROSS_NO_UNROLL
      for (int i = 0; i < terms.active; i++) {
        const int s = terms.group_sizes[i];
        const float gate = terms.gates ? as_float(load_global_32(terms.gates + i, true)) : 1.f;
        const int relative = c - static_cast<int>(static_cast<unsigned>(o) /
                                                  static_cast<unsigned>(terms.out_sizes[i])) *
                                     s;
        const int pitch = raw_pitch(terms, i, transposed);
        const uint32_t address = at + (o - piece.begin) * pitch + relative * 9 * bytes;
        if (s % 2 == 0) {
          const bool on = inside && relative >= 0 && relative < s;
          if (any_lane(on)) add_pair(sum, address, bytes, gate, on);
        } else {
          const bool low = inside && relative >= 0 && relative < s,
                     high = inside && relative >= -1 && relative < s - 1;
          if (any_lane(low)) add_one(sum, address, bytes, gate, low);
          if (any_lane(high)) add_one(sum + 9, address + 9 * bytes, bytes, gate, high);
        }
        at += piece.size() * pitch;
      }
      const int row = (transposed ? c : o) - slab.first,
                tile_first = slab.first + row / tile_channels * tile_channels;
      const int column =
          (transposed ? o : c) - channels.tile_begin(slab.source, tile_first, columns);
      if (transposed) {
        GROSS_UNROLL
        for (int half = 0; half < 2; half++) {
          const bool on = inside && c + half >= block && c + half < block + size;
          GROSS_UNROLL
          for (int tap = 0; tap < 9; tap++) {
            const uint32_t to = matrix + ((8 - tap) * rows + tile_row(row + half)) * pitch +
                                column * bytes_of(type);
            if constexpr (type == Type::float32)
              store_shared_32(to, round_tf32(sum[9 * half + tap]), on);
            else
              store_shared_16(to, pack<type>(sum[9 * half + tap], 0.f), on);
          }
        }
      } else {
        GROSS_UNROLL
        for (int tap = 0; tap < 9; tap++) {
          const uint32_t to =
              matrix + (tap * rows + tile_row(row)) * pitch + column * bytes_of(type);
          if constexpr (type == Type::float32)
            store_shared_64(to, round_tf32(sum[tap]), round_tf32(sum[9 + tap]), inside);
          else
            store_shared_32(to, pack<type>(sum[tap], sum[9 + tap]), inside);
        }
      }
    }
  }

  // The fragments of one tile.
  static GROSS_DEVICE void load(uint32_t (&weight)[9][steps][4], int tile, int tiles,
                                uint32_t matrix, int lane) {
    GROSS_UNROLL
    for (int tap = 0; tap < 9; tap++) GROSS_UNROLL
    for (int k = 0; k < steps; k++)
      load_matrix_x4(weight[tap][k],
                     matrix + ((tap * tiles + tile) * tile_channels + lane % 16) * pitch + k * 32 +
                         lane / 16 * 16);
  }
};

}  // namespace gross::cuda
