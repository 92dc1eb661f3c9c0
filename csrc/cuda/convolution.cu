// Plans the forward and the input gradient, and chooses between the kernels of convolution.h and
// wide.h.
#include "convolution_plan.h"

namespace gross::cuda {

namespace {

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

// Sizes in shared memory with `stages`; false where they exceed it. `raw`: bytes of all terms'
// weights of one output channel.
bool lay_out(Tile& t, const Choice& choice, Type type, bool many, int raw, int outputs, int limit,
             int stages) {
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
  t.stages = stages;
  const int marching = t.teams * (t.stages * t.stage_bytes +
                                  (choice.walk == Walk::doubling ? 4 : 2) * t.staging_bytes);
  t.shared_bytes = larger(marching, limit - left + t.piece * raw);
  return marching <= limit;
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

// Clocks that a multiprocessor needs: a product of 16 × 8 × 32 bytes takes 1.7, and a clock issues
// four instructions. `prologue`: until the weights are there.
double estimate(const Plan& plan, Type type, const Device& device, double prologue) {
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
                        shared_bytes_a_clock;
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
                       (memory_bytes_a_clock * device.multiprocessors);
  const double latency = t.teams == 1 ? 1.5 : t.teams == 2 ? 1.1 : 1;
  return side_by_side({products, issue, shared, moved}) * latency + waves * prologue +
         (8 - t.stages) * 50;
}

// Every tile that fits, with each number of stages that fits.
std::vector<Plan> march_plans(Type type, const Geometry& geometry, const Terms& terms,
                              bool transposed, const Device& device) {
  std::vector<Plan> plans;
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

  const int raw = type == Type::float32 ? Assembly<Type::float32, 2>::raw_bytes(terms, transposed)
                                        : Assembly<Type::float16, 1>::raw_bytes(terms, transposed);
  if (steps_needed(p.channels) > most_steps) return plans;
  plan.steps = steps_class(type, steps_needed(p.channels));
  plan.walk = geometry.stride == 1 ? Walk::same : transposed ? Walk::doubling : Walk::halving;
  const int columns = plan.steps * step_channels(type), width = static_cast<int>(geometry.out_w);
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
          if (lay_out(t, choice, type, plan.many, raw, outputs, device.shared_bytes, 3)) break;
        }
        if (t.images == 0) continue;
        t.bundles = divide_up(p.images, t.images);
        finish(p, plan.walk);
        if (t.read_rounds > most_rounds) continue;
        plan.grid_y = divide_up(p.channels.destination, tiles * tile_channels) * t.column_tiles;
        plan.grid_x = larger(1, device.multiprocessors / plan.grid_y);
        const double prologue = prologue_clocks(
            raw, outputs, t.piece, 9 * tiles * tile_channels * (plan.steps * 32 + 16), transposed);
        for (int stages : {8, 6, 4, 3}) {
          if (!lay_out(t, choice, type, plan.many, raw, outputs, device.shared_bytes, stages))
            continue;
          plan.clocks = estimate(plan, type, device, prologue);
          plans.push_back(plan);
        }
      }
    }
  return plans;
}

// Of global memory, without the terms.
double read_bytes(const Plan& plan) {
  const Problem& p = plan.problem;
  const Tile& t = p.tile;
  const bool halving = plan.walk == Walk::halving;
  const double rows = rows_read(
      p.images, t.images, t.bundles, (halving ? p.destination : p.source).height,
      static_cast<int64_t>(plan.grid_x) * t.teams, p.source.height, [&](int first, int last) {
        return halving                       ? Range{2 * first - 1, 2 * last + 2}
               : plan.walk == Walk::doubling ? Range{first, last + 2}
                                             : Range{first - 1, last + 2};
      });
  double columns = 0, channels = 0;
  for (int tile = 0; tile < t.column_tiles; tile++) {
    const int each = halving ? 2 : 1, begin = each * tile * t.columns - 1,
              end = begin + (halving ? 2 * t.columns + 1 : t.columns + 2);
    columns += smaller(end, p.source.width) - larger(begin, 0);
  }
  for (int first = 0; first < p.channels.destination; first += t.tiles * tile_channels) {
    const Range slab = p.channels.slab(first, t.tiles, plan.steps * 2 * p.channels.chunk);
    channels += smaller(slab.end, p.channels.source) - slab.begin;
  }
  return rows * columns * channels * 16 / p.channels.chunk;
}

PlanFacts facts_of(const Plan& plan) {
  const Tile& t = plan.problem.tile;
  const char* kernel = plan.walk == Walk::same      ? "march"
                       : plan.walk == Walk::halving ? "march_halving"
                                                    : "march_doubling";
  return {kernel,
          plan.steps,
          plan.atoms,
          t.tiles,
          t.teams,
          t.stages,
          t.columns,
          t.images,
          plan.grid_x,
          plan.grid_y,
          t.teams * team_threads,
          static_cast<int>(t.shared_bytes),
          plan.clocks,
          read_bytes(plan),
          16.0 * plan.problem.images * plan.problem.destination.image_step};
}

int run(const Job& job, Plan plan, const void* source, void* destination) {
  plan.problem.terms = active_terms(job.series, job.geometry, job.type);
  plan.problem.source.data = const_cast<void*>(source);
  plan.problem.destination.data = destination;
  allow(job, source, destination);
  if (job.type == Type::float16) return launch_march<Type::float16>(plan, job.device, job.stream);
  if (job.type == Type::bfloat16) return launch_march<Type::bfloat16>(plan, job.device, job.stream);
  return launch_march<Type::float32>(plan, job.device, job.stream);
}
int run(const Job& job, WidePlan plan, const void* source, void* destination) {
  plan.problem.terms = active_terms(job.series, job.geometry, job.type);
  plan.problem.source = source;
  plan.problem.destination = destination;
  allow(job, source, destination);
  return launch_wide(plan, job.type, job.device, job.stream);
}

// All plans: those for single warps first, so that warpgroups change no number.
struct AllPlans {
  std::vector<Plan> march;
  std::vector<WidePlan> wide;
  int chosen = unserved;

  explicit AllPlans(const Job& job) {
    if (!supports_convolution(job.operation, job.type, job.series.type, job.geometry, job.device))
      return;
    march = march_plans(job.type, job.geometry, active_terms(job.series, job.geometry, job.type),
                        job.operation == Operation::input_grad, job.device);
    if (job.warpgroups) wide = wide_plans(job);
    if (job.plan != by_model) {
      if (job.plan >= 0 && job.plan < size()) chosen = job.plan;
      return;
    }
    for (int i = 0; i < size(); i++)
      if (chosen == unserved || clocks(i) < clocks(chosen)) chosen = i;
  }
  int size() const { return static_cast<int>(march.size() + wide.size()); }
  double clocks(int i) const {
    return is_wide(i) ? wide[i - march.size()].clocks : march[i].clocks;
  }
  bool is_wide(int i) const { return i >= static_cast<int>(march.size()); }
};

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
  // that. Warpgroups serve nothing else.
  Geometry smallest = geometry;
  smallest.images = smallest.in_h = smallest.in_w = smallest.out_h = smallest.out_w = 1;
  Terms terms{};
  for (int size = geometry.group_size; size > 0; size /= 2)
    terms.group_sizes[terms.active++] = size;
  terms.wide = terms_type == Type::float32 && type != Type::float32;
  return !march_plans(type, smallest, terms, transposed, device).empty();
}

std::vector<PlanFacts> convolution_plans(const Job& job, int& chosen) {
  const AllPlans all(job);
  std::vector<PlanFacts> facts;
  for (const Plan& plan : all.march) facts.push_back(facts_of(plan));
  for (const WidePlan& plan : all.wide) facts.push_back(facts_of(plan));
  chosen = all.chosen;
  return facts;
}

int convolve(const Job& job, const void* source, void* destination, int& ran) {
  struct Chosen {
    int number;
    bool wide;
    Plan march_plan;
    WidePlan wide_plan;
  };
  static Plans<Chosen> made;
  const int64_t numbers =
      job.geometry.images *
      std::max(job.geometry.in_channels * job.geometry.in_h * job.geometry.in_w,
               job.geometry.out_channels * job.geometry.out_h * job.geometry.out_w);
  if (numbers * bytes_of(job.type) >= int64_t{16} << 32)
    return 1;  // cudaErrorInvalidValue: 32 bits count pieces of 16 bytes
  Chosen plan;
  const bool found = made.get(plan, job, [&](Chosen& to) {
    const AllPlans all(job);
    if (all.chosen == unserved) return false;
    to.number = all.chosen;
    to.wide = all.is_wide(to.number);
    if (to.wide)
      to.wide_plan = all.wide[to.number - all.march.size()];
    else
      to.march_plan = all.march[to.number];
    return true;
  });
  if (!found) return unserved;
  ran = plan.number;
  return plan.wide ? run(job, plan.wide_plan, source, destination)
                   : run(job, plan.march_plan, source, destination);
}

}  // namespace gross::cuda
