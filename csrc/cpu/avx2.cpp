// The kernels for AVX2 and FMA: 32-byte vectors, 16 registers. Nothing of this unit runs unless the
// processor has them.
#include "includes.h"

#if defined(__x86_64__)
// After the standard headers, so that no inline function of theirs is compiled for a processor that
// may not be there.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define GROSS_ISA avx2
#define GROSS_VECTOR_BYTES 32
#define GROSS_VECTOR_REGISTERS 16
#include "entries.h"

namespace gross::cpu {
constexpr Kernels avx2_kernels = avx2::kernels_of("avx2");
// The same with AVX-VNNI: four products of 8 bits by one instruction.
constexpr Kernels avxvnni_kernels =
    avx2::kernels_of<avx2::Product::numbers, avx2::Dot::instruction>("avxvnni");
}  // namespace gross::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
