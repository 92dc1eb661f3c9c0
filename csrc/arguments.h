// The operators' arguments, checked, in the kernels' words: the kernels start with trust.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "tensors.h"

namespace gross::cpu {

inline Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    default:
      STD_TORCH_CHECK(false, name, ": accepted dtypes are float32, float64, bfloat16 and float16");
  }
}

inline int active_of(const Tensor& active, size_t count) {
  STD_TORCH_CHECK(
      active.is_cpu() && active.numel() == 1 && active.scalar_type() == ScalarType::Long,
      "active: accepted is a 0-dimensional int64 tensor on the CPU");
  const int64_t value = *active.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(value >= 1 && value <= static_cast<int64_t>(count), "active: got ", value,
                  ", accepted is 1 to ", count);
  return static_cast<int>(value);
}

inline void read_gates(const std::optional<Tensor>& gates, size_t count, double* to) {
  for (size_t i = 0; i < count; i++) to[i] = 1;
  if (!gates.has_value()) return;
  STD_TORCH_CHECK(
      gates->is_cpu() && gates->dim() == 1 && gates->size(0) == static_cast<int64_t>(count),
      "gates: accepted is one per term, on the CPU");
  type_of(*gates, "gates");
  const Tensor wide = torch::stable::to(*gates, ScalarType::Double);
  for (size_t i = 0; i < count; i++) to[i] = wide.const_data_ptr<double>()[i * wide.stride(0)];
}

// The output's height and width; checks stride, padding, dilation, and that the kernel fits.
inline std::pair<int64_t, int64_t> output_size(const Tensor& input, const Geometry& g) {
  STD_TORCH_CHECK(g.stride_h >= 1 && g.stride_w >= 1 && g.padding_h >= 0 && g.padding_w >= 0 &&
                      g.dilation_h >= 1 && g.dilation_w >= 1,
                  "stride, padding, dilation: accepted are at least 1, 0, 1");
  const int64_t room_h = input.size(2) + 2 * g.padding_h - g.dilation_h * (g.kernel_h - 1) - 1;
  const int64_t room_w = input.size(3) + 2 * g.padding_w - g.dilation_w * (g.kernel_w - 1) - 1;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0,
                  "kernel_size: the dilated kernel is larger than the padded input");
  return {room_h / g.stride_h + 1, room_w / g.stride_w + 1};
}

// A series as the operators' schemas have it.
struct SeriesArguments {
  const std::vector<Tensor>& terms;
  const Tensor& active;
  const std::optional<Tensor>& gates;
};

// How a kernel moves over the image, as the schemas have it.
struct Steps {
  const Ints &stride, &padding, &dilation;
};

// A checked call: the terms made contiguous (they are small) and everything in the kernels' words.
// `in_channels` are those that the grouped convolution reads: the input's, or in a layer the first
// pointwise convolution's.
struct Call {
  std::vector<Tensor> terms;
  Series series{};
  Geometry geometry{};
  Type type;
  int64_t out_h, out_w;

  int64_t products() const {
    return geometry.images * out_h * out_w * geometry.out_channels * geometry.group_size *
           geometry.taps();
  }

  Call(const Tensor& input, int64_t in_channels, const SeriesArguments& given, const Steps& steps,
       const char* name = "terms")
      : type(type_of(input, "input")) {
    STD_TORCH_CHECK(!given.terms.empty() && given.terms.size() <= max_terms, name, ": got ",
                    given.terms.size(), ", accepted are 1 to ", max_terms);
    STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4,
                    "input: accepted is [N, C_in, H, W] on the CPU");
    const auto& [stride, padding, dilation] = steps;
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "stride, padding, dilation: accepted are pairs");
    series.active = active_of(given.active, given.terms.size());
    take_terms(given.terms, in_channels, name);
    read_gates(given.gates, given.terms.size(), series.gates);
    const Tensor& first = terms[0];
    geometry = {input.size(0), in_channels,   first.size(0), series.group_sizes[series.active - 1],
                first.size(2), first.size(3), stride[0],     stride[1],
                padding[0],    padding[1],    dilation[0],   dilation[1]};
    STD_TORCH_CHECK(geometry.kernel_h >= 1 && geometry.kernel_w >= 1, name,
                    ": accepted are kernels of at least 1×1");
    std::tie(out_h, out_w) = output_size(input, geometry);
  }

 private:
  // The terms of one type and shape up to their group sizes, each of which divides the next.
  void take_terms(const std::vector<Tensor>& given, int64_t in_channels, const char* name) {
    series.type = type_of(given[0], name);
    STD_TORCH_CHECK(series.type == type || (series.type == Type::float32 &&
                                            (type == Type::bfloat16 || type == Type::float16)),
                    name, ": accepted is the input's dtype, or float32 with a 16-bit input");
    const Tensor& first = given[0];
    STD_TORCH_CHECK(first.dim() == 4, name, ": accepted is [C_out, group size, kh, kw]");
    const int64_t out_channels = first.size(0);
    for (size_t i = 0; i < given.size(); i++) {
      const Tensor& term = given[i];
      STD_TORCH_CHECK(term.is_cpu() && term.dim() == 4 &&
                          term.scalar_type() == first.scalar_type() &&
                          term.size(0) == out_channels && term.size(2) == first.size(2) &&
                          term.size(3) == first.size(3),
                      name, "[", i, "]: accepted is the shape and dtype of ", name,
                      "[0] up to the group size, on the CPU");
      const int64_t s = term.size(1);
      STD_TORCH_CHECK(s >= 1 && in_channels % s == 0 && in_channels > 0 && out_channels > 0 &&
                          out_channels % (in_channels / s) == 0 &&
                          (i == 0 || (s > given[i - 1].size(1) && s % given[i - 1].size(1) == 0)),
                      name, "[", i, "]: group size ", s, " does not nest in ", in_channels, " → ",
                      out_channels, " channels");
      terms.push_back(compact(term));
      series.terms[i] = terms[i].data_ptr();
      series.group_sizes[i] = s;
    }
  }
};

inline ScalarType sum_type_of(Type type) {
  return type == Type::float64 ? ScalarType::Double : ScalarType::Float;
}

// The three convolutions of a layer together.
inline int64_t products_of(const Layer& layer, const Tensor& input, int64_t out_h, int64_t out_w) {
  const Geometry& g = layer.geometry;
  return g.images *
         (input.size(2) * input.size(3) * layer.in_channels * g.in_channels +
          out_h * out_w * g.out_channels * (g.group_size * g.taps() + layer.out_channels));
}

// A layer's weights as the operators' schemas have them.
struct LayerWeights {
  const std::vector<Tensor>&pointwise_in, &grouped, &pointwise_out;
  const std::optional<Tensor>& bias;
  const Tensor& active;
  const std::optional<Tensor>& gates;
};

// A checked layer: pointwise, grouped, pointwise.
struct LayerCall {
  Call call;
  std::vector<Tensor> pointwise;
  std::optional<Tensor> wide_bias;
  Layer layer{};

  LayerCall(const Tensor& input, const LayerWeights& given, const Steps& steps)
      : call(input, channels_of(given.pointwise_in, "pointwise_in"),
             {given.grouped, given.active, given.gates}, steps, "grouped") {
    layer.geometry = call.geometry;
    layer.in_channels = input.size(1);
    layer.out_channels = channels_of(given.pointwise_out, "pointwise_out");
    layer.grouped = call.series;
    STD_TORCH_CHECK(layer.in_channels > 0 && layer.out_channels > 0,
                    "input, pointwise_out: accepted is at least one channel");
    layer.pointwise_in = pointwise_series(given.pointwise_in, layer.geometry.in_channels,
                                          layer.in_channels, "pointwise_in");
    layer.pointwise_out = pointwise_series(given.pointwise_out, layer.out_channels,
                                           layer.geometry.out_channels, "pointwise_out");
    if (given.bias.has_value()) take_bias(*given.bias);
  }

  ScalarType sum_type() const { return sum_type_of(call.type); }

  int64_t products(const Tensor& input) const {
    return products_of(layer, input, call.out_h, call.out_w);
  }

 private:
  // One of the pointwise series: plain sums of [to, from, 1, 1].
  Series pointwise_series(const std::vector<Tensor>& given, int64_t to, int64_t from,
                          const char* name) {
    Series series = call.series;
    STD_TORCH_CHECK(given.size() == call.terms.size(), name, ": got ", given.size(),
                    " terms, accepted is one per grouped term, ", call.terms.size());
    for (size_t i = 0; i < given.size(); i++) {
      const Tensor& term = given[i];
      STD_TORCH_CHECK(term.is_cpu() && term.dim() == 4 &&
                          term.scalar_type() == call.terms[0].scalar_type() && term.size(0) == to &&
                          term.size(1) == from && term.size(2) == 1 && term.size(3) == 1,
                      name, "[", i, "]: accepted is [", to, ", ", from,
                      ", 1, 1] of the grouped terms' dtype, on the CPU");
      pointwise.push_back(compact(term));
      series.terms[i] = pointwise.back().data_ptr();
      series.group_sizes[i] = from;
    }
    return series;
  }

  void take_bias(const Tensor& bias) {
    STD_TORCH_CHECK(bias.is_cpu() && bias.dim() == 1 && bias.size(0) == layer.out_channels,
                    "bias: accepted is [", layer.out_channels, "] on the CPU");
    type_of(bias, "bias");
    wide_bias = bias.scalar_type() == sum_type() ? compact(bias)
                                                 : compact(torch::stable::to(bias, sum_type()));
    layer.bias = wide_bias->data_ptr();
  }

  static int64_t channels_of(const std::vector<Tensor>& series, const char* name) {
    STD_TORCH_CHECK(!series.empty() && series[0].dim() == 4, name,
                    ": accepted are terms of four dimensions");
    return series[0].size(0);
  }
};

}  // namespace gross::cpu
