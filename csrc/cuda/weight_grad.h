// Weight gradient of a 3×3 grouped convolution: the plan, and the kernels of its two passes.
//
// First pass. dW[o, c, kh, kw] sums over pixels, so pixels are the products' k dimension: gradients
// are A (16 output channels × pixels), input is B (pixels × 8 input channels), and all nine taps of
// a warp's 16 outputs × `atoms` eights of inputs stay in registers. A team of warps marches down
// the rows of a strip of columns. Gradient rows are read from shared memory once and wait in
// registers for the input rows that meet them; an input row is read once per kernel column. Teams
// add up through shared memory, each block writes the sums of its share of rows, and no sum depends
// on what runs when: results repeat bit by bit.
//
// Second pass. Adds the blocks' sums in order and writes every term's gradient where Ψ says that it
// lies.
//
// A line is the pixels of a strip's row as they lie in shared memory: several images side by side
// where they are narrow, with one slot of zeros between them, which is the right border of one and
// the left border of the next. Gradients have the same slots, zeros between images too, so a kernel
// column is a shift by whole slots and products may run over the gaps. For stride 2 even and odd
// columns have lines of their own.
#pragma once

#include "problem.h"

namespace gross::cuda {

struct WeightGradProblem {
  const void* input;
  const void* grad;
  float* partial;     // [blocks][9][output channels][group size]
  Channels channels;  // the output's see the input's
  int images, in_h, in_w, out_h, out_w;
  // Steps through global memory, in pieces of 16 bytes: 32 bits, which wrap around, reach 64 GB and
  // save the kernel registers.
  unsigned in_image, grad_image, in_row, grad_row, in_pixel, grad_pixel;
  unsigned in_next_strip, grad_next_strip;  // from a strip's end to the next one's beginning
  unsigned in_next_line, grad_next_line;  // and, where the next one is of other images, from there
  // Strips: `line_images` images × `columns` output columns each.
  int columns, line_images, column_tiles, period;  // slots from one image of a line to the next
  int rows, unit;            // output rows of all strips; they are shared in units of so many rows
  int share, longer_shares;  // units of each share; so many shares have one more
  int last_step;             // of a strip that ends at the image's last row
  // Channels: a team has `tiles` × `windows` warps, for 16 outputs and `atoms` × 8 of the inputs
  // that they see each.
  int tiles, windows, teams, team_threads, threads;
  unsigned group_magic;  // ⌈2³¹ / group size⌉
  // Shared memory, in bytes. A row comes in pieces of 16 bytes, thread after thread; gradients'
  // pieces begin after whole rounds of input's.
  int in_pieces, grad_pieces, in_rounds, rounds, first_grad;
  int in_slots, grad_slots, in_chunks, grad_chunks, in_pitch, grad_pitch, stage_bytes, stages_at,
      in_bytes;
  int in_tile[4], grad_tile[4];  // where the slots of each product of a row begin
  int in_tap[3];                 // where a kernel column begins
  int half_slots;                // from the first to the second half of a product's slots
};

// With 3 stages of 16 to 24 KB for each of 3 teams, some 100 KB are on their way to a
// multiprocessor, where 16 to 32 KB cover the memory's latency.
constexpr int weight_grad_stages = 3;
// Of a block, one to a multiprocessor: 36 · atoms sums and 48 words of gradients leave room for so
// many in 64 K registers.
GROSS_HOST_DEVICE_INLINE constexpr int weight_grad_warps(int atoms) { return atoms == 2 ? 12 : 8; }

// Products along a line; each takes 32 bytes of k, so step_channels slots.
GROSS_HOST_DEVICE_INLINE constexpr int weight_grad_products(int stride) {
  return stride == 1 ? 4 : 2;
}

// The first input channel that the 16 outputs of a tile see, widened to whole chunks; beyond the
// last tile, what the last output sees.
GROSS_HOST_DEVICE_INLINE int tile_begin(const Channels& channels, int tile) {
  const int output = smaller(tile * tile_channels, channels.destination - 1);
  return channels.seen_by(output, output).begin;
}

// ---- First pass ----

// Both operands of a product are read transposed, slots being k, and alike: 16 channels, words 0
// and 1 holding channels 0–7 and 8–15 of the first half of the slots, words 2 and 3 those of the
// second. This is A of 16 outputs, and B of two eights of inputs. Transposed reads of 4-byte
// numbers do not exist: TF32 loads words, free of bank conflicts at pitches ≡ 32 mod 64 bytes.
template <Type type>
GROSS_DEVICE int lane_offset(int lane, int pitch, int half_slots) {
  if constexpr (type == Type::float32) return lane % 4 * pitch + lane / 4 * 4;
  return (lane / 16 * half_slots + lane % 8) * pitch + lane / 8 % 2 * 16;
}
template <Type type>
GROSS_DEVICE void load_slots(uint32_t (&words)[4], uint32_t address, int half_bytes) {
  if constexpr (type == Type::float32) {
    GROSS_UNROLL
    for (int i = 0; i < 4; i++)
      words[i] =
          round_tf32(as_float(load_shared_32(address + i % 2 * 32 + i / 2 * half_bytes, true)));
  } else {
    load_matrix_x4_transposed(words, address);
  }
}

// Columns of the sums in shared memory are permuted so that a quarter of a warp's stores meets
// every bank once.
GROSS_DEVICE int spread(int row, int column, int width) {
  return column ^ (width == 16 ? row & 2 : row & 3) * (width == 16 ? 4 : 8);
}

// half_last: of the last product of a row the second half is never a pixel, as in 56 = 3 ½ · 16
// columns, and is left out.
template <Type type, int stride, int atoms, bool half_last>
GROSS_KERNEL GROSS_BOUNDS(weight_grad_warps(atoms) * 32)
    weight_grad_partial(const WeightGradProblem p) {
  constexpr int never = 255;  // the image of pieces that are zeros throughout
  constexpr int products = weight_grad_products(stride), live = 3, chunk = chunk_channels(type);
  const int thread = thread_index(), lane = thread % 32, block_warp = uniform(thread / 32);
  const int team_warps = p.tiles * p.windows, team = uniform(block_warp / team_warps),
            warp = block_warp - team * team_warps;
  const int member = warp * 32 + lane;
  const int tile0 = block_y() * p.tiles, output0 = tile0 * tile_channels,
            outputs = p.tiles * tile_channels;
  const uint32_t shared = shared_base(), table = shared + 256;

  // Of every 16-byte piece of an input row, and then of a gradient row: its place in global memory,
  // from the line's first pixel on, its place in the stage, its column and its image. The march
  // then neither divides nor knows how lines are made.
  const int slab_begin = tile_begin(p.channels, tile0);
  {
    const int seen = smaller(
        p.channels.seen_by(output0, smaller(output0 + outputs, p.channels.destination) - 1).end,
        p.channels.source);
    GROSS_NO_UNROLL
    for (int first = 0; first < p.rounds * p.team_threads; first += p.threads) {
      const int piece = first + thread;
      const bool of_input = piece < p.first_grad;
      const unsigned k = of_input ? piece : piece - p.first_grad,
                     chunks = of_input ? p.in_chunks : p.grad_chunks;
      const int slot = k / chunks, of_slot = k % chunks;
      const bool odd =
          stride == 2 && slot >= p.grad_slots;  // for stride 2 the odd columns follow the even ones
      const unsigned at = of_input && odd ? slot - p.grad_slots : slot, period = p.period;
      const int image = at / period, x = at % period;
      const int column = !of_input ? x : stride == 1 ? x - 1 : odd ? 2 * x - 1 : 2 * x;
      const int columns = !of_input ? p.columns : stride == 1 ? p.columns + 1 : 2 * p.columns;
      const int channel = (of_input ? slab_begin : output0) + of_slot * chunk;
      const bool ever = image < p.line_images && column < columns &&
                        channel < (of_input ? seen : p.channels.destination);
      const unsigned from = image * (of_input ? p.in_image : p.grad_image) +
                            column * (of_input ? p.in_pixel : p.grad_pixel) + of_slot;
      const int to =
          (of_input ? slot * p.in_pitch : stride * p.in_bytes + slot * p.grad_pitch) + of_slot * 16;
      store_shared_64(table + piece * 8, from,
                      static_cast<uint32_t>(to) |
                          static_cast<uint32_t>(ever ? column + 1 : 0) << 16 |
                          static_cast<uint32_t>(ever ? image : never) << 24,
                      piece < p.rounds * p.team_threads);
    }
  }
  // Where the block of each output starts among the columns of its warp's sums.
  {
    const Channels& c = p.channels;
    const int output = smaller(output0 + thread, c.destination - 1);
    const int start =
        static_cast<int>(block_start(output, c.source, c.destination, c.source_group));
    store_shared_32(shared + thread * 4,
                    static_cast<uint32_t>(start - tile_begin(c, output / tile_channels)),
                    thread < outputs);
  }
  barrier(0, p.threads);

  // The team's share of the output rows of all strips. At step t of a strip gradient row t arrives,
  // and the input rows stride · t - 1 and, for stride 2, 2 · t. Values that a warp's lanes share
  // are said to be so: they then leave the vector registers, which are full.
  const int share = block_x() * p.teams + team,
            begin = (share * p.share + smaller(share, p.longer_shares)) * p.unit;
  const int end = begin + (p.share + (share < p.longer_shares ? 1 : 0)) * p.unit;
  int strip = uniform(begin / p.out_h);
  const int last_strip = uniform((end - 1) / p.out_h), line = uniform(strip / p.column_tiles);
  const int last_rows = end - last_strip * p.out_h,
            last = smaller(last_rows + (stride == 1 ? 1 : 0), p.last_step);
  const int absent =
      last + 1 - last_rows;  // steps at the share's end whose gradient row is not the team's
  int t = begin - strip * p.out_h, now = t;  // of the next request; `now` of the current products
  int left = end > begin ? (last_strip - strip) * (p.last_step + 1) + last + 1 - t : 0;  // steps
  const int column0 = (strip - line * p.column_tiles) * p.columns;
  // Rows stride · t - 1 and t of the line, from column stride · column0 and column0 on.
  unsigned in_row = line * p.line_images * p.in_image + (stride * t - 1) * p.in_row +
                    stride * column0 * p.in_pixel + slab_begin / chunk;
  unsigned grad_row = line * p.line_images * p.grad_image + t * p.grad_row +
                      column0 * p.grad_pixel + output0 / chunk;
  const uint32_t stages = shared + p.stages_at + team * weight_grad_stages * p.stage_bytes;
  // A bit for each of the thread's pieces, the input's first: whether it lies inside the strip's
  // images. The others are zeros.
  uint32_t inside = 0;
  const auto enter_strip = [&] {
    const int line = uniform(strip / p.column_tiles),
              column0 = (strip - line * p.column_tiles) * p.columns;
    const int images_left = smaller(p.images - line * p.line_images, never);
    inside = 0;
    GROSS_NO_UNROLL
    for (int round = p.rounds - 1; round >= 0; round--) {
      const bool of_input = round < p.in_rounds;
      const uint32_t word = load_shared_32(table + (round * p.team_threads + member) * 8 + 4, true);
      const int image = static_cast<int>(word >> 24),
                x = (of_input ? stride : 1) * column0 + static_cast<int>(word >> 16 & 255) - 1;
      inside = inside << 1 |
               (image < images_left &&
                static_cast<unsigned>(x) < static_cast<unsigned>(of_input ? p.in_w : p.out_w));
    }
  };
  enter_strip();
  const auto copy_row = [&](uint32_t to, const void* tensor, unsigned row, int first, int count,
                            uint32_t bits) {
    GROSS_NO_UNROLL
    for (int k = member; k < member + count; k += p.team_threads) {
      uint32_t piece[2];
      load_shared_64(piece, table + (first + k) * 8, true);
      const char* from =
          static_cast<const char*>(tensor) + 16 * static_cast<uint64_t>(row + piece[0]);
      copy_async_16(to + (piece[1] & 0xffff), from, bits & 1, k < count);
      bits >>= 1;
    }
  };
  const auto request = [&](uint32_t to,
                           int steps) {  // the next step's rows, of `steps` that are left then
    if (steps > 0) {
      copy_row(to, p.grad, grad_row, p.first_grad, p.grad_pieces,
               t < p.out_h && steps > absent ? inside >> p.in_rounds : 0);
      GROSS_UNROLL
      for (int j = 0; j < stride; j++)
        if (static_cast<unsigned>(stride * t - 1 + j) < static_cast<unsigned>(p.in_h))
          copy_row(to + j * p.in_bytes, p.input, in_row + j * p.in_row, 0, p.in_pieces, inside);
      in_row += stride * p.in_row;
      grad_row += p.grad_row;
      if (t++ == p.last_step) {
        t = 0;
        strip++;
        in_row += p.in_next_strip;
        grad_row += p.grad_next_strip;
        if (strip % p.column_tiles == 0) {
          in_row += p.in_next_line;
          grad_row += p.grad_next_line;
        }
        enter_strip();
      }
    }
    copy_async_commit();
  };
  for (int i = 0; i < weight_grad_stages - 1; i++) request(stages + i * p.stage_bytes, left - i);

  const int window =
      tile_begin(p.channels, tile0 + warp / p.windows) - slab_begin + warp % p.windows * atoms * 8;
  const uint32_t grad_at = stride * p.in_bytes + warp / p.windows * tile_channels * bytes_of(type) +
                           lane_offset<type>(lane, p.grad_pitch, p.half_slots);
  const uint32_t in_at =
      window * bytes_of(type) + lane_offset<type>(lane, p.in_pitch, p.half_slots);
  const int grad_half = p.half_slots * p.grad_pitch, in_half = p.half_slots * p.in_pitch;

  float sum[9][atoms][4];
  GROSS_UNROLL
  for (int i = 0; i < 9; i++) GROSS_UNROLL
  for (int j = 0; j < atoms; j++) GROSS_UNROLL
  for (int k = 0; k < 4; k++) sum[i][j][k] = 0.f;
  uint32_t gradient[live][products][4];
  GROSS_UNROLL
  for (int i = 0; i < live; i++) GROSS_UNROLL
  for (int j = 0; j < products; j++) GROSS_UNROLL
  for (int k = 0; k < 4; k++) gradient[i][j][k] = 0;

  // An input row, whose kernel row for gradient row now - i is first_kh + step_kh · i.
  const auto multiply_row = [&](auto phase_tag, uint32_t at, int rows, int first_kh, int step_kh) {
    constexpr int phase = decltype(phase_tag)::value;
    GROSS_UNROLL
    for (int i = 0; i < products; i++) GROSS_UNROLL
    for (int kw = 0; kw < 3; kw++) GROSS_UNROLL
    for (int pair = 0; pair < atoms / 2; pair++) {
      const uint32_t from = at + p.in_tap[kw] + p.in_tile[i] + pair * 16 * bytes_of(type);
      const bool half = half_last && i == products - 1;
      uint32_t b[4];
      if (half)
        load_matrix_x2_transposed(b, from);
      else
        load_slots<type>(b, from, in_half);
      GROSS_UNROLL
      for (int row = 0; row < rows; row++) {
        const uint32_t (&a)[4] = gradient[(phase + live - row) % live][i];
        GROSS_UNROLL
        for (int u = 0; u < 2; u++) {
          float (&to)[4] = sum[(first_kh + step_kh * row) * 3 + kw][pair * 2 + u];
          if (half)
            multiply_half<type>(to, a[0], a[1], b[u]);
          else
            multiply<type>(to, a, b[u], b[2 + u]);
        }
      }
    }
  };
  const auto step =
      [&](auto phase_tag) {  // the rows are in stage `phase`, and gradient[phase] takes row `now`
        constexpr int phase = decltype(phase_tag)::value;
        static_assert(live == weight_grad_stages);
        const uint32_t stage = keep(
            stages +
            phase * p.stage_bytes);  // else nine addresses leave the loop, and registers overflow
        copy_async_wait<weight_grad_stages - 2>();
        barrier(1 + team, p.team_threads);
        request(stages + (phase + live - 1) % live * p.stage_bytes,
                left - (weight_grad_stages - 1));
        GROSS_UNROLL
        for (int i = 0; i < products; i++) {
          const uint32_t from = stage + grad_at + p.grad_tile[i];
          if (half_last && i == products - 1)
            load_matrix_x2_transposed(gradient[phase][i], from);
          else
            load_slots<type>(gradient[phase][i], from, grad_half);
        }
        if (now > 0) {
          if constexpr (stride == 1)
            multiply_row(phase_tag, stage + in_at, 3, 0, 1);
          else
            multiply_row(phase_tag, stage + in_at, 2, 0, 2);
        }
        if constexpr (stride == 2)
          if (2 * now < p.in_h) multiply_row(phase_tag, stage + p.in_bytes + in_at, 1, 1, 0);
        now = now == p.last_step ? 0 : now + 1;
        return --left == 0;
      };
  if (left > 0) {
    GROSS_NO_UNROLL
    for (;;) {
      if (step(std::integral_constant<int, 0>{})) break;
      if (step(std::integral_constant<int, 1>{})) break;
      if (step(std::integral_constant<int, 2>{})) break;
    }
  }
  copy_async_wait<0>();

  // A kernel row at a time, so that the sums of all teams fit: [team][kw][output][input].
  const int group_size = p.channels.source_group, width = p.windows * atoms * 8,
            plane = outputs * width;
  const int wanted = smaller(outputs, p.channels.destination - output0) * group_size;
  const uint32_t sums_at = shared + p.stages_at;
  GROSS_UNROLL
  for (int kh = 0; kh < 3; kh++) {
    barrier(0, p.threads);
    GROSS_UNROLL
    for (int kw = 0; kw < 3; kw++) GROSS_UNROLL
    for (int j = 0; j < atoms; j++) GROSS_UNROLL
    for (int high = 0; high < 2; high++) {
      const int row = warp / p.windows * tile_channels + high * 8 + lane / 4,
                column = (warp % p.windows * atoms + j) * 8 + lane % 4 * 2;
      const float (&d)[4] = sum[kh * 3 + kw][j];
      store_shared_64(
          sums_at + ((team * 3 + kw) * plane + row * width + spread(row, column, width)) * 4,
          as_word(d[2 * high]), as_word(d[2 * high + 1]), true);
    }
    barrier(0, p.threads);
    GROSS_NO_UNROLL
    for (int kw = 0; kw < 3; kw++) {
      float* to =
          p.partial +
          ((static_cast<int64_t>(block_x()) * 9 + kh * 3 + kw) * p.channels.destination + output0) *
              group_size;
      GROSS_NO_UNROLL
      for (int first = 0; first < wanted; first += p.threads) {
        const int item = first + thread;
        const bool on = item < wanted;
        const int row = static_cast<int>(static_cast<uint64_t>(item) * p.group_magic >> 31);
        const int column =
            static_cast<int>(load_shared_32(shared + row * 4, on)) + item - row * group_size;
        const uint32_t at = sums_at + (kw * plane + row * width + spread(row, column, width)) * 4;
        float total = as_float(load_shared_32(at, on));
        GROSS_NO_UNROLL
        for (int other = 1; other < p.teams; other++)
          total += as_float(load_shared_32(at + other * 3 * plane * 4, on));
        store_global_32(to + item, as_word(total), on);
      }
    }
  }
}

// ---- Second pass ----

struct WeightGradTerms {
  const float* partial;
  float* gate_parts;  // [active][blocks of the second pass]; null without gates' gradients
  Channels channels;
  int blocks;  // of the first pass
  Series series;
  SeriesGradient gradient;
};

// A block adds up a line of 32 sums: each of 16 warps takes every 16th of the first pass's blocks,
// eight loads at a time, so that 132 blocks are two waits for the memory, and warp 0 adds the warps
// in order.
constexpr int weight_grad_adders = 16;

GROSS_DEVICE float load_term(const void* terms, Type type, int64_t i, bool on) {
  if (type == Type::float32)
    return as_float(load_global_32(static_cast<const float*>(terms) + i, on));
  const uint32_t word = load_global_16(static_cast<const uint16_t*>(terms) + i, on);
  return type == Type::float16 ? low_half<Type::float16>(word) : low_half<Type::bfloat16>(word);
}
GROSS_DEVICE void store_term(void* terms, Type type, int64_t i, float value, bool on) {
  if (type == Type::float32)
    store_global_32(static_cast<float*>(terms) + i, as_word(value), on);
  else
    store_global_16(
        static_cast<uint16_t*>(terms) + i,
        type == Type::float16 ? pack<Type::float16>(value, 0.f) : pack<Type::bfloat16>(value, 0.f),
        on);
}
// The same in all lanes, in an order that depends on the lanes alone.
GROSS_DEVICE float sum_of_warp(float value) {
  GROSS_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

GROSS_KERNEL GROSS_BOUNDS(weight_grad_adders * 32) weight_grad_terms(const WeightGradTerms p) {
  const int thread = thread_index(), lane = thread % 32, warp = uniform(thread / 32);
  const Channels& c = p.channels;
  const int plane = c.destination * c.source_group, count = 9 * plane, item = block_x() * 32 + lane;
  const bool on = item < count;
  float sum = 0.f;
  GROSS_UNROLL_BY(8)
  for (int block = warp; block < p.blocks; block += weight_grad_adders)
    sum += as_float(load_global_32(p.partial + static_cast<int64_t>(block) * count + item, on));
  const uint32_t shared = shared_base();
  store_shared_32(shared + thread * 4, as_word(sum), true);
  barrier(0, weight_grad_adders * 32);

  if (warp == 0) {
    sum = 0.f;
    GROSS_UNROLL
    for (int i = 0; i < weight_grad_adders; i++)
      sum += as_float(load_shared_32(shared + (i * 32 + lane) * 4, true));
    const int tap = item / plane, output = item % plane / c.source_group,
              column = item % plane % c.source_group;
    const int start =
        static_cast<int>(block_start(output, c.source, c.destination, c.source_group));
    GROSS_NO_UNROLL
    for (int i = 0; i < p.series.active; i++) {
      const int size = p.series.group_sizes[i];
      const int from = static_cast<int>(block_start(output, c.source, c.destination, size));
      const int own = start + column - from;
      const bool inside = on && own >= 0 && own < size;
      const int64_t at = (static_cast<int64_t>(output) * size + own) * 9 + tap;
      const float gate =
          p.series.gates == nullptr ? 1.f : as_float(load_global_32(p.series.gates + i, true));
      store_term(p.gradient.terms[i], p.series.type, at, gate * sum, inside);
      if (p.gate_parts != nullptr) {
        const float term = load_term(p.series.terms[i], p.series.type, at, inside);
        const float part = sum_of_warp(inside ? sum * term : 0.f);
        store_global_32(p.gate_parts + static_cast<int64_t>(i) * grid_x() + block_x(),
                        as_word(part), lane == 0);
      }
    }
  }
  // Gradients of inactive terms are zeros.
  const int64_t everyone = static_cast<int64_t>(grid_x()) * weight_grad_adders * 32;
  GROSS_NO_UNROLL
  for (int i = p.series.active; i < p.series.count; i++) {
    const int64_t pieces = static_cast<int64_t>(c.destination) * p.series.group_sizes[i] * 9 *
                           bytes_of(p.series.type) / 16;
    GROSS_NO_UNROLL
    for (int64_t first = static_cast<int64_t>(block_x()) * weight_grad_adders * 32; first < pieces;
         first += everyone)
      store_global_128(static_cast<char*>(p.gradient.terms[i]) + (first + thread) * 16,
                       {0, 0, 0, 0}, first + thread < pieces);
  }
}

// A block per gate adds what the blocks of the second pass found.
GROSS_KERNEL GROSS_BOUNDS(256)
    weight_grad_gates(const float* parts, int count, int active, float* gates) {
  const int thread = thread_index(), gate = block_x();
  float sum = 0.f;
  if (gate < active) {
    GROSS_NO_UNROLL
    for (int first = 0; first < count; first += 256)
      sum += as_float(load_global_32(parts + static_cast<int64_t>(gate) * count + first + thread,
                                     first + thread < count));
  }
  sum = sum_of_warp(sum);
  const uint32_t shared = shared_base();
  store_shared_32(shared + thread / 32 * 4, as_word(sum), thread % 32 == 0);
  barrier(0, 256);
  sum = 0.f;
  GROSS_UNROLL
  for (int i = 0; i < 8; i++) sum += as_float(load_shared_32(shared + i * 4, true));
  store_global_32(gates + gate, as_word(sum), thread == 0);
}

}  // namespace gross::cuda
