// The kernels for warpgroups on the host's emulator, against the plain kernels, which the Python
// tests hold against float64.
//   test_wide numerics|quick|traffic|conflicts
#define GROSS_CUDA_WARP_GROUPS
#include "../../csrc/cuda/wide.cu"

#include "../../csrc/cuda/plain.cu"

using namespace gross::cuda;

namespace {

std::mt19937 generator(11);

struct Case {
  Type type, terms_type;
  int images, in_channels, out_channels, height, width;
  std::vector<int> sizes;
  bool transposed;
  int multiprocessors;
};

// Memory of exactly the size that is needed, aligned as a device's.
struct Numbers {
  Type type;
  size_t count;
  std::unique_ptr<void, void (*)(void*)> data;
  Numbers(Type type, size_t count, bool random)
      : type(type),
        count(count),
        data(std::aligned_alloc(64, (count * bytes_of(type) + 63) / 64 * 64), std::free) {
    for (size_t i = 0; i < count; i++)
      store(data.get(), i, type,
            random ? static_cast<double>(generator() % 2001) / 1000 - 1 : std::nan(""));
  }
  double at(size_t i) const { return load(data.get(), i, type); }
};

// Global bytes that moved, relative to those of both tensors; negative for wrong values, or where
// the plan counts other bytes of the source.
double run(const Case& c, emulator::Schedule schedule) {
  const int count = static_cast<int>(c.sizes.size());
  const Geometry g{c.images, c.in_channels, c.out_channels, c.height, c.width,
                   c.height, c.width,       c.sizes.back(), 1};
  const Operation operation = c.transposed ? Operation::input_grad : Operation::forward;
  const Device device{90, c.multiprocessors, 227 * 1024};
  std::vector<Numbers> terms;
  std::vector<float> gates;
  Series series{};
  for (int i = 0; i < count; i++) {
    terms.emplace_back(c.terms_type, static_cast<size_t>(c.out_channels) * c.sizes[i] * 9, true);
    gates.push_back(0.5f + 0.25f * i);
    series.terms[i] = terms[i].data.get();
    series.group_sizes[i] = c.sizes[i];
  }
  series.count = series.active = count;
  series.type = c.terms_type;
  series.gates = c.images % 2 ? nullptr : gates.data();
  const size_t pixels = static_cast<size_t>(c.images) * c.height * c.width;
  const size_t from = pixels * (c.transposed ? c.out_channels : c.in_channels),
               to = pixels * (c.transposed ? c.in_channels : c.out_channels);
  const Numbers source(c.type, from, true), result(c.type, to, false), expected(c.type, to, false);
  const Job job{operation, c.type, g, series, device};
  WidePlan best{};
  for (const WidePlan& plan : wide_plans(job))
    if (best.clocks == 0 || plan.clocks < best.clocks) best = plan;
  if (best.clocks == 0) return -1;
  best.problem.terms = active_terms(series, g, c.type);
  best.problem.source = source.data.get();
  best.problem.destination = result.data.get();
  emulator::schedule = schedule;
  allow(job, source.data.get(), result.data.get());
  launch_wide(best, c.type, device, nullptr);
  if (static_cast<double>(emulator::bytes_read(source.data.get())) != read_bytes(best)) return -1;
  (c.transposed ? plain::input_grad : plain::forward)(c.type, g, series, source.data.get(),
                                                      expected.data.get(), nullptr);
  double largest = 0, error = 0;
  for (size_t i = 0; i < to; i++) {
    largest = std::max(largest, std::abs(expected.at(i)));
    error = std::isnan(result.at(i)) ? INFINITY
                                     : std::max(error, std::abs(result.at(i) - expected.at(i)));
  }
  // Both round once; sums of up to 576 products in float32 may tip the rounding over.
  if (error > largest * (c.type == Type::float16 ? 0x1p-10 : 0x1p-7)) return -1;
  return static_cast<double>(emulator::launched.back().global_bytes()) /
         ((from + to) * bytes_of(c.type));
}

std::string name_of(const Case& c) {
  std::string sizes;
  for (int s : c.sizes) sizes += " " + std::to_string(s);
  return std::string(c.transposed ? "input gradient " : "forward ") +
         (c.type == Type::float16 ? "float16 " : "bfloat16 ") + std::to_string(c.images) + "x" +
         std::to_string(c.in_channels) + "->" + std::to_string(c.out_channels) + "@" +
         std::to_string(c.height) + "x" + std::to_string(c.width) + ", groups of" + sizes;
}

// With `quick` one way for copies to land, and one direction by turns.
int numerics(bool quick) {
  constexpr Type bf16 = Type::bfloat16, f16 = Type::float16, f32 = Type::float32;
  int failed = 0, runs = 0;
  for (bool transposed : {false, true})
    for (const Case& shape : std::vector<Case>{
             {bf16, bf16, 1, 32, 32, 5, 56, {1, 32}, transposed, 2},  // one line, rows in shares
             {f16, f16, 1, 32, 32, 61, 3, {32}, transposed, 1},       // more rows than stages
             {bf16, f32, 1, 64, 64, 23, 3, {4, 64}, transposed, 1},
             {f16, f32, 4, 64, 64, 6, 13, {8, 32}, transposed, 3},      // lines of 4 images
             {f16, f16, 3, 64, 64, 3, 60, {64}, transposed, 2},         // 64 columns
             {bf16, f32, 2, 64, 64, 1, 57, {2, 8, 64}, transposed, 5},  // fewer rows than shares
             {bf16, bf16, 1, 128, 128, 2, 65, {4, 64}, transposed, 4},  // lines in parts, two slabs
             {f16, f16, 2, 40, 40, 7, 7, {5, 40}, transposed, 1},    // channels that fill no slab
             {bf16, bf16, 2, 32, 64, 5, 9, {2, 32}, transposed, 2},  // unequal widths
             {bf16, f32, 67, 32, 32, 1, 1, {32}, transposed, 1},  // one pixel, 32 images to a line
         }) {
      runs++;
      if (quick && (runs % 2 == 0) != transposed) continue;
      for (bool late : {true, false}) {
        if (quick && !late) continue;
        if (run(shape, {static_cast<uint32_t>(runs), late}) >= 0) continue;
        std::printf("values wrong, or not served: %s\n", name_of(shape).c_str());
        failed++;
      }
    }
  return failed;
}

// As many rows for a multiprocessor as a batch of 256 has on 132 of them.
int traffic() {
  int failed = 0;
  for (bool transposed : {false, true})
    for (int size : {32, 64})
      for (const auto& [side, images, multiprocessors, most] :
           {std::tuple{56, 2, 1, 1.3}, {28, 4, 1, 1.6}, {14, 8, 1, 1.6}, {7, 32, 1, 1.6}}) {
        const Case c{Type::bfloat16, Type::bfloat16, images, 64,         64,
                     side,           side,           {size}, transposed, multiprocessors};
        const double moved = run(c, {});
        const emulator::Counters& counted = emulator::launched.back();
        const double outputs = static_cast<double>(images) * side * side * 64;
        std::printf(
            "%s: %.2f x what must move, %.1f shared bytes an output beside the matrix units', %.4f "
            "products\n",
            name_of(c).c_str(), moved,
            128 * (counted.shared_wavefronts() - counted.of[emulator::matrix_read].units) / outputs,
            counted.products / outputs);
        failed += moved < 0 || moved > most;
      }
  return failed;
}

// Conflicts of banks while weights are assembled, in both directions: two rows march after that, so
// the accesses are nearly all of the assembly's. Half a warp writes another row of the matrix where
// groups are of 32, in banks that overlap.
int conflicts() {
  int failed = 0;
  for (int size : {32, 64})
    for (Type terms : {Type::bfloat16, Type::float32})
      for (bool transposed : {false, true}) {
        const std::vector<int> sizes =
            size == 32 ? std::vector<int>{1, 4, 16, 32} : std::vector<int>{1, 4, 16, 32, 64};
        const Case c{Type::bfloat16,    terms, 1, 64, 64, 2, 56, sizes, transposed,
                     size == 32 ? 2 : 1};
        if (run(c, {}) < 0) return 1;
        const emulator::Counters& counted = emulator::launched.back();
        std::printf("%s, terms of %d bytes:", name_of(c).c_str(), bytes_of(terms));
        for (emulator::Kind kind :
             {emulator::shared_read, emulator::shared_write, emulator::copy}) {
          const emulator::Traffic& of = counted.of[kind];
          const double ratio = static_cast<double>(of.units) / of.least;
          const char* names[] = {"reads", "writes", "", "copies"};
          std::printf(" %s %llu wavefronts of %llu instructions, %.2f times the least", names[kind],
                      static_cast<unsigned long long>(of.units),
                      static_cast<unsigned long long>(of.instructions), ratio);
          failed += ratio > (kind == emulator::copy                                        ? 1.15
                             : kind == emulator::shared_write && size == 32 && !transposed ? 1.4
                                                                                           : 1.05);
        }
        std::printf("\n");
      }
  return failed;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::string what = argc > 1 ? argv[1] : "numerics";
    const int failed = what == "traffic"     ? traffic()
                       : what == "conflicts" ? conflicts()
                                             : numerics(what == "quick");
    return failed ? 1 : 0;
  } catch (const emulator::Error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
