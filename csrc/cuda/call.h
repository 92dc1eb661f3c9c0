// What the operators' CUDA implementations (library.cpp) call and the .cu files implement, in plain
// C++: neither torch's headers nor CUDA's, so that tests on the host include it too. Everything is
// a 3×3 convolution with padding 1 and dilation 1 on dense channels-last memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

struct CUstream_st;  // of the CUDA runtime: cudaStream_t is a pointer to it

namespace gross::cuda {

constexpr int max_terms =
    16;  // as MAX_TERMS in gross_kernels/series.py; at most 7 nested sizes end at 64 or below

// Of images: float32 is multiplied as TF32 (callers ask only where torch allows that). Of terms:
// the images' type, or float32. float64 is for the plain kernels alone.
enum class Type { float16, bfloat16, float32, float64 };

enum class Operation { forward, input_grad, weight_grad };

// input [images][in_h][in_w][in_channels], output [images][out_h][out_w][out_channels]; out = (in -
// 1) / stride + 1. Callers guarantee at least one element of everything; data is 16-byte aligned.
struct Geometry {
  int64_t images, in_channels, out_channels, in_h, in_w, out_h, out_w;
  int group_size;  // of the last active term: the convolution runs at it
  int stride;      // 1 or 2
};

// The weight Σ_{i < active} gate_i Ψ(term_i).
struct Series {
  const void*
      terms[max_terms];        // [out_channels][group size][3][3] each, contiguous, 16-byte aligned
  int group_sizes[max_terms];  // each divides the next; those beyond `active` may exceed what
                               // kernels serve
  int count, active;
  Type type;
  const float* gates;  // on the device, one per term; null: all 1
};

// Where gradients go: terms as the series' own, all `count` of them, zeros beyond `active`; gates
// [count] or null, likewise.
struct SeriesGradient {
  void* terms[max_terms];
  float* gates;
};

struct Device {
  int capability;  // 10 × major + minor
  int multiprocessors;
  int shared_bytes;  // opt-in limit of shared memory per block
  int index = 0;     // the runtime's; no plan depends on it
};

using Stream = CUstream_st*;

constexpr int by_model = -1;  // the plan that the model takes to be the fastest

// A call, besides its tensors. Every plan for it has a number; `plan` forces one.
struct Job {
  Operation operation;
  Type type;
  Geometry geometry;
  Series series;
  Device device;
  Stream stream = nullptr;
  bool warpgroups = true;  // kernels for warpgroups may be chosen
  int plan = by_model;
};

// One way to run a job, for measurements.
struct PlanFacts {
  const char* kernel;
  int steps, atoms, tiles, teams, stages, columns, images;  // as in convolution.h, weight_grad.h
  int grid_x, grid_y, threads, shared_bytes;
  double clocks;                     // the model's estimate (not measured)
  double read_bytes, written_bytes;  // of global memory, by the plan: halos included, terms not
};

// Plans made, attributes of kernels set and kernels launched since the library was loaded: tests
// hold the host's work for a call against them.
struct HostCounts {
  std::atomic<int64_t> planned{0}, prepared{0}, launched{0};
};
inline HostCounts host_counts;

// Launchers: nothing waits for the device, nothing is allocated there; the current device is the
// tensors'. They return a cudaError_t, 0 for success, or `unserved`, and in `ran` the number of the
// plan that was launched. Plans are made once for each kind of job and kept. `supports` depends on
// the channels, the group size, the stride, the type, the series' types and the device only, never
// on images, heights and widths: its answer is kept per kind of call.
constexpr int unserved = -1;  // no kernel, or no plan of this number

// convolution.cu; `operation` is forward or input_grad.
bool supports_convolution(Operation operation, Type type, Type terms_type, const Geometry& geometry,
                          const Device& device);
std::vector<PlanFacts> convolution_plans(const Job& job, int& chosen);
int convolve(const Job& job, const void* source, void* destination, int& ran);

// weight_grad.cu; `scratch` is 16-byte aligned and need not be cleared. `passes`: 1 the first
// alone, 2 the second alone, 3 both; with one alone, for measurements, results are undefined.
bool supports_weight_grad(Type type, Type terms_type, const Geometry& geometry,
                          const Device& device);
std::vector<PlanFacts> weight_grad_plans(const Job& job, int& chosen);
size_t weight_grad_scratch_bytes(const Job& job);
int weight_grad(const Job& job, const void* grad, const void* input, const SeriesGradient& gradient,
                void* scratch, int passes, int& ran);

// product_clocks.cu: clocks that a warpgroup's product of m64n64k16 takes on each multiprocessor,
// float32, when its pixels begin `offset` bytes (a multiple of 16) behind a multiple of 128.
int product_clocks(int offset, float* clocks, const Device& device, Stream stream);

// terms.cu. Σ gate_i t_i over the active of terms that have `count` elements each, whatever their
// shape.
int series_sum(const Series& series, int64_t count, void* result, Stream stream);
// The active terms' elements from any strides (in elements, of [out_channels][group size][3][3]) to
// contiguous memory, all in one launch.
int arrange(int64_t out_channels, const Series& from, const int64_t (*strides)[4], const Series& to,
            Stream stream);

// plain.cu: slow and obvious, every channel count and type; the second reference on a GPU.
namespace plain {
int forward(Type type, const Geometry& geometry, const Series& series, const void* input,
            void* output, Stream stream);
int input_grad(Type type, const Geometry& geometry, const Series& series, const void* grad,
               void* grad_input, Stream stream);
size_t weight_grad_scratch_bytes(const Geometry& geometry);
int weight_grad(Type type, const Geometry& geometry, const Series& series, const void* grad,
                const void* input, const SeriesGradient& gradient, void* scratch, Stream stream);
}  // namespace plain

}  // namespace gross::cuda
