// Philox4x32-10 (Salmon et al. 2011), the source of every dropout mask: a mask depends on (seed, stream, element)
// alone.
//
// key = (seed, seed >> 32), counter = (c, c >> 32, stream, 0) with c = element / 4; element e takes word e % 4, and is
// kept where word >= threshold.
#pragma once

#include <cstdint>

#include "inline.h"

namespace fastib {

constexpr uint32_t kAttnDropoutStream = 0;  // element = ((b * H + h) * N + i) * N + j
constexpr uint32_t kRpeDropoutStream = 1;   // element = (h * N + i) * N + j: shared by the batch

struct PhiloxBlock {
  uint32_t word[4];
};

FASTIB_INLINE PhiloxBlock philox4x32_10(const uint32_t (&counter)[4], const uint32_t (&key)[2]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The four words of elements 4 * block ... 4 * block + 3.
FASTIB_INLINE PhiloxBlock dropout_words(uint64_t seed, uint32_t stream, uint64_t block) {
  const uint32_t counter[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), stream, 0u};
  const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  return philox4x32_10(counter, key);
}

// min(floor(p * 2^32), 2^32 - 1) for p in [0, 1].
FASTIB_INLINE uint32_t dropout_threshold(double p) {
  const double scaled = p * 4294967296.0;
  return scaled >= 4294967295.0 ? 0xFFFFFFFFu : static_cast<uint32_t>(scaled);
}

// What a kept element is multiplied by: 1 / (1 - p), and 0 at p == 1.
FASTIB_INLINE double dropout_scale(double p) { return p < 1.0 ? 1.0 / (1.0 - p) : 0.0; }

FASTIB_INLINE bool dropout_keep(uint64_t seed, uint32_t stream, uint64_t element, uint32_t threshold) {
  return dropout_words(seed, stream, element >> 2).word[element & 3] >= threshold;
}

}  // namespace fastib
