// Moving rows between a tensor of any strides and planes of the sum's type. The only code that
// knows memory formats and 16-bit types.
//
// Planes are [vector of channels][source][position][lane]: one position of a plane is a whole
// vector of consecutive channels, zeros in the lanes that have none. A channels-last tensor is
// copied; of any other, squares of channels × columns are transposed in registers.
#pragma once

#include "channels.h"
#include "vector.h"

namespace gross::cpu::GROSS_ISA {

// Positions that a kernel may read past the last, as zeros.
constexpr int64_t slack = 8;

// The planes of one strip; strides in elements.
struct Planes {
  const Plan* plan;
  Strip strip;
  int64_t image_rows;  // rows from one image to the next
  int64_t rows;        // of one image
  int64_t positions;   // of one source
  int64_t source_stride, vector_stride;

  template <class T>
  static Planes of(const Plan& plan, const Strip& strip) {
    Planes planes;
    planes.plan = &plan;
    planes.strip = strip;
    planes.image_rows = plan.row_pitch;
    planes.rows = strip.rows + plan.halo();
    // The last row's trailing zeros lie past its pitch. An odd number: planes of a power of two
    // would all fall on the same cache sets.
    planes.positions = (((strip.images - 1) * plan.row_pitch + planes.rows) * plan.pitch +
                        plan.max_col - plan.min_col + slack) |
                       1;
    planes.source_stride = planes.positions * lanes<T>;
    planes.vector_stride =
        (planes.positions * static_cast<int64_t>(plan.sources.size()) | 1) * lanes<T>;
    return planes;
  }

  // Rows that are written for image i of a strip. Rows between images that do not share their
  // padding are zeros.
  int64_t rows_of(int64_t i) const {
    return i + 1 < strip.images ? std::max(rows, image_rows) : rows;
  }
  // Positions that hold rows; zeros follow.
  int64_t used() const { return ((strip.images - 1) * image_rows + rows) * plan->pitch; }
};

// The columns of a lattice that lie in the image: positions [lead, end) of each row, the first of
// them at column `first`.
struct Columns {
  int64_t lead, end, first;

  Columns(const Lattice& lattice, const Plan& plan, int64_t width) {
    const int64_t left = lattice.first_col + plan.min_col * lattice.col_step;
    lead = left < 0 ? std::min(plan.pitch, ceil_div(-left, lattice.col_step)) : 0;
    end = left < width
              ? std::max(lead, std::min(plan.pitch, ceil_div(width - left, lattice.col_step)))
              : lead;
    first = left + lead * lattice.col_step;
  }
};

template <class T>
GROSS_INLINE void zero_positions(T* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) store<T>(to + i * lanes<T>, Vector<T>{});
}

// `count` numbers, `stride` apart, as the first lanes of a vector.
template <class T, class S>
GROSS_INLINE Vector<T> load_strided(const S* from, int64_t stride, int64_t count) {
  if (stride == 1) return count >= lanes<T> ? load<T>(from) : load_first<T>(from, count);
  S part[lanes<T>] = {};
  for (int64_t i = 0; i < std::min<int64_t>(count, lanes<T>); i++) part[i] = from[i * stride];
  return load<T>(part);
}
template <class T, class S>
GROSS_INLINE void store_strided(S* to, Vector<T> v, int64_t stride, int64_t count) {
  if (stride == 1) return count >= lanes<T> ? store<T>(to, v) : store_first<T>(to, v, count);
  S part[lanes<T>];
  store<T>(part, v);
  for (int64_t i = 0; i < std::min<int64_t>(count, lanes<T>); i++) to[i * stride] = part[i];
}

// A row of a tensor from its first column on.
template <class S>
struct TensorRow {
  S* at;
  int64_t col_stride, channel_stride, channels;
};

// `count` columns of a row to consecutive positions of their planes.
template <class T, class S>
GROSS_INLINE void load_columns(const TensorRow<const S>& row, int64_t count, T* to,
                               int64_t vector_stride) {
  constexpr int n = lanes<T>;
  const auto [first, col_stride, channel_stride, channels] = row;
  if (channel_stride == 1) {
    const S* from = first;
    for (int64_t k = 0; k < count; k++, from += col_stride, to += n) {
      int64_t c = 0;
      T* vector = to;
      for (; c + n <= channels; c += n, vector += vector_stride)
        store<T>(vector, load<T>(from + c));
      if (c < channels) store<T>(vector, load_first<T>(from + c, channels - c));
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += n, to += vector_stride)
    for (int64_t k = 0; k < count; k += n) {
      Vector<T> square[n];
#pragma GCC unroll 64
      for (int i = 0; i < n; i++)
        square[i] = c + i < channels
                        ? load_strided<T>(first + (c + i) * channel_stride + k * col_stride,
                                          col_stride, count - k)
                        : Vector<T>{};
      transpose<T>(square);
      T* position = to + k * n;
      for (int i = 0; i < std::min<int64_t>(n, count - k); i++)
        store<T>(position + i * n, square[i]);
    }
}

// The reverse: `count` positions of one vector of channels to one row of the tensor.
template <class T, class S>
GROSS_INLINE void store_columns(const T* from, int64_t count, const TensorRow<S>& row) {
  constexpr int n = lanes<T>;
  const auto [to, col_stride, channel_stride, channels] = row;
  if (channel_stride == 1) {
    for (int64_t k = 0; k < count; k++)
      store_strided<T>(to + k * col_stride, load<T>(from + k * n), 1, channels);
    return;
  }
  for (int64_t k = 0; k < count; k += n) {
    Vector<T> square[n];
#pragma GCC unroll 64
    for (int i = 0; i < n; i++)
      square[i] = k + i < count ? load<T>(from + (k + i) * n) : Vector<T>{};
    transpose<T>(square);
    for (int i = 0; i < std::min<int64_t>(n, channels); i++)
      store_strided<T>(to + i * channel_stride + k * col_stride, square[i], col_stride, count - k);
  }
}

// Fill the planes of channels [channel, channel + channels).
template <class T, class S>
void load_planes(const Image& image, const Planes& planes, int64_t channel, int64_t channels,
                 T* to) {
  constexpr int n = lanes<T>;
  const Plan& plan = *planes.plan;
  const Strip& strip = planes.strip;
  const S* data =
      static_cast<const S*>(image.data) + strip.image * image.stride_n + channel * image.stride_c;
  const int64_t vectors = ceil_div(channels, n);
  auto zero = [&](T* at, int64_t count) {
    for (int64_t v = 0; v < vectors; v++) zero_positions(at + v * planes.vector_stride, count);
  };
  for (const Lattice& lattice : plan.sources) {
    const Columns columns(lattice, plan, image.width);
    for (int64_t i = 0; i < strip.images; i++)
      for (int64_t r = 0; r < planes.rows_of(i); r++) {
        T* row = to + (i * planes.image_rows + r) * plan.pitch * n;
        const int64_t y = lattice.first_row + (strip.row + plan.min_row + r) * lattice.row_step;
        if (r >= planes.rows || y < 0 || y >= image.height) {
          zero(row, plan.pitch);
          continue;
        }
        zero(row, columns.lead);
        const S* from =
            data + i * image.stride_n + y * image.stride_h + columns.first * image.stride_w;
        load_columns<T, S>({from, lattice.col_step * image.stride_w, image.stride_c, channels},
                           columns.end - columns.lead, row + columns.lead * n,
                           planes.vector_stride);
        zero(row + columns.end * n, plan.pitch - columns.end);
      }
    zero(to + planes.used() * n, planes.positions - planes.used());
    to += planes.source_stride;
  }
}

// The planes of the source channels of a set, cluster by cluster.
template <class T, class S>
void load_sources(const Image& image, const Planes& planes, const Channels<T>& channels,
                  const Set& set, T* to) {
  const int64_t cluster = channels.together * channels.sources;
  const int64_t begin = channels.cluster(set.first) * cluster,
                end = std::min(channels.groups * channels.sources,
                               (channels.cluster(set.last - 1) + 1) * cluster);
  // Clusters that fill their vectors lie side by side.
  const int64_t step = cluster % lanes<T> == 0 ? end - begin : cluster;
  for (int64_t at = begin; at < end; at += step, to += channels.vectors * planes.vector_stride)
    load_planes<T, S>(image, planes, at, std::min(step, end - at), to);
}

}  // namespace gross::cpu::GROSS_ISA
