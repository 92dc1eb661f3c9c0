// Plans and launches the weight gradient of weight_grad.h. The plan is plain C++: what the tests on
// the host run is what a GPU is given.
#include "plans.h"
#include "weight_grad.h"

namespace gross::cuda {

namespace {

struct WeightGradPlan {
  WeightGradProblem problem;
  int atoms, blocks, slabs, shared_bytes;
  bool half_last;
  double clocks;
};

// How channels are divided among warps, blocks and shared memory, with `slots` on a line of
// gradients and `in_slots` of input. False where not even one team fits.
bool divide_channels(WeightGradPlan& plan, Type type, int stride, int slots, int in_slots,
                     int shared_limit) {
  WeightGradProblem& p = plan.problem;
  const int chunk = chunk_channels(type);
  int widest = 0;
  for (int first = 0; first < p.channels.destination; first += tile_channels)
    widest =
        larger(widest,
               p.channels.seen_by(first, smaller(first + tile_channels, p.channels.destination) - 1)
                   .size());
  plan.atoms = widest <= 16 ? 2 : 4;
  p.windows = divide_up(widest, plan.atoms * 8);
  const int most_warps = weight_grad_warps(plan.atoms),
            all_tiles = divide_up(p.channels.destination, tile_channels);
  // 64 outputs of 16 bits are a line of memory.
  for (int most = smaller(4, most_warps / p.windows); most > 0; most--) {
    plan.slabs = divide_up(all_tiles, most);
    p.tiles = divide_up(all_tiles, plan.slabs);
    int columns = 0;
    for (int tile = 0; tile < plan.slabs * p.tiles; tile += p.tiles)
      columns = larger(columns,
                       tile_begin(p.channels, tile + p.tiles - 1) - tile_begin(p.channels, tile));
    p.in_chunks = (columns + p.windows * plan.atoms * 8) / chunk;
    p.grad_chunks = p.tiles * tile_channels / chunk;
    // Eight neighbouring slots, or four for TF32, then lie in different banks.
    const auto pitch = [&](int chunks) {
      return 16 * (type == Type::float32 ? chunks + (6 - chunks % 4) % 4 : chunks | 1);
    };
    p.in_pitch = pitch(p.in_chunks);
    p.grad_pitch = pitch(p.grad_chunks);
    p.in_slots = in_slots;
    p.grad_slots = slots;
    p.in_bytes = in_slots * p.in_pitch;
    p.stage_bytes = stride * p.in_bytes + slots * p.grad_pitch;
    p.team_threads = p.tiles * p.windows * 32;
    p.in_pieces = in_slots * p.in_chunks;
    p.grad_pieces = slots * p.grad_chunks;
    p.in_rounds = divide_up(p.in_pieces, p.team_threads);
    p.rounds = p.in_rounds + divide_up(p.grad_pieces, p.team_threads);
    p.first_grad = p.in_rounds * p.team_threads;
    p.stages_at = 256 + 8 * p.rounds * p.team_threads;
    const int sums = 3 * p.tiles * tile_channels * p.windows * plan.atoms * 8 * 4;
    const int of_team = larger(weight_grad_stages * p.stage_bytes, sums);
    if (p.rounds > 32 || p.stage_bytes > 1 << 16) continue;  // what a piece's description holds
    p.teams = smaller(most_warps / (p.tiles * p.windows), (shared_limit - p.stages_at) / of_team);
    plan.shared_bytes = p.stages_at + p.teams * of_team;
    if (p.teams > 0) return true;
  }
  return false;
}

// Slots that products of a row touch where narrow images leave the largest gaps: every half of a
// product is an image.
int most_slots(Type type, int stride) {
  return weight_grad_products(stride) * (step_channels(type) + 2) - 1;
}
int input_slots(int slots, int stride) { return stride == 1 ? slots + 2 : 2 * slots + 1; }

// Columns and images of a line.
void divide_columns(WeightGradPlan& plan, Type type, int stride) {
  WeightGradProblem& p = plan.problem;
  const int step = step_channels(type), products = weight_grad_products(stride),
            line = step * products;
  p.column_tiles = divide_up(p.out_w, line);
  p.columns = divide_up(p.out_w, p.column_tiles);
  // Where images end with a product or with its half, products leave the gaps out, and images fill
  // the line.
  const bool leaves_gaps = p.columns == step / 2 || p.columns % step == 0;
  p.line_images =
      p.column_tiles > 1
          ? 1
          : smaller(p.images, leaves_gaps ? line / p.columns : (line + 1) / (p.columns + 1));
  const bool gaps = leaves_gaps && p.line_images > 1;
  p.period = p.line_images > 1 ? p.columns + 1 : 1 << 15;
  p.half_slots = step / 2 + (gaps && p.columns == step / 2 ? 1 : 0);
  for (int i = 0; i < products; i++) p.grad_tile[i] = i * step + (gaps ? i * step / p.columns : 0);
  plan.half_last = type != Type::float32 && stride == 1 && !gaps &&
                   p.line_images * (p.columns + 1) - 1 <= line - step / 2;
}

// How many blocks share a slab's rows, and whether they share whole strips: more blocks finish the
// first pass sooner, and leave the second more to add up. Short layers thus get fewer, fatter
// shares. Costs are bytes that the whole device moves. A step of one team takes some 2000 clocks
// whatever its bytes, in which a multiprocessor could move 36 KB (estimated from the instructions;
// not measured).
constexpr double step_bytes = 36 * 1024;

// All such divisions, each a plan.
std::vector<WeightGradPlan> divide_rows(WeightGradPlan plan, int stride, const Device& device) {
  WeightGradProblem& p = plan.problem;
  const int most_teams = p.teams, team_bytes = (plan.shared_bytes - p.stages_at) / p.teams;
  const double sums = 9.0 * p.channels.destination * p.channels.source_group * sizeof(float);
  std::vector<WeightGradPlan> plans;
  for (int unit : {p.out_h, 1})
    for (int blocks = larger(1, device.multiprocessors / plan.slabs); blocks > 0;
         blocks = blocks * 3 / 4)
      for (int teams = most_teams; teams > 0; teams--) {
        const int64_t share = (p.rows / unit + static_cast<int64_t>(blocks) * teams - 1) /
                              (static_cast<int64_t>(blocks) * teams) * unit;
        const int64_t steps = unit == 1 ? share + (share - 1) / p.out_h + (stride == 1 ? 2 : 1)
                                        : share / unit * (p.last_step + 1);
        const int waves = divide_up(blocks * plan.slabs, device.multiprocessors);
        const double bytes = static_cast<double>(teams) * p.stage_bytes;
        const double moved =
            steps * (bytes > step_bytes ? bytes : step_bytes) * waves * device.multiprocessors +
            2 * blocks * sums;
        plan.clocks = moved / (memory_bytes_a_clock * device.multiprocessors);
        plan.blocks = blocks;
        p.teams = teams;
        p.unit = unit;
        p.share = p.rows / unit / (blocks * teams);
        p.longer_shares = p.rows / unit % (blocks * teams);
        p.threads = teams * p.team_threads;
        plan.shared_bytes = p.stages_at + teams * team_bytes;
        plans.push_back(plan);
      }
  return plans;
}

std::vector<WeightGradPlan> all_plans(Type type, const Geometry& geometry, const Device& device) {
  WeightGradPlan plan{};
  WeightGradProblem& p = plan.problem;
  const int stride = geometry.stride;
  p.channels = channels_of(geometry, false, type);
  p.images = static_cast<int>(geometry.images);
  p.in_h = static_cast<int>(geometry.in_h), p.in_w = static_cast<int>(geometry.in_w);
  p.out_h = static_cast<int>(geometry.out_h), p.out_w = static_cast<int>(geometry.out_w);
  p.in_pixel = p.channels.source / p.channels.chunk,
  p.grad_pixel = p.channels.destination / p.channels.chunk;
  p.in_row = p.in_w * p.in_pixel, p.grad_row = p.out_w * p.grad_pixel;
  p.in_image = p.in_h * p.in_row, p.grad_image = p.out_h * p.grad_row;
  p.group_magic = ((1u << 31) + p.channels.source_group - 1) / p.channels.source_group;
  p.last_step = stride == 1 ? p.out_h : p.in_h / 2;

  divide_columns(plan, type, stride);
  const int last = weight_grad_products(stride) - 1;
  const int slots =
      p.grad_tile[last] + (plan.half_last ? 0 : p.half_slots) + step_channels(type) / 2;
  divide_channels(plan, type, stride, slots, input_slots(slots, stride), device.shared_bytes);
  const unsigned in_strip = stride * p.columns * p.in_pixel, grad_strip = p.columns * p.grad_pixel;
  p.in_next_strip = in_strip - (p.last_step + 1) * stride * p.in_row;
  p.grad_next_strip = grad_strip - (p.last_step + 1) * p.grad_row;
  p.in_next_line = p.line_images * p.in_image - p.column_tiles * in_strip;
  p.grad_next_line = p.line_images * p.grad_image - p.column_tiles * grad_strip;
  p.rows = divide_up(p.images, p.line_images) * p.column_tiles * p.out_h;
  for (int i = 0; i <= last; i++) {
    p.in_tile[i] = p.grad_tile[i] * p.in_pitch;
    p.grad_tile[i] *= p.grad_pitch;
  }
  for (int kw = 0; kw < 3; kw++)
    p.in_tap[kw] = (stride == 1 ? kw : kw == 1 ? 0 : slots + kw / 2) * p.in_pitch;
  return divide_rows(plan, stride, device);
}

// The plan that the job forces, or the least of the model; `unserved` where it is not there.
int chosen_of(const std::vector<WeightGradPlan>& plans, int forced) {
  const int count = static_cast<int>(plans.size());
  if (forced != by_model) return forced >= 0 && forced < count ? forced : unserved;
  int chosen = 0;
  for (int i = 1; i < count; i++)
    if (plans[i].clocks < plans[chosen].clocks) chosen = i;
  return chosen;
}

struct Chosen {
  int number;
  WeightGradPlan plan;
};
bool choose(Chosen& chosen, const Job& job) {
  static Plans<Chosen> made;
  return made.get(chosen, job, [&](Chosen& to) {
    if (!supports_weight_grad(job.type, job.series.type, job.geometry, job.device)) return false;
    const std::vector<WeightGradPlan> plans = all_plans(job.type, job.geometry, job.device);
    to.number = chosen_of(plans, job.plan);
    if (to.number == unserved) return false;
    to.plan = plans[to.number];
    return true;
  });
}

int second_pass_blocks(const Channels& channels) {
  return divide_up(9 * channels.destination * channels.source_group, 32);
}
size_t sums_of(const WeightGradPlan& plan) {
  return static_cast<size_t>(plan.blocks) * 9 * plan.problem.channels.destination *
         plan.problem.channels.source_group;
}

template <Type type, int stride, int atoms, bool half_last = false>
int first_pass(const WeightGradPlan& plan, const Device& device, Stream stream) {
  const Grid grid{plan.blocks, plan.slabs, plan.problem.threads, plan.shared_bytes};
  return launch<&weight_grad_partial<type, stride, atoms, half_last>>(grid, device, stream,
                                                                      plan.problem);
}
template <Type type, int atoms>
int first_pass(const WeightGradPlan& plan, int stride, const Device& device, Stream stream) {
  if (stride == 2) return first_pass<type, 2, atoms>(plan, device, stream);
  if constexpr (type != Type::float32)
    if (plan.half_last) return first_pass<type, 1, atoms, true>(plan, device, stream);
  return first_pass<type, 1, atoms>(plan, device, stream);
}
template <Type type>
int first_pass(const WeightGradPlan& plan, const Job& job) {
  const int stride = job.geometry.stride;
  return plan.atoms == 2 ? first_pass<type, 2>(plan, stride, job.device, job.stream)
                         : first_pass<type, 4>(plan, stride, job.device, job.stream);
}

// What the first pass reads: the input's rows and the gradient's, of the channels of every slab.
double read_bytes(const WeightGradPlan& plan, int stride) {
  const WeightGradProblem& p = plan.problem;
  const Channels& c = p.channels;
  const int shares = plan.blocks * p.teams;
  double in_pieces = 0, grad_pieces = 0;
  for (int share = 0; share < shares; share++) {
    const int64_t begin =
        (static_cast<int64_t>(share) * p.share + smaller(share, p.longer_shares)) * p.unit;
    const int64_t end = begin + static_cast<int64_t>(p.share + (share < p.longer_shares)) * p.unit;
    for (int64_t at = begin; at < end;) {
      const int64_t strip = at / p.out_h, next = std::min(end, (strip + 1) * p.out_h);
      const int first = static_cast<int>(at - strip * p.out_h),
                last = static_cast<int>(next - 1 - strip * p.out_h);
      const int images = smaller(
          p.line_images, p.images - static_cast<int>(strip / p.column_tiles) * p.line_images);
      const int column0 = static_cast<int>(strip % p.column_tiles) * p.columns;
      // Steps first to last_step, which take the input rows stride · t - 1 and, for stride 2, 2 ·
      // t.
      const int last_step = smaller(last + 1 + (stride == 1 ? 1 : 0), p.last_step);
      const int in_rows =
          smaller(stride * last_step - 1 + stride, p.in_h) - larger(stride * first - 1, 0);
      const int in_columns =
          smaller(stride * column0 + (stride == 1 ? p.columns + 1 : 2 * p.columns), p.in_w) -
          larger(stride * column0 - 1, 0);
      in_pieces += static_cast<double>(in_rows) * in_columns * images;
      grad_pieces +=
          static_cast<double>(last - first + 1) * smaller(p.columns, p.out_w - column0) * images;
      at = next;
    }
  }
  double bytes = 16 * grad_pieces * p.grad_pixel;
  const int outputs = p.tiles * tile_channels;
  for (int slab = 0; slab < plan.slabs; slab++) {
    const int output = slab * outputs, begin = tile_begin(c, slab * p.tiles);
    const int seen =
        smaller(c.seen_by(output, smaller(output + outputs, c.destination) - 1).end, c.source);
    bytes += 16 * in_pieces * ((seen - begin) / c.chunk);
  }
  return bytes;
}

}  // namespace

bool supports_weight_grad(Type type, Type terms_type, const Geometry& geometry,
                          const Device& device) {
  if (type == Type::float64 || (terms_type != type && terms_type != Type::float32)) return false;
  if (device.capability < 80 || geometry.group_size > 64 ||
      (geometry.stride != 1 && geometry.stride != 2))
    return false;
  const int chunk = chunk_channels(type);
  if (geometry.in_channels % chunk || geometry.out_channels % chunk) return false;
  WeightGradPlan plan{};
  plan.problem.channels = channels_of(geometry, false, type);
  const int slots = most_slots(type, geometry.stride);
  return divide_channels(plan, type, geometry.stride, slots, input_slots(slots, geometry.stride),
                         device.shared_bytes);
}

std::vector<PlanFacts> weight_grad_plans(const Job& job, int& chosen) {
  chosen = unserved;
  std::vector<PlanFacts> facts;
  if (!supports_weight_grad(job.type, job.series.type, job.geometry, job.device)) return facts;
  const std::vector<WeightGradPlan> plans = all_plans(job.type, job.geometry, job.device);
  for (const WeightGradPlan& plan : plans) {
    const WeightGradProblem& p = plan.problem;
    facts.push_back({"weight_grad", weight_grad_products(job.geometry.stride), plan.atoms, p.tiles,
                     p.teams, weight_grad_stages, p.columns, p.line_images, plan.blocks, plan.slabs,
                     p.threads, plan.shared_bytes, plan.clocks,
                     read_bytes(plan, job.geometry.stride),
                     static_cast<double>(sums_of(plan) * sizeof(float))});
  }
  chosen = chosen_of(plans, job.plan);
  return facts;
}

size_t weight_grad_scratch_bytes(const Job& job) {
  Chosen chosen;
  if (!choose(chosen, job)) return 0;
  return (sums_of(chosen.plan) +
          static_cast<size_t>(most_active) * second_pass_blocks(chosen.plan.problem.channels)) *
         sizeof(float);
}

int weight_grad(const Job& job, const void* grad, const void* input, const SeriesGradient& gradient,
                void* scratch, int passes, int& ran) {
  const Geometry& geometry = job.geometry;
  const Series& series = job.series;
  constexpr int64_t reach = int64_t{1} << 32;  // pieces of 16 bytes, 64 GB
  const int64_t in_pieces = geometry.images * geometry.in_h * geometry.in_w *
                            (geometry.in_channels / chunk_channels(job.type));
  const int64_t grad_pieces = geometry.images * geometry.out_h * geometry.out_w *
                              (geometry.out_channels / chunk_channels(job.type));
  const int64_t most_rows = geometry.images * geometry.out_h * (geometry.out_w / 16 + 1);
  if (in_pieces > reach || grad_pieces > reach || most_rows > INT32_MAX)
    return 1;  // cudaErrorInvalidValue
  Chosen chosen;
  if (!choose(chosen, job)) return unserved;
  ran = chosen.number;
  WeightGradPlan& plan = chosen.plan;
  plan.problem.input = input;
  plan.problem.grad = grad;
  plan.problem.partial = static_cast<float*>(scratch);
  const int blocks = second_pass_blocks(plan.problem.channels);
  float* gate_parts = gradient.gates == nullptr ? nullptr : plan.problem.partial + sums_of(plan);
#if !defined(__CUDACC__)
  emulator::forget_allocations();
  emulator::allow(input, 16 * in_pieces, false);
  emulator::allow(grad, 16 * grad_pieces, false);
  emulator::allow(scratch, weight_grad_scratch_bytes(job), true);
  for (int i = 0; i < series.count; i++) {
    const size_t bytes = geometry.out_channels * series.group_sizes[i] * 9 * bytes_of(series.type);
    if (series.terms[i] != nullptr) emulator::allow(series.terms[i], bytes, false);
    emulator::allow(gradient.terms[i], bytes, true);
  }
  if (series.gates != nullptr) emulator::allow(series.gates, series.count * sizeof(float), false);
  if (gradient.gates != nullptr)
    emulator::allow(gradient.gates, series.count * sizeof(float), true);
#endif
  if (passes & 1) {
    const int error = job.type == Type::float16    ? first_pass<Type::float16>(plan, job)
                      : job.type == Type::bfloat16 ? first_pass<Type::bfloat16>(plan, job)
                                                   : first_pass<Type::float32>(plan, job);
    if (error) return error;
  }
  if (!(passes & 2)) return 0;
  const WeightGradTerms terms{plan.problem.partial, gate_parts, plan.problem.channels,
                              plan.blocks,          series,     gradient};
  const Grid grid{blocks, 1, weight_grad_adders * 32, weight_grad_adders * 32 * 4};
  const int error = launch<&weight_grad_terms>(grid, job.device, job.stream, terms);
  if (error || gate_parts == nullptr) return error;
  return launch<&weight_grad_gates>({series.count, 1, 256, 32}, job.device, job.stream, gate_parts,
                                    blocks, series.active, gradient.gates);
}

}  // namespace gross::cuda
