// Arguments of the kernels of involution, on every device (Li et al. 2021).
#pragma once

#include <cstdint>

#include "dtype.h"

namespace fastib {

// Strides are in elements. x and out are (batch, channel, row, column), weights (batch, group, u, v, row, column).
// channels_last says which dimension of each is dense: the channels of x and out and the taps (u, v) of the weights
// together; else the columns of all.
struct InvolutionParams {
  DType dtype;
  bool channels_last;
  int64_t B, C, G, K;      // C a multiple of G, K odd
  int64_t Hi, Wi, Ho, Wo;  // Ho == (Hi - 1) / stride + 1
  int64_t stride, dilation;
  const void* x;       // (B, C, Hi, Wi), zero outside
  const void* weight;  // (B, G, K, K, Ho, Wo)
  void* out;           // (B, C, Ho, Wo); not used by the backward
  int64_t x_stride[4], weight_stride[6], out_stride[4];
};

struct InvolutionGradParams {
  InvolutionParams forward;
  const void* grad_out;  // (B, C, Ho, Wo), dense as out
  void* grad_x;          // (B, C, Hi, Wi), dense as x
  void* grad_weight;     // (B, G, K, K, Ho, Wo), dense as weight
  int64_t grad_out_stride[4], grad_x_stride[4], grad_weight_stride[6];
};

}  // namespace fastib
