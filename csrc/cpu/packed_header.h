// What stands before packed weights and says for whom they are. Their order depends on the
// processor's vectors, their numbers on the activations' type, and no size tells all of it.
#pragma once

#include <cstdint>
#include <cstring>

#include "call.h"

namespace gross::cpu {

// As many bytes as two cache lines, so that the weights after it are aligned as the tensor is.
struct PackedHeader {
  char magic[8] = {'G', 'r', 'o', 'S', 'S', 'p', 'k', 'd'};
  int32_t version = 1;  // of the order in which weights follow; every change of it counts
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

}  // namespace gross::cpu
