// The kernels of convolution.h for float16.
#include "convolution_launch.h"

namespace gross::cuda {

template int launch_march<Type::float16>(const Plan&, const Device&, Stream);

}  // namespace gross::cuda
