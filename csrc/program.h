// A whole network, or a part of one, as a program: layers, convolutions and pooling with all that
// stands between them, one after the other without a return to torch. Tensors between the steps
// lie in one block of memory that the calling thread keeps: fresh pages cost more than what is
// written to them.
//
// A program is one tensor of bytes: a header that says for whom it is, which values it returns,
// the steps, and their weights in the kernels' order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "arguments.h"
#include "packed.h"
#include "tensors.h"

namespace gross::cpu {

enum class StepKind : int64_t { layer, convolution, linear, max_pool, mean_pool, mean, quantise };
constexpr int64_t step_kinds = 7, activations = 5;

// One step, as numbers: gross_kernels/program.py writes the same order. Values are numbered, the
// inputs first; −1 stands for none.
struct Step {
  StepKind kind;
  int64_t source, target, residual;
  Activation activation;
  int64_t residual_last;
  int64_t in_channels, width_in, width_out, group_size, out_channels;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t weights, bias, slopes, scales;  // which of the tensors that are packed
  int64_t at;                             // bytes from the program's begin to the packed weights

  bool has_weights() const { return kind <= StepKind::linear; }
  Geometry geometry(int64_t images) const {
    return {images,   width_in, width_out, group_size, kernel_h,   kernel_w,
            stride_h, stride_w, padding_h, padding_w,  dilation_h, dilation_w};
  }
  Layer layer(int64_t images) const {
    return {{}, {}, {}, geometry(images), in_channels, out_channels, nullptr, nullptr, {}, {}};
  }
};
constexpr int64_t step_numbers = sizeof(Step) / sizeof(int64_t);

struct ProgramHeader {
  char magic[8] = {'G', 'r', 'o', 'S', 'S', 'p', 'r', 'g'};
  int32_t version = 3;  // of everything that follows; every change of it counts
  int32_t vector_bytes = 0;
  int32_t type = 0;  // of the activations
  int32_t inputs = 0, values = 0, steps = 0, outputs = 0;
  int32_t zero = 0;
  int64_t size = 0;  // of the program in bytes
};

// A program's parts, in its bytes.
struct Program {
  ProgramHeader header;
  const int64_t* outputs;
  const Step* steps;
  const Held* held;  // of each value
  const char* bytes;

  Type type() const { return static_cast<Type>(header.type); }
  Forms forms(const Step& step) const {
    return {held[step.source], step.residual < 0 ? Held{} : held[step.residual], held[step.target]};
  }
};

constexpr int64_t weight_alignment = 128;
inline int64_t aligned(int64_t size) { return round_up(size, weight_alignment); }
inline int64_t number_size(Type type) { return type == Type::float64 ? 8 : 4; }
// The type that a step's kernels are for, by how what it reads and writes is held.
inline Type type_of_step(Type type, const Forms& forms) {
  const bool some = forms.source.in_bytes() || forms.residual.in_bytes() || forms.target.in_bytes();
  return some ? Type::int8 : type;
}
inline int64_t packed_bytes(Type type, const Step& step) {
  if (!step.has_weights()) return 0;
  const int64_t numbers = step.kind == StepKind::layer
                              ? kernels().packed_size(type, step.layer(1))
                              : kernels().packed_kernel_size(type, step.geometry(1));
  return aligned(numbers * number_size(type));
}

// Packing -----------------------------------------------------------------------------------------

// The weights of a program's steps while they are packed.
class ProgramWeights {
 public:
  ProgramWeights(const std::vector<Tensor>& tensors, Type type) : tensors_(tensors), type_(type) {}

  // A single term [out, in, kh, kw], for kernels of this type.
  Series series(int64_t index, const Ints& shape, Type wanted) {
    const Tensor& weight = at(index, "weights");
    bool fits = weight.dim() == 4;
    for (int64_t d = 0; fits && d < 4; d++) fits = weight.size(d) == shape[d];
    STD_TORCH_CHECK(fits, "weights[", index, "]: accepted is [", shape[0], ", ", shape[1], ", ",
                    shape[2], ", ", shape[3], "]");
    kept_.push_back(compact(weight));
    Series series{};
    series.active = 1;
    series.type =
        weight.scalar_type() == ScalarType::Char ? Type::int8 : type_of(weight, "weights");
    STD_TORCH_CHECK((series.type == Type::int8) == (wanted == Type::int8), "weights[", index,
                    "]: got ", name_of(static_cast<int32_t>(series.type)), ", accepted is ",
                    wanted == Type::int8 ? "int8" : "a floating dtype", ", for a step that reads ",
                    wanted == Type::int8 ? "8 bits" : "numbers");
    series.terms[0] = kept_.back().data_ptr();
    series.group_sizes[0] = shape[1];
    series.gates[0] = 1;
    return series;
  }

  // Numbers of outputs, in the sum's type; null where there are none.
  const void* numbers(int64_t index, int64_t count) {
    return index < 0 ? nullptr : needed_numbers(index, count);
  }
  const void* needed_numbers(int64_t index, int64_t count) {
    const Tensor& given = at(index, "weights");
    STD_TORCH_CHECK(given.dim() == 1 && given.size(0) == count, "weights[", index,
                    "]: accepted is [", count, "]");
    kept_.push_back(compact(torch::stable::to(given, sum_type_of(type_))));
    return kept_.back().data_ptr();
  }

 private:
  const Tensor& at(int64_t index, const char* name) const {
    STD_TORCH_CHECK(index >= 0 && index < static_cast<int64_t>(tensors_.size()), name,
                    ": got no tensor ", index);
    STD_TORCH_CHECK(tensors_[index].is_cpu(), name, "[", index, "]: accepted is one on the CPU");
    return tensors_[index];
  }

  const std::vector<Tensor>& tensors_;
  const Type type_;
  std::vector<Tensor> kept_;
};

// `known`: the number of what is there before the step.
inline void check_reads(const Step& step, int64_t known) {
  const auto within = [](int64_t value, int64_t least, int64_t end) {
    return value >= least && value < end;
  };
  STD_TORCH_CHECK(within(static_cast<int64_t>(step.kind), 0, step_kinds) &&
                      within(step.source, 0, known) && step.target == known &&
                      within(step.residual, -1, known) &&
                      within(static_cast<int64_t>(step.activation), 0, activations),
                  "steps: got a step that is none, or reads what no step before it wrote");
}
inline void check_step(const Step& step, const Forms& forms, int64_t inputs) {
  const bool sized = step.in_channels > 0 && step.width_in > 0 && step.width_out > 0 &&
                     step.group_size > 0 && step.out_channels > 0;
  STD_TORCH_CHECK(step.kernel_h > 0 && step.kernel_w > 0 && step.stride_h > 0 &&
                      step.stride_w > 0 && step.padding_h >= 0 && step.padding_w >= 0 &&
                      step.dilation_h > 0 && step.dilation_w > 0,
                  "steps: accepted are kernel, stride and dilation of at least 1, padding of 0");
  STD_TORCH_CHECK(!step.has_weights() || (sized && step.width_in % step.group_size == 0 &&
                                          step.width_out % (step.width_in / step.group_size) == 0),
                  "steps: group size ", step.group_size, " does not nest in ", step.width_in, " → ",
                  step.width_out, " channels");
  STD_TORCH_CHECK(step.activation != Activation::prelu || (step.slopes >= 0 && step.has_weights()),
                  "steps: got PReLU without slopes, or after a step that has no weights");
  const bool reads_bytes = forms.source.in_bytes(), pools = !step.has_weights();
  STD_TORCH_CHECK(
      reads_bytes || pools || !(forms.residual.in_bytes() || forms.target.in_bytes()),
      "steps: got weights that read numbers and a residual or output of 8 bits, accepted "
      "are numbers; a step of the kind quantise makes the one of the other");
  if (step.has_weights() ? !reads_bytes : type_of_step(Type::float32, forms) != Type::int8) return;
  STD_TORCH_CHECK(step.residual < 0 || step.residual >= inputs,
                  "steps: got an input as residual of a step of 8 bits, accepted are values that a "
                  "step wrote");
  if (pools) return;
  STD_TORCH_CHECK(step.scales >= 0, "steps: got weights of 8 bits without scales");
  STD_TORCH_CHECK(step.kind == StepKind::layer || step.group_size == step.width_in,
                  "steps: got a convolution of 8 bits with groups of ", step.group_size,
                  " channels, accepted is one group of ", step.width_in);
  // |Σ w (q − zero)| ≤ 255 · 128 · terms; of Q the same, with r's steps.
  constexpr int64_t most_terms = ((int64_t{1} << 31) - 1) / (255 * 128);
  const int64_t terms = step.kind == StepKind::layer
                            ? std::max(step.in_channels, step.width_out)
                            : step.width_in * step.kernel_h * step.kernel_w;
  STD_TORCH_CHECK(terms <= most_terms, "steps: got sums of ", terms,
                  " products of 8 bits, accepted are ", most_terms, ", which 32 bits hold");
}

// What becomes whole numbers of 16 bits: R and the scales before and after it.
inline void check_words(const Step& step, const Layer& layer) {
  const Geometry& g = layer.geometry;
  STD_TORCH_CHECK(layer.grouped.type == Type::float32, "weights[", step.weights + 1,
                  "]: accepted is float32, for a layer that reads 8 bits");
  const float* const middle = static_cast<const float*>(layer.grouped.terms[0]);
  const auto finite = [](float number) { return std::isfinite(number); };
  const auto usable = [](float scale) { return std::isfinite(scale) && scale >= 0; };
  STD_TORCH_CHECK(
      std::all_of(middle, middle + g.out_channels * g.group_size * g.taps(), finite) &&
          std::all_of(layer.scales[0], layer.scales[0] + g.in_channels, usable) &&
          std::all_of(layer.scales[1], layer.scales[1] + g.out_channels, usable),
      "weights: got R of a layer of 8 bits, or scales of p or r, with numbers that are not finite, "
      "or scales below 0");
}

inline void pack_step(Type type, const Step& step, const Held& source, ProgramWeights& weights,
                      char* to) {
  Geometry g = step.geometry(1);
  const void* const bias = weights.numbers(step.bias, step.out_channels);
  const void* const slopes = weights.numbers(step.slopes, step.out_channels);
  const auto scales = [&](int64_t index, int64_t count) {
    return type != Type::int8
               ? nullptr
               : static_cast<const float*>(weights.needed_numbers(step.scales + index, count));
  };
  const Threads threads = torch_threads(per_number * packed_bytes(type, step));
  const Ints middle{step.width_out, step.group_size, step.kernel_h, step.kernel_w};
  if (step.kind == StepKind::layer) {
    Layer layer = step.layer(1);
    layer.pointwise_in =
        weights.series(step.weights, {step.width_in, step.in_channels, 1, 1}, type);
    layer.grouped =
        weights.series(step.weights + 1, middle, type == Type::int8 ? Type::float32 : type);
    layer.pointwise_out =
        weights.series(step.weights + 2, {step.out_channels, step.width_out, 1, 1}, type);
    layer.bias = bias;
    layer.slopes = slopes;
    layer.scales[0] = scales(0, step.width_in);
    layer.scales[1] = scales(1, step.width_out);
    layer.scales[2] = scales(2, step.out_channels);
    layer.source = source;
    if (type == Type::int8) check_words(step, layer);
    kernels().pack(type, layer, to, threads);
  } else {
    kernels().pack_kernel(type,
                          {weights.series(step.weights, middle, type), g, bias, slopes,
                           scales(0, step.out_channels), source},
                          to, threads);
  }
}

// How each of `values` values is held, of scales and zero points; numbers where there are none.
inline std::vector<Held> held_of(Type type, int64_t values, const std::vector<double>& scales,
                                 const Ints& zeros) {
  std::vector<Held> held(values);
  if (scales.empty() && zeros.empty()) return held;
  STD_TORCH_CHECK(static_cast<int64_t>(scales.size()) == values && scales.size() == zeros.size(),
                  "scales, zeros: got ", scales.size(), " and ", zeros.size(),
                  ", accepted is one of each per value: ", values);
  for (int64_t i = 0; i < values; i++) {
    const float scale = static_cast<float>(scales[i]);
    STD_TORCH_CHECK(scale >= 0 && std::isfinite(1 / (scale + (scale == 0))) && std::isfinite(scale),
                    "scales: got ", scales[i], ", accepted are positive numbers, or 0 for a value ",
                    "that is not held in 8 bits");
    STD_TORCH_CHECK(zeros[i] >= 0 && zeros[i] <= 255, "zeros: got ", zeros[i],
                    ", accepted are 0 to 255");
    STD_TORCH_CHECK(scale == 0 || type == Type::float32, "like: got ",
                    name_of(static_cast<int32_t>(type)),
                    ", accepted with values of 8 bits is float32");
    held[i] = {scale, static_cast<int32_t>(zeros[i])};
  }
  return held;
}

// `steps`: the numbers of all of them; `returned`: which values the program returns; `scales` and
// `zeros`: how its values are held.
inline Tensor pack_program(const Tensor& like, const std::vector<Tensor>& weights,
                           const Ints& steps, int64_t inputs, const Ints& returned,
                           const std::vector<double>& scales, const Ints& zeros) {
  const Type type = type_of(like, "like");
  const int64_t count = steps.size() / step_numbers;
  STD_TORCH_CHECK(count > 0 && steps.size() % step_numbers == 0 && inputs > 0, "steps: got ",
                  steps.size(), " numbers, accepted are ", step_numbers,
                  " of each of at least one step");
  std::vector<Step> all(count);
  std::memcpy(all.data(), steps.data(), steps.size() * sizeof(int64_t));
  const std::vector<Held> held = held_of(type, inputs + count, scales, zeros);
  const int64_t at_steps = sizeof(ProgramHeader) + returned.size() * sizeof(int64_t),
                at_held = at_steps + count * sizeof(Step);
  int64_t size = aligned(at_held + held.size() * sizeof(Held));
  std::vector<Type> types;
  for (int64_t i = 0; i < count; i++) {
    const Step& step = all[i];
    check_reads(step, inputs + i);
    const Forms forms{held[step.source], step.residual < 0 ? Held{} : held[step.residual],
                      held[step.target]};
    check_step(step, forms, inputs);
    types.push_back(type_of_step(type, forms));
    all[i].at = size;
    size += packed_bytes(types[i], all[i]);
  }
  for (int64_t i = 0; i < inputs; i++)
    STD_TORCH_CHECK(!held[i].in_bytes(),
                    "scales: got an input held in 8 bits, accepted are numbers");
  for (int64_t value : returned) {
    STD_TORCH_CHECK(value >= inputs && value < inputs + count, "returned: got ", value,
                    ", accepted are values that a step writes");
    STD_TORCH_CHECK(!held[value].in_bytes(), "returned: got ", value,
                    ", held in 8 bits, accepted are values held as numbers");
  }
  ProgramHeader header;
  header.vector_bytes = kernels().vector_bytes;
  header.type = static_cast<int32_t>(type);
  header.inputs = inputs;
  header.values = inputs + count;
  header.steps = count;
  header.outputs = returned.size();
  header.size = size;
  Tensor program = torch::stable::empty({size}, ScalarType::Byte, std::nullopt, like.device());
  char* const bytes = static_cast<char*>(program.data_ptr());
  std::memset(bytes, 0, size);
  std::memcpy(bytes, &header, sizeof header);
  std::memcpy(bytes + sizeof header, returned.data(), returned.size() * sizeof(int64_t));
  std::memcpy(bytes + at_steps, all.data(), count * sizeof(Step));
  std::memcpy(bytes + at_held, held.data(), held.size() * sizeof(Held));
  ProgramWeights given(weights, type);
  for (int64_t i = 0; i < count; i++)
    if (all[i].has_weights())
      pack_step(types[i], all[i], held[all[i].source], given, bytes + all[i].at);
  return program;
}

// Running -----------------------------------------------------------------------------------------

// Refuses what `program_pack` did not make for this processor.
inline Program read_program(const Tensor& program) {
  constexpr const char* accepted = ", accepted is what program_pack made";
  STD_TORCH_CHECK(program.is_cpu() && program.dim() == 1 &&
                      program.scalar_type() == ScalarType::Byte && program.is_contiguous(),
                  "program: got another kind of tensor", accepted, ": contiguous bytes on the CPU");
  Program read;
  read.bytes = static_cast<const char*>(program.data_ptr());
  const int64_t size = program.size(0), least = sizeof(ProgramHeader);
  const ProgramHeader wanted;
  if (size >= least) std::memcpy(&read.header, read.bytes, sizeof read.header);
  const ProgramHeader& got = read.header;
  STD_TORCH_CHECK(size >= least && !std::memcmp(got.magic, wanted.magic, sizeof got.magic),
                  "program: got bytes without the header of a program", accepted);
  STD_TORCH_CHECK(got.version == wanted.version, "program: got version ", got.version, accepted,
                  " in version ", wanted.version);
  STD_TORCH_CHECK(got.vector_bytes == kernels().vector_bytes, "program: got one for vectors of ",
                  got.vector_bytes, " bytes, accepted are ", kernels().vector_bytes, " (",
                  kernels().name,
                  "): export the network again on this processor, or load the "
                  "portable file");
  STD_TORCH_CHECK(got.size == size && got.steps > 0 &&
                      least + got.outputs * 8 + got.steps * static_cast<int64_t>(sizeof(Step)) +
                              got.values * static_cast<int64_t>(sizeof(Held)) <=
                          size,
                  "program: got ", size, " bytes", accepted, ": ", got.size);
  read.outputs = reinterpret_cast<const int64_t*>(read.bytes + least);
  read.steps = reinterpret_cast<const Step*>(read.bytes + least + got.outputs * sizeof(int64_t));
  read.held = reinterpret_cast<const Held*>(read.steps + got.steps);
  return read;
}

// Memory between steps, of one thread, grown as needed and kept.
inline char* thread_memory(int64_t size) {
  struct Memory {
    char* at = nullptr;
    int64_t size = 0;
    ~Memory() { std::free(at); }
  };
  static thread_local Memory memory;
  if (memory.size < size) {
    std::free(memory.at);
    memory.size = 0;
    const int64_t need = round_up(size, 4096);
    memory.at = static_cast<char*>(std::aligned_alloc(4096, need));
    if (!memory.at) throw std::bad_alloc();
    memory.size = need;
  }
  return memory.at;
}

// Where values lie that are alive at the same time.
class Places {
 public:
  int64_t take(int64_t size) {
    size = aligned(size);
    for (size_t i = 0; i < free_.size(); i++)
      if (free_[i].size >= size) {
        const int64_t at = free_[i].at;
        free_[i].at += size;
        free_[i].size -= size;
        return at;
      }
    const int64_t at = end_;
    end_ += size;
    return at;
  }
  void give(int64_t at, int64_t size) {
    size = aligned(size);
    auto after =
        std::find_if(free_.begin(), free_.end(), [&](const Piece& piece) { return piece.at > at; });
    if (after != free_.end() && after->at == at + size) {
      after->at = at;
      after->size += size;
    } else {
      after = free_.insert(after, {at, size});
    }
    if (after == free_.begin()) return;
    auto before = after - 1;
    if (before->at + before->size != after->at) return;
    before->size += after->size;
    free_.erase(after);
  }
  int64_t end() const { return end_; }

 private:
  struct Piece {
    int64_t at, size;
  };
  std::vector<Piece> free_;
  int64_t end_ = 0;
};

class ProgramRun {
 public:
  ProgramRun(const std::vector<Tensor>& inputs, const Tensor& program)
      : program_(read_program(program)), values_(program_.header.values) {
    take_inputs(inputs);
    for (int64_t i = 0; i < program_.header.steps; i++) shape(program_.steps[i]);
    make_outputs(inputs[0]);
    place();
  }

  std::vector<Tensor> run() {
    for (int64_t i = 0; i < program_.header.steps; i++) step(program_.steps[i]);
    return outputs_;
  }

 private:
  struct Value {
    int64_t images = 0;
    Image image{};
    bool flat = false;  // [N, C]
    int64_t last_read = -1, bytes = 0, at = -1;
  };

  void take_inputs(const std::vector<Tensor>& inputs) {
    STD_TORCH_CHECK(static_cast<int>(inputs.size()) == program_.header.inputs, "inputs: got ",
                    inputs.size(), ", accepted are ", program_.header.inputs);
    for (size_t i = 0; i < inputs.size(); i++) {
      const Tensor& input = inputs[i];
      STD_TORCH_CHECK(input.is_cpu() && (input.dim() == 4 || input.dim() == 2) &&
                          type_of(input, "inputs") == program_.type(),
                      "inputs[", i, "]: accepted is [N, C, H, W] or [N, C] of ",
                      name_of(program_.header.type), " on the CPU");
      Value& value = values_[i];
      value.images = input.size(0);
      value.flat = input.dim() == 2;
      value.image =
          value.flat
              ? Image{input.data_ptr(), input.size(1),  1, 1, input.stride(0), input.stride(1),
                      input.stride(0),  input.stride(0)}
              : image_of(input);
    }
  }

  // What a step reads: of a linear one all channels of all pixels of an image as those of one.
  Image source_of(const Step& step) const {
    Image source = values_[step.source].image;
    if (step.kind == StepKind::linear && source.height * source.width > 1) {
      source.channels *= source.height * source.width;
      source.height = source.width = 1;
      source.stride_h = source.stride_w = source.stride_n;
    }
    return source;
  }
  static Step with_window(Step step, const Image& source) {
    if (step.kind == StepKind::mean) {
      step.kernel_h = source.height;
      step.kernel_w = source.width;
    }
    return step;
  }

  void shape(const Step& given) {
    const Value& read = values_[given.source];
    const Image source = source_of(given);
    const Step step = with_window(given, source);
    STD_TORCH_CHECK(!step.has_weights() || source.channels == step.in_channels, "input: got ",
                    source.channels, " channels, accepted are ", step.in_channels);
    const int64_t rows = source.height + 2 * step.padding_h -
                         step.dilation_h * (step.kernel_h - 1) - 1,
                  cols =
                      source.width + 2 * step.padding_w - step.dilation_w * (step.kernel_w - 1) - 1;
    STD_TORCH_CHECK(rows >= 0 && cols >= 0, "input: got ", values_[0].image.height, "×",
                    values_[0].image.width, ", accepted are sizes that every kernel fits into");
    Value& value = values_[step.target];
    value.images = read.images;
    value.flat = step.kind == StepKind::linear || (step.kind == StepKind::quantise && read.flat);
    const int64_t channels = step.has_weights() ? step.out_channels : source.channels,
                  height = rows / step.stride_h + 1, width = cols / step.stride_w + 1;
    value.image = {nullptr, channels,         height,  width, channels * height * width,
                   1,       channels * width, channels};
    const int64_t numbers = value.images * channels * height * width;
    // Kernels read whole quads of bytes, up to three past the last.
    value.bytes = program_.held[step.target].in_bytes() ? (numbers ? numbers + 3 : 0)
                                                        : numbers * element_size();
    const int64_t index = &given - program_.steps;
    values_[step.source].last_read = index;
    if (step.residual < 0) return;
    Value& other = values_[step.residual];
    other.last_read = index;
    STD_TORCH_CHECK(other.images == value.images && other.image.channels == channels &&
                        other.image.height == height && other.image.width == width,
                    "input: got sizes at which a sum's two sides differ");
  }

  void make_outputs(const Tensor& like) {
    for (int32_t i = 0; i < program_.header.outputs; i++) {
      Value& value = values_[program_.outputs[i]];
      const Image& image = value.image;
      const Ints size = value.flat ? Ints{value.images, image.channels}
                                   : Ints{value.images, image.channels, image.height, image.width};
      outputs_.push_back(
          torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                               value.flat ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast));
      value.image.data = outputs_.back().data_ptr();
      value.last_read = program_.header.steps;
    }
  }

  // A residual that nobody reads afterwards is replaced by the sum, where each of its numbers is
  // read right before the sum is written there.
  bool replaces(const Step& step, int64_t index) const {
    if (step.residual < 0 || step.residual == step.source) return false;
    const Value& other = values_[step.residual];
    const bool pixelwise =
        step.kind == StepKind::layer || step.kind == StepKind::linear ||
        (step.kind == StepKind::convolution && step.kernel_h == 1 && step.kernel_w == 1 &&
         step.group_size == step.width_in && step.padding_h == 0 && step.padding_w == 0);
    return pixelwise && other.at >= 0 && other.last_read == index &&
           program_.held[step.residual].in_bytes() == program_.held[step.target].in_bytes();
  }

  void place() {
    Places places;
    for (int64_t i = 0; i < program_.header.steps; i++) {
      const Step& step = program_.steps[i];
      Value& value = values_[step.target];
      const bool in_place = !value.image.data && replaces(step, i);
      if (in_place)
        value.at = values_[step.residual].at;
      else if (!value.image.data)
        value.at = places.take(value.bytes);
      const auto release = [&](int64_t read) {
        const Value& of = values_[read];
        if (of.at >= 0 && of.last_read == i) places.give(of.at, of.bytes);
      };
      release(step.source);
      if (step.residual >= 0 && step.residual != step.source && !in_place) release(step.residual);
      // Nobody reads it.
      if (value.last_read < 0 && value.at >= 0) places.give(value.at, value.bytes);
    }
    char* const memory = thread_memory(places.end());
    for (Value& value : values_)
      if (value.at >= 0) value.image.data = memory + value.at;
  }

  int64_t element_size() const {
    return program_.type() == Type::float64 ? 8 : program_.type() == Type::float32 ? 4 : 2;
  }

  static bool averages(StepKind kind) {
    return kind == StepKind::mean_pool || kind == StepKind::mean;
  }

  void step(const Step& given) const {
    const Image source = source_of(given);
    const Step step = with_window(given, source);
    const Value& value = values_[step.target];
    const Image& target = value.image;
    if (value.bytes == 0) return;
    const Geometry g = step.geometry(value.images);
    const Forms forms = program_.forms(step);
    const Type type = type_of_step(program_.type(), forms);
    const Finish finish{step.activation,
                        step.residual < 0 ? nullptr : &values_[step.residual].image,
                        step.residual_last != 0, forms};
    const int64_t pixels = value.images * target.height * target.width;
    const char* const packed = program_.bytes + step.at;
    if (step.kind == StepKind::layer) {
      const Layer layer = step.layer(value.images);
      const int64_t products =
          value.images * source.height * source.width * step.in_channels * step.width_in +
          pixels * step.width_out * (step.group_size * g.taps() + step.out_channels);
      kernels().layer(type,
                      {source, layer, packed, Image{}, target, finish, torch_threads(products)});
    } else if (step.has_weights()) {
      const int64_t products = pixels * step.out_channels * step.group_size * g.taps();
      kernels().convolve_packed(type, {source, packed, target, g, finish, torch_threads(products)});
    } else {
      const int64_t taps = step.kind == StepKind::quantise ? per_number / 2 : g.taps(),
                    products = pixels * target.channels * taps;
      kernels().pool(type,
                     {source, target, g, averages(step.kind), finish, torch_threads(products)});
    }
  }

  const Program program_;
  std::vector<Value> values_;
  std::vector<Tensor> outputs_;
};

}  // namespace gross::cpu
