// The grouped 3×3 convolution and its input gradient, channels-last, weights assembled from nested terms (assembly.h).
//
// A team of four warps marches down the rows of a tile: some columns of one image, or whole rows of several images side by side, times a
// slab of 16 to 64 destination channels. Source rows travel to shared memory by asynchronous copies, several rows ahead of
// their use; each is read from global memory once and from shared memory three times, once per kernel column, and each fragment feeds
// the three destination rows that see it, whose sums rotate. Weights stay in registers as the A operand of products (16
// destination channels × 32 bytes of source channels per tap); pixels are the columns of B and D, in atoms of eight.
#pragma once

#include <type_traits>

#include "assembly.h"

namespace gross::cuda {

constexpr int team_warps = 4, team_threads = 32 * team_warps;
constexpr int early_rows = 2;  // requested before the weights are assembled

// How a launch cuts its work. `columns` pixels of each of `images` images lie side by side in a tile's row.
struct Tile {
  int tiles;   // of 16 destination channels: 1, 2 or 4; the warps of a team share them and lie side by side along the pixels
  int teams;   // of a thread block: each marches through its own rows
  int stages;  // rows of source in shared memory: 4, 6 or 8
  int columns, images;
  int column_tiles, bundles;  // bundles: of `images` images
  int lanes;                  // threads side by side on one source pixel, a power of two
  uint32_t columns_magic;     // divides a pixel of the row by `columns`: exact for fewer than 256
  int piece;                  // output channels whose terms are in shared memory at a time, while weights are assembled
  uint32_t pitch;             // bytes from a source pixel to the next: an odd number of pieces of 16
  uint32_t gap;               // bytes before, between and after the images of a row: the zero padding
  uint32_t row_bytes;
  uint32_t staging_pitch, staging_bytes;
  uint32_t shared_bytes;
  // From a thread's piece of a row to its next, in pixels, in shared and in global memory; and how many there are.
  int read_pixels, read_rounds;
  uint32_t read_bytes, read_step;
  int write_pixels;
  uint32_t write_bytes, write_step;
};

// A dense channels-last image, in pieces of 16 bytes: 32 bits reach 64 GB.
struct View {
  void* data;
  int height, width;
  uint32_t pixel_step, row_step, image_step;
  uint32_t image_gap;   // from the end of a row to the same row of the next image
  uint32_t bundle_gap;  // from the end of an image to the next bundle
};

struct Problem {
  Channels channels;
  Terms terms;
  bool transposed;
  int images;
  View source, destination;
  Tile tile;
};

template <Type type_, int steps_, int atoms_, bool many_>
struct Shape {
  static constexpr Type type = type_;
  static constexpr int steps = steps_;   // products in k per tap
  static constexpr int atoms = atoms_;   // eight pixels each, of one warp
  static constexpr bool many = many_;    // several images side by side
  // 4 · (9 · steps + 3 · atoms) registers hold weights and sums: what is left of 64 K for each thread decides how many teams fit.
  static constexpr int most_teams = 9 * steps + 3 * atoms <= 21 ? 4 : 9 * steps + 3 * atoms <= 30 ? 3 : 2;
};

// The image that a pixel of a row of images side by side belongs to.
GROSS_DEVICE int image_of(const Tile& t, int pixel) { return static_cast<int>(pixel * t.columns_magic >> 16); }

// Rows of source pixels on their way to shared memory, 16 bytes per thread and copy.
template <class S>
struct Reader {
  const Problem& p;
  const Tile& t;
  uint32_t to;      // where this thread's first piece goes within a stage
  uint32_t from;    // its piece of the next row
  int slot;         // its first pixel
  uint32_t pieces;  // two bits for each of its pieces: there is one; and it is of the image, else zeros
  int row, images;  // the next row; images left from its bundle on

  GROSS_DEVICE Reader(const Problem& problem, const Slab& slab, int member, int column0, int bundle, int first_row, uint32_t rows_at)
      : p(problem), t(problem.tile), slot(member / problem.tile.lanes), pieces(0), row(first_row), images(problem.images - bundle * problem.tile.images) {
    const int piece = member % t.lanes, channel = slab.source.begin + piece * p.channels.chunk;
    const int column = S::many ? 0 : column0 + slot - 1, slots = S::many ? t.columns * t.images : t.columns + 2;
    for (int j = 0; j < t.read_rounds; j++) {
      const bool there = channel < slab.source.end && slot + j * t.read_pixels < slots;
      const bool in_image = channel < p.channels.source && (S::many || static_cast<unsigned>(column + j * t.read_pixels) < static_cast<unsigned>(p.source.width));
      pieces |= (there ? 1u : 0u) << 2 * j | (in_image ? 2u : 0u) << 2 * j;
    }
    to = rows_at + piece * 16 + slot * t.pitch + (S::many ? t.gap : 0);
    from = static_cast<uint32_t>(bundle * t.images) * p.source.image_step + row * p.source.row_step + channel / p.channels.chunk +
           (S::many ? slot : column) * p.source.pixel_step;
  }

  // Requests the next row into the stage at this offset, then moves on: after an image's last row comes one that is not read.
  GROSS_DEVICE void request(bool wanted, uint32_t stage) {
    if (wanted && row < p.source.height) {
      uint32_t left = pieces;
      GROSS_NO_UNROLL
      for (int first = 0; first < t.read_rounds; first += 4) {
        GROSS_UNROLL
        for (int j = 0; j < 4; j++) {
          uint32_t offset = from + (first + j) * t.read_step, destination = to + stage + (first + j) * t.read_bytes;
          bool on = left & 1u << 2 * j;
          if constexpr (S::many) {
            const int image = image_of(t, slot + (first + j) * t.read_pixels);
            offset += image * p.source.image_gap;
            destination += image * t.gap;
            on = on && image < images;
          }
          copy_async_16(destination, static_cast<const char*>(p.source.data) + 16ull * offset, left & 2u << 2 * j, on);
        }
        left >>= 8;
      }
    }
    copy_async_commit();
    from += p.source.row_step;
    if (++row > p.source.height) {
      row = 0;
      images -= t.images;
      from += p.source.bundle_gap - p.source.row_step;
    }
  }

  // Zeros around the images: copies bring pixels alone.
  GROSS_DEVICE void clear_gaps(int member, uint32_t rows_at, uint32_t stage_step) const {
    const int count = (t.images + 1) * (t.gap / 16), rounds = divide_up(count, team_threads);
    for (int stage = 0; stage < t.stages; stage++)
      for (int r = 0; r < rounds; r++) {
        const int k = r * team_threads + member, image = k / (t.gap / 16);
        store_shared_128(rows_at + stage * stage_step + image * t.columns * t.pitch + k * 16, {0, 0, 0, 0}, k < count);
      }
  }
};

// Finished rows: sums are rounded into shared memory, [pixel][channel], one of two halves at a time, and leave it one step later in
// pieces of 16 bytes.
template <class S>
struct Writer {
  static constexpr int channel_bytes = bytes_of(S::type);
  static constexpr int rounds = divide_up(S::atoms * 8 * team_warps * tile_channels * channel_bytes / 16, team_threads);

  const Problem& p;
  const Tile& t;
  uint32_t staged;      // where this lane's sums go
  uint32_t piece_from;  // this thread's first piece in shared memory
  uint32_t to;          // and in the row to be stored next
  int pixel;            // its first pixel
  uint32_t pieces;      // a bit for each of its pieces: there is one

  GROSS_DEVICE Writer(const Problem& problem, const Slab& slab, int member, int tile, int first_pixel, int column0, int bundle, int first_row,
                      uint32_t staging)
      : p(problem), t(problem.tile), pieces(0) {
    const int lane = member % 32, row_pieces = t.tiles * tile_channels * channel_bytes / 16, piece = member % row_pieces;
    const int channel = slab.first + piece * p.channels.chunk;
    staged = staging + (first_pixel + lane % 4 * 2) * t.staging_pitch + (tile * tile_channels + lane / 4 * 2) * channel_bytes;
    pixel = member / row_pieces;
    const int pixels = S::many ? t.columns * t.images : smaller(t.columns, p.destination.width - column0);
    GROSS_UNROLL
    for (int j = 0; j < rounds; j++)
      pieces |= (channel < p.channels.destination && pixel + j * t.write_pixels < pixels ? 1u : 0u) << j;
    piece_from = staging + pixel * t.staging_pitch + piece * 16;
    to = static_cast<uint32_t>(bundle * t.images) * p.destination.image_step + first_row * p.destination.row_step + channel / p.channels.chunk +
         (column0 + pixel) * p.destination.pixel_step;
  }

  GROSS_DEVICE void stage(const float (&sum)[S::atoms][4], uint32_t half) const {
    GROSS_UNROLL
    for (int a = 0; a < S::atoms; a++) {
      const uint32_t even = staged + half + a * 8 * t.staging_pitch, odd = even + t.staging_pitch;
      if constexpr (S::type == Type::float32) {
        store_shared_64(even, as_word(sum[a][0]), as_word(sum[a][2]), true);
        store_shared_64(odd, as_word(sum[a][1]), as_word(sum[a][3]), true);
      } else {
        store_shared_32(even, pack<S::type>(sum[a][0], sum[a][2]), true);
        store_shared_32(odd, pack<S::type>(sum[a][1], sum[a][3]), true);
      }
    }
  }

  // `images`: left from the row's bundle on.
  GROSS_DEVICE void store(uint32_t half, int images, bool last_of_image) {
    Words4 v[rounds];
    bool on[rounds];
    uint32_t offset[rounds];
    GROSS_UNROLL
    for (int j = 0; j < rounds; j++) {
      offset[j] = to + j * t.write_step;
      on[j] = pieces & 1u << j;
      if constexpr (S::many) {
        const int image = image_of(t, pixel + j * t.write_pixels);
        offset[j] += image * p.destination.image_gap;
        on[j] = on[j] && image < images;
      }
      v[j] = load_shared_128(piece_from + half + j * t.write_bytes, on[j]);
    }
    GROSS_UNROLL
    for (int j = 0; j < rounds; j++) store_global_128(static_cast<char*>(p.destination.data) + 16ull * offset[j], v[j], on[j]);
    to += p.destination.row_step;
    if (last_of_image) to += p.destination.bundle_gap;
  }
};

GROSS_DEVICE void wait_for_row(int stages) {
  if (stages == 4)
    copy_async_wait<2>();
  else if (stages == 6)
    copy_async_wait<4>();
  else
    copy_async_wait<6>();
}

// Stride 1. The input gradient is the same on the transposed, turned weight.
template <class S>
GROSS_KERNEL GROSS_BOUNDS(S::most_teams* team_threads) march(const Problem p) {
  using Weights = Assembly<S::type, S::steps>;
  const Tile& t = p.tile;
  const int thread = thread_index(), threads = t.teams * team_threads, lane = thread % 32, block_warp = uniform(thread / 32);
  const int team = block_warp / team_warps, warp = block_warp % team_warps, member = thread % team_threads;
  const int tile = warp % t.tiles, first_pixel = warp / t.tiles * S::atoms * 8;
  const int slab_index = block_y() / t.column_tiles, column0 = (block_y() - slab_index * t.column_tiles) * t.columns;
  const int first = slab_index * t.tiles * tile_channels;
  const Slab slab{first, t.tiles, p.channels.slab(first, t.tiles, Weights::columns)};
  const uint32_t shared = shared_base();

  // This team's share of the stream of destination rows. The stream of source rows has one more per bundle of images, at which
  // the bundle's last destination row leaves.
  const int height = p.source.height;
  const long long rows = static_cast<long long>(t.bundles) * height, shares = grid_x() * t.teams, share = block_x() * t.teams + team;
  const int begin = static_cast<int>(rows * share / shares), end = static_cast<int>(rows * (share + 1) / shares);
  const int bundle = begin / height, last_bundle = (end - 1) / height, first_row = begin - bundle * height;
  const int start = larger(first_row - 1, 0);
  // Steps are counted so that those from the second on finish rows of this share.
  const int first_step = first_row > 0 ? 0 : 1;
  const int last_step = end > begin ? first_step + (last_bundle - bundle) * (height + 1) + (end - 1 - last_bundle * height) + 2 - start : first_step;

  const uint32_t stage_step = t.teams * t.row_bytes, stages_end = t.stages * stage_step;
  const uint32_t rows_at = shared + team * t.row_bytes, staging = shared + stages_end + team * t.staging_bytes;
  Reader<S> reader(p, slab, member, column0, bundle, start, rows_at);
  Writer<S> writer(p, slab, member, tile, first_pixel, column0, bundle, first_row, staging);

  uint32_t weight[9][S::steps][4];
  {
    const uint32_t matrix = shared + early_rows * stage_step, raw = matrix + Weights::matrix_bytes(t.tiles);
    const Range outputs = Weights::outputs(p.channels, p.transposed, slab);
    Range piece{outputs.begin, smaller(outputs.begin + t.piece, outputs.end)};
    Weights::request(p.terms, piece, raw, thread, threads);
    GROSS_UNROLL
    for (int i = 0; i < early_rows; i++) reader.request(first_step + i < last_step, i * stage_step);
    Weights::clear(t.tiles, matrix, thread, threads);
    copy_async_wait<early_rows>();
    GROSS_NO_UNROLL
    for (;;) {
      barrier(0, threads);
      Weights::combine(p.terms, p.channels, p.transposed, slab, piece, matrix, raw, thread, threads);
      piece = {piece.end, smaller(piece.end + t.piece, outputs.end)};
      barrier(0, threads);
      if (piece.size() <= 0) break;
      Weights::request(p.terms, piece, raw, thread, threads);
      copy_async_wait<0>();
    }
    Weights::load(weight, tile, t.tiles, matrix, lane);
    barrier(0, threads);
    if (S::many) reader.clear_gaps(member, rows_at, stage_step);
    GROSS_NO_UNROLL
    for (int i = early_rows; i < t.stages - 1; i++) reader.request(first_step + i < last_step, i * stage_step);
  }

  // Where this lane's row of an 8×8 matrix lies within a stage.
  uint32_t fragment, image_of_pair = 0;
  constexpr int atom_pairs = (S::atoms + 1) / 2;
  {
    const int pixel = first_pixel + lane / 16 * 8 + lane % 8;
    const int source = p.channels.tile_begin(slab.source, first + tile * tile_channels, Weights::columns) - slab.source.begin;
    fragment = rows_at + pixel * t.pitch + t.gap - t.pitch + (source / p.channels.chunk + lane / 8 % 2) * 16;
    if (S::many) {  // one byte for each pair of atoms; pixels past the last read the last image's rows: never stored
      GROSS_UNROLL
      for (int pair = 0; pair < atom_pairs; pair++)
        image_of_pair |= static_cast<uint32_t>(smaller(image_of(t, pixel + pair * 16), t.images - 1)) << 8 * pair;
      image_of_pair = keep(image_of_pair);
    }
  }

  float sum[3][S::atoms][4];
  uint32_t stage = 0;
  int row = start, images = p.images - bundle * t.images;  // of the source, at this step; images left from its bundle on
  const auto half_of = [&](int step) { return (step & 1) * t.teams * t.staging_bytes; };
  const auto store_previous = [&](int step) {  // what the step before has finished
    if (row == 1 || step <= 2) return;
    writer.store(half_of(step - 1), row == 0 ? images + t.images : images, row == 0);
  };
  const auto take_step = [&](auto phase_tag, int step) {
    constexpr int phase = decltype(phase_tag)::value;
    constexpr int finished = (phase + 2) % 3, middle = phase, fresh = (phase + 1) % 3;
    wait_for_row(t.stages);
    barrier(1 + team, team_threads);
    if (S::many) store_previous(step);
    reader.request(step + t.stages - 1 < last_step, stage == 0 ? stages_end - stage_step : stage - stage_step);
    if (row < height) {
      GROSS_UNROLL
      for (int kw = 0; kw < 3; kw++)
        GROSS_UNROLL
        for (int k = 0; k < S::steps; k++)
          GROSS_UNROLL
          for (int pair = 0; pair < atom_pairs; pair++) {
            uint32_t x[4];
            const uint32_t at = fragment + stage + (kw + pair * 16) * t.pitch + k * 32 + (S::many ? (image_of_pair >> 8 * pair & 255) * t.gap : 0);
            if (pair * 2 + 1 < S::atoms)
              load_matrix_x4(x, at);
            else
              load_matrix_x2(x, at);
            GROSS_UNROLL
            for (int u = 0; u < 2; u++)
              if (pair * 2 + u < S::atoms) {
                const int a = pair * 2 + u < S::atoms ? pair * 2 + u : 0;
                multiply<S::type>(sum[finished][a], weight[6 + kw][k], x[2 * u], x[2 * u + 1]);
                multiply<S::type>(sum[middle][a], weight[3 + kw][k], x[2 * u], x[2 * u + 1]);
                if (kw == 0 && k == 0)
                  multiply_first<S::type>(sum[fresh][a], weight[kw][k], x[2 * u], x[2 * u + 1]);
                else
                  multiply<S::type>(sum[fresh][a], weight[kw][k], x[2 * u], x[2 * u + 1]);
              }
          }
    }
    if (!S::many) store_previous(step);  // here the fragments' registers are free and the matrix units still busy
    if (row > 0 && step >= 2) writer.stage(sum[finished], half_of(step));
    stage = stage == stages_end - stage_step ? 0 : stage + stage_step;
  };
  int step = first_step;
  const auto ends = [&](auto phase_tag) {
    take_step(phase_tag, step);
    return (++step == last_step) | (row++ == height);
  };
  GROSS_NO_UNROLL
  while (step < last_step) {
    // Once per bundle: clearing inside the loop costs 28 selects a step.
    GROSS_UNROLL
    for (int i = 0; i < 3; i++)
      GROSS_UNROLL
      for (int a = 0; a < S::atoms; a++)
        GROSS_UNROLL
        for (int j = 0; j < 4; j++) sum[i][a][j] = 0.f;
    GROSS_NO_UNROLL
    for (;;) {
      if (ends(std::integral_constant<int, 0>{})) break;
      if (ends(std::integral_constant<int, 1>{})) break;
      if (ends(std::integral_constant<int, 2>{})) break;
    }
    row = 0;
    images -= t.images;
  }
  copy_async_wait<0>();
  barrier(1 + team, team_threads);
  store_previous(last_step);
}

}  // namespace gross::cuda
