// GELU and its derivative, vector by vector: x Phi(x), and Phi(x) + x phi(x).
#pragma once

#include <cmath>

#include "simd.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

template <typename T>
struct Gelu {
  Vec<T> value, slope;
};

#if defined(__AVX512F__)

// 1 - Phi(z) for z near n / 4, n = 0 .. 30, as a polynomial in 4 z - n; 0 for n = 31. Row m: coefficients of power m.
struct NormalTail {
  static constexpr int kPowers = 6;
  alignas(64) float row[kPowers][32];
};

// Taylor series about n / 4. Powers that are not kept are taken off as multiples of Chebyshev's polynomials on
// [-1/2, 1/2]. Inwards, each series gives the next one its value, so that each is exact for its size.
constexpr NormalTail normal_tail() {
  constexpr int kTerms = 24, kPowers = NormalTail::kPowers;
  double chebyshev[kTerms][kTerms] = {{1}, {0, 2}};  // T_m(2 d)
  for (int m = 2; m < kTerms; ++m)
    for (int i = 0; i <= m; ++i) chebyshev[m][i] = (i ? 4 * chebyshev[m - 1][i - 1] : 0) - chebyshev[m - 2][i];
  NormalTail table{};
  double tail = 3.1908916729108841e-14;  // 1 - Phi(7.5)
  for (int n = 30; n >= 0; --n) {
    const double z = 0.25 * n;
    double density = 0.39894228040143268;                            // of the normal distribution at z
    for (int i = 0; i < n * n; ++i) density *= 0.96923323447634413;  // exp(-1 / 32)
    double c[kTerms] = {tail, -density / 4};
    for (int m = 2; m < kTerms; ++m) c[m] = -z * c[m - 1] / (4 * m) - (m - 2) * c[m - 2] / (16 * m * (m - 1));
    tail = 0;
    for (int m = kTerms - 1; m >= 0; --m) tail = c[m] - tail;  // at z - 1/4
    for (int m = kTerms - 1; m >= kPowers; --m) {
      const double share = c[m] / chebyshev[m][m];
      for (int i = 0; i <= m; ++i) c[i] -= share * chebyshev[m][i];
    }
    for (int m = 0; m < kPowers; ++m) table.row[m][n] = static_cast<float>(c[m]);
  }
  return table;
}

inline constexpr NormalTail kNormalTail = normal_tail();

// The value within 1e-7 |x|, the slope within 2e-7; for x above -4, the value within 5e-7 of its size.
inline Gelu<float> gelu(Vec<float> x) {
  const Vec<float> size = (Vec<float>)_mm512_abs_ps((__m512)x);
  const Vec<float> quarters = 4.0f * (Vec<float>)_mm512_min_ps((__m512)size, _mm512_set1_ps(7.75f));  // 7.75 for NaN
  const Vec<float> shifted = quarters + 12582912.0f;  // 1.5 * 2^23: rounds, and leaves the integer in the low bits
  const Vec<float> d = quarters - (shifted - 12582912.0f);
  const auto coefficient = [&shifted](int power) {
    const float* row = kNormalTail.row[power];
    return (Vec<float>)_mm512_permutex2var_ps(_mm512_load_ps(row), (__m512i)shifted, _mm512_load_ps(row + 16));
  };
  Vec<float> tail = coefficient(NormalTail::kPowers - 1), slope = tail;  // and its derivative by d
#pragma GCC unroll 8
  for (int power = NormalTail::kPowers - 2; power > 0; --power) {
    tail = tail * d + coefficient(power);
    slope = slope * d + tail;
  }
  tail = tail * d + coefficient(0);
  const Vec<float> phi = x < 0.0f ? tail : 1.0f - tail;
  return {x * phi, phi - x * (4.0f * slope)};
}

#else

// 1 - Phi(|x|) = exp(-x^2 / 2) t Q(t), t = 1 / (1 + 0.24 |x|), with a relative error of 2.4e-7 up to |x| = 14; beyond,
// the exponential is 0.
inline Gelu<float> gelu(Vec<float> x) {
  const Vec<float> size = x < 0.0f ? -x : x;
  const Vec<float> t = 1.0f / (1.0f + 0.24f * (size < 14.0f ? size : splat(14.0f)));
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

#endif

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
