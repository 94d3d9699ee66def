// What CUDA bodies share: a thread's place in an image, and a few elements at a time. A body is a struct with
// `run(params, block, thread)` for host and device and `threads(params)`, how many there are. One with
// `shared_bytes(params)` has three steps, `stage`, `run` and `flush`, which take that much memory of the block's too:
// no thread begins a step before all have ended the one before it.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/inline.h"

namespace fastib {

// A body says as kBlocks how many blocks a processor should hold at once: as many as its registers allow.
inline constexpr int kThreads = 128;

template <typename Body, typename = void>
inline constexpr bool kShares = false;
template <typename Body>
inline constexpr bool kShares<Body, std::void_t<decltype(&Body::shared_bytes)>> = true;

// n elements in one access.
template <typename E, int n>
struct alignas(n * sizeof(E)) Pack {
  E e[n];
};

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

}  // namespace fastib
