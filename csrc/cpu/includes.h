// What the kernels use of the standard library and of this project, before any unit sets its target.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../series.h"
#include "call.h"
#include "plan.h"

namespace gross::cpu {

// Run f(begin, end) over slices of [0, count) on the caller's threads.
template <class F>
void run(const Threads& threads, int64_t count, F& f) {
  threads.run(count, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); }, &f);
}

}  // namespace gross::cpu
