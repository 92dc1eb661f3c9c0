// The kernels of one instruction set, written once for all: what a unit includes.
#pragma once

#include "bottleneck.h"
#include "bottleneck_backward.h"
#include "bytes_convolve.h"
#include "bytes_pool.h"
#include "convolve.h"
#include "in_place.h"
#include "pool.h"
#include "prepared.h"
#include "sum_pool.h"
#include "weight_grad.h"

namespace gross::cpu::GROSS_ISA {

template <class F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::float32: return f(float{});
    case Type::float64: return f(double{});
    case Type::bfloat16: return f(bfloat16{});
    case Type::float16: return f(float16{});
    case Type::int8: break;  // of packed weights and pooling alone
  }
}

template <Product product>
void convolve_entry(Type type, const Convolution& call) {
  const Geometry& g = call.geometry;
  const Image &source = call.source, &target = call.target;
  const Plan plan =
      call.pass == Pass::forward
          ? forward_plan(g, source.height, source.width, target.height, target.width)
          : input_grad_plan(g, target.height, target.width, source.height, source.width);
  with_type(type, [&](auto s) {
    using S = decltype(s);
    if (call.pass == Pass::forward ? reads_pixels(g) : is_pointwise(g))
      return convolve_pointwise<Sum<S>, S>(call);
    const Channels<Sum<S>> channels(g, call.pass);
    const std::vector<RowTarget> rows = row_targets<Sum<S>, S>(plan, source, target, channels);
    if (is_faster_in_place(rows, channels))
      return convolve_in_place<Sum<S>, S>(rows, channels, call);
    if constexpr (product == Product::pairs && std::is_same_v<S, bfloat16>)
      if (has_pairs(source, Direction(g, call.pass)))
        return convolve<float, S, product>(plan, call);
    convolve<Sum<S>, S>(plan, call);
  });
}

template <Product product>
void weight_grad_entry(Type type, const WeightGradient& call) {
  const Geometry& g = call.geometry;
  const Image &input = call.input, &grad = call.grad;
  const Plan plan = forward_plan(g, input.height, input.width, grad.height, grad.width);
  with_type(type, [&](auto s) {
    using S = decltype(s);
    const Channels<Sum<S>> channels(g, Pass::forward);
    if constexpr (product == Product::pairs && std::is_same_v<S, bfloat16>)
      // Rows of channels are read by broadcasts alone.
      if (has_pairs(input, channels) && !is_pointwise(g) && channels.fetch == Fetch::broadcast &&
          Channels<float>(g, Pass::forward, product).fetch == Fetch::broadcast)
        return weight_grad<float, S, product>(plan, call);
    const std::vector<RowTarget> rows = row_targets<Sum<S>, S>(plan, input, grad, channels);
    if (has_row_weights(rows, channels))
      return weight_grad_in_place<Sum<S>, S>(rows[0], channels, call);
    weight_grad<Sum<S>, S>(plan, call);
  });
}

inline int64_t packed_size_entry(Type type, const Layer& layer) {
  int64_t size = 0;
  if (type == Type::int8) return ByteLayerPacking(layer).size;
  with_type(type, [&](auto s) { size = Packing<Sum<decltype(s)>>(layer).size; });
  return size;
}

inline void pack_entry(Type type, const Layer& layer, void* packed, const Threads& threads) {
  if (type == Type::int8) return pack_byte_layer(layer, static_cast<int32_t*>(packed), threads);
  with_type(type, [&](auto s) {
    using S = decltype(s);
    pack_layer<Sum<S>, S>(layer, static_cast<Sum<S>*>(packed), threads);
  });
}

template <Dot best>
void layer_entry(Type type, const LayerForward& call) {
  if (type == Type::int8)
    return with_dot<best>(
        ByteLayerPacking(call.layer).fits(static_cast<const int32_t*>(call.packed)),
        [&](auto dot) { LayerWalk<int32_t, uint8_t, dot>(call).run(); });
  with_type(type, [&](auto s) {
    using S = decltype(s);
    LayerWalk<Sum<S>, S>(call).run();
  });
}

inline int64_t packed_kernel_size_entry(Type type, const Geometry& geometry) {
  int64_t size = 0;
  if (type == Type::int8) return BytePacking(geometry).size;
  with_type(type, [&](auto s) { size = KernelPacking<Sum<decltype(s)>>(geometry).size; });
  return size;
}

inline void pack_kernel_entry(Type type, const Kernel& kernel, void* packed,
                              const Threads& threads) {
  if (type == Type::int8) return pack_byte_kernel(kernel, static_cast<float*>(packed), threads);
  with_type(type, [&](auto s) {
    using S = decltype(s);
    pack_kernel<Sum<S>, S>(kernel, static_cast<Sum<S>*>(packed), threads);
  });
}

template <Dot best>
void convolve_packed_entry(Type type, const PackedConvolution& call) {
  if (type == Type::int8) return convolve_bytes<best>(call);
  with_type(type, [&](auto s) {
    using S = decltype(s);
    convolve_prepared<Sum<S>, S>(call);
  });
}

inline void pool_entry(Type type, const Pooling& call) {
  if (type == Type::int8) return pool_bytes(call);
  with_type(type, [&](auto s) {
    using S = decltype(s);
    pool<Sum<S>, S>(call);
  });
}

inline void layer_backward_entry(Type type, const LayerBackward& call) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    LayerBackwardWalk<Sum<S>, S>(call).run();
  });
}

inline void sum_entry(const Series& series, int64_t count, void* output, const Threads& threads) {
  with_type(series.type, [&](auto s) {
    using S = decltype(s);
    sum<Sum<S>, S>(series, count, static_cast<S*>(output), threads);
  });
}

inline void sum_pool_entry(Type type, const SumPooling& call) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    sum_pool<Sum<S>, S>(call);
  });
}

// The kernels of a unit; with pairs where its processors multiply pairs of bfloat16 numbers, with
// one instruction for four products of 8 bits where they have that.
template <Product product = Product::numbers, Dot best = Dot::narrow>
constexpr Kernels kernels_of(const char* name) {
  return {name,
          GROSS_VECTOR_BYTES,
          convolve_entry<product>,
          weight_grad_entry<product>,
          packed_size_entry,
          pack_entry,
          layer_entry<best>,
          packed_kernel_size_entry,
          pack_kernel_entry,
          convolve_packed_entry<best>,
          pool_entry,
          layer_backward_entry,
          sum_entry,
          sum_pool_entry};
}

}  // namespace gross::cpu::GROSS_ISA
