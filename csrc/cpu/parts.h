// Loops in even parts, and numbers known when compiled.
#pragma once

#include "vector.h"

namespace gross::cpu::GROSS_ISA {

// Split `count` into as few parts of at most `most` as possible, of nearly equal size; calls
// f(begin, size).
template <class F>
GROSS_INLINE void even_parts(int64_t count, int64_t most, F f) {
  const int64_t parts = ceil_div(count, most);
  for (int64_t i = 0; i < parts; i++) {
    const int64_t begin = count * i / parts, end = count * (i + 1) / parts;
    f(begin, end - begin);
  }
}

// Call f with a compile-time constant equal to `value`, which is 1 … N.
template <int N, class F>
GROSS_INLINE void with_constant(int64_t value, F f) {
  if constexpr (N > 1) {
    if (value < N) return with_constant<N - 1>(value, f);
  }
  f(std::integral_constant<int, N>{});
}

}  // namespace gross::cpu::GROSS_ISA
