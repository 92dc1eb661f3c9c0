// Which instruction set the kernels run with: the best that the processor has, or the one that
// GROSS_KERNELS_ISA names.
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "call.h"

namespace gross::cpu {

#if defined(__x86_64__)
// What __builtin_cpu_supports knows in new compilers alone.
static bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
#endif

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets;
#if defined(GROSS_WIDE)
  sets.push_back({&wide_kernels, true});
  sets.push_back({&widebf16_kernels, true});
#endif
  sets.push_back({&portable_kernels, true});
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  sets.push_back({&avx2_kernels, avx2});
  sets.push_back({&avxvnni_kernels, avx2 && has_avxvnni()});
  sets.push_back({&avx512_kernels, avx512});
  sets.push_back({&avx512vnni_kernels, avx512vnni});
  sets.push_back({&avx512bf16_kernels, avx512vnni && __builtin_cpu_supports("avx512bf16")});
#endif
  return sets;
}

static const Kernels& choose() {
  const char* const named = std::getenv("GROSS_KERNELS_ISA");
  const bool any = !named || !*named;
  const Kernels *best = nullptr, *chosen = nullptr;
  for (const InstructionSet& set : instruction_sets())
    if (set.present) {
      best = set.kernels;
      if (any || best->name == std::string(named)) chosen = best;
    }
  if (chosen) return *chosen;
  throw std::runtime_error("GROSS_KERNELS_ISA: got '" + std::string(named) +
                           "', accepted are portable, avx2, avxvnni, avx512, avx512vnni and "
                           "avx512bf16 where the processor has them; it has up to " +
                           best->name);
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace gross::cpu
