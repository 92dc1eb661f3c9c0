// What becomes of a layer's sums before they are stored.
#pragma once

#include "vector.h"

namespace gross::cpu::GROSS_ISA {

enum class Activation { none, relu };

template <class T>
struct Epilogue {
  const T* bias = nullptr;  // one number per output, in whole vectors; none at null
  Activation activation = Activation::none;

  // From vector `vector` of the outputs on.
  Epilogue from(int64_t vector) const {
    return {bias ? bias + vector * lanes<T> : nullptr, activation};
  }
};

template <class T>
GROSS_INLINE Vector<T> activated(Vector<T> value, Activation activation) {
  return activation == Activation::relu ? (value < Vector<T>{} ? Vector<T>{} : value) : value;
}

}  // namespace gross::cpu::GROSS_ISA
