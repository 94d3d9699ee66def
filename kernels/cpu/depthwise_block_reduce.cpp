// The steps of the depth-wise block that cross images. Built once: not worth an instruction set of their own.
#include <vector>

#include "depthwise_block.h"

namespace fastib {
namespace {

template <typename T>
void merge(const DepthwiseBlockParams& p, double* mean, double* variance) {
  const T* partial = static_cast<const T*>(p.partial);
  const double places = static_cast<double>(p.grid_h * p.grid_w);
  for (int64_t c = 0; c < p.C; ++c) mean[c] = variance[c] = 0.0;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t c = 0; c < p.C; ++c) mean[c] += partial[2 * b * p.C + c];
  for (int64_t c = 0; c < p.C; ++c) mean[c] /= static_cast<double>(p.B);
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t c = 0; c < p.C; ++c) {
      const double off = partial[2 * b * p.C + c] - mean[c];
      variance[c] += partial[(2 * b + 1) * p.C + c] + places * off * off;
    }
  for (int64_t c = 0; c < p.C; ++c) variance[c] /= places * static_cast<double>(p.B);
}

template <typename T>
void sum(const DepthwiseBlockGradParams& g, int64_t first, int64_t rows, double* sums) {
  const int64_t C = g.forward.C, groups = (g.forward.B + kUnitGroup - 1) / kUnitGroup;
  for (int64_t i = 0; i < rows * C; ++i) sums[i] = 0.0;
  for (int64_t group = 0; group < groups; ++group) {
    const T* partial = static_cast<const T*>(g.partial) + (group * 11 + first) * C;
    for (int64_t i = 0; i < rows * C; ++i) sums[i] += partial[i];
  }
}

}  // namespace

void depthwise_block_merge(const DepthwiseBlockParams& p, double* mean, double* variance) {
  p.dtype == DType::float64 ? merge<double>(p, mean, variance) : merge<float>(p, mean, variance);
}

void depthwise_block_sum(const DepthwiseBlockGradParams& g, int64_t first, int64_t rows, double* sums) {
  g.forward.dtype == DType::float64 ? sum<double>(g, first, rows, sums) : sum<float>(g, first, rows, sums);
}

}  // namespace fastib
