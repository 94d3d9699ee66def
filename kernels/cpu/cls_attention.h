// Attention of the class token alone on the CPU (AAL, Eq. 3).
//
// A unit of work is a group of heads of one image, [0, B * groups); units are independent and the result depends
// neither on their split nor on the groups.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace fastib {

// Strides are in elements; the last dimension is dense.
struct ClsAttentionParams {
  DType dtype;
  int64_t B, H, N, D;
  int64_t groups;     // of heads per image, at most H
  int64_t first_key;  // keys before it are left out of the softmax: their probability is 0
  int64_t prefix;     // keys that maps_only leaves out
  const void* q;      // (B, H, D)
  const void* k;      // (B, H, N, D)
  int64_t q_stride[2], k_stride[3];
  double scale;
  bool maps_only;
  void* probs;  // dense; maps_only: (B, H, N - prefix) in dtype; else (B, H, N) in float32 (float64 where dtype is)
};

struct ClsAttentionGradParams {
  ClsAttentionParams forward;
  int64_t columns;   // of grad: those of the last keys; the other keys have none
  const void* grad;  // (B, H, columns) dense, in the type of probs
  void* grad_q;      // (B, H, D)
  void* grad_k;      // (B, H, N, D)
  int64_t grad_q_stride[2], grad_k_stride[3];
};

void cls_attention_forward(const ClsAttentionParams& params, int64_t begin, int64_t end);
void cls_attention_backward(const ClsAttentionGradParams& params, int64_t begin, int64_t end);

}  // namespace fastib
