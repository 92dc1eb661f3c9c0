// The kernels of convolution.h for bfloat16.
#include "convolution_launch.h"

namespace gross::cuda {

template int launch_march<Type::bfloat16>(const Plan&, const Device&, Stream);

}  // namespace gross::cuda
