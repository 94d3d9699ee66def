// The products of a linear layer on the CPU, in float32.
#pragma once

#include <cstdint>

namespace fastib {

// The rows of a tensor (groups, group, n) whose last dimension is dense.
struct LinearRows {
  const float* p;
  int64_t group, outer, inner;  // rows in a group; from group to group; from row to row
};

// to[i, n] = bias[n] + sum of from[i, k] weight[k * step + n * lane] over k < K. One of the two strides is 1.
struct LinearParams {
  LinearRows from;
  int64_t K, N, step, lane;
  const float *weight, *bias;  // bias: (N,), or null
  float* to;                   // (rows, N)
};

// Rows [begin, end); any split gives the same bits.
void linear(const LinearParams& params, int64_t begin, int64_t end);

// to[m, n] = sum of left[i, m] right[i, n] over i < rows, and the sums of the left one's columns.
struct LinearWeightParams {
  LinearRows left, right;
  int64_t rows, M, N;
  float* to;        // (M, N)
  float* left_sum;  // (M,), or null
};

// Units [begin, end): of the wider of M and N, kLinearUnit columns each. Any split gives the same bits.
inline constexpr int64_t kLinearUnit = 64;
inline int64_t linear_weight_units(const LinearWeightParams& p) {
  return ((p.M > p.N ? p.M : p.N) + kLinearUnit - 1) / kLinearUnit;
}
void linear_weight(const LinearWeightParams& params, int64_t begin, int64_t end);

}  // namespace fastib
