// The kernels for any processor: 16-byte vectors, which every compiler has on x86-64 and Arm.
#include "includes.h"

#define GROSS_ISA portable
#define GROSS_VECTOR_BYTES 16
#define GROSS_VECTOR_REGISTERS 16
#include "kernels.h"

namespace gross::cpu {
const Kernels portable_kernels{"portable",
                               portable::forward_entry<>,
                               portable::input_grad_entry<>,
                               portable::weight_grad_entry<>,
                               portable::packed_size_entry,
                               portable::pack_entry,
                               portable::layer_entry,
                               portable::layer_backward_entry,
                               portable::sum_entry};
}
