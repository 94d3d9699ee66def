// Attention over N tokens and T extra ones, whose outputs are averaged into row 0, on the CPU (DHVT, Sec. 3.3).
//
// A unit of work is one (batch, head) pair. Units are independent: the caller may split [0, B * H) as it likes and the
// result does not depend on the split.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace fastib {

// (B, H, N or T, D); strides in elements, in the order (batch, head, token); the last dimension is dense.
struct HeadTokenTensor {
  void* p;
  int64_t stride[3];
};

// q, k and v of the tokens, then those of the extra tokens.
struct HeadTokenInputs {
  HeadTokenTensor q, k, v, q_extra, k_extra, v_extra;
};

struct HeadTokenAttentionParams {
  DType dtype;
  int64_t B, H, N, T, D;
  HeadTokenInputs inputs;  // read only
  double scale;
  double attn_dropout;  // probability, [0, 1]
  uint64_t seed;        // read only where it is above 0
  HeadTokenTensor out;  // (B, H, N, D); read by the backward
  void* stats;          // (B, H, 2, N + T) dense, see attention_core.h; float32, float64 where dtype is float64
};

struct HeadTokenAttentionGradParams {
  HeadTokenAttentionParams forward;
  HeadTokenTensor grad_out;  // (B, H, N, D)
  HeadTokenInputs grads;
};

void head_token_attention_forward(const HeadTokenAttentionParams& params, int64_t begin, int64_t end);
void head_token_attention_backward(const HeadTokenAttentionGradParams& params, int64_t begin, int64_t end);

}  // namespace fastib
