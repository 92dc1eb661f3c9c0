// The kernels for AVX-512: 64-byte vectors, 32 registers. Nothing of this unit runs unless the
// processor has them.
#include "includes.h"

#if defined(__x86_64__)
// After the standard headers, so that no inline function of theirs is compiled for a processor that
// may not be there.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#endif

#define GROSS_ISA avx512
#define GROSS_VECTOR_BYTES 64
#define GROSS_VECTOR_REGISTERS 32
#include "entries.h"

namespace gross::cpu {
constexpr Kernels avx512_kernels = avx512::kernels_of("avx512");
// The same with AVX512_VNNI: four products of 8 bits by one instruction.
constexpr Kernels avx512vnni_kernels =
    avx512::kernels_of<avx512::Product::numbers, avx512::Dot::instruction>("avx512vnni");
// And with AVX512_BF16: the convolution of bfloat16 tensors in pairs of channels.
constexpr Kernels avx512bf16_kernels =
    avx512::kernels_of<avx512::Product::pairs, avx512::Dot::instruction>("avx512bf16");
}  // namespace gross::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
