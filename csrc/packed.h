// Packed weights: a header that says for whom they are, and the numbers in the kernels' order. That
// order depends on the processor's vectors, the numbers on the activations' type, and no size tells
// all of it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "arguments.h"

namespace gross::cpu {

// As many bytes as two cache lines, so that the weights after it are aligned as the tensor is.
struct PackedHeader {
  char magic[8] = {'G', 'r', 'o', 'S', 'S', 'p', 'k', 'd'};
  int32_t version = 2;  // of the order in which weights follow; every change of it counts
  int32_t vector_bytes;
  int32_t type;  // of the activations
  int32_t zero = 0;
  int64_t in_channels, width_in, width_out, group_size, out_channels, kernel_h, kernel_w;
  int64_t zeros[6] = {};

  PackedHeader() = default;  // for one that is read
  PackedHeader(Type of, const Layer& layer, int vector_bytes)
      : vector_bytes(vector_bytes),
        type(static_cast<int32_t>(of)),
        in_channels(layer.in_channels),
        width_in(layer.geometry.in_channels),
        width_out(layer.geometry.out_channels),
        group_size(layer.geometry.group_size),
        out_channels(layer.out_channels),
        kernel_h(layer.geometry.kernel_h),
        kernel_w(layer.geometry.kernel_w) {}

  bool operator==(const PackedHeader& other) const {
    return !std::memcmp(this, &other, sizeof other);
  }
};
static_assert(sizeof(PackedHeader) == 128);

// Packed weights begin with a header; it takes as many numbers as this.
inline int64_t header_numbers(ScalarType sum_type) {
  return sizeof(PackedHeader) / (sum_type == ScalarType::Double ? sizeof(double) : sizeof(float));
}
inline void* weights_of(const Tensor& packed) {
  return static_cast<char*>(packed.data_ptr()) + sizeof(PackedHeader);
}

// The layer's weights in the kernel's order, behind a header.
inline Tensor pack(const LayerCall& of, const Tensor& like) {
  const Type type = of.call.type;
  const int64_t numbers = kernels().packed_size(type, of.layer);
  const Ints size{header_numbers(of.sum_type()) + numbers};
  Tensor packed = torch::stable::empty(size, of.sum_type(), std::nullopt, like.device());
  const PackedHeader header(type, of.layer, kernels().vector_bytes);
  std::memcpy(packed.data_ptr(), &header, sizeof header);
  kernels().pack(type, of.layer, weights_of(packed),
                 torch_threads(per_number * numbers * of.call.series.active));
  return packed;
}

inline const char* name_of(int32_t type) {
  switch (static_cast<Type>(type)) {
    case Type::float32: return "float32";
    case Type::float64: return "float64";
    case Type::bfloat16: return "bfloat16";
    case Type::float16: return "float16";
    case Type::int8: return "int8";
  }
  return "an unknown dtype";
}

inline std::string described(const PackedHeader& header) {
  auto text = [](int64_t number) { return std::to_string(number); };
  return text(header.in_channels) + " → " + text(header.width_in) + " → " + text(header.width_out) +
         " → " + text(header.out_channels) + " channels, group size " + text(header.group_size) +
         ", kernel " + text(header.kernel_h) + "×" + text(header.kernel_w) + ", " +
         name_of(header.type) + " activations, vectors of " + text(header.vector_bytes) + " bytes";
}

// Refuses what `bottleneck_pack` did not make for this layer, type and processor.
inline void check_packed(const Tensor& packed, Type type, const Layer& layer) {
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

}  // namespace gross::cpu
