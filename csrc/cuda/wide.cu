// Launches the kernels for warpgroups. Compiled for an architecture without their instructions they
// would be traps, so they exist only where one with them is among those that the library is built
// for, and run only there: `-DGROSS_CUDA_WARP_GROUPS`, from setup.py.
#include "wide.h"

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

template <Type type, int steps, int atoms>
int launch_wide(WideProblem p, const Device& device, Stream stream) {
  using S = WideShape<type, steps, atoms>;
  const int raw = Assembly<type, steps>::raw_bytes(p.terms),
            outputs = p.transposed ? S::block : S::tiles * tile_channels;
  p.piece = smaller((device.shared_bytes - S::raw_at) / raw / 8 * 8, outputs);
  const int shared = larger(S::marching_bytes, S::raw_at + p.piece * raw);
  const int grid_y = divide_up(p.channels.destination, S::block) * p.column_tiles;
  return launch(&march_wide<S>, larger(1, device.multiprocessors / grid_y), grid_y, S::threads,
                shared, stream, p);
}

template <Type type, int steps>
int launch_line(WideProblem p, const Device& device, Stream stream) {
  WideProblem seven = p, eight = p;
  fill_line(seven, 56);
  fill_line(eight, 64);
  // Pixels of matrix products for all images.
  const auto work = [](const WideProblem& q, int pixels) {
    return static_cast<int64_t>(q.bundles) * q.column_tiles * pixels;
  };
  return work(seven, 56) <= work(eight, 64) ? launch_wide<type, steps, 7>(seven, device, stream)
                                            : launch_wide<type, steps, 8>(eight, device, stream);
}

template <Type type>
int launch_steps(const WideProblem& p, const Device& device, Stream stream) {
  return wide_steps(p.channels) == 2 ? launch_line<type, 2>(p, device, stream)
                                     : launch_line<type, 4>(p, device, stream);
}

}  // namespace

bool supports_wide(Operation operation, Type type, Type terms_type, const Geometry& geometry,
                   const Device& device) {
  if (operation == Operation::weight_grad || (type != Type::float16 && type != Type::bfloat16))
    return false;
  if (terms_type != type && terms_type != Type::float32) return false;
  if (device.capability != 90 || device.shared_bytes < 227 * 1024 || geometry.stride != 1 ||
      geometry.group_size > 64)
    return false;
  const Channels channels = channels_of(geometry, operation == Operation::input_grad, type);
  return channels.source % channels.chunk == 0 && channels.destination % channels.chunk == 0 &&
         wide_steps(channels) > 0;
}

int convolve_wide(Operation operation, Type type, const Geometry& geometry, const Series& series,
                  const void* source, void* destination, const Device& device, Stream stream) {
  WideProblem p{};
  p.transposed = operation == Operation::input_grad;
  p.channels = channels_of(geometry, p.transposed, type);
  p.terms = active_terms(series, geometry, type);
  p.source = source;
  p.destination = destination;
  p.images = static_cast<int>(geometry.images);
  p.height = static_cast<int>(geometry.in_h);
  p.width = static_cast<int>(geometry.in_w);
  p.source_pixel = p.channels.source / p.channels.chunk;
  p.source_row = p.source_pixel * p.width;
  p.source_image = p.source_row * p.height;
  p.destination_pixel = p.channels.destination / p.channels.chunk;
  p.destination_row = p.destination_pixel * p.width;
  p.destination_image = p.destination_row * p.height;
#if !defined(__CUDACC__)
  emulator::forget_allocations();
  emulator::allow(source, 16ull * p.images * p.source_image, false);
  emulator::allow(destination, 16ull * p.images * p.destination_image, true);
  for (int i = 0; i < p.terms.active; i++)
    emulator::allow(p.terms.data[i],
                    geometry.out_channels * p.terms.group_sizes[i] * 9 * (p.terms.wide ? 4 : 2),
                    false);
  if (p.terms.gates) emulator::allow(p.terms.gates, p.terms.active * sizeof(float), false);
#endif
  return type == Type::float16 ? launch_steps<Type::float16>(p, device, stream)
                               : launch_steps<Type::bfloat16>(p, device, stream);
}

#else

bool supports_wide(Operation, Type, Type, const Geometry&, const Device&) { return false; }
int convolve_wide(Operation, Type, const Geometry&, const Series&, const void*, void*,
                  const Device&, Stream) {
  return 1;
}  // cudaErrorInvalidValue

#endif

}  // namespace gross::cuda
