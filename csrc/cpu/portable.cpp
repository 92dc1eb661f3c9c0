// The kernels for any processor: 16-byte vectors, which every compiler has on x86-64 and Arm.
#include "includes.h"

#define GROSS_ISA portable
#define GROSS_VECTOR_BYTES 16
#define GROSS_VECTOR_REGISTERS 16
#include "entries.h"

namespace gross::cpu {
constexpr Kernels portable_kernels = portable::kernels_of("portable");
}
