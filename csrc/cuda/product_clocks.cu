// A measurement that decides a layout: how long a warpgroup's product takes by where its pixels
// begin in shared memory. Two thirds of the products of wide.h begin at no multiple of 128 bytes,
// which the documents allow and say nothing about.
#include "wide.h"

namespace gross::cuda {

#if defined(GROSS_CUDA_WARP_GROUPS)

namespace {

using S = WideShape<Type::bfloat16, 4, 8>;
constexpr int batch = 36;  // products of a step
#if defined(__CUDACC__)
constexpr int batches = 64;
#else
constexpr int batches = 1;
#endif

constexpr int team_bytes = round_up(S::unit_bytes, 128), shared_bytes = S::teams * team_bytes + 128;

// clocks[block]: of one product of m64n64k16, as a multiprocessor delivers them to `S::teams`.
GROSS_KERNEL GROSS_BOUNDS(S::threads) time_products(float* clocks, int offset) {
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __trap();  // product_clocks() never chooses another architecture
#else
  const int thread = thread_index(), team = uniform(thread / warpgroup_threads);
  const uint32_t units = shared_base();
  for (int first = 0; first < shared_bytes; first += S::threads * 16)
    store_shared_128(units + first + thread * 16, {0, 0, 0, 0}, first + thread * 16 < shared_bytes);
  fence_for_matrix_units();
  barrier(0, S::threads);
  const uint64_t b = matrix_descriptor(units + team * team_bytes + offset, S::plane);
  float sum[S::atoms][4] = {};
  const uint32_t a[4] = {keep(0), keep(0), keep(0), keep(0)};
  const uint32_t begin = clock_now();
  GROSS_NO_UNROLL
  for (int i = 0; i < batches; i++) {
    warpgroup_arrive();
    GROSS_UNROLL
    for (int j = 0; j < batch; j++) warpgroup_multiply<S::type, S::atoms>(sum, a, b);
    warpgroup_commit();
    warpgroup_wait<0>();
    fence_sums(sum);
  }
  barrier(0, S::threads);
  const uint32_t elapsed = clock_now() - begin;
  store_global_32(clocks + block_x(),
                  as_word(static_cast<float>(elapsed) / (batch * batches * S::teams)), thread == 0);
#endif
}

}  // namespace

int product_clocks(int offset, float* clocks, const Device& device, Stream stream) {
  if (device.capability != 90) return unserved;
#if !defined(__CUDACC__)
  emulator::forget_allocations();
  emulator::allow(clocks, device.multiprocessors * sizeof(float), true);
#endif
  const Grid grid{device.multiprocessors, 1, S::threads, shared_bytes};
  return launch<&time_products>(grid, device, stream, clocks, offset);
}

#else

int product_clocks(int, float*, const Device&, Stream) { return unserved; }

#endif

}  // namespace gross::cuda
