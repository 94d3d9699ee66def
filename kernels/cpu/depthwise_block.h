// The middle of DHVT's feed-forward on the CPU: s = GELU(norm1(x)), GELU(norm2(conv(s))) + s, in passes over x.
//
// norm(y) = (y + shift) inv gamma + beta per channel; conv is depth-wise, 3 x 3, without its bias. The statistics of a
// whole batch lie between the passes, so each computes s and conv(s) anew and none is stored. A unit of work is one
// image (forward) or one group of images (backward), for one block of channels. Where the batch of a block of channels
// fits into the outer caches, a unit is such a block instead, all passes run over it, and x and the gradient are read
// and conv(s) is computed once. Units are independent; neither their kind nor their split changes the result.
#pragma once

#include <cstdint>
#include <functional>

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
  void* partial;       // (B, 3, C): of each image the mean in two parts, and the sum of squares about it
  int64_t unit_channels;
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

inline constexpr int64_t kUnitChannels = 64;  // at most
inline constexpr int64_t kUnitGroup = 8;      // images
inline constexpr int kForwardMaps = 2, kBackwardMaps = 4;

enum class ForwardPass { x_statistics, conv_statistics, output };
enum class BackwardPass { norm2, norm1, x };

void depthwise_block_forward(const DepthwiseBlockParams& params, ForwardPass pass, int64_t begin, int64_t end);
void depthwise_block_backward(const DepthwiseBlockGradParams& params, BackwardPass pass, int64_t begin, int64_t end);

// Resident units. After each pass but the last one `after` merges its channels [first, first + count).
using AfterForward = std::function<void(ForwardPass, int64_t first, int64_t count)>;
using AfterBackward = std::function<void(BackwardPass, int64_t first, int64_t count)>;
void depthwise_block_forward_resident(const DepthwiseBlockParams& params, const AfterForward& after, int64_t begin,
                                      int64_t end);
void depthwise_block_backward_resident(const DepthwiseBlockGradParams& params, const AfterBackward& after,
                                       int64_t begin, int64_t end);

// Channels of a resident unit with so many maps, two cache lines of them or one; 0 where they fill no cache but memory,
// or not every thread would have a unit.
int64_t depthwise_block_resident_channels(const DepthwiseBlockParams& params, int maps, int64_t threads);

// The steps between the passes, for channels [first, first + count) of arrays of C. partial: as above, in the compute
// type. mean, variance: (C), in double.
void depthwise_block_merge(const DepthwiseBlockParams& params, int64_t first, int64_t count, double* mean,
                           double* variance);
// Sums over the groups of the first `rows` of the 11 rows: (rows, C) in double.
void depthwise_block_sum(const DepthwiseBlockGradParams& params, int64_t rows, int64_t first, int64_t count,
                         double* sums);

}  // namespace fastib
