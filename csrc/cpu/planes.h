// Moving rows between a tensor of any strides and planes of the sum's type. The only code that knows memory formats and 16-bit types.
//
// Planes are [channel][source][row][column]. A channels-last tensor is read by whole vectors of channels, one per position of the plane,
// and transposed in registers; a table says where in the tensor each position lies, so short rows fill vectors as well as long ones.
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

  // Rows that are written for image i of a strip. Rows between images that do not share their padding are zeros.
  int64_t rows_of(int64_t i, const Strip& strip) const {
    return i + 1 < strip.images ? std::max(rows, image_rows) : rows;
  }
};

// The columns of a lattice that lie in the image: positions [lead, end) of each row, the first of them at column `first`.
struct Columns {
  int64_t lead, end, first;

  Columns(const Lattice& lattice, const Plan& plan, int64_t width) {
    const int64_t left = lattice.first_col + plan.min_col * lattice.col_step;
    lead = left < 0 ? std::min(plan.pitch, ceil_div(-left, lattice.col_step)) : 0;
    end = left < width ? std::max(lead, std::min(plan.pitch, ceil_div(width - left, lattice.col_step))) : lead;
    first = left + lead * lattice.col_step;
  }
};

// Where each position of a strip's planes lies in the tensor, in elements from image `strip.image`; -1 for zeros.
inline void source_table(const Image& image, const Plan& plan, const Lattice& lattice, const Strip& strip,
                         const Planes& planes, std::vector<int64_t>& table) {
  table.assign(planes.source_stride, -1);
  const Columns columns(lattice, plan, image.width);
  for (int64_t i = 0; i < strip.images; i++)
    for (int64_t r = 0; r < planes.rows; r++) {
      const int64_t y = lattice.first_row + (strip.row + plan.min_row + r) * lattice.row_step;
      if (y < 0 || y >= image.height) continue;
      int64_t* row = table.data() + (i * planes.image_rows + r) * plan.pitch;
      const int64_t start = i * image.stride_n + y * image.stride_h + columns.first * image.stride_w;
      for (int64_t k = columns.lead; k < columns.end; k++)
        row[k] = start + (k - columns.lead) * lattice.col_step * image.stride_w;
    }
}

// The same for the positions of a target; -1 for those between rows.
inline void target_table(const Image& image, const Plan& plan, const Target& target, const Strip& strip, int64_t positions,
                         std::vector<int64_t>& table) {
  table.assign(positions, -1);
  const Lattice& lattice = target.lattice;
  for (int64_t i = 0; i < strip.images; i++)
    for (int64_t r = 0; r < std::min(strip.rows, target.rows - strip.row); r++) {
      const int64_t y = lattice.first_row + (strip.row + r) * lattice.row_step;
      int64_t* row = table.data() + (i * plan.row_pitch + r) * plan.pitch;
      const int64_t start = i * image.stride_n + y * image.stride_h + lattice.first_col * image.stride_w;
      for (int64_t k = 0; k < target.cols; k++) row[k] = start + k * lattice.col_step * image.stride_w;
    }
}

// The vector of channels at one position, zeros where the table says so; `channels` of them where fewer than a vector are left.
template <class T, class S>
GROSS_INLINE Vector<T> load_pixel(const S* data, int64_t offset, int64_t channels) {
  if (offset < 0) return Vector<T>{};
  return channels >= lanes<T> ? load<T>(data + offset) : load_first<T>(data + offset, channels);
}
template <class T, class S>
GROSS_INLINE void store_pixel(S* data, int64_t offset, int64_t channels, Vector<T> v) {
  if (offset < 0) return;
  if (channels >= lanes<T>)
    store<T>(data + offset, v);
  else
    store_first<T>(data + offset, v, channels);
}

// `count` positions, a multiple of the vector, of `channels` channels-last channels to planes.
template <class T, class S>
GROSS_INLINE void pixels_to_planes(const S* data, const int64_t* table, int64_t count, int64_t channels, T* to,
                                   int64_t channel_stride) {
  constexpr int n = lanes<T>;
  for (int64_t p = 0; p < count; p += n)
    for (int64_t c = 0; c < channels; c += n) {
      Vector<T> square[n];
      const int64_t left = channels - c;
#pragma GCC unroll 64
      for (int i = 0; i < n; i++) square[i] = load_pixel<T>(data + c, table[p + i], left);
      transpose<T>(square);
      T* rows = to + c * channel_stride + p;
      if (left >= n) {
#pragma GCC unroll 64
        for (int i = 0; i < n; i++) store<T>(rows + i * channel_stride, square[i]);
      } else {
        for (int i = 0; i < left; i++) store<T>(rows + i * channel_stride, square[i]);
      }
    }
}

// The reverse, for positions that the table places.
template <class T, class S>
GROSS_INLINE void planes_to_pixels(const T* from, int64_t channel_stride, int64_t channels, const int64_t* table,
                                   int64_t count, S* data) {
  constexpr int n = lanes<T>;
  for (int64_t p = 0; p < count; p += n)
    for (int64_t c = 0; c < channels; c += n) {
      Vector<T> square[n];
      const int64_t left = channels - c;
      const T* rows = from + c * channel_stride + p;
      if (left >= n) {
#pragma GCC unroll 64
        for (int i = 0; i < n; i++) square[i] = load<T>(rows + i * channel_stride);
      } else {
        for (int i = 0; i < n; i++) square[i] = i < left ? load<T>(rows + i * channel_stride) : Vector<T>{};
      }
      transpose<T>(square);
#pragma GCC unroll 64
      for (int i = 0; i < n; i++) store_pixel<T>(data + c, table[p + i], left, square[i]);
    }
}

// Zeros by whole vectors: up to lanes - 1 past the end.
template <class T>
GROSS_INLINE void zero_vectors(T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += lanes<T>) store<T>(to + i, Vector<T>{});
}

// One row of one channel, any stride between columns.
template <class T, class S>
GROSS_INLINE void copy_row(const S* from, int64_t stride, int64_t count, T* to) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; i++) to[i] = widen<T>(from[i * stride]);
    return;
  }
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) store<T>(to + i, load<T>(from + i));
  if (i < count) store_first<T>(to + i, load_first<T>(from + i, count - i), count - i);
}
template <class T, class S>
GROSS_INLINE void copy_row_back(const T* from, int64_t count, S* to, int64_t stride) {
  if (stride != 1) {
    for (int64_t i = 0; i < count; i++) to[i * stride] = narrow<S>(from[i]);
    return;
  }
  int64_t i = 0;
  for (; i + lanes<T> <= count; i += lanes<T>) store<T>(to + i, load<T>(from + i));
  if (i < count) store_first<T>(to + i, load<T>(from + i), count - i);
}

// Rows of channels whose stride is not 1 to planes.
template <class T, class S>
void rows_to_planes(const Image& image, const Plan& plan, const Lattice& lattice, const Strip& strip, const Planes& planes,
                    int64_t channel, int64_t channels, T* to) {
  const S* data = static_cast<const S*>(image.data) + strip.image * image.stride_n;
  const Columns columns(lattice, plan, image.width);
  for (int64_t c = 0; c < channels; c++) {
    T* plane = to + c * planes.channel_stride;
    // Rows in ascending order: what a vector of zeros writes past its end is overwritten by what follows.
    for (int64_t i = 0; i < strip.images; i++)
      for (int64_t r = 0; r < planes.rows_of(i, strip); r++) {
        T* row = plane + (i * planes.image_rows + r) * plan.pitch;
        const int64_t y = lattice.first_row + (strip.row + plan.min_row + r) * lattice.row_step;
        if (r >= planes.rows || y < 0 || y >= image.height) {
          zero_vectors(row, plan.pitch);
          continue;
        }
        const S* from = data + i * image.stride_n + (channel + c) * image.stride_c + y * image.stride_h + columns.first * image.stride_w;
        zero_vectors(row, columns.lead);
        copy_row<T>(from, lattice.col_step * image.stride_w, columns.end - columns.lead, row + columns.lead);
        zero_vectors(row + columns.end, plan.pitch - columns.end);
      }
    const int64_t used = ((strip.images - 1) * planes.image_rows + planes.rows) * plan.pitch;
    zero_vectors(plane + used, planes.source_stride - used - lanes<T>);
  }
}

// Fill the planes of channels [channel, channel + channels) for one strip; `tables` has one table per source.
template <class T, class S>
void load_planes(const Image& image, const Plan& plan, const Strip& strip, const Planes& planes,
                 const std::vector<std::vector<int64_t>>& tables, int64_t channel, int64_t channels, T* to) {
  for (size_t which = 0; which < plan.sources.size(); which++) {
    T* plane = to + which * planes.source_stride;
    if (image.stride_c == 1) {
      const S* data = static_cast<const S*>(image.data) + strip.image * image.stride_n + channel;
      pixels_to_planes<T>(data, tables[which].data(), planes.source_stride, channels, plane, planes.channel_stride);
    } else {
      rows_to_planes<T, S>(image, plan, plan.sources[which], strip, planes, channel, channels, plane);
    }
  }
}

// Write `count` positions from `first` on of `channels` planes to the target; positions between rows are dropped.
template <class T, class S>
void store_planes(const T* from, int64_t channel_stride, int64_t first, int64_t count, const Image& image, const Plan& plan,
                  const Target& target, const Strip& strip, const std::vector<int64_t>& table, int64_t channel, int64_t channels) {
  S* data = static_cast<S*>(image.data) + strip.image * image.stride_n + channel * image.stride_c;
  if (image.stride_c == 1) {
    planes_to_pixels<T>(from, channel_stride, channels, table.data() + first, count, data);
    return;
  }
  for (const int64_t end = first + count; first < end;) {
    const int64_t col = first % plan.pitch;
    const int64_t run = std::min(end - first, plan.pitch - col), pixels = std::min(run, target.cols - col);
    if (pixels > 0 && table[first] >= 0)
      for (int64_t c = 0; c < channels; c++)
        copy_row_back<T>(from + c * channel_stride, pixels, data + table[first] + c * image.stride_c,
                         target.lattice.col_step * image.stride_w);
    from += run;
    first += run;
  }
}

}  // namespace gross::cpu::GROSS_ISA
