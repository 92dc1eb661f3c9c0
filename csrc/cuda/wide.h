// The convolution and its input gradient at stride 1 for group sizes beyond 16, on matrix units
// that take a whole warpgroup (sm_90a): twice the rate of products that a warp alone gets (63 % of
// the peak as published, against 95 %; not measured here).
//
// As in convolution.h weights are A, in registers, and blocks march down the rows. A's 64 rows are
// 64 destination channels of one row, or 32 of two neighbouring rows (a quarter of A is then zero).
// Pixels are B, which the matrix unit reads from shared memory itself: no fragments are loaded, no
// sums rotate, and each of the nine taps reads them again.
//
// B has no swizzle: a plane for every 16 bytes of a pixel, in which pixels lie 16 bytes apart, so
// that the next column begins 16 bytes further on. A line is `columns` pixels of each of `images`
// images, with one pixel of zeros between images, which is the right border of one and the left
// border of the next; the products of the gaps are thrown away.
#pragma once

#include "assembly.h"

namespace gross::cuda {

constexpr int warpgroup_threads = 128;

struct WideProblem {
  Channels channels;
  Terms terms;
  bool transposed;
  const void* source;
  void* destination;
  int images, height, width;
  int columns, line_images, column_tiles, bundles;  // bundles: of `line_images` images
  int piece;       // output channels whose terms are in shared memory at a time, while weights are
                   // assembled
  uint32_t magic;  // ⌈2¹⁶ / (columns + 1)⌉: divides a pixel of a line, up to 66; 0 where there is
                   // one image
  // Steps through global memory, in pieces of 16 bytes: 32 bits reach 64 GB.
  uint32_t source_pixel, source_row, source_image, destination_pixel, destination_row,
      destination_image;
};

template <Type type_, int steps_, int atoms_>
struct WideShape {
  static constexpr Type type = type_;
  static constexpr int steps = steps_;  // of 16 source channels
  static constexpr int atoms = atoms_;  // of eight pixels
  static constexpr int block = 16 * steps, tiles = steps, chunks = block / 8, pixels = 8 * atoms,
                       slots = pixels + 2;
  static constexpr int rows = 64 / block;  // destination rows of a step, source rows of a unit
  static constexpr int lead = 2 / rows;    // units that a run of steps needs before its first
  static constexpr int input_rows = rows + 2;
  // Weights take 144 or 96 registers of a thread and sums 28 or 32; two teams leave it 255, three
  // 168.
  static constexpr int teams = steps == 4 ? 2 : 3, threads = teams * warpgroup_threads;
  // Eight neighbouring pieces of 16 bytes arrive in eight groups of banks: of 8 planes, or of 4 at
  // two pixels.
  static constexpr int plane = (chunks == 8 ? slots | 1 : (slots + 5) / 8 * 8 + 2) * 16;
  static constexpr int row_bytes = chunks * plane, unit_bytes = rows * row_bytes;
  static constexpr int stages = steps == 4 ? 8 : 6,
                       ahead = stages - lead - 1;  // units requested beyond the one in use
  static constexpr int early = 2;                  // of them before the weights are assembled
  static constexpr int staged_pitch = block * 2 + 16, staged_bytes = rows * pixels * staged_pitch;
  static constexpr int stage_step = teams * unit_bytes, half_step = teams * staged_bytes;
  static constexpr int staging_at = stages * stage_step,
                       marching_bytes = staging_at + 2 * half_step;
  static constexpr int matrix_at = early * stage_step,
                       raw_at = matrix_at + 9 * block * Assembly<type, steps>::pitch;
  static constexpr int load_pixels =
      warpgroup_threads / chunks;  // from a thread's piece to its next
  static constexpr int load_rounds = divide_up(slots, load_pixels),
                       store_rounds = divide_up(pixels, load_pixels);
  static_assert(raw_at < marching_bytes && early <= ahead);
};

template <class S>
GROSS_KERNEL GROSS_BOUNDS(S::threads) march_wide(const WideProblem p) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // supports_wide() never chooses another architecture
#else
  const int thread = thread_index(), lane = thread % 32, block_warp = uniform(thread / 32);
  const int team = block_warp / 4, warp = block_warp % 4, member = thread % warpgroup_threads;
  const int slab_index = block_y() / p.column_tiles,
            column0 = (block_y() - slab_index * p.column_tiles) * p.columns;
  const int first_channel = slab_index * S::block;
  const Slab slab{first_channel, S::tiles, p.channels.slab(first_channel, S::tiles, S::block)};

  // This team's share of all steps, an image's rows after the other's; a bundle counts as one
  // image.
  const int per_image = divide_up(p.height, S::rows);
  const long long all = static_cast<long long>(p.bundles) * per_image, shares = grid_x() * S::teams,
                  share = block_x() * S::teams + team;
  const int begin = static_cast<int>(all * share / shares),
            end = static_cast<int>(all * (share + 1) / shares);
  const int bundle = begin / per_image, first = begin - bundle * per_image;

  // Thread `member` moves one piece of the pixels slot, slot + load_pixels, … of every row.
  const int chunk = member % S::chunks, slot = member / S::chunks;
  const uint32_t units_at = shared_base() + team * S::unit_bytes;
  const int source_channel = slab.source.begin + chunk * 8;
  const uint32_t load_step = S::load_pixels * p.source_pixel,
                 load_gap = p.source_image - (p.columns + 1) * p.source_pixel;
  // Of each piece, two bits: there is such a slot; it holds a pixel; one bit from 16 on: it is
  // stored. Six bits: whose pixel.
  uint32_t pieces = 0, image_of_load = 0;
  static_assert(S::load_rounds <= 5 && S::store_rounds <= 5);
  GROSS_UNROLL
  for (int j = 0; j < S::load_rounds; j++) {
    const int s = slot + j * S::load_pixels, image = static_cast<int>(s * p.magic >> 16),
              column = s - image * (p.columns + 1) - 1;
    const bool there =
        s < (p.line_images == 1 ? p.columns + 2 : p.line_images * (p.columns + 1) + 1);
    const bool pixel = source_channel < p.channels.source && image < p.line_images &&
                       static_cast<unsigned>(column0 + column) < static_cast<unsigned>(p.width);
    pieces |= (there ? 1u : 0u) << 2 * j | (pixel ? 2u : 0u) << 2 * j;
    image_of_load |= static_cast<uint32_t>(image) << 6 * j;
  }
  // The unit to be requested next: its place in the image, its first row, images left from its
  // bundle on, and how many are left.
  int unit = first, read_images = p.images - bundle * p.line_images;
  int units_left = end > begin ? end - begin + ((end - 1) / per_image - bundle + 1) * S::lead : 0;
  uint32_t read_at = static_cast<uint32_t>(bundle * p.line_images) * p.source_image +
                     (first * S::rows - 1) * p.source_row + (column0 + slot - 1) * p.source_pixel +
                     source_channel / 8;
  auto request = [&](uint32_t stage) {
    if (units_left-- > 0) {
      GROSS_UNROLL
      for (int r = 0; r < S::rows; r++) {
        const int row = unit * S::rows - 1 + r;
        const bool inside = static_cast<unsigned>(row) < static_cast<unsigned>(p.height);
        GROSS_UNROLL
        for (int j = 0; j < S::load_rounds; j++) {
          const int image = image_of_load >> 6 * j & 63;
          const bool valid = inside && (pieces >> 2 * j & 2) && image < read_images;
          copy_async_16(units_at + stage + r * S::row_bytes + chunk * S::plane +
                            (slot + j * S::load_pixels) * 16,
                        static_cast<const char*>(p.source) +
                            16ull * static_cast<uint32_t>(read_at + r * p.source_row +
                                                          j * load_step + image * load_gap),
                        valid, pieces >> 2 * j & 1);
        }
      }
      read_at += S::rows * p.source_row;
      if (++unit == per_image + S::lead) {
        unit = 0;
        read_images -= p.line_images;
        read_at += p.line_images * p.source_image - (per_image + S::lead) * S::rows * p.source_row;
      }
    }
    copy_async_commit();
  };

  uint32_t weight[S::input_rows][3][S::steps]
                 [4];  // [input row of a step][kernel column][16 source channels]
  const int tile = warp % S::tiles, output_row = warp / S::tiles;
  {
    using Weights = Assembly<S::type, S::steps>;
    const uint32_t matrix = shared_base() + S::matrix_at, raw = shared_base() + S::raw_at;
    const Range outputs = Weights::outputs(p.channels, p.transposed, slab);
    Range piece{outputs.begin, smaller(outputs.begin + p.piece, outputs.end)};
    Weights::request(p.terms, p.transposed, piece, raw, thread, S::threads);
    GROSS_UNROLL
    for (int i = 0; i < S::early; i++) request(i * S::stage_step);
    Weights::clear(S::tiles, matrix, thread, S::threads);
    copy_async_wait<S::early>();
    GROSS_NO_UNROLL
    for (;;) {
      barrier(0, S::threads);
      Weights::combine(p.terms, p.channels, p.transposed, slab, piece, matrix, raw, thread,
                       S::threads);
      piece = {piece.end, smaller(piece.end + p.piece, outputs.end)};
      barrier(0, S::threads);
      if (piece.size() <= 0) break;
      Weights::request(p.terms, p.transposed, piece, raw, thread, S::threads);
      copy_async_wait<0>();
    }
    GROSS_UNROLL
    for (int i = 0; i < S::input_rows; i++) GROSS_UNROLL
    for (int kw = 0; kw < 3; kw++) GROSS_UNROLL
    for (int k = 0; k < S::steps; k++) {
      const int kh = i - output_row;  // the same in all lanes
      if (kh >= 0 && kh < 3)
        load_matrix_x4(
            weight[i][kw][k],
            matrix +
                (((kh * 3 + kw) * S::tiles + tile) * tile_channels + lane % 16) * Weights::pitch +
                k * 32 + lane / 16 * 16);
      else
        weight[i][kw][k][0] = weight[i][kw][k][1] = weight[i][kw][k][2] = weight[i][kw][k][3] = 0;
    }
    barrier(0, S::threads);
    GROSS_UNROLL
    for (int i = S::early; i < S::ahead; i++) request(i * S::stage_step);
  }

  // A step's rows are rounded into shared memory, [row][pixel][channel], and leave one step later
  // in pieces of 16 bytes.
  const uint32_t staging = shared_base() + S::staging_at + team * S::staged_bytes;
  const uint32_t staged = staging + (output_row * S::pixels + lane % 4 * 2) * S::staged_pitch +
                          tile * 32 + lane / 4 * 4;
  const int staged_pixel = pixel_of(slot, S::chunks);
  const uint32_t piece_from = staging + staged_pixel * S::staged_pitch + chunk * 16;
  const int destination_channel = first_channel + chunk * 8;
  const uint32_t store_step = S::load_pixels * p.destination_pixel,
                 store_gap = p.destination_image - (p.columns + 1) * p.destination_pixel;
  uint32_t image_of_store = 0;
  GROSS_UNROLL
  for (int j = 0; j < S::store_rounds; j++) {
    const int n = staged_pixel + j * S::load_pixels, image = static_cast<int>(n * p.magic >> 16),
              column = n - image * (p.columns + 1);
    const bool on = n < S::pixels && destination_channel < p.channels.destination &&
                    image < p.line_images && column < smaller(p.columns, p.width - column0);
    pieces |= (on ? 1u : 0u) << (16 + j);
    image_of_store |= static_cast<uint32_t>(image) << 6 * j;
  }
  int stored_row = first * S::rows, write_images = p.images - bundle * p.line_images;
  uint32_t write_at = static_cast<uint32_t>(bundle * p.line_images) * p.destination_image +
                      first * S::rows * p.destination_row +
                      (column0 + staged_pixel) * p.destination_pixel + destination_channel / 8;
  uint32_t half = 0;
  bool waiting = false;  // a step's rows are in shared memory
  auto store = [&]() {
    if (!waiting) return;
    GROSS_UNROLL
    for (int r = 0; r < S::rows; r++) GROSS_UNROLL
    for (int j = 0; j < S::store_rounds; j++) {
      const int image = image_of_store >> 6 * j & 63;
      const bool on = (pieces >> (16 + j) & 1) && image < write_images && stored_row + r < p.height;
      const Words4 v = load_shared_128(
          piece_from + half + (r * S::pixels + j * S::load_pixels) * S::staged_pitch, on);
      store_global_128(static_cast<char*>(p.destination) +
                           16ull * static_cast<uint32_t>(write_at + r * p.destination_row +
                                                         j * store_step + image * store_gap),
                       v, on);
    }
    half ^= S::half_step;
    waiting = false;
    stored_row += S::rows;
    write_at += S::rows * p.destination_row;
    if (stored_row >= p.height) {
      write_at += p.line_images * p.destination_image - stored_row * p.destination_row;
      stored_row = 0;
      write_images -= p.line_images;
    }
  };

  uint32_t stage = 0;
  const auto back = [&](int units) {
    const uint32_t distance = units * S::stage_step;
    return stage >= distance ? stage - distance : stage + S::stages * S::stage_step - distance;
  };
  int left = end - begin, now = first,
      filled = 0;  // steps; the step's place in its image; units of the lead
  GROSS_NO_UNROLL
  while (left > 0) {
    copy_async_wait<S::ahead - 1>();
    fence_for_matrix_units();
    barrier(1 + team, warpgroup_threads);
    request(
        back(S::lead +
             1));  // the stages of the last `lead` units and of this one are in use from here on
    if (filled < S::lead) {
      filled++;
      store();
    } else {
      float sum[S::atoms][4];
      GROSS_UNROLL
      for (int a = 0; a < S::atoms; a++) GROSS_UNROLL
      for (int j = 0; j < 4; j++) sum[a][j] = 0.f;
      warpgroup_arrive();
      GROSS_UNROLL
      for (int i = 0; i < S::input_rows; i++) {
        const uint64_t row = matrix_descriptor(
            units_at + back(S::lead - i / S::rows) + i % S::rows * S::row_bytes, S::plane);
        GROSS_UNROLL
        for (int kw = 0; kw < 3; kw++) GROSS_UNROLL
        for (int k = 0; k < S::steps; k++)
          warpgroup_multiply<S::type, S::atoms>(sum, weight[i][kw][k],
                                                row + kw + k * 2 * (S::plane >> 4));
      }
      warpgroup_commit();
      store();  // the rows of the step before, while the matrix units work
      warpgroup_wait<0>();
      fence_sums(sum);
      GROSS_UNROLL
      for (int a = 0; a < S::atoms; a++) {
        const uint32_t even = staged + half + a * 8 * S::staged_pitch;
        store_shared_32(even, pack<S::type>(sum[a][0], sum[a][2]), true);
        store_shared_32(even + S::staged_pitch, pack<S::type>(sum[a][1], sum[a][3]), true);
      }
      waiting = true;
      left--;
      if (++now == per_image) {
        now = 0;
        filled = 0;
      }
    }
    stage = stage == (S::stages - 1) * S::stage_step ? 0 : stage + S::stage_step;
  }
  copy_async_wait<0>();
  barrier(1 + team, warpgroup_threads);
  store();
#endif
}

}  // namespace gross::cuda
