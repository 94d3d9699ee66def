// Vectors of the width this file is compiled for, written with the compiler's vector extension: one source serves SSE,
// AVX2, AVX-512 and NEON.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastib::FASTIB_ISA_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kVectorRegisters = 32;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kVectorRegisters = 16;
#endif

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int lanes = kVectorBytes / 4;
  typedef float vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t ivec __attribute__((vector_size(kVectorBytes)));
};

template <>
struct Simd<double> {
  static constexpr int lanes = kVectorBytes / 8;
  typedef double vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t ivec __attribute__((vector_size(kVectorBytes)));
};

// Two bfloat16 that are neighbours along the dimension a product sums over; the first in the low half.
struct BFloat16Pair {
  uint32_t bits;
};

template <>
struct Simd<BFloat16Pair> {
  static constexpr int lanes = kVectorBytes / 4;
  typedef uint32_t vec __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vec = typename Simd<T>::vec;

template <typename T>
inline constexpr int kLanes = Simd<T>::lanes;

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

template <typename T>
inline void store(T* p, Vec<T> x) {
  std::memcpy(p, &x, sizeof(x));
}

template <typename T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

inline Vec<BFloat16Pair> splat(BFloat16Pair x) { return x.bits - Vec<BFloat16Pair>{}; }

// Keeps a vector in a register: without it the compiler may load it anew for each of its uses.
template <typename V>
inline __attribute__((always_inline)) V in_register(V x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// One byte a lane, sign extended. The compiler's own conversion goes through general registers, element by element.
template <typename T>
inline typename Simd<T>::ivec widen_bytes(const int8_t* p) {
  using I = typename Simd<T>::ivec;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
  if constexpr (sizeof(T) == 8) return (I)_mm512_cvtepi8_epi64(_mm_loadl_epi64((const __m128i*)p));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  if constexpr (sizeof(T) == 8) return (I)_mm256_cvtepi8_epi64(_mm_loadu_si32(p));
#elif defined(__SSE4_1__)
  if constexpr (sizeof(T) == 4) return (I)_mm_cvtepi8_epi32(_mm_loadu_si32(p));
  if constexpr (sizeof(T) == 8) return (I)_mm_cvtepi8_epi64(_mm_loadu_si16(p));
#else
  I wide;
  for (int l = 0; l < kLanes<T>; ++l) wide[l] = p[l];
  return wide;
#endif
}

// Keeps the lanes whose byte is -1 and zeroes those whose byte is 0.
template <typename T>
inline Vec<T> keep_lanes(Vec<T> x, const int8_t* bytes) {
  return (Vec<T>)((typename Simd<T>::ivec)x & widen_bytes<T>(bytes));
}

template <typename T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T, typename Index, int... kLane>
inline Vec<T> shuffle_lanes(Vec<T> a, Vec<T> b, Index index, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index(kLane)...);
#else
  return __builtin_shuffle(a, b, typename Simd<T>::ivec{index(kLane)...});
#endif
}

// Lane l is lane index(l) of a followed by b; index is a lambda without captures.
template <typename T, typename Index>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, Index index) {
  return shuffle_lanes<T>(a, b, index, std::make_integer_sequence<int, kLanes<T>>{});
}

// Folds the upper half of the lanes onto the lower half until one is left.
template <typename T, typename Fold, int kHalf = kLanes<T> / 2>
inline __attribute__((always_inline)) T fold_lanes(Vec<T> x, const Fold& fold) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    return fold_lanes<T, Fold, kHalf / 2>(fold(x, shuffle<T>(x, x, [](int l) { return l ^ kHalf; })), fold);
  }
}

template <typename T>
inline T horizontal_sum(Vec<T> x) {
  return fold_lanes<T>(x, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// A sum in two parts that take turns, so that no addition waits for the one before it.
template <typename T>
class TurnedSum {
 public:
  void add(Vec<T> x) {
    const Vec<T> sum = first_ + x;
    first_ = second_, second_ = sum;
  }
  T total() const { return horizontal_sum<T>(first_ + second_); }

 private:
  Vec<T> first_{}, second_{};
};

template <typename T>
inline T horizontal_max(Vec<T> x) {
  return fold_lanes<T>(x, [](Vec<T> a, Vec<T> b) { return maximum<T>(a, b); });
}

inline constexpr long double kLog2e = 1.442695040888963407359924681L;  // log2(e)

// 2^x, relative error below 2.4e-7; NaN stays NaN. For x up to 127. 0 below the normal range, and with AVX-512 below
// 2^-100: no product of a probability that matters is subnormal, which some processors compute a hundred times slower.
inline Vec<float> exp2_vec(Vec<float> x) {
  const auto fraction_power = [](Vec<float> f) {  // 2^f, |f| <= 1/2
    Vec<float> p = f * 0.001327647217f + 0.009675541331f;
    p = p * f + 0.05550713273f;
    p = p * f + 0.2402211972f;
    p = p * f + 0.6931469671f;
    return p * f + 1.000000072f;
  };
#if defined(__AVX512DQ__)
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps((__m512)x, 0);  // x less its nearest integer, 0 for -infinity
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-100.0f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(counts, (__m512)fraction_power(f), (__m512)(x - f));
#else
  using I = Simd<float>::ivec;
  const Vec<float> lowest = splat(-127.0f);  // its power below is 0
  x = lowest > x ? lowest : x;
  const Vec<float> rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x + rounder;
  const Vec<float> power = (Vec<float>)(((I)shifted << 23) + 0x3f800000);
  return fraction_power(x - (shifted - rounder)) * power;
#endif
}

inline Vec<double> exp2_vec(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
