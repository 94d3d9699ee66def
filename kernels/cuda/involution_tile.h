// What the CUDA bodies of involution share: loads and stores of a few elements as float.
#pragma once

#include <cstdint>

#include "../common/half.h"
#include "../common/involution_params.h"
#include "tile.h"

namespace fastib::involution_cuda {

template <int n, typename E>
FASTIB_INLINE void load_pack(float* to, const E* from) {
  const Pack<E, n> pack = *reinterpret_cast<const Pack<E, n>*>(from);
#pragma unroll
  for (int k = 0; k < n; ++k) to[k] = load_float(pack.e + k);
}

template <int n, typename E>
FASTIB_INLINE void store_pack(E* to, const float* from) {
  Pack<E, n> pack;
#pragma unroll
  for (int k = 0; k < n; ++k) store_float(pack.e + k, from[k]);
  *reinterpret_cast<Pack<E, n>*>(to) = pack;
}

// n elements where `inside`, zeros elsewhere.
template <int n, typename E>
FASTIB_INLINE void load_pack_or_zero(float* to, const E* from, bool inside) {
#pragma unroll
  for (int k = 0; k < n; ++k) to[k] = 0.0f;
  if (inside) load_pack<n>(to, from);
}

}  // namespace fastib::involution_cuda
