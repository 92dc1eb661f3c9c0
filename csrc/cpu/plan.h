// Every convolution here as a sum of shifted planes.
//
// A strided, dilated, padded convolution, and its input gradient, split into phases: within one
// phase of source and target every tap is a shift by whole rows and columns. So each kernel copies
// the rows that it needs into planes (one per phase and channel, zeros where the padding is), laid
// out with one common pitch, and a tap becomes an offset into a plane: output position p reads
// source position p + offset, for all positions of all rows at once. That one shape of inner loop
// serves every kernel size, stride, dilation, group size and memory format with full vectors. The
// price is the few positions between rows: trailing zeros of one row serve as the leading zeros of
// the next, so a 3×3 convolution of a w-wide map computes w + 1 columns per row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "call.h"

namespace gross::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// A lattice of rows and columns of a tensor: grid (i, k) is tensor row first_row + i row_step,
// column first_col + k col_step.
struct Lattice {
  int64_t first_row, row_step, first_col, col_step;
};

// Target (i, k) reads source grid position (i + row, k + col), with the weight of kernel position
// `index`.
struct Tap {
  int source;
  int64_t row, col;
  int64_t index;
};

struct Target {
  Lattice lattice;
  int64_t rows, cols;
  std::vector<Tap> taps;
};

struct Plan {
  std::vector<Lattice> sources;
  std::vector<Target> targets;
  int64_t source_height = 0, source_width = 0;

  // Filled by `layout`: the extent of the taps, the largest target, and the pitches.
  int64_t min_row = 0, max_row = 0, min_col = 0, max_col = 0;
  int64_t rows = 0, cols = 0;
  int64_t pitch = 0;      // positions from one row to the next
  int64_t row_pitch = 0;  // rows from one image to the next, where whole images share a strip

  int64_t halo() const { return max_row - min_row; }

  void layout() {
    bool first = true;
    for (const Target& target : targets) {
      rows = std::max(rows, target.rows);
      cols = std::max(cols, target.cols);
      for (const Tap& tap : target.taps) {
        min_row = first ? tap.row : std::min(min_row, tap.row);
        max_row = first ? tap.row : std::max(max_row, tap.row);
        min_col = first ? tap.col : std::min(min_col, tap.col);
        max_col = first ? tap.col : std::max(max_col, tap.col);
        first = false;
      }
    }
    int64_t shared_cols = cols + max_col - min_col, shared_rows = rows + halo();
    for (const Lattice& source : sources) {
      shared_cols =
          std::min(shared_cols, shared_zeros(source.first_col, source.col_step, source_width,
                                             min_col, cols + max_col - min_col));
      shared_rows = std::min(shared_rows, shared_zeros(source.first_row, source.row_step,
                                                       source_height, min_row, rows + halo()));
    }
    pitch = std::max(cols + max_col - min_col - shared_cols, cols);
    row_pitch = std::max(rows + halo() - shared_rows, rows);
  }

 private:
  // Of `count` grid points from `start`, how many zeros at the end can double as the zeros at the
  // beginning.
  static int64_t shared_zeros(int64_t first, int64_t step, int64_t size, int64_t start,
                              int64_t count) {
    const int64_t at = first + start * step;
    const int64_t lead = at < 0 ? std::min(count, ceil_div(-at, step)) : 0;
    const int64_t end = at < size ? std::min(count, ceil_div(size - at, step)) : 0;
    return std::min(lead, count - std::max(lead, end));
  }
};

// Phases of one dimension: tap k reads padded position y stride + k dilation, which is row y +
// shift of phase `phase`.
struct Phase {
  int64_t phase, shift;
};
inline Phase phase_of(int64_t k, int64_t dilation, int64_t stride) {
  return {k * dilation % stride, k * dilation / stride};
}

// Output rows and columns from the phases of the padded input.
inline Plan forward_plan(const Geometry& g, int64_t in_h, int64_t in_w, int64_t out_h,
                         int64_t out_w) {
  Plan plan;
  plan.source_height = in_h;
  plan.source_width = in_w;
  Target target{{0, 1, 0, 1}, out_h, out_w, {}};
  std::vector<int> source_of(g.stride_h * g.stride_w, -1);
  for (int64_t ky = 0; ky < g.kernel_h; ky++)
    for (int64_t kx = 0; kx < g.kernel_w; kx++) {
      const Phase y = phase_of(ky, g.dilation_h, g.stride_h),
                  x = phase_of(kx, g.dilation_w, g.stride_w);
      int& source = source_of[y.phase * g.stride_w + x.phase];
      if (source < 0) {
        source = static_cast<int>(plan.sources.size());
        plan.sources.push_back(
            {y.phase - g.padding_h, g.stride_h, x.phase - g.padding_w, g.stride_w});
      }
      target.taps.push_back({source, y.shift, x.shift, ky * g.kernel_w + kx});
    }
  plan.targets.push_back(target);
  plan.layout();
  return plan;
}

// Each phase of the input's gradient from the output's gradient: the same taps with opposite
// shifts.
inline Plan input_grad_plan(const Geometry& g, int64_t in_h, int64_t in_w, int64_t out_h,
                            int64_t out_w) {
  Plan plan;
  plan.source_height = out_h;
  plan.source_width = out_w;
  plan.sources.push_back({0, 1, 0, 1});
  for (int64_t py = 0; py < g.stride_h; py++)
    for (int64_t px = 0; px < g.stride_w; px++) {
      // The phase's first row and column that lie in the unpadded input.
      const int64_t y0 = py < g.padding_h ? ceil_div(g.padding_h - py, g.stride_h) : 0;
      const int64_t x0 = px < g.padding_w ? ceil_div(g.padding_w - px, g.stride_w) : 0;
      const int64_t row = y0 * g.stride_h + py - g.padding_h,
                    col = x0 * g.stride_w + px - g.padding_w;
      if (row >= in_h || col >= in_w) continue;
      Target target{{row, g.stride_h, col, g.stride_w},
                    ceil_div(in_h - row, g.stride_h),
                    ceil_div(in_w - col, g.stride_w),
                    {}};
      for (int64_t ky = 0; ky < g.kernel_h; ky++)
        for (int64_t kx = 0; kx < g.kernel_w; kx++) {
          const Phase y = phase_of(ky, g.dilation_h, g.stride_h),
                      x = phase_of(kx, g.dilation_w, g.stride_w);
          if (y.phase == py && x.phase == px)
            target.taps.push_back({0, y0 - y.shift, x0 - x.shift, ky * g.kernel_w + kx});
        }
      plan.targets.push_back(target);
    }
  plan.layout();
  return plan;
}

// Consecutive output rows of one image, or several whole images.
struct Strip {
  int64_t image, images, row, rows;
};

inline std::vector<Strip> strips(int64_t images, int64_t rows, int64_t rows_per_strip,
                                 int64_t images_per_strip) {
  std::vector<Strip> out;
  if (rows_per_strip >= rows) {
    for (int64_t n = 0; n < images; n += images_per_strip)
      out.push_back({n, std::min(images_per_strip, images - n), 0, rows});
  } else {
    for (int64_t n = 0; n < images; n++)
      for (int64_t y = 0; y < rows; y += rows_per_strip)
        out.push_back({n, 1, y, std::min(rows_per_strip, rows - y)});
  }
  return out;
}

}  // namespace gross::cpu
