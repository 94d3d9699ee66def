// Operands of the register tile, packed from strided rows: left ones as rows, right ones as rows or as columns.
// bfloat16 stays bfloat16 where the processor multiplies it, in pairs along the summed dimension; everything else is
// widened to the compute type first.
#pragma once

#include <type_traits>

#include "gemm_tile.h"
#include "pack.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// The element U in which operands of the stored type E are packed.
#if defined(__AVX512BF16__)
template <typename E>
using Operand = std::conditional_t<std::is_same_v<E, bfloat16>, BFloat16Pair, Compute<E>>;
#else
template <typename E>
using Operand = Compute<E>;
#endif

// Elements U that n elements of the summed dimension take.
template <typename U>
inline int64_t summed(int64_t n) {
  return (n + kSteps<U> - 1) / kSteps<U>;
}

// from (n, D), summed over D -> dst (n, width).
template <template <typename> class R, typename E, typename T>
inline void pack_left(T* dst, int64_t width, R<const E> from, int64_t n, int64_t D) {
  pack_rows(dst, width, from, n, D);
}

// from (n, D), summed over n -> dst (summed(n), width).
template <template <typename> class R, typename E, typename T>
inline void pack_right(T* dst, int64_t width, R<const E> from, int64_t n, int64_t D) {
  pack_rows(dst, width, from, n, D);
}

#if defined(__AVX512BF16__)

// Elements [0, n) of p, zeros behind.
inline __m512i load_words(const bfloat16* p, int64_t n) {
  if (n >= 32) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi16(n > 0 ? (1u << n) - 1 : 0, p);
}

template <template <typename> class R>
inline void pack_left(BFloat16Pair* dst, int64_t width, R<const bfloat16> from, int64_t n, int64_t D) {
  for (int64_t i = 0; i < n; ++i, dst += width)
    for (int64_t d = 0; d < width; d += 16) _mm512_storeu_si512(dst + d, load_words(from.row(i) + 2 * d, D - 2 * d));
}

template <template <typename> class R>
inline void pack_right(BFloat16Pair* dst, int64_t width, R<const bfloat16> from, int64_t n, int64_t D) {
  const auto widened = [D](const bfloat16* row, int64_t d) {
    const int64_t rest = D - d;
    const __mmask16 mask = rest >= 16 ? 0xFFFF : (1u << rest) - 1;
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + d));
  };
  for (int64_t i = 0; i < n; i += 2, dst += width)
    for (int64_t d = 0; d < width; d += 16) {
      __m512i pair = widened(from.row(i), d);
      if (i + 1 < n) pair = _mm512_or_si512(pair, _mm512_slli_epi32(widened(from.row(i + 1), d), 16));
      _mm512_storeu_si512(dst + d, pair);
    }
}

// from (n, D), summed over D -> dst (n / 16, summed(D), 16): each vector holds one pair of columns of 16 rows.
template <template <typename> class R>
inline void pack_columns(BFloat16Pair* dst, R<const bfloat16> from, int64_t n, int64_t D) {
  const int64_t depth = summed<BFloat16Pair>(D);
  for (int64_t j = 0; j < n; j += 16, dst += 16 * depth)
    for (int64_t d = 0; d < depth; d += 16) {
      Vec<float> square[16];
      for (int64_t l = 0; l < 16; ++l)
        square[l] = j + l < n ? (Vec<float>)load_words(from.row(j + l) + 2 * d, D - 2 * d) : Vec<float>{};
      transpose<float>(square);
#pragma GCC unroll 16
      for (int64_t l = 0; l < 16; ++l)
        if (d + l < depth) store(reinterpret_cast<float*>(dst + (d + l) * 16), square[l]);
    }
}

// The lanes of a, then those of b, in pairs.
inline Vec<BFloat16Pair> pair_along(Vec<float> a, Vec<float> b) {
  return (Vec<BFloat16Pair>)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}

// dst[j / 2] = (row[j], row[j + 1]) for n elements, whole vectors; dst may be row.
inline void pair_along(BFloat16Pair* dst, const float* row, int64_t n) {
  for (int64_t j = 0; j < n; j += 32)
    store(dst + j / 2, pair_along(load(row + j), j + 16 < n ? load(row + j + 16) : Vec<float>{}));
}

// dst[j] = (row[j], below[j]) for n elements, whole vectors; dst may be row. Without a row below: zeros.
inline void pair_across(BFloat16Pair* dst, const float* row, const float* below, int64_t n) {
  Vec<BFloat16Pair> order;
  for (int l = 0; l < 16; ++l) order[l] = l | (16 + l) << 16;
  for (int64_t j = 0; j < n; j += 16) {
    const __m512 second = below ? _mm512_loadu_ps(below + j) : __m512{};
    const __m512bh words = _mm512_cvtne2ps_pbh(second, _mm512_loadu_ps(row + j));
    _mm512_storeu_si512(dst + j, _mm512_permutexvar_epi16((__m512i)order, (__m512i)words));
  }
}

#endif

}  // namespace fastib::FASTIB_ISA_NAMESPACE
