// The products of generalized convolution on the CPU, in float32: a pixel's channels times a weight, the result of each
// head going where the head's shift puts it, so that no image is written only to be moved. Images are dense, either
// with their channels last, (B, rows, columns, C), or in planes, (B, C, rows, columns).
//
// A unit of work of the product is a block of pixels; units are independent. One of the weight's gradient is a part of
// the pixels; parts are summed afterwards, and their number is the caller's: the result depends on it and on nothing
// else.
#pragma once

#include "generalized_conv.h"

namespace fastib {

struct GeneralizedConvProductParams {
  int64_t B, rows, columns;
  int64_t K, N;  // channels of x and of out
  int64_t H;     // heads of out, N a multiple; with one nothing is shifted
  bool inverse;
  bool transposed;        // the weight is (K, N), not (N, K)
  int64_t weight_stride;  // of its rows; its columns are dense
  const float *x, *weight;
  const float* bias;  // (N,) or null; only without a shift
  float* out;
};

struct GeneralizedConvWeightParams {
  int64_t B, pixels;  // of an image
  int64_t K, N, parts;
  const float* grad;    // B images of N channels
  const float* x;       // B images of K channels
  float* weight_parts;  // (parts, N, K)
  float* bias_parts;    // (parts, N), or null
};

inline constexpr int64_t kUnitPixels = 48;    // whole register tiles in every instruction set
inline constexpr int64_t kBlockPixels = 240;  // at most so many are worked on together

// Pixels of an image are cut into blocks of nearly one size.
struct PixelBlocks {
  int64_t pixels, count;
  explicit PixelBlocks(int64_t pixels) : pixels(pixels), count((pixels + kBlockPixels - 1) / kBlockPixels) {}
  int64_t first(int64_t block) const { return block * pixels / count; }
};

// Channels last: units of kUnitPixels, all images in a row.
inline int64_t generalized_conv_pixel_units(const GeneralizedConvProductParams& p) {
  return (p.B * p.rows * p.columns + kUnitPixels - 1) / kUnitPixels;
}
void generalized_conv_pixels(const GeneralizedConvProductParams& params, int64_t begin, int64_t end);

// Planes: units of one block of one image.
inline int64_t generalized_conv_plane_units(const GeneralizedConvProductParams& p) {
  return p.B * PixelBlocks(p.rows * p.columns).count;
}
void generalized_conv_planes(const GeneralizedConvProductParams& params, int64_t begin, int64_t end);

// Both products of images [begin, end), one image after the other: `result` reads what `values` has just written, and
// its x is not used. Where the out of `values` is null they are not kept.
struct GeneralizedConvBothParams {
  GeneralizedConvProductParams values, result;
};
void generalized_conv_both_pixels(const GeneralizedConvBothParams& params, int64_t begin, int64_t end);
void generalized_conv_both_planes(const GeneralizedConvBothParams& params, int64_t begin, int64_t end);

// Parts [begin, end) of the weight's gradient.
void generalized_conv_grad_weight_pixels(const GeneralizedConvWeightParams& params, int64_t begin, int64_t end);
void generalized_conv_grad_weight_planes(const GeneralizedConvWeightParams& params, int64_t begin, int64_t end);

// Rows [begin, end) of the sum over the parts.
void generalized_conv_reduce(const GeneralizedConvWeightParams& params, float* grad_weight, float* grad_bias,
                             int64_t begin, int64_t end);

}  // namespace fastib
