// Stores that leave the caches to others.
#pragma once

#include <cstdint>
#include <cstring>
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

// One vector, to memory that its size divides.
template <typename V>
inline void stream_vector(void* to, V x) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, (__m512i)x);
#elif defined(__AVX__)
  _mm256_stream_si256((__m256i*)to, (__m256i)x);
#else
  _mm_stream_si128((__m128i*)to, (__m128i)x);
#endif
}
#else
inline constexpr bool kCanStream = false;
inline void stream_bytes(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, bytes); }
inline void end_stream() {}
template <typename V>
inline void stream_vector(void* to, V x) {
  std::memcpy(to, &x, sizeof(x));
}
#endif

// Element types that stream_two knows: store_two past the caches, to memory that a vector's size divides.
template <typename E>
inline constexpr bool kStreamed = kCanStream && !std::is_same_v<E, float16>;

template <typename T>
inline void stream_two(T* p, Vec<T> a, Vec<T> b) {
  stream_vector(p, a), stream_vector(p + kLanes<T>, b);
}
inline void stream_two(bfloat16* p, Vec<float> even, Vec<float> odd) { stream_vector(p, pair_bfloat16(even, odd)); }

inline constexpr int64_t kStreamedBytes = int64_t(6) << 20;

}  // namespace fastib::FASTIB_ISA_NAMESPACE
