// Involution on the CPU (Li et al. 2021): a K x K kernel of its own for every place and group of channels.
//
// A unit of work is a band of rows of one (image, group) pair. Units are independent: the caller may split
// [0, involution_units) as it likes and the result does not depend on the split.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "../common/inline.h"

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

// Bands that the rows of one pair are cut into, so that what one band needs of x stays in the second cache.
FASTIB_INLINE int64_t involution_bands(const InvolutionParams& p) {
  const int64_t halo = (p.K - 1) * p.dilation, row_bytes = 4 * (p.C / p.G) * (p.Wi + halo);
  const int64_t wanted = 160 * 1024 / row_bytes - halo, least = halo > 4 ? halo : 4;
  const int64_t rows = (wanted > least ? wanted : least) / p.stride + 1;
  return (p.Ho + rows - 1) / rows;
}

FASTIB_INLINE int64_t involution_units(const InvolutionParams& p) { return p.B * p.G * involution_bands(p); }

void involution_forward(const InvolutionParams& params, int64_t begin, int64_t end);
void involution_backward(const InvolutionGradParams& params, int64_t begin, int64_t end);

}  // namespace fastib
