// The weight gradient's kernels and launcher on the emulator, against plain loops in double
// precision, on buffers of exactly the needed size and scratch memory full of NaN. Every case runs
// under two schedules, whose results must agree in every bit. `test_weight_grad kernels`: every
// kernel once or twice, for the sanitizers; `numerics`: every packing and corner; `traffic`.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/weight_grad.cu"

using namespace gross::cuda;

namespace {

std::mt19937 generator(3);
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

struct Buffer {  // aligned as a device allocator would, so that sectors are counted as they are
                 // there
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{256}); }
  };
  size_t bytes;
  std::unique_ptr<char, Free> memory;
  explicit Buffer(size_t bytes)
      : bytes(bytes), memory(static_cast<char*>(::operator new[](bytes, std::align_val_t{256}))) {
    poison();
  }
  void poison() { std::memset(memory.get(), 0xff, bytes); }  // NaN in every type
};

double get(const Buffer& buffer, int64_t i, Type type) {
  if (type == Type::float32) return reinterpret_cast<const float*>(buffer.memory.get())[i];
  const uint16_t half = reinterpret_cast<const uint16_t*>(buffer.memory.get())[i];
  return type == Type::float16 ? low_half<Type::float16>(half) : low_half<Type::bfloat16>(half);
}
void put(Buffer& buffer, int64_t i, Type type, float value) {
  if (type == Type::float32) {
    reinterpret_cast<float*>(buffer.memory.get())[i] = value;
    return;
  }
  reinterpret_cast<uint16_t*>(buffer.memory.get())[i] = static_cast<uint16_t>(
      type == Type::float16 ? pack<Type::float16>(value, 0) : pack<Type::bfloat16>(value, 0));
}
// 16-bit types get multiples of 1/64, which they hold exactly; float32 gets all its bits.
float draw(Type type) {
  return type == Type::float32 ? pick(-(1 << 24), 1 << 24) * 0x1p-24f : pick(-64, 64) * 0x1p-6f;
}
Buffer drawn(int64_t count, Type type) {
  Buffer buffer(count * bytes_of(type));
  for (int64_t i = 0; i < count; i++) put(buffer, i, type, draw(type));
  return buffer;
}
// What a TF32 product takes from a number: 10 bits after the point, to the nearest, ties away from
// zero.
double as_multiplied(double value, Type type) {
  if (type != Type::float32 || value == 0) return value;
  int exponent;
  const double fraction = std::frexp(value, &exponent);
  return std::ldexp(std::round(std::ldexp(fraction, 11)), exponent - 11);
}

struct Case {
  Type type = Type::bfloat16, terms_type = Type::bfloat16;
  int images, in_channels, out_channels, h, w, stride;
  std::vector<int> group_sizes;
  int active;  // terms that are summed
  bool gates;
  int multiprocessors = 2, shared_bytes = 227 * 1024;
};

std::string name_of(const Case& c) {
  static const char* names[] = {"float16", "bfloat16", "float32"};
  std::string text = names[static_cast<int>(c.type)] + std::string("/") +
                     names[static_cast<int>(c.terms_type)] + " " + std::to_string(c.images) + "×" +
                     std::to_string(c.in_channels) + "→" + std::to_string(c.out_channels) + "×" +
                     std::to_string(c.h) + "×" + std::to_string(c.w) + " stride " +
                     std::to_string(c.stride) + " sizes";
  for (int s : c.group_sizes) text += " " + std::to_string(s);
  return text + " active " + std::to_string(c.active) + (c.gates ? " gates" : "") + " on " +
         std::to_string(c.multiprocessors);
}

struct Counts {       // by the bytes of the tensors
  double first_pass;  // global memory, read by the first pass
  double sectors;     // the same in whole sectors of 32 bytes, of which a piece of 16 may need half
  double scratch;     // global memory, written and read between the passes
  double shared;      // wavefronts of shared memory in the first pass, 128 bytes each
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
void check(bool right, const std::string& what) {
  if (!right) throw Failure(what);
}

Counts run(const Case& c) {
  const int size = c.group_sizes[c.active - 1], out_h = (c.h - 1) / c.stride + 1,
            out_w = (c.w - 1) / c.stride + 1;
  const int count = static_cast<int>(c.group_sizes.size());
  const Geometry geometry{c.images, c.in_channels, c.out_channels, c.h,     c.w,
                          out_h,    out_w,         size,           c.stride};
  const Device device{90, c.multiprocessors, c.shared_bytes};
  check(supports_weight_grad(c.type, c.terms_type, geometry, device), "not supported");
  const Buffer input = drawn(static_cast<int64_t>(c.images) * c.h * c.w * c.in_channels, c.type);
  const Buffer grad =
      drawn(static_cast<int64_t>(c.images) * out_h * out_w * c.out_channels, c.type);
  const Buffer gates = drawn(count, Type::float32);
  std::vector<Buffer> terms, grad_terms;
  Series series{};
  series.count = count, series.active = c.active, series.type = c.terms_type;
  series.gates = c.gates ? reinterpret_cast<const float*>(gates.memory.get()) : nullptr;
  SeriesGradient gradient{};
  for (int i = 0; i < count; i++) {
    series.group_sizes[i] = c.group_sizes[i];
    terms.push_back(
        drawn(static_cast<int64_t>(c.out_channels) * c.group_sizes[i] * 9, c.terms_type));
    grad_terms.emplace_back(terms.back().bytes);
    series.terms[i] = c.gates ? terms.back().memory.get() : nullptr;
    gradient.terms[i] = grad_terms.back().memory.get();
  }
  const Job job{Operation::weight_grad, c.type, geometry, series, device};
  Buffer grad_gates(count * sizeof(float)), scratch(weight_grad_scratch_bytes(job));
  gradient.gates = c.gates ? reinterpret_cast<float*>(grad_gates.memory.get()) : nullptr;

  std::vector<std::vector<char>> results[2];
  for (int schedule = 0; schedule < 2; schedule++) {
    scratch.poison();
    grad_gates.poison();
    for (Buffer& term : grad_terms) term.poison();
    emulator::schedule = {static_cast<uint32_t>(pick(1, 1 << 30)), schedule == 0, schedule == 0};
    if (schedule == 0) emulator::launched.clear();
    // One pass at a time, which is both; in between, what the first has read is what was planned.
    int ran = by_model;
    check(weight_grad(job, grad.memory.get(), input.memory.get(), gradient, scratch.memory.get(), 1,
                      ran) == 0,
          "the launcher failed");
    const double read = static_cast<double>(emulator::bytes_read(input.memory.get()) +
                                            emulator::bytes_read(grad.memory.get()));
    int chosen = by_model;
    const double planned = weight_grad_plans(job, chosen)[ran].read_bytes;
    check(chosen == ran && read == planned,
          "read " + std::to_string(read) + " bytes, planned " + std::to_string(planned));
    check(weight_grad(job, grad.memory.get(), input.memory.get(), gradient, scratch.memory.get(), 2,
                      ran) == 0,
          "the launcher failed");
    for (const Buffer& term : grad_terms)
      results[schedule].emplace_back(term.memory.get(), term.memory.get() + term.bytes);
    results[schedule].emplace_back(grad_gates.memory.get(),
                                   grad_gates.memory.get() + grad_gates.bytes);
  }
  check(results[0] == results[1], "values wrong: two schedules gave different bits");

  // dW and the sum of its products' absolute values, to which rounding errors are proportional.
  std::vector<double> in_values(input.bytes / bytes_of(c.type)),
      grad_values(grad.bytes / bytes_of(c.type));
  for (size_t i = 0; i < in_values.size(); i++)
    in_values[i] = as_multiplied(get(input, i, c.type), c.type);
  for (size_t i = 0; i < grad_values.size(); i++)
    grad_values[i] = as_multiplied(get(grad, i, c.type), c.type);
  const int group_outputs = c.out_channels / (c.in_channels / size);
  std::vector<double> sum(static_cast<size_t>(c.out_channels) * size * 9), absolute(sum.size());
  for (int n = 0; n < c.images; n++)
    for (int y = 0; y < out_h; y++)
      for (int x = 0; x < out_w; x++)
        for (int kh = 0; kh < 3; kh++)
          for (int kw = 0; kw < 3; kw++) {
            const int h = y * c.stride + kh - 1, w = x * c.stride + kw - 1;
            if (h < 0 || w < 0 || h >= c.h || w >= c.w) continue;
            const double* of_grad =
                &grad_values[((static_cast<size_t>(n) * out_h + y) * out_w + x) * c.out_channels];
            const double* of_input =
                &in_values[((static_cast<size_t>(n) * c.h + h) * c.w + w) * c.in_channels];
            for (int o = 0; o < c.out_channels; o++)
              for (int k = 0; k < size; k++) {
                const double product = of_grad[o] * of_input[o / group_outputs * size + k];
                const size_t at =
                    ((kh * 3 + kw) * static_cast<size_t>(c.out_channels) + o) * size + k;
                sum[at] += product;
                absolute[at] += std::fabs(product);
              }
          }
  const double rounding = 0x1p-21;  // of float32 sums; measured are at most 2⁻²³
  const double term_rounding = c.terms_type == Type::bfloat16  ? 0x1p-8
                               : c.terms_type == Type::float16 ? 0x1p-11
                                                               : 0x1p-24;
  for (int i = 0; i < count; i++) {
    const int own = c.group_sizes[i];
    double gate_gradient = 0, gate_absolute = 0;
    const double gate = c.gates ? get(gates, i, Type::float32) : 1;
    for (int o = 0; o < c.out_channels; o++)
      for (int k = 0; k < own; k++)
        for (int tap = 0; tap < 9; tap++) {
          const int64_t at = (static_cast<int64_t>(o) * own + k) * 9 + tap;
          const double got = get(grad_terms[i], at, c.terms_type);
          if (i >= c.active) {
            check(got == 0 && !std::signbit(got), "values wrong: term " + std::to_string(i) +
                                                      " is inactive, its gradient is " +
                                                      std::to_string(got));
            continue;
          }
          // Ψ, written without block_start: the group of this term's that output o is in, seen from
          // the group of the sum's.
          const int inner = size / own, inner_outputs = group_outputs / inner;
          const size_t from = (tap * static_cast<size_t>(c.out_channels) + o) * size +
                              o % group_outputs / inner_outputs * own + k;
          const double right = gate * sum[from];
          const double allowed = std::fabs(gate) * absolute[from] * rounding +
                                 std::fabs(right) * term_rounding + 0x1p-24;
          check(std::fabs(got - right) <= allowed,
                "values wrong: term " + std::to_string(i) + "[" + std::to_string(o) + ", " +
                    std::to_string(k) + ", tap " + std::to_string(tap) + "]: got " +
                    std::to_string(got) + ", right is " + std::to_string(right));
          const double value = get(terms[i], at, c.terms_type);
          gate_gradient += sum[from] * value;
          gate_absolute += absolute[from] * std::fabs(value);
        }
    if (c.gates) {
      const double got = get(grad_gates, i, Type::float32);
      check(std::fabs(got - gate_gradient) <= gate_absolute * rounding,
            "values wrong: gate " + std::to_string(i) + ": got " + std::to_string(got) +
                ", right is " + std::to_string(gate_gradient));
    }
  }
  const emulator::Counters& first = emulator::launched[0];
  const emulator::Traffic& matrices = first.of[emulator::matrix_read];
  check(matrices.units == matrices.instructions, "bank conflicts of matrix reads");
  const double tensors = static_cast<double>(input.bytes + grad.bytes),
               written = first.of[emulator::global_write].units * 32.0;
  return {first.of[emulator::global_read].bytes / tensors,
          first.of[emulator::global_read].units * 32.0 / tensors,
          (written + emulator::launched[1].of[emulator::global_read].units * 32.0) / tensors,
          first.shared_wavefronts() * 128.0 / tensors};
}

int cases = 0;
Counts passes(const Case& c) {
  cases++;
  try {
    return run(c);
  } catch (const std::exception& e) {
    std::printf("FAILED %s: %s\n", name_of(c).c_str(), e.what());
    std::exit(1);
  }
}

// Every kernel: narrow and wide packings, rows that end with half a product, and others; strips,
// images side by side, gates.
void kernels(Type type, int stride) {
  const Type tf = Type::float32;
  passes({type, type, 1, 32, 32, 5, 56, stride, {1, 2, 4, 8, 16}, 4, true, 1});
  passes({type, tf, 3, 16, 16, 3, 7, stride, {4, 16}, 2, true});
  passes({type, type, 1, 32, 32, 4, 56, stride, {32}, 1, false});
  passes({type, tf, 1, 64, 64, 3, 9, stride, {1, 64}, 2, true, 1});
}

void corners(Type type, int stride) {
  const Type tf = Type::float32;
  // Every packing: groups of 1 to 64 with their nesting, inactive terms, gates.
  passes({type, type, 1, 64, 64, 9, 56, stride, {1, 2, 4, 8, 16}, 5, true, 1});
  passes({type, tf, 2, 64, 64, 5, 57, stride, {4, 16, 32}, 2, true});
  passes({type, type, 1, 64, 64, 6, 28, stride, {8, 32}, 2, false});
  passes({type, tf, 1, 128, 128, 3, 12, stride, {1, 16, 64}, 3, true, 1});
  if (type == Type::float16) return;  // its kernels differ from bfloat16's in one instruction
  passes({type, type, 2, 32, 32, 5, 32, stride, {1, 2, 8, 32}, 1, true, 3});
  passes({type, type, 3, 16, 16, 4, 16, stride, {16}, 1, false});
  passes({type, type, 2, 8, 8, 5, 9, stride, {1, 4}, 2, true});
  // Images side by side, with and without gaps in the products, more of them than fit, and fewer.
  for (int w : {1, 2, 4, 7, 8, 14, 16, 32})
    passes({type, type, w < 4 ? 70 : w < 14 ? 21 : 9, 16, 16, 3, w, stride, {2, 8}, 2, true});
  passes({type, type, 2, 16, 16, 7, 7, stride, {4}, 1, true});
  passes({type, type, 9, 64, 64, 14, 14, stride, {16}, 1, false, 4});
  // Strips of wide images, the last one narrower; single rows and columns; more teams than rows.
  passes({type, type, 2, 16, 16, 3, 150, stride, {4}, 1, true});
  passes({type, type, 1, 16, 16, 1, 1, stride, {16}, 1, true, 4});
  passes({type, type, 2, 16, 16, 1, 65, stride, {2, 16}, 2, true, 4});
  passes({type, type, 2, 16, 16, 2, 3, stride, {2, 16}, 2, true, 4});
  passes({type, type, 5, 64, 64, 2, 5, stride, {64}, 1, true, 8});
  // Unequal widths and sizes that are no powers of two.
  passes({type, type, 1, 32, 128, 3, 12, stride, {2, 4}, 2, true});
  passes({type, tf, 1, 128, 32, 4, 12, stride, {4, 16}, 2, true});
  passes({type, type, 1, 64, 8, 4, 12, stride, {8, 32}, 2, true});
  passes({type, type, 1, 24, 24, 4, 12, stride, {1, 3}, 2, true});
  passes({type, type, 1, 112, 112, 2, 9, stride, {7, 14, 28, 56}, 3, true});
  passes({type, tf, 1, 112, 112, 2, 9, stride, {1, 7, 56}, 3, true});
  passes({type, type, 1, 120, 120, 2, 9, stride, {5, 15}, 2, true});
  passes({type, type, 1, 72, 72, 2, 9, stride, {3, 9}, 2, true});
  passes({type, type, 1, 88, 176, 2, 9, stride, {11}, 1, true});
  passes({type, type, 1, 264, 264, 2, 6, stride, {3, 33}, 2, true});
  // Devices with 99 KB of shared memory.
  passes({type, type, 1, 64, 64, 4, 56, stride, {16}, 1, false, 1, 99 * 1024});
  passes({type, type, 1, 64, 64, 3, 12, stride, {64}, 1, false, 1, 99 * 1024});
}

void refusals() {
  const Geometry geometry{1, 64, 64, 8, 8, 8, 8, 16, 1};
  const Device device{80, 4, 99 * 1024};
  const auto refused = [](Type type, Type terms, const Geometry& geometry, const Device& device,
                          const char* what) {
    if (!supports_weight_grad(type, terms, geometry, device)) return;
    std::printf("FAILED: %s is not refused\n", what);
    std::exit(1);
  };
  check(supports_weight_grad(Type::bfloat16, Type::float32, geometry, device),
        "refused what is served");
  refused(Type::float64, Type::float64, geometry, device, "float64");
  refused(Type::bfloat16, Type::float16, geometry, device, "terms of the other 16-bit type");
  refused(Type::bfloat16, Type::bfloat16, geometry, {75, 4, 99 * 1024}, "capability 7.5");
  refused(Type::bfloat16, Type::bfloat16, geometry, {90, 4, 16 * 1024},
          "a device with 16 KB of shared memory");
  refused(Type::bfloat16, Type::bfloat16, {1, 60, 60, 8, 8, 8, 8, 15, 1}, device,
          "a pixel that is no multiple of 16 bytes");
  refused(Type::bfloat16, Type::bfloat16, {1, 128, 128, 8, 8, 8, 8, 128, 1}, device,
          "groups of 128");
  refused(Type::bfloat16, Type::bfloat16, {1, 64, 64, 8, 8, 3, 3, 16, 3}, device, "stride 3");
}

// Channels of `groups` groups with sizes that nest, as many of both kinds as whole chunks need.
void random_cases(int count) {
  for (int i = 0; i < count; i++) {
    Case c{};
    c.type = static_cast<Type>(pick(0, 2));
    c.terms_type = pick(0, 1) ? Type::float32 : c.type;
    const int chunk = chunk_channels(c.type), size = pick(0, 3) ? 1 << pick(0, 6) : pick(1, 64);
    int outputs = pick(0, 2) ? size : pick(1, 24), groups = pick(1, 3);
    while (groups * size % chunk || groups * outputs % chunk) groups++;
    for (int s = 1; s <= size; s++)
      if (size % s == 0 && outputs % (size / s) == 0 && (s == size || pick(0, 1)))
        if (c.group_sizes.empty() || s % c.group_sizes.back() == 0) c.group_sizes.push_back(s);
    if (c.group_sizes.back() != size) c.group_sizes = {size};
    c.active = pick(1, static_cast<int>(c.group_sizes.size()));
    c.in_channels = groups * size, c.out_channels = groups * outputs;
    c.images = pick(1, 6), c.h = pick(1, 9), c.w = pick(0, 3) ? pick(1, 20) : pick(21, 140),
    c.stride = pick(1, 2);
    if (c.in_channels * c.out_channels > 200 * 200)
      c.images = 1, c.h = pick(1, 4), c.w = pick(1, 20);
    c.gates = pick(0, 1);
    c.multiprocessors = pick(1, 6);
    const Geometry g{
        c.images, c.in_channels, c.out_channels, c.h, c.w, 1, 1, c.group_sizes[c.active - 1],
        c.stride};
    if (!supports_weight_grad(c.type, c.terms_type, g, {90, 2, c.shared_bytes})) {
      check(c.group_sizes[c.active - 1] >
                8 * c.out_channels * c.group_sizes[c.active - 1] / c.in_channels,
            "unsupported " + name_of(c));
      continue;
    }
    passes(c);
  }
}

// Layers of the benchmarks, with as many rows for a multiprocessor as a batch of 256 has on 132 of
// them (64 channels at 14×14 stand for 256 on a quarter of the device), and the sizes of other
// widths that nest worst.
void traffic() {
  struct Layer {
    int channels, h, images, multiprocessors, stride;
    std::vector<int> sizes;
    double most;
  };
  const std::vector<int> powers{1, 2, 4, 8, 16, 32};
  for (const Layer& layer : {Layer{64, 112, 1, 1, 1, {16}, 1.3},
                             {64, 56, 8, 4, 1, powers, 1.3},
                             {64, 56, 4, 2, 2, {4, 16, 32}, 1.3},
                             {112, 56, 4, 4, 1, {7, 14, 28}, 1.3},
                             {120, 56, 4, 4, 1, {15}, 1.3},
                             {168, 56, 2, 4, 1, {21}, 1.3},
                             {64, 28, 4, 2, 1, {4, 16, 32}, 1.6},
                             {64, 14, 16, 2, 1, powers, 1.6},
                             {64, 14, 16, 2, 2, {4, 16, 32}, 1.6},
                             {112, 14, 16, 4, 1, {7, 14, 28}, 1.6}})
    for (int size : layer.sizes) {
      const Counts counts = passes({Type::bfloat16,
                                    Type::bfloat16,
                                    layer.images,
                                    layer.channels,
                                    layer.channels,
                                    layer.h,
                                    layer.h,
                                    layer.stride,
                                    {size},
                                    1,
                                    false,
                                    layer.multiprocessors});
      std::printf(
          "%3d channels, %3d×%-3d stride %d, groups of %2d: %.3f × the tensors' bytes (in sectors "
          "%.3f), %.3f for the sums between "
          "the passes; shared memory %.1f\n",
          layer.channels, layer.h, layer.h, layer.stride, size, counts.first_pass, counts.sectors,
          counts.scratch, counts.shared);
      if (counts.first_pass > layer.most) {
        std::printf("FAILED: more than %.1f\n", layer.most);
        std::exit(1);
      }
    }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc == 2 ? argv[1] : "";
  const Type types[] = {Type::bfloat16, Type::float16, Type::float32};
  if (what == "kernels" || what == "numerics") {
    for (Type type : types)
      for (int stride : {1, 2}) kernels(type, stride);
    refusals();
    if (what == "numerics") {
      for (Type type : types)
        for (int stride : {1, 2}) corners(type, stride);
      random_cases(40);
    }
  } else if (what == "traffic") {
    traffic();
  } else {
    std::printf("accepted are kernels, numerics and traffic\n");
    return 2;
  }
  std::printf("passed: %d cases\n", cases);
}
