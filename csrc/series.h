// Ψ for every native kernel: where the block of an output channel starts. The only other place that
// says this is gross_kernels/series.py. Plain arithmetic, so that it serves host and device code.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GROSS_HOST_DEVICE __host__ __device__
#else
#define GROSS_HOST_DEVICE
#endif

namespace gross {

// First input channel that output channel `o` reads at group size `s`: start_s(o) = (o // (C_out s
// / C_in)) s.
GROSS_HOST_DEVICE inline int64_t block_start(int64_t o, int64_t in_channels, int64_t out_channels,
                                             int64_t s) {
  return o / (out_channels * s / in_channels) * s;
}

}  // namespace gross
