// For kernels whose speed does not matter or is the memory's: one function of an index, a thread
// for each index, and numbers whose type is known at run time. Compiled without CUDA it is a loop,
// so that the tests run the same functions on the host.
#pragma once

#include <cstdint>
#include <cstring>

#include "../series.h"
#include "call.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace gross::cuda {

#if defined(__CUDACC__)
// By name: torch's builds switch the operators off.
GROSS_HOST_DEVICE inline float float_of(__half value) { return __half2float(value); }
GROSS_HOST_DEVICE inline __half half_of(float value) { return __float2half_rn(value); }
using Half = __half;

template <class Body>
__global__ void each_kernel(Body body, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += step)
    body(i);
}
#else
using Half = _Float16;
inline float float_of(Half value) { return static_cast<float>(value); }
inline Half half_of(float value) { return static_cast<Half>(value); }
#endif

// body(i) for 0 ≤ i < count, in any order.
template <class Body>
int each(int64_t count, const Body& body, Stream stream) {
  if (count == 0) return 0;
#if defined(__CUDACC__)
  constexpr int64_t threads = 256, most_blocks = 1 << 20;
  const int64_t blocks = (count + threads - 1) / threads;
  each_kernel<<<static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks), threads, 0,
                stream>>>(body, count);
  return cudaGetLastError();
#else
  static_cast<void>(stream);
  for (int64_t i = 0; i < count; i++) body(i);
  return 0;
#endif
}

GROSS_HOST_DEVICE inline float float_of(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// To the nearest, ties to even; a NaN stays one.
GROSS_HOST_DEVICE inline uint16_t bfloat16_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

GROSS_HOST_DEVICE inline double load(const void* data, int64_t i, Type type) {
  switch (type) {
    case Type::float64: return static_cast<const double*>(data)[i];
    case Type::float32: return static_cast<const float*>(data)[i];
    case Type::bfloat16: return float_of(static_cast<const uint16_t*>(data)[i]);
    default: return float_of(static_cast<const Half*>(data)[i]);
  }
}

GROSS_HOST_DEVICE inline void store(void* data, int64_t i, Type type, double value) {
  const float narrow = static_cast<float>(value);
  switch (type) {
    case Type::float64: static_cast<double*>(data)[i] = value; return;
    case Type::float32: static_cast<float*>(data)[i] = narrow; return;
    case Type::bfloat16: static_cast<uint16_t*>(data)[i] = bfloat16_of(narrow); return;
    default: static_cast<Half*>(data)[i] = half_of(narrow);
  }
}

GROSS_HOST_DEVICE inline double gate_of(const Series& series, int i) {
  return series.gates == nullptr ? 1.0 : series.gates[i];
}

}  // namespace gross::cuda
