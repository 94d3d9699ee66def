// One vector of stored elements in the compute type and back, without a detour through single lanes.
#pragma once

#include <type_traits>

#include "pack.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Copies past the caches to memory that will not be read soon; end_stream() orders it before what follows.
#if defined(__x86_64__)
inline constexpr bool kCanStream = true;
inline void stream_bytes(void* to, const void* from, int64_t bytes) {
  char* dst = static_cast<char*>(to);
  const char* src = static_cast<const char*>(from);
  const int64_t head = smaller(-reinterpret_cast<intptr_t>(dst) & 63, bytes);
  std::memcpy(dst, src, head);
  int64_t at = head;
  for (; at + 64 <= bytes; at += 64) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i*)(dst + at), _mm512_loadu_si512(src + at));
#else
    for (int64_t k = at; k < at + 64; k += 16)
      _mm_stream_si128((__m128i*)(dst + k), _mm_loadu_si128((const __m128i*)(src + k)));
#endif
  }
  std::memcpy(dst + at, src + at, bytes - at);
}
inline void end_stream() { _mm_sfence(); }
#else
inline constexpr bool kCanStream = false;
inline void stream_bytes(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }
inline void end_stream() {}
#endif
inline constexpr int64_t kStreamedBytes = int64_t(6) << 20;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

typedef uint16_t HalfLanes __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordLanes __attribute__((vector_size(kVectorBytes)));

template <typename E>
inline Vec<Compute<E>> load_lanes(const E* p) {
  if constexpr (sizeof(E) == 2) {
    HalfLanes bits;
    std::memcpy(&bits, p, sizeof(bits));
    if constexpr (std::is_same_v<E, bfloat16>) return (Vec<float>)(__builtin_convertvector(bits, WordLanes) << 16);
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps((__m128i)bits);
#endif
  }
  return load_row(p);
}

// Rounds to nearest even; NaN stays NaN. Where the processor has an instruction for it, numbers too small for a full
// mantissa become 0, as they do in its products of bfloat16.
template <typename E>
inline void store_lanes(E* p, Vec<Compute<E>> x) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, bfloat16>) {
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
    return;
  }
#endif
  if constexpr (std::is_same_v<E, bfloat16>) {
    const WordLanes bits = (WordLanes)x;
    const WordLanes rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const WordLanes nan = (WordLanes)(x != x);
    const HalfLanes halves = __builtin_convertvector((nan & ((bits >> 16) | 0x40u)) | (~nan & rounded), HalfLanes);
    std::memcpy(p, &halves, sizeof(halves));
    return;
  }
#if defined(__AVX512F__) || defined(__F16C__)
  if constexpr (std::is_same_v<E, float16>) {
#if defined(__AVX512F__)
    const __m256i halves = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    const __m128i halves = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#endif
    std::memcpy(p, &halves, sizeof(halves));
    return;
  }
#endif
  store_row(p, x);
}

// Lanes [0, n) of memory, zero beyond; nothing beyond is read.
template <typename E>
inline Vec<Compute<E>> load_part(const E* p, int64_t n) {
  constexpr int W = kLanes<Compute<E>>;
  if (n >= W) return load_lanes(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) return (Vec<Compute<E>>)_mm512_maskz_loadu_ps((1u << n) - 1, p);
  if constexpr (sizeof(E) == 8) return (Vec<Compute<E>>)_mm512_maskz_loadu_pd((1u << n) - 1, p);
#endif
  E part[W] = {};
  for (int64_t l = 0; l < n; ++l) part[l] = p[l];
  return load_lanes(part);
}

template <typename E>
inline void store_part(E* p, Vec<Compute<E>> x, int64_t n) {
  constexpr int W = kLanes<Compute<E>>;
  if (n >= W) return store_lanes(p, x);
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 4) return _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)x);
  if constexpr (sizeof(E) == 8) return _mm512_mask_storeu_pd(p, (1u << n) - 1, (__m512d)x);
#endif
  E part[W];
  store_lanes(part, x);
#if defined(__AVX512BW__)
  if constexpr (sizeof(E) == 2)
    return _mm256_mask_storeu_epi16(p, (1u << n) - 1, _mm256_loadu_si256((const __m256i*)part));
#endif
  for (int64_t l = 0; l < n; ++l) p[l] = part[l];
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
