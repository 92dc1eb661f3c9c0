// Work shared by the threads of a call.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "call.h"

namespace gross::cpu {

// Run f(begin, end) over parts of [0, count) on the caller's threads. Each takes one part after the
// other, four on average: one that the system wakes late, as virtual machines do, does less.
template <class F>
void run(const Threads& threads, int64_t count, F& f) {
  struct Parts {
    F& f;
    int64_t count, parts;
    std::atomic<int64_t> next{0};
  } parts{f, count, std::min<int64_t>(count, threads.count > 1 ? 4 * threads.count : 1)};
  auto take = [](void* context, int64_t, int64_t) {
    Parts& all = *static_cast<Parts*>(context);
    for (int64_t i; (i = all.next++) < all.parts;)
      all.f(all.count * i / all.parts, all.count * (i + 1) / all.parts);
  };
  threads.run(std::min<int64_t>(threads.count, parts.parts), take, &parts);
}

}  // namespace gross::cpu
