// One part of the gradient to generalized convolution's weight, summed block by block.
#pragma once

#include "generalized_conv_product.h"
#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

class PartSum {
 public:
  // add: to what is there.
  PartSum(const GeneralizedConvWeightParams& p, int64_t part, bool add)
      : weight_(p.weight_parts + part * p.N * p.K),
        bias_(p.bias_parts ? p.bias_parts + part * p.N : nullptr),
        K_(p.K),
        add_(add) {}

  // Vector v of row m.
  void weight(int64_t m, int64_t v, Vec<float> x) const {
    constexpr int W = kLanes<float>;
    put(weight_ + m * K_ + v * W, x, K_ - v * W);
  }

  // The first lanes of x belong to channel c and on.
  void bias(int64_t c, Vec<float> x, int64_t lanes) const { put(bias_ + c, x, lanes); }

 private:
  void put(float* to, Vec<float> x, int64_t lanes) const { store_part(to, add_ ? load_part(to, lanes) + x : x, lanes); }

  float *weight_, *bias_;
  int64_t K_;
  bool add_;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
