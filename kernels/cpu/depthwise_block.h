// The middle of DHVT's feed-forward on the CPU: s = GELU(norm1(x)), GELU(norm2(conv(s))) + s, in passes over x.
//
// norm(y) = (y + shift) inv gamma + beta per channel; conv is depth-wise, 3 x 3, without its bias. The statistics of a
// whole batch lie between the passes, so s and conv(s) are computed anew in each and never stored. A unit of work is
// one image (forward) or one group of images (backward), for one block of channels; units are independent and the
// result does not depend on their split.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace fastib {

// Arrays of C numbers in the compute type.
struct BlockNorm {
  const void *shift, *inv, *gamma, *beta;
};

struct DepthwiseBlockParams {
  DType dtype;
  int64_t B, C, grid_h, grid_w;
  const void* x;  // (B, P, C) dense, P = grid_h grid_w
  BlockNorm norm1, norm2;
  const void* weight;  // (9, C) in the compute type
  void* out;           // (B, P, C) dense
  void* partial;       // (B, 2, C): of each image the mean, and the sum of squares about it
};

// Gradients after norm2's affine map are d2, after norm1's d1; hats are normalised values.
struct DepthwiseBlockGradParams {
  DepthwiseBlockParams forward;
  const void* grad_out;               // (B, P, C) dense
  const void *mean_d2, *mean_d2_hat;  // (C), means over batch and places of d2 and d2 t_hat; zeros in evaluation
  const void *mean_d1, *mean_d1_hat;  // (C), of d1 and d1 x_hat
  void* grad_x;                       // (B, P, C) dense: d1 between the passes
  void* partial;                      // (groups, 11, C): sums of d and d hat, and nine of the convolution's weight
};

inline constexpr int64_t kUnitChannels = 64;
inline constexpr int64_t kUnitGroup = 8;  // images

enum class ForwardPass { x_statistics, conv_statistics, output };
enum class BackwardPass { norm2, norm1, x };

void depthwise_block_forward(const DepthwiseBlockParams& params, ForwardPass pass, int64_t begin, int64_t end);
void depthwise_block_backward(const DepthwiseBlockGradParams& params, BackwardPass pass, int64_t begin, int64_t end);

// The steps between the passes. partial: as above, in the compute type. mean, variance: (C), in double.
void depthwise_block_merge(const DepthwiseBlockParams& params, double* mean, double* variance);
// Sums over the groups of `rows` of the 11 rows, from row `first`: (rows, C) in double.
void depthwise_block_sum(const DepthwiseBlockGradParams& params, int64_t first, int64_t rows, double* sums);

}  // namespace fastib
