// The one step of the weight's gradient that crosses parts. Built once.
#include "generalized_conv_product.h"

namespace fastib {
namespace {

// out[i] = sum over the parts of parts[part * step + i], for i in [begin, end).
void sum_parts(float* out, const float* parts, int64_t count, int64_t step, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) out[i] = parts[i];
  for (int64_t part = 1; part < count; ++part)
    for (int64_t i = begin; i < end; ++i) out[i] += parts[part * step + i];
}

}  // namespace

void generalized_conv_reduce(const GeneralizedConvWeightParams& p, float* grad_weight, float* grad_bias, int64_t begin,
                             int64_t end) {
  sum_parts(grad_weight, p.weight_parts, p.parts, p.N * p.K, begin * p.K, end * p.K);
  if (p.bias_parts) sum_parts(grad_bias, p.bias_parts, p.parts, p.N, begin, end);
}

}  // namespace fastib
