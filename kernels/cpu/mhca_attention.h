// Multi-head convolutional attention on the CPU (DearKD, Sec. 3.1).
//
// A unit of work is one (batch, head) pair; which pair a unit is, is the kernel's choice. Units are independent: the
// caller may split [0, B * H) as it likes and the result does not depend on the split.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace fastib {

// Strides are in elements, in the order (batch, head, token); the last dimension is dense.
struct MhcaAttentionParams {
  DType dtype;
  int64_t B, H, N, D;
  int64_t grid_h, grid_w, num_prefix_tokens;  // N == num_prefix_tokens + grid_h * grid_w
  const void* q;                              // (B, H, N, D)
  const void* k;                              // (B, H, N, D)
  const void* v;                              // (B, H, N, D)
  int64_t q_stride[3], k_stride[3], v_stride[3];
  const void* alpha;   // (H,) dense; float32, float64 where dtype is float64
  const void* center;  // (H, 2) dense, (row, column); same type as alpha
  double scale;
  double rpe_dropout;   // probability, [0, 1]
  double attn_dropout;  // probability, [0, 1]
  uint64_t seed;        // read only where a probability is above 0
  void* out;            // (B, H, N, D); read by the backward
  int64_t out_stride[3];
  void* stats;  // (B, H, 2, N) dense, see attention_core.h; same type as alpha; read by the backward
};

struct MhcaAttentionGradParams {
  MhcaAttentionParams forward;
  const void* grad_out;  // (B, H, N, D)
  int64_t grad_out_stride[3];
  void* grad_q;  // (B, H, N, D)
  void* grad_k;
  void* grad_v;
  int64_t grad_q_stride[3], grad_k_stride[3], grad_v_stride[3];
  double* grad_position;  // (B, H, 3) dense: this pair's share of the gradient to (alpha, center row, center column)
};

void mhca_attention_forward(const MhcaAttentionParams& params, int64_t begin, int64_t end);
void mhca_attention_backward(const MhcaAttentionGradParams& params, int64_t begin, int64_t end);

// Sums grad_position over the batch in a fixed order into (H,) and (H, 2), in alpha's type.
void mhca_attention_reduce_position(const MhcaAttentionGradParams& params, void* grad_alpha, void* grad_center);

}  // namespace fastib
