// GELU and its derivative, vector by vector: x Phi(x), and Phi(x) + x phi(x).
#pragma once

#include <cmath>

#include "simd.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

template <typename T>
struct Gelu {
  Vec<T> value, slope;
};

inline Vec<float> reciprocal(Vec<float> x) {
#if defined(__AVX512F__)
  const Vec<float> r = (Vec<float>)_mm512_rcp14_ps((__m512)x);
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

// 1 - Phi(|x|) = exp(-x^2 / 2) t Q(t), t = 1 / (1 + 0.24 |x|), with a relative error of 2.4e-7 up to |x| = 14; beyond,
// the exponential is 0.
inline Gelu<float> gelu(Vec<float> x) {
  const Vec<float> size = x < 0.0f ? -x : x;
  const Vec<float> t = reciprocal(1.0f + 0.24f * (size < 14.0f ? size : splat(14.0f)));
  const Vec<float> bell = exp2_vec(x * x * -0.72134752044f);  // exp(-x^2 / 2)
  Vec<float> q = t * -0.0529124218f + 0.151744895f;
  q = q * t - 0.0625640848f;
  q = q * t + 0.114180995f;
  q = q * t + 0.0663738877f;
  q = q * t + 0.0916932052f;
  q = q * t + 0.0957471131f;
  q = q * t + 0.0957362916f;
  const Vec<float> tail = bell * t * q;
  const Vec<float> phi = x < 0.0f ? tail : 1.0f - tail;
  return {x * phi, phi + x * bell * 0.39894228040f};
}

inline Gelu<double> gelu(Vec<double> x) {
  Gelu<double> y;
  for (int l = 0; l < kLanes<double>; ++l) {
    const double phi = 0.5 * std::erfc(-x[l] * 0.70710678118654752);
    y.value[l] = x[l] * phi;
    y.slope[l] = phi + x[l] * 0.39894228040143268 * std::exp(-0.5 * x[l] * x[l]);
  }
  return y;
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
