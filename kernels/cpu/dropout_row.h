// One row of a dropout mask as bytes (-1 kept, 0 dropped), many Philox counters at a time.
#pragma once

#include <cstdint>

#include "../common/philox.h"
#include "simd.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

inline constexpr int64_t kPhiloxBatch = 32;  // counters advanced together

// Bytes of scratch that dropout_row needs for n elements, vector overrun included.
inline int64_t dropout_row_bytes(int64_t n) { return n + 4 * kPhiloxBatch + 8 + kVectorBytes; }

// Fills scratch with the masks of elements [first, first + n) and returns where `first` stands in it.
inline int8_t* dropout_row(int8_t* scratch, int64_t n, uint64_t first, uint64_t seed, uint32_t stream,
                           uint32_t threshold) {
  const uint64_t block_begin = first >> 2;
  const uint64_t block_end = (first + static_cast<uint64_t>(n) + 3) >> 2;
  for (uint64_t block = block_begin; block < block_end; block += kPhiloxBatch) {
    uint32_t c0[kPhiloxBatch], c1[kPhiloxBatch], c2[kPhiloxBatch], c3[kPhiloxBatch];
    for (int64_t l = 0; l < kPhiloxBatch; ++l) {
      const uint64_t counter = block + static_cast<uint64_t>(l);
      c0[l] = static_cast<uint32_t>(counter);
      c1[l] = static_cast<uint32_t>(counter >> 32);
      c2[l] = stream;
      c3[l] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int64_t l = 0; l < kPhiloxBatch; ++l) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * c0[l];
        const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2[l];
        c0[l] = static_cast<uint32_t>(product1 >> 32) ^ c1[l] ^ k0;
        c1[l] = static_cast<uint32_t>(product1);
        c2[l] = static_cast<uint32_t>(product0 >> 32) ^ c3[l] ^ k1;
        c3[l] = static_cast<uint32_t>(product0);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    uint32_t packed[kPhiloxBatch];
    for (int64_t l = 0; l < kPhiloxBatch; ++l)
      packed[l] = (c0[l] >= threshold ? 0xFFu : 0u) | (c1[l] >= threshold ? 0xFF00u : 0u) |
                  (c2[l] >= threshold ? 0xFF0000u : 0u) | (c3[l] >= threshold ? 0xFF000000u : 0u);
    std::memcpy(scratch + 4 * (block - block_begin), packed, sizeof(packed));
  }
  return scratch + (first & 3);
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
