// Every instruction that the kernels take from PTX, each behind one function. Beside the device's
// version stands its twin for the host, where tests/cuda_on_host/emulator.h runs the kernels: it
// does what the PTX manual documents, layouts of fragments included. Addresses of shared memory are
// bytes from the start of the 32-bit shared window; `on` predicates an access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "call.h"

#if defined(__CUDACC__)
#define GROSS_DEVICE __device__ __forceinline__
#define GROSS_HOST_DEVICE_INLINE __host__ __device__ inline
#define GROSS_KERNEL __global__ void
#define GROSS_BOUNDS(threads) __launch_bounds__(threads, 1)
#define GROSS_UNROLL _Pragma("unroll")
#define GROSS_NO_UNROLL _Pragma("unroll 1")
#else
#include "emulator.h"
#define GROSS_DEVICE inline
#define GROSS_HOST_DEVICE_INLINE inline
#define GROSS_KERNEL inline void
#define GROSS_BOUNDS(threads)
#define GROSS_UNROLL
#define GROSS_NO_UNROLL
#endif

namespace gross::cuda {

struct alignas(16) Words4 {
  uint32_t x, y, z, w;
};

GROSS_HOST_DEVICE_INLINE constexpr int bytes_of(Type type) {
  return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2;
}

// Matrix products take their k dimension 32 bytes at a time: 16 channels of 16 bits, or 8 of TF32.
// Fragments of A (16 rows × 32 bytes, four words a lane) and B (8 columns × 32 bytes, two words)
// lie alike for all types, and ldmatrix delivers them: lane l holds word l % 4 of row l / 4; A's
// words are rows 0–7 and 8–15 of the first 16 bytes, then of the last; B's are the first and the
// last 16 bytes. D (16 × 8 float32): lane l holds columns 2 (l % 4), + 1 of row l / 4, then of row
// l / 4 + 8.

#if defined(__CUDACC__)

GROSS_DEVICE int thread_index() { return threadIdx.x; }
GROSS_DEVICE int block_threads() { return blockDim.x; }
GROSS_DEVICE int block_x() { return blockIdx.x; }
GROSS_DEVICE int block_y() { return blockIdx.y; }
GROSS_DEVICE int grid_x() { return gridDim.x; }
// A multiprocessor's clock; differences are what counts.
GROSS_DEVICE uint32_t clock_now() { return static_cast<uint32_t>(clock64()); }
GROSS_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(128) unsigned char dynamic_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared));
}

// 16 bytes from global to shared memory, past the first-level cache; zeros where `valid` is false:
// then nothing is read. The second-level cache fetches the line's other bytes, too: of narrow slabs
// they are another block's, which runs at the same time (not measured).
GROSS_DEVICE void copy_async_16(uint32_t destination, const void* source, bool valid, bool on) {
  if (on)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(destination),
                 "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
}
GROSS_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int pending>
GROSS_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// `threads` of the block (a multiple of 32, whole warps) meet at barrier `id`, 0 to 15.
GROSS_DEVICE void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
GROSS_DEVICE void warp_barrier() { __syncwarp(); }

GROSS_DEVICE void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// The first two matrices alone; r[2] and r[3] stay as they are.
GROSS_DEVICE void load_matrix_x2(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
GROSS_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
GROSS_DEVICE void load_matrix_x2_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

#define GROSS_MMA(shape, types, a_words, b_words, addend, output, ...)                         \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." types ".f32 {%0,%1,%2,%3}, {" a_words \
               "}, {" b_words "}, {" addend "};\n"                                             \
               : output(d[0]), output(d[1]), output(d[2]), output(d[3])                        \
               : __VA_ARGS__)
#define GROSS_OPERANDS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)
// d += a · b over 32 bytes of k.
template <Type type>
GROSS_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(type != Type::float64);
  if constexpr (type == Type::float16)
    GROSS_MMA("m16n8k16", "f16.f16", "%4,%5,%6,%7", "%8,%9", "%0,%1,%2,%3", "+f", GROSS_OPERANDS);
  else if constexpr (type == Type::bfloat16)
    GROSS_MMA("m16n8k16", "bf16.bf16", "%4,%5,%6,%7", "%8,%9", "%0,%1,%2,%3", "+f", GROSS_OPERANDS);
  else
    GROSS_MMA("m16n8k8", "tf32.tf32", "%4,%5,%6,%7", "%8,%9", "%0,%1,%2,%3", "+f", GROSS_OPERANDS);
}
// d = a · b: starts a sum without clearing registers.
template <Type type>
GROSS_DEVICE void multiply_first(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(type != Type::float64);
  if constexpr (type == Type::float16)
    GROSS_MMA("m16n8k16", "f16.f16", "%4,%5,%6,%7", "%8,%9", "%10,%10,%10,%10", "=f",
              GROSS_OPERANDS, "f"(0.f));
  else if constexpr (type == Type::bfloat16)
    GROSS_MMA("m16n8k16", "bf16.bf16", "%4,%5,%6,%7", "%8,%9", "%10,%10,%10,%10", "=f",
              GROSS_OPERANDS, "f"(0.f));
  else
    GROSS_MMA("m16n8k8", "tf32.tf32", "%4,%5,%6,%7", "%8,%9", "%10,%10,%10,%10", "=f",
              GROSS_OPERANDS, "f"(0.f));
}
// d += a · b over 16 bytes of k: a[0], a[1] and b[0] of the above.
template <Type type>
GROSS_DEVICE void multiply_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  static_assert(type != Type::float64);
  if constexpr (type == Type::float16)
    GROSS_MMA("m16n8k8", "f16.f16", "%4,%5", "%6", "%0,%1,%2,%3", "+f", "r"(a0), "r"(a1), "r"(b));
  else if constexpr (type == Type::bfloat16)
    GROSS_MMA("m16n8k8", "bf16.bf16", "%4,%5", "%6", "%0,%1,%2,%3", "+f", "r"(a0), "r"(a1), "r"(b));
  else
    GROSS_MMA("m16n8k4", "tf32.tf32", "%4,%5", "%6", "%0,%1,%2,%3", "+f", "r"(a0), "r"(a1), "r"(b));
}
#undef GROSS_OPERANDS
#undef GROSS_MMA

GROSS_DEVICE float as_float(uint32_t word) { return __uint_as_float(word); }
GROSS_DEVICE uint32_t as_word(float value) { return __float_as_uint(value); }

// Two values of 16 bits in one word.
template <Type type>
GROSS_DEVICE uint32_t pack(float low, float high) {
  static_assert(type == Type::float16 || type == Type::bfloat16);
  uint32_t word;
  if constexpr (type == Type::float16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <Type type>
GROSS_DEVICE float low_half(uint32_t word) {
  static_assert(type == Type::float16 || type == Type::bfloat16);
  if constexpr (type == Type::bfloat16) return __uint_as_float(word << 16);
  float value;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}\n"
      : "=f"(value)
      : "r"(word));
  return value;
}
template <Type type>
GROSS_DEVICE float high_half(uint32_t word) {
  static_assert(type == Type::float16 || type == Type::bfloat16);
  if constexpr (type == Type::bfloat16) return __uint_as_float(word & 0xffff0000u);
  float value;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}\n"
      : "=f"(value)
      : "r"(word));
  return value;
}
// To the nearest TF32, ties away from zero: products would cut the last 13 bits off.
GROSS_DEVICE uint32_t round_tf32(float value) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(word) : "f"(value));
  return word;
}

GROSS_DEVICE uint32_t load_shared_16(uint32_t address, bool on) {
  uint16_t v = 0;
  if (on) asm volatile("ld.shared.b16 %0, [%1];\n" : "=h"(v) : "r"(address) : "memory");
  return v;
}
GROSS_DEVICE uint32_t load_shared_32(uint32_t address, bool on) {
  uint32_t v = 0;
  if (on) asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(v) : "r"(address) : "memory");
  return v;
}
GROSS_DEVICE void load_shared_64(uint32_t (&v)[2], uint32_t address, bool on) {
  v[0] = v[1] = 0;
  if (on)
    asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];\n"
                 : "=r"(v[0]), "=r"(v[1])
                 : "r"(address)
                 : "memory");
}
GROSS_DEVICE Words4 load_shared_128(uint32_t address, bool on) {
  Words4 v = {0, 0, 0, 0};
  if (on)
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
  return v;
}
GROSS_DEVICE void store_shared_16(uint32_t address, uint32_t v, bool on) {
  if (on)
    asm volatile("st.shared.b16 [%0], %1;\n" ::"r"(address), "h"(static_cast<uint16_t>(v))
                 : "memory");
}
GROSS_DEVICE void store_shared_32(uint32_t address, uint32_t v, bool on) {
  if (on) asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(v) : "memory");
}
GROSS_DEVICE void store_shared_64(uint32_t address, uint32_t low, uint32_t high, bool on) {
  if (on)
    asm volatile("st.shared.v2.b32 [%0], {%1,%2};\n" ::"r"(address), "r"(low), "r"(high)
                 : "memory");
}
GROSS_DEVICE void store_shared_128(uint32_t address, Words4 v, bool on) {
  if (on)
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"r"(address), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

// Loads of global memory that nothing writes while the kernel runs.
GROSS_DEVICE uint32_t load_global_16(const void* p, bool on) {
  return on ? __ldg(static_cast<const unsigned short*>(p)) : 0;
}
GROSS_DEVICE uint32_t load_global_32(const void* p, bool on) {
  return on ? __ldg(static_cast<const unsigned*>(p)) : 0;
}
GROSS_DEVICE Words4 load_global_128(const void* p, bool on) {
  Words4 v = {0, 0, 0, 0};
  if (on) {
    const uint4 u = __ldg(static_cast<const uint4*>(p));
    v = {u.x, u.y, u.z, u.w};
  }
  return v;
}
GROSS_DEVICE void store_global_16(void* p, uint32_t v, bool on) {
  if (on)
    asm volatile("st.global.b16 [%0], %1;\n" ::"l"(p), "h"(static_cast<uint16_t>(v)) : "memory");
}
GROSS_DEVICE void store_global_32(void* p, uint32_t v, bool on) {
  if (on) asm volatile("st.global.b32 [%0], %1;\n" ::"l"(p), "r"(v) : "memory");
}
GROSS_DEVICE void store_global_64(void* p, uint32_t low, uint32_t high, bool on) {
  if (on)
    asm volatile("st.global.v2.b32 [%0], {%1,%2};\n" ::"l"(p), "r"(low), "r"(high) : "memory");
}
GROSS_DEVICE void store_global_128(void* p, Words4 v, bool on) {
  if (on)
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};\n" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
}

// Of a whole warp.
GROSS_DEVICE bool any_lane(bool b) { return __any_sync(0xffffffffu, b); }
GROSS_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
// The same value in all lanes, told to the compiler: it, and what follows from it, lives in uniform
// registers.
GROSS_DEVICE int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }
// A value that the compiler must keep: it may not compute it again from what it was made of.
GROSS_DEVICE uint32_t keep(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}

#else  // twins on the host

GROSS_DEVICE int thread_index() { return emulator::thread_index(); }
GROSS_DEVICE int block_threads() { return emulator::block_threads(); }
GROSS_DEVICE int block_x() { return emulator::block_x(); }
GROSS_DEVICE int block_y() { return emulator::block_y(); }
GROSS_DEVICE int grid_x() { return emulator::grid_x(); }
GROSS_DEVICE uint32_t clock_now() { return 0; }
GROSS_DEVICE uint32_t shared_base() { return 0; }

inline void copy_async_16(uint32_t destination, const void* source, bool valid, bool on) {
  emulator::start_copy(destination, source, valid, on);
}
inline void copy_async_commit() { emulator::commit_copies(); }
template <int pending>
inline void copy_async_wait() {
  emulator::wait_for_copies(pending);
}

inline void barrier(int id, int threads) { emulator::barrier(id, threads); }
inline void warp_barrier() { emulator::collective(&emulator::order_warp, nullptr); }

struct MatrixOperand {
  uint32_t* r;
  uint32_t address;
};
template <int matrices, bool transposed>
inline void load_matrices(void* operands[32]) {
  for (int i = 0; i < matrices; i++) {
    uint64_t rows[8];
    uint16_t values[8][8];
    for (int j = 0; j < 8; j++) {
      rows[j] = static_cast<MatrixOperand*>(operands[i * 8 + j])->address;
      emulator::read_matrix_row(values[j], static_cast<uint32_t>(rows[j]), i * 8 + j);
    }
    emulator::count_matrix(rows);
    for (int l = 0; l < 32; l++) {
      const int row = l / 4, column = l % 4 * 2;
      const uint32_t low = transposed ? values[column][row] : values[row][column];
      const uint32_t high = transposed ? values[column + 1][row] : values[row][column + 1];
      static_cast<MatrixOperand*>(operands[l])->r[i] = low | high << 16;
    }
  }
}
template <int matrices, bool transposed>
inline void load_matrix(uint32_t (&r)[4], uint32_t address) {
  MatrixOperand operand{r, address};
  emulator::collective(&load_matrices<matrices, transposed>, &operand);
}
inline void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  load_matrix<4, false>(r, address);
}
inline void load_matrix_x2(uint32_t (&r)[4], uint32_t address) {
  load_matrix<2, false>(r, address);
}
inline void load_matrix_x4_transposed(uint32_t (&r)[4], uint32_t address) {
  load_matrix<4, true>(r, address);
}
inline void load_matrix_x2_transposed(uint32_t (&r)[4], uint32_t address) {
  load_matrix<2, true>(r, address);
}

inline float as_float(uint32_t word) {
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}
inline uint32_t as_word(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  return word;
}
inline float half_to_float(uint16_t half) {
#if defined(__FLT16_MAX__)
  _Float16 value;
  std::memcpy(&value, &half, 2);
  return static_cast<float>(value);
#else
#error "tests on the host need a compiler with _Float16"
#endif
}
template <Type type>
inline uint32_t round_half(float value) {
  if constexpr (type == Type::float16) {
    const _Float16 narrow = static_cast<_Float16>(value);
    uint16_t half;
    std::memcpy(&half, &narrow, 2);
    return half;
  }
  const uint32_t word = as_word(value);
  if ((word & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (word + 0x7fffu + (word >> 16 & 1u)) >> 16;
}
template <Type type>
inline uint32_t pack(float low, float high) {
  static_assert(type == Type::float16 || type == Type::bfloat16);
  return round_half<type>(low) | round_half<type>(high) << 16;
}
template <Type type>
inline float low_half(uint32_t word) {
  static_assert(type == Type::float16 || type == Type::bfloat16);
  return type == Type::float16 ? half_to_float(static_cast<uint16_t>(word)) : as_float(word << 16);
}
template <Type type>
inline float high_half(uint32_t word) {
  return low_half<type>(word >> 16);
}
inline uint32_t round_tf32(float value) {
  const uint32_t word = as_word(value);
  return (word & 0x7f800000u) == 0x7f800000u ? word : (word + 0x1000u) & 0xffffe000u;
}
struct ProductOperand {
  float* d;
  uint32_t a[4], b[2];
  bool first;
};
// One word of a fragment as the numbers that the matrix unit takes from it: two of 16 bits, or one
// of TF32.
template <Type type>
inline void numbers(uint32_t word, float* to) {
  if constexpr (type == Type::float32)
    *to = as_float(word & 0xffffe000u);
  else
    to[0] = low_half<type>(word), to[1] = high_half<type>(word);
}
template <Type type, int words>  // words of 4 bytes of k: 8, or 4 in a half product
inline void multiply_warp(void* operands[32]) {
  constexpr int each = type == Type::float32 ? 1 : 2;
  const auto lane = [&](int l) { return static_cast<ProductOperand*>(operands[l]); };
  float a[16][words * each], b[8][words * each];
  for (int l = 0; l < 32; l++)
    for (int half = 0; half < words / 4; half++) {
      numbers<type>(lane(l)->a[2 * half], &a[l / 4][(half * 4 + l % 4) * each]);
      numbers<type>(lane(l)->a[2 * half + 1], &a[l / 4 + 8][(half * 4 + l % 4) * each]);
      numbers<type>(lane(l)->b[half], &b[l / 4][(half * 4 + l % 4) * each]);
    }
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) {
      const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < words * each; k++) sum += a[row][k] * b[column][k];
      lane(l)->d[i] = (lane(l)->first ? 0.f : lane(l)->d[i]) + sum;
    }
  emulator::count_products(1);
}
template <Type type>
inline void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ProductOperand operand{d, {a[0], a[1], a[2], a[3]}, {b0, b1}, false};
  emulator::collective(&multiply_warp<type, 8>, &operand);
}
template <Type type>
inline void multiply_first(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ProductOperand operand{d, {a[0], a[1], a[2], a[3]}, {b0, b1}, true};
  emulator::collective(&multiply_warp<type, 8>, &operand);
}
template <Type type>
inline void multiply_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  ProductOperand operand{d, {a0, a1, 0, 0}, {b, 0}, false};
  emulator::collective(&multiply_warp<type, 4>, &operand);
}

inline uint32_t load_shared_16(uint32_t address, bool on) {
  uint16_t v = 0;
  emulator::read_shared(&v, address, 2, on);
  return v;
}
inline uint32_t load_shared_32(uint32_t address, bool on) {
  uint32_t v = 0;
  emulator::read_shared(&v, address, 4, on);
  return v;
}
inline void load_shared_64(uint32_t (&v)[2], uint32_t address, bool on) {
  v[0] = v[1] = 0;
  emulator::read_shared(v, address, 8, on);
}
inline Words4 load_shared_128(uint32_t address, bool on) {
  Words4 v = {0, 0, 0, 0};
  emulator::read_shared(&v, address, 16, on);
  return v;
}
inline void store_shared_16(uint32_t address, uint32_t v, bool on) {
  const uint16_t half = static_cast<uint16_t>(v);
  emulator::write_shared(address, &half, 2, on);
}
inline void store_shared_32(uint32_t address, uint32_t v, bool on) {
  emulator::write_shared(address, &v, 4, on);
}
inline void store_shared_64(uint32_t address, uint32_t low, uint32_t high, bool on) {
  const uint32_t v[2] = {low, high};
  emulator::write_shared(address, v, 8, on);
}
inline void store_shared_128(uint32_t address, Words4 v, bool on) {
  emulator::write_shared(address, &v, 16, on);
}

inline uint32_t load_global_16(const void* p, bool on) {
  uint16_t v = 0;
  emulator::read_global(&v, p, 2, on);
  return v;
}
inline uint32_t load_global_32(const void* p, bool on) {
  uint32_t v = 0;
  emulator::read_global(&v, p, 4, on);
  return v;
}
inline Words4 load_global_128(const void* p, bool on) {
  Words4 v = {0, 0, 0, 0};
  emulator::read_global(&v, p, 16, on);
  return v;
}
inline void store_global_16(void* p, uint32_t v, bool on) {
  const uint16_t half = static_cast<uint16_t>(v);
  emulator::write_global(p, &half, 2, on);
}
inline void store_global_32(void* p, uint32_t v, bool on) { emulator::write_global(p, &v, 4, on); }
inline void store_global_64(void* p, uint32_t low, uint32_t high, bool on) {
  const uint32_t v[2] = {low, high};
  emulator::write_global(p, v, 8, on);
}
inline void store_global_128(void* p, Words4 v, bool on) { emulator::write_global(p, &v, 16, on); }

inline void any_of_warp(void* operands[32]) {
  bool any = false;
  for (int l = 0; l < 32; l++) any |= *static_cast<bool*>(operands[l]);
  for (int l = 0; l < 32; l++) *static_cast<bool*>(operands[l]) = any;
}
inline bool any_lane(bool b) {
  emulator::collective(&any_of_warp, &b);
  return b;
}
struct ShuffleOperand {
  float value;
  int mask;
};
inline void shuffle_warp(void* operands[32]) {
  float values[32];
  for (int l = 0; l < 32; l++) values[l] = static_cast<ShuffleOperand*>(operands[l])->value;
  for (int l = 0; l < 32; l++) {
    auto* operand = static_cast<ShuffleOperand*>(operands[l]);
    operand->value = values[(l ^ operand->mask) % 32];
  }
}
inline float shuffle_xor(float v, int mask) {
  ShuffleOperand operand{v, mask};
  emulator::collective(&shuffle_warp, &operand);
  return operand.value;
}
inline void first_of_warp(void* operands[32]) {
  for (int l = 1; l < 32; l++) *static_cast<int*>(operands[l]) = *static_cast<int*>(operands[0]);
}
inline int uniform(int v) {
  emulator::collective(&first_of_warp, &v);
  return v;
}
inline uint32_t keep(uint32_t v) { return v; }

#endif

// ---- Warpgroup products (sm_90a) ----
// 64 rows × 56 or 64 columns, 32 bytes of k. A comes from registers: warp w of the four holds rows
// 16 w to 16 w + 15 as above. B comes from shared memory in planes of 16 bytes per pixel without
// swizzle: pixels 16 bytes apart, eights of them 128 bytes, the plane of the last 16 bytes of k
// `plane` bytes after the first. Where the instruction does not exist these functions do not
// either, except on the host: a kernel that uses them does not compile for another architecture.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

GROSS_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t plane) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(plane >> 4) << 16 |
         static_cast<uint64_t>(128 >> 4) << 32;
}

#if defined(__CUDACC__)

GROSS_DEVICE void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
GROSS_DEVICE void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}
template <int pending>
GROSS_DEVICE void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
}
// After a wait: nothing that is made of the sums, as the rounding, may move above this. No
// instruction.
template <int atoms>
GROSS_DEVICE void fence_sums(float (&d)[atoms][4]) {
  GROSS_UNROLL
  for (int a = 0; a < atoms; a++)
    asm volatile("" : "+f"(d[a][0]), "+f"(d[a][1]), "+f"(d[a][2]), "+f"(d[a][3])::"memory");
}
// Between this thread's writes to shared memory and products that read them, before the barrier.
GROSS_DEVICE void fence_for_matrix_units() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

#define GROSS_D(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define GROSS_D7 GROSS_D(0), GROSS_D(1), GROSS_D(2), GROSS_D(3), GROSS_D(4), GROSS_D(5), GROSS_D(6)
#define GROSS_D7_WORDS                                                                             \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25," \
  "%26,%27"
#define GROSS_WGMMA(shape, types, d_words, a_words, b_word, ...)                               \
  asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." types " {" d_words "}, {" a_words \
               "}, " b_word ", 1, 1, 1, 0;\n"                                                  \
               : __VA_ARGS__                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
// d += a · b, for 7 or 8 atoms of 8 columns.
template <Type type, int atoms>
GROSS_DEVICE void warpgroup_multiply(float (&d)[atoms][4], const uint32_t (&a)[4], uint64_t b) {
  static_assert((type == Type::float16 || type == Type::bfloat16) && (atoms == 7 || atoms == 8));
  if constexpr (type == Type::float16 && atoms == 7)
    GROSS_WGMMA("m64n56k16", "f16.f16", GROSS_D7_WORDS, "%28,%29,%30,%31", "%32", GROSS_D7);
  else if constexpr (atoms == 7)
    GROSS_WGMMA("m64n56k16", "bf16.bf16", GROSS_D7_WORDS, "%28,%29,%30,%31", "%32", GROSS_D7);
  else if constexpr (type == Type::float16)
    GROSS_WGMMA("m64n64k16", "f16.f16", GROSS_D7_WORDS ",%28,%29,%30,%31", "%32,%33,%34,%35", "%36",
                GROSS_D7, GROSS_D(7));
  else
    GROSS_WGMMA("m64n64k16", "bf16.bf16", GROSS_D7_WORDS ",%28,%29,%30,%31", "%32,%33,%34,%35",
                "%36", GROSS_D7, GROSS_D(7));
}
#undef GROSS_WGMMA
#undef GROSS_D7_WORDS
#undef GROSS_D7
#undef GROSS_D

#else  // twins on the host

inline void warpgroup_arrive() {}
inline void warpgroup_commit() {}
template <int pending>
inline void warpgroup_wait() {}
template <int atoms>
inline void fence_sums(float (&)[atoms][4]) {}
inline void fence_for_matrix_units() {}

// One warp's 16 of the 64 rows.
struct WarpgroupOperand {
  float (*d)[4];
  uint32_t a[4];
  uint64_t b;
};
template <Type type, int atoms>
inline void multiply_warpgroup(void* operands[32]) {
  const auto lane = [&](int l) { return static_cast<WarpgroupOperand*>(operands[l]); };
  const auto field = [&](int shift) {
    return static_cast<uint32_t>(lane(0)->b >> shift & 0x3fff) << 4;
  };
  const uint32_t address = field(0), plane = field(16), eight = field(32);
  for (int atom = 0; atom < atoms; atom++) {
    ProductOperand products[32];
    void* of_atom[32];
    for (int l = 0; l < 32; l++) {
      products[l] = {lane(l)->d[atom],
                     {lane(l)->a[0], lane(l)->a[1], lane(l)->a[2], lane(l)->a[3]},
                     {0, 0},
                     false};
      of_atom[l] = &products[l];
    }
    for (int half = 0; half < 2; half++)
      for (int n = 0; n < 8; n++) {
        uint32_t row[4];
        emulator::read_matrix_row(row, address + half * plane + atom * eight + n * 16, n);
        for (int t = 0; t < 4; t++) products[n * 4 + t].b[half] = row[t];
      }
    multiply_warp<type, 8>(of_atom);
  }
}
template <Type type, int atoms>
inline void warpgroup_multiply(float (&d)[atoms][4], const uint32_t (&a)[4], uint64_t b) {
  WarpgroupOperand operand{d, {a[0], a[1], a[2], a[3]}, b};
  emulator::collective(&multiply_warpgroup<type, atoms>, &operand);
}

#endif
#endif

// ---- Launching ----

#define GROSS_PRAGMA(text) _Pragma(#text)
#if defined(__CUDACC__)
#define GROSS_UNROLL_BY(count) GROSS_PRAGMA(unroll count)

inline int allow_shared_bytes(const void* kernel, int bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
template <class... Parameters>
int start(void (*kernel)(Parameters...), int grid_x, int grid_y, int threads, int shared_bytes,
          Stream stream, const std::common_type_t<Parameters>&... arguments) {
  kernel<<<dim3(grid_x, grid_y), threads, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}
#else
#define GROSS_UNROLL_BY(count)

namespace emulator {
inline Schedule schedule;               // of the launches that follow
inline std::vector<Counters> launched;  // what they counted, one for each
}  // namespace emulator

inline int allow_shared_bytes(const void*, int) { return 0; }
// What the kernel touches has been told to the emulator before.
template <class... Parameters>
int start(void (*kernel)(Parameters...), int grid_x, int grid_y, int threads, int shared_bytes,
          Stream, const std::common_type_t<Parameters>&... arguments) {
  emulator::launched.push_back(emulator::launch(
      grid_x, grid_y, threads, shared_bytes, [&] { kernel(arguments...); }, emulator::schedule));
  return 0;
}
#endif

struct Grid {
  int x, y, threads, shared_bytes;
};

// Returns a cudaError_t. The current device is the stream's. All of the device's shared memory is
// allowed to a kernel once; two threads may both do it.
template <auto* kernel, class... Arguments>
int launch(const Grid& grid, const Device& device, Stream stream, const Arguments&... arguments) {
  static std::atomic<uint64_t> allowed{0};  // a bit for each device
  const uint64_t bit = device.index < 64 ? uint64_t{1} << device.index : 0;
  if (grid.shared_bytes > 48 * 1024 && !(allowed & bit)) {
    const int error =
        allow_shared_bytes(reinterpret_cast<const void*>(kernel), device.shared_bytes);
    if (error) return error;
    host_counts.prepared++;
    allowed |= bit;
  }
  host_counts.launched++;
  return start(kernel, grid.x, grid.y, grid.threads, grid.shared_bytes, stream, arguments...);
}

}  // namespace gross::cuda
