// Vectors of the width this file is compiled for, written with the compiler's vector extension: one source serves SSE,
// AVX2, AVX-512 and NEON.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
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

// Folds the upper half of the lanes onto the lower half until one is left.
template <typename T, typename Fold, int kHalf = kLanes<T> / 2>
inline __attribute__((always_inline)) T fold_lanes(Vec<T> x, const Fold& fold) {
  if constexpr (kHalf == 0) {
    return x[0];
  } else {
    typename Simd<T>::ivec other;
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<T>; ++l) other[l] = l ^ kHalf;
    return fold_lanes<T, Fold, kHalf / 2>(fold(x, __builtin_shuffle(x, other)), fold);
  }
}

template <typename T>
inline T horizontal_sum(Vec<T> x) {
  return fold_lanes<T>(x, [](Vec<T> a, Vec<T> b) { return a + b; });
}

template <typename T>
inline T horizontal_max(Vec<T> x) {
  return fold_lanes<T>(x, [](Vec<T> a, Vec<T> b) { return maximum<T>(a, b); });
}

// 2^x, relative error below 2e-7; 0 below the normal range; NaN stays NaN. For x up to 127.
inline Vec<float> exp2_vec(Vec<float> x) {
  using I = Simd<float>::ivec;
  const Vec<float> lowest = splat(-127.0f);  // its power below is 0
  x = lowest > x ? lowest : x;
  const Vec<float> rounder = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec<float> shifted = x + rounder;
  const Vec<float> f = x - (shifted - rounder);
  Vec<float> p = f * 0.001327647217f + 0.009675541331f;
  p = p * f + 0.05550713273f;
  p = p * f + 0.2402211972f;
  p = p * f + 0.6931469671f;
  p = p * f + 1.000000072f;
  const Vec<float> power = (Vec<float>)(((I)shifted << 23) + 0x3f800000);
  return p * power;
}

inline Vec<double> exp2_vec(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
