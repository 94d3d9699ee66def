// What the CUDA bodies of involution share: loads and stores of a few elements as float.
#pragma once

#include <cstdint>

#include "../common/half.h"
#include "../common/involution_params.h"
#include "tile.h"

namespace fastib::involution_cuda {

// Element k of a word.
template <typename E>
FASTIB_INLINE float element_of(uint32_t word, int k) {
  if constexpr (sizeof(E) == 4) return bits_float(word);
  if constexpr (sizeof(E) == 2) {
    const E element = {static_cast<uint16_t>(word >> 16 * k)};
    return load_float(&element);
  }
}

// As the two functions below, word by word: of a pack, that takes fewer instructions than element by element.
template <int n, typename E>
FASTIB_INLINE void load_words(float* to, const E* from, bool inside) {
  constexpr int kEach = 4 / sizeof(E);
  Pack<uint32_t, n / kEach> words = {};
  if (inside) words = *reinterpret_cast<const Pack<uint32_t, n / kEach>*>(from);
#pragma unroll
  for (int k = 0; k < n; ++k) to[k] = element_of<E>(words.e[k / kEach], k % kEach);
}

template <int n, typename E>
FASTIB_INLINE void load_pack(float* to, const E* from) {
  if constexpr (n * sizeof(E) % 8 == 0) {
    load_words<n>(to, from, true);
  } else {
    const Pack<E, n> pack = *reinterpret_cast<const Pack<E, n>*>(from);
#pragma unroll
    for (int k = 0; k < n; ++k) to[k] = load_float(pack.e + k);
  }
}

// n elements where `inside`, zeros elsewhere.
template <int n, typename E>
FASTIB_INLINE void load_pack_or_zero(float* to, const E* from, bool inside) {
  if constexpr (n * sizeof(E) % 8 == 0) {
    load_words<n>(to, from, inside);
  } else {
#pragma unroll
    for (int k = 0; k < n; ++k) to[k] = 0.0f;
    if (inside) load_pack<n>(to, from);
  }
}

template <int n, typename E>
FASTIB_INLINE void store_pack(E* to, const float* from) {
  Pack<E, n> pack;
#pragma unroll
  for (int k = 0; k < n; ++k) store_float(pack.e + k, from[k]);
  *reinterpret_cast<Pack<E, n>*>(to) = pack;
}

}  // namespace fastib::involution_cuda
