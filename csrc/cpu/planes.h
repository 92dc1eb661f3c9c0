// Moving rows between a tensor of any strides and planes [channel][source][row][column] of the sum's type. The only code that
// knows memory formats and 16-bit types. Channels-last rows are transposed in squares of vectors, in registers.
namespace gross::cpu::GROSS_ISA {

// Geometry of the planes of one strip.
struct Planes {
  int64_t image_rows;  // rows from one image to the next
  int64_t rows;        // of one image
  int64_t source_stride, channel_stride;

  template <class T>
  static Planes of(const Plan& plan, const Strip& strip) {
    Planes planes;
    planes.image_rows = plan.row_pitch;
    planes.rows = strip.rows + plan.halo();
    const int64_t rows = (strip.images - 1) * plan.row_pitch + planes.rows;
    // A vector may be read or written past the last position, and the last row's trailing zeros lie past its pitch.
    planes.source_stride = round_up(rows * plan.pitch + plan.max_col - plan.min_col + 2 * lanes<T>, lanes<T>);
    // An odd number of vectors: planes of a power of two would all fall on the same cache sets.
    planes.channel_stride = planes.source_stride * static_cast<int64_t>(plan.sources.size());
    if (planes.channel_stride / lanes<T> % 2 == 0) planes.channel_stride += lanes<T>;
    return planes;
  }
};

template <class T>
GROSS_INLINE void fill_zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; i++) to[i] = 0;
}

// `count` pixels of up to `lanes` channels, one vector of channels per pixel, to one row per channel. Writes whole vectors: up to
// lanes - 1 zeros past the last pixel.
template <class T, class S>
GROSS_INLINE void pixels_to_rows(const S* from, int64_t pixel_stride, int64_t count, int64_t channels, T* to,
                                 int64_t channel_stride) {
  constexpr int n = lanes<T>;
  for (int64_t at = 0; at < count; at += n) {
    const int64_t pixels = std::min<int64_t>(n, count - at);
    Vector<T> square[n];
    if (pixels == n && channels >= n) {
#pragma GCC unroll 64
      for (int i = 0; i < n; i++) square[i] = load<T>(from + (at + i) * pixel_stride);
    } else {
      for (int i = 0; i < n; i++)
        square[i] = i >= pixels     ? Vector<T>{}
                    : channels >= n ? load<T>(from + (at + i) * pixel_stride)
                                    : load_first<T>(from + (at + i) * pixel_stride, channels);
    }
    transpose<T>(square);
    if (channels >= n) {
#pragma GCC unroll 64
      for (int i = 0; i < n; i++) store<T>(to + i * channel_stride + at, square[i]);
    } else {
      for (int i = 0; i < channels; i++) store<T>(to + i * channel_stride + at, square[i]);
    }
  }
}

// The reverse: `count` positions of `channels` rows to pixels, nothing past either end.
template <class T, class S>
GROSS_INLINE void rows_to_pixels(const T* from, int64_t channel_stride, int64_t count, int64_t channels, S* to,
                                 int64_t pixel_stride) {
  constexpr int n = lanes<T>;
  for (int64_t at = 0; at < count; at += n) {
    const int64_t pixels = std::min<int64_t>(n, count - at);
    Vector<T> square[n];
    if (channels >= n) {
#pragma GCC unroll 64
      for (int i = 0; i < n; i++) square[i] = load<T>(from + i * channel_stride + at);
    } else {
      for (int i = 0; i < n; i++) square[i] = i < channels ? load<T>(from + i * channel_stride + at) : Vector<T>{};
    }
    transpose<T>(square);
    if (pixels == n && channels >= n) {
#pragma GCC unroll 64
      for (int i = 0; i < n; i++) store<T>(to + (at + i) * pixel_stride, square[i]);
    } else {
      for (int i = 0; i < pixels; i++) {
        if (channels >= n)
          store<T>(to + (at + i) * pixel_stride, square[i]);
        else
          store_first<T>(to + (at + i) * pixel_stride, square[i], channels);
      }
    }
  }
}

// One row of one channel, any stride between columns.
template <class T, class S>
GROSS_INLINE void copy_row(const S* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1) {
    int64_t i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>) store<T>(to + i, load<T>(from + i));
    for (; i < count; i++) to[i] = widen<T>(from[i]);
  } else {
    for (int64_t i = 0; i < count; i++) to[i] = widen<T>(from[i * stride]);
  }
}
template <class T, class S>
GROSS_INLINE void copy_row_back(const T* from, int64_t count, S* to, int64_t stride) {
  if (stride == 1) {
    int64_t i = 0;
    for (; i + lanes<T> <= count; i += lanes<T>) store<T>(to + i, load<T>(from + i));
    for (; i < count; i++) to[i] = narrow<S>(from[i]);
  } else {
    for (int64_t i = 0; i < count; i++) to[i * stride] = narrow<S>(from[i]);
  }
}

// Fill the planes of channels [channel, channel + channels) for one strip of a plan's sources.
template <class T, class S>
void load_planes(const Image& image, const Plan& plan, const Strip& strip, const Planes& planes, int64_t channel,
                 int64_t channels, T* to) {
  constexpr int n = lanes<T>;
  const S* data = static_cast<const S*>(image.data) + channel * image.stride_c;
  for (size_t which = 0; which < plan.sources.size(); which++) {
    const Lattice& lattice = plan.sources[which];
    T* plane = to + which * planes.source_stride;
    const int64_t left = lattice.first_col + plan.min_col * lattice.col_step;
    const int64_t lead = left < 0 ? std::min(plan.pitch, ceil_div(-left, lattice.col_step)) : 0;
    const int64_t end =
        left < image.width ? std::max(lead, std::min(plan.pitch, ceil_div(image.width - left, lattice.col_step))) : lead;
    const int64_t count = end - lead;
    // Rows and channels in ascending order: what a vector writes past its end is overwritten by what follows.
    // Rows between images, where they do not share their padding, are zeros.
    for (int64_t i = 0; i < strip.images; i++)
      for (int64_t r = 0; r < (i + 1 < strip.images ? std::max(planes.rows, planes.image_rows) : planes.rows); r++) {
        T* row = plane + (i * planes.image_rows + r) * plan.pitch;
        const int64_t y = lattice.first_row + (strip.row + plan.min_row + r) * lattice.row_step;
        if (r >= planes.rows || y < 0 || y >= image.height || count == 0) {
          for (int64_t c = 0; c < channels; c++) fill_zero(row + c * planes.channel_stride, plan.pitch);
          continue;
        }
        const S* from = data + (strip.image + i) * image.stride_n + y * image.stride_h +
                        (left + lead * lattice.col_step) * image.stride_w;
        const int64_t step = lattice.col_step * image.stride_w;
        for (int64_t c = 0; c < channels; c++) fill_zero(row + c * planes.channel_stride, lead);
        if (image.stride_c == 1 && channels > 1) {
          for (int64_t c = 0; c < channels; c += n)
            pixels_to_rows<T>(from + c, step, count, std::min<int64_t>(n, channels - c),
                              row + c * planes.channel_stride + lead, planes.channel_stride);
        } else {
          for (int64_t c = 0; c < channels; c++)
            copy_row<T>(from + c * image.stride_c, step, count, row + c * planes.channel_stride + lead);
        }
        for (int64_t c = 0; c < channels; c++)
          fill_zero(row + c * planes.channel_stride + end, plan.pitch - end);
      }
    const int64_t used = ((strip.images - 1) * planes.image_rows + planes.rows) * plan.pitch;
    for (int64_t c = 0; c < channels; c++)
      fill_zero(plane + c * planes.channel_stride + used, planes.source_stride - used);
  }
}

// Where a position of the planes is in the target: walks positions in ascending order.
struct Cursor {
  int64_t image = 0, row = 0, col = 0;
  void advance(int64_t count, const Plan& plan) {
    col += count;
    row += col / plan.pitch;
    col %= plan.pitch;
    image += row / plan.row_pitch;
    row %= plan.row_pitch;
  }
};

// Write `count` positions of `channels` rows, starting at the cursor, to the pixels of a target; positions between rows are dropped.
template <class T, class S>
void store_rows(const T* from, int64_t channel_stride, int64_t count, const Image& image, const Plan& plan,
                const Target& target, const Strip& strip, Cursor at, int64_t channel, int64_t channels) {
  constexpr int n = lanes<T>;
  const int64_t rows = std::min(strip.rows, target.rows - strip.row);
  S* data = static_cast<S*>(image.data) + channel * image.stride_c;
  while (count > 0) {
    const int64_t run = std::min(count, plan.pitch - at.col);
    const int64_t pixels = std::min(run, target.cols - at.col);
    if (at.row < rows && at.image < strip.images && pixels > 0) {
      const int64_t y = target.lattice.first_row + (strip.row + at.row) * target.lattice.row_step;
      const int64_t x = target.lattice.first_col + at.col * target.lattice.col_step;
      S* to = data + (strip.image + at.image) * image.stride_n + y * image.stride_h + x * image.stride_w;
      const int64_t step = target.lattice.col_step * image.stride_w;
      if (image.stride_c == 1 && channels > 1) {
        for (int64_t c = 0; c < channels; c += n)
          rows_to_pixels<T>(from + c * channel_stride, channel_stride, pixels, std::min<int64_t>(n, channels - c),
                            to + c, step);
      } else {
        for (int64_t c = 0; c < channels; c++)
          copy_row_back<T>(from + c * channel_stride, pixels, to + c * image.stride_c, step);
      }
    }
    from += run;
    count -= run;
    at.advance(run, plan);
  }
}

}  // namespace gross::cpu::GROSS_ISA
