// Products of 8 bits: pixels of uint8 times int8 weights, summed exactly in 32 bits, and what
// becomes of the sums.
//
// A 32-bit lane holds four neighbouring bytes that a pixel reads, broadcast to all lanes, against
// the weights of one output for them. 14 pixels × 2 vectors of outputs are 28 of these products for
// 16 loads, as in a pointwise convolution of float32 (pointwise.h), and four times its
// multiply–adds.
#pragma once

#include "channels.h"
#include "epilogue.h"
#include "memory.h"
#include "parts.h"
#include "pointwise.h"

namespace gross::cpu::GROSS_ISA {

// The bytes that one output reads: `rows` of them, each of so many neighbouring ones. Of a
// convolution a row of its kernel, all channels of all its columns; where columns are spread, one
// column.
struct ByteRows {
  int64_t channels, rows, bytes;

  explicit ByteRows(const Geometry& g)
      : channels(g.in_channels),
        rows(g.dilation_w == 1 ? g.kernel_h : g.taps()),
        bytes(g.in_channels * g.taps() / rows) {}

  int64_t quads() const { return ceil_div(bytes, 4); }
  int64_t packed() const { return rows * quads() * lanes<float>; }  // lanes of a vector of outputs
};

// Where a run of pixels reads: offset[row] + k · pitch is pixel k's.
struct BytePixels {
  const uint8_t* at;
  int64_t pitch;
  const int64_t* offsets;
  int64_t rows, quads;
};

// Packed weights: [vector of outputs][row][quad][lane][4], and what each sum begins with.
struct ByteWeights {
  const int32_t *at, *starts;
  int64_t stride, vectors;

  ByteWeights from(int64_t vector) const {
    return {at + vector * stride, starts + vector * lanes<float>, stride, vectors - vector};
  }
};

// Where the sums of a tile go. Divided by powers of two into planes, each pixel to its place; a
// lane's high half is the next lane's number:
struct ToPlanes {
  int32_t* at;
  const int64_t* places;
  int64_t vector_stride;
  const int32_t* shifts;  // of the lanes of the vectors
  Vector<int32_t> shift;

  static constexpr bool all_tiles = true, takes_four = false;
  GROSS_INLINE void next(int64_t pixels) { places += pixels; }
  GROSS_INLINE void begin(int v) { shift = load<int32_t>(shifts + v * lanes<int32_t>); }
  GROSS_INLINE void store_sum(int v, int k, Vector<int32_t> sum) const {
    store<int32_t>(at + places[k] + v * vector_stride, words_of_lanes(sum >> shift));
  }
};
// As numbers, [vector][pixel][lane]:
struct ToTile {
  float* at;

  static constexpr bool all_tiles = false, takes_four = false;
  GROSS_INLINE void next(int64_t) {}
  GROSS_INLINE void begin(int) {}
  GROSS_INLINE void store_sum(int v, int k, Vector<int32_t> sum) const {
    store<float>(at + (v * max_pixels + k) * lanes<float>,
                 __builtin_convertvector(sum, Vector<float>));
  }
};

// to ← start + Σ weight · byte, of `Count` pixels and `Vectors` vectors of outputs.
template <Dot dot, int Count, int Vectors, class To>
GROSS_INLINE void multiply_tile(const BytePixels& source, const ByteWeights& packed, To& to) {
  Vector<int32_t> sum[Vectors][Count];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; v++)
#pragma GCC unroll 16
    for (int k = 0; k < Count; k++) sum[v][k] = load<int32_t>(packed.starts + v * lanes<int32_t>);
  const int32_t* weights = packed.at;
  const int64_t pitch = source.pitch, stride = packed.stride, quads = source.quads;
  for (int64_t row = 0; row < source.rows; row++) {
    // Three pixels of one base register: base, base + pitch, base + 2 pitch.
    const uint8_t* base[(Count + 2) / 3];
#pragma GCC unroll 8
    for (int i = 0; i < (Count + 2) / 3; i++)
      base[i] = source.at + source.offsets[row] + 3 * i * pitch;
    for (int64_t j = 0; j < quads; j++, weights += lanes<int32_t>) {
      Vector<int32_t> weight[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; v++) {
        weight[v] = load<int32_t>(weights + v * stride);
        if constexpr (dot == Dot::instruction) keep_in_register(weight[v]);
      }
#pragma GCC unroll 16
      for (int k = 0; k < Count; k++) {
        Vector<int32_t> value = broadcast_quad(base[k / 3] + k % 3 * pitch + 4 * j);
        if constexpr (Vectors > 1) keep_in_register(value);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; v++) add_dot<dot>(sum[v][k], value, weight[v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; v++) {
    to.begin(v);
    constexpr int fours = To::takes_four ? Count / 4 * 4 : 0;
#pragma GCC unroll 16
    for (int k = 0; k < fours; k += 4)
      if constexpr (To::takes_four) to.store_four(v, k, sum[v] + k);
#pragma GCC unroll 16
    for (int k = fours; k < Count; k++) to.store_sum(v, k, sum[v][k]);
  }
}

// The same of `tiles` times as many neighbouring pixels.
template <Dot dot, int Count, int Vectors, class To>
__attribute__((noinline)) void multiply_bytes(BytePixels source, const ByteWeights& packed,
                                              int64_t tiles, To to) {
  for (; tiles > 0; tiles--, source.at += Count * source.pitch, to.next(Count))
    multiply_tile<dot, Count, Vectors>(source, packed, to);
}

// A run of neighbouring pixels: what the first of them reads, its number among the target's, how
// many they are, and which rows of bytes they read, where the others hold zeros.
struct ByteRun {
  const uint8_t* at;
  int64_t pixel, count, first_row, rows;
};

// `runs` of pixels times all weights. make(pixel, vector) says where the sums go, of all tiles from
// that pixel on or of one; done(pixel, pixels, vector, vectors) follows them.
template <Dot dot, int Vectors, class Make, class Done>
void multiply_runs(const BytePixels& source, const std::vector<ByteRun>& runs,
                   const ByteWeights& weights, int64_t vector, Make make, Done done) {
  for (const ByteRun& run : runs) {
    ByteWeights some = weights.from(vector);
    some.at += run.first_row * source.quads * lanes<int32_t>;
    BytePixels pixels{run.at, source.pitch, source.offsets + run.first_row, run.rows, source.quads};
    // As few tiles as possible, of two sizes.
    const int64_t tiles = ceil_div(run.count, max_pixels);
    int64_t pixel = run.pixel;
    const auto multiply = [&](int64_t some_tiles, int64_t size) {
      for (int64_t left = some_tiles, taken; left > 0; left -= taken) {
        auto to = make(pixel, vector);
        taken = to.all_tiles ? left : 1;
        with_constant<max_pixels>(size, [&](auto count) {
          multiply_bytes<dot, count, Vectors>(pixels, some, taken, to);
        });
        done(pixel, taken * size, vector, Vectors);
        pixel += taken * size;
        pixels.at += taken * size * source.pitch;
      }
    };
    if (!tiles) continue;
    const int64_t size = run.count / tiles, larger = run.count % tiles;
    multiply(larger, size + 1);
    multiply(tiles - larger, size);
  }
}
template <Dot dot, class Make, class Done>
void multiply_all_runs(const BytePixels& source, const std::vector<ByteRun>& runs,
                       const ByteWeights& weights, Make make, Done done) {
  int64_t v = 0;
  for (; v + 2 <= weights.vectors; v += 2)
    multiply_runs<dot, 2>(source, runs, weights, v, make, done);
  if (v < weights.vectors) multiply_runs<dot, 1>(source, runs, weights, v, make, done);
}

// Calls f with the product to use, of weights of which any two neighbours fit 16 bits or not.
template <Dot best, class F>
void with_dot(bool fits, F f) {
#if defined(GROSS_AVX512) || defined(GROSS_AVX2)
  if constexpr (best == Dot::narrow)
    if (!fits) return f(std::integral_constant<Dot, Dot::exact>{});
#endif
  f(std::integral_constant<Dot, best>{});
}

// Packing -----------------------------------------------------------------------------------------

// int8 weights [output][channel][kh][kw] and the zero point of what they are multiplied with.
struct ByteKernel {
  const int8_t* at;
  ByteRows rows;
  int64_t taps, columns;  // columns of a row
  int32_t zero;

  ByteKernel(const Series& series, const Geometry& g, int32_t zero)
      : at(static_cast<const int8_t*>(series.terms[0])),
        rows(g),
        taps(g.taps()),
        columns(taps / rows.rows),
        zero(zero) {}
};

// Those of one vector of outputs, as lanes; returns whether any two neighbours that one sum of 16
// bits takes, times 255, fit it.
inline bool pack_bytes(const ByteKernel& of, const LaneBlock& block, int32_t* to, int32_t* starts) {
  const auto& [channels, rows, bytes] = of.rows;
  const int64_t quads = of.rows.quads(), size = channels * of.taps;
  std::fill_n(to, of.rows.packed(), 0);
  std::fill_n(starts, lanes<float>, 0);
  bool fits = true;
  for (int64_t lane = 0; lane < block.lanes(); lane++) {
    const int8_t* const output = of.at + (block.output + lane) * size;
    int64_t total = 0;
    for (int64_t row = 0; row < rows; row++)
      for (int64_t quad = 0; quad < quads; quad++) {
        int8_t four[4] = {};
        for (int64_t i = 0; i < std::min<int64_t>(4, bytes - 4 * quad); i++) {
          const int64_t at = 4 * quad + i;
          four[i] = output[at % channels * of.taps + row * of.columns + at / channels];
        }
        for (int i = 0; i < 4; i++) total += four[i];
        for (int i = 0; i < 4; i += 2) {
          const int more = std::max<int>(four[i], 0) + std::max<int>(four[i + 1], 0),
                    less = std::min<int>(four[i], 0) + std::min<int>(four[i + 1], 0);
          fits = fits && more <= 128 && less >= -128;
        }
        std::memcpy(to + (row * quads + quad) * lanes<float> + lane, four, sizeof four);
      }
    starts[lane] = static_cast<int32_t>(-of.zero * total);
  }
  return fits;
}

// Ending ------------------------------------------------------------------------------------------

// What becomes of sums: act(scale · sum + bias + residual) or act(scale · sum + bias) + residual,
// as numbers or in 8 bits. The residual and the target are compact, [pixel][channel].
struct ByteEnding {
  const float *scales, *bias, *slopes;  // one number per output, in whole vectors
  const Finish& finish;
  const Image& target;
  const std::vector<LaneBlock>& outputs;

  int64_t pixel_stride() const { return target.channels; }
};

// Sums of `count` pixels of one vector of outputs, lanes<float> apart, to pixels from `pixel` on.
struct ByteSums {
  const float* at;
  int64_t pixel, count, vector;
};

struct NoResidual {};
template <class Type>
struct Named {
  using type = Type;
};
// R, Q: what residual and target are held as: float, uint8_t, or NoResidual. In 8 bits everything
// is in units of the target's scale, but what SiLU is applied to.
template <class R, class Q, Activation activation>
void end_sums(const ByteEnding& of, const ByteSums& sums) {
  constexpr bool in_bytes = std::is_same_v<Q, uint8_t>;
  const Held &residual = of.finish.forms.residual, &target = of.finish.forms.target;
  const LaneBlock& block = of.outputs[sums.vector];
  const int64_t n = block.lanes(), stride = of.pixel_stride(),
                first = sums.pixel * stride + block.output;
  const bool last = of.finish.residual_last;
  const float unit = in_bytes ? 1 / target.scale : 1,
              before = activation == Activation::silu ? 1 : unit,
              share = (std::is_same_v<R, uint8_t> ? residual.scale : 1) * (last ? unit : before);
  const Vector<float> scale = load<float>(of.scales + sums.vector * lanes<float>) * before,
                      bias = load<float>(of.bias + sums.vector * lanes<float>) * before,
                      slope = load<float>(of.slopes + sums.vector * lanes<float>), none{},
                      six = none + 6 * unit;
  // Where ReLU comes last, it is one of the bounds.
  const bool bounded = in_bytes && activation == Activation::relu && !last;
  const float least = bounded ? 0.0f : static_cast<float>(-target.zero);
  const float offset = static_cast<float>(residual.zero);
  const int32_t zero = target.zero;
  const float* const at = sums.at;
  const int64_t count = sums.count;
  Q* const to = static_cast<Q*>(of.target.data) + first;
  [[maybe_unused]] const R* const from =
      of.finish.residual ? static_cast<const R*>(of.finish.residual->data) + first : nullptr;
  // Whether all lanes hold outputs.
  const auto end = [&](auto whole) __attribute__((always_inline)) {
    for (int64_t k = 0; k < count; k++) {
      Vector<float> value = load<float>(at + k * lanes<float>) * scale + bias, other{};
      if constexpr (std::is_same_v<R, uint8_t>) {
        const R* const read = from + k * stride;
        other = ((whole ? load_bytes(read) : load_bytes(read, n)) - offset) * share;
      }
      if constexpr (std::is_same_v<R, float>) {
        const R* const read = from + k * stride;
        other = (whole ? load<float>(read) : load_first<float>(read, n)) * share;
      }
      if (!last) value += other;
      if constexpr (activation == Activation::relu6)
        value = value < none ? none : (value > six ? six : value);
      else if (!bounded)
        value = activated<activation, float>(value, slope);
      if constexpr (activation == Activation::silu) value *= unit;
      if (last) value += other;
      if constexpr (in_bytes) {
        const Bytes q = nearest_bytes(value, least, zero);
        whole ? store_bytes(to + k * stride, q) : store_bytes(to + k * stride, q, n);
      } else {
        whole ? store<float>(to + k * stride, value)
              : store_first<float>(to + k * stride, value, n);
      }
    }
  };
  n == lanes<float> ? end(std::true_type{}) : end(std::false_type{});
}

inline void end_all(const ByteEnding& of, const ByteSums& sums) {
  const Forms& forms = of.finish.forms;
  with_activation(of.finish.activation, [&](auto activation) {
    const auto with = [&](auto residual) {
      using R = decltype(residual);
      if (forms.target.in_bytes())
        end_sums<R, uint8_t, activation>(of, sums);
      else
        end_sums<R, float, activation>(of, sums);
    };
    if (!of.finish.residual)
      with(NoResidual{});
    else if (forms.residual.in_bytes())
      with(uint8_t{});
    else
      with(float{});
  });
}

// Where the sums of a tile go that become bytes in registers: without an activation or with ReLU,
// which is one of the bounds then, and no residual or one of 8 bits (`Added`); or with PReLU alone
// (`Sloped`).
template <bool Added, bool Sloped>
struct ToBytes {
  uint8_t* at;
  const uint8_t* from;  // the residual
  int64_t stride;
  const float *scales, *biases, *slopes;
  float unit, offset, share, least;
  int32_t zero;
  Vector<float> scale, bias, slope;

  ToBytes(const ByteEnding& of, int64_t pixel, int64_t vector)
      : stride(of.target.channels),
        scales(of.scales + vector * lanes<float>),
        biases(of.bias + vector * lanes<float>),
        slopes(of.slopes + vector * lanes<float>) {
    const Held &target = of.finish.forms.target, &residual = of.finish.forms.residual;
    const int64_t first = pixel * stride + of.outputs[vector].output;
    at = static_cast<uint8_t*>(of.target.data) + first;
    from = Added ? static_cast<const uint8_t*>(of.finish.residual->data) + first : nullptr;
    unit = 1 / target.scale;
    share = residual.scale * unit;
    offset = Added ? static_cast<float>(residual.zero) * share : 0;
    least = of.finish.activation == Activation::relu ? 0.0f : static_cast<float>(-target.zero);
    zero = target.zero;
  }
  static bool serves(const Finish& finish) {
    const bool eight = finish.forms.target.in_bytes();
    if (Sloped) return eight && finish.activation == Activation::prelu && !finish.residual;
    const bool bounded =
        finish.activation == Activation::none ||
        (finish.activation == Activation::relu && !(Added && finish.residual_last));
    return eight && bounded && Added == (finish.residual != nullptr) &&
           (!Added || finish.forms.residual.in_bytes());
  }

  static constexpr bool all_tiles = true, takes_four = true;
  GROSS_INLINE void next(int64_t pixels) {
    at += pixels * stride;
    from += Added ? pixels * stride : 0;
  }
  GROSS_INLINE void begin(int v) {
    scale = load<float>(scales + v * lanes<float>) * unit;
    bias = load<float>(biases + v * lanes<float>) * unit - offset;
    if constexpr (Sloped) slope = load<float>(slopes + v * lanes<float>);
  }
  GROSS_INLINE void store_sum(int v, int k, Vector<int32_t> sum) const {
    store_bytes(place(v, k), nearest_bytes(value(v, k, sum), least, zero));
  }
  GROSS_INLINE void store_four(int v, int k, const Vector<int32_t>* sum) const {
    store_nearest({value(v, k, sum[0]), value(v, k + 1, sum[1]), value(v, k + 2, sum[2]),
                   value(v, k + 3, sum[3])},
                  least, zero, place(v, k), stride);
  }

 private:
  GROSS_INLINE uint8_t* place(int v, int k) const { return at + k * stride + v * lanes<float>; }
  GROSS_INLINE Vector<float> value(int v, int k, Vector<int32_t> sum) const {
    Vector<float> value = __builtin_convertvector(sum, Vector<float>) * scale + bias;
    if constexpr (Added) value += load_bytes(from + k * stride + v * lanes<float>) * share;
    if constexpr (Sloped) value = activated<Activation::prelu, float>(value, slope);
    return value;
  }
};

// `runs` of pixels times weights, whose first vector is `vector` of the outputs, and what follows;
// `spare` holds a tile.
constexpr int64_t byte_spare = 2 * max_pixels * lanes<float>;
template <Dot dot>
void multiply_to_end(const BytePixels& source, const std::vector<ByteRun>& runs,
                     const ByteWeights& weights, const ByteEnding& ending, int64_t vector,
                     float* spare) {
  // Whole vectors of bytes in registers, where their ending allows it.
  int64_t direct = 0;
  const auto in_registers = [&](auto to) {
    using To = decltype(to);
    if (!To::type::serves(ending.finish)) return;
    while (direct < weights.vectors && ending.outputs[vector + direct].lanes() == lanes<float>)
      direct++;
    ByteWeights whole = weights;
    whole.vectors = direct;
    multiply_all_runs<dot>(
        source, runs, whole,
        [&](int64_t pixel, int64_t v) { return typename To::type(ending, pixel, vector + v); },
        [](int64_t, int64_t, int64_t, int64_t) {});
  };
  in_registers(Named<ToBytes<false, false>>{});
  in_registers(Named<ToBytes<true, false>>{});
  in_registers(Named<ToBytes<false, true>>{});
  vector += direct;
  multiply_all_runs<dot>(
      source, runs, weights.from(direct), [&](int64_t, int64_t) { return ToTile{spare}; },
      [&](int64_t pixel, int64_t taken, int64_t first, int64_t vectors) {
        for (int64_t v = 0; v < vectors; v++)
          end_all(ending,
                  {spare + v * max_pixels * lanes<float>, pixel, taken, vector + first + v});
      });
}

}  // namespace gross::cpu::GROSS_ISA
