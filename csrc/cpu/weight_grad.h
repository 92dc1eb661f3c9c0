// The weight gradient from planes.
#pragma once

#include "correlate_weights.h"
#include "gradients.h"
#include "pairs.h"
#include "pointwise.h"

namespace gross::cpu::GROSS_ISA {

template <class T, class S, Product product = Product::numbers>
class PlaneWeightGradient {
 public:
  PlaneWeightGradient(const Plan& plan, const WeightGradient& call)
      : call_(call),
        plan_(plan),
        grad_plan_(plan),
        channels_(call.geometry, Pass::forward),
        read_(call.geometry, Pass::forward, product),
        sources_(vectors_of<T>(channels_.sources, channels_.sources)),
        sets_(sets_of(channels_, set_vectors, 1)),
        blocks_(largest(sets_)) {
    // The same grid, holding the gradient itself.
    grad_plan_.sources = {{0, 1, 0, 1}};
    grad_plan_.source_height = call.grad.height;
    grad_plan_.source_width = call.grad.width;
    grad_plan_.min_row = grad_plan_.max_row = grad_plan_.min_col = grad_plan_.max_col = 0;

    const int64_t set_count = sets_.size(), vectors = source_vectors(read_, sets_);
    strips_ = plan_strips(plan_, call.geometry.images, (vectors + blocks_) * GROSS_VECTOR_BYTES,
                          ceil_div(grad_tasks, set_count));
    slices_ = std::clamp<int64_t>(ceil_div(grad_tasks, set_count), 1, strips_.size());
    for (const Strip& strip : strips_) {
      const Planes planes = Planes::of<T>(plan_, strip);
      int64_t plane = planes.vector_stride, grad = Planes::of<T>(grad_plan_, strip).vector_stride;
      // In pairs the planes are needed once more, as rows of channels and of pairs.
      if (pairs) {
        plane = 2 * PairedStrip<T>::row_numbers(planes);
        grad += PairedStrip<T>::grad_numbers(planes);
      }
      plane_size_ = std::max(plane_size_, vectors * plane);
      grad_size_ = std::max(grad_size_, blocks_ * grad);
    }
  }

  void run() {
    const int64_t packed = channels_.packed, count = channels_.blocks.size();
    Buffer<T> partial(slices_ > 1 ? slices_ * count * packed : 0);
    GradientBlocks<T> output(channels_, {call_.series, call_.gradient, call_.geometry});
    auto work = [&](int64_t begin, int64_t end) {
      const Memory memory(*this);
      for (int64_t unit = begin; unit < end; unit++) {
        const Set& set = sets_[unit / slices_];
        const int64_t slice = unit % slices_;
        if (slices_ > 1) {
          accumulate(set, slice, memory, partial.data() + (slice * count + set.first) * packed);
          continue;
        }
        accumulate(set, 0, memory, memory.sums);
        for (int64_t b = set.first; b < set.last; b++)
          output.write(b, memory.sums + (b - set.first) * packed, memory.rows);
      }
    };
    gross::cpu::run(call_.threads, static_cast<int64_t>(sets_.size()) * slices_, work);
    if (slices_ > 1) output.write_slices(partial.data(), slices_, call_.threads);
    output.write_gates();
  }

 private:
  static constexpr bool pairs = product == Product::pairs;

  // One thread's memory.
  struct Memory {
    T *planes, *grads, *sums, *rows;

    explicit Memory(const PlaneWeightGradient& of) {
      const int64_t sum_size = of.blocks_ * of.channels_.packed;
      planes = scratch<T>(of.plane_size_ + of.grad_size_ + sum_size + of.channels_.summed);
      grads = planes + of.plane_size_;
      sums = grads + of.grad_size_;
      rows = sums + sum_size;
    }
  };

  // D of the blocks of a set over the strips of one slice.
  void accumulate(const Set& set, int64_t slice, const Memory& memory, T* to) const {
    const int64_t count = strips_.size();
    std::fill_n(to, (set.last - set.first) * channels_.packed, T(0));
    for (int64_t i = count * slice / slices_; i < count * (slice + 1) / slices_; i++) {
      const Planes planes = Planes::of<T>(plan_, strips_[i]),
                   grads = Planes::of<T>(grad_plan_, strips_[i]);
      load_grads(set, grads, memory.grads);
      if constexpr (pairs) {
        load_sources<T, T>(in_pairs(call_.input), planes, read_, set, memory.planes);
        add_pairs(set, planes, grads, memory, to);
      } else {
        load_sources<T, S>(call_.input, planes, channels_, set, memory.planes);
        add_numbers(set, planes, grads, memory, to);
      }
    }
  }

  void load_grads(const Set& set, const Planes& grads, T* to) const {
    const LaneBlock &front = channels_.blocks[set.first], &back = channels_.blocks[set.last - 1];
    const int64_t first = front.first(channels_),
                  outputs = back.first(channels_) + back.lanes() - first;
    if (outputs == (set.last - set.first) * lanes<T>)
      return load_planes<T, S>(call_.grad, grads, first, outputs, to);
    for (int64_t b = set.first; b < set.last; b++)
      load_planes<T, S>(call_.grad, grads, channels_.blocks[b].first(channels_),
                        channels_.blocks[b].lanes(), to + (b - set.first) * grads.vector_stride);
  }

  void add_pairs(const Set& set, const Planes& planes, const Planes& grads, const Memory& memory,
                 T* to) const {
    const int64_t vectors = read_.clusters(set.first, set.last) * read_.vectors,
                  taps = call_.geometry.taps();
    const PairedStrip<T> strip(planes);
    auto* const rows = reinterpret_cast<uint16_t*>(memory.planes + vectors * planes.vector_stride);
    strip.separate(memory.planes, vectors, rows);
    for (int64_t b = set.first; b < set.last; b++)
      strip.add(memory.grads + (b - set.first) * grads.vector_stride,
                memory.grads + (set.last - set.first) * grads.vector_stride, rows,
                2 * (read_.plane_of(b, set.first) * lanes<T> + read_.first_lane(b)),
                channels_.sources, {to + (b - set.first) * channels_.packed, taps * lanes<T>});
  }

  void add_numbers(const Set& set, const Planes& planes, const Planes& grads, const Memory& memory,
                   T* to) const {
    const Strip& strip = planes.strip;
    const Runs runs = runs_of<T>(plan_.targets[0], planes);
    const Stretches stretches = Stretches::of<T>(plan_, strip);
    const bool pointwise = is_pointwise(call_.geometry);
    for (int64_t b = set.first, together; b < set.last; b += together) {
      const T* from = memory.planes + channels_.plane_of(b, set.first) * planes.vector_stride +
                      channels_.first_lane(b);
      const T* grads_of = memory.grads + (b - set.first) * grads.vector_stride;
      T* sums = to + (b - set.first) * channels_.packed;
      together = pointwise ? set.last - b : 1;
      if (pointwise)  // without padding rows lie side by side
        multiply_all_weights<T>({grads_of, grads.vector_stride, together},
                                {from, lanes<T>, planes.vector_stride, &sources_},
                                strip.images * strip.rows * plan_.cols, {sums, channels_.packed});
      else
        correlate_block<T>(channels_, b, call_.geometry.taps(), runs.all, stretches,
                           {grads_of, from, planes.vector_stride, sums});
    }
  }

  const WeightGradient& call_;
  const Plan& plan_;
  Plan grad_plan_;
  Channels<T> channels_, read_;  // one by one, and as they are read: in pairs, if so
  std::vector<LaneBlock> sources_;
  std::vector<Set> sets_;
  std::vector<Strip> strips_;
  int64_t blocks_, slices_, plane_size_ = 0, grad_size_ = 0;
};

template <class T, class S, Product product = Product::numbers>
void weight_grad(const Plan& plan, const WeightGradient& call) {
  PlaneWeightGradient<T, S, product>(plan, call).run();
}

}  // namespace gross::cpu::GROSS_ISA
