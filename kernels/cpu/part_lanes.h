// The first lanes of a vector of stored elements, in the compute type and back.
#pragma once

#include <type_traits>

#include "pack.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if defined(__AVX512BW__)
inline uint32_t first_lanes(int64_t n) { return n <= 0 ? 0 : (1u << n) - 1; }  // n below 32
#endif

// Lanes [0, n) of memory, zero beyond; nothing beyond is read.
template <typename E>
inline Vec<Compute<E>> load_part(const E* p, int64_t n) {
  constexpr int W = kLanes<Compute<E>>;
  if (n >= W) return load_row(p);
#if defined(__AVX512BW__)
  if constexpr (sizeof(E) == 4) return (Vec<Compute<E>>)_mm512_maskz_loadu_ps(first_lanes(n), p);
  if constexpr (sizeof(E) == 8) return (Vec<Compute<E>>)_mm512_maskz_loadu_pd(first_lanes(n), p);
  if constexpr (sizeof(E) == 2) {
    const __m256i part = _mm256_maskz_loadu_epi16(first_lanes(n), p);
    return load_row(reinterpret_cast<const E*>(&part));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(E) == 4) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return (Vec<E>)_mm256_maskload_ps((const float*)p,
                                      _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lanes));
  }
#endif
  E part[W] = {};
  if (n > 0) std::memcpy(part, p, n * sizeof(E));
  return load_row(part);
}

template <typename E>
inline void store_part(E* p, Vec<Compute<E>> x, int64_t n) {
  constexpr int W = kLanes<Compute<E>>;
  if (n >= W) return store_row(p, x);
#if defined(__AVX512BW__)
  if constexpr (sizeof(E) == 4) return _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x);
  if constexpr (sizeof(E) == 8) return _mm512_mask_storeu_pd(p, first_lanes(n), (__m512d)x);
#endif
  E part[W];
  store_row(part, x);
#if defined(__AVX512BW__)
  if constexpr (sizeof(E) == 2)
    return _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_loadu_si256((const __m256i*)part));
#endif
  for (int64_t l = 0; l < n; ++l) p[l] = part[l];
}

// Lanes [first, last) to p + first and on.
inline void store_lanes(float* p, Vec<float> x, int64_t first, int64_t last) {
#if defined(__AVX512BW__)
  _mm512_mask_storeu_ps(p, first_lanes(last) & ~first_lanes(first), (__m512)x);
#else
  for (int64_t l = first; l < last; ++l) p[l] = x[l];
#endif
}

// x as memory would give it back.
template <typename E>
inline Vec<Compute<E>> as_stored(Vec<Compute<E>> x) {
  if constexpr (std::is_same_v<E, Compute<E>>) return x;
  E stored[kLanes<Compute<E>>];
  store_row(stored, x);
  return load_row(stored);
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
