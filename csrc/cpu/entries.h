// The kernels of one instruction set, written once for all: what a unit includes.
#pragma once

#include "bottleneck.h"
#include "bottleneck_backward.h"
#include "convolve.h"
#include "in_place.h"
#include "weight_grad.h"

namespace gross::cpu::GROSS_ISA {

template <class F>
void with_type(Type type, F f) {
  switch (type) {
    case Type::float32: return f(float{});
    case Type::float64: return f(double{});
    case Type::bfloat16: return f(bfloat16{});
    case Type::float16: return f(float16{});
  }
}

template <Product product>
void convolve_entry(Type type, const Plan& plan, const Image& source, const Series& series,
                    const Image& target, const Geometry& g, bool backward, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    if (is_pointwise(g))
      return convolve_pointwise<Sum<S>, S>(source, series, target, g, backward, threads);
    const Channels<Sum<S>> channels(g, backward);
    const std::vector<RowTarget> rows = row_targets<Sum<S>, S>(plan, source, target, channels);
    if (is_faster_in_place(rows, channels))
      return convolve_in_place<Sum<S>, S>(rows, channels, source, series, target, g, threads);
    if constexpr (product == Product::pairs && std::is_same_v<S, bfloat16>)
      if (has_pairs(source, Direction(g, backward)))
        return convolve<float, S, product>(plan, source, series, target, g, backward, threads);
    convolve<Sum<S>, S>(plan, source, series, target, g, backward, threads);
  });
}

template <Product product>
void forward_entry(Type type, const Image& input, const Series& series, const Image& output,
                   const Geometry& g, const Threads& threads) {
  convolve_entry<product>(type,
                          forward_plan(g, input.height, input.width, output.height, output.width),
                          input, series, output, g, false, threads);
}

template <Product product>
void input_grad_entry(Type type, const Image& grad, const Series& series, const Image& grad_input,
                      const Geometry& g, const Threads& threads) {
  convolve_entry<product>(
      type, input_grad_plan(g, grad_input.height, grad_input.width, grad.height, grad.width), grad,
      series, grad_input, g, true, threads);
}

template <Product product>
void weight_grad_entry(Type type, const Image& grad, const Image& input, const Series& series,
                       const SeriesGradient& gradient, const Geometry& g, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    if constexpr (product == Product::pairs && std::is_same_v<S, bfloat16>)
      // Rows of channels are read by broadcasts alone.
      if (has_pairs(input, Direction(g, false)) && !is_pointwise(g) &&
          Channels<float>(g, false).fetch == Fetch::broadcast &&
          Channels<float>(g, false, product).fetch == Fetch::broadcast)
        return weight_grad<float, S, product>(grad, input, series, gradient, g, threads);
    const Channels<Sum<S>> channels(g, false);
    const std::vector<RowTarget> rows = row_targets<Sum<S>, S>(
        forward_plan(g, input.height, input.width, grad.height, grad.width), input, grad, channels);
    if (has_row_weights(rows, channels.fetch))
      return weight_grad_in_place<Sum<S>, S>(rows[0], channels, grad, input, series, gradient, g,
                                             threads);
    weight_grad<Sum<S>, S>(grad, input, series, gradient, g, threads);
  });
}

inline int64_t packed_size_entry(Type type, const Layer& layer) {
  int64_t size = 0;
  with_type(type, [&](auto s) { size = Packing<Sum<decltype(s)>>(layer).size; });
  return size;
}

inline void pack_entry(Type type, const Layer& layer, void* packed, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    pack_layer<Sum<S>, S>(layer, static_cast<Sum<S>*>(packed), threads);
  });
}

inline void layer_entry(Type type, const Image& input, const Layer& layer, const void* packed,
                        const Image& inner, const Image& output, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    run_layer<Sum<S>, S>(input, layer, static_cast<const Sum<S>*>(packed), inner, output, threads);
  });
}

inline void layer_backward_entry(Type type, const Image& grad, const Image& input,
                                 const Layer& layer, const Image& inner, const Image& output,
                                 const LayerGradient& gradient, const Threads& threads) {
  with_type(type, [&](auto s) {
    using S = decltype(s);
    run_layer_backward<Sum<S>, S>(grad, input, layer, inner, output, gradient, threads);
  });
}

inline void sum_entry(const Series& series, int64_t count, void* output, const Threads& threads) {
  with_type(series.type, [&](auto s) {
    using S = decltype(s);
    sum<Sum<S>, S>(series, count, static_cast<S*>(output), threads);
  });
}

// The kernels of a unit; with pairs where its processors multiply pairs of bfloat16 numbers.
template <Product product = Product::numbers>
constexpr Kernels kernels_of(const char* name) {
  return {name,
          GROSS_VECTOR_BYTES,
          forward_entry<product>,
          input_grad_entry<product>,
          weight_grad_entry<product>,
          packed_size_entry,
          pack_entry,
          layer_entry,
          layer_backward_entry,
          sum_entry};
}

}  // namespace gross::cpu::GROSS_ISA
