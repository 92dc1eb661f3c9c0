// What the operators' CUDA implementations (library.cpp) call and the .cu files implement, in plain
// C++: neither torch's headers nor CUDA's, so that tests on the host include it too. Everything is
// a 3×3 convolution with padding 1 and dilation 1 on dense channels-last memory.
#pragma once

#include <cstddef>
#include <cstdint>

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
};

using Stream = CUstream_st*;

// Launchers: nothing waits for the device, nothing is allocated; the current device is the
// tensors'. They return a cudaError_t, 0 for success. `supports` depends on the channels, the group
// size, the stride, the type, the series' types and the device only, never on images, heights and
// widths: its answer is kept per kind of call.

// convolution.cu; `operation` is forward or input_grad.
bool supports_convolution(Operation operation, Type type, Type terms_type, const Geometry& geometry,
                          const Device& device);
int forward(Type type, const Geometry& geometry, const Series& series, const void* input,
            void* output, const Device& device, Stream stream);
int input_grad(Type type, const Geometry& geometry, const Series& series, const void* grad,
               void* grad_input, const Device& device, Stream stream);

// wide.cu: forward and input_grad once more, faster where it serves them.
bool supports_wide(Operation operation, Type type, Type terms_type, const Geometry& geometry,
                   const Device& device);
int convolve_wide(Operation operation, Type type, const Geometry& geometry, const Series& series,
                  const void* source, void* destination, const Device& device, Stream stream);

// weight_grad.cu; `scratch` is 16-byte aligned and need not be cleared.
bool supports_weight_grad(Type type, Type terms_type, const Geometry& geometry,
                          const Device& device);
size_t weight_grad_scratch_bytes(Type type, const Geometry& geometry, const Device& device);
int weight_grad(Type type, const Geometry& geometry, const Series& series, const void* grad,
                const void* input, const SeriesGradient& gradient, void* scratch,
                const Device& device, Stream stream);

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
