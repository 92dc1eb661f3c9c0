// The forward and the input gradient on the host's emulator, against plain loops in double
// precision.
//   test_convolution numerics|faults|traffic|conflicts
#include "../../csrc/cuda/convolution_plan.h"

#if defined(ONE_TYPE)  // four seconds less to compile for each of the others
namespace gross::cuda {
template <>
int launch_march<Type::float16>(const Plan&, const Device&, Stream) {
  return unserved;
}
template <>
int launch_march<Type::float32>(const Plan&, const Device&, Stream) {
  return unserved;
}
}  // namespace gross::cuda
#else
#include "../../csrc/cuda/convolution_float16.cu"
#include "../../csrc/cuda/convolution_float32.cu"
#endif

#include "../../csrc/cuda/convolution.cu"
#include "../../csrc/cuda/convolution_bfloat16.cu"
#include "../../csrc/cuda/wide.cu"

#include <cmath>
#include <thread>

using namespace gross::cuda;

namespace {

std::mt19937 generator(7);
double random_value() { return static_cast<double>(generator() % 20001) / 10000 - 1; }

template <class T>
struct Aligned {  // as memory of a device, and of exactly the size that is needed
  using value_type = T;
  Aligned() = default;
  template <class U>
  explicit Aligned(const Aligned<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{256}));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{256}); }
  friend bool operator==(const Aligned&, const Aligned&) { return true; }
  friend bool operator!=(const Aligned&, const Aligned&) { return false; }
};

// Numbers of a type; they go in rounded to it.
struct Numbers {
  Type type;
  std::vector<uint8_t, Aligned<uint8_t>> bytes;
  Numbers(Type type, size_t count) : type(type), bytes(count * bytes_of(type), 0xff) {}
  size_t size() const { return bytes.size() / bytes_of(type); }
  void put(size_t i, double value) {
    const float narrow = static_cast<float>(value);
    if (type == Type::float32) {
      std::memcpy(&bytes[4 * i], &narrow, 4);
    } else {
      const uint16_t half =
          static_cast<uint16_t>(type == Type::float16 ? round_half<Type::float16>(narrow)
                                                      : round_half<Type::bfloat16>(narrow));
      std::memcpy(&bytes[2 * i], &half, 2);
    }
  }
  double at(size_t i) const {
    if (type == Type::float32) {
      float value;
      std::memcpy(&value, &bytes[4 * i], 4);
      return value;
    }
    uint16_t half;
    std::memcpy(&half, &bytes[2 * i], 2);
    return type == Type::float16 ? low_half<Type::float16>(half) : low_half<Type::bfloat16>(half);
  }
};

struct Case {
  Type type, terms_type;
  int images, in_channels, out_channels, height, width, stride;
  std::vector<int> sizes;
  bool transposed;
  Device device{90, 2, 227 * 1024};
};

std::string label(const Case& c) {
  std::string sizes;
  for (int s : c.sizes) sizes += (sizes.empty() ? "" : ",") + std::to_string(s);
  const char* names[] = {"float16", "bfloat16", "float32"};
  return std::string(names[static_cast<int>(c.type)]) + " terms " +
         names[static_cast<int>(c.terms_type)] + " " + std::to_string(c.images) + "x" +
         std::to_string(c.in_channels) + "->" + std::to_string(c.out_channels) + "@" +
         std::to_string(c.height) + "x" + std::to_string(c.width) + "/" + std::to_string(c.stride) +
         " sizes " + sizes + (c.transposed ? " input gradient" : "");
}

struct Result {
  Plan plan;
  emulator::Counters counted;
  double compulsory;  // bytes: source, destination and active terms, once each
};

int failures = 0;
bool stop_at_failure = false;
void expect(bool condition, const std::string& what) {
  if (condition) return;
  failures++;
  printf("FAILED %s\n", what.c_str());
  if (stop_at_failure) exit(1);
}

// Runs a case under the plan that the launcher would choose among those that `accept` takes, and
// checks every value.
template <class Accept>
Result check(const Case& c, const Accept& accept, emulator::Schedule schedule = {}) {
  const int out_h = (c.height - 1) / c.stride + 1, out_w = (c.width - 1) / c.stride + 1;
  const Geometry g{c.images, c.in_channels, c.out_channels, c.height, c.width,
                   out_h,    out_w,         c.sizes.back(), c.stride};
  const size_t in_count = static_cast<size_t>(c.images) * c.height * c.width * c.in_channels;
  const size_t out_count = static_cast<size_t>(c.images * g.out_h * g.out_w * c.out_channels);
  Numbers source(c.type, c.transposed ? out_count : in_count),
      destination(c.type, c.transposed ? in_count : out_count);
  for (size_t i = 0; i < source.size(); i++) source.put(i, random_value());
  std::vector<Numbers> terms;
  std::vector<float> gates;
  Series series{};
  series.count = series.active = static_cast<int>(c.sizes.size());
  series.type = c.terms_type;
  for (int s : c.sizes) {
    terms.emplace_back(c.terms_type, static_cast<size_t>(c.out_channels) * s * 9);
    for (size_t i = 0; i < terms.back().size(); i++) terms.back().put(i, random_value());
    gates.push_back(static_cast<float>(random_value()));
  }
  double compulsory = static_cast<double>(source.bytes.size() + destination.bytes.size());
  for (size_t i = 0; i < terms.size(); i++) {
    series.terms[i] = terms[i].bytes.data();
    series.group_sizes[i] = c.sizes[i];
    compulsory += static_cast<double>(terms[i].bytes.size());
  }
  series.gates = gates.data();

  Result result{};
  result.compulsory = compulsory;
  const Operation operation = c.transposed ? Operation::input_grad : Operation::forward;
  expect(supports_convolution(operation, c.type, c.terms_type, g, c.device),
         label(c) + ": not supported");
  const Job job{operation, c.type, g, series, c.device};
  for (const Plan& plan :
       march_plans(c.type, g, active_terms(series, g, c.type), c.transposed, c.device))
    if (accept(plan) && (result.plan.clocks == 0 || plan.clocks < result.plan.clocks))
      result.plan = plan;
  if (result.plan.clocks == 0) {
    expect(false, label(c) + ": no plan");
    return result;
  }
  const Plan& plan = result.plan;
  const std::string text = label(c) + " [steps " + std::to_string(plan.steps) + " atoms " +
                           std::to_string(plan.atoms) + " tiles " +
                           std::to_string(plan.problem.tile.tiles) + " teams " +
                           std::to_string(plan.problem.tile.teams) + " stages " +
                           std::to_string(plan.problem.tile.stages) + " columns " +
                           std::to_string(plan.problem.tile.columns) + " images " +
                           std::to_string(plan.problem.tile.images) + " grid " +
                           std::to_string(plan.grid_x) + "x" + std::to_string(plan.grid_y) + "]";
  expect(static_cast<int>(plan.problem.tile.shared_bytes) <= c.device.shared_bytes,
         text + ": too much shared memory");
  emulator::schedule = schedule;
  try {
    gross::cuda::run(job, plan, source.bytes.data(), destination.bytes.data());
  } catch (const emulator::Error& e) {
    expect(false, text + ": " + e.what());
    return result;
  }
  result.counted = emulator::launched.back();

  // The weight at the last size, in double precision.
  const int top = c.sizes.back(), group_outputs = c.out_channels * top / c.in_channels;
  std::vector<double> weight(static_cast<size_t>(c.out_channels) * top * 9);
  for (int o = 0; o < c.out_channels; o++)
    for (size_t i = 0; i < c.sizes.size(); i++) {
      const int s = c.sizes[i],
                from = o / (c.out_channels * s / c.in_channels) * s - o / group_outputs * top;
      for (int k = 0; k < s * 9; k++)
        weight[(static_cast<size_t>(o) * top + from) * 9 + k] +=
            static_cast<double>(gates[i]) * terms[i].at(static_cast<size_t>(o) * s * 9 + k);
    }
  std::vector<double> sum(destination.size()), magnitude(destination.size());
  for (int n = 0; n < c.images; n++)
    for (int p = 0; p < g.out_h; p++)
      for (int q = 0; q < g.out_w; q++)
        for (int kh = 0; kh < 3; kh++)
          for (int kw = 0; kw < 3; kw++) {
            const int h = p * c.stride + kh - 1, w = q * c.stride + kw - 1;
            if (h < 0 || w < 0 || h >= c.height || w >= c.width) continue;
            for (int o = 0; o < c.out_channels; o++) {
              const size_t out =
                  ((static_cast<size_t>(n) * g.out_h + p) * g.out_w + q) * c.out_channels + o;
              for (int k = 0; k < top; k++) {
                const size_t in =
                    ((static_cast<size_t>(n) * c.height + h) * c.width + w) * c.in_channels +
                    o / group_outputs * top + k;
                const double product = source.at(c.transposed ? out : in) *
                                       weight[(static_cast<size_t>(o) * top + k) * 9 + kh * 3 + kw];
                sum[c.transposed ? in : out] += product;
                magnitude[c.transposed ? in : out] += std::fabs(product);
              }
            }
          }
  // One rounding of each weight and one of the result; with TF32 also of the source. Sums are
  // float32: 2⁻²⁴ a product.
  const double unit = c.type == Type::float16    ? 0x1p-11
                      : c.type == Type::bfloat16 ? 0x1p-8
                                                 : 0x1p-24;
  const double factor = c.type == Type::float32 ? 0x1p-10 : unit;
  size_t wrong = 0;
  double worst = 0;
  for (size_t i = 0; i < sum.size(); i++) {
    const double accepted =
        unit * std::fabs(sum[i]) + (1.01 * factor + 9 * 128 * 0x1p-24) * magnitude[i] + 1e-7;
    const double error = std::fabs(destination.at(i) - sum[i]);
    if (!(error <= accepted)) wrong++;
    if (!(error / accepted <= worst)) worst = error / accepted;
  }
  expect(wrong == 0, text + ": " + std::to_string(wrong) + " of " + std::to_string(sum.size()) +
                         " values wrong, worst " + std::to_string(worst));
  expect(result.counted.of[emulator::global_write].bytes == destination.bytes.size(),
         text + ": not every value written once");
  const double read = static_cast<double>(emulator::bytes_read(source.bytes.data()));
  expect(read == read_bytes(plan), text + ": read " + std::to_string(read) +
                                       " bytes of the source, planned " +
                                       std::to_string(read_bytes(plan)));
  printf("%s: %.2f of the accepted error, %.2f x compulsory traffic\n", text.c_str(), worst,
         static_cast<double>(result.counted.global_bytes()) / compulsory);
  return result;
}

// A plan of exactly this shape; 0 leaves a number open.
struct Wanted {
  int steps, atoms, tiles, teams, images;
  bool operator()(const Plan& plan) const {
    const Tile& t = plan.problem.tile;
    const auto is = [](int wanted, int got) { return wanted == 0 || wanted == got; };
    return is(steps, plan.steps) && is(atoms, plan.atoms) && is(tiles, t.tiles) &&
           is(teams, t.teams) && is(images, t.images);
  }
};

const auto any_plan = [](const Plan&) { return true; };

// Both directions, one with copies that land at once and one with copies that land late: by turns,
// and the order of warps differs.
template <class Accept>
void check_all(Case c, const Accept& accept) {
  static uint32_t seed = 0;
  seed++;
  for (bool transposed : {false, true}) {
    c.transposed = transposed;
    check(c, accept, {seed, (seed % 2 == 0) == transposed});
  }
}

// What other kernels must serve.
void refusals() {
  const Device large{90, 132, 227 * 1024};
  const auto served = [](Type type, Type terms, int in, int out, int size, int stride,
                         const Device& device) {
    const Geometry g{1, in, out, 9, 9, (9 - 1) / stride + 1, (9 - 1) / stride + 1, size, stride};
    const bool forward = supports_convolution(Operation::forward, type, terms, g, device);
    return forward && supports_convolution(Operation::input_grad, type, terms, g, device);
  };
  constexpr Type f16 = Type::float16, f32 = Type::float32, f64 = Type::float64;
  expect(served(f16, f32, 64, 64, 16, 1, large), "16 is served");
  expect(served(f16, f16, 64, 64, 16, 1, {120, 170, 99 * 1024}), "16 is served with 99 KB");
  expect(!served(f16, f16, 64, 64, 16, 1, {75, 40, 64 * 1024}), "no bfloat16 before 8.0");
  expect(!served(f16, f16, 64, 64, 16, 1, {90, 132, 16 * 1024}), "too little shared memory");
  expect(!served(f16, f16, 64, 64, 16, 3, large), "stride 3");
  expect(!served(f64, f64, 64, 64, 16, 1, large), "float64");
  expect(!served(f32, f16, 64, 64, 16, 1, large), "terms narrower than images");
  expect(!served(f16, f16, 60, 60, 12, 1, large), "half pieces of 16 bytes");
  expect(!served(f16, f16, 224, 224, 56, 1, large), "seven products in k");
  expect(!served(f16, f16, 256, 256, 128, 1, large), "groups of 128");
  expect(!served(f32, f32, 64, 64, 64, 1, large), "eight products in k");
}

// Several threads ask for plans of the same kinds: each kind is planned once, and every answer is
// its own.
void plans_are_made_once() {
  Plans<int64_t> plans;
  std::atomic<int> made{0}, wrong{0};
  constexpr int kinds = 500, rounds = 4;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; t++)
    threads.emplace_back([&, t] {
      for (int i = 0; i < kinds * rounds; i++) {
        Job job{};
        job.geometry.in_w = (i * 7 + t) % kinds;
        int64_t plan = -1;
        plans.get(plan, job, [&](int64_t& to) {
          made++;
          to = job.geometry.in_w;
          return true;
        });
        if (plan != job.geometry.in_w) wrong++;
      }
    });
  for (std::thread& each : threads) each.join();
  expect(made == kinds && wrong == 0,
         "plans: " + std::to_string(made) + " made, " + std::to_string(wrong) + " wrong");
}

void numerics() {
  refusals();
  plans_are_made_once();
  constexpr Type f16 = Type::float16, bf16 = Type::bfloat16, f32 = Type::float32;
  const std::vector<int> to8{2, 8}, to16{1, 2, 4, 8, 16}, to32{1, 4, 8, 16, 32},
      to64{4, 16, 32, 64};
  // Every kernel: steps, atoms, one image or several; types of images and terms by turns.
  check_all({bf16, bf16, 1, 64, 64, 5, 56, 1, to16, false}, Wanted{1, 7, 4, 2, 1});
  check_all({f16, f32, 9, 64, 64, 3, 14, 1, to16, false}, Wanted{1, 7, 4, 3, 4});
  check_all({f16, f16, 1, 64, 64, 4, 32, 1, to8, false}, Wanted{1, 4, 4, 4, 1});
  check_all({bf16, f32, 9, 64, 64, 7, 7, 1, to16, false}, Wanted{1, 4, 4, 2, 4});
  check_all({bf16, f32, 1, 64, 64, 4, 56, 1, to32, false}, Wanted{2, 7, 4, 2, 1});
  check_all({f16, f16, 5, 64, 64, 4, 14, 1, to32, false}, Wanted{2, 7, 4, 2, 4});
  check_all({f16, f16, 1, 64, 64, 4, 28, 1, to32, false}, Wanted{2, 4, 4, 3, 1});
  check_all({bf16, bf16, 5, 64, 64, 4, 8, 1, to32, false}, Wanted{2, 4, 4, 2, 4});
  check_all({f16, f16, 1, 64, 64, 4, 28, 1, to64, false}, Wanted{4, 4, 4, 2, 1});
  check_all({bf16, bf16, 5, 128, 128, 4, 8, 1, to64, false}, Wanted{4, 4, 4, 2, 4});
  check_all({bf16, f32, 2, 64, 64, 4, 9, 1, to64, false}, Wanted{4, 4, 4, 1, 0});
  check_all({f32, f32, 1, 32, 32, 3, 112, 1, {2, 4, 8}, false}, Wanted{2, 7, 2, 0, 1});
  check_all({f32, f32, 5, 64, 64, 3, 8, 1, {1, 8}, false}, Wanted{2, 4, 4, 0, 4});
  check_all({f32, f32, 2, 64, 64, 3, 20, 1, to16, false}, Wanted{2, 7, 4, 0, 2});
  check_all({f32, f32, 1, 64, 64, 3, 32, 1, to16, false}, Wanted{2, 4, 4, 0, 1});
  check_all({f32, f32, 3, 64, 64, 3, 16, 1, to32, false}, Wanted{4, 4, 2, 0, 3});
  check_all({f32, f32, 1, 64, 64, 3, 30, 1, to32, false}, Wanted{4, 4, 4, 0, 1});
  // Slabs of 32 and 16 channels, warps side by side along the pixels.
  check_all({bf16, bf16, 1, 32, 32, 4, 100, 1, to16, false}, Wanted{1, 7, 2, 3, 1});
  check_all({f16, f16, 9, 32, 32, 3, 16, 1, to8, false}, Wanted{1, 4, 2, 4, 4});
  check_all({bf16, bf16, 1, 16, 16, 3, 200, 1, to8, false}, Wanted{1, 7, 1, 3, 1});
  check_all({bf16, f32, 30, 16, 16, 2, 7, 1, {1}, false}, Wanted{1, 4, 1, 2, 18});
  check_all({bf16, bf16, 1, 8, 8, 3, 9, 1, {1, 2, 4, 8}, false}, any_plan);
  check_all({f32, f32, 2, 4, 4, 3, 9, 1, {1, 2, 4}, false}, any_plan);
  // Widths that are no multiple of a slab, wide images in several tiles, maps of one column, of one
  // row, fewer rows than teams.
  check_all({bf16, bf16, 1, 96, 96, 3, 61, 1, to16, false}, any_plan);
  check_all({bf16, bf16, 1, 64, 64, 3, 150, 1, to16, false}, Wanted{1, 7, 4, 3, 1});
  check_all({bf16, bf16, 30, 64, 64, 3, 1, 1, to16, false}, Wanted{1, 7, 4, 0, 30});
  check_all({f16, f16, 3, 64, 64, 1, 9, 1, to16, false}, Wanted{1, 7, 4, 3, 0});
  check_all({f16, f16, 1, 64, 64, 1, 1, 1, to16, false}, Wanted{1, 7, 4, 3, 1});
  check_all({bf16, bf16, 60, 64, 64, 2, 2, 1, {1}, false}, Wanted{1, 7, 4, 0, 28});
  // Odd group sizes, groups that lie across tiles, unequal widths.
  check_all({bf16, bf16, 1, 48, 48, 3, 20, 1, {3}, false}, any_plan);
  check_all({f16, f32, 1, 120, 120, 3, 20, 1, {1, 3, 15}, false}, any_plan);
  check_all({bf16, bf16, 2, 80, 80, 3, 20, 1, {5}, false}, any_plan);
  check_all({f16, f16, 1, 112, 112, 3, 15, 1, {7, 14, 28}, false}, any_plan);
  check_all({bf16, f32, 1, 72, 72, 3, 20, 1, {3, 9}, false}, any_plan);
  check_all({bf16, bf16, 1, 88, 88, 3, 20, 1, {11}, false}, any_plan);
  check_all({f32, f32, 1, 24, 24, 3, 20, 1, {1, 3}, false}, any_plan);
  check_all({bf16, bf16, 1, 96, 96, 3, 20, 1, {6, 12, 48}, false}, any_plan);
  check_all({bf16, bf16, 1, 32, 64, 3, 30, 1, {1, 4, 8}, false}, any_plan);
  check_all({f16, f16, 1, 64, 32, 3, 30, 1, {2, 8, 16}, false}, any_plan);
  check_all({f16, f32, 2, 24, 72, 3, 10, 1, {1, 3}, false}, any_plan);
  check_all({f32, f32, 2, 16, 8, 3, 10, 1, {2}, false}, any_plan);
  check({bf16, bf16, 1, 64, 256, 3, 30, 1, {16, 64}, false}, any_plan);
  check_all({bf16, bf16, 1, 256, 64, 3, 30, 1, {4, 32}, false}, any_plan);
  // Stride 2: even and odd heights and widths, one image and several, every number of steps, shares
  // that begin inside images.
  check_all({bf16, bf16, 1, 64, 64, 9, 56, 2, to16, false}, Wanted{1, 4, 4, 0, 1});
  check_all({f16, f32, 2, 64, 64, 8, 111, 2, to8, false, {90, 4, 227 * 1024}},
            Wanted{1, 4, 4, 2, 1});
  check_all({bf16, bf16, 9, 64, 64, 7, 7, 2, to16, false}, Wanted{1, 4, 4, 0, 0});
  check_all({f16, f16, 5, 64, 64, 6, 16, 2, to8, false}, Wanted{1, 4, 4, 0, 4});
  check_all({bf16, bf16, 1, 32, 32, 5, 90, 2, to16, false}, Wanted{1, 4, 2, 0, 1});
  check_all({bf16, bf16, 9, 16, 16, 4, 30, 2, to16, false}, Wanted{1, 4, 1, 0, 0});
  check_all({bf16, f32, 1, 64, 64, 6, 20, 2, to32, false}, Wanted{2, 4, 4, 0, 1});
  check_all({f16, f16, 6, 64, 64, 5, 9, 2, to32, false}, Wanted{2, 4, 4, 0, 0});
  check_all({bf16, bf16, 1, 64, 64, 6, 21, 2, to64, false}, Wanted{4, 4, 0, 0, 1});
  check_all({f16, f16, 5, 64, 64, 5, 8, 2, to64, false}, Wanted{4, 4, 0, 0, 0});
  check_all({f32, f32, 1, 32, 32, 5, 30, 2, to16, false}, Wanted{2, 4, 0, 0, 1});
  check_all({f32, f32, 5, 32, 32, 5, 7, 2, {2, 4}, false}, Wanted{2, 4, 0, 0, 0});
  check_all({f32, f32, 1, 32, 32, 4, 19, 2, to32, false}, Wanted{4, 4, 0, 0, 1});
  check_all({f32, f32, 4, 32, 32, 4, 6, 2, to32, false}, Wanted{4, 4, 0, 0, 0});
  check_all({bf16, bf16, 5, 64, 64, 1, 1, 2, to16, false}, any_plan);
  check_all({bf16, bf16, 5, 64, 64, 2, 2, 2, to16, false}, any_plan);
  check_all({f16, f16, 3, 64, 64, 3, 1, 2, to16, false}, any_plan);
  check_all({bf16, bf16, 1, 96, 96, 5, 80, 2, {3, 6}, false}, any_plan);
  check_all({bf16, bf16, 2, 32, 64, 5, 30, 2, {1, 4, 8}, false}, any_plan);
  check_all({f16, f16, 2, 64, 32, 5, 30, 2, {2, 8, 16}, false}, any_plan);
  check_all({bf16, f32, 2, 64, 64, 9, 28, 2, to32, false, {89, 2, 99 * 1024}}, any_plan);
  check_all({bf16, bf16, 3, 128, 128, 9, 20, 2, to16, false, {90, 16, 227 * 1024}}, any_plan);
  // Devices with less shared memory, and less than one team a multiprocessor needs.
  check_all({bf16, f32, 2, 64, 64, 4, 56, 1, to16, false, {80, 2, 163 * 1024}}, any_plan);
  check_all({bf16, f32, 2, 64, 64, 4, 56, 1, to16, false, {89, 2, 99 * 1024}}, any_plan);
  check_all({bf16, f32, 2, 64, 64, 4, 28, 1, to32, false, {89, 2, 99 * 1024}}, any_plan);
  check_all({bf16, bf16, 9, 64, 64, 4, 7, 1, to64, false, {89, 2, 99 * 1024}}, any_plan);
  // Many blocks, whose shares begin and end inside images.
  check_all({bf16, bf16, 2, 128, 128, 9, 20, 1, to16, false, {90, 8, 227 * 1024}}, any_plan);
}

// A multiprocessor's part of a layer on a large GPU (132 of them, 256 images of 64 channels): it
// has one block, of one slab, and two images of 56×56 or eight of 14×14 (256 channels). Every
// access counts, whether or not a cache would have served it: terms once per block, rows at the
// edges of shares and columns at those of tiles twice. A few cases of one type that reach every
// part of the kernels: programs with a planted fault run them.
void faults() {
  stop_at_failure = true;
  constexpr Type bf16 = Type::bfloat16, f32 = Type::float32;
  const std::vector<int> to16{1, 2, 4, 8, 16}, to32{4, 32};
  check_all({bf16, bf16, 1, 64, 64, 9, 56, 1, to16, false}, Wanted{1, 7, 4, 2, 1});
  check_all({bf16, f32, 5, 64, 64, 9, 14, 1, to32, false}, Wanted{2, 4, 4, 2, 2});
  check_all({bf16, bf16, 1, 96, 96, 4, 61, 1, {3, 6}, false}, Wanted{2, 4, 4, 0, 0});
  check_all({bf16, bf16, 9, 64, 64, 17, 7, 2, to16, false}, Wanted{1, 4, 4, 0, 0});
  check_all({bf16, bf16, 1, 64, 64, 13, 30, 2, to16, false}, Wanted{1, 4, 4, 2, 1});
}

void traffic() {
  const auto multiple = [](int s) {
    return s % 8 == 0 ? s : s % 4 == 0 ? 2 * s : s % 2 == 0 ? 4 * s : 8 * s;
  };
  for (int s = 1; s <= 32; s++) {
    int channels = multiple(s);
    while (channels < 64) channels += multiple(s);
    if (s >= 29 && s <= 31) {  // five products in k: the Triton kernels serve them
      Geometry g{1, channels, channels, 56, 56, 56, 56, s, 1};
      expect(!supports_convolution(Operation::forward, Type::bfloat16, Type::bfloat16, g,
                                   {90, 132, 227 * 1024}),
             "size " + std::to_string(s) + " is served: count it");
      continue;
    }
    std::vector<int> sizes{s};
    if (s == 16) sizes = {1, 2, 4, 8, 16};
    if (s == 32) sizes = {1, 2, 4, 8, 16, 32};
    const Device device{90, divide_up(channels, 64), 227 * 1024};
    const auto within = [&](const Case& c, double most) {
      const Result result = check(c, any_plan);
      const double ratio = static_cast<double>(result.counted.global_bytes()) / result.compulsory;
      expect(ratio <= most, label(c) + ": " + std::to_string(ratio) + " times what must move");
      printf("  %.2f bytes of shared wavefronts per number written\n",
             128.0 * static_cast<double>(result.counted.shared_wavefronts()) /
                 (static_cast<double>(result.counted.of[emulator::global_write].bytes) / 2));
    };
    const bool transposed = s % 2 == 0;
    // Of groups of 20 three slabs of 32 of the 80 channels read some groups twice; two of 64, whose
    // second is three quarters empty, take a quarter longer by the model of a whole GPU.
    const double most = s == 20 ? 1.5 : 1.3;
    within({Type::bfloat16, Type::bfloat16, 2, channels, channels, 56, 56, 1, sizes, transposed,
            device},
           most);
    within({Type::bfloat16, Type::bfloat16, 8, channels, channels, 14, 14, 1, sizes, !transposed,
            device},
           1.6);
  }
  // Wider than a tile, and other widths of the benchmarks.
  const std::vector<int> sizes{1, 4, 16};
  for (bool transposed : {false, true})
    for (int width : {64, 112, 224}) {
      const Case c{Type::bfloat16, Type::float32,      1, 64, 64, 40, width, 1, sizes,
                   transposed,     {90, 1, 227 * 1024}};
      const Result result = check(c, any_plan);
      expect(static_cast<double>(result.counted.global_bytes()) <= 1.3 * result.compulsory,
             label(c) + ": more than 1.3 times what must move");
    }
}

// Conflicts of banks: while weights are assembled, as in test_wide.cpp, which is most of a march of
// one row; and in the steady march of the input gradient of stride 2.
void conflicts() {
  const auto without = [](const Case& c) {
    const emulator::Counters counted = check(c, any_plan).counted;
    for (emulator::Kind kind : {emulator::shared_read, emulator::shared_write, emulator::copy}) {
      const emulator::Traffic& of = counted.of[kind];
      const double ratio = static_cast<double>(of.units) / static_cast<double>(of.least);
      printf("  %d: %.2f times the wavefronts without conflicts, %llu\n", kind, ratio,
             static_cast<unsigned long long>(of.units));
      expect(ratio <= (kind == emulator::copy ? 1.15 : 1.05),
             label(c) + ": bank conflicts, " + std::to_string(ratio));
    }
  };
  constexpr Type bf16 = Type::bfloat16, f32 = Type::float32;
  const Device device{90, 1, 227 * 1024};
  for (bool transposed : {false, true}) {
    without({bf16, bf16, 1, 64, 64, 1, 8, 1, {1, 4, 16, 32, 64}, transposed, device});
    without({f32, f32, 1, 64, 64, 1, 8, 1, {1, 4, 16, 32}, transposed, device});
  }
  for (int channels : {32, 64})
    without({bf16, bf16, 1, channels, channels, 40, 112, 2, {16}, true, device});
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "numerics")
    numerics();
  else if (what == "traffic")
    traffic();
  else if (what == "conflicts")
    conflicts();
  else if (what == "faults")
    faults();
  else
    return 2;
  return failures > 0;
}
