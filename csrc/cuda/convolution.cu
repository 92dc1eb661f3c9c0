// Plans and launches the forward and the input gradient. The plan is plain C++: tests on the host
// run what a GPU would.
#include <algorithm>
#include <cmath>

#include "convolution.h"

namespace gross::cuda {

namespace {

struct Plan {
  Problem problem;
  Walk walk;
  int steps, atoms;
  bool many;
  int grid_x, grid_y;
};

// A share of the device's shared memory and registers that holds `atoms` and `tiles`, and how it
// does.
struct Choice {
  Walk walk;
  int steps, atoms, tiles;
  int chunks;  // of the widest slab
};

int pixels_of(int atoms, int tiles) { return atoms * 8 * (team_warps / tiles); }
// The kernel's number of steps. 16 channels of TF32 are two already.
int steps_class(Type type, int needed) {
  return needed <= 1 && type != Type::float32 ? 1 : needed <= 2 ? 2 : 4;
}

int widest_slab(const Channels& channels, int tiles, int columns) {
  int chunks = 0;
  const int repeats = smaller(channels.destination, period(channels, tiles * tile_channels));
  for (int first = 0; first < repeats; first += tiles * tile_channels)
    chunks = larger(chunks, channels.slab(first, tiles, columns).size() / channels.chunk);
  return chunks;
}

// Sizes in shared memory; false where they exceed it. `raw`: bytes of all terms' weights of one
// output channel.
bool lay_out(Tile& t, const Choice& choice, Type type, bool many, int raw, int outputs, int limit) {
  t.tiles = choice.tiles;
  t.lanes = 1;
  while (t.lanes < choice.chunks) t.lanes *= 2;
  t.pitch = (choice.chunks | 1) * 16;
  t.gap = many ? round_up(t.pitch, 128) : t.pitch;
  const int pixels = pixels_of(choice.atoms, choice.tiles);
  t.plane_bytes = pixels * t.pitch + (t.images + 1) * t.gap;
  t.stage_bytes = (choice.walk == Walk::halving ? 4 : 1) * t.plane_bytes;
  t.staging_pitch = (choice.tiles * tile_channels / chunk_channels(type) | 1) * 16;
  t.staging_bytes = pixels * (choice.walk == Walk::doubling ? 2 : 1) * t.staging_pitch;
  const int matrix = 9 * choice.tiles * tile_channels * (choice.steps * 32 + 16);
  const int left = limit - early_rows * t.teams * static_cast<int>(t.stage_bytes) - matrix;
  if (left < 8 * raw) return false;
  t.piece = smaller(left / raw / 8 * 8, round_up(outputs, 8));
  for (int stages : {8, 6, 4, 3}) {
    t.stages = stages;
    const int marching = t.teams * (t.stages * t.stage_bytes +
                                    (choice.walk == Walk::doubling ? 4 : 2) * t.staging_bytes);
    if (marching > limit) continue;
    t.shared_bytes = larger(marching, limit - left + t.piece * raw);
    return true;
  }
  return false;
}

// What follows from the rest of a problem, so that no thread computes it.
void finish(Problem& p, Walk walk) {
  Tile& t = p.tile;
  const bool many = t.images > 1, halving = walk == Walk::halving;
  const int written =
      t.columns * (walk == Walk::doubling ? 2 : 1);  // columns of the destination in the tile
  const auto magic = [](int columns) { return static_cast<uint32_t>(divide_up(1 << 16, columns)); };
  t.columns_magic = magic(t.columns);
  t.read_magic = magic(p.source.width);
  t.write_magic = magic(written);
  t.read_pixels = team_threads / t.lanes;
  t.read_rounds = divide_up(many      ? p.source.width * t.images
                            : halving ? 2 * t.columns + 1
                                      : t.columns + 2,
                            t.read_pixels);
  t.read_bytes = t.read_pixels * t.pitch / (halving ? 2 : 1);
  t.read_step = t.read_pixels * p.source.pixel_step;
  t.write_pixels = team_threads * p.channels.chunk / (t.tiles * tile_channels);
  t.write_bytes = t.write_pixels * t.staging_pitch;
  t.write_step = t.write_pixels * p.destination.pixel_step;
  p.source.image_gap = p.source.image_step - p.source.row_step;
  p.destination.image_gap = p.destination.image_step - written * p.destination.pixel_step;
  for (View* view : {&p.source, &p.destination})
    view->bundle_gap = (t.images - 1) * view->image_step;
}

// Clocks that a multiprocessor needs, by a model of an H200 (not measured): memory delivers 18.6
// bytes a clock to each, a product of 16 × 8 × 32 bytes takes 1.7, shared memory moves 128 bytes, a
// clock issues four instructions, and all of that overlaps in part.
double estimate(const Plan& plan, Type type, const Device& device) {
  const Tile& t = plan.problem.tile;
  const Problem& p = plan.problem;
  const bool halving = plan.walk == Walk::halving, doubling = plan.walk == Walk::doubling;
  const double rows = static_cast<double>(t.bundles) * (doubling ? p.source : p.destination).height;
  const double shares = std::min(rows, static_cast<double>(plan.grid_x) * t.teams);
  const double waves =
      std::ceil(static_cast<double>(plan.grid_x) * plan.grid_y / device.multiprocessors);
  const double warp_steps = waves * t.teams * team_warps * (std::ceil(rows / shares) + 1);
  const double products = warp_steps * 9 * plan.steps * plan.atoms * 1.7;
  // Fitted to the compiled kernels' steps: 85 instructions, 50 more with several images, 20
  // and 10.5 per product in k for an atom.
  const double issue = warp_steps *
                       ((plan.many ? 135 : 85) + plan.atoms * (20 + 10.5 * plan.steps)) *
                       (halving || doubling ? 1.4 : 1) / 4;
  const double shared = warp_steps * plan.atoms * 256.0 *
                        (3 * plan.steps * (halving || doubling ? 2 : 1) + 3 + (doubling ? 6 : 0)) /
                        128;
  const double read = plan.grid_y * (rows + 2 * shares) * (halving ? 4 : 1) *
                      (t.columns * t.images + (plan.many ? 0 : 2)) * t.pitch;
  const double written = static_cast<double>(p.images) * p.destination.height *
                         p.destination.width * p.channels.destination * bytes_of(type);
  // A line of memory is 128 bytes; half and quarter lines cost more than their share.
  const int line = t.tiles * tile_channels * bytes_of(type);
  const double moved = (read + written) *
                       (line >= 128  ? 1
                        : line >= 64 ? 1.1
                                     : 1.4) /
                       device.multiprocessors / 18.6;
  const double latency = t.teams == 1 ? 1.5 : t.teams == 2 ? 1.1 : 1;
  double sum = 0;
  for (double each : {products, issue, shared, moved}) sum += each * each * each * each;
  return std::sqrt(std::sqrt(sum)) * latency + waves * 2000 + (8 - t.stages) * 50;
}

// The least estimate among the tiles that fit and that `accept` takes (tests choose); false where
// there is none.
template <class Accept>
bool plan_convolution(Plan& best, Type type, const Geometry& geometry, const Terms& terms,
                      bool transposed, const Device& device, const Accept& accept) {
  Plan plan{};
  Problem& p = plan.problem;
  p.channels = channels_of(geometry, transposed, type);
  p.terms = terms;
  p.transposed = transposed;
  p.images = static_cast<int>(geometry.images);
  const auto view = [&](int64_t height, int64_t width, int channels) {
    const uint32_t pixel = channels / p.channels.chunk, row = static_cast<uint32_t>(width) * pixel;
    return View{nullptr,
                static_cast<int>(height),
                static_cast<int>(width),
                pixel,
                row,
                static_cast<uint32_t>(height) * row,
                0,
                0};
  };
  const View in = view(geometry.in_h, geometry.in_w, static_cast<int>(geometry.in_channels));
  const View out = view(geometry.out_h, geometry.out_w, static_cast<int>(geometry.out_channels));
  p.source = transposed ? out : in;
  p.destination = transposed ? in : out;

  int raw = 0;
  for (int i = 0; i < terms.active; i++)
    raw += terms.group_sizes[i] * 9 * (type == Type::float32 || terms.wide ? 4 : 2);
  if (steps_needed(p.channels) > most_steps) return false;
  plan.steps = steps_class(type, steps_needed(p.channels));
  plan.walk = geometry.stride == 1 ? Walk::same : transposed ? Walk::doubling : Walk::halving;
  const int columns = plan.steps * step_channels(type), width = static_cast<int>(geometry.out_w);
  double least = 0;
  Tile& t = p.tile;
  for (int atoms : {7, 4})
    for (int tiles : {4, 2, 1}) {
      if (atoms == 7 && (plan.steps == 4 || plan.walk != Walk::same)) continue;
      if (tiles > 1 && tiles / 2 * tile_channels >= p.channels.destination) continue;
      const Choice choice{plan.walk, plan.steps, atoms, tiles,
                          widest_slab(p.channels, tiles, columns)};
      const int outputs = transposed ? choice.chunks * p.channels.chunk : tiles * tile_channels,
                pixels = pixels_of(atoms, tiles);
      plan.atoms = atoms;
      for (t.teams = teams_of_registers(plan.steps, atoms); t.teams > 0; t.teams--) {
        t.column_tiles = divide_up(width, pixels);
        t.columns = divide_up(width, t.column_tiles);
        for (t.images = t.column_tiles > 1 ? 1 : smaller(pixels / width, p.images); t.images > 0;
             t.images--) {
          plan.many = t.images > 1;
          if (lay_out(t, choice, type, plan.many, raw, outputs, device.shared_bytes)) break;
        }
        if (t.images == 0) continue;
        t.bundles = divide_up(p.images, t.images);
        finish(p, plan.walk);
        if (t.read_rounds > most_rounds) continue;
        plan.grid_y = divide_up(p.channels.destination, tiles * tile_channels) * t.column_tiles;
        plan.grid_x = larger(1, device.multiprocessors / plan.grid_y);
        if (!accept(plan)) continue;
        const double cost = estimate(plan, type, device);
        if (least == 0 || cost < least) least = cost, best = plan;
      }
    }
  return least > 0;
}

template <Walk walk, Type type, int steps, int atoms, bool many>
int launch_shape(const Plan& plan, Stream stream) {
  using S = Shape<walk, type, steps, atoms, many>;
  void (*kernel)(Problem);
  if constexpr (walk == Walk::same)
    kernel = &march<S>;
  else if constexpr (walk == Walk::halving)
    kernel = &march_halving<S>;
  else
    kernel = &march_doubling<S>;
  const Tile& t = plan.problem.tile;
  return launch(kernel, plan.grid_x, plan.grid_y, t.teams * team_threads,
                static_cast<int>(t.shared_bytes), stream, plan.problem);
}
template <Walk walk, Type type, int steps, bool many>
int launch_steps(const Plan& plan, Stream stream) {
  if constexpr (walk == Walk::same && steps < most_steps)
    if (plan.atoms == 7) return launch_shape<walk, type, steps, 7, many>(plan, stream);
  return launch_shape<walk, type, steps, 4, many>(plan, stream);
}
template <Walk walk, Type type, bool many>
int launch_walk(const Plan& plan, Stream stream) {
  if constexpr (type != Type::float32)
    if (plan.steps == 1) return launch_steps<walk, type, 1, many>(plan, stream);
  return plan.steps == 2 ? launch_steps<walk, type, 2, many>(plan, stream)
                         : launch_steps<walk, type, 4, many>(plan, stream);
}
template <Type type, bool many>
int launch_type(const Plan& plan, Stream stream) {
  if (plan.walk == Walk::same) return launch_walk<Walk::same, type, many>(plan, stream);
  if (plan.walk == Walk::halving) return launch_walk<Walk::halving, type, many>(plan, stream);
  return launch_walk<Walk::doubling, type, many>(plan, stream);
}
template <Type type>
int launch_type(const Plan& plan, Stream stream) {
  return plan.many ? launch_type<type, true>(plan, stream) : launch_type<type, false>(plan, stream);
}

int run(Type type, Plan plan, const Geometry& geometry, const void* source, void* destination,
        Stream stream) {
  plan.problem.source.data = const_cast<void*>(source);
  plan.problem.destination.data = destination;
#if !defined(__CUDACC__)
  const Problem& p = plan.problem;
  emulator::forget_allocations();
  const auto bytes = [&](const View& view) {
    return static_cast<size_t>(p.images) * view.image_step * 16;
  };
  emulator::allow(source, bytes(p.source), false);
  emulator::allow(destination, bytes(p.destination), true);
  for (int i = 0; i < p.terms.active; i++)
    emulator::allow(p.terms.data[i],
                    static_cast<size_t>(geometry.out_channels) * p.terms.group_sizes[i] * 9 *
                        (p.terms.wide ? 4 : bytes_of(type)),
                    false);
  if (p.terms.gates) emulator::allow(p.terms.gates, p.terms.active * sizeof(float), false);
#else
  static_cast<void>(geometry);
#endif
  if (type == Type::float16) return launch_type<Type::float16>(plan, stream);
  if (type == Type::bfloat16) return launch_type<Type::bfloat16>(plan, stream);
  return launch_type<Type::float32>(plan, stream);
}

const auto any_plan = [](const Plan&) { return true; };

int convolve(Type type, const Geometry& geometry, const Series& series, bool transposed,
             const void* source, void* destination, const Device& device, Stream stream) {
  constexpr int invalid_value = 1;  // cudaErrorInvalidValue
  Plan plan;
  const int64_t numbers =
      geometry.images * std::max(geometry.in_channels * geometry.in_h * geometry.in_w,
                                 geometry.out_channels * geometry.out_h * geometry.out_w);
  if (numbers * bytes_of(type) >= int64_t{16} << 32)
    return invalid_value;  // 32 bits count pieces of 16 bytes
  if (!plan_convolution(plan, type, geometry, active_terms(series, geometry, type), transposed,
                        device, any_plan))
    return invalid_value;
  return run(type, plan, geometry, source, destination, stream);
}

}  // namespace

bool supports_convolution(Operation operation, Type type, Type terms_type, const Geometry& geometry,
                          const Device& device) {
  if (operation == Operation::weight_grad || type == Type::float64 ||
      (terms_type != type && terms_type != Type::float32))
    return false;
  if (device.capability < 80 || geometry.group_size > 64 ||
      (geometry.stride != 1 && geometry.stride != 2))
    return false;
  const bool transposed = operation == Operation::input_grad;
  const Channels channels = channels_of(geometry, transposed, type);
  if (channels.source % channels.chunk || channels.destination % channels.chunk) return false;
  // The most that the nested terms can be, and a tile of one image: every plan may fall back on
  // that.
  Geometry smallest = geometry;
  smallest.images = smallest.in_h = smallest.in_w = smallest.out_h = smallest.out_w = 1;
  Terms terms{};
  for (int size = geometry.group_size; size > 0; size /= 2)
    terms.group_sizes[terms.active++] = size;
  terms.wide = terms_type == Type::float32 && type != Type::float32;
  Plan plan;
  return plan_convolution(plan, type, smallest, terms, transposed, device, any_plan);
}

int forward(Type type, const Geometry& geometry, const Series& series, const void* input,
            void* output, const Device& device, Stream stream) {
  return convolve(type, geometry, series, false, input, output, device, stream);
}
int input_grad(Type type, const Geometry& geometry, const Series& series, const void* grad,
               void* grad_input, const Device& device, Stream stream) {
  return convolve(type, geometry, series, true, grad, grad_input, device, stream);
}

}  // namespace gross::cuda
