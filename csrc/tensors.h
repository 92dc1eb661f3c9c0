// Torch's tensors as the kernels see them, and new ones. Nothing here checks an argument.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cpu/includes.h"

namespace gross::cpu {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// The memory format of ATen's convolutions: channels-last when the strides say so, contiguous in
// every doubtful case.
inline bool is_channels_last(const Tensor& tensor) {
  int64_t least = 0;
  if (tensor.stride(1) == 0) return false;
  for (int d : {1, 3, 2, 0}) {
    if (tensor.size(d) == 0 || tensor.stride(d) < least || (d == 0 && least == tensor.stride(1)))
      return false;
    least = tensor.size(d) > 1 ? tensor.stride(d) * tensor.size(d) : tensor.stride(d);
  }
  return true;
}

inline Tensor empty_image(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  const Ints size{n, c, h, w};
  return torch::stable::empty(
      size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      is_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// A contiguous tensor past the dispatcher, in less than half the time. Unlike
// torch::stable::empty it is not filled where torch fills memory for debugging, so it is for
// tensors that are written whole.
inline Tensor quick_tensor(const std::vector<int64_t>& size, ScalarType type) {
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
inline Tensor no_tensor(const Tensor& like) { return quick_tensor({0}, like.scalar_type()); }

inline Image image_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.size(1),   tensor.size(2),   tensor.size(3),
          tensor.stride(0),  tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// Multiply–accumulates from which on work is shared: less takes as long as waking a second thread,
// and longer where the other core is busy or asleep.
constexpr int64_t worth_sharing = 1 << 19;
// A number that is summed, packed or copied takes as long as so many.
constexpr int64_t per_number = 16;

// Torch's threads, or the calling one alone where the work is too little to share.
inline Threads torch_threads(int64_t products) {
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
inline void copy_rows(const Image& from, void* to, int64_t begin, int64_t end) {
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
// are not, and torch::stable::contiguous would be a large part of the smallest layers' time.
inline Tensor compact(const Tensor& tensor) {
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

}  // namespace gross::cpu
