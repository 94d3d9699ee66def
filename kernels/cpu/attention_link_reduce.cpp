// The one step of the attention links' backward that crosses units. Built once.
#include "attention_link.h"

namespace fastib {
namespace {

template <typename T>
void reduce(const AttentionLinkParams& p, T* grad_weight, T* grad_bias) {
  const int64_t links = p.C * p.M;
  for (int64_t i = 0; i < links; ++i) grad_weight[i] = 0;
  for (int64_t i = 0; i < p.C; ++i) grad_bias[i] = 0;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    const T* weight = static_cast<const T*>(p.weight_parts) + chunk * links;
    const T* bias = static_cast<const T*>(p.bias_parts) + chunk * p.C;
    for (int64_t i = 0; i < links; ++i) grad_weight[i] += weight[i];
    for (int64_t i = 0; i < p.C; ++i) grad_bias[i] += bias[i];
  }
  for (int64_t i = 0; p.mask && i < links; ++i)
    if (!p.mask[i]) grad_weight[i] = 0;
}

}  // namespace

void attention_link_reduce(const AttentionLinkParams& p, void* grad_weight, void* grad_bias) {
  if (p.dtype == DType::float64)
    reduce(p, static_cast<double*>(grad_weight), static_cast<double*>(grad_bias));
  else
    reduce(p, static_cast<float*>(grad_weight), static_cast<float*>(grad_bias));
}

}  // namespace fastib
