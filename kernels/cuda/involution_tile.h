// What the CUDA bodies of involution share: a thread's place in the problem, and loads and stores of a few elements.
#pragma once

#include <cstdint>

#include "../common/half.h"
#include "../common/inline.h"
#include "../common/involution_params.h"

namespace fastib::involution_cuda {

// A body says as kBlocks how many blocks a processor should hold at once: as many as its registers allow.
inline constexpr int kThreads = 128;

// n elements in one access.
template <typename E, int n>
struct alignas(n * sizeof(E)) Pack {
  E e[n];
};

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

// A thread's tile of an image: rows from `row` on, columns from `column` on, in part `part` of image `b`.
struct Place {
  int64_t b;
  int part, row, column;
  bool exists;
};

// Threads run over tiles of columns first, then rows, parts and images.
FASTIB_INLINE Place place_of(int64_t block, int thread, int64_t images, int parts, int row_tiles, int column_tiles,
                             int rows, int columns) {
  const int64_t at = block * kThreads + thread, tiles = int64_t(row_tiles) * column_tiles, pair = at / tiles;
  const unsigned tile = static_cast<unsigned>(at - pair * tiles);
  Place place;
  place.b = pair / parts;
  place.part = static_cast<int>(pair - place.b * parts);
  place.row = static_cast<int>(tile / column_tiles) * rows;
  place.column = static_cast<int>(tile % column_tiles) * columns;
  place.exists = place.b < images;
  return place;
}

// The same with parts first, where channels are dense.
FASTIB_INLINE Place place_of_part(int64_t block, int thread, int64_t images, int parts, int row_tiles, int column_tiles,
                                  int rows, int columns) {
  const int64_t at = block * kThreads + thread, pixel = at / parts, tiles = int64_t(row_tiles) * column_tiles;
  Place place;
  place.part = static_cast<int>(at - pixel * parts);
  place.b = pixel / tiles;
  const unsigned tile = static_cast<unsigned>(pixel - place.b * tiles);
  place.row = static_cast<int>(tile / column_tiles) * rows;
  place.column = static_cast<int>(tile % column_tiles) * columns;
  place.exists = place.b < images;
  return place;
}

FASTIB_INLINE int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

}  // namespace fastib::involution_cuda
