// What a CPU kernel is told: tensors as pointers and strides, geometry as numbers. Nothing of
// torch, so that the kernels can be compiled, tested and profiled on their own. Every argument has
// been checked before it gets here.
#pragma once

#include <cstdint>
#include <vector>

namespace gross::cpu {

// int8: of weights; the activations are then uint8 and sums float32, each where `Forms` says so.
enum class Type { float32, float64, bfloat16, float16, int8 };

// The first three are applied while sums are in registers.
enum class Activation : int64_t { none, relu, prelu, relu6, silu };

constexpr int max_terms = 16;

// A four-dimensional activation tensor; strides in elements, any values.
struct Image {
  void* data;
  int64_t channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

// The terms r_1 … r_active, contiguous [C_out, s_i, kh, kw]; gates as numbers (1 where there are
// none).
struct Series {
  int active;
  Type type;
  const void* terms[max_terms];
  int64_t group_sizes[max_terms];
  double gates[max_terms];
};

// The same for gradients: where the gradient of each term goes, and gate_grads[i] = ⟨restrict_i(D),
// r_i⟩ or null.
struct SeriesGradient {
  void* terms[max_terms];
  double* gates;

  bool wanted() const { return terms[0] || gates; }
};

struct Geometry {
  int64_t images, in_channels, out_channels;
  int64_t group_size;  // of the last active term
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;

  int64_t groups() const { return in_channels / group_size; }
  int64_t outputs_per_group() const { return out_channels / groups(); }
  int64_t taps() const { return kernel_h * kernel_w; }
};

// Which of a convolution's two directions: the convolution itself, or its input gradient.
enum class Pass { forward, backward };

// How a value of a program is held: as numbers where the scale is 0, else in 8 bits, of which q
// stands for scale · (q − zero).
struct Held {
  float scale = 0;
  int32_t zero = 0;

  bool in_bytes() const { return scale != 0; }
};
// Those of what a step reads and writes.
struct Forms {
  Held source, residual, target;
};

// A layer: pointwise, grouped, pointwise. `geometry` is the grouped convolution's, whose channels
// are the bottleneck's widths; terms of the pointwise series are [width_in, C_in] and [C_out,
// width_out].
struct Layer {
  Series pointwise_in, grouped, pointwise_out;
  Geometry geometry;
  int64_t in_channels, out_channels;
  const void* bias;    // [C_out] of the sum's type, or null
  const void* slopes;  // of PReLU, likewise
  // Of int8: the scales of P's outputs, of r and of Q's outputs, and how the input is held.
  const float* scales[3] = {};
  Held source = {};
};

// What becomes of a sum, beside its bias: act(sum + residual), or act(sum) + residual.
struct Finish {
  Activation activation = Activation::none;
  const Image* residual = nullptr;
  bool residual_last = false;
  Forms forms = {};  // of int8
};

// Where a layer's gradients go; what is null is not computed.
struct LayerGradient {
  Image input;
  SeriesGradient pointwise_in, grouped, pointwise_out;
  void* bias;  // [C_out] of the sum's type
};

// Runs body(context, begin, end) over slices of [0, count) on torch's own threads.
struct Threads {
  int count;
  void (*run)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end),
              void* context);
};

// A convolution, or its input gradient: `source` is what is read, `target` what is written.
struct Convolution {
  const Image& source;
  const Series& series;
  const Image& target;
  const Geometry& geometry;
  Pass pass;
  const Threads& threads;
};

// The gradients of a convolution's weights.
struct WeightGradient {
  const Image &grad, &input;
  const Series& series;
  const SeriesGradient& gradient;
  const Geometry& geometry;
  const Threads& threads;
};

// A layer from packed weights. The first pointwise convolution's output is kept in `inner` where
// that has data.
struct LayerForward {
  const Image& input;
  const Layer& layer;
  const void* packed;
  const Image &inner, &output;
  const Finish& finish;
  const Threads& threads;
};

// A grouped or dense convolution to be packed: weights, [C_out] of bias and of PReLU's slopes of
// the sum's type, or null.
struct Kernel {
  Series series;
  Geometry geometry;
  const void *bias, *slopes;
  const float* scales = nullptr;  // of int8, one per output
  Held source = {};               // likewise
};

// A convolution from packed weights. Of int8, source, target and residual are compact and
// channels-last, and three bytes past the source's end are read.
struct PackedConvolution {
  const Image& source;
  const void* packed;
  const Image& target;
  const Geometry& geometry;
  const Finish& finish;
  const Threads& threads;
};

// The largest number, or the mean, of each window of a channel; `geometry` says which windows.
struct Pooling {
  const Image &source, &target;
  const Geometry& geometry;
  bool mean;
  const Finish& finish;
  const Threads& threads;
};

// Along one axis, what position t of a target is the sum of: the source's positions (t · stride +
// offset + k · step) / spread for k < window, as far as there are such.
struct Axis {
  int64_t window, step, stride, offset, spread;
};

// Sums over windows of channels, rows and columns; channels are counted within each of `groups`.
struct SumPooling {
  const Image &source, &target;
  int64_t images, groups;
  Axis channels, rows, columns;
  const Threads& threads;
};

// The gradients of a layer from `grad`, its output's. `inner` has data where the first pointwise
// convolution's output was kept, `output` where relu cut it off.
struct LayerBackward {
  const Image &grad, &input;
  const Layer& layer;
  const Image &inner, &output;
  const LayerGradient& gradient;
  const Threads& threads;
};

// The kernels for one instruction set; the activations' type is `type`.
struct Kernels {
  const char* name;
  int vector_bytes;
  void (*convolve)(Type type, const Convolution& call);
  void (*weight_grad)(Type type, const WeightGradient& call);
  // A layer's weights in the order that `layer` reads them: how many numbers of the sum's type they
  // are, and the numbers.
  int64_t (*packed_size)(Type type, const Layer& layer);
  void (*pack)(Type type, const Layer& layer, void* packed, const Threads& threads);
  void (*layer)(Type type, const LayerForward& call);
  // The same of a single convolution.
  int64_t (*packed_kernel_size)(Type type, const Geometry& geometry);
  void (*pack_kernel)(Type type, const Kernel& kernel, void* packed, const Threads& threads);
  void (*convolve_packed)(Type type, const PackedConvolution& call);
  void (*pool)(Type type, const Pooling& call);
  void (*layer_backward)(Type type, const LayerBackward& call);
  // Σ gate_i t_i of terms of `count` elements each, in their type.
  void (*sum)(const Series& series, int64_t count, void* output, const Threads& threads);
  void (*sum_pool)(Type type, const SumPooling& call);
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avxvnni_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512vnni_kernels;
extern const Kernels avx512bf16_kernels;
#endif
#if defined(GROSS_WIDE)
// For tests alone: AVX-512's kernels on any processor, see tests/native/wide.cpp.
extern const Kernels wide_kernels;
extern const Kernels widebf16_kernels;
#endif

// One instruction set that this library has kernels for.
struct InstructionSet {
  const Kernels* kernels;
  bool present;  // whether the processor has it
};
// From the least to the best.
std::vector<InstructionSet> instruction_sets();

// The kernels for this machine, or for the instruction set that GROSS_KERNELS_ISA names.
const Kernels& kernels();

}  // namespace gross::cpu
