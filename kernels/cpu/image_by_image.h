// Both products of generalized convolution, one image after the other.
#pragma once

#include <new>

#include "generalized_conv_product.h"
#include "pack.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Product is one of a layout's: bytes(params) of `scratch` that its constructor takes, and image(x, out).
template <typename Product>
void image_by_image(const GeneralizedConvBothParams& p, Scratch& scratch, int64_t begin, int64_t end) {
  const int64_t pixels = p.values.rows * p.values.columns, between = pixels * p.values.N;
  if (!scratch.reserve(Product::bytes(p.values) + Product::bytes(p.result) + Scratch::padded_bytes<float>(between)))
    throw std::bad_alloc();
  Product values(p.values), result(p.result);
  float* own = p.values.out ? nullptr : scratch.take<float>(between);
  for (int64_t b = begin; b < end; ++b) {
    float* shifted = own ? own : p.values.out + b * between;
    values.image(p.values.x + b * pixels * p.values.K, shifted);
    result.image(shifted, p.result.out + b * pixels * p.result.N);
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
