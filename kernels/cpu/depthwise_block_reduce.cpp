// The steps of the depth-wise block that cross images. Built once: not worth an instruction set of their own.
#include "depthwise_block.h"

namespace fastib {
namespace {

template <typename T>
void merge(const DepthwiseBlockParams& p, int64_t first, int64_t count, double* mean, double* variance) {
  const T* partial = static_cast<const T*>(p.partial);
  const double places = static_cast<double>(p.grid_h * p.grid_w);
  const int64_t end = first + count;
  const auto mean_of = [&](int64_t b, int64_t c) {
    const T* at = partial + 3 * b * p.C + c;
    return static_cast<double>(at[0]) + at[p.C];
  };
  for (int64_t c = first; c < end; ++c) mean[c] = variance[c] = 0.0;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t c = first; c < end; ++c) mean[c] += mean_of(b, c);
  for (int64_t c = first; c < end; ++c) mean[c] /= static_cast<double>(p.B);
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t c = first; c < end; ++c) {
      const double off = mean_of(b, c) - mean[c];
      variance[c] += partial[(3 * b + 2) * p.C + c] + places * off * off;
    }
  for (int64_t c = first; c < end; ++c) variance[c] /= places * static_cast<double>(p.B);
}

template <typename T>
void sum(const DepthwiseBlockGradParams& g, int64_t rows, int64_t first, int64_t count, double* sums) {
  const int64_t C = g.forward.C, groups = (g.forward.B + kUnitGroup - 1) / kUnitGroup;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = first; c < first + count; ++c) sums[row * C + c] = 0.0;
  for (int64_t group = 0; group < groups; ++group)
    for (int64_t row = 0; row < rows; ++row) {
      const T* partial = static_cast<const T*>(g.partial) + (group * 11 + row) * C;
      for (int64_t c = first; c < first + count; ++c) sums[row * C + c] += partial[c];
    }
}

}  // namespace

int64_t depthwise_block_resident_channels(const DepthwiseBlockParams& p, int maps, int64_t threads) {
  const int64_t stored = p.dtype == DType::float64   ? 8
                         : p.dtype == DType::float32 ? 4
                                                     : 2,
                summed = stored < 4 ? 4 : stored;
  const int64_t line = 64 / stored, bytes = p.B * p.grid_h * p.grid_w * line * summed * maps;
  if (bytes <= int64_t(2) << 20 && p.C >= 2 * line * threads) return 2 * line;
  return bytes <= int64_t(8) << 20 && p.C >= line * threads ? line : 0;
}

void depthwise_block_merge(const DepthwiseBlockParams& p, int64_t first, int64_t count, double* mean,
                           double* variance) {
  p.dtype == DType::float64 ? merge<double>(p, first, count, mean, variance)
                            : merge<float>(p, first, count, mean, variance);
}

void depthwise_block_sum(const DepthwiseBlockGradParams& g, int64_t rows, int64_t first, int64_t count, double* sums) {
  g.forward.dtype == DType::float64 ? sum<double>(g, rows, first, count, sums)
                                    : sum<float>(g, rows, first, count, sums);
}

}  // namespace fastib
