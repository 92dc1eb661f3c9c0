// What becomes of sums before they are stored, in a layer and in a convolution alike.
#pragma once

#include "planes.h"
#include "vector.h"

namespace gross::cpu::GROSS_ISA {

// Of one vector of outputs, or of several from one on: act(sum + bias + residual), or
// act(sum + bias) + residual.
template <class T>
struct Epilogue {
  const T *bias = nullptr, *slopes = nullptr;  // one number per output, in whole vectors
  Activation activation = Activation::none;
  bool residual_last = false;
  const Image* residual = nullptr;  // none at null
  int64_t displacement = 0;         // bytes from an output to its residual, where both lie alike

  // From vector `vector` of the outputs on.
  Epilogue from(int64_t vector) const {
    Epilogue later = *this;
    if (bias) later.bias += vector * lanes<T>;
    if (slopes) later.slopes += vector * lanes<T>;
    return later;
  }
  // What is left to do where the sums began with everything that is added before the activation.
  Epilogue after_sum() const {
    Epilogue rest = *this;
    rest.bias = nullptr;
    if (!residual_last) rest.residual = nullptr;
    return rest;
  }
  bool is_empty() const { return !bias && activation == Activation::none && !residual; }
  // Whether the activation is one that a kernel applies while the sums are in registers.
  bool in_registers() const {
    return activation <= Activation::prelu && !(residual && residual_last);
  }
};

// How an output's type, and its residual's, is stored and where: alike in all strides.
inline bool lie_alike(const Image& a, const Image& b) {
  return a.stride_n == b.stride_n && a.stride_c == b.stride_c && a.stride_h == b.stride_h &&
         a.stride_w == b.stride_w;
}

template <class T>
GROSS_INLINE const T* displaced(const T* from, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<intptr_t>(from) + bytes);
}

// exp(x) to one unit in the last place: 2ⁿ · exp(r) with |r| ≤ ln 2 / 2, exp(r) by a polynomial.
template <class T>
Vector<T> exponential(Vector<T> x) {
  if constexpr (std::is_same_v<T, float>) {
    const Vector<T> most = Vector<T>{} + 88.0f, least = Vector<T>{} - 87.0f;
    x = x > most ? most : (x < least ? least : x);
    // Adding 1.5 · 2²³ rounds to whole numbers, which are then the lowest bits.
    const Vector<T> shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f,
                    r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector<T> sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
    for (float c : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
      sum = sum * r + c;
    sum = sum * r * r + r + 1.0f;
    using Bits = Vector<Index<T>>;
    const Bits power = (__builtin_bit_cast(Bits, shifted) - 0x4b400000 + 127) << 23;
    return sum * __builtin_bit_cast(Vector<T>, power);
  } else {
    for (int i = 0; i < lanes<T>; i++) x[i] = std::exp(x[i]);
    return x;
  }
}
template <class T>
Vector<T> silu(Vector<T> value) {
  return value / (exponential<T>(-value) + 1);
}

template <Activation activation, class T>
GROSS_INLINE Vector<T> activated(Vector<T> value, [[maybe_unused]] Vector<T> slope) {
  const Vector<T> zero{}, six = zero + 6;
  if constexpr (activation == Activation::relu) return value < zero ? zero : value;
  if constexpr (activation == Activation::prelu) return value < zero ? value * slope : value;
  if constexpr (activation == Activation::relu6)
    return value < zero ? zero : (value > six ? six : value);
  if constexpr (activation == Activation::silu) return silu<T>(value);
  return value;
}
// Call f with the activation as a compile-time constant.
template <class F>
GROSS_INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::none: return f(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu: return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::prelu: return f(std::integral_constant<Activation, Activation::prelu>{});
    case Activation::relu6: return f(std::integral_constant<Activation, Activation::relu6>{});
    case Activation::silu: return f(std::integral_constant<Activation, Activation::silu>{});
  }
}

// `count` sums of one vector of outputs, `stride` apart, that are stored already; residual(i) is
// the i-th's.
template <class T, class Residual>
GROSS_INLINE void finish_sums(T* at, int64_t count, int64_t stride, const Epilogue<T>& epilogue,
                              Residual residual) {
  const Vector<T> zero{}, bias = epilogue.bias ? load<T>(epilogue.bias) : zero,
                          slope = epilogue.slopes ? load<T>(epilogue.slopes) : zero;
  with_activation(epilogue.activation, [&](auto activation) {
    for (int64_t i = 0; i < count; i++) {
      const Vector<T> other = epilogue.residual ? residual(i) : zero;
      const bool last = epilogue.residual_last;
      const Vector<T> value = load<T>(at + i * stride) + bias;
      const Vector<T> made = activated<activation, T>(last ? value : value + other, slope);
      store<T>(at + i * stride, last ? made + other : made);
    }
  });
}
// The same where outputs and residuals lie alike, and `outputs` lanes of each vector are there.
template <class T>
__attribute__((noinline)) void finish(T* at, int64_t count, int64_t stride,
                                      const Epilogue<T>& epilogue, int64_t outputs = lanes<T>) {
  if (outputs == lanes<T>)
    return finish_sums(at, count, stride, epilogue, [&](int64_t i) {
      return load<T>(displaced(at + i * stride, epilogue.displacement));
    });
  for (int64_t i = 0; i < count; i++, at += stride) {
    T sum[lanes<T>];
    store<T>(sum, load_first<T>(at, outputs));
    finish_sums(sum, 1, 0, epilogue, [&](int64_t) {
      return load_first<T>(displaced(at, epilogue.displacement), outputs);
    });
    store_first<T>(at, load<T>(sum), outputs);
  }
}

// A convolution's weights, packed beforehand, and what becomes of its sums.
template <class T>
struct Prepared {
  const T* weights;  // of all blocks of channels
  Epilogue<T> epilogue;
};

// An epilogue for outputs in `image`: where residual and output lie alike, as a displacement.
template <class T, class S>
bool displaces(Epilogue<T>& epilogue, const Image& image) {
  if (!epilogue.residual) return true;
  if (!std::is_same_v<S, T> || !lie_alike(*epilogue.residual, image)) return false;
  epilogue.displacement =
      static_cast<char*>(epilogue.residual->data) - static_cast<char*>(image.data);
  return true;
}

}  // namespace gross::cpu::GROSS_ISA
