// One row of a dropout mask as bytes (-1 kept, 0 dropped), a vector of Philox counters at a time.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/philox.h"
#include "simd.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Philox counters, one in each 64-bit lane; only the low 32 bits count.
typedef uint64_t PhiloxLanes __attribute__((vector_size(kVectorBytes)));
typedef uint32_t PhiloxPacked __attribute__((vector_size(kVectorBytes / 2)));
inline constexpr int64_t kPhiloxLanes = kVectorBytes / 8;

// Products of the low halves of the lanes.
inline PhiloxLanes multiply_low(PhiloxLanes a, PhiloxLanes b) {
#if defined(__AVX512F__)
  return (PhiloxLanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (PhiloxLanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (PhiloxLanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Masks of the four elements of each counter [block, block + kPhiloxLanes), a byte each.
inline PhiloxPacked keep_four(uint64_t block, uint64_t seed, uint32_t stream, uint32_t threshold) {
  PhiloxLanes counter;
  for (int64_t l = 0; l < kPhiloxLanes; ++l) counter[l] = block + static_cast<uint64_t>(l);
  const PhiloxLanes multiplier0 = PhiloxLanes{} + 0xD2511F53u, multiplier1 = PhiloxLanes{} + 0xCD9E8D57u;
  PhiloxLanes c0 = counter, c1 = counter >> 32, c2 = PhiloxLanes{} + stream, c3{};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const PhiloxLanes product0 = multiply_low(c0, multiplier0), product1 = multiply_low(c2, multiplier1);
    c0 = (product1 >> 32) ^ c1 ^ k0;
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ k1;
    c3 = product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const auto keep = [threshold](PhiloxLanes word, uint32_t byte) {
    return (PhiloxLanes)((word & 0xFFFFFFFFu) >= threshold) & byte;
  };
  return __builtin_convertvector(keep(c0, 0xFFu) | keep(c1, 0xFF00u) | keep(c2, 0xFF0000u) | keep(c3, 0xFF000000u),
                                 PhiloxPacked);
}

// Bytes of scratch that dropout_row needs for n elements, vector overrun included.
inline int64_t dropout_row_bytes(int64_t n) { return n + 4 * kPhiloxLanes + 8 + kVectorBytes; }

// Fills scratch with the masks of elements [first, first + n) and returns where `first` stands in it.
inline int8_t* dropout_row(int8_t* scratch, int64_t n, uint64_t first, uint64_t seed, uint32_t stream,
                           uint32_t threshold) {
  const uint64_t block_begin = first >> 2;
  const uint64_t block_end = (first + static_cast<uint64_t>(n) + 3) >> 2;
  for (uint64_t block = block_begin; block < block_end; block += kPhiloxLanes) {
    const PhiloxPacked bytes = keep_four(block, seed, stream, threshold);
    std::memcpy(scratch + 4 * (block - block_begin), &bytes, sizeof(bytes));
  }
  return scratch + (first & 3);
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
