// Every primitive of csrc/cuda/primitives.h alone, one block of four warps each: compiled by nvcc
// for the GPU at hand and by the host's compiler for the emulator. test_cuda.py gives both the same
// words and compares what they write, bit by bit: products are of small integers, whose sums are
// exact in any order.
#include "primitives.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace {

using namespace gross::cuda;

constexpr int threads = 128, words = 4096;  // of the input, and of the output

// A small integer, -4 to 3, from the bits of a word.
GROSS_DEVICE float small(uint32_t word, int field) {
  return static_cast<float>(static_cast<int>(word >> 3 * field & 7)) - 4;
}

template <Type type>
GROSS_DEVICE uint32_t small_operand(uint32_t word, int field) {
  if constexpr (type == Type::float32)
    return as_word(small(word, field));
  else
    return pack<type>(small(word, field), small(word, field + 1));
}

GROSS_DEVICE void fill_shared(const uint32_t* input, int thread) {
  for (int i = 0; i < words / 4 / threads; i++) {
    const int piece = i * threads + thread;
    store_shared_128(shared_base() + piece * 16, load_global_128(input + piece * 4, true), true);
  }
  barrier(0, threads);
}

GROSS_DEVICE void write(uint32_t* output, int index, uint32_t word) {
  store_global_32(output + index, word, true);
}

// Asynchronous copies: real ones, ones of zeros, ones that are off, in two groups.
struct Copies {
  static GROSS_DEVICE void run(const uint32_t* input, uint32_t* output, int thread) {
    fill_shared(input, thread);
    for (int i = 0; i < 2; i++) {
      const int piece = i * threads + thread;
      copy_async_16(shared_base() + piece * 16, input + (1023 - piece) * 4, piece % 3 != 0,
                    piece % 5 != 0);
      copy_async_commit();
    }
    copy_async_wait<1>();
    copy_async_wait<0>();
    barrier(0, threads);
    for (int i = 0; i < words / threads; i++)
      write(output, i * threads + thread,
            load_shared_32(shared_base() + (i * threads + thread) * 4, true));
  }
};

// All four forms, with rows in no order; r[2] and r[3] of the two-matrix forms stay as they are.
struct Matrices {
  static GROSS_DEVICE void run(const uint32_t* input, uint32_t* output, int thread) {
    fill_shared(input, thread);
    const uint32_t row = shared_base() + (thread * 37 + 11) % 1024 * 16;
    uint32_t r[4][4];
    for (int form = 0; form < 4; form++)
      for (int i = 0; i < 4; i++) r[form][i] = 100 * form + i;
    load_matrix_x4(r[0], row);
    load_matrix_x2(r[1], row);
    load_matrix_x4_transposed(r[2], row);
    load_matrix_x2_transposed(r[3], row);
    for (int form = 0; form < 4; form++)
      for (int i = 0; i < 4; i++) write(output, (form * 4 + i) * threads + thread, r[form][i]);
  }
};

template <Type type>
struct Products {
  static GROSS_DEVICE void run(const uint32_t* input, uint32_t* output, int thread) {
    uint32_t a[4], b[2];
    float d[4], first[4], half[4];
    for (int i = 0; i < 4; i++) {
      const uint32_t word = load_global_32(input + i * threads + thread, true);
      a[i] = small_operand<type>(word, 0);
      if (i < 2) b[i] = small_operand<type>(word, 2);
      d[i] = half[i] = small(word, 4);
      first[i] = 1000;
    }
    multiply<type>(d, a, b[0], b[1]);
    multiply_first<type>(first, a, b[0], b[1]);
    multiply_half<type>(half, a[0], a[1], b[0]);
    for (int i = 0; i < 4; i++) {
      write(output, i * threads + thread, as_word(d[i]));
      write(output, (4 + i) * threads + thread, as_word(first[i]));
      write(output, (8 + i) * threads + thread, as_word(half[i]));
    }
  }
};

// Conversions, of numbers as they come and of ties.
struct Conversions {
  static GROSS_DEVICE void run(const uint32_t* input, uint32_t* output, int thread) {
    for (int i = 0; i < 4; i++) {
      const uint32_t word = load_global_32(input + i * threads + thread, true);
      const float value = as_float(word), tie = as_float((word & 0xfffff000u) | 0x1000u);
      write(output, (8 * i + 0) * threads + thread,
            pack<Type::bfloat16>(value, as_float((word & 0xffff0000u) | 0x8000u)));
      write(output, (8 * i + 1) * threads + thread, pack<Type::float16>(value, tie));
      write(output, (8 * i + 2) * threads + thread, round_tf32(value));
      write(output, (8 * i + 3) * threads + thread, round_tf32(tie));
      write(output, (8 * i + 4) * threads + thread, as_word(low_half<Type::bfloat16>(word)));
      write(output, (8 * i + 5) * threads + thread, as_word(high_half<Type::bfloat16>(word)));
      write(output, (8 * i + 6) * threads + thread, as_word(low_half<Type::float16>(word)));
      write(output, (8 * i + 7) * threads + thread, as_word(high_half<Type::float16>(word)));
    }
  }
};

// Loads and stores of every width, each off in some lanes, in shared and in global memory.
struct Accesses {
  static GROSS_DEVICE void run(const uint32_t* input, uint32_t* output, int thread) {
    fill_shared(input, thread);
    const uint32_t from = shared_base() + (thread * 29 % threads) * 16,
                   to = shared_base() + 8192 + thread * 32;
    uint32_t pair[2];
    load_shared_64(pair, from + 8, thread % 3 != 0);
    const Words4 four = load_shared_128(from, thread % 4 != 0);
    const uint32_t half = load_shared_16(from + 2, thread % 5 != 0),
                   word = load_shared_32(from + 4, thread % 7 != 0);
    barrier(0, threads);
    store_shared_128(to, four, thread % 3 != 1);
    store_shared_64(to + 16, pair[0], pair[1], thread % 4 != 1);
    store_shared_32(to + 24, word, thread % 5 != 1);
    store_shared_16(to + 30, half, thread % 7 != 1);
    barrier(0, threads);
    for (int i = 0; i < 8; i++)
      write(output, i * threads + thread,
            load_shared_32(shared_base() + 8192 + (i * threads + thread) * 4, true));
    const Words4 wide = load_global_128(input + (threads - 1 - thread) * 4, thread % 3 != 2);
    uint32_t* const at = output + 1024 + thread * 8;
    store_global_128(at, wide, thread % 4 != 2);
    store_global_64(at + 4, load_global_32(input + 5 * thread, thread % 5 != 2), wide.x,
                    thread % 7 != 2);
    store_global_16(
        reinterpret_cast<uint16_t*>(at) + 13,
        load_global_16(reinterpret_cast<const uint16_t*>(input) + 3 * thread, thread % 3 != 0),
        thread % 2 != 0);
  }
};

// What lanes and warps say to one another.
struct Exchanges {
  static GROSS_DEVICE void run(const uint32_t* input, uint32_t* output, int thread) {
    const uint32_t word = load_global_32(input + thread, true);
    write(output, thread, any_lane((word & 31u) == 7u));
    write(output, threads + thread, any_lane(false));
    write(output, 2 * threads + thread, as_word(shuffle_xor(small(word, 0), 5)));
    write(output, 3 * threads + thread, static_cast<uint32_t>(uniform(static_cast<int>(word))));
    write(output, 4 * threads + thread, keep(word));
    // Pairs of warps at barriers of their own, then all.
    store_shared_32(shared_base() + thread * 4, word, true);
    barrier(1 + thread / 64, 64);
    const uint32_t near = load_shared_32(shared_base() + (thread ^ 32) * 4, true);
    barrier(0, threads);
    store_shared_32(shared_base() + (threads - 1 - thread) * 4, near, true);
    barrier(0, threads);
    write(output, 5 * threads + thread, load_shared_32(shared_base() + thread * 4, true));
    store_shared_32(shared_base() + 8192 + thread * 4, near, true);
    warp_barrier();
    write(output, 6 * threads + thread,
          load_shared_32(shared_base() + 8192 + (thread ^ 9) * 4, true));
  }
};

// 64 × 56 or 64 × 16 on four warps, the pixels from a shifted address on and with planes as the
// kernels lay them: the assumption is that a descriptor without swizzle may begin at any 16 bytes.
template <Type type, int atoms, int shift>
struct WarpgroupProducts {
  static GROSS_DEVICE void run(const uint32_t* input, uint32_t* output, int thread) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    constexpr uint32_t plane = 67 * 16;
    for (int i = 0; i < 5; i++) {
      const int word = i * threads + thread;
      store_shared_32(shared_base() + word * 4,
                      small_operand<type>(load_global_32(input + word, true), 0), true);
    }
    fence_for_matrix_units();
    barrier(0, threads);
    float d[atoms][4];
    uint32_t a[4];
    for (int i = 0; i < atoms; i++)
      for (int j = 0; j < 4; j++)
        d[i][j] = small(load_global_32(input + (i * 4 + j) * threads + thread, true), 3);
    for (int i = 0; i < 4; i++)
      a[i] = small_operand<type>(load_global_32(input + i * threads + thread, true), 5);
    warpgroup_arrive();
    warpgroup_multiply<type, atoms>(d, a, matrix_descriptor(shared_base() + shift * 16, plane));
    warpgroup_commit();
    warpgroup_wait<0>();
    for (int i = 0; i < atoms; i++)
      for (int j = 0; j < 4; j++) write(output, (i * 4 + j) * threads + thread, as_word(d[i][j]));
#endif
  }
};

template <class Primitive>
GROSS_KERNEL probe(const uint32_t* input, uint32_t* output) {
  Primitive::run(input, output, thread_index());
}

using Kernel = void (*)(const uint32_t*, uint32_t*);
struct Named {
  const char* name;
  Kernel kernel;
};
const Named probes[] = {
    {"copies", probe<Copies>},
    {"matrices", probe<Matrices>},
    {"float16 products", probe<Products<Type::float16>>},
    {"bfloat16 products", probe<Products<Type::bfloat16>>},
    {"TF32 products", probe<Products<Type::float32>>},
    {"conversions", probe<Conversions>},
    {"accesses", probe<Accesses>},
    {"exchanges", probe<Exchanges>},
    {"float16 warpgroup products", probe<WarpgroupProducts<Type::float16, 7, 0>>},
    {"bfloat16 warpgroup products", probe<WarpgroupProducts<Type::bfloat16, 7, 0>>},
    {"bfloat16 warpgroup products from the next pixel on",
     probe<WarpgroupProducts<Type::bfloat16, 7, 1>>},
    {"float16 warpgroup products of 64 columns from the next pixel on",
     probe<WarpgroupProducts<Type::float16, 8, 1>>},
    {"bfloat16 warpgroup products of 64 columns from the second pixel on",
     probe<WarpgroupProducts<Type::bfloat16, 8, 2>>},
};

}  // namespace

#define GROSS_EXPORT extern "C" __attribute__((visibility("default")))
GROSS_EXPORT const char* name_of(int which) {
  return which < static_cast<int>(sizeof(probes) / sizeof(*probes)) ? probes[which].name : nullptr;
}

// Returns a cudaError_t. Both pointers are the host's, of `words` words.
GROSS_EXPORT int run(int which, const uint32_t* input, uint32_t* output) {
  const int shared_bytes = words * 4;
#if defined(__CUDACC__)
  uint32_t *from = nullptr, *to = nullptr;
  cudaMalloc(&from, words * 4);
  cudaMalloc(&to, words * 4);
  cudaMemcpy(from, input, words * 4, cudaMemcpyHostToDevice);
  cudaMemcpy(to, output, words * 4, cudaMemcpyHostToDevice);
  const int error = start(probes[which].kernel, 1, 1, threads, shared_bytes, nullptr, from, to);
  const int copied = cudaMemcpy(output, to, words * 4, cudaMemcpyDeviceToHost);
  cudaFree(from);
  cudaFree(to);
  return error != 0 ? error : copied;
#else
  emulator::forget_allocations();
  emulator::allow(input, words * 4, false);
  emulator::allow(output, words * 4, true);
  return start(probes[which].kernel, 1, 1, threads, shared_bytes, nullptr, input, output);
#endif
}
