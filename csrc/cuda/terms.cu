// What happens to terms alone: their sum, and one launch that lays them out as the kernels read
// them.
#include "elementwise.h"

namespace gross::cuda {

namespace {

struct Sum {
  Series series;
  void* result;
  GROSS_HOST_DEVICE void operator()(int64_t i) const {
    double sum = 0;
    for (int t = 0; t < series.active; t++)
      sum += gate_of(series, t) * load(series.terms[t], i, series.type);
    store(result, i, series.type, sum);
  }
};

struct Arrange {
  int64_t out_channels, strides[max_terms][4];
  Series from, to;
  // Element i of all terms one after another.
  GROSS_HOST_DEVICE void operator()(int64_t i) const {
    int t = 0;
    for (int64_t size; (size = out_channels * from.group_sizes[t] * 9) <= i; t++) i -= size;
    const int64_t s = from.group_sizes[t], o = i / 9 / s, c = i / 9 % s, ky = i % 9 / 3, kx = i % 3;
    const int64_t at =
        o * strides[t][0] + c * strides[t][1] + ky * strides[t][2] + kx * strides[t][3];
    store(const_cast<void*>(to.terms[t]), i, to.type, load(from.terms[t], at, from.type));
  }
};

}  // namespace

int series_sum(const Series& series, int64_t count, void* result, Stream stream) {
  return each(count, Sum{series, result}, stream);
}

int arrange(int64_t out_channels, const Series& from, const int64_t (*strides)[4], const Series& to,
            Stream stream) {
  Arrange body{out_channels, {}, from, to};
  int64_t count = 0;
  for (int t = 0; t < from.active; t++) {
    for (int d = 0; d < 4; d++) body.strides[t][d] = strides[t][d];
    count += out_channels * from.group_sizes[t] * 9;
  }
  return each(count, body, stream);
}

}  // namespace gross::cuda
