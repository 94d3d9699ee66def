// Loss of linearly combined attention maps against teacher maps on the CPU (AAL, Eq. 4-5).
//
// A unit of work is a run of images, [0, chunks); what a unit adds up over its images it writes to a place of its own,
// so the result does not depend on how the units are split between threads.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace fastib {

// Strides are in elements; the last dimension is dense. "sum type": float32, float64 where dtype is float64.
struct AttentionLinkParams {
  DType dtype;
  int64_t B, M, C, S;
  int64_t chunks;      // at most B
  const void* attn;    // (B, M, S)
  const void* target;  // (B, C, S)
  int64_t attn_stride[2], target_stride[2];
  const void* weight;   // (C, M) dense, sum type
  const void* bias;     // (C,) dense, sum type
  const uint8_t* mask;  // (C, M) dense, links kept; null: all
  double eps;
  void* loss;  // (B, C) dense, sum type: sums over S

  bool gradients;      // of the sum of scale * loss
  const void* scale;   // (B, C) dense, sum type; null: all 1
  void* grad_attn;     // (B, M, S) dense
  void* weight_parts;  // (chunks, C, M) dense, sum type
  void* bias_parts;    // (chunks, C) dense, sum type
};

void attention_link(const AttentionLinkParams& params, int64_t begin, int64_t end);

// Adds the parts up in order into (C, M) and (C,).
void attention_link_reduce(const AttentionLinkParams& params, void* grad_weight, void* grad_bias);

}  // namespace fastib
