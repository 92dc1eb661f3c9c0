// The operator as its definition reads, one thread per result, sums in float64: the second
// reference on a GPU, where the first one (backends/reference.py) trusts the library's
// convolutions. Never used otherwise.
#include "elementwise.h"

namespace gross::cuda::plain {

namespace {

constexpr int taps = 9;

GROSS_HOST_DEVICE int64_t outputs_per_group(const Geometry& g) {
  return g.out_channels * g.group_size / g.in_channels;
}

// Σ gate_i Ψ(term_i) between two channels at one tap, rounded once to the images' type.
GROSS_HOST_DEVICE double weight(const Geometry& g, const Series& series, Type type, int64_t o,
                                int64_t c, int tap) {
  double sum = 0;
  for (int i = 0; i < series.active; i++) {
    const int64_t s = series.group_sizes[i],
                  within = c - block_start(o, g.in_channels, g.out_channels, s);
    if (within >= 0 && within < s)
      sum += gate_of(series, i) * load(series.terms[i], (o * s + within) * taps + tap, series.type);
  }
  double rounded;
  store(&rounded, 0, type, sum);
  return load(&rounded, 0, type);
}

// Splits the index of an element of a channels-last image.
struct Place {
  int64_t n, y, x, c;
  GROSS_HOST_DEVICE Place(int64_t i, int64_t height, int64_t width, int64_t channels)
      : n(i / channels / width / height),
        y(i / channels / width % height),
        x(i / channels % width),
        c(i % channels) {}
};

struct Forward {
  Type type;
  Geometry g;
  Series series;
  const void* input;
  void* output;
  GROSS_HOST_DEVICE void operator()(int64_t i) const {
    const Place at(i, g.out_h, g.out_w, g.out_channels);
    const int64_t start = block_start(at.c, g.in_channels, g.out_channels, g.group_size);
    double sum = 0;
    for (int tap = 0; tap < taps; tap++) {
      const int64_t y = at.y * g.stride + tap / 3 - 1, x = at.x * g.stride + tap % 3 - 1;
      if (y < 0 || y >= g.in_h || x < 0 || x >= g.in_w) continue;
      for (int64_t c = start; c < start + g.group_size; c++)
        sum += weight(g, series, type, at.c, c, tap) *
               load(input, ((at.n * g.in_h + y) * g.in_w + x) * g.in_channels + c, type);
    }
    store(output, i, type, sum);
  }
};

struct InputGrad {
  Type type;
  Geometry g;
  Series series;
  const void* grad;
  void* grad_input;
  GROSS_HOST_DEVICE void operator()(int64_t i) const {
    const Place at(i, g.in_h, g.in_w, g.in_channels);
    const int64_t outputs = outputs_per_group(g), first = at.c / g.group_size * outputs;
    double sum = 0;
    for (int tap = 0; tap < taps; tap++) {
      const int64_t y = at.y + 1 - tap / 3, x = at.x + 1 - tap % 3;  // times the stride
      if (y < 0 || y % g.stride != 0 || y / g.stride >= g.out_h || x < 0 || x % g.stride != 0 ||
          x / g.stride >= g.out_w)
        continue;
      for (int64_t o = first; o < first + outputs; o++)
        sum += weight(g, series, type, o, at.c, tap) *
               load(grad,
                    ((at.n * g.out_h + y / g.stride) * g.out_w + x / g.stride) * g.out_channels + o,
                    type);
    }
    store(grad_input, i, type, sum);
  }
};

// The gradient of the summed weight, [out_channels][group size][9] in float64.
struct SumGrad {
  Type type;
  Geometry g;
  const void* grad;
  const void* input;
  double* result;
  GROSS_HOST_DEVICE void operator()(int64_t i) const {
    const int tap = static_cast<int>(i % taps);
    const int64_t o = i / taps / g.group_size,
                  c = block_start(o, g.in_channels, g.out_channels, g.group_size) +
                      i / taps % g.group_size;
    double sum = 0;
    for (int64_t row = 0; row < g.images * g.out_h; row++) {
      const int64_t n = row / g.out_h, y = row % g.out_h * g.stride + tap / 3 - 1;
      if (y < 0 || y >= g.in_h) continue;
      for (int64_t out_x = 0; out_x < g.out_w; out_x++) {
        const int64_t x = out_x * g.stride + tap % 3 - 1;
        if (x < 0 || x >= g.in_w) continue;
        sum += load(grad, (row * g.out_w + out_x) * g.out_channels + o, type) *
               load(input, ((n * g.in_h + y) * g.in_w + x) * g.in_channels + c, type);
      }
    }
    result[i] = sum;
  }
};

// Of the summed weight's gradient, what belongs to element i of a term.
GROSS_HOST_DEVICE double restricted(const Geometry& g, const double* sum_grad, int64_t s,
                                    int64_t i) {
  const int64_t o = i / taps / s,
                c = block_start(o, g.in_channels, g.out_channels, s) + i / taps % s;
  const int64_t within = c - block_start(o, g.in_channels, g.out_channels, g.group_size);
  return sum_grad[(o * g.group_size + within) * taps + i % taps];
}

struct TermGrad {
  Geometry g;
  Series series;
  int term;
  const double* sum_grad;
  void* result;
  GROSS_HOST_DEVICE void operator()(int64_t i) const {
    const bool active = term < series.active;
    store(
        result, i, series.type,
        active ? gate_of(series, term) * restricted(g, sum_grad, series.group_sizes[term], i) : 0);
  }
};

struct GateGrad {
  Geometry g;
  Series series;
  const double* sum_grad;
  float* result;
  GROSS_HOST_DEVICE void operator()(int64_t term) const {
    double sum = 0;
    const int64_t s = series.group_sizes[term];
    for (int64_t i = 0; term < series.active && i < g.out_channels * s * taps; i++)
      sum += restricted(g, sum_grad, s, i) * load(series.terms[term], i, series.type);
    result[term] = static_cast<float>(sum);
  }
};

}  // namespace

int forward(Type type, const Geometry& g, const Series& series, const void* input, void* output,
            Stream stream) {
  return each(g.images * g.out_h * g.out_w * g.out_channels,
              Forward{type, g, series, input, output}, stream);
}

int input_grad(Type type, const Geometry& g, const Series& series, const void* grad,
               void* grad_input, Stream stream) {
  return each(g.images * g.in_h * g.in_w * g.in_channels,
              InputGrad{type, g, series, grad, grad_input}, stream);
}

size_t weight_grad_scratch_bytes(const Geometry& g) {
  return sizeof(double) * g.out_channels * g.group_size * taps;
}

int weight_grad(Type type, const Geometry& g, const Series& series, const void* grad,
                const void* input, const SeriesGradient& gradient, void* scratch, Stream stream) {
  double* sum_grad = static_cast<double*>(scratch);
  int error =
      each(g.out_channels * g.group_size * taps, SumGrad{type, g, grad, input, sum_grad}, stream);
  for (int i = 0; i < series.count && error == 0; i++)
    error = each(g.out_channels * series.group_sizes[i] * taps,
                 TermGrad{g, series, i, sum_grad, gradient.terms[i]}, stream);
  if (gradient.gates != nullptr && error == 0)
    error = each(series.count, GateGrad{g, series, sum_grad, gradient.gates}, stream);
  return error;
}

}  // namespace gross::cuda::plain
