// The products of generalized convolution on the CPU, in float32 (Bootstrapping ViTs, Eq. 3-4). Three serve it both
// ways, forward / backward:
//
//   into    x -> values / grad -> grad_values: a pixel's channels times a weight, the result of each head going where
//           the head's shift puts it, so that no image is written only to be moved;
//   back    values -> out / grad_values -> grad_x;
//   weight  grad with values / x with grad_values, summed over the pixels: the weights' gradients.
//
// Outer images (x, out and their gradients) are dense, with their channels last, (B, pixels, N), or in planes,
// (B, N, pixels). The middle ones (values and their gradient) always have their channels last, (B, pixels, M), with
// kMiddleSlack more elements behind them, which may be read.
#pragma once

#include "generalized_conv.h"

namespace fastib {

inline constexpr int64_t kMiddleSlack = 16;  // a vector of any instruction set

struct GeneralizedConvSizes {
  int64_t B, rows, columns;
  int64_t M, H;        // channels of the middle image, and heads, which divide them
  bool channels_last;  // of the outer images

  int64_t pixels() const { return rows * columns; }
};

// Between an outer image's N channels and the middle one's: element (n, m) at p[n * outer + m * inner], one of the
// strides 1.
struct GeneralizedConvWeight {
  const float* p;
  int64_t N, outer, inner;
};

struct GeneralizedConvProductParams {
  GeneralizedConvSizes sizes;
  const float* from;
  GeneralizedConvWeight into;
  bool inverse;  // the shift
  float* middle;
  GeneralizedConvWeight back;
  const float* bias;  // (N,) of `back`, or null
  float* to;          // or null: not wanted
};

struct GeneralizedConvWeightParams {
  GeneralizedConvSizes sizes;
  int64_t N;
  bool inverse;  // the shift that filled the middle image
  const float *outer, *middle;
  bool wanted;
  float* weight_parts;  // (parts, N, M)
  float* bias_parts;    // (parts, N), sums of `outer`, or null
};

struct GeneralizedConvGradParams {
  GeneralizedConvProductParams products;
  GeneralizedConvWeightParams w_v, w_o;
  int64_t parts;
};

inline constexpr int64_t kBlockPixels = 240;  // together, at most: whole vectors, and whole tiles of most shapes

// All products of some images, one image after the other: what one writes, the next reads from a cache. Forward: of
// images [begin, end); where `middle` is null, values are not kept. Backward: of the images of parts [begin, end);
// neither the middle of `products` nor that of `w_v` is used. Parts are summed afterwards, and their number is the
// caller's: the result depends on it and on nothing else.
void generalized_conv_forward(const GeneralizedConvProductParams& params, int64_t begin, int64_t end);
void generalized_conv_backward(const GeneralizedConvGradParams& params, int64_t begin, int64_t end);

// The products one by one, for images too few to share out. Units of the first two are kUnitPixels pixels of an image,
// those of the third its parts, of blocks of pixels.
inline constexpr int64_t kUnitPixels = 48;
inline int64_t generalized_conv_pixel_units(const GeneralizedConvSizes& s) {
  return s.B * ((s.pixels() + kUnitPixels - 1) / kUnitPixels);
}
inline int64_t generalized_conv_blocks(const GeneralizedConvSizes& s) {
  return s.B * ((s.pixels() + kBlockPixels - 1) / kBlockPixels);
}
void generalized_conv_into(const GeneralizedConvProductParams& params, int64_t begin, int64_t end);
void generalized_conv_back(const GeneralizedConvProductParams& params, int64_t begin, int64_t end);
void generalized_conv_weight(const GeneralizedConvWeightParams& params, int64_t parts, int64_t begin, int64_t end);

// Rows [begin, end) of the sum over the parts; the weight's gradient at grad_weight[n * outer + m * inner].
void generalized_conv_reduce(const GeneralizedConvWeightParams& params, int64_t parts, float* grad_weight,
                             int64_t outer, int64_t inner, float* grad_bias, int64_t begin, int64_t end);

}  // namespace fastib
