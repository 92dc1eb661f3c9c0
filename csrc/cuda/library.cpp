// The operators gross_cuda::*, registered through LibTorch's stable ABI;
// gross_kernels/backends/cuda.py calls them once dispatch has chosen this backend. Arguments are
// checked here, so that the kernels start with trust. Nothing waits for the device, and scratch
// comes from torch's allocator, so a call can be captured in a CUDA graph.
//
// With GROSS_ON_HOST the tests build the same file beside kernels compiled for the host: tensors
// are then on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"

#if defined(GROSS_ON_HOST)
#define GROSS_NAMESPACE gross_cuda_on_host
#define GROSS_KEY CPU
#define GROSS_CUDA_ARCHITECTURES "the host"
#define CUDART_VERSION 0
#else
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#define GROSS_NAMESPACE gross_cuda
#define GROSS_KEY CUDA
#endif

namespace {

using namespace gross::cuda;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

#if defined(GROSS_ON_HOST)
constexpr const char* place_name = "the CPU";
bool in_place(const Tensor& tensor) { return tensor.is_cpu(); }
Device device_of(int64_t) { return {90, 4, 227 * 1024}; }  // a small H200
const char* error_text(int) { return "a kernel on the host failed"; }

struct Place {
  Device device;
  Stream stream = nullptr;
  explicit Place(const Tensor& tensor) : device(device_of(0)) { static_cast<void>(tensor); }
};
#else
constexpr const char* place_name = "a CUDA device";
bool in_place(const Tensor& tensor) { return tensor.is_cuda(); }

Device device_of(int64_t index) {
  static const std::vector<Device> devices = [] {
    int count = 0;
    cudaGetDeviceCount(&count);
    std::vector<Device> all(count);
    for (int i = 0; i < count; i++) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
      all[i].capability = 10 * major + minor;
      cudaDeviceGetAttribute(&all[i].multiprocessors, cudaDevAttrMultiProcessorCount, i);
      cudaDeviceGetAttribute(&all[i].shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, i);
      all[i].index = i;
    }
    return all;
  }();
  STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(devices.size()), "device: got ", index,
                  ", there are ", devices.size());
  return devices[index];
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// While it lasts, the tensor's device is the current one; kernels run on the stream that is current
// there.
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  Device device;
  Stream stream;
  explicit Place(const Tensor& tensor)
      : guard(tensor.get_device_index()), device(device_of(tensor.get_device_index())) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &current));
    stream = static_cast<Stream>(current);
  }
};
#endif

void check_launch(int error, const char* name) {
  STD_TORCH_CHECK(error == 0, "gross_cuda::", name, ": ", error_text(error));
}

Type type_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Half: return Type::float16;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    default:
      STD_TORCH_CHECK(false, name, ": accepted dtypes are float32, float64, bfloat16 and float16");
  }
}

int64_t bytes_of(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }

bool aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
}

bool is_dense_channels_last(const Tensor& tensor) {
  int64_t stride = 1;
  for (int d : {1, 3, 2, 0}) {
    if (tensor.size(d) > 1 && tensor.stride(d) != stride) return false;
    stride *= tensor.size(d);
  }
  return true;
}

Tensor empty_image(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  const Ints size{like.size(0), channels, height, width};
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

Tensor bytes(size_t count, const Tensor& like) {
  const Ints size{static_cast<int64_t>(count)};
  return torch::stable::empty(size, ScalarType::Byte, std::nullopt, like.device());
}

// An image as the kernels read it: itself, or a copy where strides or alignment are others, as a
// gradient's may be.
Tensor dense(const Tensor& image) {
  if (is_dense_channels_last(image) && aligned(image)) return image;
  Tensor copy = empty_image(image, image.size(1), image.size(2), image.size(3));
  torch::stable::copy_(copy, image);
  return copy;
}

// Gates and how many terms are active: of a convolution's series, and of a sum.
struct Gated {
  Series series{};
  std::optional<Tensor> gates;

  Gated(const std::vector<Tensor>& terms, int64_t active, const std::optional<Tensor>& given) {
    STD_TORCH_CHECK(!terms.empty() && terms.size() <= max_terms, "terms: got ", terms.size(),
                    ", accepted are 1 to ", max_terms);
    STD_TORCH_CHECK(active >= 1 && active <= static_cast<int64_t>(terms.size()), "active: got ",
                    active, ", accepted is 1 to ", terms.size());
    series.count = static_cast<int>(terms.size());
    series.active = static_cast<int>(active);
    series.type = type_of(terms[0].scalar_type(), "terms");
    if (!given.has_value()) return;
    STD_TORCH_CHECK(in_place(*given) && given->get_device_index() == terms[0].get_device_index() &&
                        given->dim() == 1 && given->size(0) == series.count,
                    "gates: accepted is one per term, on the terms' device");
    STD_TORCH_CHECK(type_of(given->scalar_type(), "gates") != Type::float64,
                    "gates: got float64, accepted are float32, bfloat16 and float16");
    gates = torch::stable::contiguous(torch::stable::to(*given, ScalarType::Float));
    series.gates = gates->const_data_ptr<float>();
  }
};

// A checked convolution in the kernels' words.
struct Call : Gated {
  Place place;
  Type type;
  Geometry geometry{};
  std::optional<Tensor> arranged;

  // Where `reads_terms` is false, only the terms' shapes matter.
  Call(const Tensor& input, const std::vector<Tensor>& terms, int64_t active,
       const std::optional<Tensor>& gates, int64_t stride, bool reads_terms)
      : Gated(terms, active, gates),
        place(checked(input)),
        type(type_of(input.scalar_type(), "input")) {
    STD_TORCH_CHECK(stride == 1 || stride == 2, "stride: got ", stride, ", accepted are 1 and 2");
    STD_TORCH_CHECK(series.type == type || (series.type == Type::float32 && bytes_of(type) == 2),
                    "terms: accepted is the input's dtype, or float32 with a 16-bit input");
    STD_TORCH_CHECK(terms[0].dim() == 4, "terms: accepted is [C_out, group size, 3, 3]");
    const int64_t in_channels = input.size(1), out_channels = terms[0].size(0);
    for (size_t i = 0; i < terms.size(); i++) {
      const Tensor& term = terms[i];
      STD_TORCH_CHECK(in_place(term) && term.get_device_index() == input.get_device_index() &&
                          term.dim() == 4 && term.scalar_type() == terms[0].scalar_type() &&
                          term.size(0) == out_channels && term.size(2) == 3 && term.size(3) == 3,
                      "terms[", i,
                      "]: accepted is [C_out, group size, 3, 3], C_out and dtype those of "
                      "terms[0], on the input's device");
      const int64_t s = term.size(1);
      STD_TORCH_CHECK(s >= 1 && in_channels > 0 && in_channels % s == 0 && out_channels > 0 &&
                          out_channels % (in_channels / s) == 0 &&
                          (i == 0 || (s > terms[i - 1].size(1) && s % terms[i - 1].size(1) == 0)),
                      "terms[", i, "]: group size ", s, " does not nest in ", in_channels, " → ",
                      out_channels, " channels");
      series.group_sizes[i] = static_cast<int>(s);
    }
    STD_TORCH_CHECK(input.size(2) >= 1 && input.size(3) >= 1,
                    "input: accepted is at least one pixel");
    const int64_t out_h = (input.size(2) - 1) / stride + 1,
                  out_w = (input.size(3) - 1) / stride + 1;
    // Kernels count pieces of 16 bytes in 32 bits.
    const int64_t pixels = input.size(0) * input.size(2) * input.size(3), most = int64_t{1} << 36;
    STD_TORCH_CHECK(pixels * in_channels * bytes_of(type) < most &&
                        pixels * out_channels * bytes_of(type) < most,
                    "input: accepted are inputs and outputs of less than 64 GiB");
    geometry = {
        input.size(0),           in_channels, out_channels, input.size(2),
        input.size(3),           out_h,       out_w,        series.group_sizes[series.active - 1],
        static_cast<int>(stride)};
    if (reads_terms) read(terms);
  }

 private:
  static const Tensor& checked(const Tensor& input) {
    STD_TORCH_CHECK(in_place(input) && input.dim() == 4, "input: accepted is [N, C_in, H, W] on ",
                    place_name);
    return input;
  }

  // Terms that are contiguous and aligned are read where they are. Parameters of a channels-last
  // model are not: they are rearranged together, in one launch.
  void read(const std::vector<Tensor>& terms) {
    bool as_they_are = true;
    int64_t strides[max_terms][4], ends[max_terms + 1] = {};
    for (int i = 0; i < series.active; i++) {
      as_they_are = as_they_are && terms[i].is_contiguous() && aligned(terms[i]);
      for (int d = 0; d < 4; d++) strides[i][d] = terms[i].stride(d);
      series.terms[i] = terms[i].data_ptr();
      ends[i + 1] = ends[i] + (terms[i].numel() * bytes_of(series.type) + 15) / 16 * 16;
    }
    if (as_they_are) return;
    arranged = bytes(ends[series.active], terms[0]);
    Series to = series;
    for (int i = 0; i < series.active; i++)
      to.terms[i] = static_cast<char*>(arranged->data_ptr()) + ends[i];
    check_launch(arrange(geometry.out_channels, series, strides, to, place.stream), "arrange");
    series = to;
  }
};

// What tests and measurements set: whether kernels for warpgroups may be chosen, the plan that
// each operation runs, which passes of the weight gradient run.
std::atomic<bool> warpgroups{true};
std::array<std::atomic<int>, 3> forced_plans{by_model, by_model, by_model};
std::atomic<int> forced_passes{3};

// And what they ask: the job that each operation ran last, and by which plan.
struct Ran {
  std::mutex mutex;
  std::array<std::optional<Job>, 3> jobs;
};
Ran ran;

const char* name_of(Operation operation) {
  constexpr const char* names[] = {"forward", "input_grad", "weight_grad"};
  return names[static_cast<int>(operation)];
}
Operation operation_of(const std::string& name) {
  for (Operation each : {Operation::forward, Operation::input_grad, Operation::weight_grad})
    if (name == name_of(each)) return each;
  STD_TORCH_CHECK(false, "operation: got ", name.c_str(),
                  ", accepted are forward, input_grad and weight_grad");
}

Job job_of(Operation operation, const Call& call) {
  return {operation,         call.type,
          call.geometry,     call.series,
          call.place.device, call.place.stream,
          warpgroups.load(), forced_plans[static_cast<int>(operation)].load()};
}

// Of a launcher: raises what it says, and remembers what it ran.
void check_ran(int error, Job job, int plan) {
  const char* name = name_of(job.operation);
  STD_TORCH_CHECK(error != unserved || job.plan == by_model, "gross_cuda::", name,
                  ": this call has no plan ", job.plan, ", which set_plan forces");
  STD_TORCH_CHECK(error != unserved, "gross_cuda::", name,
                  ": there is no kernel for this call; gross_cuda::supports says which there are");
  check_launch(error, name);
  job.plan = plan;
  const std::lock_guard<std::mutex> lock(ran.mutex);
  ran.jobs[static_cast<int>(job.operation)] = job;
}

void convolve(Operation operation, const Call& call, const void* source, void* destination) {
  const Job job = job_of(operation, call);
  int plan = by_model;
  const int error = gross::cuda::convolve(job, source, destination, plan);
  check_ran(error, job, plan);
}

void check_grad(const Tensor& grad, const Tensor& input, const Geometry& g) {
  STD_TORCH_CHECK(in_place(grad) && grad.get_device_index() == input.get_device_index() &&
                      grad.dim() == 4 && grad.size(0) == g.images &&
                      grad.size(1) == g.out_channels && grad.size(2) == g.out_h &&
                      grad.size(3) == g.out_w && grad.scalar_type() == input.scalar_type(),
                  "grad: accepted is the output's shape and dtype, on the input's device");
}

// Results are channels-last. `slow` stands for the plain kernels.
template <bool slow>
Tensor forward_operator(const Tensor& input, const std::vector<Tensor>& terms, int64_t active,
                        const std::optional<Tensor>& gates, int64_t stride) {
  const Call call(input, terms, active, gates, stride, true);
  const Geometry& g = call.geometry;
  Tensor output = empty_image(input, g.out_channels, g.out_h, g.out_w);
  if (output.numel() == 0) return output;
  const Tensor source = dense(input);
  if (slow) {
    check_launch(plain::forward(call.type, g, call.series, source.data_ptr(), output.data_ptr(),
                                call.place.stream),
                 "plain_forward");
  } else {
    convolve(Operation::forward, call, source.data_ptr(), output.data_ptr());
  }
  return output;
}

template <bool slow>
Tensor input_grad_operator(const Tensor& grad, const Tensor& input,
                           const std::vector<Tensor>& terms, int64_t active,
                           const std::optional<Tensor>& gates, int64_t stride) {
  const Call call(input, terms, active, gates, stride, true);
  const Geometry& g = call.geometry;
  check_grad(grad, input, g);
  Tensor result = empty_image(input, g.in_channels, g.in_h, g.in_w);
  if (result.numel() == 0) return result;
  const Tensor source = dense(grad);
  if (slow) {
    check_launch(plain::input_grad(call.type, g, call.series, source.data_ptr(), result.data_ptr(),
                                   call.place.stream),
                 "plain_input_grad");
  } else {
    convolve(Operation::input_grad, call, source.data_ptr(), result.data_ptr());
  }
  return result;
}

// Gradients of all terms, and of the gates: float32, empty without gates.
template <bool slow>
std::tuple<std::vector<Tensor>, Tensor> weight_grad_operator(
    const Tensor& grad, const Tensor& input, const std::vector<Tensor>& terms, int64_t active,
    const std::optional<Tensor>& gates, int64_t stride) {
  const Call call(input, terms, active, gates, stride, gates.has_value());
  const Geometry& g = call.geometry;
  check_grad(grad, input, g);
  const Ints gate_shape{gates.has_value() ? call.series.count : 0};
  Tensor grad_gates =
      torch::stable::empty(gate_shape, ScalarType::Float, std::nullopt, input.device());
  std::vector<Tensor> grad_terms;
  SeriesGradient gradient{};
  for (const Tensor& term : terms) {
    grad_terms.push_back(
        torch::stable::empty(term.sizes(), term.scalar_type(), std::nullopt, term.device()));
    gradient.terms[grad_terms.size() - 1] = grad_terms.back().data_ptr();
  }
  if (gates.has_value()) gradient.gates = grad_gates.mutable_data_ptr<float>();
  if (g.images == 0) {
    for (Tensor& each : grad_terms) torch::stable::zero_(each);
    torch::stable::zero_(grad_gates);
    return {grad_terms, grad_gates};
  }
  const Tensor wide_grad = dense(grad), wide_input = dense(input);
  if (slow) {
    const Tensor scratch = bytes(plain::weight_grad_scratch_bytes(g), input);
    check_launch(
        plain::weight_grad(call.type, g, call.series, wide_grad.data_ptr(), wide_input.data_ptr(),
                           gradient, scratch.data_ptr(), call.place.stream),
        "plain_weight_grad");
  } else {
    const Job job = job_of(Operation::weight_grad, call);
    const Tensor scratch = bytes(weight_grad_scratch_bytes(job), input);
    int plan = by_model;
    const int error = weight_grad(job, wide_grad.data_ptr(), wide_input.data_ptr(), gradient,
                                  scratch.data_ptr(), forced_passes, plan);
    check_ran(error, job, plan);
  }
  return {grad_terms, grad_gates};
}

Tensor series_sum_operator(const std::vector<Tensor>& terms, int64_t active,
                           const std::optional<Tensor>& gates) {
  Gated gated(terms, active, gates);
  std::vector<Tensor> kept;
  for (int i = 0; i < gated.series.active; i++) {
    bool same = in_place(terms[i]) && terms[i].get_device_index() == terms[0].get_device_index() &&
                terms[i].scalar_type() == terms[0].scalar_type() &&
                terms[i].dim() == terms[0].dim();
    for (int64_t d = 0; same && d < terms[0].dim(); d++)
      same = terms[i].size(d) == terms[0].size(d);
    STD_TORCH_CHECK(same, "terms[", i, "]: accepted is the shape and dtype of terms[0], on ",
                    place_name);
    kept.push_back(terms[i].is_contiguous() ? terms[i] : torch::stable::contiguous(terms[i]));
    gated.series.terms[i] = kept[i].data_ptr();
  }
  const Place place(terms[0]);
  Tensor result = torch::stable::empty(terms[0].sizes(), terms[0].scalar_type(), std::nullopt,
                                       terms[0].device());
  check_launch(series_sum(gated.series, result.numel(), result.data_ptr(), place.stream),
               "series_sum");
  return result;
}

// How the library was built: torch's version, CUDA's (1000 × major + 10 × minor), the architectures
// it has code for.
std::tuple<std::string, int64_t, std::string> build_operator() {
  return {TORCH_VERSION, CUDART_VERSION, GROSS_CUDA_ARCHITECTURES};
}

// What kernels depend on: compute capability (10 × major + minor), multiprocessors, opt-in limit of
// shared memory per block.
Ints device_operator(int64_t index) {
  const Device device = device_of(index);
  return {device.capability, device.multiprocessors, device.shared_bytes};
}

Device device_of(const Ints& numbers) {
  STD_TORCH_CHECK(numbers.size() == 3, "device: accepted is what gross_cuda::device returns");
  return {static_cast<int>(numbers[0]), static_cast<int>(numbers[1]), static_cast<int>(numbers[2])};
}

// Whether there are kernels for an operation ("forward", "input_grad", "weight_grad") at a group
// size on such a device.
bool supports_operator(const std::string& operation, ScalarType dtype, ScalarType terms_dtype,
                       int64_t in_channels, int64_t out_channels, int64_t group_size,
                       int64_t stride, const Ints& numbers) {
  const Type type = type_of(dtype, "dtype"), terms_type = type_of(terms_dtype, "terms_dtype");
  const Geometry g{1,
                   in_channels,
                   out_channels,
                   1,
                   1,
                   1,
                   1,
                   static_cast<int>(group_size),
                   static_cast<int>(stride)};
  const Device device = device_of(numbers);
  const Operation which = operation_of(operation);
  return which == Operation::weight_grad ? supports_weight_grad(type, terms_type, g, device)
                                         : supports_convolution(which, type, terms_type, g, device);
}

std::string json_of(const PlanFacts& f, bool chosen) {
  constexpr double clocks_a_microsecond = 1755;
  char text[1024];
  std::snprintf(text, sizeof text,
                "{\"kernel\": \"%s\", \"steps\": %d, \"atoms\": %d, \"tiles\": %d, \"teams\": %d, "
                "\"stages\": %d, \"columns\": %d, \"images\": %d, \"grid\": [%d, %d], "
                "\"threads\": %d, \"shared_bytes\": %d, \"clocks\": %.0f, \"microseconds\": %.2f, "
                "\"read_bytes\": %.0f, \"written_bytes\": %.0f, \"chosen\": %s}",
                f.kernel, f.steps, f.atoms, f.tiles, f.teams, f.stages, f.columns, f.images,
                f.grid_x, f.grid_y, f.threads, f.shared_bytes, f.clocks,
                f.clocks / clocks_a_microsecond, f.read_bytes, f.written_bytes,
                chosen ? "true" : "false");
  return text;
}

std::vector<PlanFacts> plans_of(const Job& job, int& chosen) {
  return job.operation == Operation::weight_grad ? weight_grad_plans(job, chosen)
                                                 : convolution_plans(job, chosen);
}

// The plans for a call, as JSON; `shape` is N, C_in, H, W, C_out, `group_sizes` are the active
// terms'. The estimates are the model's, at the 1.755 GHz of an H200.
std::string plans_operator(const std::string& operation, ScalarType dtype, ScalarType terms_dtype,
                           const Ints& shape, const Ints& group_sizes, int64_t stride,
                           const Ints& numbers) {
  STD_TORCH_CHECK(shape.size() == 5 && *std::min_element(shape.begin(), shape.end()) > 0,
                  "shape: accepted is N, C_in, H, W, C_out");
  STD_TORCH_CHECK(!group_sizes.empty() && group_sizes.size() <= max_terms, "group_sizes: got ",
                  group_sizes.size(), ", accepted are 1 to ", max_terms);
  STD_TORCH_CHECK(stride == 1 || stride == 2, "stride: got ", stride, ", accepted are 1 and 2");
  Job job{};
  job.operation = operation_of(operation);
  job.type = type_of(dtype, "dtype");
  job.device = device_of(numbers);
  job.warpgroups = warpgroups;
  job.series.type = type_of(terms_dtype, "terms_dtype");
  job.series.count = job.series.active = static_cast<int>(group_sizes.size());
  for (size_t i = 0; i < group_sizes.size(); i++) {
    const int64_t size = group_sizes[i];
    STD_TORCH_CHECK(size >= 1 && shape[1] % size == 0 && shape[4] % (shape[1] / size) == 0 &&
                        (i == 0 || (size > group_sizes[i - 1] && size % group_sizes[i - 1] == 0)),
                    "group_sizes[", i, "]: ", size, " does not nest in ", shape[1], " → ", shape[4],
                    " channels");
    job.series.group_sizes[i] = static_cast<int>(size);
  }
  job.geometry = {shape[0],
                  shape[1],
                  shape[4],
                  shape[2],
                  shape[3],
                  (shape[2] - 1) / stride + 1,
                  (shape[3] - 1) / stride + 1,
                  static_cast<int>(group_sizes.back()),
                  static_cast<int>(stride)};
  int chosen = unserved;
  const std::vector<PlanFacts> facts = plans_of(job, chosen);
  std::string text = "[";
  for (size_t i = 0; i < facts.size(); i++)
    text += (i > 0 ? ",\n " : "") + json_of(facts[i], static_cast<int>(i) == chosen);
  return text + "]";
}

// The plan that the last call of an operation ran; empty before the first.
std::string ran_operator(const std::string& operation) {
  std::optional<Job> job;
  {
    const std::lock_guard<std::mutex> lock(ran.mutex);
    job = ran.jobs[static_cast<int>(operation_of(operation))];
  }
  if (!job) return "";
  int chosen = unserved;
  return json_of(plans_of(*job, chosen)[job->plan], true);
}

void set_warpgroups(bool allowed) { warpgroups = allowed; }

void set_plan(const std::string& operation, int64_t plan) {
  STD_TORCH_CHECK(plan >= by_model && plan < 1 << 20, "plan: got ", plan,
                  ", accepted is a number from gross_cuda::plans, or -1 for the model's choice");
  forced_plans[static_cast<int>(operation_of(operation))] = static_cast<int>(plan);
}

void set_passes(int64_t passes) {
  STD_TORCH_CHECK(passes >= 1 && passes <= 3, "passes: got ", passes,
                  ", accepted are 1 (the first), 2 (the second) and 3 (both)");
  forced_passes = static_cast<int>(passes);
}

// On the device of `like`.
Tensor product_clocks_operator(const Tensor& like, int64_t offset) {
  STD_TORCH_CHECK(in_place(like), "like: accepted is a tensor on ", place_name);
  STD_TORCH_CHECK(offset >= 0 && offset <= 112 && offset % 16 == 0, "offset: got ", offset,
                  ", accepted are multiples of 16 up to 112");
  const Place place(like);
  const Ints size{place.device.multiprocessors};
  Tensor clocks = torch::stable::empty(size, ScalarType::Float, std::nullopt, like.device());
  const int error = product_clocks(static_cast<int>(offset), clocks.mutable_data_ptr<float>(),
                                   place.device, place.stream);
  STD_TORCH_CHECK(error != unserved, "gross_cuda::product_clocks: there are no warpgroups here");
  check_launch(error, "product_clocks");
  return clocks;
}

Ints counts_operator() { return {host_counts.planned, host_counts.prepared, host_counts.launched}; }

}  // namespace

STABLE_TORCH_LIBRARY(GROSS_NAMESPACE, m) {
  for (const std::string prefix : {"", "plain_"}) {
    m.def((prefix +
           "forward(Tensor input, Tensor[] terms, int active, Tensor? gates, int stride) -> Tensor")
              .c_str());
    m.def((prefix + "input_grad(Tensor grad, Tensor input, Tensor[] terms, int active, Tensor? "
                    "gates, int stride) -> Tensor")
              .c_str());
    m.def((prefix + "weight_grad(Tensor grad, Tensor input, Tensor[] terms, int active, Tensor? "
                    "gates, int stride) -> (Tensor[], Tensor)")
              .c_str());
  }
  m.def("series_sum(Tensor[] terms, int active, Tensor? gates) -> Tensor");
  // For tests and measurements, no part of the interface: see docs/architecture.md.
  m.def("set_warpgroups(bool allowed) -> ()");
  m.def("set_plan(str operation, int plan) -> ()");
  m.def("set_passes(int passes) -> ()");
  m.def(
      "plans(str operation, ScalarType dtype, ScalarType terms_dtype, int[] shape, int[] "
      "group_sizes, int stride, int[] device) -> str");
  m.def("ran(str operation) -> str");
  m.def("counts() -> int[]");
  m.def("product_clocks(Tensor like, int offset) -> Tensor");
  m.def("build() -> (str, int, str)");
  m.def("device(int index) -> int[]");
  m.def(
      "supports(str operation, ScalarType dtype, ScalarType terms_dtype, int in_channels, int "
      "out_channels, int group_size, int stride, "
      "int[] device) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(GROSS_NAMESPACE, GROSS_KEY, m) {
  m.impl("forward", TORCH_BOX(&forward_operator<false>));
  m.impl("input_grad", TORCH_BOX(&input_grad_operator<false>));
  m.impl("weight_grad", TORCH_BOX(&weight_grad_operator<false>));
  m.impl("plain_forward", TORCH_BOX(&forward_operator<true>));
  m.impl("plain_input_grad", TORCH_BOX(&input_grad_operator<true>));
  m.impl("plain_weight_grad", TORCH_BOX(&weight_grad_operator<true>));
  m.impl("series_sum", TORCH_BOX(&series_sum_operator));
  m.impl("product_clocks", TORCH_BOX(&product_clocks_operator));
}

STABLE_TORCH_LIBRARY_IMPL(GROSS_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("set_warpgroups", TORCH_BOX(&set_warpgroups));
  m.impl("set_plan", TORCH_BOX(&set_plan));
  m.impl("set_passes", TORCH_BOX(&set_passes));
  m.impl("plans", TORCH_BOX(&plans_operator));
  m.impl("ran", TORCH_BOX(&ran_operator));
  m.impl("counts", TORCH_BOX(&counts_operator));
  m.impl("build", TORCH_BOX(&build_operator));
  m.impl("device", TORCH_BOX(&device_operator));
  m.impl("supports", TORCH_BOX(&supports_operator));
}
