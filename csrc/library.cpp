// The operators' CPU implementations, registered through LibTorch's stable ABI: one build serves torch 2.10 and newer. Schemas,
// shapes for tracing and gradients are in gross_kernels/ops.py. Arguments are checked here, so that the kernels start with trust.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/call.h"

namespace {

using namespace gross::cpu;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default: STD_TORCH_CHECK(false, name, ": accepted dtypes are float32, float64, bfloat16 and float16");
  }
}

int active_of(const Tensor& active, size_t count) {
  STD_TORCH_CHECK(active.is_cpu() && active.numel() == 1 && active.scalar_type() == ScalarType::Long,
                  "active: accepted is a 0-dimensional int64 tensor on the CPU");
  const int64_t value = *active.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(value >= 1 && value <= static_cast<int64_t>(count), "active: got ", value, ", accepted is 1 to ", count);
  return static_cast<int>(value);
}

// The memory format of ATen's convolutions: channels-last when the strides say so, contiguous in every doubtful case.
bool is_channels_last(const Tensor& tensor) {
  int64_t least = 0;
  if (tensor.stride(1) == 0) return false;
  for (int d : {1, 3, 2, 0}) {
    if (tensor.size(d) == 0 || tensor.stride(d) < least || (d == 0 && least == tensor.stride(1))) return false;
    least = tensor.size(d) > 1 ? tensor.stride(d) * tensor.size(d) : tensor.stride(d);
  }
  return true;
}

Tensor empty_image(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  const Ints size{n, c, h, w};
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              is_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Image image_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.size(1), tensor.size(2), tensor.size(3),
          tensor.stride(0),  tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

void read_gates(const std::optional<Tensor>& gates, size_t count, double* to) {
  for (size_t i = 0; i < count; i++) to[i] = 1;
  if (!gates.has_value()) return;
  STD_TORCH_CHECK(gates->is_cpu() && gates->dim() == 1 && gates->size(0) == static_cast<int64_t>(count),
                  "gates: accepted is one per term, on the CPU");
  type_of(*gates, "gates");
  const Tensor wide = torch::stable::to(*gates, ScalarType::Double);
  for (size_t i = 0; i < count; i++) to[i] = wide.const_data_ptr<double>()[i * wide.stride(0)];
}

Threads torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
            if (count > 0)
              torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

// The tensor itself where it is contiguous: asking torch for that costs a microsecond a term.
Tensor compact(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// A checked call: the terms made contiguous (they are small) and everything in the kernels' words. `in_channels` are those that the
// grouped convolution reads: the input's, or in a layer the first pointwise convolution's.
struct Call {
  std::vector<Tensor> terms;
  Series series{};
  Geometry geometry{};
  Type type;
  int64_t out_h, out_w;

  Call(const Tensor& input, int64_t in_channels, const std::vector<Tensor>& given, const Tensor& active, const std::optional<Tensor>& gates,
       const Ints& stride, const Ints& padding, const Ints& dilation, const char* name = "terms")
      : type(type_of(input, "input")) {
    STD_TORCH_CHECK(!given.empty() && given.size() <= max_terms, name, ": got ", given.size(), ", accepted are 1 to ", max_terms);
    STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4, "input: accepted is [N, C_in, H, W] on the CPU");
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "stride, padding, dilation: accepted are pairs");
    for (int d = 0; d < 2; d++)
      STD_TORCH_CHECK(stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1,
                      "stride, padding, dilation: accepted are at least 1, 0, 1");
    series.active = active_of(active, given.size());
    series.type = type_of(given[0], name);
    STD_TORCH_CHECK(series.type == type || (series.type == Type::float32 && (type == Type::bfloat16 || type == Type::float16)),
                    name, ": accepted is the input's dtype, or float32 with a 16-bit input");
    const Tensor& first = given[0];
    STD_TORCH_CHECK(first.dim() == 4, name, ": accepted is [C_out, group size, kh, kw]");
    const int64_t out_channels = first.size(0);
    for (size_t i = 0; i < given.size(); i++) {
      const Tensor& term = given[i];
      STD_TORCH_CHECK(term.is_cpu() && term.dim() == 4 && term.scalar_type() == first.scalar_type() &&
                          term.size(0) == out_channels && term.size(2) == first.size(2) && term.size(3) == first.size(3),
                      name, "[", i, "]: accepted is the shape and dtype of ", name, "[0] up to the group size, on the CPU");
      const int64_t s = term.size(1);
      STD_TORCH_CHECK(s >= 1 && in_channels % s == 0 && in_channels > 0 && out_channels > 0 && out_channels % (in_channels / s) == 0 &&
                          (i == 0 || (s > given[i - 1].size(1) && s % given[i - 1].size(1) == 0)),
                      name, "[", i, "]: group size ", s, " does not nest in ", in_channels, " → ", out_channels, " channels");
      terms.push_back(compact(term));
      series.terms[i] = terms[i].data_ptr();
      series.group_sizes[i] = s;
    }
    read_gates(gates, given.size(), series.gates);
    geometry = {input.size(0), in_channels, out_channels, series.group_sizes[series.active - 1], first.size(2), first.size(3),
                stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
    STD_TORCH_CHECK(geometry.kernel_h >= 1 && geometry.kernel_w >= 1, name, ": accepted are kernels of at least 1×1");
    const int64_t room_h = input.size(2) + 2 * padding[0] - dilation[0] * (geometry.kernel_h - 1) - 1;
    const int64_t room_w = input.size(3) + 2 * padding[1] - dilation[1] * (geometry.kernel_w - 1) - 1;
    STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, "kernel_size: the dilated kernel is larger than the padded input");
    out_h = room_h / stride[0] + 1;
    out_w = room_w / stride[1] + 1;
  }
};

Tensor series_conv2d(const Tensor& input, const std::vector<Tensor>& terms, const Tensor& active,
                     const std::optional<Tensor>& gates, const Ints& stride, const Ints& padding, const Ints& dilation) {
  const Call call(input, input.size(1), terms, active, gates, stride, padding, dilation);
  Tensor output = empty_image(input.size(0), call.geometry.out_channels, call.out_h, call.out_w, input);
  if (output.numel() > 0)
    kernels().forward(call.type, image_of(input), call.series, image_of(output), call.geometry, torch_threads());
  return output;
}

// The gradients' tensors of a series, in `terms`, and where its kernel writes them; zeros where it will not: beyond `active`, or without pixels.
SeriesGradient empty_gradient(const Series& series, const std::vector<Tensor>& like, bool needed, bool some, std::vector<Tensor>& terms) {
  SeriesGradient gradient{};
  for (size_t i = 0; needed && i < like.size(); i++) {
    terms.push_back(torch::stable::empty(like[i].sizes(), like[i].scalar_type(), std::nullopt, like[i].device()));
    gradient.terms[i] = terms[i].data_ptr();
    if (!some || static_cast<int>(i) >= series.active) torch::stable::zero_(terms[i]);
  }
  return gradient;
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> series_conv2d_backward(
    const Tensor& grad, const Tensor& input, const std::vector<Tensor>& terms, const Tensor& active,
    const std::optional<Tensor>& gates, const Ints& stride, const Ints& padding, const Ints& dilation,
    const std::vector<bool>& needs) {
  const Call call(input, input.size(1), terms, active, gates, stride, padding, dilation);
  const Geometry& g = call.geometry;
  STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 4 && grad.size(0) == g.images && grad.size(1) == g.out_channels &&
                      grad.size(2) == call.out_h && grad.size(3) == call.out_w && grad.scalar_type() == input.scalar_type(),
                  "grad: accepted is the output's shape and dtype");
  STD_TORCH_CHECK(needs.size() == 3, "needs: accepted are three flags: input, terms, gates");
  const bool some = grad.numel() > 0;
  const Ints none{0};

  Tensor grad_input = torch::stable::new_empty(input, none);
  if (needs[0]) {
    grad_input = empty_image(g.images, g.in_channels, input.size(2), input.size(3), input);
    if (some && grad_input.numel() > 0)
      kernels().input_grad(call.type, image_of(grad), call.series, image_of(grad_input), g, torch_threads());
  }

  std::vector<Tensor> grad_terms;
  SeriesGradient gradient = empty_gradient(call.series, terms, needs[1], some, grad_terms);
  Tensor grad_gates = torch::stable::new_empty(terms[0], none);
  Tensor wide_gates;
  const bool for_gates = needs[2] && gates.has_value();
  if (for_gates) {
    wide_gates = torch::stable::empty(gates->sizes(), ScalarType::Double, std::nullopt, gates->device());
    torch::stable::zero_(wide_gates);
    gradient.gates = wide_gates.mutable_data_ptr<double>();
  }
  if (some && (needs[1] || for_gates))
    kernels().weight_grad(call.type, image_of(grad), image_of(input), call.series, gradient, g, torch_threads());
  if (for_gates) grad_gates = torch::stable::to(wide_gates, gates->scalar_type());
  return {grad_input, grad_terms, grad_gates};
}

Tensor series_sum(const std::vector<Tensor>& terms, const Tensor& active, const std::optional<Tensor>& gates) {
  STD_TORCH_CHECK(!terms.empty() && terms.size() <= max_terms, "terms: got ", terms.size(), ", accepted are 1 to ", max_terms);
  Series series{};
  series.active = active_of(active, terms.size());
  series.type = type_of(terms[0], "terms");
  read_gates(gates, terms.size(), series.gates);
  std::vector<Tensor> kept;
  for (int i = 0; i < series.active; i++) {
    bool same = terms[i].is_cpu() && terms[i].scalar_type() == terms[0].scalar_type() && terms[i].dim() == terms[0].dim();
    for (int64_t d = 0; same && d < terms[0].dim(); d++) same = terms[i].size(d) == terms[0].size(d);
    STD_TORCH_CHECK(same, "terms[", i, "]: accepted is the shape and dtype of terms[0], on the CPU");
    kept.push_back(compact(terms[i]));
    series.terms[i] = kept[i].data_ptr();
  }
  Tensor output = torch::stable::empty(terms[0].sizes(), terms[0].scalar_type(), std::nullopt, terms[0].device());
  if (output.numel() > 0) kernels().sum(series, output.numel(), output.data_ptr(), torch_threads());
  return output;
}

// One of a layer's pointwise series: plain sums of [to, from, 1, 1].
Series pointwise_series(const std::vector<Tensor>& given, const Call& call, int64_t to, int64_t from, const char* name,
                        std::vector<Tensor>& kept) {
  Series series = call.series;
  STD_TORCH_CHECK(given.size() == call.terms.size(), name, ": got ", given.size(), " terms, accepted is one per grouped term, ", call.terms.size());
  for (size_t i = 0; i < given.size(); i++) {
    const Tensor& term = given[i];
    STD_TORCH_CHECK(term.is_cpu() && term.dim() == 4 && term.scalar_type() == call.terms[0].scalar_type() && term.size(0) == to &&
                        term.size(1) == from && term.size(2) == 1 && term.size(3) == 1,
                    name, "[", i, "]: accepted is [", to, ", ", from, ", 1, 1] of the grouped terms' dtype, on the CPU");
    kept.push_back(compact(term));
    series.terms[i] = kept.back().data_ptr();
    series.group_sizes[i] = from;
  }
  return series;
}

// A checked layer: pointwise, grouped, pointwise.
struct LayerCall {
  Call call;
  std::vector<Tensor> pointwise;
  std::optional<Tensor> wide_bias;
  Layer layer{};

  LayerCall(const Tensor& input, const std::vector<Tensor>& pointwise_in, const std::vector<Tensor>& grouped,
            const std::vector<Tensor>& pointwise_out, const std::optional<Tensor>& bias, const Tensor& active,
            const std::optional<Tensor>& gates, const Ints& stride, const Ints& padding, const Ints& dilation, bool relu)
      : call(input, channels_of(pointwise_in, "pointwise_in"), grouped, active, gates, stride, padding, dilation, "grouped") {
    layer.geometry = call.geometry;
    layer.in_channels = input.size(1);
    layer.out_channels = channels_of(pointwise_out, "pointwise_out");
    layer.relu = relu;
    layer.grouped = call.series;
    STD_TORCH_CHECK(layer.in_channels > 0 && layer.out_channels > 0, "input, pointwise_out: accepted is at least one channel");
    layer.pointwise_in = pointwise_series(pointwise_in, call, layer.geometry.in_channels, layer.in_channels, "pointwise_in", pointwise);
    layer.pointwise_out = pointwise_series(pointwise_out, call, layer.out_channels, layer.geometry.out_channels, "pointwise_out", pointwise);
    if (bias.has_value()) {
      STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == layer.out_channels, "bias: accepted is [", layer.out_channels, "] on the CPU");
      type_of(*bias, "bias");
      wide_bias = bias->scalar_type() == sum_type() ? compact(*bias) : compact(torch::stable::to(*bias, sum_type()));
      layer.bias = wide_bias->data_ptr();
    }
  }

  ScalarType sum_type() const { return call.type == Type::float64 ? ScalarType::Double : ScalarType::Float; }

  Tensor pack(const Tensor& like) const {
    const Ints size{kernels().packed_size(call.type, layer)};
    Tensor packed = torch::stable::empty(size, sum_type(), std::nullopt, like.device());
    kernels().pack(call.type, layer, packed.data_ptr(), torch_threads());
    return packed;
  }

 private:
  static int64_t channels_of(const std::vector<Tensor>& series, const char* name) {
    STD_TORCH_CHECK(!series.empty() && series[0].dim() == 4, name, ": accepted are terms of four dimensions");
    return series[0].size(0);
  }
};

std::tuple<Tensor, Tensor> bottleneck(const Tensor& input, const std::vector<Tensor>& pointwise_in, const std::vector<Tensor>& grouped,
                                      const std::vector<Tensor>& pointwise_out, const std::optional<Tensor>& bias, const Tensor& active,
                                      const std::optional<Tensor>& gates, const std::optional<Tensor>& packed, const Ints& stride,
                                      const Ints& padding, const Ints& dilation, bool relu, bool keep_inner) {
  const LayerCall of(input, pointwise_in, grouped, pointwise_out, bias, active, gates, stride, padding, dilation, relu);
  const Ints none{0};
  const Geometry& g = of.call.geometry;
  Tensor output = empty_image(g.images, of.layer.out_channels, of.call.out_h, of.call.out_w, input);
  Tensor inner = keep_inner ? empty_image(g.images, g.in_channels, input.size(2), input.size(3), input) : torch::stable::new_empty(input, none);
  if (packed.has_value())
    STD_TORCH_CHECK(packed->is_cpu() && packed->dim() == 1 && packed->scalar_type() == of.sum_type() && packed->stride(0) == 1 &&
                        packed->size(0) == kernels().packed_size(of.call.type, of.layer),
                    "packed: accepted is what bottleneck_pack made for this layer, group size and dtype");
  if (output.numel() > 0) {
    const Tensor weights = packed.has_value() ? *packed : of.pack(input);
    kernels().layer(of.call.type, image_of(input), of.layer, weights.data_ptr(), keep_inner ? image_of(inner) : Image{}, image_of(output), torch_threads());
  }
  return {output, inner};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor> bottleneck_backward(
    const Tensor& grad, const Tensor& input, const Tensor& inner, const std::optional<Tensor>& output, const std::vector<Tensor>& pointwise_in,
    const std::vector<Tensor>& grouped, const std::vector<Tensor>& pointwise_out, const std::optional<Tensor>& bias, const Tensor& active,
    const std::optional<Tensor>& gates, const Ints& stride, const Ints& padding, const Ints& dilation, bool relu, const std::vector<bool>& needs) {
  const LayerCall of(input, pointwise_in, grouped, pointwise_out, bias, active, gates, stride, padding, dilation, relu);
  const Geometry& g = of.call.geometry;
  auto is_output = [&](const Tensor& tensor) {
    return tensor.is_cpu() && tensor.dim() == 4 && tensor.size(0) == g.images && tensor.size(1) == of.layer.out_channels && tensor.size(2) == of.call.out_h &&
           tensor.size(3) == of.call.out_w && tensor.scalar_type() == input.scalar_type();
  };
  STD_TORCH_CHECK(is_output(grad), "grad: accepted is the output's shape and dtype");
  STD_TORCH_CHECK(!relu || (output.has_value() && is_output(*output)), "output: accepted with relu is the layer's output");
  STD_TORCH_CHECK(inner.numel() == 0 || (inner.is_cpu() && inner.dim() == 4 && inner.size(0) == g.images && inner.size(1) == g.in_channels &&
                                         inner.size(2) == input.size(2) && inner.size(3) == input.size(3) && inner.scalar_type() == input.scalar_type()),
                  "inner: accepted is nothing, or what the layer returned");
  STD_TORCH_CHECK(needs.size() == 6, "needs: accepted are six flags: input, pointwise_in, grouped, pointwise_out, bias, gates");
  const bool some = grad.numel() > 0;
  const Ints none{0};

  LayerGradient gradient{};
  Tensor grad_input = torch::stable::new_empty(input, none), grad_bias = torch::stable::new_empty(input, none),
         grad_gates = torch::stable::new_empty(input, none), wide_gates;
  if (needs[0]) {
    grad_input = empty_image(g.images, input.size(1), input.size(2), input.size(3), input);
    gradient.input = image_of(grad_input);
  }
  std::vector<Tensor> grads_in, grads_grouped, grads_out;
  gradient.pointwise_in = empty_gradient(of.layer.pointwise_in, pointwise_in, needs[1], some, grads_in);
  gradient.grouped = empty_gradient(of.layer.grouped, grouped, needs[2], some, grads_grouped);
  gradient.pointwise_out = empty_gradient(of.layer.pointwise_out, pointwise_out, needs[3], some, grads_out);
  if (needs[4] && bias.has_value()) {
    grad_bias = torch::stable::empty(bias->sizes(), of.sum_type(), std::nullopt, bias->device());
    if (!some) torch::stable::zero_(grad_bias);
    gradient.bias = grad_bias.data_ptr();
  }
  if (needs[5] && gates.has_value()) {
    // One row per series.
    const Ints size{3, gates->size(0)};
    wide_gates = torch::stable::empty(size, ScalarType::Double, std::nullopt, gates->device());
    torch::stable::zero_(wide_gates);
    double* const at = wide_gates.mutable_data_ptr<double>();
    gradient.pointwise_in.gates = at;
    gradient.grouped.gates = at + gates->size(0);
    gradient.pointwise_out.gates = at + 2 * gates->size(0);
  }
  if (some)
    kernels().layer_backward(of.call.type, image_of(grad), image_of(input), of.layer, inner.numel() > 0 ? image_of(inner) : Image{},
                             relu ? image_of(*output) : Image{}, gradient, torch_threads());
  if (gradient.bias) grad_bias = torch::stable::to(grad_bias, bias->scalar_type());
  if (gradient.grouped.gates) {
    grad_gates = torch::stable::empty(gates->sizes(), ScalarType::Double, std::nullopt, gates->device());
    double* const to = grad_gates.mutable_data_ptr<double>();
    const double* const from = wide_gates.const_data_ptr<double>();
    const int64_t count = gates->size(0);
    for (int64_t i = 0; i < count; i++) to[i] = from[i] + from[count + i] + from[2 * count + i];
    grad_gates = torch::stable::to(grad_gates, gates->scalar_type());
  }
  return {grad_input, grads_in, grads_grouped, grads_out, grad_bias, grad_gates};
}

// The weights as `bottleneck` takes them in `packed`, for activations of `like`'s dtype.
Tensor bottleneck_pack(const Tensor& like, const std::vector<Tensor>& pointwise_in, const std::vector<Tensor>& grouped,
                       const std::vector<Tensor>& pointwise_out, const std::optional<Tensor>& bias, const Tensor& active,
                       const std::optional<Tensor>& gates) {
  STD_TORCH_CHECK(!grouped.empty() && grouped[0].dim() == 4 && !pointwise_in.empty() && pointwise_in[0].dim() == 4,
                  "pointwise_in, grouped: accepted are terms of four dimensions");
  // The smallest input that the kernel fits: packed weights do not depend on the geometry.
  const Ints size{0, pointwise_in[0].size(1), grouped[0].size(2), grouped[0].size(3)}, one{1, 1}, zero{0, 0};
  const Tensor input = torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device());
  return LayerCall(input, pointwise_in, grouped, pointwise_out, bias, active, gates, one, zero, one, false).pack(like);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gross, CPU, m) {
  m.impl("series_conv2d", TORCH_BOX(&series_conv2d));
  m.impl("series_conv2d_backward", TORCH_BOX(&series_conv2d_backward));
  m.impl("series_sum", TORCH_BOX(&series_sum));
  m.impl("bottleneck", TORCH_BOX(&bottleneck));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
  m.impl("bottleneck_pack", TORCH_BOX(&bottleneck_pack));
}

// For gross_kernels/environment.py: how the library was built, and the instruction set in use.
#define GROSS_EXPORT extern "C" __attribute__((visibility("default")))
GROSS_EXPORT const char* gross_cpu_build() {
  return "torch " TORCH_VERSION ", compiler " __VERSION__ ", flags " GROSS_BUILD_FLAGS;
}
GROSS_EXPORT const char* gross_cpu_isa() { return kernels().name; }
