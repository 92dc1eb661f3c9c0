// The kernels of convolution.h for float32, multiplied as TF32.
#include "convolution_launch.h"

namespace gross::cuda {

template int launch_march<Type::float32>(const Plan&, const Device&, Stream);

}  // namespace gross::cuda
