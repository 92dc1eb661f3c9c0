// The operators' CPU implementations, registered through LibTorch's stable ABI: one build serves
// torch 2.10 and newer. Schemas, shapes for tracing and gradients are in gross_kernels/ops.py.
// Arguments are checked here, so that the kernels start with trust.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/includes.h"
#include "cpu/packed_header.h"

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
    default:
      STD_TORCH_CHECK(false, name, ": accepted dtypes are float32, float64, bfloat16 and float16");
  }
}

int active_of(const Tensor& active, size_t count) {
  STD_TORCH_CHECK(
      active.is_cpu() && active.numel() == 1 && active.scalar_type() == ScalarType::Long,
      "active: accepted is a 0-dimensional int64 tensor on the CPU");
  const int64_t value = *active.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(value >= 1 && value <= static_cast<int64_t>(count), "active: got ", value,
                  ", accepted is 1 to ", count);
  return static_cast<int>(value);
}

// The memory format of ATen's convolutions: channels-last when the strides say so, contiguous in
// every doubtful case.
bool is_channels_last(const Tensor& tensor) {
  int64_t least = 0;
  if (tensor.stride(1) == 0) return false;
  for (int d : {1, 3, 2, 0}) {
    if (tensor.size(d) == 0 || tensor.stride(d) < least || (d == 0 && least == tensor.stride(1)))
      return false;
    least = tensor.size(d) > 1 ? tensor.stride(d) * tensor.size(d) : tensor.stride(d);
  }
  return true;
}

Tensor empty_image(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  const Ints size{n, c, h, w};
  return torch::stable::empty(
      size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      is_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A contiguous tensor past the dispatcher, which takes 0.4 instead of 1.1 µs. Unlike
// torch::stable::empty it is not filled where torch fills memory for debugging, so it is for
// tensors that are written whole.
Tensor quick_tensor(const std::vector<int64_t>& size, ScalarType type) {
  std::vector<int64_t> stride(size.size(), 1);
  for (size_t d = size.size() - 1; d > 0; d--) stride[d - 1] = stride[d] * size[d];
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      size.size(), size.data(), stride.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// What stands for a tensor that is not asked for.
Tensor no_tensor(const Tensor& like) { return quick_tensor({0}, like.scalar_type()); }

Image image_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.size(1),   tensor.size(2),   tensor.size(3),
          tensor.stride(0),  tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

void read_gates(const std::optional<Tensor>& gates, size_t count, double* to) {
  for (size_t i = 0; i < count; i++) to[i] = 1;
  if (!gates.has_value()) return;
  STD_TORCH_CHECK(
      gates->is_cpu() && gates->dim() == 1 && gates->size(0) == static_cast<int64_t>(count),
      "gates: accepted is one per term, on the CPU");
  type_of(*gates, "gates");
  const Tensor wide = torch::stable::to(*gates, ScalarType::Double);
  for (size_t i = 0; i < count; i++) to[i] = wide.const_data_ptr<double>()[i * wide.stride(0)];
}

// Multiply–accumulates from which on work is shared: they take 8 µs. On two idle cores a second
// thread makes a layer of 0.17 million 6.5 instead of 5.8 µs, one of 0.67 million 8.7 instead
// of 10.1 µs; where the other core is busy or asleep it costs more.
constexpr int64_t worth_sharing = 1 << 19;
// A number that is summed, packed or copied takes as long as so many.
constexpr int64_t per_number = 16;

// Torch's threads, or the calling one alone where the work is too little to share.
Threads torch_threads(int64_t products) {
  if (products < worth_sharing)
    return {1, [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
              if (count > 0) body(context, 0, count);
            }};
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
            if (count > 0)
              torch::stable::parallel_for(
                  0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

// Rows `begin` to `end` of a term into contiguous memory.
template <class Number>
void copy_rows(const Image& from, void* to, int64_t begin, int64_t end) {
  const int64_t taps = from.height * from.width;
  for (int64_t row = begin; row < end; row++)
    for (int64_t h = 0; h < from.height; h++)
      for (int64_t w = 0; w < from.width; w++) {
        const Number* const read = static_cast<const Number*>(from.data) + row * from.stride_n +
                                   h * from.stride_h + w * from.stride_w;
        Number* const write =
            static_cast<Number*>(to) + row * from.channels * taps + h * from.width + w;
        for (int64_t c = 0; c < from.channels; c++) write[c * taps] = read[c * from.stride_c];
      }
}

// A term as the kernels read it: itself where it is contiguous. The terms of a channels-last layer
// are not, and torch::stable::contiguous takes 2.5 µs for each of the smallest.
Tensor compact(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  if (tensor.dim() != 4) return torch::stable::contiguous(tensor);
  const Tensor made = quick_tensor({tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)},
                                   tensor.scalar_type());
  const Image from = image_of(tensor);
  const auto rows = tensor.element_size() == 2   ? copy_rows<uint16_t>
                    : tensor.element_size() == 4 ? copy_rows<uint32_t>
                                                 : copy_rows<uint64_t>;
  auto copy = [&](int64_t begin, int64_t end) { rows(from, made.data_ptr(), begin, end); };
  run(torch_threads(per_number * tensor.numel()), tensor.size(0), copy);
  return made;
}

// The output's height and width; checks stride, padding, dilation, and that the kernel fits.
std::pair<int64_t, int64_t> output_size(const Tensor& input, const Geometry& g) {
  STD_TORCH_CHECK(g.stride_h >= 1 && g.stride_w >= 1 && g.padding_h >= 0 && g.padding_w >= 0 &&
                      g.dilation_h >= 1 && g.dilation_w >= 1,
                  "stride, padding, dilation: accepted are at least 1, 0, 1");
  const int64_t room_h = input.size(2) + 2 * g.padding_h - g.dilation_h * (g.kernel_h - 1) - 1;
  const int64_t room_w = input.size(3) + 2 * g.padding_w - g.dilation_w * (g.kernel_w - 1) - 1;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0,
                  "kernel_size: the dilated kernel is larger than the padded input");
  return {room_h / g.stride_h + 1, room_w / g.stride_w + 1};
}

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

  Call(const Tensor& input, int64_t in_channels, const std::vector<Tensor>& given,
       const Tensor& active, const std::optional<Tensor>& gates, const Ints& stride,
       const Ints& padding, const Ints& dilation, const char* name = "terms")
      : type(type_of(input, "input")) {
    STD_TORCH_CHECK(!given.empty() && given.size() <= max_terms, name, ": got ", given.size(),
                    ", accepted are 1 to ", max_terms);
    STD_TORCH_CHECK(input.is_cpu() && input.dim() == 4,
                    "input: accepted is [N, C_in, H, W] on the CPU");
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "stride, padding, dilation: accepted are pairs");
    series.active = active_of(active, given.size());
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
    read_gates(gates, given.size(), series.gates);
    geometry = {input.size(0), in_channels,   out_channels, series.group_sizes[series.active - 1],
                first.size(2), first.size(3), stride[0],    stride[1],
                padding[0],    padding[1],    dilation[0],  dilation[1]};
    STD_TORCH_CHECK(geometry.kernel_h >= 1 && geometry.kernel_w >= 1, name,
                    ": accepted are kernels of at least 1×1");
    std::tie(out_h, out_w) = output_size(input, geometry);
  }
};

Tensor series_conv2d(const Tensor& input, const std::vector<Tensor>& terms, const Tensor& active,
                     const std::optional<Tensor>& gates, const Ints& stride, const Ints& padding,
                     const Ints& dilation) {
  const Call call(input, input.size(1), terms, active, gates, stride, padding, dilation);
  Tensor output =
      empty_image(input.size(0), call.geometry.out_channels, call.out_h, call.out_w, input);
  if (output.numel() > 0)
    kernels().forward(call.type, image_of(input), call.series, image_of(output), call.geometry,
                      torch_threads(call.products()));
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
  const Call call(input, input.size(1), terms, active, gates, stride, padding, dilation);
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
      kernels().input_grad(call.type, image_of(grad), call.series, image_of(grad_input), g,
                           torch_threads(call.products()));
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
    kernels().weight_grad(call.type, image_of(grad), image_of(input), call.series, gradient, g,
                          torch_threads(call.products()));
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

// One of a layer's pointwise series: plain sums of [to, from, 1, 1].
Series pointwise_series(const std::vector<Tensor>& given, const Call& call, int64_t to,
                        int64_t from, const char* name, std::vector<Tensor>& kept) {
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
    kept.push_back(compact(term));
    series.terms[i] = kept.back().data_ptr();
    series.group_sizes[i] = from;
  }
  return series;
}

ScalarType sum_type_of(Type type) {
  return type == Type::float64 ? ScalarType::Double : ScalarType::Float;
}

// Packed weights begin with a header; it takes as many numbers as this.
int64_t header_numbers(ScalarType sum_type) {
  return sizeof(PackedHeader) / (sum_type == ScalarType::Double ? sizeof(double) : sizeof(float));
}
void* weights_of(const Tensor& packed) {
  return static_cast<char*>(packed.data_ptr()) + sizeof(PackedHeader);
}

// The three convolutions of a layer together.
int64_t products_of(const Layer& layer, const Tensor& input, int64_t out_h, int64_t out_w) {
  const Geometry& g = layer.geometry;
  return g.images *
         (input.size(2) * input.size(3) * layer.in_channels * g.in_channels +
          out_h * out_w * g.out_channels * (g.group_size * g.taps() + layer.out_channels));
}

// A checked layer: pointwise, grouped, pointwise.
struct LayerCall {
  Call call;
  std::vector<Tensor> pointwise;
  std::optional<Tensor> wide_bias;
  Layer layer{};

  LayerCall(const Tensor& input, const std::vector<Tensor>& pointwise_in,
            const std::vector<Tensor>& grouped, const std::vector<Tensor>& pointwise_out,
            const std::optional<Tensor>& bias, const Tensor& active,
            const std::optional<Tensor>& gates, const Ints& stride, const Ints& padding,
            const Ints& dilation, bool relu)
      : call(input, channels_of(pointwise_in, "pointwise_in"), grouped, active, gates, stride,
             padding, dilation, "grouped") {
    layer.geometry = call.geometry;
    layer.in_channels = input.size(1);
    layer.out_channels = channels_of(pointwise_out, "pointwise_out");
    layer.relu = relu;
    layer.grouped = call.series;
    STD_TORCH_CHECK(layer.in_channels > 0 && layer.out_channels > 0,
                    "input, pointwise_out: accepted is at least one channel");
    layer.pointwise_in = pointwise_series(pointwise_in, call, layer.geometry.in_channels,
                                          layer.in_channels, "pointwise_in", pointwise);
    layer.pointwise_out = pointwise_series(pointwise_out, call, layer.out_channels,
                                           layer.geometry.out_channels, "pointwise_out", pointwise);
    if (bias.has_value()) {
      STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == layer.out_channels,
                      "bias: accepted is [", layer.out_channels, "] on the CPU");
      type_of(*bias, "bias");
      wide_bias = bias->scalar_type() == sum_type() ? compact(*bias)
                                                    : compact(torch::stable::to(*bias, sum_type()));
      layer.bias = wide_bias->data_ptr();
    }
  }

  ScalarType sum_type() const { return sum_type_of(call.type); }

  int64_t products(const Tensor& input) const {
    return products_of(layer, input, call.out_h, call.out_w);
  }

  // The weights in the kernel's order, behind a header.
  Tensor pack(const Tensor& like) const {
    const int64_t numbers = kernels().packed_size(call.type, layer);
    const Ints size{header_numbers(sum_type()) + numbers};
    Tensor packed = torch::stable::empty(size, sum_type(), std::nullopt, like.device());
    const PackedHeader header(call.type, layer, kernels().vector_bytes);
    std::memcpy(packed.data_ptr(), &header, sizeof header);
    kernels().pack(call.type, layer, weights_of(packed),
                   torch_threads(per_number * numbers * call.series.active));
    return packed;
  }

 private:
  static int64_t channels_of(const std::vector<Tensor>& series, const char* name) {
    STD_TORCH_CHECK(!series.empty() && series[0].dim() == 4, name,
                    ": accepted are terms of four dimensions");
    return series[0].size(0);
  }
};

std::tuple<Tensor, Tensor> bottleneck(const Tensor& input, const std::vector<Tensor>& pointwise_in,
                                      const std::vector<Tensor>& grouped,
                                      const std::vector<Tensor>& pointwise_out,
                                      const std::optional<Tensor>& bias, const Tensor& active,
                                      const std::optional<Tensor>& gates, const Ints& stride,
                                      const Ints& padding, const Ints& dilation, bool relu,
                                      bool keep_inner) {
  const LayerCall of(input, pointwise_in, grouped, pointwise_out, bias, active, gates, stride,
                     padding, dilation, relu);
  const Geometry& g = of.call.geometry;
  Tensor output = empty_image(g.images, of.layer.out_channels, of.call.out_h, of.call.out_w, input);
  Tensor inner = keep_inner
                     ? empty_image(g.images, g.in_channels, input.size(2), input.size(3), input)
                     : no_tensor(input);
  if (output.numel() > 0)
    kernels().layer(of.call.type, image_of(input), of.layer, weights_of(of.pack(input)),
                    keep_inner ? image_of(inner) : Image{}, image_of(output),
                    torch_threads(of.products(input)));
  return {output, inner};
}

const char* name_of(int32_t type) {
  switch (static_cast<Type>(type)) {
    case Type::float32: return "float32";
    case Type::float64: return "float64";
    case Type::bfloat16: return "bfloat16";
    case Type::float16: return "float16";
  }
  return "an unknown dtype";
}

std::string described(const PackedHeader& header) {
  auto text = [](int64_t number) { return std::to_string(number); };
  return text(header.in_channels) + " → " + text(header.width_in) + " → " + text(header.width_out) +
         " → " + text(header.out_channels) + " channels, group size " + text(header.group_size) +
         ", kernel " + text(header.kernel_h) + "×" + text(header.kernel_w) + ", " +
         name_of(header.type) + " activations, vectors of " + text(header.vector_bytes) + " bytes";
}

// Refuses what `bottleneck_pack` did not make for this layer, type and processor.
void check_packed(const Tensor& packed, Type type, const Layer& layer) {
  constexpr const char* accepted = ", accepted is what bottleneck_pack made";
  const ScalarType sum_type = sum_type_of(type);
  STD_TORCH_CHECK(packed.is_cpu() && packed.dim() == 1, "packed: got ", packed.dim(),
                  " dimensions on ", packed.is_cpu() ? "the CPU" : "another device", accepted,
                  ": one dimension on the CPU");
  STD_TORCH_CHECK(packed.scalar_type() == sum_type && packed.stride(0) == 1,
                  "packed: got another dtype or a stride", accepted, " for ",
                  name_of(static_cast<int32_t>(type)), " activations: contiguous ",
                  sum_type == ScalarType::Double ? "float64" : "float32");
  const int64_t size = header_numbers(sum_type) + kernels().packed_size(type, layer);
  const PackedHeader wanted(type, layer, kernels().vector_bytes);
  PackedHeader got;
  if (packed.size(0) >= header_numbers(sum_type))
    std::memcpy(&got, packed.data_ptr(), sizeof got);
  else
    got.magic[0] = 0;
  if (got == wanted && packed.size(0) == size) return;
  STD_TORCH_CHECK(!std::memcmp(got.magic, wanted.magic, sizeof got.magic),
                  "packed: got numbers without the header of packed weights", accepted);
  STD_TORCH_CHECK(got.version == wanted.version, "packed: got an order of version ", got.version,
                  accepted, " in version ", wanted.version);
  STD_TORCH_CHECK(got == wanted, "packed: got weights for ", described(got), accepted, " for ",
                  described(wanted), " (", kernels().name, ")");
  STD_TORCH_CHECK(false, "packed: got ", packed.size(0), " numbers", accepted, ": ", size);
}

// The layer from what `bottleneck_pack` made. All numbers that the kernel needs besides are in one
// list, `shape`: every list of a schema takes 0.4 µs. They are width_in, width_out, group size,
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
  layer.relu = relu;
  const auto [out_h, out_w] = output_size(input, g);
  check_packed(packed, type, layer);
  Tensor output = empty_image(g.images, layer.out_channels, out_h, out_w, input);
  if (output.numel() > 0)
    kernels().layer(type, image_of(input), layer, weights_of(packed), Image{}, image_of(output),
                    torch_threads(products_of(layer, input, out_h, out_w)));
  return output;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor>
bottleneck_backward(const Tensor& grad, const Tensor& input, const Tensor& inner,
                    const std::optional<Tensor>& output, const std::vector<Tensor>& pointwise_in,
                    const std::vector<Tensor>& grouped, const std::vector<Tensor>& pointwise_out,
                    const std::optional<Tensor>& bias, const Tensor& active,
                    const std::optional<Tensor>& gates, const Ints& stride, const Ints& padding,
                    const Ints& dilation, bool relu, const std::vector<bool>& needs) {
  const LayerCall of(input, pointwise_in, grouped, pointwise_out, bias, active, gates, stride,
                     padding, dilation, relu);
  const Geometry& g = of.call.geometry;
  auto is_output = [&](const Tensor& tensor) {
    return tensor.is_cpu() && tensor.dim() == 4 && tensor.size(0) == g.images &&
           tensor.size(1) == of.layer.out_channels && tensor.size(2) == of.call.out_h &&
           tensor.size(3) == of.call.out_w && tensor.scalar_type() == input.scalar_type();
  };
  STD_TORCH_CHECK(is_output(grad), "grad: accepted is the output's shape and dtype");
  STD_TORCH_CHECK(!relu || (output.has_value() && is_output(*output)),
                  "output: accepted with relu is the layer's output");
  STD_TORCH_CHECK(
      inner.numel() == 0 ||
          (inner.is_cpu() && inner.dim() == 4 && inner.size(0) == g.images &&
           inner.size(1) == g.in_channels && inner.size(2) == input.size(2) &&
           inner.size(3) == input.size(3) && inner.scalar_type() == input.scalar_type()),
      "inner: accepted is nothing, or what the layer returned");
  STD_TORCH_CHECK(
      needs.size() == 6,
      "needs: accepted are six flags: input, pointwise_in, grouped, pointwise_out, bias, gates");
  const bool some = grad.numel() > 0;

  LayerGradient gradient{};
  Tensor grad_input = no_tensor(input), grad_bias = no_tensor(input), grad_gates = no_tensor(input),
         wide_gates;
  if (needs[0]) {
    grad_input = empty_image(g.images, input.size(1), input.size(2), input.size(3), input);
    gradient.input = image_of(grad_input);
  }
  std::vector<Tensor> grads_in, grads_grouped, grads_out;
  gradient.pointwise_in =
      empty_gradient(of.layer.pointwise_in, pointwise_in, needs[1], some, grads_in);
  gradient.grouped = empty_gradient(of.layer.grouped, grouped, needs[2], some, grads_grouped);
  gradient.pointwise_out =
      empty_gradient(of.layer.pointwise_out, pointwise_out, needs[3], some, grads_out);
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
    kernels().layer_backward(of.call.type, image_of(grad), image_of(input), of.layer,
                             inner.numel() > 0 ? image_of(inner) : Image{},
                             relu ? image_of(*output) : Image{}, gradient,
                             torch_threads(of.products(input)));
  if (gradient.bias) grad_bias = torch::stable::to(grad_bias, bias->scalar_type());
  if (gradient.grouped.gates) {
    grad_gates =
        torch::stable::empty(gates->sizes(), ScalarType::Double, std::nullopt, gates->device());
    double* const to = grad_gates.mutable_data_ptr<double>();
    const double* const from = wide_gates.const_data_ptr<double>();
    const int64_t count = gates->size(0);
    for (int64_t i = 0; i < count; i++) to[i] = from[i] + from[count + i] + from[2 * count + i];
    grad_gates = torch::stable::to(grad_gates, gates->scalar_type());
  }
  return {grad_input, grads_in, grads_grouped, grads_out, grad_bias, grad_gates};
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
  return LayerCall(input, pointwise_in, grouped, pointwise_out, bias, active, gates, one, zero, one,
                   false)
      .pack(like);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gross, CPU, m) {
  m.impl("series_conv2d", TORCH_BOX(&series_conv2d));
  m.impl("series_conv2d_backward", TORCH_BOX(&series_conv2d_backward));
  m.impl("series_sum", TORCH_BOX(&series_sum));
  m.impl("bottleneck", TORCH_BOX(&bottleneck));
  m.impl("bottleneck_backward", TORCH_BOX(&bottleneck_backward));
  m.impl("bottleneck_packed", TORCH_BOX(&bottleneck_packed));
  m.impl("bottleneck_pack", TORCH_BOX(&bottleneck_pack));
}

// For gross_kernels/environment.py: how the library was built, and the instruction set in use.
#define GROSS_EXPORT extern "C" __attribute__((visibility("default")))
GROSS_EXPORT const char* gross_cpu_build() {
  return "torch " TORCH_VERSION ", compiler " __VERSION__ ", flags " GROSS_BUILD_FLAGS;
}
GROSS_EXPORT const char* gross_cpu_isa() { return kernels().name; }
