// The one step of the backward that crosses pairs. Built once: it is not worth an instruction set of its own.
#include "mhca_attention.h"

namespace fastib {
namespace {

template <typename T>
void reduce_position(const MhcaAttentionGradParams& params, T* grad_alpha, T* grad_center) {
  const int64_t B = params.forward.B, H = params.forward.H;
  for (int64_t h = 0; h < H; ++h) {
    double sum[3] = {0.0, 0.0, 0.0};
    for (int64_t b = 0; b < B; ++b) {
      for (int i = 0; i < 3; ++i) sum[i] += params.grad_position[(b * H + h) * 3 + i];
    }
    grad_alpha[h] = static_cast<T>(sum[0]);
    grad_center[2 * h] = static_cast<T>(sum[1]);
    grad_center[2 * h + 1] = static_cast<T>(sum[2]);
  }
}

}  // namespace

void mhca_attention_reduce_position(const MhcaAttentionGradParams& params, void* grad_alpha, void* grad_center) {
  if (params.forward.dtype == DType::float64) {
    reduce_position(params, static_cast<double*>(grad_alpha), static_cast<double*>(grad_center));
  } else {
    reduce_position(params, static_cast<float*>(grad_alpha), static_cast<float*>(grad_center));
  }
}

}  // namespace fastib
