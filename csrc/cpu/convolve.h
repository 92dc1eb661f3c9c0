// The convolution and its input gradient from planes.
#pragma once

#include "correlate.h"
#include "pairs.h"
#include "weights.h"

namespace gross::cpu::GROSS_ISA {

template <class T, class S, Product product = Product::numbers>
class PlaneConvolution {
 public:
  PlaneConvolution(const Plan& plan, const Convolution& call, const Prepared<T>* prepared)
      : plan_(plan),
        call_(call),
        prepared_(prepared),
        direction_(call.geometry, call.pass),
        channels_(call.geometry, call.pass, product),
        sets_(sets_of(channels_, set_vectors, 1)),
        strips_(plan_strips(plan, call.geometry.images,
                            source_vectors(channels_, sets_) * GROSS_VECTOR_BYTES,
                            ceil_div(4 * call.threads.count, sets_.size()))) {
    // More sets than the budgets ask for where strips are few.
    sets_ =
        sets_of(channels_, set_vectors,
                std::max<int64_t>(sets_.size(), ceil_div(4 * call.threads.count, strips_.size())));
    weight_size_ = prepared ? 0 : largest(sets_) * channels_.packed;
    for (const Strip& strip : strips_)
      plane_size_ = std::max(
          plane_size_, source_vectors(channels_, sets_) * Planes::of<T>(plan, strip).vector_stride);
    const Image &source = call.source, &target = call.target;
    alike_ = source.stride_c == 1 && source.stride_w == target.stride_w &&
             source.stride_h == target.stride_h && source.stride_n == target.stride_n;
  }

  // A unit of work is a set of channels times a strip.
  void run() const {
    const int64_t strip_count = strips_.size();
    auto work = [&](int64_t begin, int64_t end) {
      const Memory memory(*this);
      std::vector<Segment> segments;
      int64_t assembled = -1;
      for (int64_t unit = begin; unit < end; unit++) {
        const Set& set = sets_[unit / strip_count];
        if (assembled != unit / strip_count && !prepared_) assemble(set, memory);
        assembled = unit / strip_count;
        const Planes planes = Planes::of<T>(plan_, strips_[unit % strip_count]);
        load(set, planes, memory.planes);
        for (const Target& target : plan_.targets) correlate(set, planes, target, memory, segments);
      }
    };
    gross::cpu::run(call_.threads, sets_.size() * strip_count, work);
  }

 private:
  static constexpr bool pairs = product == Product::pairs;

  // One thread's memory.
  struct Memory {
    T *planes, *spare, *weights, *sums;

    explicit Memory(const PlaneConvolution& of) {
      constexpr int64_t spare_size = max_segments * max_columns * lanes<T>;
      const int64_t summed = of.channels_.summed;
      planes = scratch<T>(of.plane_size_ + spare_size + of.weight_size_ +
                          (pairs ? 2 * (summed + of.channels_.packed) : summed));
      spare = planes + of.plane_size_;
      weights = spare + spare_size;
      sums = weights + of.weight_size_;
    }
  };

  // The weights of a set.
  void assemble(const Set& set, const Memory& memory) const {
    const SummedWeights of{call_.series, call_.geometry, direction_};
    for (int64_t b = set.first; b < set.last; b++) {
      T* const to = memory.weights + (b - set.first) * channels_.packed;
      if constexpr (pairs)
        pack_pairs(of, channels_.blocks[b], memory.sums, memory.sums + 2 * channels_.summed, to);
      else
        pack_weights<T, S>(of, channels_.blocks[b], memory.sums, to);
    }
  }

  // The planes of a set's source channels.
  void load(const Set& set, const Planes& planes, T* to) const {
    if constexpr (pairs)
      load_sources<T, T>(in_pairs(call_.source), planes, channels_, set, to);
    else
      load_sources<T, S>(call_.source, planes, channels_, set, to);
  }

  // One target of a set's outputs.
  void correlate(const Set& set, const Planes& planes, const Target& target, const Memory& memory,
                 std::vector<Segment>& segments) const {
    const Image &source = call_.source, &image = call_.target;
    const Strip& strip = planes.strip;
    const Runs runs = runs_of<T>(target, planes);
    const Tile<T> tile = tile_for<T, product>(channels_.fetch, target.cols);
    segments_of<T>(image, plan_, target, strip, tile.columns, segments);
    const T* const weights =
        prepared_ ? prepared_->weights + set.first * channels_.packed : memory.weights;
    Epilogue<T> all = prepared_ ? prepared_->epilogue : Epilogue<T>{};
    const bool displaced = displaces<T, S>(all, image);
    std::vector<Segment> residual_segments;
    if (all.residual)
      segments_of<T>(*all.residual, plan_, target, strip, tile.columns, residual_segments);
    for (int64_t b = set.first; b < set.last; b++) {
      const Epilogue<T> epilogue = all.from(b);
      const Stencil<T> stencil{memory.planes +
                                   channels_.plane_of(b, set.first) * planes.vector_stride +
                                   channels_.first_lane(b),
                               planes.vector_stride,
                               channels_.sources,
                               runs,
                               weights + (b - set.first) * channels_.packed,
                               call_.geometry.taps() * lanes<T>,
                               channels_.permutation_of(b)};
      const LaneBlock& block = channels_.blocks[b];
      S* const to = static_cast<S*>(image.data) + strip.image * image.stride_n +
                    block.first(channels_) * image.stride_c;
      const int64_t col_stride = target.lattice.col_step * image.stride_w;
      if constexpr (std::is_same_v<S, T>)
        if (image.stride_c == 1 && block.lanes() == lanes<T> && displaced) {
          // The source's pixels one strip further, where they lie as the target's do.
          const T* ahead = alike_ ? static_cast<const T*>(source.data) +
                                        (to - static_cast<T*>(image.data)) +
                                        (strip.images > 1 ? strip.images * source.stride_n
                                                          : (strip.rows + 1) * source.stride_h)
                                  : nullptr;
          correlate_tiles(stencil, tile, segments,
                          {to, col_stride, ahead, epilogue.is_empty() ? nullptr : &epilogue});
          continue;
        }
      Finishing<T, S> finishing;
      if (!epilogue.is_empty()) finishing.epilogue = &epilogue;
      if (all.residual) {
        const Image& residual = *all.residual;
        finishing.residual = {
            static_cast<const S*>(residual.data) + strip.image * residual.stride_n +
                block.first(channels_) * residual.stride_c,
            target.lattice.col_step * residual.stride_w, residual.stride_c, block.lanes()};
        finishing.segments = &residual_segments;
      }
      correlate_converted<T, S>(stencil, tile, segments,
                                {to, col_stride, image.stride_c, block.lanes()}, memory.spare,
                                finishing);
    }
  }

  const Plan& plan_;
  const Convolution& call_;
  const Prepared<T>* const prepared_;
  Direction direction_;
  Channels<T> channels_;
  std::vector<Set> sets_;
  std::vector<Strip> strips_;
  int64_t plane_size_ = 0, weight_size_ = 0;
  bool alike_;  // whether source and target have the same strides
};

template <class T, class S, Product product = Product::numbers>
void convolve(const Plan& plan, const Convolution& call, const Prepared<T>* prepared = nullptr) {
  PlaneConvolution<T, S, product>(plan, call, prepared).run();
}

}  // namespace gross::cpu::GROSS_ISA
