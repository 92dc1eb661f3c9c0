// Sums over windows of channels, rows and columns: the sum-pooling of structured convolutions, and
// its gradient, which is the same with other offsets.
//
// Axis by axis. A row of the source is read once: it becomes a line, [column][channel] or, of
// tensors with columns innermost, [channel][column], in which windows of both axes are sums of
// neighbours a fixed step apart. Channels come first, for they become fewer. The lines that a
// window of rows needs stay in the first two caches; a row of the target is their sum, and is
// written once.
//
// A window's sum is made of sums of half its length: ⌊log₂ d⌋ passes over the line. Running sums
// would take two additions whatever the length, and lose to cancellation what these keep.
#pragma once

#include "planes.h"

namespace gross::cpu::GROSS_ISA {

// Bytes that the lines of a window may take together.
constexpr int64_t line_budget = 32 << 10;

// values[i] = Σ_{k < window} values[i + k·step] for i < count, in place; reads as far as those
// need. `copy` is memory for as many numbers as are read. Up to a vector beyond `count` is written.
template <class T>
void sum_windows(T* values, T* copy, int64_t count, int64_t step, int64_t window) {
  if (window == 1) return;
  int bit = 62;
  while (!(window >> bit)) bit--;
  int64_t width = 1;
  const T* single = values;  // of windows of one
  if (window & ((int64_t{1} << (bit - 1)) - 1)) {
    std::memcpy(copy, values, (count + (window - 1) * step) * sizeof(T));
    single = copy;
  }
  while (bit-- > 0) {
    const bool odd = window >> bit & 1;
    const int64_t apart = width * step, beyond = 2 * apart;
    width = 2 * width + odd;
    const int64_t end = count + (window - width) * step;
    if (odd)
      for (int64_t i = 0; i < end; i += lanes<T>)
        store<T>(values + i,
                 load<T>(values + i) + load<T>(values + i + apart) + load<T>(single + i + beyond));
    else
      for (int64_t i = 0; i < end; i += lanes<T>)
        store<T>(values + i, load<T>(values + i) + load<T>(values + i + apart));
  }
}

template <class T, class S>
class SumPoolWalk {
 public:
  explicit SumPoolWalk(const SumPooling& call)
      : call_(call),
        source_(call.source),
        target_(call.target),
        channels_inside_(target_.stride_c == 1 && (target_.channels > 1 || target_.stride_w != 1)),
        // Channels that are not summed are no groups, and may be taken in parts.
        groups_(call.channels.window == 1 ? 1 : call.groups),
        lines_((call.rows.window - 1) * call.rows.step + 1) {
    columns_ = target_.width, channels_ = target_.channels;
    const int64_t budget = line_budget / (lines_ * static_cast<int64_t>(sizeof(T)));
    if (!channels_inside_ && call.channels.window == 1)
      channels_ = std::max<int64_t>(1, budget / line_columns(columns_));
    else
      // Columns that two parts share are summed twice: an eighth at most.
      columns_ = std::max(budget / (groups_ * group_pitch(channels_ / groups_)),
                          8 * call.columns.window * call.columns.step);
    columns_ = std::min(columns_, target_.width);
    channels_ = std::min(channels_, target_.channels);
    across_ = ceil_div(target_.width, columns_);
    deep_ = ceil_div(target_.channels, channels_);
    // Lines at the border of two strips are summed twice.
    const int64_t alike = call.images * across_ * deep_;
    down_ = std::max<int64_t>(
        1, std::min(ceil_div(4 * call.threads.count, alike), target_.height / (4 * lines_)));
    // An odd number of vectors, so that no two lines fall on the same cache sets; two of them are
    // for what is read and written beyond the last.
    const int64_t numbers = groups_ * group_pitch(channels_ / groups_) * line_columns(columns_);
    line_ = ((ceil_div(numbers, lanes<T>) + 2) | 1) * lanes<T>;
  }

  void run() const {
    auto work = [&](int64_t begin, int64_t end) {
      T* const memory = scratch<T>((lines_ + 1) * line_);
      std::vector<int64_t> held(lines_);
      for (int64_t unit = begin; unit < end; unit++) {
        int64_t rest = unit;
        Part part;
        part.row = rest % down_ * target_.height / down_;
        part.rows = (rest % down_ + 1) * target_.height / down_ - part.row;
        rest /= down_;
        part.column = rest % across_ * columns_;
        part.columns = std::min(columns_, target_.width - part.column);
        rest /= across_;
        part.channel = rest % deep_ * channels_;
        part.channels = std::min(channels_, target_.channels - part.channel);
        part.image = rest / deep_;
        pool(part, memory, held);
      }
    };
    gross::cpu::run(call_.threads, call_.images * across_ * deep_ * down_, work);
  }

 private:
  // A unit of work: some of the target of one image.
  struct Part {
    int64_t image, row, rows, column, columns, channel, channels;
  };
  // A line in memory: steps of its two axes, and how much of it there is.
  struct Line {
    int64_t channels, columns, channel_step, column_step, size;
  };

  // Channels and columns that a line needs for as many of the target.
  int64_t group_pitch(int64_t channels) const { return channels + call_.channels.window - 1; }
  int64_t line_columns(int64_t columns) const {
    return (columns - 1) * call_.columns.stride + (call_.columns.window - 1) * call_.columns.step +
           1;
  }
  Line line_of(const Part& part) const {
    const int64_t channels = groups_ * group_pitch(part.channels / groups_),
                  columns = line_columns(part.columns);
    return {channels, columns, channels_inside_ ? 1 : columns, channels_inside_ ? channels : 1,
            channels * columns};
  }

  void pool(const Part& part, T* memory, std::vector<int64_t>& held) const {
    const Line line = line_of(part);
    const Axis& rows = call_.rows;
    std::fill(held.begin(), held.end(), INT64_MIN);
    std::vector<const T*> found;
    for (int64_t y = part.row; y < part.row + part.rows; y++) {
      found.clear();
      for (int64_t k = 0; k < rows.window; k++) {
        const int64_t at = y * rows.stride + rows.offset + k * rows.step;
        if (at < 0 || at % rows.spread || at / rows.spread >= source_.height) continue;
        T* const slot = memory + at % lines_ * line_;
        if (held[at % lines_] != at) {
          load_line(part, line, at / rows.spread, slot);
          sum_line(line, slot, memory + lines_ * line_);
          held[at % lines_] = at;
        }
        found.push_back(slot);
      }
      write_row(part, line, y, found);
    }
  }

  // A row of the source as a line, zeros where it has no columns or channels.
  void load_line(const Part& part, const Line& line, int64_t row, T* to) const {
    const Axis &columns = call_.columns, &channels = call_.channels;
    const int64_t group = group_pitch(part.channels / groups_), given = source_.channels / groups_,
                  first = columns.offset + part.column * columns.stride;
    // The line's columns that are the source's, every `spread`-th of [begin, end).
    const int64_t begin = ceil_div(std::max<int64_t>(first, 0), columns.spread) * columns.spread,
                  end = std::min(first + line.columns, (source_.width - 1) * columns.spread + 1);
    const int64_t count = begin < end ? (end - 1 - begin) / columns.spread + 1 : 0;
    if (columns.spread > 1 || channels.offset != 0 || !count)
      std::memset(to, 0, line.size * sizeof(T));
    else
      zero_columns(line, begin - first, end - first, to);
    if (!count) return;
    const S* const from = static_cast<const S*>(source_.data) + part.image * source_.stride_n +
                          row * source_.stride_h + begin / columns.spread * source_.stride_w +
                          part.channel * source_.stride_c;
    to += (begin - first) * line.column_step;
    const int64_t step = columns.spread * line.column_step;
    const int64_t taken = groups_ == 1 && channels.window == 1 ? part.channels : given;
    if (channels_inside_) {
      if (source_.stride_c == 1 && source_.stride_w == line.channels &&
          source_.channels == line.channels && columns.spread == 1)
        return copy_run(from, 1, count * step, to, 1);
      for (int64_t i = 0; i < count; i++)
        for (int64_t g = 0; g < groups_; g++)
          copy_run(from + i * source_.stride_w + g * given * source_.stride_c, source_.stride_c,
                   taken, to + i * step + g * group - channels.offset, 1);
    } else {
      for (int64_t g = 0; g < groups_; g++)
        for (int64_t c = 0; c < taken; c++)
          copy_run(from + (g * given + c) * source_.stride_c, source_.stride_w, count,
                   to + (g * group + c - channels.offset) * line.channel_step, step);
    }
  }

  // Zeros before column `begin` of a line and from `end` on.
  static void zero_columns(const Line& line, int64_t begin, int64_t end, T* to) {
    const int64_t outer = line.channel_step == 1 ? 1 : line.channels, pitch = line.channel_step,
                  step = line.column_step;
    for (int64_t c = 0; c < outer; c++) {
      std::fill(to + c * pitch, to + c * pitch + begin * step, T{});
      std::fill(to + c * pitch + end * step, to + c * pitch + line.columns * step, T{});
    }
  }

  static void copy_run(const S* from, int64_t from_step, int64_t count, T* to, int64_t to_step) {
    int64_t i = 0;
    if (from_step == 1 && to_step == 1) {
      for (; i + lanes<T> <= count; i += lanes<T>) store<T>(to + i, load<T>(from + i));
      if (i < count) store_first<T>(to + i, load_first<T>(from + i, count - i), count - i);
      return;
    }
    for (; i < count; i++) to[i * to_step] = widen<T>(from[i * from_step]);
  }

  void sum_line(const Line& line, T* values, T* copy) const {
    const Axis &channels = call_.channels, &columns = call_.columns;
    int64_t count = line.size - (channels.window - 1) * line.channel_step;
    sum_windows(values, copy, count, line.channel_step, channels.window);
    const int64_t step = columns.step * line.column_step;
    count -= (columns.window - 1) * step;
    sum_windows(values, copy, count, step, columns.window);
  }

  // A row of the target, the sum of these lines.
  void write_row(const Part& part, const Line& line, int64_t y,
                 const std::vector<const T*>& found) const {
    S* const to = static_cast<S*>(target_.data) + part.image * target_.stride_n +
                  y * target_.stride_h + part.column * target_.stride_w +
                  part.channel * target_.stride_c;
    const int64_t kept = part.channels / groups_, group = group_pitch(kept),
                  stride = call_.columns.stride;
    if (channels_inside_) {
      if (stride == 1 && target_.stride_w == line.column_step)
        return write_run(found, 0, line.column_step * part.columns, to, 1);
      for (int64_t x = 0; x < part.columns; x++)
        for (int64_t g = 0; g < groups_; g++)
          write_run(found, x * stride * line.column_step + g * group, kept,
                    to + x * target_.stride_w + g * kept, 1);
    } else {
      for (int64_t g = 0; g < groups_; g++)
        for (int64_t c = 0; c < kept; c++)
          write_run(found, (g * group + c) * line.channel_step, part.columns,
                    to + (g * kept + c) * target_.stride_c, stride);
    }
  }

  // `count` numbers of the target, every `step`-th of the lines from `at` on.
  static void write_run(const std::vector<const T*>& lines_of, int64_t at, int64_t count, S* to,
                        int64_t step) {
    if (step > 1) {
      for (int64_t i = 0; i < count; i++) {
        T sum = 0;
        for (const T* line : lines_of) sum += line[at + i * step];
        to[i] = narrow<S>(sum);
      }
      return;
    }
    const T *first = nullptr, *second = nullptr;
    if (!lines_of.empty()) first = lines_of[0] + at;
    if (lines_of.size() == 2) second = lines_of[1] + at;
    const auto sum = [&](int64_t i) {
      Vector<T> total{};
      for (const T* line : lines_of) total += load<T>(line + at + i);
      return total;
    };
    const auto write = [&](auto value) {
      int64_t i = 0;
      for (; i + lanes<T> <= count; i += lanes<T>) store<T>(to + i, value(i));
      if (i < count) store_first<T>(to + i, value(i), count - i);
    };
    if (second)
      write([&](int64_t i) { return load<T>(first + i) + load<T>(second + i); });
    else if (lines_of.size() == 1)
      write([&](int64_t i) { return load<T>(first + i); });
    else
      write(sum);
  }

  const SumPooling& call_;
  const Image &source_, &target_;
  const bool channels_inside_;  // whether channels are the inner axis of a line
  const int64_t groups_, lines_;
  int64_t columns_, channels_;    // of a part
  int64_t across_, deep_, down_;  // parts along columns, channels and rows
  int64_t line_;                  // numbers from one line to the next
};

template <class T, class S>
void sum_pool(const SumPooling& call) {
  SumPoolWalk<T, S>(call).run();
}

}  // namespace gross::cpu::GROSS_ISA
