// A small vector type on the compiler's own vector extension: one spelling of every kernel for
// AVX-512, AVX2, NEON and plain code. Included once per instruction set, inside that set's
// namespace and target options: GROSS_ISA names the namespace, GROSS_VECTOR_BYTES and
// GROSS_VECTOR_REGISTERS describe the machine. Where GROSS_LOWERED is defined the machine has no
// such vectors, and the compiler makes them of what it has. All of it is inlined, so nothing of it
// crosses units.
#pragma once

#include "includes.h"

#define GROSS_INLINE __attribute__((always_inline)) inline

// Which of the x86 instructions that have no other name the unit may use.
#if GROSS_VECTOR_BYTES == 64 && !defined(GROSS_LOWERED)
#define GROSS_AVX512
#elif GROSS_VECTOR_BYTES == 32 && !defined(GROSS_LOWERED)
#define GROSS_AVX2
#endif

namespace gross::cpu::GROSS_ISA {

constexpr int registers = GROSS_VECTOR_REGISTERS;

template <class T>
constexpr int lanes = GROSS_VECTOR_BYTES / sizeof(T);

template <class T>
using Vector __attribute__((vector_size(GROSS_VECTOR_BYTES))) = T;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type that sums are kept in.
template <class S>
using Sum = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Conversions lane by lane, written for vectors of 32-bit integers; U is uint32_t or a vector of
// them, F the float alike. -----

template <class U, class F>
GROSS_INLINE F widen_bfloat16(U bits) {
  return __builtin_bit_cast(F, bits << 16);
}
// Round to nearest even; a NaN stays one.
template <class U, class F>
GROSS_INLINE U narrow_bfloat16(F value) {
  const U bits = __builtin_bit_cast(U, value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
}
// Exact: the exponent is moved by a multiplication, which also normalises what was denormal.
template <class U, class F>
GROSS_INLINE F widen_float16(U bits) {
  const U magnitude = bits & 0x7fffu;
  U wide = __builtin_bit_cast(U, __builtin_bit_cast(F, magnitude << 13) * 0x1p112f);
  wide = magnitude >= 0x7c00u ? wide | 0x7f800000u : wide;
  return __builtin_bit_cast(F, wide | ((bits & 0x8000u) << 16));
}
// Round to nearest even, overflow to infinity; below 2^-14 adding 0.5 rounds to the denormals'
// spacing.
template <class U, class F>
GROSS_INLINE U narrow_float16(F value) {
  const U bits = __builtin_bit_cast(U, value);
  const U magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U denormal = __builtin_bit_cast(U, __builtin_bit_cast(F, magnitude) + 0.5f) - 0x3f000000u;
  U half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? U{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? U{} + 0x7e00u : half;
  return half | ((bits >> 16) & 0x8000u);
}

template <class T, class S>
GROSS_INLINE T widen(S value) {
  if constexpr (std::is_same_v<S, bfloat16>)
    return widen_bfloat16<uint32_t, float>(value.bits);
  else if constexpr (std::is_same_v<S, float16>)
    return widen_float16<uint32_t, float>(value.bits);
  else
    return static_cast<T>(value);
}
template <class S, class T>
GROSS_INLINE S narrow(T value) {
  if constexpr (std::is_same_v<S, bfloat16>)
    return {static_cast<uint16_t>(narrow_bfloat16<uint32_t, float>(static_cast<float>(value)))};
  else if constexpr (std::is_same_v<S, float16>)
    return {static_cast<uint16_t>(narrow_float16<uint32_t, float>(static_cast<float>(value)))};
  else
    return static_cast<S>(value);
}

// Unaligned memory --------------------------------------------------------------------------------

using Halves __attribute__((vector_size(GROSS_VECTOR_BYTES / 2))) = uint16_t;
using Words __attribute__((vector_size(GROSS_VECTOR_BYTES))) = uint32_t;

template <class T, class S>
GROSS_INLINE Vector<T> load(const S* from) {
  if constexpr (std::is_same_v<T, S>) {
    Vector<T> v;
    __builtin_memcpy(&v, from, sizeof v);
    return v;
  } else {
    static_assert(sizeof(S) == 2 && std::is_same_v<T, float>);
    Halves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words);
    if constexpr (std::is_same_v<S, bfloat16>)
      return widen_bfloat16<Words, Vector<float>>(words);
    else
      return widen_float16<Words, Vector<float>>(words);
  }
}

template <class T, class S>
GROSS_INLINE void store(S* to, Vector<T> v) {
  if constexpr (std::is_same_v<T, S>) {
    __builtin_memcpy(to, &v, sizeof v);
  } else {
    static_assert(sizeof(S) == 2 && std::is_same_v<T, float>);
    Words words;
    if constexpr (std::is_same_v<S, bfloat16>)
      words = narrow_bfloat16<Words, Vector<float>>(v);
    else
      words = narrow_float16<Words, Vector<float>>(v);
    const Halves halves = __builtin_convertvector(words, Halves);
    __builtin_memcpy(to, &halves, sizeof halves);
  }
}

// Says that a vector is to be loaded once and kept: the compiler would fold the load into each of
// its uses, and the weight gradient, which uses each three times, would be limited by loads.
template <class V>
GROSS_INLINE void keep_in_register([[maybe_unused]] V& v) {
#if defined(GROSS_LOWERED)
  // No register holds it.
#elif defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// The low 16 bits of each lane, with their sign.
GROSS_INLINE Vector<int32_t> low_word(Vector<int32_t> v) {
  return __builtin_bit_cast(Vector<int32_t>, __builtin_bit_cast(Words, v) << 16) >> 16;
}
// The low 16 bits of every two lanes, as the first of them: low half and high half.
GROSS_INLINE Vector<int32_t> words_of_lanes(Vector<int32_t> v) {
  using Twice __attribute__((vector_size(GROSS_VECTOR_BYTES))) = uint64_t;
  const Twice both = __builtin_bit_cast(Twice, v), next = both >> 16;
#if defined(GROSS_AVX2)
  return (Vector<int32_t>)_mm256_blend_epi16((__m256i)both, (__m256i)next, 0xaa);
#else
  constexpr uint64_t low = 0x0000ffff0000ffffu;
  return __builtin_bit_cast(Vector<int32_t>, (both & low) | (next & ~low));
#endif
}

// What a multiply–add does with a lane: numbers of the lanes' type, or with 32-bit lanes two
// numbers each, whose products are both added: of bfloat16, or whole numbers of 16 bits, by two
// instructions or by one.
enum class Product { numbers, pairs, words, words_by_instruction };

template <Product product, class T>
GROSS_INLINE void multiply_add(Vector<T>& sum, Vector<T> value, Vector<T> weight) {
  if constexpr (product == Product::numbers) {
    sum += value * weight;
  } else if constexpr (product == Product::pairs) {
#if defined(GROSS_AVX512)
    // By its name: as an intrinsic it would need this whole unit to be compiled for processors that
    // have it.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(value), "v"(weight));
#else
    const auto half = [](Words bits) __attribute__((always_inline)) {
      return __builtin_bit_cast(Vector<T>, bits);
    };
    const Words values = __builtin_bit_cast(Words, value),
                weights = __builtin_bit_cast(Words, weight);
    sum += half(values & 0xffff0000u) * half(weights & 0xffff0000u);
    sum += half(values << 16) * half(weights << 16);
#endif
  } else {
#if defined(GROSS_AVX512)
    if constexpr (product == Product::words_by_instruction)
      asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(value), "v"(weight));
    else
      sum += (Vector<T>)_mm512_madd_epi16((__m512i)value, (__m512i)weight);
#elif defined(GROSS_AVX2)
    if constexpr (product == Product::words_by_instruction)
      asm("%{vex%} vpdpwssd %2, %1, %0" : "+x"(sum) : "x"(value), "x"(weight));
    else
      sum += (Vector<T>)_mm256_madd_epi16((__m256i)value, (__m256i)weight);
    // Sums of integers the compiler would reorder, with more of them at once than registers.
    keep_in_register(sum);
#else
    sum += (value >> 16) * (weight >> 16);
    sum += low_word(value) * low_word(weight);
#endif
  }
}

// How four products of 8 bits are added in each 32-bit lane: by pieces, which is exact; by sums of
// two products in 16 bits, which is exact where these fit; by one instruction, which always is.
enum class Dot { exact, narrow, instruction };

// sum += Σ_i x_i · w_i over the four bytes of a lane, x of 0 … 255 and w of −127 … 127.
template <Dot dot>
GROSS_INLINE void add_dot(Vector<int32_t>& sum, Vector<int32_t> x, Vector<int32_t> w) {
#if defined(GROSS_AVX512)
  // By its name, as above.
  if constexpr (dot == Dot::instruction) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
    return;
  }
  if constexpr (dot == Dot::narrow) {
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)x, (__m512i)w);
    sum += (Vector<int32_t>)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    return;
  }
#elif defined(GROSS_AVX2)
  if constexpr (dot == Dot::instruction) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
    return;
  }
  if constexpr (dot == Dot::narrow) {
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, (__m256i)w);
    sum += (Vector<int32_t>)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    return;
  }
#endif
  // A product fits 16 bits; the sum of two need not.
  const auto pieces = [](auto v) __attribute__((always_inline)) {
    return __builtin_bit_cast(Vector<int16_t>, v);
  };
  const Words bytes = __builtin_bit_cast(Words, x);
  const Vector<int16_t> weights = pieces(w);
  const auto add = [&](Vector<int16_t> products) __attribute__((always_inline)) {
    const Vector<int32_t> both = __builtin_bit_cast(Vector<int32_t>, products);
    sum += (both >> 16) + low_word(both);
  };
  add(pieces(bytes & 0x00ff00ffu) *
      (__builtin_bit_cast(Vector<int16_t>, __builtin_bit_cast(Vector<uint16_t>, weights) << 8) >>
       8));
  add(pieces((bytes >> 8) & 0x00ff00ffu) * (weights >> 8));
}

// Numbers of 8 bits, as many as a vector has 32-bit lanes: all, or the first n, and zeros in the
// other lanes.
using Bytes __attribute__((vector_size(GROSS_VECTOR_BYTES / 4))) = uint8_t;

GROSS_INLINE Vector<int32_t> whole_bytes(Bytes bytes) {
#if defined(GROSS_AVX512)
  return (Vector<int32_t>)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif defined(GROSS_AVX2)
  return (Vector<int32_t>)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
#else
  return __builtin_convertvector(bytes, Vector<int32_t>);
#endif
}
GROSS_INLINE Vector<int32_t> load_whole_bytes(const uint8_t* from) {
  Bytes bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return whole_bytes(bytes);
}
GROSS_INLINE Vector<int32_t> load_whole_bytes(const uint8_t* from, int64_t n) {
  uint8_t part[sizeof(Bytes)] = {};
  std::memcpy(part, from, n);
  return load_whole_bytes(part);
}
GROSS_INLINE Vector<float> load_bytes(const uint8_t* from) {
  return __builtin_convertvector(load_whole_bytes(from), Vector<float>);
}
GROSS_INLINE Vector<float> load_bytes(const uint8_t* from, int64_t n) {
  return __builtin_convertvector(load_whole_bytes(from, n), Vector<float>);
}
// The nearest whole numbers, ties to even, of `value` within `least` … `most`, both of less than 22
// bits; of what is not a number, `least`.
GROSS_INLINE Vector<int32_t> nearest_whole(Vector<float> value, float least, float most) {
  const Vector<float> low = Vector<float>{} + least, high = Vector<float>{} + most;
  value = value > low ? value : low;
  value = value < high ? value : high;
#if defined(GROSS_AVX512)
  return (Vector<int32_t>)_mm512_cvtps_epi32(value);
#elif defined(GROSS_AVX2)
  return (Vector<int32_t>)_mm256_cvtps_epi32(value);
#else
  // Adding 1.5 · 2²³ rounds to whole numbers, which are then the lowest bits.
  return __builtin_bit_cast(Vector<int32_t>, value + 12582912.0f) - 0x4b400000;
#endif
}
// The same within `least` … 255 − zero, above `zero`.
GROSS_INLINE Bytes nearest_bytes(Vector<float> value, float least, int32_t zero) {
#if defined(GROSS_AVX512)
  // What is too large for the first becomes 2³¹, and the second bounds it as an unsigned number.
  const Vector<float> low = Vector<float>{} + least;
  const __m512i whole =
      _mm512_add_epi32(_mm512_cvtps_epi32(value > low ? value : low), _mm512_set1_epi32(zero));
  return (Bytes)_mm512_cvtusepi32_epi8(whole);
#else
  const Vector<int32_t> whole = nearest_whole(value, least, static_cast<float>(255 - zero)) + zero;
#if defined(GROSS_AVX2)
  const __m256i halves = _mm256_packs_epi32((__m256i)whole, (__m256i)whole);
  const __m256i bytes = _mm256_packus_epi16(halves, halves);
  return (Bytes)_mm_cvtsi128_si64(
      _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
#else
  return __builtin_convertvector(whole, Bytes);
#endif
#endif
}
GROSS_INLINE void store_bytes(uint8_t* to, Bytes bytes) {
  __builtin_memcpy(to, &bytes, sizeof bytes);
}
GROSS_INLINE void store_bytes(uint8_t* to, Bytes bytes, int64_t n) { std::memcpy(to, &bytes, n); }
// nearest_bytes() of four pixels to bytes `pitch` apart.
GROSS_INLINE void store_nearest(const Vector<float> (&value)[4], float least, int32_t zero,
                                uint8_t* to, int64_t pitch) {
#if defined(GROSS_AVX2)
  // What is too small, or no number, becomes −2³¹, and saturates at every narrowing; what is too
  // large would change its sign.
  const __m256 high = _mm256_set1_ps(static_cast<float>(255 - zero));
  const auto whole = [&](int i) __attribute__((always_inline)) {
    return _mm256_cvtps_epi32(_mm256_min_ps(high, (__m256)value[i]));
  };
  const __m256i above = _mm256_set1_epi16(static_cast<short>(zero));
  __m256i bytes =
      _mm256_packus_epi16(_mm256_adds_epi16(_mm256_packs_epi32(whole(0), whole(1)), above),
                          _mm256_adds_epi16(_mm256_packs_epi32(whole(2), whole(3)), above));
  bytes = _mm256_max_epu8(bytes, _mm256_set1_epi8(static_cast<char>(zero + (int32_t)least)));
  const __m128i low = _mm256_castsi256_si128(bytes), upper = _mm256_extracti128_si256(bytes, 1);
  const __m128i pairs[2] = {_mm_unpacklo_epi32(low, upper), _mm_unpackhi_epi32(low, upper)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    _mm_storel_pi((__m64*)(to + 2 * i * pitch), (__m128)pairs[i]);
    _mm_storeh_pi((__m64*)(to + (2 * i + 1) * pitch), (__m128)pairs[i]);
  }
#else
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) store_bytes(to + i * pitch, nearest_bytes(value[i], least, zero));
#endif
}

// The first n lanes, zeros in the others; nothing beyond them is touched.
template <class T, class S>
GROSS_INLINE Vector<T> load_first(const S* from, int64_t n) {
#if defined(GROSS_AVX512)
  if constexpr (std::is_same_v<S, float>) return _mm512_maskz_loadu_ps((1u << n) - 1, from);
  if constexpr (std::is_same_v<S, double>) return _mm512_maskz_loadu_pd((1u << n) - 1, from);
#endif
  S part[lanes<T>] = {};
  for (int64_t i = 0; i < n; i++) part[i] = from[i];
  return load<T>(part);
}
template <class T, class S>
GROSS_INLINE void store_first(S* to, Vector<T> v, int64_t n) {
#if defined(GROSS_AVX512)
  if constexpr (std::is_same_v<S, float>) return _mm512_mask_storeu_ps(to, (1u << n) - 1, v);
  if constexpr (std::is_same_v<S, double>) return _mm512_mask_storeu_pd(to, (1u << n) - 1, v);
#endif
  S part[lanes<T>];
  store<T>(part, v);
  for (int64_t i = 0; i < n; i++) to[i] = part[i];
}

// Shuffles ----------------------------------------------------------------------------------------

template <class T>
using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <class T, int... I>
GROSS_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Vector<Index<T>>{I...});
#endif
}

template <class T, int... I>
GROSS_INLINE Vector<T> filled(T value, std::integer_sequence<int, I...>) {
  return Vector<T>{((void)I, value)...};
}
// Every lane the same value.
template <class T>
GROSS_INLINE Vector<T> broadcast(T value) {
  return filled<T>(value, std::make_integer_sequence<int, lanes<T>>{});
}

// Four neighbouring bytes in every lane.
GROSS_INLINE Vector<int32_t> broadcast_quad(const uint8_t* from) {
  float quad;
  __builtin_memcpy(&quad, from, sizeof quad);
  return __builtin_bit_cast(Vector<int32_t>, broadcast<float>(quad));
}

// Lane i of the result is lane index[i] of v.
template <class T>
GROSS_INLINE Vector<T> permute(Vector<T> v, Vector<Index<T>> index) {
#if defined(__clang__)
  Vector<T> result;
  for (int i = 0; i < lanes<T>; i++) result[i] = v[index[i]];
  return result;
#else
  return __builtin_shuffle(v, index);
#endif
}

// The same where every lane stays within its 16 bytes: an instruction that leaves the multiply–add
// units alone, where the general one takes turns with them.
template <class T>
GROSS_INLINE Vector<T> permute_within_quads(Vector<T> v, Vector<Index<T>> index) {
#if defined(GROSS_AVX512)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_permutevar_ps((__m512)v, (__m512i)index);
#elif defined(GROSS_AVX2)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm256_permutevar_ps((__m256)v, (__m256i)index);
#endif
  return permute<T>(v, index);
}

// Exchange the off-diagonal D×D blocks of a pair of rows that lie D apart.
template <class T, int D, int... L>
GROSS_INLINE void exchange(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, L...>) {
  constexpr int n = lanes<T>;
  const Vector<T> low = shuffle<T>(a, b, std::integer_sequence<int, (L & D ? n + L - D : L)...>{});
  b = shuffle<T>(a, b, std::integer_sequence<int, (L & D ? n + L : L + D)...>{});
  a = low;
}

// Transpose a square of lanes × lanes in registers, log2(lanes) shuffles per row.
template <class T, int D = 1>
GROSS_INLINE void transpose(Vector<T>* rows) {
  if constexpr (D < lanes<T>) {
#pragma GCC unroll 64
    for (int i = 0; i < lanes<T>; i++)
      if (!(i & D))
        exchange<T, D>(rows[i], rows[i + D], std::make_integer_sequence<int, lanes<T>>{});
    transpose<T, 2 * D>(rows);
  }
}

// Sum of the lanes, by halves: a fixed order.
template <class T, int Half, int... L>
GROSS_INLINE Vector<T> upper_half(Vector<T> v, std::integer_sequence<int, L...>) {
  return shuffle<T>(v, v, std::integer_sequence<int, (L < Half ? L + Half : L)...>{});
}
template <class T, int Half = lanes<T> / 2>
GROSS_INLINE T sum_of_lanes(Vector<T> v) {
  if constexpr (Half == 0)
    return v[0];
  else
    return sum_of_lanes<T, Half / 2>(
        v + upper_half<T, Half>(v, std::make_integer_sequence<int, lanes<T>>{}));
}

}  // namespace gross::cpu::GROSS_ISA
