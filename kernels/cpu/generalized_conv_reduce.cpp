// The one step of the weights' gradients that crosses parts. Built once.
#include "generalized_conv_product.h"

namespace fastib {

void generalized_conv_reduce(const GeneralizedConvWeightParams& p, int64_t parts, float* grad_weight, int64_t outer,
                             int64_t inner, float* grad_bias, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 64;
  const int64_t N = p.N, M = p.sizes.M;
  for (int64_t n = begin; n < end; ++n) {
    for (int64_t first = 0; first < M; first += kRun) {
      const int64_t run = M - first < kRun ? M - first : kRun;
      float sum[kRun] = {};
      for (int64_t part = 0; part < parts; ++part) {
        const float* from = p.weight_parts + (part * N + n) * M + first;
        for (int64_t m = 0; m < run; ++m) sum[m] += from[m];
      }
      for (int64_t m = 0; m < run; ++m) grad_weight[n * outer + (first + m) * inner] = sum[m];
    }
    if (grad_bias) {
      grad_bias[n] = 0;
      for (int64_t part = 0; part < parts; ++part) grad_bias[n] += p.bias_parts[part * N + n];
    }
  }
}

}  // namespace fastib
