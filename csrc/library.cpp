// The operators' CPU implementations, registered through LibTorch's stable ABI: one build serves
// torch 2.10 and newer. Schemas, shapes for tracing and gradients are in gross_kernels/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "packed.h"
#include "program.h"
#include "tensors.h"

namespace {

using namespace gross::cpu;

Finish finish_of(bool relu) { return {relu ? Activation::relu : Activation::none}; }

Tensor series_conv2d(const Tensor& input, const std::vector<Tensor>& terms, const Tensor& active,
                     const std::optional<Tensor>& gates, const Ints& stride, const Ints& padding,
                     const Ints& dilation) {
  const Call call(input, input.size(1), {terms, active, gates}, {stride, padding, dilation});
  Tensor output =
      empty_image(input.size(0), call.geometry.out_channels, call.out_h, call.out_w, input);
  if (output.numel() > 0)
    kernels().convolve(call.type, {image_of(input), call.series, image_of(output), call.geometry,
                                   Pass::forward, torch_threads(call.products())});
  return output;
}

// The gradients' tensors of a series, in `terms`, and where its kernel writes them; zeros where it
// will not: beyond `active`, or without pixels.
SeriesGradient empty_gradient(const Series& series, const std::vector<Tensor>& like, bool needed,
                              bool some, std::vector<Tensor>& terms) {
  SeriesGradient gradient{};
  for (size_t i = 0; needed && i < like.size(); i++) {
    terms.push_back(torch::stable::empty(like[i].sizes(), like[i].scalar_type(), std::nullopt,
                                         like[i].device()));
    gradient.terms[i] = terms[i].data_ptr();
    if (!some || static_cast<int>(i) >= series.active)
      std::memset(gradient.terms[i], 0, like[i].numel() * like[i].element_size());
  }
  return gradient;
}

std::tuple<Tensor, std::vector<Tensor>, Tensor> series_conv2d_backward(
    const Tensor& grad, const Tensor& input, const std::vector<Tensor>& terms, const Tensor& active,
    const std::optional<Tensor>& gates, const Ints& stride, const Ints& padding,
    const Ints& dilation, const std::vector<bool>& needs) {
  const Call call(input, input.size(1), {terms, active, gates}, {stride, padding, dilation});
  const Geometry& g = call.geometry;
  STD_TORCH_CHECK(grad.is_cpu() && grad.dim() == 4 && grad.size(0) == g.images &&
                      grad.size(1) == g.out_channels && grad.size(2) == call.out_h &&
                      grad.size(3) == call.out_w && grad.scalar_type() == input.scalar_type(),
                  "grad: accepted is the output's shape and dtype");
  STD_TORCH_CHECK(needs.size() == 3, "needs: accepted are three flags: input, terms, gates");
  const bool some = grad.numel() > 0;

  Tensor grad_input = no_tensor(input);
  if (needs[0]) {
    grad_input = empty_image(g.images, g.in_channels, input.size(2), input.size(3), input);
    if (some && grad_input.numel() > 0)
      kernels().convolve(call.type, {image_of(grad), call.series, image_of(grad_input), g,
                                     Pass::backward, torch_threads(call.products())});
  }

  std::vector<Tensor> grad_terms;
  SeriesGradient gradient = empty_gradient(call.series, terms, needs[1], some, grad_terms);
  Tensor grad_gates = no_tensor(terms[0]);
  Tensor wide_gates;
  const bool for_gates = needs[2] && gates.has_value();
  if (for_gates) {
    wide_gates =
        torch::stable::empty(gates->sizes(), ScalarType::Double, std::nullopt, gates->device());
    torch::stable::zero_(wide_gates);
    gradient.gates = wide_gates.mutable_data_ptr<double>();
  }
  if (some && (needs[1] || for_gates))
    kernels().weight_grad(call.type, {image_of(grad), image_of(input), call.series, gradient, g,
                                      torch_threads(call.products())});
  if (for_gates) grad_gates = torch::stable::to(wide_gates, gates->scalar_type());
  return {grad_input, grad_terms, grad_gates};
}

Tensor series_sum(const std::vector<Tensor>& terms, const Tensor& active,
                  const std::optional<Tensor>& gates) {
  STD_TORCH_CHECK(!terms.empty() && terms.size() <= max_terms, "terms: got ", terms.size(),
                  ", accepted are 1 to ", max_terms);
  Series series{};
  series.active = active_of(active, terms.size());
  series.type = type_of(terms[0], "terms");
  read_gates(gates, terms.size(), series.gates);
  std::vector<Tensor> kept;
  for (int i = 0; i < series.active; i++) {
    bool same = terms[i].is_cpu() && terms[i].scalar_type() == terms[0].scalar_type() &&
                terms[i].dim() == terms[0].dim();
    for (int64_t d = 0; same && d < terms[0].dim(); d++)
      same = terms[i].size(d) == terms[0].size(d);
    STD_TORCH_CHECK(same, "terms[", i,
                    "]: accepted is the shape and dtype of terms[0], on the CPU");
    kept.push_back(compact(terms[i]));
    series.terms[i] = kept[i].data_ptr();
  }
  Tensor output = torch::stable::empty(terms[0].sizes(), terms[0].scalar_type(), std::nullopt,
                                       terms[0].device());
  if (output.numel() > 0)
    kernels().sum(series, output.numel(), output.data_ptr(),
                  torch_threads(per_number * output.numel() * series.active));
  return output;
}

std::tuple<Tensor, Tensor> bottleneck(const Tensor& input, const std::vector<Tensor>& pointwise_in,
                                      const std::vector<Tensor>& grouped,
                                      const std::vector<Tensor>& pointwise_out,
                                      const std::optional<Tensor>& bias, const Tensor& active,
                                      const std::optional<Tensor>& gates, const Ints& stride,
                                      const Ints& padding, const Ints& dilation, bool relu,
                                      bool keep_inner) {
  const LayerCall of(input, {pointwise_in, grouped, pointwise_out, bias, active, gates},
                     {stride, padding, dilation});
  const Geometry& g = of.call.geometry;
  Tensor output = empty_image(g.images, of.layer.out_channels, of.call.out_h, of.call.out_w, input);
  Tensor inner = keep_inner
                     ? empty_image(g.images, g.in_channels, input.size(2), input.size(3), input)
                     : no_tensor(input);
  if (output.numel() > 0)
    kernels().layer(of.call.type, {image_of(input), of.layer, weights_of(pack(of, input)),
                                   keep_inner ? image_of(inner) : Image{}, image_of(output),
                                   finish_of(relu), torch_threads(of.products(input))});
  return {output, inner};
}

// The layer from what `bottleneck_pack` made. All numbers that the kernel needs besides are in one
// list, `shape`, for every list of a schema takes time. They are width_in, width_out, group size,
// C_out, and kernel size, stride, padding and dilation as pairs.
Tensor bottleneck_packed(const Tensor& input, const Tensor& packed, const Ints& shape, bool relu) {
  const Type type = type_of(input, "input");
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4 && input.size(1) > 0,
                  "input: accepted is [N, C_in, H, W] on the CPU, of at least one channel");
  STD_TORCH_CHECK(shape.size() == 12, "shape: got ", shape.size(), " numbers, accepted are 12");
  for (int i = 0; i < 6; i++)
    STD_TORCH_CHECK(shape[i] >= 1, "shape[", i, "]: got ", shape[i], ", accepted is at least 1");
  Layer layer{};
  Geometry& g = layer.geometry;
  g = {input.size(0), shape[0], shape[1], shape[2], shape[4],  shape[5],
       shape[6],      shape[7], shape[8], shape[9], shape[10], shape[11]};
  STD_TORCH_CHECK(g.in_channels % g.group_size == 0 && g.out_channels % g.groups() == 0,
                  "shape: group size ", g.group_size, " does not nest in ", g.in_channels, " → ",
                  g.out_channels, " channels");
  layer.in_channels = input.size(1);
  layer.out_channels = shape[3];
  const auto [out_h, out_w] = output_size(input, g);
  check_packed(packed, type, layer);
  Tensor output = empty_image(g.images, layer.out_channels, out_h, out_w, input);
  if (output.numel() > 0)
    kernels().layer(type,
                    {image_of(input), layer, weights_of(packed), Image{}, image_of(output),
                     finish_of(relu), torch_threads(products_of(layer, input, out_h, out_w))});
  return output;
}

// The tensors of a layer's gradients, and where the kernel writes them.
class LayerGradients {
 public:
  // `needs`: input, pointwise_in, grouped, pointwise_out, bias, gates. With `some` pixels the
  // kernel writes what is needed; without, it is zeros.
  LayerGradients(const LayerCall& of, const Tensor& input, const LayerWeights& given,
                 const std::vector<bool>& needs, bool some)
      : input_(no_tensor(input)), bias_(no_tensor(input)) {
    const Layer& layer = of.layer;
    if (needs[0]) {
      input_ =
          empty_image(of.call.geometry.images, input.size(1), input.size(2), input.size(3), input);
      gradient_.input = image_of(input_);
    }
    gradient_.pointwise_in =
        empty_gradient(layer.pointwise_in, given.pointwise_in, needs[1], some, first_);
    gradient_.grouped = empty_gradient(layer.grouped, given.grouped, needs[2], some, grouped_);
    gradient_.pointwise_out =
        empty_gradient(layer.pointwise_out, given.pointwise_out, needs[3], some, last_);
    if (needs[4] && given.bias.has_value()) {
      bias_ = torch::stable::empty(given.bias->sizes(), of.sum_type(), std::nullopt,
                                   given.bias->device());
      if (!some) torch::stable::zero_(bias_);
      gradient_.bias = bias_.data_ptr();
    }
    if (needs[5] && given.gates.has_value()) {
      gates_.assign(3 * given.gates->size(0), 0);  // one row per series
      gradient_.pointwise_in.gates = gates_.data();
      gradient_.grouped.gates = gates_.data() + given.gates->size(0);
      gradient_.pointwise_out.gates = gates_.data() + 2 * given.gates->size(0);
    }
  }

  const LayerGradient& of_kernel() const { return gradient_; }

  // In the order and the dtypes of the schema.
  std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor>
  results(const LayerWeights& given) const {
    Tensor bias = bias_, gates = no_tensor(input_);
    if (gradient_.bias) bias = torch::stable::to(bias_, given.bias->scalar_type());
    if (gradient_.grouped.gates) {
      gates = torch::stable::empty(given.gates->sizes(), ScalarType::Double, std::nullopt,
                                   given.gates->device());
      const int64_t count = given.gates->size(0);
      for (int64_t i = 0; i < count; i++)
        gates.mutable_data_ptr<double>()[i] = gates_[i] + gates_[count + i] + gates_[2 * count + i];
      gates = torch::stable::to(gates, given.gates->scalar_type());
    }
    return {input_, first_, grouped_, last_, bias, gates};
  }

 private:
  LayerGradient gradient_{};
  Tensor input_, bias_;
  std::vector<Tensor> first_, grouped_, last_;
  std::vector<double> gates_;
};

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor>
bottleneck_backward(const Tensor& grad, const Tensor& input, const Tensor& inner,
                    const std::optional<Tensor>& output, const std::vector<Tensor>& pointwise_in,
                    const std::vector<Tensor>& grouped, const std::vector<Tensor>& pointwise_out,
                    const std::optional<Tensor>& bias, const Tensor& active,
                    const std::optional<Tensor>& gates, const Ints& stride, const Ints& padding,
                    const Ints& dilation, bool relu, const std::vector<bool>& needs) {
  const LayerWeights given{pointwise_in, grouped, pointwise_out, bias, active, gates};
  const LayerCall of(input, given, {stride, padding, dilation});
  const Call& call = of.call;
  auto is_like = [&](const Tensor& tensor, int64_t channels, int64_t height, int64_t width) {
    return tensor.is_cpu() && tensor.dim() == 4 && tensor.size(0) == call.geometry.images &&
           tensor.size(1) == channels && tensor.size(2) == height && tensor.size(3) == width &&
           tensor.scalar_type() == input.scalar_type();
  };
  auto is_output = [&](const Tensor& tensor) {
    return is_like(tensor, of.layer.out_channels, call.out_h, call.out_w);
  };
  STD_TORCH_CHECK(is_output(grad), "grad: accepted is the output's shape and dtype");
  STD_TORCH_CHECK(!relu || (output.has_value() && is_output(*output)),
                  "output: accepted with relu is the layer's output");
  STD_TORCH_CHECK(
      inner.numel() == 0 || is_like(inner, call.geometry.in_channels, input.size(2), input.size(3)),
      "inner: accepted is nothing, or what the layer returned");
  STD_TORCH_CHECK(
      needs.size() == 6,
      "needs: accepted are six flags: input, pointwise_in, grouped, pointwise_out, bias, gates");
  const bool some = grad.numel() > 0;
  const LayerGradients gradients(of, input, given, needs, some);
  if (some)
    kernels().layer_backward(call.type, {image_of(grad), image_of(input), of.layer,
                                         inner.numel() > 0 ? image_of(inner) : Image{},
                                         relu ? image_of(*output) : Image{}, gradients.of_kernel(),
                                         torch_threads(of.products(input))});
  return gradients.results(given);
}

// The weights as `bottleneck_packed` takes them, for activations of `like`'s dtype.
Tensor bottleneck_pack(const Tensor& like, const std::vector<Tensor>& pointwise_in,
                       const std::vector<Tensor>& grouped, const std::vector<Tensor>& pointwise_out,
                       const std::optional<Tensor>& bias, const Tensor& active,
                       const std::optional<Tensor>& gates) {
  STD_TORCH_CHECK(!grouped.empty() && grouped[0].dim() == 4 && !pointwise_in.empty() &&
                      pointwise_in[0].dim() == 4,
                  "pointwise_in, grouped: accepted are terms of four dimensions");
  // The smallest input that the kernel fits: packed weights do not depend on the geometry.
  const Ints size{0, pointwise_in[0].size(1), grouped[0].size(2), grouped[0].size(3)}, one{1, 1},
      zero{0, 0};
  const Tensor input = torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device());
  return pack(LayerCall(input, {pointwise_in, grouped, pointwise_out, bias, active, gates},
                        {one, zero, one}),
              like);
}

// What the steps are called, `text`, is for shapes while a graph is traced.
std::vector<Tensor> program_run(const std::vector<Tensor>& inputs, const Tensor& program,
                                const std::string&) {
  return ProgramRun(inputs, program).run();
}

}  // namespace

// The windows of a sum-pooling, as the schemas have them.
struct Windows {
  const Ints& window;  // of channels, rows, columns
  int64_t groups;
  Steps steps;

  void check(const Tensor& tensor, const char* name) const {
    const auto& [stride, padding, dilation] = steps;
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 4, name,
                    ": accepted is [N, C, H, W] on the CPU");
    STD_TORCH_CHECK(window.size() == 3 && stride.size() == 2 && padding.size() == 2 &&
                        dilation.size() == 2 && groups >= 1,
                    "window, groups, stride, padding, dilation: accepted are three numbers, at "
                    "least 1, and pairs");
    for (int64_t each : window) STD_TORCH_CHECK(each >= 1, "window: accepted is at least 1");
    for (int i = 0; i < 2; i++)
      STD_TORCH_CHECK(stride[i] >= 1 && padding[i] >= 0 && dilation[i] >= 1,
                      "stride, padding, dilation: accepted are at least 1, 0, 1");
  }
  // Of rows, or of columns; axis 0 or 1.
  int64_t reach(int axis) const { return (window[axis + 1] - 1) * steps.dilation[axis]; }
  int64_t pooled(int axis, int64_t size) const {
    const int64_t room = size + 2 * steps.padding[axis] - reach(axis) - 1;
    STD_TORCH_CHECK(room >= 0, "window: accepted is at most the padded input");
    return room / steps.stride[axis] + 1;
  }
  int64_t pooled_channels(int64_t channels) const {
    STD_TORCH_CHECK(channels % groups == 0 && channels / groups >= window[0],
                    "window: accepted is at most the channels of a group");
    return channels - groups * (window[0] - 1);
  }
};

Tensor sum_pool(const Tensor& input, const Ints& window, int64_t groups, const Ints& stride,
                const Ints& padding, const Ints& dilation) {
  const Windows windows{window, groups, {stride, padding, dilation}};
  windows.check(input, "input");
  Tensor output =
      empty_image(input.size(0), windows.pooled_channels(input.size(1)),
                  windows.pooled(0, input.size(2)), windows.pooled(1, input.size(3)), input);
  const auto axis = [&](int i) {
    return Axis{window[i + 1], dilation[i], stride[i], -padding[i], 1};
  };
  if (output.numel() > 0)
    kernels().sum_pool(
        type_of(input, "input"),
        {image_of(input), image_of(output), input.size(0), groups, Axis{window[0], 1, 1, 0, 1},
         axis(0), axis(1), torch_threads(per_number * input.numel())});
  return output;
}

// The gradient of an input whose channels, rows and columns are `size`: every number goes back to
// all that it is a sum of.
Tensor sum_pool_backward(const Tensor& grad, const Ints& size, const Ints& window, int64_t groups,
                         const Ints& stride, const Ints& padding, const Ints& dilation) {
  const Windows windows{window, groups, {stride, padding, dilation}};
  windows.check(grad, "grad");
  STD_TORCH_CHECK(size.size() == 3 && size[0] >= 1 && size[1] >= 0 && size[2] >= 0,
                  "size: accepted are channels, rows and columns");
  STD_TORCH_CHECK(grad.size(1) == windows.pooled_channels(size[0]) &&
                      grad.size(2) == windows.pooled(0, size[1]) &&
                      grad.size(3) == windows.pooled(1, size[2]),
                  "grad: accepted is the output's shape");
  Tensor result = empty_image(grad.size(0), size[0], size[1], size[2], grad);
  const auto axis = [&](int i) {
    return Axis{window[i + 1], dilation[i], 1, padding[i] - windows.reach(i), stride[i]};
  };
  if (result.numel() > 0)
    kernels().sum_pool(type_of(grad, "grad"),
                       {image_of(grad), image_of(result), grad.size(0), groups,
                        Axis{window[0], 1, 1, 1 - window[0], 1}, axis(0), axis(1),
                        torch_threads(per_number * result.numel())});
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(gross, CPU, m) {
  m.impl("program_pack", TORCH_BOX(&pack_program));
  m.impl("program_run", TORCH_BOX(&program_run));
  m.impl("series_conv2d", TORCH_BOX(&series_conv2d));
  m.impl("series_conv2d_backward", TORCH_BOX(&series_conv2d_backward));
  m.impl("series_sum", TORCH_BOX(&series_sum));
  m.impl("bottleneck", TORCH_BOX(&bottleneck));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
  m.impl("bottleneck_packed", TORCH_BOX(&bottleneck_packed));
  m.impl("bottleneck_pack", TORCH_BOX(&bottleneck_pack));
  m.impl("sum_pool", TORCH_BOX(&sum_pool));
  m.impl("sum_pool_backward", TORCH_BOX(&sum_pool_backward));
}

// For gross_kernels/environment.py: how the library was built, and the instruction set in use.
#define GROSS_EXPORT extern "C" __attribute__((visibility("default")))
GROSS_EXPORT const char* gross_cpu_build() {
  return "torch " TORCH_VERSION ", compiler " __VERSION__ ", flags " GROSS_BUILD_FLAGS;
}
GROSS_EXPORT const char* gross_cpu_isa() { return kernels().name; }
