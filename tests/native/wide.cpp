// AVX-512's kernels for any processor: 64-byte vectors and 32 registers, which the compiler makes
// of what the machine has. For tests alone: so the code of 16 lanes, of bfloat16 numbers in pairs
// and of pixels read in place runs, and is checked, where no processor has AVX-512.
#include "../../csrc/cpu/includes.h"

#define GROSS_ISA wide
#define GROSS_VECTOR_BYTES 64
#define GROSS_VECTOR_REGISTERS 32
#define GROSS_LOWERED
#include "../../csrc/cpu/entries.h"

namespace gross::cpu {
constexpr Kernels wide_kernels = wide::kernels_of("wide");
constexpr Kernels widebf16_kernels =
    wide::kernels_of<wide::Product::pairs, wide::Dot::instruction>("widebf16");
}  // namespace gross::cpu
