// What all plans share: how much of the memory they read, the model's constants, and where plans
// that were made are kept, so that a later call of the same kind costs one look.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <mutex>
#include <unordered_map>

#include "problem.h"

namespace gross::cuda {

// Rows of the source that a launch reads, times images. `shares` divide the rows of all bundles,
// `height` each, evenly; rows [first, last] of a bundle need those of `needed(first, last)`, cut to
// the source's.
template <class Needed>
double rows_read(int images, int bundle_images, int bundles, int height, int64_t shares,
                 int source_height, const Needed& needed) {
  double rows = 0;
  const int64_t all = static_cast<int64_t>(bundles) * height;
  for (int64_t share = 0; share < shares; share++)
    for (int64_t at = all * share / shares, end = all * (share + 1) / shares; at < end;) {
      const int64_t bundle = at / height, next = std::min(end, (bundle + 1) * height);
      const Range wanted = needed(static_cast<int>(at - bundle * height),
                                  static_cast<int>(next - 1 - bundle * height));
      rows += std::max(0, smaller(wanted.end, source_height) - larger(wanted.begin, 0)) *
              smaller(bundle_images, images - static_cast<int>(bundle) * bundle_images);
      at = next;
    }
  return rows;
}

// The model, of an H200 and not measured: memory delivers 18.6 bytes a clock to each
// multiprocessor, shared memory moves 128, and what runs side by side overlaps in part.
constexpr double memory_bytes_a_clock = 18.6, shared_bytes_a_clock = 128;

inline double side_by_side(std::initializer_list<double> clocks) {
  double sum = 0;
  for (double each : clocks) sum += each * each * each * each;
  return std::sqrt(std::sqrt(sum));
}

// Everything that a plan may depend on.
using PlanKey = std::array<int64_t, 16 + most_active>;

inline PlanKey key_of(const Job& job) {
  const Geometry& g = job.geometry;
  PlanKey key{static_cast<int64_t>(job.operation),
              static_cast<int64_t>(job.type),
              static_cast<int64_t>(job.series.type),
              g.images,
              g.in_channels,
              g.out_channels,
              g.in_h,
              g.in_w,
              g.group_size,
              g.stride,
              job.device.capability,
              job.device.multiprocessors,
              job.device.shared_bytes,
              job.warpgroups,
              job.plan,
              job.series.active};
  for (int i = 0; i < smaller(job.series.active, most_active); i++)
    key[16 + i] = job.series.group_sizes[i];
  return key;
}

struct PlanKeyHash {
  size_t operator()(const PlanKey& key) const {
    uint64_t hash = 0;
    for (int64_t each : key) {
      hash = (hash ^ static_cast<uint64_t>(each)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

template <class Plan>
class Plans {
 public:
  // The job's plan, which `make(plan)` makes where it is not there; false where it cannot.
  template <class Make>
  bool get(Plan& plan, const Job& job, const Make& make) {
    const PlanKey key = key_of(job);
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(key);
    if (found != plans_.end()) {
      plan = found->second;
      return true;
    }
    host_counts.planned++;
    if (!make(plan)) return false;
    if (plans_.size() >= most) plans_.clear();
    plans_.emplace(key, plan);
    return true;
  }

 private:
  static constexpr size_t most = 4096;  // of some 600 bytes each: sizes that change with every call
  std::mutex mutex_;
  std::unordered_map<PlanKey, Plan, PlanKeyHash> plans_;
};

}  // namespace gross::cuda
