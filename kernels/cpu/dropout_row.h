// One row of a dropout mask as bytes (-1 kept, 0 dropped), a vector of Philox counters at a time.
#pragma once

#include <cstdint>
#include <cstring>

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

// The round keys of a seed, each in every lane.
struct PhiloxKeys {
  explicit PhiloxKeys(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      key0[round] = PhiloxLanes{} + k0;
      key1[round] = PhiloxLanes{} + k1;
    }
  }
  PhiloxLanes key0[10], key1[10];
};

inline constexpr int kPhiloxChains = 2;  // vectors of counters advanced side by side: one round waits on the last

// Masks of the four elements of each counter [block, block + kPhiloxChains * kPhiloxLanes), a byte each, to dst.
inline void keep_fours(int8_t* dst, uint64_t block, const PhiloxKeys& keys, uint32_t stream, uint32_t threshold) {
  PhiloxLanes lane;
  for (int64_t l = 0; l < kPhiloxLanes; ++l) lane[l] = static_cast<uint64_t>(l);
  const PhiloxLanes multiplier0 = PhiloxLanes{} + 0xD2511F53u, multiplier1 = PhiloxLanes{} + 0xCD9E8D57u;
  PhiloxLanes c0[kPhiloxChains], c1[kPhiloxChains], c2[kPhiloxChains], c3[kPhiloxChains];
  for (int c = 0; c < kPhiloxChains; ++c) {
    c0[c] = lane + (block + static_cast<uint64_t>(c * kPhiloxLanes));
    c1[c] = c0[c] >> 32;
    c2[c] = PhiloxLanes{} + stream;
    c3[c] = PhiloxLanes{};
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round)
#pragma GCC unroll 4
    for (int c = 0; c < kPhiloxChains; ++c) {
      const PhiloxLanes product0 = multiply_low(c0[c], multiplier0), product1 = multiply_low(c2[c], multiplier1);
      c0[c] = (product1 >> 32) ^ c1[c] ^ keys.key0[round];
      c1[c] = product1;
      c2[c] = (product0 >> 32) ^ c3[c] ^ keys.key1[round];
      c3[c] = product0;
    }
  const auto keep = [threshold](PhiloxLanes word, uint32_t byte) {
    return (PhiloxLanes)((word & 0xFFFFFFFFu) >= threshold) & byte;
  };
  for (int c = 0; c < kPhiloxChains; ++c) {
    const PhiloxPacked bytes = __builtin_convertvector(
        keep(c0[c], 0xFFu) | keep(c1[c], 0xFF00u) | keep(c2[c], 0xFF0000u) | keep(c3[c], 0xFF000000u), PhiloxPacked);
    std::memcpy(dst + c * sizeof(bytes), &bytes, sizeof(bytes));
  }
}

// Bytes of scratch that dropout_row needs for n elements, vector overrun included.
inline int64_t dropout_row_bytes(int64_t n) { return n + 4 * kPhiloxChains * kPhiloxLanes + 8 + kVectorBytes; }

// Fills scratch with the masks of elements [first, first + n) and returns where `first` stands in it.
inline int8_t* dropout_row(int8_t* scratch, int64_t n, uint64_t first, uint64_t seed, uint32_t stream,
                           uint32_t threshold) {
  const uint64_t block_begin = first >> 2;
  const uint64_t block_end = (first + static_cast<uint64_t>(n) + 3) >> 2;
  const PhiloxKeys keys(seed);
  for (uint64_t block = block_begin; block < block_end; block += kPhiloxChains * kPhiloxLanes)
    keep_fours(scratch + 4 * (block - block_begin), block, keys, stream, threshold);
  return scratch + (first & 3);
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
