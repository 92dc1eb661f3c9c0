// Plans of the forward and the input gradient, and the model by which one is chosen. Plain C++:
// tests on the host run what a GPU would.
#pragma once

#include "convolution.h"
#include "plans.h"
#include "wide.h"

namespace gross::cuda {

// Of the kernels of convolution.h.
struct Plan {
  Problem problem;
  Walk walk;
  int steps, atoms;
  bool many;
  int grid_x, grid_y;
  double clocks;
};

// convolution_float16.cu, convolution_bfloat16.cu, convolution_float32.cu.
template <Type type>
int launch_march(const Plan& plan, const Device& device, Stream stream);

// Of the kernels of wide.h.
struct WidePlan {
  WideProblem problem;
  int steps, atoms;
  Grid grid;
  double clocks;
};

// wide.cu. None where the kernels do not serve the job. `read_bytes`: of global memory, without the
// terms.
std::vector<WidePlan> wide_plans(const Job& job);
double read_bytes(const WidePlan& plan);
PlanFacts facts_of(const WidePlan& plan);
int launch_wide(const WidePlan& plan, Type type, const Device& device, Stream stream);

// Until a block's weights are in registers: the launch and the terms' way through shared memory,
// into it and out of it, and the matrix's, cleared, written and read. The input gradient writes two
// bytes a lane. `raw`: bytes of all terms' weights of one output channel; `piece` of the `outputs`
// fit at a time.
inline double prologue_clocks(int raw, int outputs, int piece, int matrix_bytes, bool transposed) {
  return 1200 + 600.0 * divide_up(outputs, piece) +
         (2.0 * raw * outputs + (transposed ? 4.0 : 3.0) * matrix_bytes) / shared_bytes_a_clock;
}

// Tells the emulator what a kernel may touch.
#if !defined(__CUDACC__)
inline void allow(const Job& job, const void* source, void* destination) {
  const Geometry& g = job.geometry;
  const int64_t inputs = g.images * g.in_h * g.in_w * g.in_channels * bytes_of(job.type),
                outputs = g.images * g.out_h * g.out_w * g.out_channels * bytes_of(job.type);
  const bool transposed = job.operation == Operation::input_grad;
  emulator::forget_allocations();
  emulator::allow(source, transposed ? outputs : inputs, false);
  emulator::allow(destination, transposed ? inputs : outputs, true);
  for (int i = 0; i < job.series.active; i++)
    emulator::allow(job.series.terms[i],
                    g.out_channels * job.series.group_sizes[i] * 9 * bytes_of(job.series.type),
                    false);
  if (job.series.gates) emulator::allow(job.series.gates, job.series.active * sizeof(float), false);
}
#else
inline void allow(const Job&, const void*, void*) {}
#endif

}  // namespace gross::cuda
