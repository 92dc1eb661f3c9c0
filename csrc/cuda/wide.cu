// Launches the kernels for warpgroups. Compiled for an architecture without their instructions they
// would be traps, so they exist only where one with them is among those that the library is built
// for, and run only there: `-DGROSS_CUDA_WARP_GROUPS`, from setup.py.
#include "convolution_plan.h"

namespace gross::cuda {

#if defined(GROSS_CUDA_WARP_GROUPS)

namespace {

// Steps of 16 source channels that serve the call, or 0: every slab of as many destination channels
// must see no more.
int wide_steps(const Channels& channels) {
  const int steps = steps_needed(channels) <= 2 ? 2 : 4, block = 16 * steps;
  if (steps_needed(channels) < 2) return 0;
  for (int first = 0; first < channels.destination; first += block)
    if (channels.slab(first, steps, block).size() > block) return 0;
  return steps;
}

// One image's columns cut evenly, or as many whole images as fit.
void fill_line(WideProblem& p, int pixels) {
  p.column_tiles = divide_up(p.width, pixels);
  p.columns = divide_up(p.width, p.column_tiles);
  p.line_images =
      p.column_tiles > 1 ? 1 : larger(1, smaller((pixels + 1) / (p.width + 1), p.images));
  p.bundles = divide_up(p.images, p.line_images);
  p.magic = p.line_images == 1 ? 0 : static_cast<uint32_t>(divide_up(1 << 16, p.columns + 1));
}

// Clocks that a multiprocessor needs. Of products' peak rate, 2048 pairs of 16 bits a clock, a
// warpgroup gets 95 % (published, not measured here), and a kernel 93 % of that. The compiled steps
// have some 290 instructions a warp; B is read from shared memory by the matrix units.
template <class S>
double estimate(const WidePlan& plan, const Device& device) {
  const WideProblem& p = plan.problem;
  const double rows = divide_up(p.height, S::rows), all = rows * p.bundles,
               shares = std::min(all, static_cast<double>(plan.grid.x) * S::teams);
  const double waves =
      std::ceil(static_cast<double>(plan.grid.x) * plan.grid.y / device.multiprocessors);
  const double steps = waves * S::teams * std::ceil(all / shares);
  const double warpgroup_products = steps * S::input_rows * 3 * S::steps;
  const double products = warpgroup_products * 64 * S::pixels * 16 / (0.95 * 0.93 * 2048);
  const double shared =
      (warpgroup_products * S::pixels * 32 + steps * (S::unit_bytes + 2 * S::staged_bytes)) /
      shared_bytes_a_clock;
  const double issue = steps * 4 * 290 / 4;
  const double written = 16.0 * p.images * p.destination_image;
  const double moved = (read_bytes(plan) + written) * (S::block < 64 ? 1.1 : 1) /
                       (memory_bytes_a_clock * device.multiprocessors);
  const int outputs = p.transposed ? S::block : S::tiles * tile_channels;
  return side_by_side({products, shared, issue, moved}) * (S::teams == 2 ? 1.1 : 1) +
         waves * prologue_clocks(Assembly<S::type, S::steps>::raw_bytes(p.terms, p.transposed),
                                 outputs, p.piece,
                                 Assembly<S::type, S::steps>::matrix_bytes(S::tiles), p.transposed);
}

template <Type type, int steps, int atoms>
WidePlan plan_of(WideProblem p, const Device& device) {
  using S = WideShape<type, steps, atoms>;
  fill_line(p, S::pixels);
  const int raw = Assembly<type, steps>::raw_bytes(p.terms, p.transposed),
            outputs = p.transposed ? S::block : S::tiles * tile_channels;
  p.piece = smaller((device.shared_bytes - S::raw_at) / raw / 8 * 8, outputs);
  const int shared = larger(S::marching_bytes, S::raw_at + p.piece * raw);
  const int grid_y = divide_up(p.channels.destination, S::block) * p.column_tiles;
  WidePlan plan{
      p, steps, atoms, {larger(1, device.multiprocessors / grid_y), grid_y, S::threads, shared}, 0};
  plan.clocks = estimate<S>(plan, device);
  return plan;
}

// use(shape) for the kernel of these numbers.
template <Type type, class Use>
auto with_shape(int steps, int atoms, const Use& use) {
  if (steps == 2) return atoms == 7 ? use(WideShape<type, 2, 7>{}) : use(WideShape<type, 2, 8>{});
  return atoms == 7 ? use(WideShape<type, 4, 7>{}) : use(WideShape<type, 4, 8>{});
}

bool serves(const Job& job) {
  if (job.operation == Operation::weight_grad ||
      (job.type != Type::float16 && job.type != Type::bfloat16))
    return false;
  if (job.device.capability != 90 || job.device.shared_bytes < 227 * 1024 ||
      job.geometry.stride != 1 || job.geometry.group_size > 64)
    return false;
  return wide_steps(channels_of(job.geometry, job.operation == Operation::input_grad, job.type)) >
         0;
}

}  // namespace

std::vector<WidePlan> wide_plans(const Job& job) {
  if (!serves(job)) return {};
  WideProblem p{};
  p.transposed = job.operation == Operation::input_grad;
  p.channels = channels_of(job.geometry, p.transposed, job.type);
  p.terms = active_terms(job.series, job.geometry, job.type);
  p.images = static_cast<int>(job.geometry.images);
  p.height = static_cast<int>(job.geometry.in_h);
  p.width = static_cast<int>(job.geometry.in_w);
  p.source_pixel = p.channels.source / p.channels.chunk;
  p.source_row = p.source_pixel * p.width;
  p.source_image = p.source_row * p.height;
  p.destination_pixel = p.channels.destination / p.channels.chunk;
  p.destination_row = p.destination_pixel * p.width;
  p.destination_image = p.destination_row * p.height;
  // Sizes do not depend on which of the 16-bit types it is.
  if (wide_steps(p.channels) == 2)
    return {plan_of<Type::float16, 2, 7>(p, job.device),
            plan_of<Type::float16, 2, 8>(p, job.device)};
  return {plan_of<Type::float16, 4, 7>(p, job.device), plan_of<Type::float16, 4, 8>(p, job.device)};
}

double read_bytes(const WidePlan& plan) {
  const WideProblem& p = plan.problem;
  const int block = 16 * plan.steps, rows = 64 / block;
  const int64_t shares = static_cast<int64_t>(plan.grid.x) * plan.grid.threads / warpgroup_threads;
  const double read = rows_read(
      p.images, p.line_images, p.bundles, divide_up(p.height, rows), shares, p.height,
      [&](int first, int last) { return Range{rows * first - 1, rows * (last + 1) + 1}; });
  double columns = 0, channels = 0;
  for (int tile = 0; tile < p.column_tiles; tile++)
    columns += smaller((tile + 1) * p.columns + 1, p.width) - larger(tile * p.columns - 1, 0);
  for (int first = 0; first < p.channels.destination; first += block) {
    const Range slab = p.channels.slab(first, plan.steps, block);
    channels += smaller(slab.end, p.channels.source) - slab.begin;
  }
  return read * columns * channels * 16 / p.channels.chunk;
}

PlanFacts facts_of(const WidePlan& plan) {
  const WideProblem& p = plan.problem;
  const int stages =
      with_shape<Type::float16>(plan.steps, plan.atoms, [](auto s) { return decltype(s)::stages; });
  return {"march_wide",
          plan.steps,
          plan.atoms,
          plan.steps,
          plan.grid.threads / warpgroup_threads,
          stages,
          p.columns,
          p.line_images,
          plan.grid.x,
          plan.grid.y,
          plan.grid.threads,
          plan.grid.shared_bytes,
          plan.clocks,
          read_bytes(plan),
          16.0 * p.images * p.destination_image};
}

int launch_wide(const WidePlan& plan, Type type, const Device& device, Stream stream) {
  const auto start = [&](auto shape) {
    return launch<&march_wide<decltype(shape)>>(plan.grid, device, stream, plan.problem);
  };
  return type == Type::float16 ? with_shape<Type::float16>(plan.steps, plan.atoms, start)
                               : with_shape<Type::bfloat16>(plan.steps, plan.atoms, start);
}

#else

std::vector<WidePlan> wide_plans(const Job&) { return {}; }
PlanFacts facts_of(const WidePlan&) { return {}; }
int launch_wide(const WidePlan&, Type, const Device&, Stream) { return unserved; }

#endif

}  // namespace gross::cuda
