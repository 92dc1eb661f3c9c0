// Launches the kernels of convolution.h. A file for each type includes this, so that the compiler
// works on them side by side.
#pragma once

#include "convolution_plan.h"

namespace gross::cuda {

template <class S>
int launch_shape(const Plan& plan, const Device& device, Stream stream) {
  const Tile& t = plan.problem.tile;
  const Grid grid{plan.grid_x, plan.grid_y, t.teams * team_threads,
                  static_cast<int>(t.shared_bytes)};
  if constexpr (S::walk == Walk::same)
    return launch<&march<S>>(grid, device, stream, plan.problem);
  else if constexpr (S::walk == Walk::halving)
    return launch<&march_halving<S>>(grid, device, stream, plan.problem);
  else
    return launch<&march_doubling<S>>(grid, device, stream, plan.problem);
}
template <Walk walk, Type type, int steps, bool many>
int launch_steps(const Plan& plan, const Device& device, Stream stream) {
  if constexpr (walk == Walk::same && steps < most_steps)
    if (plan.atoms == 7)
      return launch_shape<Shape<walk, type, steps, 7, many>>(plan, device, stream);
  return launch_shape<Shape<walk, type, steps, 4, many>>(plan, device, stream);
}
template <Walk walk, Type type, bool many>
int launch_walk(const Plan& plan, const Device& device, Stream stream) {
  if constexpr (type != Type::float32)
    if (plan.steps == 1) return launch_steps<walk, type, 1, many>(plan, device, stream);
  return plan.steps == 2 ? launch_steps<walk, type, 2, many>(plan, device, stream)
                         : launch_steps<walk, type, 4, many>(plan, device, stream);
}
template <Walk walk, Type type>
int launch_walk(const Plan& plan, const Device& device, Stream stream) {
  return plan.many ? launch_walk<walk, type, true>(plan, device, stream)
                   : launch_walk<walk, type, false>(plan, device, stream);
}
template <Type type>
int launch_march(const Plan& plan, const Device& device, Stream stream) {
  if (plan.walk == Walk::same) return launch_walk<Walk::same, type>(plan, device, stream);
  if (plan.walk == Walk::halving) return launch_walk<Walk::halving, type>(plan, device, stream);
  return launch_walk<Walk::doubling, type>(plan, device, stream);
}

}  // namespace gross::cuda
