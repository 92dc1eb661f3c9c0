// Which instruction set the kernels run with: the best that the processor has, or the one that
// GROSS_KERNELS_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "call.h"

namespace gross::cpu {

static const Kernels& choose() {
  const Kernels* best = &portable_kernels;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) best = &avx2_kernels;
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512) best = &avx512_kernels;
  if (avx512bf16) best = &avx512bf16_kernels;
#endif
  const char* forced = std::getenv("GROSS_KERNELS_ISA");
  if (!forced || !*forced) return *best;
  const std::string name = forced;
  if (name == "portable") return portable_kernels;
#if defined(__x86_64__)
  if (name == "avx2" && avx2) return avx2_kernels;
  if (name == "avx512" && avx512) return avx512_kernels;
  if (name == "avx512bf16" && avx512bf16) return avx512bf16_kernels;
#endif
  throw std::runtime_error("GROSS_KERNELS_ISA: got '" + name +
                           "', accepted are portable, avx2, avx512 and avx512bf16 where the "
                           "processor has them; it has up to " +
                           best->name);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace gross::cpu
