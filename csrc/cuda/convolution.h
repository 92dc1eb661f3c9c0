// The grouped 3×3 convolution and its input gradient, channels-last, weights assembled from nested
// terms (assembly.h).
//
// A team of four warps marches down the rows of a tile: some columns of one image, or whole rows of
// several images side by side, times a slab of 16 to 64 destination channels. Source rows travel to
// shared memory by asynchronous copies, several rows ahead of their use; each is read from global
// memory once and from shared memory once per kernel column, and each fragment feeds all the
// destination rows that see it, whose sums rotate. Weights stay in registers as the A operand of
// products (16 destination channels × 32 bytes of source channels per tap); pixels are the columns
// of B and D, in atoms of eight.
//
// Three walks: `march` for stride 1 in both directions; `march_halving`, the forward of stride 2,
// takes two source rows a step and keeps odd and even columns apart, so that fragments read
// neighbouring pixels again; `march_doubling`, its input gradient, turns a source row into two
// destination rows of twice as many columns.
#pragma once

#include <type_traits>

#include "assembly.h"

namespace gross::cuda {

constexpr int team_warps = 4, team_threads = 32 * team_warps;
constexpr int early_rows = 2;    // requested before the weights are assembled
constexpr int most_rounds = 16;  // pieces of a source row that one thread copies

enum class Walk { same, halving, doubling };  // of columns and rows, from source to destination

// How a launch cuts its work. `columns` pixels of each of `images` images lie side by side in a
// tile's row; they are pixels of the destination, of the source where that has fewer.
struct Tile {
  int tiles;   // of 16 destination channels: 1, 2 or 4; the warps of a team share them and lie side
               // by side along the pixels
  int teams;   // of a thread block: each marches through its own rows
  int stages;  // steps' source rows in shared memory: 3, 4, 6 or 8
  int columns, images;
  int column_tiles, bundles;  // bundles: of `images` images
  int lanes;                  // threads side by side on one source pixel, a power of two
  int piece;       // output channels whose terms are in shared memory at a time, while weights are
                   // assembled
  uint32_t pitch;  // bytes from a source pixel to the next: an odd number of pieces of 16
  uint32_t gap;    // bytes before, between and after the images of a row: the zero padding
  uint32_t plane_bytes;  // a source row; halving: its odd or its even columns
  uint32_t stage_bytes;  // halving: odd and even columns of an even row, then of an odd row
  uint32_t staging_pitch, staging_bytes;
  uint32_t shared_bytes;
  // From a thread's piece of a row to its next, in pixels, in shared and in global memory; and how
  // many there are.
  int read_pixels, read_rounds;
  uint32_t read_bytes, read_step;
  int write_pixels;
  uint32_t write_bytes, write_step;
  // They divide a pixel by the columns of an image, in the tile, in source and in destination:
  // exact for fewer than 256 pixels.
  uint32_t columns_magic, read_magic, write_magic;
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

// Weights and sums take 4 · (9 · steps + 3 · atoms) registers of a thread: so many teams share the
// 64 K of a multiprocessor.
constexpr int teams_of_registers(int steps, int atoms) {
  return 9 * steps + 3 * atoms <= 21 ? 4 : 9 * steps + 3 * atoms <= 30 ? 3 : 2;
}

template <Walk walk_, Type type_, int steps_, int atoms_, bool many_>
struct Shape {
  static constexpr Walk walk = walk_;
  static constexpr Type type = type_;
  static constexpr int steps = steps_;  // products in k per tap
  static constexpr int atoms = atoms_;  // eight pixels each, of one warp
  static constexpr bool many = many_;   // several images side by side
  static constexpr int spread =
      walk == Walk::doubling ? 2 : 1;  // destination columns of a pixel of the tile
  static constexpr int most_teams = teams_of_registers(steps, atoms);
};

// Which image a pixel of a row of images side by side belongs to.
GROSS_DEVICE int image_of(int pixel, uint32_t magic) {
  return static_cast<int>(pixel * magic >> 16);
}

// Where a thread works.
struct Place {
  int thread, threads, lane;
  int team, member;       // of the block; of the team
  int tile, first_pixel;  // of its warp
  Slab slab;
  int column0;                      // the tile's first, as `Tile::columns` counts
  uint32_t stage_step, stages_end;  // from a stage to the next, and past the last
  uint32_t rows_at, staging;        // this team's, in shared memory

  template <class S>
  static GROSS_DEVICE Place of(const Problem& p, S) {
    const Tile& t = p.tile;
    Place o;
    o.thread = thread_index();
    o.threads = t.teams * team_threads;
    o.lane = o.thread % 32;
    const int block_warp = uniform(o.thread / 32), warp = block_warp % team_warps;
    o.team = block_warp / team_warps;
    o.member = o.thread % team_threads;
    o.tile = warp % t.tiles;
    o.first_pixel = warp / t.tiles * S::atoms * 8;
    const int slab_index = block_y() / t.column_tiles, first = slab_index * t.tiles * tile_channels;
    o.column0 = (block_y() - slab_index * t.column_tiles) * t.columns;
    o.slab = {first, t.tiles,
              p.channels.slab(first, t.tiles, Assembly<S::type, S::steps>::columns)};
    o.stage_step = t.teams * t.stage_bytes;
    o.stages_end = t.stages * o.stage_step;
    o.rows_at = shared_base() + o.team * t.stage_bytes;
    o.staging = shared_base() + o.stages_end + o.team * t.staging_bytes;
    return o;
  }
};

// A team's share of the stream of rows of all bundles.
struct Share {
  int bundle, row;            // of the first row
  int last_bundle, last_row;  // of the last
  bool empty;
  GROSS_DEVICE Share(const Tile& t, int team, int height) {
    const long long rows = static_cast<long long>(t.bundles) * height, shares = grid_x() * t.teams,
                    share = block_x() * t.teams + team;
    const int begin = static_cast<int>(rows * share / shares),
              end = static_cast<int>(rows * (share + 1) / shares);
    empty = begin >= end;
    bundle = begin / height;
    row = begin - bundle * height;
    last_bundle = (end - 1) / height;
    last_row = end - 1 - last_bundle * height;
  }
};

// Rows of source pixels on their way to shared memory, 16 bytes per thread and copy.
template <class S>
struct Reader {
  const Problem& p;
  const Tile& t;
  uint32_t to;    // where this thread's first piece goes within a stage
  uint32_t from;  // its piece of the next row
  int slot;       // its first pixel
  uint32_t
      pieces;  // two bits for each of its pieces: there is one; and it is of the image, else zeros
  int row, images;  // the next step's row; images left from its bundle on

  GROSS_DEVICE Reader(const Problem& problem, const Place& place, int bundle, int first_row)
      : p(problem),
        t(problem.tile),
        slot(pixel_of(place.member / t.lanes, t.lanes)),
        pieces(0),
        row(first_row),
        images(p.images - bundle * t.images) {
    constexpr bool halving = S::walk == Walk::halving;
    const int piece = place.member % t.lanes,
              channel = place.slab.source.begin + piece * p.channels.chunk;
    const int column = S::many ? slot : place.column0 * (halving ? 2 : 1) + slot - 1;
    const int slots = S::many   ? p.source.width * t.images
                      : halving ? 2 * t.columns + 1
                                : t.columns + 2;
    GROSS_NO_UNROLL
    for (int j = 0; j < t.read_rounds; j++) {
      const bool there = channel < place.slab.source.end && slot + j * t.read_pixels < slots;
      const bool in_image = channel < p.channels.source &&
                            (S::many || static_cast<unsigned>(column + j * t.read_pixels) <
                                            static_cast<unsigned>(p.source.width));
      pieces |= (there ? 1u : 0u) << 2 * j | (in_image ? 2u : 0u) << 2 * j;
    }
    to = place.rows_at + piece * 16 + (S::many ? t.gap : 0);
    // Of one image, halving: odd and even columns by turns, each thread one of them.
    if (!halving) to += slot * t.pitch;
    if (halving && !S::many) to += (slot + 1) / 2 * t.pitch + slot % 2 * t.plane_bytes;
    from = static_cast<uint32_t>(bundle * t.images) * p.source.image_step +
           row * (halving ? 2 : 1) * p.source.row_step + channel / p.channels.chunk +
           column * p.source.pixel_step;
  }

  // Where the j-th piece belongs: its image in the row, and its place within a stage.
  GROSS_DEVICE int image_at(int j) const {
    return S::many ? image_of(slot + j * t.read_pixels, t.read_magic) : 0;
  }
  GROSS_DEVICE uint32_t piece_at(int j, int image) const {
    if (S::many && S::walk == Walk::halving) {
      const int column = slot + j * t.read_pixels - image * p.source.width;
      return to + image * (t.columns * t.pitch + t.gap) + column / 2 * t.pitch +
             (column % 2 == 0 ? t.plane_bytes : 0);
    }
    return to + j * t.read_bytes + image * t.gap;
  }

  // Rounds this thread's pieces of a stage that has landed to TF32, which products would do by
  // cutting bits off: twice the error, and all to one side. Once here instead of at every use of a
  // fragment; pieces that no copy wrote are rounded in vain.
  GROSS_DEVICE void round(uint32_t stage) const {
    uint32_t left = pieces;
    GROSS_NO_UNROLL
    for (int j = 0; j < t.read_rounds; j++) {
      GROSS_UNROLL
      for (int half = 0; half < (S::walk == Walk::halving ? 2 : 1); half++) {
        const uint32_t at = piece_at(j, image_at(j)) + stage + half * 2 * t.plane_bytes;
        const bool on = left & 1;
        const Words4 v = load_shared_128(at, on);
        store_shared_128(at,
                         {round_tf32(as_float(v.x)), round_tf32(as_float(v.y)),
                          round_tf32(as_float(v.z)), round_tf32(as_float(v.w))},
                         on);
      }
      left >>= 2;
    }
  }

  // Requests the next step's rows into the stage at this offset, then moves on. Except for halving,
  // one more row follows an image's last, which is not read. `both`: the even row, too, of
  // halving's two.
  GROSS_DEVICE void request(bool wanted, uint32_t stage, bool both = true) {
    constexpr bool halving = S::walk == Walk::halving;
    if (wanted && (halving || row < p.source.height)) {
      uint32_t left = pieces;
      GROSS_NO_UNROLL
      for (int first = 0; first < t.read_rounds; first += 4) {
        GROSS_UNROLL
        for (int j = 0; j < 4; j++) {
          const int image = image_at(first + j);
          const uint32_t offset = from + (first + j) * t.read_step + image * p.source.image_gap;
          const uint32_t destination = piece_at(first + j, image) + stage;
          const bool on = (left & 1u << 2 * j) && (!S::many || image < images),
                     valid = left & 2u << 2 * j;
          const char* source = static_cast<const char*>(p.source.data) + 16ull * offset;
          copy_async_16(destination, source, valid, on && both);
          if (halving)
            copy_async_16(destination + 2 * t.plane_bytes, source + 16ull * p.source.row_step,
                          valid && 2 * row + 1 < p.source.height, on);
        }
        left >>= 8;
      }
    }
    copy_async_commit();
    if (halving) {
      from += 2 * p.source.row_step;
      if (++row == p.destination.height) {
        row = 0;
        images -= t.images;
        from +=
            p.source.bundle_gap + (p.source.height - 2 * p.destination.height) * p.source.row_step;
      }
    } else {
      from += p.source.row_step;
      if (++row > p.source.height) {
        row = 0;
        images -= t.images;
        from += p.source.bundle_gap - p.source.row_step;
      }
    }
  }

  // Zeros around the images: copies bring pixels alone. Halving needs them left of odd columns, and
  // right where the image's last column is even.
  GROSS_DEVICE void clear_gaps(const Place& place) const {
    constexpr bool halving = S::walk == Walk::halving;
    const int of_gap = t.gap / 16, of_pixel = halving && p.source.width % 2 ? t.pitch / 16 : 0,
              each = of_gap + of_pixel;
    const int count = (t.images + 1) * each;
    GROSS_NO_UNROLL
    for (int stage = 0; stage < t.stages; stage++)
      for (int plane = 0; plane < (halving ? 2 : 1); plane++)
        for (int first = 0; first < count; first += team_threads) {
          const int k = first + place.member, image = k / each, piece = k - image * each - of_pixel;
          const uint32_t at = place.rows_at + stage * place.stage_step + plane * 2 * t.plane_bytes +
                              image * (t.columns * t.pitch + t.gap);
          store_shared_128(at + piece * 16, {0, 0, 0, 0}, k < count && (image > 0 || piece >= 0));
        }
  }
};

// Finished rows: sums are rounded into shared memory, [pixel][channel], in one of two halves, and
// leave it one step later in pieces of 16 bytes.
template <class S>
struct Writer {
  static constexpr int channel_bytes = bytes_of(S::type);
  static constexpr bool images_tell = S::many && S::spread == 1;
  static constexpr int rounds = divide_up(
      S::spread * S::atoms * 8 * team_warps * tile_channels * channel_bytes / 16, team_threads);

  const Problem& p;
  const Tile& t;
  uint32_t staged;      // where this lane's sums go
  uint32_t piece_from;  // this thread's first piece in shared memory
  uint32_t to;          // and in the row to be stored next
  int pixel;            // its first pixel
  uint32_t pieces;      // a bit for each of its pieces: there is one. Of several images the image's
                    // number says so, and saves the register: pixels past the last are of an image
                    // past the last, and so are those of threads past the channels

  GROSS_DEVICE Writer(const Problem& problem, const Place& place, int bundle, int first_row)
      : p(problem), t(problem.tile), pieces(0) {
    const int row_pieces = t.tiles * tile_channels * channel_bytes / 16,
              piece = place.member % row_pieces;
    const int channel = place.slab.first + piece * p.channels.chunk,
              columns = S::spread * t.columns, column0 = S::spread * place.column0;
    pixel = pixel_of(place.member / row_pieces, row_pieces);
    // Doubling's lanes store every fourth pixel, and four pixels apart is half of the banks: every
    // second eight of pixels exchanges neighbouring tiles.
    const bool swaps = S::spread == 2 && channel_bytes == 2 && t.tiles > 1;
    const uint32_t staged_swap = swaps ? place.lane % 4 / 2 * 32 : 0,
                   piece_swap = swaps ? pixel / 8 % 2 * 32 : 0;
    staged = place.staging +
             S::spread * (place.first_pixel + place.lane % 4 * 2) * t.staging_pitch +
             ((place.tile * tile_channels + place.lane / 4 * 2) * channel_bytes ^ staged_swap);
    if (images_tell && channel >= p.channels.destination) pixel += 1 << 14;
    GROSS_UNROLL
    for (int j = 0; j < rounds; j++) {
      const int m = pixel + j * t.write_pixels, image = S::many ? image_of(m, t.write_magic) : 0;
      const bool on = channel < p.channels.destination && image < t.images &&
                      m - image * columns < smaller(columns, p.destination.width - column0);
      pieces |= (on ? 1u : 0u) << j;
    }
    piece_from = place.staging + pixel * t.staging_pitch + (piece * 16 ^ piece_swap);
    to = static_cast<uint32_t>(bundle * t.images) * p.destination.image_step +
         first_row * p.destination.row_step + channel / p.channels.chunk +
         (column0 + pixel) * p.destination.pixel_step;
  }

  // `parity`: of doubling's columns.
  GROSS_DEVICE void stage(const float (&sum)[S::atoms][4], uint32_t half, int parity = 0) const {
    GROSS_UNROLL
    for (int a = 0; a < S::atoms; a++) {
      const uint32_t first = staged + half + (S::spread * a * 8 + parity) * t.staging_pitch,
                     second = first + S::spread * t.staging_pitch;
      if constexpr (S::type == Type::float32) {
        store_shared_64(first, as_word(sum[a][0]), as_word(sum[a][2]), true);
        store_shared_64(second, as_word(sum[a][1]), as_word(sum[a][3]), true);
      } else {
        store_shared_32(first, pack<S::type>(sum[a][0], sum[a][2]), true);
        store_shared_32(second, pack<S::type>(sum[a][1], sum[a][3]), true);
      }
    }
  }

  // `images`: left from the row's bundle on.
  GROSS_DEVICE void store(uint32_t half, int images, bool last_of_image) {
    constexpr int batch = rounds < 4 ? rounds : 4;  // pieces in flight: four registers each
    GROSS_UNROLL
    for (int first = 0; first < rounds; first += batch) {
      Words4 v[batch];
      bool on[batch];
      uint32_t offset[batch];
      GROSS_UNROLL
      for (int i = 0; i < batch; i++) {
        const int j = first + i;
        if (j >= rounds) break;
        offset[i] = to + j * t.write_step;
        on[i] = images_tell || (pieces & 1u << j);
        if constexpr (S::many) {
          const int image = image_of(pixel + j * t.write_pixels, t.write_magic);
          offset[i] += image * p.destination.image_gap;
          on[i] = on[i] && image < smaller(images, t.images);
        }
        v[i] = load_shared_128(piece_from + half + j * t.write_bytes, on[i]);
      }
      GROSS_UNROLL
      for (int i = 0; i < batch; i++)
        if (first + i < rounds)
          store_global_128(static_cast<char*>(p.destination.data) + 16ull * offset[i], v[i], on[i]);
    }
    to += p.destination.row_step;
    if (last_of_image) to += p.destination.bundle_gap;
  }
};

// Until this thread's copies of a step's rows have landed; a barrier then shows them to the others.
template <class S>
GROSS_DEVICE void wait_for_stage(const Reader<S>& reader, uint32_t stage) {
  const int stages = reader.t.stages;
  if (stages == 3)
    copy_async_wait<1>();
  else if (stages == 4)
    copy_async_wait<2>();
  else if (stages == 6)
    copy_async_wait<4>();
  else
    copy_async_wait<6>();
  if constexpr (S::type == Type::float32) reader.round(stage);
}

// Requests the terms, then `early_rows` steps' rows, and assembles the weights while those travel;
// then requests the rest. request(i): the rows of the i-th step.
template <class S, class Request>
GROSS_DEVICE void assemble(uint32_t (&weight)[9][S::steps][4], const Problem& p, const Place& place,
                           const Reader<S>& reader, const Request& request) {
  using Weights = Assembly<S::type, S::steps>;
  const Tile& t = p.tile;
  const uint32_t matrix = shared_base() + early_rows * place.stage_step,
                 raw = matrix + Weights::matrix_bytes(t.tiles);
  const Range outputs = Weights::outputs(p.channels, p.transposed, place.slab);
  Range piece{outputs.begin, smaller(outputs.begin + t.piece, outputs.end)};
  Weights::request(p.terms, p.transposed, piece, raw, place.thread, place.threads);
  GROSS_UNROLL
  for (int i = 0; i < early_rows; i++) request(i);
  Weights::clear(t.tiles, matrix, place.thread, place.threads);
  copy_async_wait<early_rows>();
  GROSS_NO_UNROLL
  for (;;) {
    barrier(0, place.threads);
    Weights::combine(p.terms, p.channels, p.transposed, place.slab, piece, matrix, raw,
                     place.thread, place.threads);
    piece = {piece.end, smaller(piece.end + t.piece, outputs.end)};
    barrier(0, place.threads);
    if (piece.size() <= 0) break;
    Weights::request(p.terms, p.transposed, piece, raw, place.thread, place.threads);
    copy_async_wait<0>();
  }
  Weights::load(weight, place.tile, t.tiles, matrix, place.lane);
  barrier(0, place.threads);
  if (S::many) reader.clear_gaps(place);
  GROSS_NO_UNROLL
  for (int i = early_rows; i < t.stages - 1; i++) request(i);
}

// A team's place in its ring of stages.
struct Ring {
  uint32_t stage = 0;
  GROSS_DEVICE uint32_t last(const Place& place) const {
    return (stage == 0 ? place.stages_end : stage) - place.stage_step;
  }
  GROSS_DEVICE void advance(const Place& place) {
    stage = stage == place.stages_end - place.stage_step ? 0 : stage + place.stage_step;
  }
};

// B fragments: this lane's row of the 8×8 matrices of the warp's pixels within a stage, at the
// pixels themselves.
template <class S>
struct Fragments {
  static constexpr int pairs = (S::atoms + 1) / 2;
  const Tile& t;
  uint32_t at, image_of_pair = 0;

  GROSS_DEVICE Fragments(const Problem& p, const Place& place) : t(p.tile) {
    const int pixel = place.first_pixel + place.lane / 16 * 8 + place.lane % 8;
    const int first = place.slab.first + place.tile * tile_channels;
    const int source =
        p.channels.tile_begin(place.slab.source, first, Assembly<S::type, S::steps>::columns);
    at = place.rows_at + pixel * t.pitch + t.gap +
         ((source - place.slab.source.begin) / p.channels.chunk + place.lane / 8 % 2) * 16;
    if (S::many) {  // one byte for each pair of atoms; pixels past the last read the last image's
                    // rows: never stored
      GROSS_UNROLL
      for (int pair = 0; pair < pairs; pair++)
        image_of_pair |= static_cast<uint32_t>(
                             smaller(image_of(pixel + pair * 16, t.columns_magic), t.images - 1))
                         << 8 * pair;
      image_of_pair = keep(image_of_pair);
    }
  }

  // use(a, b0, b1) for every atom; `from`: the stage and what is added to the pixels' places.
  template <class Use>
  GROSS_DEVICE void each(uint32_t from, int k, const Use& use) const {
    GROSS_UNROLL
    for (int pair = 0; pair < pairs; pair++) {
      uint32_t x[4];
      const uint32_t address = at + from + pair * 16 * t.pitch + k * 32 +
                               (S::many ? (image_of_pair >> 8 * pair & 255) * t.gap : 0);
      if (pair * 2 + 1 < S::atoms)
        load_matrix_x4(x, address);
      else
        load_matrix_x2(x, address);
      GROSS_UNROLL
      for (int u = 0; u < 2; u++)
        if (pair * 2 + u < S::atoms)
          use(pair * 2 + u < S::atoms ? pair * 2 + u : 0, x[2 * u], x[2 * u + 1]);
    }
  }
};

template <int rows, int atoms>
GROSS_DEVICE void clear(float (&sum)[rows][atoms][4]) {
  GROSS_UNROLL
  for (int i = 0; i < rows; i++) GROSS_UNROLL
  for (int a = 0; a < atoms; a++) GROSS_UNROLL
  for (int j = 0; j < 4; j++) sum[i][a][j] = 0.f;
}

// Stride 1. The input gradient is the same on the transposed, turned weight.
template <class S>
GROSS_KERNEL GROSS_BOUNDS(S::most_teams* team_threads) march(const Problem p) {
  const Tile& t = p.tile;
  const Place place = Place::of(p, S{});
  const int height = p.source.height;
  // The stream of source rows has one row more per bundle than the destination's, at which the
  // bundle's last destination row leaves. Steps are counted so that those from the second on finish
  // rows of this share.
  const Share share(t, place.team, height);
  const int start = larger(share.row - 1, 0), first_step = share.row > 0 ? 0 : 1;
  const int last_step = share.empty
                            ? first_step
                            : first_step + (share.last_bundle - share.bundle) * (height + 1) +
                                  share.last_row + 2 - start;

  Reader<S> reader(p, place, share.bundle, start);
  Writer<S> writer(p, place, share.bundle, share.row);
  uint32_t weight[9][S::steps][4];
  assemble<S>(weight, p, place, reader,
              [&](int i) { reader.request(first_step + i < last_step, i * place.stage_step); });
  const Fragments<S> fragments(p, place);

  float sum[3][S::atoms][4];
  // After the products the fragments' registers are free and the matrix units still busy; but the
  // compiler moves the loads up among them, and several images leave no registers for that.
  constexpr bool store_first = S::many;
  Ring ring;
  int row = start,
      images =
          p.images -
          share.bundle * t.images;  // of the source, at this step; images left from its bundle on
  const auto half_of = [&](int step) { return (step & 1) * t.teams * t.staging_bytes; };
  const auto store_previous = [&](int step) {  // what the step before has finished
    if (row == 1 || step <= 2) return;
    writer.store(half_of(step - 1), row == 0 ? images + t.images : images, row == 0);
  };
  const auto take_step = [&](auto phase_tag, int step) {
    constexpr int phase = decltype(phase_tag)::value;
    constexpr int finished = (phase + 2) % 3, middle = phase, fresh = (phase + 1) % 3;
    wait_for_stage(reader, ring.stage);
    barrier(1 + place.team, team_threads);
    if (store_first) store_previous(step);
    reader.request(step + t.stages - 1 < last_step, ring.last(place));
    if (row < height) {
      GROSS_UNROLL
      for (int kw = 0; kw < 3; kw++) GROSS_UNROLL
      for (int k = 0; k < S::steps; k++)
        fragments.each(ring.stage + (kw - 1) * t.pitch, k, [&](int a, uint32_t b0, uint32_t b1) {
          multiply<S::type>(sum[finished][a], weight[6 + kw][k], b0, b1);
          multiply<S::type>(sum[middle][a], weight[3 + kw][k], b0, b1);
          if (kw == 0 && k == 0)
            multiply_first<S::type>(sum[fresh][a], weight[kw][k], b0, b1);
          else
            multiply<S::type>(sum[fresh][a], weight[kw][k], b0, b1);
        });
    }
    if (!store_first) store_previous(step);
    if (row > 0 && step >= 2) writer.stage(sum[finished], half_of(step));
    ring.advance(place);
  };
  int step = first_step;
  const auto ends = [&](auto phase_tag) {
    take_step(phase_tag, step);
    return (++step == last_step) | (row++ == height);
  };
  GROSS_NO_UNROLL
  while (step < last_step) {
    clear(sum);  // once per bundle: inside the loop it costs 28 selects a step
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
  barrier(1 + place.team, team_threads);
  store_previous(last_step);
}

// The forward of stride 2. Step p takes source rows 2p, the middle row of destination row p, and 2p
// + 1, its last and the next's first.
template <class S>
GROSS_KERNEL GROSS_BOUNDS(S::most_teams* team_threads) march_halving(const Problem p) {
  const Tile& t = p.tile;
  const Place place = Place::of(p, S{});
  const int height = p.destination.height;
  // A share that begins inside an image first takes source row 2p - 1 alone, at step -1.
  const Share share(t, place.team, height);
  const int start = larger(share.row - 1, 0), first_step = share.row > 0 ? -1 : 0;
  const int last_step =
      share.empty ? first_step
                  : (share.last_bundle - share.bundle) * height + share.last_row + 1 - share.row;

  Reader<S> reader(p, place, share.bundle, start);
  Writer<S> writer(p, place, share.bundle, share.row);
  uint32_t weight[9][S::steps][4];
  assemble<S>(weight, p, place, reader, [&](int i) {
    reader.request(first_step + i < last_step, i * place.stage_step, first_step + i >= 0);
  });
  const Fragments<S> fragments(p, place);

  float sum[2][S::atoms][4];
  Ring ring;
  int row = start, images = p.images - share.bundle * t.images;
  const auto half_of = [&](int step) { return (step & 1) * t.teams * t.staging_bytes; };
  const auto store_previous = [&](int step) {
    if (step > 0) writer.store(half_of(step - 1), row == 0 ? images + t.images : images, row == 0);
  };
  const auto take_step = [&](auto phase_tag, int step) {
    constexpr int now = decltype(phase_tag)::value, next = 1 - now;
    wait_for_stage(reader, ring.stage);
    barrier(1 + place.team, team_threads);
    store_previous(step);
    reader.request(step + t.stages - 1 < last_step, ring.last(place));
    GROSS_UNROLL
    for (int kw = 0; kw < 3; kw++) GROSS_UNROLL
    for (int k = 0; k < S::steps; k++) {
      // Odd columns lie one pixel to the left and at the pixel, even ones at the pixel of the
      // second plane.
      const uint32_t column = kw == 0 ? 0 - t.pitch : kw == 1 ? t.plane_bytes : 0;
      fragments.each(ring.stage + column, k, [&](int a, uint32_t b0, uint32_t b1) {
        multiply<S::type>(sum[now][a], weight[3 + kw][k], b0, b1);
      });
      fragments.each(ring.stage + column + 2 * t.plane_bytes, k,
                     [&](int a, uint32_t b0, uint32_t b1) {
                       multiply<S::type>(sum[now][a], weight[6 + kw][k], b0, b1);
                       if (kw == 0 && k == 0)
                         multiply_first<S::type>(sum[next][a], weight[kw][k], b0, b1);
                       else
                         multiply<S::type>(sum[next][a], weight[kw][k], b0, b1);
                     });
    }
    if (step >= 0) writer.stage(sum[now], half_of(step));
    ring.advance(place);
  };
  int step = first_step;
  const auto ends = [&](auto phase_tag) {
    take_step(phase_tag, step);
    return (++step == last_step) | (++row == height);
  };
  GROSS_NO_UNROLL
  while (step < last_step) {
    clear(sum);
    GROSS_NO_UNROLL
    for (;;) {
      if (ends(std::integral_constant<int, 0>{})) break;
      if (ends(std::integral_constant<int, 1>{})) break;
    }
    if (row == height) row = 0, images -= t.images;
  }
  copy_async_wait<0>();
  barrier(1 + place.team, team_threads);
  store_previous(last_step);
}

// The input gradient of stride 2. Step p takes source row p: destination row 2p (kernel row 1) and
// a part of 2p - 1 (row 0) and of 2p + 1 (row 2). Even columns see kernel column 1 of their pixel,
// odd ones column 2 of it and column 0 of the next. One more step per bundle finishes its last odd
// row.
template <class S>
GROSS_KERNEL GROSS_BOUNDS(S::most_teams* team_threads) march_doubling(const Problem p) {
  const Tile& t = p.tile;
  const Place place = Place::of(p, S{});
  const int height = p.source.height;
  const Share share(t, place.team, height);
  const int last_step = share.empty ? 0
                                    : (share.last_bundle - share.bundle) * (height + 1) +
                                          share.last_row + 2 - share.row;

  Reader<S> reader(p, place, share.bundle, share.row);
  Writer<S> writer(p, place, share.bundle, 2 * share.row);
  uint32_t weight[9][S::steps][4];
  assemble<S>(weight, p, place, reader,
              [&](int i) { reader.request(i < last_step, i * place.stage_step); });
  const Fragments<S> fragments(p, place);

  float odd_row[2][S::atoms][4], even_row[2][S::atoms][4];  // [even columns, odd columns]
  Ring ring;
  int row = share.row, images = p.images - share.bundle * t.images;
  bool odd_staged = false, even_staged = false;  // by the step before
  const auto half_of = [&](int step, int parity) {
    return ((step & 1) * 2 + parity) * t.teams * t.staging_bytes;
  };
  const auto store_previous = [&](int step) {
    const int before = row == 0 ? height : row - 1, left = row == 0 ? images + t.images : images;
    if (odd_staged) writer.store(half_of(step - 1, 1), left, 2 * before == p.destination.height);
    if (even_staged)
      writer.store(half_of(step - 1, 0), left, 2 * before + 1 == p.destination.height);
    odd_staged = even_staged = false;
  };
  // The weight is turned by 180 degrees: tap (kh, kw) lies at 8 - (3 kh + kw).
  const auto add_row = [&](float (&sum)[2][S::atoms][4], auto kernel_row, auto first_tag) {
    constexpr int tap = 8 - 3 * decltype(kernel_row)::value;
    constexpr bool first = decltype(first_tag)::value;
    GROSS_UNROLL
    for (int k = 0; k < S::steps; k++) {
      fragments.each(ring.stage, k, [&](int a, uint32_t b0, uint32_t b1) {
        if (first && k == 0) {
          multiply_first<S::type>(sum[0][a], weight[tap - 1][k], b0, b1);
          multiply_first<S::type>(sum[1][a], weight[tap - 2][k], b0, b1);
        } else {
          multiply<S::type>(sum[0][a], weight[tap - 1][k], b0, b1);
          multiply<S::type>(sum[1][a], weight[tap - 2][k], b0, b1);
        }
      });
      fragments.each(ring.stage + t.pitch, k, [&](int a, uint32_t b0, uint32_t b1) {
        multiply<S::type>(sum[1][a], weight[tap][k], b0, b1);
      });
    }
  };
  const auto stage_row = [&](const float (&sum)[2][S::atoms][4], uint32_t half) {
    writer.stage(sum[0], half, 0);
    writer.stage(sum[1], half, 1);
  };
  clear(odd_row);
  GROSS_NO_UNROLL
  for (int step = 0; step < last_step; step++) {
    wait_for_stage(reader, ring.stage);
    barrier(1 + place.team, team_threads);
    store_previous(step);
    reader.request(step + t.stages - 1 < last_step, ring.last(place));
    if (step > 0 && row > 0) {
      if (row < height) add_row(odd_row, std::integral_constant<int, 0>{}, std::false_type{});
      odd_staged = 2 * row - 1 < p.destination.height;
      if (odd_staged) stage_row(odd_row, half_of(step, 1));
    }
    if (row < height && step < last_step - 1) {
      add_row(even_row, std::integral_constant<int, 1>{}, std::true_type{});
      even_staged = true;
      stage_row(even_row, half_of(step, 0));
      add_row(odd_row, std::integral_constant<int, 2>{}, std::true_type{});
    }
    ring.advance(place);
    if (row++ == height) row = 0, images -= t.images;
  }
  copy_async_wait<0>();
  barrier(1 + place.team, team_threads);
  store_previous(last_step);
}

}  // namespace gross::cuda
