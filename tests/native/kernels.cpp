// The CPU kernels against plain loops in double precision, over random geometries, on buffers of
// exactly the needed size: run under AddressSanitizer and UndefinedBehaviorSanitizer by `make
// sanitize`. What it would catch: a read or write outside a tensor, any wrong value, and memory
// that is read before it is written (GROSS_POISON makes it NaN). Every instruction set takes the
// same cases; one that the processor has and that is not run is a failure.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/call.h"
#include "../../csrc/cpu/plan.h"
#include "../../csrc/series.h"

using namespace gross::cpu;

namespace {

std::mt19937 generator;
const Kernels* kernels_of_set = nullptr;  // the set under test
const Kernels& tested() { return *kernels_of_set; }

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

int64_t size_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

// A tensor of exactly as many bytes as its elements have; values go in and out as doubles.
struct Tensor {
  int64_t n, c, h, w;
  bool channels_last;
  Type type;
  std::unique_ptr<char[]> memory;

  // Numbers are multiples of 1/steps up to 1, or NaN for steps = 0: memory that the kernels have to
  // write.
  Tensor(int64_t n, int64_t c, int64_t h, int64_t w, bool channels_last, Type type, int steps)
      : n(n),
        c(c),
        h(h),
        w(w),
        channels_last(channels_last),
        type(type),
        memory(new char[n * c * h * w * size_of(type)]) {
    for (int64_t i = 0; i < n * c * h * w; i++)
      put(i, steps ? static_cast<double>(pick(-steps, steps)) / steps : NAN);
  }
  void put(int64_t i, double value) {
    const float narrow = static_cast<float>(value);
    if (type == Type::float64)
      std::memcpy(memory.get() + 8 * i, &value, 8);
    else if (type == Type::float32)
      std::memcpy(memory.get() + 4 * i, &narrow, 4);
    else  // bfloat16: the upper half of a float32, exact for the eighths drawn here
      std::memcpy(memory.get() + 2 * i, reinterpret_cast<const char*>(&narrow) + 2, 2);
  }
  double at(int64_t i) const {
    double value = 0;
    float narrow = 0;
    if (type == Type::float64) {
      std::memcpy(&value, memory.get() + 8 * i, 8);
      return value;
    }
    if (type == Type::float32)
      std::memcpy(&narrow, memory.get() + 4 * i, 4);
    else
      std::memcpy(reinterpret_cast<char*>(&narrow) + 2, memory.get() + 2 * i, 2);
    return narrow;
  }
  int64_t index(int64_t in, int64_t ic, int64_t ih, int64_t iw) const {
    return channels_last ? ((in * h + ih) * w + iw) * c + ic : ((in * c + ic) * h + ih) * w + iw;
  }
  Image image() const {
    return channels_last ? Image{memory.get(), c, h, w, h * w * c, 1, w * c, c}
                         : Image{memory.get(), c, h, w, h * w * c, h * w, w, 1};
  }
};

const Threads two_threads{2,
                          [](int64_t count, void (*body)(void*, int64_t, int64_t), void* context) {
                            std::thread other([&] { body(context, 0, count / 2); });
                            body(context, count / 2, count);
                            other.join();
                          }};

double worst = 0;  // of the errors in units of what is allowed

// Sums of eighths are exact in float32 and float64; bfloat16 rounds weights and results to 8 bits.
void compare(Type type, const char* what, double got, double expected, const std::string& where) {
  const double error = std::abs(got - expected) / (1 + std::abs(expected)) /
                       (type == Type::bfloat16 ? 0x1p-7 : 1e-6);
  worst = std::max(worst, error);
  if (!(error < 1)) {
    std::printf("%s, %s: got %g, expected %g, for %s\n", tested().name, what, got, expected,
                where.c_str());
    std::exit(1);
  }
}

struct Case {
  Geometry g{};
  int64_t smallest, growth, h, w, out_h, out_w;
  Type type;
  std::string where;
};

// A random geometry; false where the kernel does not fit the input.
bool draw(Case& c) {
  Geometry& g = c.g;
  c.smallest = pick(1, 4), c.growth = pick(1, pick(0, 3) ? 4 : 10);
  const int64_t groups = pick(1, pick(0, 3) ? 5 : 40 / c.growth);
  g.group_size = c.smallest * c.growth;
  g.in_channels = g.group_size * groups;
  g.out_channels = groups * c.growth * (pick(0, 2) ? c.smallest : pick(1, 3));
  g.images = pick(1, 5);
  g.kernel_h = pick(1, 4), g.kernel_w = pick(1, 4);
  g.stride_h = pick(1, 3), g.stride_w = pick(1, 3);
  g.padding_h = pick(0, 4), g.padding_w = pick(0, 4);
  g.dilation_h = pick(1, 3), g.dilation_w = pick(1, 3);
  c.h = pick(1, 18), c.w = pick(1, 18);
  // Every fourth is one whose pixels can be read in place: a source channel for each lane, several
  // within 16 bytes, several over all of a vector, or one for all lanes.
  if (!pick(0, 3)) {
    c.growth = 1 << pick(0, 5), c.smallest = c.growth > 4 ? 1 : pick(1, 2);
    g.group_size = c.smallest * c.growth;
    g.in_channels = g.out_channels = std::max<int64_t>(16, g.group_size) * pick(1, 3);
    if (g.group_size > 8) g.images = pick(1, 2);
    g.kernel_h = pick(0, 3) ? 3 : pick(1, 7), g.kernel_w = 3;
    g.stride_h = pick(1, 2), g.stride_w = pick(1, 2);
    g.padding_h = g.kernel_h / 2, g.padding_w = g.dilation_h = g.dilation_w = 1;
  } else if (!pick(0, 3)) {  // Every fifth has more vectors of channels than are worked on at once.
    c.growth = pick(1, 2), c.smallest = 1 << pick(0, 2);
    g.group_size = c.smallest * c.growth;
    g.in_channels = g.group_size * (pick(96, 176) / g.group_size);
    g.out_channels = g.in_channels / (pick(0, 2) ? 1 : g.group_size) * (pick(0, 2) ? 1 : c.growth);
    if (g.out_channels % (g.in_channels / c.smallest)) g.out_channels = g.in_channels;
    g.images = pick(1, 2), c.h = pick(1, 6), c.w = pick(1, 8);
  }
  const int64_t room_h = c.h + 2 * g.padding_h - g.dilation_h * (g.kernel_h - 1) - 1;
  const int64_t room_w = c.w + 2 * g.padding_w - g.dilation_w * (g.kernel_w - 1) - 1;
  c.out_h = room_h / g.stride_h + 1, c.out_w = room_w / g.stride_w + 1;
  c.type = std::vector{Type::float32, Type::float64, Type::bfloat16}[pick(0, 2)];
  c.where = std::to_string(g.in_channels) + "→" + std::to_string(g.out_channels) +
            " s=" + std::to_string(g.group_size) + " kernel " + std::to_string(g.kernel_h) + "×" +
            std::to_string(g.kernel_w) + " stride " + std::to_string(g.stride_h) + "×" +
            std::to_string(g.stride_w) + " padding " + std::to_string(g.padding_h) + "×" +
            std::to_string(g.padding_w) + " dilation " + std::to_string(g.dilation_h) + "×" +
            std::to_string(g.dilation_w) + " input " + std::to_string(g.images) + "×" +
            std::to_string(c.h) + "×" + std::to_string(c.w);
  return room_h >= 0 && room_w >= 0;
}

// What follows a sum, drawn: bias, activation, a residual before or after it.
struct Ending {
  Tensor bias, slopes, residual;
  const bool has_bias = pick(0, 1), has_residual = pick(0, 2);
  const Activation activation = static_cast<Activation>(pick(0, 4));
  const bool residual_last = pick(0, 1);

  Ending(int64_t n, int64_t c, int64_t h, int64_t w, Type type)
      : bias(1, c, 1, 1, false, type == Type::float64 ? type : Type::float32, 2),
        slopes(1, c, 1, 1, false, type == Type::float64 ? type : Type::float32, 2),
        residual(n, c, h, w, pick(0, 1), type, 2) {}

  const void* bias_data() const { return has_bias ? bias.memory.get() : nullptr; }

  // `sum` with its bias, if that is not in it yet.
  double of(double sum, int64_t n, int64_t o, int64_t y, int64_t x) const {
    const double other = has_residual ? residual.at(residual.index(n, o, y, x)) : 0;
    double value = residual_last ? sum : sum + other;
    if (activation == Activation::relu) value = std::max(value, 0.0);
    if (activation == Activation::relu6) value = std::min(std::max(value, 0.0), 6.0);
    if (activation == Activation::prelu && value < 0) value *= slopes.at(o);
    if (activation == Activation::silu) value /= 1 + std::exp(-value);
    return residual_last ? value + other : value;
  }
};

// A convolution from packed weights and its ending, of the plain sums; windows of its input.
void finished_case(const Case& c, const Series& series, const Tensor& input, const Tensor& layout,
                   const std::vector<double>& sums) {
  const Geometry& g = c.g;
  const Ending ending(g.images, g.out_channels, c.out_h, c.out_w, c.type);
  Tensor output(g.images, g.out_channels, c.out_h, c.out_w, pick(0, 1), c.type, 0);
  const int64_t wide = c.type == Type::float64 ? 8 : 4;
  std::vector<char> packed(tested().packed_kernel_size(c.type, g) * wide);
  tested().pack_kernel(c.type, {series, g, ending.bias_data(), ending.slopes.memory.get()},
                       packed.data(), two_threads);
  const Image residual = ending.residual.image();
  const Finish finish{ending.activation, ending.has_residual ? &residual : nullptr,
                      ending.residual_last};
  tested().convolve_packed(c.type,
                           {input.image(), packed.data(), output.image(), g, finish, two_threads});
  const bool mean = pick(0, 1);
  Tensor pooled(g.images, g.in_channels, c.out_h, c.out_w, pick(0, 1), c.type, 0);
  tested().pool(c.type, {input.image(), pooled.image(), g, mean, Finish{}, two_threads});
  for (int64_t n = 0; n < g.images; n++)
    for (int64_t y = 0; y < c.out_h; y++)
      for (int64_t x = 0; x < c.out_w; x++) {
        for (int64_t o = 0; o < g.out_channels; o++) {
          const double sum =
              sums[layout.index(n, o, y, x)] + (ending.has_bias ? ending.bias.at(o) : 0);
          compare(c.type, "finished output", output.at(output.index(n, o, y, x)),
                  ending.of(sum, n, o, y, x), c.where);
        }
        for (int64_t j = 0; j < g.in_channels; j++) {
          double most = -INFINITY, total = 0;
          for (int64_t ky = 0; ky < g.kernel_h; ky++)
            for (int64_t kx = 0; kx < g.kernel_w; kx++) {
              const int64_t iy = y * g.stride_h + ky * g.dilation_h - g.padding_h,
                            ix = x * g.stride_w + kx * g.dilation_w - g.padding_w;
              if (iy < 0 || iy >= c.h || ix < 0 || ix >= c.w) continue;
              const double value = input.at(input.index(n, j, iy, ix));
              most = std::max(most, value), total += value;
            }
          // A window that lies in the padding alone has no largest number.
          if (mean || most > -INFINITY)
            compare(c.type, "pooled", pooled.at(pooled.index(n, j, y, x)),
                    mean ? total / g.taps() : most, c.where);
        }
      }
}

// A layer and its gradients against pointwise, grouped and pointwise convolution one after the
// other, with and without keeping the first one's output.
void layer_case() {
  Case c;
  if (!draw(c)) return;
  const Geometry& g = c.g;
  const Type type = c.type, wide = type == Type::float64 ? type : Type::float32;
  Layer layer{};
  layer.geometry = g;
  // Wide layers of one small image are those whose channels, not rows, the threads share.
  const int64_t widest = c.h * c.w > 64 || pick(0, 3) ? 40 : 200;
  layer.in_channels = pick(1, widest), layer.out_channels = pick(1, widest);
  const bool relu = pick(0, 1);
  const std::string where = std::to_string(layer.in_channels) + "→(" + c.where + ")→" +
                            std::to_string(layer.out_channels);
  struct Weight {
    Tensor value, grad;
    double share = NAN;

    Weight(int64_t to, int64_t from, int64_t kh, int64_t kw, Type type)
        : value(to, from, kh, kw, false, type, 2), grad(to, from, kh, kw, false, type, 0) {}
  };
  Weight first(g.in_channels, layer.in_channels, 1, 1, type),
      middle(g.out_channels, g.group_size, g.kernel_h, g.kernel_w, type),
      last(layer.out_channels, g.out_channels, 1, 1, type);
  Tensor bias(1, layer.out_channels, 1, 1, false, wide, 2),
      grad_bias(1, layer.out_channels, 1, 1, false, wide, 0);
  const double gate = pick(1, 2);
  auto series = [&](const Weight& weight) {
    Series of{};
    of.active = 1, of.type = type, of.terms[0] = weight.value.memory.get(),
    of.group_sizes[0] = weight.value.c, of.gates[0] = gate;
    return of;
  };
  layer.pointwise_in = series(first), layer.grouped = series(middle),
  layer.pointwise_out = series(last);
  if (pick(0, 1)) layer.bias = bias.memory.get();
  Tensor input(g.images, layer.in_channels, c.h, c.w, pick(0, 1), type, 2),
      output(g.images, layer.out_channels, c.out_h, c.out_w, pick(0, 1), type, 0),
      inner(g.images, g.in_channels, c.h, c.w, pick(0, 1), type, 0),
      grad(g.images, layer.out_channels, c.out_h, c.out_w, pick(0, 1), type, 2),
      grad_input(g.images, layer.in_channels, c.h, c.w, pick(0, 1), type, 0);
  const bool keep = pick(0, 1);
  // The packed weights are whole vectors: aligned, but of exactly the size that the kernels ask
  // for.
  const Ending ending(g.images, layer.out_channels, c.out_h, c.out_w, type);
  layer.slopes = ending.slopes.memory.get();
  std::vector<char> packed(tested().packed_size(type, layer) * size_of(wide));
  tested().pack(type, layer, packed.data(), two_threads);
  tested().layer(type, {input.image(),
                        layer,
                        packed.data(),
                        keep ? inner.image() : Image{},
                        output.image(),
                        {relu ? Activation::relu : Activation::none},
                        two_threads});
  Tensor finished(g.images, layer.out_channels, c.out_h, c.out_w, pick(0, 1), type, 0);
  const Image residual = ending.residual.image();
  const Finish finish{ending.activation, ending.has_residual ? &residual : nullptr,
                      ending.residual_last};
  tested().layer(
      type, {input.image(), layer, packed.data(), Image{}, finished.image(), finish, two_threads});

  const bool for_input = pick(0, 3), for_first = pick(0, 3), for_middle = pick(0, 3),
             for_last = pick(0, 3), for_bias = pick(0, 1), for_gates = pick(0, 1);
  LayerGradient gradient{};
  if (for_input) gradient.input = grad_input.image();
  if (for_bias) gradient.bias = grad_bias.memory.get();
  auto wants = [&](SeriesGradient& of, Weight& weight, bool wanted) {
    if (wanted) of.terms[0] = weight.grad.memory.get();
    if (for_gates) of.gates = &weight.share;
  };
  wants(gradient.pointwise_in, first, for_first), wants(gradient.grouped, middle, for_middle),
      wants(gradient.pointwise_out, last, for_last);
  tested().layer_backward(type, {grad.image(), input.image(), layer, keep ? inner.image() : Image{},
                                 relu ? output.image() : Image{}, gradient, two_threads});

  auto at = [](int64_t n, int64_t channels, int64_t i, int64_t h, int64_t y, int64_t w, int64_t x) {
    return ((n * channels + i) * h + y) * w + x;
  };
  std::vector<double> p(g.images * g.in_channels * c.h * c.w), slope(p.size()),
      r(g.images * g.out_channels * c.out_h * c.out_w), turned(r.size());
  std::vector<double> of_first(g.in_channels * layer.in_channels),
      of_middle(g.out_channels * g.group_size * g.taps()),
      of_last(layer.out_channels * g.out_channels), of_bias(layer.out_channels);
  for (int64_t n = 0; n < g.images; n++)
    for (int64_t o = 0; o < g.in_channels; o++)
      for (int64_t y = 0; y < c.h; y++)
        for (int64_t x = 0; x < c.w; x++) {
          double& sum = p[at(n, g.in_channels, o, c.h, y, c.w, x)];
          for (int64_t j = 0; j < layer.in_channels; j++)
            sum += gate * first.value.at(first.value.index(o, j, 0, 0)) *
                   input.at(input.index(n, j, y, x));
          if (!keep) continue;
          const double kept = inner.at(inner.index(n, o, y, x));
          compare(type, "inner", kept, sum, where);
          sum = kept;  // rounded to bfloat16 where that is the type
        }
  // Calls f(r's index, p's index, the weight's index) for everything that the grouped convolution
  // multiplies.
  auto each = [&](auto f) {
    for (int64_t n = 0; n < g.images; n++)
      for (int64_t o = 0; o < g.out_channels; o++)
        for (int64_t j = 0; j < g.group_size; j++)
          for (int64_t ky = 0; ky < g.kernel_h; ky++)
            for (int64_t kx = 0; kx < g.kernel_w; kx++)
              for (int64_t y = 0; y < c.out_h; y++)
                for (int64_t x = 0; x < c.out_w; x++) {
                  const int64_t iy = y * g.stride_h + ky * g.dilation_h - g.padding_h,
                                ix = x * g.stride_w + kx * g.dilation_w - g.padding_w;
                  if (iy < 0 || iy >= c.h || ix < 0 || ix >= c.w) continue;
                  const int64_t from =
                      gross::block_start(o, g.in_channels, g.out_channels, g.group_size) + j;
                  f(at(n, g.out_channels, o, c.out_h, y, c.out_w, x),
                    at(n, g.in_channels, from, c.h, iy, c.w, ix), middle.value.index(o, j, ky, kx));
                }
  };
  each([&](int64_t to, int64_t from, int64_t weight) {
    r[to] += gate * middle.value.at(weight) * p[from];
  });
  for (int64_t n = 0; n < g.images; n++)
    for (int64_t o = 0; o < layer.out_channels; o++)
      for (int64_t y = 0; y < c.out_h; y++)
        for (int64_t x = 0; x < c.out_w; x++) {
          double sum = layer.bias ? bias.at(o) : 0;
          for (int64_t j = 0; j < g.out_channels; j++)
            sum += gate * last.value.at(last.value.index(o, j, 0, 0)) *
                   r[at(n, g.out_channels, j, c.out_h, y, c.out_w, x)];
          const double got = output.at(output.index(n, o, y, x));
          compare(type, "layer", got, relu ? std::max(sum, 0.0) : sum, where);
          compare(type, "finished layer", finished.at(finished.index(n, o, y, x)),
                  ending.of(sum, n, o, y, x), where);
          const double dy = relu && got <= 0 ? 0 : grad.at(grad.index(n, o, y, x));
          of_bias[o] += dy;
          for (int64_t j = 0; j < g.out_channels; j++) {
            const int64_t to = at(n, g.out_channels, j, c.out_h, y, c.out_w, x);
            of_last[last.value.index(o, j, 0, 0)] += dy * r[to];
            turned[to] += gate * last.value.at(last.value.index(o, j, 0, 0)) * dy;
          }
        }
  each([&](int64_t to, int64_t from, int64_t weight) {
    slope[from] += gate * middle.value.at(weight) * turned[to];
    of_middle[weight] += turned[to] * p[from];
  });
  for (int64_t n = 0; n < g.images; n++)
    for (int64_t j = 0; j < layer.in_channels; j++)
      for (int64_t y = 0; y < c.h; y++)
        for (int64_t x = 0; x < c.w; x++) {
          double sum = 0;
          for (int64_t o = 0; o < g.in_channels; o++) {
            const double dp = slope[at(n, g.in_channels, o, c.h, y, c.w, x)];
            sum += gate * first.value.at(first.value.index(o, j, 0, 0)) * dp;
            of_first[first.value.index(o, j, 0, 0)] += dp * input.at(input.index(n, j, y, x));
          }
          if (for_input)
            compare(type, "layer's input gradient", grad_input.at(grad_input.index(n, j, y, x)),
                    sum, where);
        }
  auto check = [&](const char* what, const Weight& weight, const std::vector<double>& expected,
                   bool wanted) {
    double share = 0;
    for (size_t k = 0; k < expected.size(); k++) {
      share += expected[k] * weight.value.at(k);
      if (wanted) compare(type, what, weight.grad.at(k), gate * expected[k], where);
    }
    if (for_gates) compare(type, "layer's gate gradient", weight.share, share, where);
  };
  check("first pointwise's gradient", first, of_first, for_first);
  check("grouped gradient", middle, of_middle, for_middle);
  check("last pointwise's gradient", last, of_last, for_last);
  for (int64_t o = 0; for_bias && o < layer.out_channels; o++)
    compare(type, "bias gradient", grad_bias.at(o), of_bias[o], where);
}

void convolution_case() {
  Case c;
  if (!draw(c)) return;
  const Geometry& g = c.g;
  const int64_t smallest = c.smallest, growth = c.growth, h = c.h, w = c.w, out_h = c.out_h,
                out_w = c.out_w;
  const Type type = c.type;
  const std::string& where = c.where;
  const bool last = pick(0, 1);
  Tensor input(g.images, g.in_channels, h, w, last, type, 8),
      output(g.images, g.out_channels, out_h, out_w, last, type, 0);
  Tensor grad(g.images, g.out_channels, out_h, out_w, pick(0, 1), type, 8),
      grad_input(g.images, g.in_channels, h, w, last, type, 0);

  Series series{};
  SeriesGradient gradient{};
  std::vector<std::unique_ptr<Tensor>> terms, grad_terms;
  std::vector<double> grad_gates(2, NAN);
  series.active = growth > 1 ? 2 : 1;
  series.type = type;
  for (int i = 0; i < series.active; i++) {
    series.group_sizes[i] = i ? g.group_size : smallest;
    if (series.active == 1) series.group_sizes[0] = g.group_size;
    series.gates[i] = pick(1, 4) / 2.0;
    terms.push_back(std::make_unique<Tensor>(g.out_channels, series.group_sizes[i], g.kernel_h,
                                             g.kernel_w, false, type, 8));
    grad_terms.push_back(std::make_unique<Tensor>(g.out_channels, series.group_sizes[i], g.kernel_h,
                                                  g.kernel_w, false, type, 0));
    series.terms[i] = terms[i]->memory.get();
    gradient.terms[i] = grad_terms[i]->memory.get();
  }
  gradient.gates = grad_gates.data();

  tested().convolve(type, {input.image(), series, output.image(), g, Pass::forward, two_threads});
  tested().convolve(type,
                    {grad.image(), series, grad_input.image(), g, Pass::backward, two_threads});
  tested().weight_grad(type, {grad.image(), input.image(), series, gradient, g, two_threads});

  std::vector<double> expected(output.n * output.c * out_h * out_w),
      expected_input(input.n * input.c * h * w);
  for (int i = 0; i < series.active; i++) {
    const int64_t s = series.group_sizes[i];
    double expected_gate = 0;
    for (int64_t o = 0; o < g.out_channels; o++)
      for (int64_t j = 0; j < s; j++)
        for (int64_t ky = 0; ky < g.kernel_h; ky++)
          for (int64_t kx = 0; kx < g.kernel_w; kx++) {
            const int64_t at = terms[i]->index(o, j, ky, kx),
                          c = gross::block_start(o, g.in_channels, g.out_channels, s) + j;
            const double weight = terms[i]->at(at);
            double sum = 0;
            for (int64_t n = 0; n < g.images; n++)
              for (int64_t y = 0; y < out_h; y++)
                for (int64_t x = 0; x < out_w; x++) {
                  const int64_t iy = y * g.stride_h + ky * g.dilation_h - g.padding_h,
                                ix = x * g.stride_w + kx * g.dilation_w - g.padding_w;
                  if (iy < 0 || iy >= h || ix < 0 || ix >= w) continue;
                  const int64_t to = output.index(n, o, y, x), from = input.index(n, c, iy, ix);
                  const double slope = grad.at(grad.index(n, o, y, x));
                  expected[to] += series.gates[i] * weight * input.at(from);
                  expected_input[from] += series.gates[i] * weight * slope;
                  sum += slope * input.at(from);
                }
            compare(type, "term gradient", grad_terms[i]->at(at), series.gates[i] * sum, where);
            expected_gate += weight * sum;
          }
    compare(type, "gate gradient", grad_gates[i], expected_gate, where);
  }
  for (size_t k = 0; k < expected.size(); k++)
    compare(type, "output", output.at(k), expected[k], where);
  finished_case(c, series, input, output, expected);
  for (size_t k = 0; k < expected_input.size(); k++)
    compare(type, "input gradient", grad_input.at(k), expected_input[k], where);
}

// Sums over windows of channels, rows and columns, and back.
void sum_pool_case() {
  const Type types[] = {Type::float32, Type::float64, Type::bfloat16};
  const Type type = types[pick(0, 2)];
  const int64_t groups = pick(1, 3), deep = pick(0, 1) ? 1 : pick(2, 20),
                channels = pick(1, pick(0, 1) ? 3 : 40);
  int64_t window[2], stride[2], padding[2], dilation[2], size[2], pooled[2];
  for (int i = 0; i < 2; i++) {
    window[i] = pick(1, 4), stride[i] = pick(1, 3), padding[i] = pick(0, 3),
    dilation[i] = pick(1, 3);
    const int64_t reach = (window[i] - 1) * dilation[i];
    size[i] = std::max<int64_t>(1, reach + 1 - 2 * padding[i]) + pick(0, pick(0, 9) ? 12 : 300);
    pooled[i] = (size[i] + 2 * padding[i] - reach - 1) / stride[i] + 1;
  }
  Tensor input(pick(1, 2), groups * (channels + deep - 1), size[0], size[1], pick(0, 1), type, 8);
  Tensor output(input.n, groups * channels, pooled[0], pooled[1], pick(0, 1), type, 0);
  Tensor grad(output.n, output.c, output.h, output.w, pick(0, 1), type, 8);
  Tensor back(input.n, input.c, input.h, input.w, pick(0, 1), type, 0);
  const auto forth = [&](int i) { return Axis{window[i], dilation[i], stride[i], -padding[i], 1}; };
  const auto backwards = [&](int i) {
    return Axis{window[i], dilation[i], 1, padding[i] - (window[i] - 1) * dilation[i], stride[i]};
  };
  tested().sum_pool(type, {input.image(), output.image(), input.n, groups, Axis{deep, 1, 1, 0, 1},
                           forth(0), forth(1), two_threads});
  tested().sum_pool(type, {grad.image(), back.image(), input.n, groups,
                           Axis{deep, 1, 1, 1 - deep, 1}, backwards(0), backwards(1), two_threads});

  std::ostringstream where;
  where << input.c << "x" << input.h << "x" << input.w << " in " << groups << " groups, windows "
        << deep << " " << window[0] << " " << window[1] << ", stride " << stride[0] << " "
        << stride[1] << ", padding " << padding[0] << " " << padding[1] << ", dilation "
        << dilation[0] << " " << dilation[1];
  std::vector<double> expected_back(input.n * input.c * input.h * input.w);
  for (int64_t n = 0; n < output.n; n++)
    for (int64_t c = 0; c < output.c; c++)
      for (int64_t y = 0; y < output.h; y++)
        for (int64_t x = 0; x < output.w; x++) {
          double sum = 0;
          for (int64_t k = 0; k < deep; k++)
            for (int64_t i = 0; i < window[0]; i++)
              for (int64_t j = 0; j < window[1]; j++) {
                const int64_t row = y * stride[0] + i * dilation[0] - padding[0],
                              col = x * stride[1] + j * dilation[1] - padding[1],
                              channel = c / channels * (channels + deep - 1) + c % channels + k;
                if (row < 0 || row >= input.h || col < 0 || col >= input.w) continue;
                const int64_t from = input.index(n, channel, row, col);
                sum += input.at(from);
                expected_back[from] += grad.at(grad.index(n, c, y, x));
              }
          compare(type, "sum", output.at(output.index(n, c, y, x)), sum, where.str());
        }
  for (int64_t n = 0; n < input.n; n++)
    for (int64_t c = 0; c < input.c; c++)
      for (int64_t y = 0; y < input.h; y++)
        for (int64_t x = 0; x < input.w; x++)
          compare(type, "gradient of a sum", back.at(back.index(n, c, y, x)),
                  expected_back[input.index(n, c, y, x)], where.str());
}

// 8 bits
// -------------------------------------------------------------------------------------------

// Bytes or numbers, compact and channels-last, of exactly as many bytes as kernels may read: of a
// source of theirs three more than it has.
struct Value {
  int64_t c, h, w;
  Held held;
  std::vector<char> memory;

  Value(int64_t n, int64_t c, int64_t h, int64_t w, Held held)
      : c(c), h(h), w(w), held(held), memory(n * c * h * w * (held.in_bytes() ? 1 : 4) + 3, 0x55) {}
  int64_t index(int64_t n, int64_t ic, int64_t y, int64_t x) const {
    return ((n * h + y) * w + x) * c + ic;
  }
  void draw(bool largest) {
    for (size_t i = 0; i < memory.size(); i++)
      memory[i] = static_cast<char>(largest ? 255 : pick(0, 255));
    if (!held.in_bytes())
      for (size_t i = 0; i + 4 <= memory.size(); i += 4) {
        const float number = static_cast<float>(pick(-1000, 1000)) / 2;
        std::memcpy(memory.data() + i, &number, 4);
      }
  }
  double at(int64_t i) const {
    if (held.in_bytes())
      return held.scale * (static_cast<uint8_t>(memory[i]) - static_cast<double>(held.zero));
    float number;
    std::memcpy(&number, memory.data() + 4 * i, 4);
    return number;
  }
  // What stands there for a number.
  double of(double number) const {
    if (!held.in_bytes()) return number;
    const double q = std::nearbyint(number / held.scale) + held.zero;
    return held.scale * (std::min(std::max(q, 0.0), 255.0) - held.zero);
  }
  Image image() { return {memory.data(), c, h, w, h * w * c, 1, w * c, c}; }
};

// A step of 8 bits, drawn: how its values are held, and its end. Scales are powers of two, so that
// every number is exact and every result must be.
struct ByteEnd {
  Held source{0.5f, static_cast<int32_t>(pick(0, 1) ? 0 : pick(0, 255))}, target{}, other{};
  Activation activation = static_cast<Activation>(pick(0, 3));
  bool has_residual = pick(0, 1), residual_last = pick(0, 1);
  std::vector<float> bias, slopes;

  ByteEnd(int64_t outputs, float typical) : bias(outputs), slopes(outputs) {
    const auto power = [](float size) { return std::exp2(std::round(std::log2(size))); };
    if (pick(0, 2)) target = {power(typical / 64), static_cast<int32_t>(pick(0, 2) ? 0 : 131)};
    if (pick(0, 1)) other = {power(typical / 128), static_cast<int32_t>(pick(0, 2) ? 0 : 77)};
    for (float& number : bias) number = static_cast<float>(pick(-8, 8)) / 2;
    for (float& number : slopes) number = static_cast<float>(pick(0, 2)) / 2;
  }
  Finish finish(const Image* residual) const {
    return {activation, has_residual ? residual : nullptr, residual_last, {source, other, target}};
  }
  double of(double sum, int64_t o, double residual) const {
    double value = residual_last || !has_residual ? sum : sum + residual;
    if (activation == Activation::relu) value = std::max(value, 0.0);
    if (activation == Activation::relu6) value = std::min(std::max(value, 0.0), 6.0);
    if (activation == Activation::prelu && value < 0) value *= slopes[o];
    return residual_last && has_residual ? value + residual : value;
  }
};

std::vector<int8_t> drawn_bytes(int64_t count, int64_t most, bool largest) {
  std::vector<int8_t> weights(count);
  for (int8_t& weight : weights)
    weight = static_cast<int8_t>(largest ? (pick(0, 3) ? most : -most) : pick(-most, most));
  return weights;
}
Series series_of(const void* weights, Type type, int64_t group_size) {
  Series series{};
  series.active = 1, series.type = type, series.terms[0] = weights,
  series.group_sizes[0] = group_size, series.gates[0] = 1;
  return series;
}

// Σ over what output (n, y, x) of a convolution reads: f(input row, column, tap).
template <class F>
void each_tap(const Geometry& g, const Value& from, int64_t y, int64_t x, F f) {
  for (int64_t ky = 0; ky < g.kernel_h; ky++)
    for (int64_t kx = 0; kx < g.kernel_w; kx++) {
      const int64_t iy = y * g.stride_h + ky * g.dilation_h - g.padding_h,
                    ix = x * g.stride_w + kx * g.dilation_w - g.padding_w;
      if (iy >= 0 && iy < from.h && ix >= 0 && ix < from.w) f(iy, ix, ky * g.kernel_w + kx);
    }
}

void compare_exactly(const char* what, double got, double expected, const std::string& where) {
  if (got == expected) return;
  std::printf("%s, %s of 8 bits: got %.9g, expected %.9g, for %s\n", tested().name, what, got,
              expected, where.c_str());
  std::exit(1);
}

// A dense convolution of 8 bits, and windows of its input. Often all bytes and weights
// are the largest.
void byte_convolution_case() {
  Case c;
  if (!draw(c)) return;
  Geometry& g = c.g;
  g.in_channels = g.group_size = pick(1, pick(0, 3) ? 24 : 130);
  g.out_channels = pick(1, pick(0, 3) ? 40 : 90);
  // The largest sums that float32 holds exactly.
  const bool largest = g.in_channels * g.taps() <= 256 && pick(0, 1);
  const int64_t most = pick(0, 1) ? 63 : 127;
  const float scale = 0.25f;
  ByteEnd end(g.out_channels, 8 * std::sqrt(static_cast<float>(g.in_channels * g.taps())) * most);
  Value source(g.images, g.in_channels, c.h, c.w, end.source),
      target(g.images, g.out_channels, c.out_h, c.out_w, end.target),
      residual(g.images, g.out_channels, c.out_h, c.out_w, end.other);
  source.draw(largest), residual.draw(false);
  const std::vector<int8_t> weights =
      drawn_bytes(g.out_channels * g.in_channels * g.taps(), most, largest);
  const std::vector<float> scales(g.out_channels, scale);
  std::vector<float> packed(tested().packed_kernel_size(Type::int8, g));
  tested().pack_kernel(Type::int8,
                       {series_of(weights.data(), Type::int8, g.in_channels), g, end.bias.data(),
                        end.slopes.data(), scales.data(), end.source},
                       packed.data(), two_threads);
  const Image from = source.image(), to = target.image(), other = residual.image();
  const Finish finish = end.finish(&other);
  tested().convolve_packed(Type::int8, {from, packed.data(), to, g, finish, two_threads});
  for (int64_t n = 0; n < g.images; n++)
    for (int64_t y = 0; y < c.out_h; y++)
      for (int64_t x = 0; x < c.out_w; x++)
        for (int64_t o = 0; o < g.out_channels; o++) {
          double sum = end.bias[o];
          each_tap(g, source, y, x, [&](int64_t iy, int64_t ix, int64_t tap) {
            for (int64_t j = 0; j < g.in_channels; j++)
              sum += scale * weights[(o * g.in_channels + j) * g.taps() + tap] *
                     source.at(source.index(n, j, iy, ix));
          });
          const int64_t i = target.index(n, o, y, x);
          compare_exactly("output", target.at(i), target.of(end.of(sum, o, residual.at(i))),
                          c.where);
        }
  // The mean of as many numbers as a power of two is exact too.
  const bool mean = (g.taps() == 1 || g.taps() == 2 || g.taps() == 4) && pick(0, 1);
  ByteEnd ending(g.in_channels, 128);
  if (ending.activation == Activation::prelu) ending.activation = Activation::relu;
  if (!pick(0, 2)) {  // One that stays in its form.
    ending.target = end.source, ending.activation = Activation::none;
    ending.has_residual = false;
  }
  ending.source = end.source;
  Value pooled(g.images, g.in_channels, c.out_h, c.out_w, ending.target),
      added(g.images, g.in_channels, c.out_h, c.out_w, ending.other);
  added.draw(false);
  const Image pool_to = pooled.image(), pool_other = added.image();
  tested().pool(Type::int8, {from, pool_to, g, mean, ending.finish(&pool_other), two_threads});
  for (int64_t n = 0; n < g.images; n++)
    for (int64_t y = 0; y < c.out_h; y++)
      for (int64_t x = 0; x < c.out_w; x++)
        for (int64_t j = 0; j < g.in_channels; j++) {
          double total = 0, highest = -INFINITY;
          each_tap(g, source, y, x, [&](int64_t iy, int64_t ix, int64_t) {
            const double value = source.at(source.index(n, j, iy, ix));
            total += value, highest = std::max(highest, value);
          });
          // A window that lies in the padding alone has no largest number.
          if (!mean && highest == -INFINITY) continue;
          const int64_t i = pooled.index(n, j, y, x);
          compare_exactly("window", pooled.at(i),
                          pooled.of(ending.of(mean ? total / g.taps() : highest, j, added.at(i))),
                          c.where);
        }
}

// Numbers in rows and channels of any strides: what a program is given. Into 8 bits as they are, or
// the largest or the mean of windows of them.
void byte_form_case() {
  const bool windows = !pick(0, 3), mean = windows && pick(0, 1);
  const int64_t n = pick(1, 3), c = pick(1, pick(0, 2) ? 9 : 150), h = pick(1, 9),
                w = pick(1, pick(0, 2) ? 20 : 300 / c + 1), stride = windows ? pick(1, 2) : 1;
  Geometry g{n, c, c, c, 1, 1, stride, stride, 0, 0, 1, 1};
  if (windows) g.kernel_h = std::min(h, int64_t{1} << pick(0, 1));
  if (windows) g.kernel_w = std::min(w, int64_t{1} << pick(0, 1));
  // Some channels, columns and rows are beside what is read.
  const int64_t beside = pick(0, 1), right = pick(0, 1), below = pick(0, 1),
                step = pick(0, 3) ? 1 : 2;
  const Tensor whole(n, c + beside, h + below, w * step + right, pick(0, 1), Type::float32, 4096);
  Image from = whole.image();
  from.data = static_cast<float*>(from.data) + beside * from.stride_c;
  from.channels = c, from.height = h, from.width = w, from.stride_w *= step;
  // Some lie in the middle of two steps, and some are out of range.
  const Held held{1.0f / 256, static_cast<int32_t>(pick(0, 1) ? pick(0, 255) : 0)};
  Value target(n, c, (h - g.kernel_h) / stride + 1, (w - g.kernel_w) / stride + 1, held);
  const Image to = target.image();
  const Finish finish{Activation::none, nullptr, false, {{}, {}, held}};
  tested().pool(Type::int8, {from, to, g, mean, finish, two_threads});
  for (size_t i = 1; i <= 3; i++)  // What is past the end.
    compare_exactly("end", target.memory[target.memory.size() - i], 0x55, "a form");
  const std::string where = std::to_string(n) + "×" + std::to_string(c) + "×" + std::to_string(h) +
                            "×" + std::to_string(w) + " of strides " +
                            std::to_string(from.stride_c) + ", " + std::to_string(from.stride_h) +
                            ", " + std::to_string(from.stride_w);
  for (int64_t i = 0; i < n; i++)
    for (int64_t y = 0; y < target.h; y++)
      for (int64_t x = 0; x < target.w; x++)
        for (int64_t j = 0; j < c; j++) {
          double total = 0, highest = -INFINITY;
          for (int64_t ky = 0; ky < g.kernel_h; ky++)
            for (int64_t kx = 0; kx < g.kernel_w; kx++) {
              const double value =
                  whole.at(whole.index(i, j + beside, y * stride + ky, (x * stride + kx) * step));
              total += value, highest = std::max(highest, value);
            }
          const int64_t at = target.index(i, j, y, x);
          compare_exactly("form", target.at(at), target.of(mean ? total / g.taps() : highest),
                          where);
        }
}

// R of a layer of 8 bits in whole numbers of 16 bits, as its definition says.
struct Words {
  std::vector<int64_t> halves, divisors;  // of each input: p = ⌊(sum + half) / divisor⌋
  std::vector<int64_t> middle;
  std::vector<float> steps;  // of each output

  Words(const Layer& layer, const std::vector<int8_t>& first, const std::vector<float>& weights) {
    const Geometry& g = layer.geometry;
    const int64_t terms = g.group_size * g.taps();
    const double most = std::min(32767.0, std::floor(std::pow(2, 19) / std::sqrt(terms)));
    std::vector<double> bounds;
    for (int64_t c = 0; c < g.in_channels; c++) {
      double up = 0, down = 0;
      for (int64_t j = 0; j < layer.in_channels; j++) {
        const double w = first[c * layer.in_channels + j], low = -layer.source.zero * w,
                     high = (255 - layer.source.zero) * w;
        up += std::max(low, high), down += std::min(low, high);
      }
      const double reach = std::max(up, -down);
      int64_t divisor = 1;
      while (std::floor((reach + divisor / 2) / divisor) > most) divisor *= 2;
      divisors.push_back(divisor), halves.push_back(divisor / 2);
      bounds.push_back(std::floor((reach + divisor / 2) / divisor));
    }
    for (int64_t o = 0; o < g.out_channels; o++) {
      double largest = 0, sum = 0, rounded = 0;
      std::vector<double> row;
      for (int64_t i = 0; i < terms; i++) {
        const int64_t c = o / g.outputs_per_group() * g.group_size + i / g.taps();
        row.push_back(weights[o * terms + i] *
                      (layer.source.scale * layer.scales[0][c] * divisors[c] / layer.scales[1][o]));
        largest = std::max(largest, std::abs(row[i]));
        sum += std::abs(row[i]) * bounds[c], rounded += bounds[c] / 2;
      }
      const double times =
          sum > 0 ? std::min(32767 / largest, (std::pow(2, 31) - 1 - rounded) / sum) : 1;
      for (double number : row)
        middle.push_back(static_cast<int64_t>(std::nearbyint(number * times)));
      steps.push_back(static_cast<float>(1 / times));
    }
  }
};

// A layer of 8 bits. Often p and R's sums are the largest that there are.
void byte_layer_case() {
  Case c;
  if (!draw(c)) return;
  const Geometry& g = c.g;
  Layer layer{};
  layer.geometry = g;
  const int64_t widest = c.h * c.w > 64 || pick(0, 3) ? 40 : 200;
  layer.in_channels = pick(1, widest), layer.out_channels = pick(1, widest);
  const std::string where = std::to_string(layer.in_channels) + "→(" + c.where + ")→" +
                            std::to_string(layer.out_channels);
  const bool largest = !pick(0, 2);
  const int64_t most = pick(0, 1) ? 63 : 127, terms = g.group_size * g.taps();
  std::vector<int8_t> first = drawn_bytes(g.in_channels * layer.in_channels, most, largest);
  const std::vector<int8_t> last = drawn_bytes(layer.out_channels * g.out_channels, most, false);
  if (largest && pick(0, 1)) std::fill(first.begin(), first.end(), static_cast<int8_t>(most));
  std::vector<float> middle(g.out_channels * terms);
  for (float& number : middle) number = largest ? 1 : static_cast<float>(pick(-20, 20)) / 16;
  ByteEnd end(layer.out_channels, 40 * std::sqrt(static_cast<float>(g.out_channels)) * most / 4);
  if (largest) end.source.zero = pick(0, 1) ? 0 : 255;
  const float typical = largest ? 2 * static_cast<float>(layer.in_channels * terms)
                                : std::sqrt(static_cast<float>(layer.in_channels * terms));
  const float step = std::exp2(std::round(std::log2(typical * most / 8)));
  const std::vector<float> first_scales(g.in_channels, 0.5f), steps(g.out_channels, step),
      last_scales(layer.out_channels, 0.25f);
  layer.pointwise_in = series_of(first.data(), Type::int8, layer.in_channels);
  layer.grouped = series_of(middle.data(), Type::float32, g.group_size);
  layer.pointwise_out = series_of(last.data(), Type::int8, g.out_channels);
  layer.bias = end.bias.data(), layer.slopes = end.slopes.data(), layer.source = end.source;
  layer.scales[0] = first_scales.data(), layer.scales[1] = steps.data(),
  layer.scales[2] = last_scales.data();
  Value source(g.images, layer.in_channels, c.h, c.w, end.source),
      target(g.images, layer.out_channels, c.out_h, c.out_w, end.target),
      residual(g.images, layer.out_channels, c.out_h, c.out_w, end.other);
  source.draw(largest || !pick(0, 3)), residual.draw(false);
  if (largest && end.source.zero) std::fill(source.memory.begin(), source.memory.end(), 0);
  std::vector<float> packed(tested().packed_size(Type::int8, layer));
  tested().pack(Type::int8, layer, packed.data(), two_threads);
  const Image other = residual.image();
  tested().layer(Type::int8, {source.image(), layer, packed.data(), Image{}, target.image(),
                              end.finish(&other), two_threads});
  const Words words(layer, first, middle);
  Value inner(g.images, g.in_channels, c.h, c.w, {}),
      between(g.images, g.out_channels, c.out_h, c.out_w, {});
  std::vector<int64_t> p(g.images * c.h * c.w * g.in_channels);
  std::vector<double> r(g.images * c.out_h * c.out_w * g.out_channels);
  for (int64_t i = 0; i < static_cast<int64_t>(p.size()); i++) {
    const int64_t pixel = i / g.in_channels, channel = i % g.in_channels;
    int64_t sum = words.halves[channel];
    for (int64_t j = 0; j < layer.in_channels; j++)
      sum += first[channel * layer.in_channels + j] *
             (static_cast<uint8_t>(source.memory[pixel * layer.in_channels + j]) - end.source.zero);
    p[i] = static_cast<int64_t>(std::floor(static_cast<double>(sum) / words.divisors[channel]));
  }
  for (int64_t n = 0; n < g.images; n++)
    for (int64_t y = 0; y < c.out_h; y++)
      for (int64_t x = 0; x < c.out_w; x++) {
        for (int64_t o = 0; o < g.out_channels; o++) {
          int64_t sum = 0;
          each_tap(g, source, y, x, [&](int64_t iy, int64_t ix, int64_t tap) {
            for (int64_t j = 0; j < g.group_size; j++)
              sum += words.middle[(o * g.group_size + j) * g.taps() + tap] *
                     p[inner.index(n, o / g.outputs_per_group() * g.group_size + j, iy, ix)];
          });
          r[between.index(n, o, y, x)] = std::min(
              std::max(std::nearbyint(static_cast<float>(sum) * words.steps[o]), -127.0f), 127.0f);
        }
        for (int64_t o = 0; o < layer.out_channels; o++) {
          double sum = end.bias[o];
          for (int64_t j = 0; j < g.out_channels; j++)
            sum += 0.25 * last[o * g.out_channels + j] * r[between.index(n, j, y, x)];
          const int64_t i = target.index(n, o, y, x);
          compare_exactly("layer", target.at(i), target.of(end.of(sum, o, residual.at(i))), where);
        }
      }
}

const InstructionSet* find(const std::string& name) {
  static const std::vector<InstructionSet> sets = instruction_sets();
  for (const InstructionSet& set : sets)
    if (set.kernels->name == name) return &set;
  return nullptr;
}

// Whether the processor has an instruction set, by what the system says of it and not by what
// dispatch.cpp finds.
bool has(const std::string& name) {
  if (name == "wide" || name == "widebf16" || name == "portable") return true;
#if defined(__x86_64__)
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line))
    if (!line.compare(0, 5, "flags")) {
      std::vector<std::string> needed{"avx2", "fma"};
      if (name == "avxvnni") needed.push_back("avx_vnni");
      if (name.substr(0, 6) == "avx512") needed = {"avx512f", "avx512bw", "avx512vl", "avx512dq"};
      if (name == "avx512vnni" || name == "avx512bf16") needed.push_back("avx512_vnni");
      if (name == "avx512bf16") needed.push_back("avx512_bf16");
      for (const std::string& flag : needed)
        if ((line + " ").find(" " + flag + " ") == std::string::npos) return false;
      return true;
    }
#endif
  return false;
}

}  // namespace

// Sets named on the command line, or all.
int main(int count, char** named) {
  const int cases = 250;
  std::string proved, missing;
  for (const std::string name :
       {"wide", "widebf16", "portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16"}) {
    const InstructionSet* const set = find(name);
    const bool present = set && set->present;
    if (present != has(name)) {
      std::printf("%s: %s by the processor's own word, %s by dispatch.cpp\n", name.c_str(),
                  has(name) ? "present" : "missing", present ? "present" : "missing");
      return 1;
    }
    if (count > 1 && std::find(named + 1, named + count, name) == named + count) continue;
    if (!present) {
      missing += " " + name;
      continue;
    }
    kernels_of_set = set->kernels;
    generator.seed(1);
    worst = 0;
    for (int i = 0; i < cases; i++) {
      convolution_case();
      layer_case();
      sum_pool_case();
      byte_convolution_case();
      byte_form_case();
      byte_layer_case();
    }
    std::printf(
        "%s: %d convolutions, layers and sum-poolings agree with plain loops, largest error %.2f "
        "of what is allowed; as many of 8 bits are the same to the last bit\n",
        name.c_str(), cases, worst);
    std::fflush(stdout);
    proved += " " + name;
  }
  std::printf("proved:%s\n", proved.c_str());
  if (!missing.empty())
    std::printf(
        "not run, for this processor lacks them:%s; of them wide and widebf16 prove all "
        "but the instructions\n",
        missing.c_str());
}
