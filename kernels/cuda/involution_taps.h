// Taps of involution in a block's shared memory, for weights that are dense with their taps last: (B, Ho, Wo, G, K, K).
//
// Taps of a pixel lie side by side, those of its neighbours far away: threads that own pixels or channels would read
// and write a few bytes of many cache lines each. So a block brings the words it needs, side by side as they lie, and
// its threads take taps from there; of the gradient they leave taps there, and the block writes words.
#pragma once

#include "involution_tile.h"

namespace fastib::involution_cuda {

// Where a thread works: a tile of J columns of a row, and one of `parts` parts of its channels.
struct Tile {
  int part, row, column;
  int64_t b, pixel;  // pixel: the tile's first, counted over all images
  bool exists;
};

// The tiles of a block: whole ones, in the order of memory. Threads that are left over idle.
template <int J>
struct BlockTiles {
  int parts, per_block, per_row, H, W;
  int64_t rows;  // of all images

  FASTIB_INLINE BlockTiles of(int64_t parts, int64_t B, int64_t H, int64_t W) {
    const int n = static_cast<int>(parts);
    return {n, kThreads / n, divide_up(W, J), static_cast<int>(H), static_cast<int>(W), B * H};
  }

  FASTIB_INLINE int64_t threads(const BlockTiles& t) {
    return (t.rows * t.per_row + t.per_block - 1) / t.per_block * kThreads;
  }

  // The first pixel of a block, or behind the last one.
  FASTIB_INLINE int64_t first_pixel(const BlockTiles& t, int64_t block) {
    const int64_t at = block * t.per_block, row = at / t.per_row;
    return row < t.rows ? row * t.W + (at - row * t.per_row) * J : t.rows * t.W;
  }

  FASTIB_INLINE Tile tile(const BlockTiles& t, int64_t block, int thread) {
    Tile tile;
    const int index = thread / t.parts;
    const int64_t at = block * t.per_block + index, row = at / t.per_row;
    tile.part = thread - index * t.parts;
    tile.b = row / t.H;
    tile.row = static_cast<int>(row - tile.b * t.H);
    tile.column = static_cast<int>(at - row * t.per_row) * J;
    tile.pixel = row * t.W + tile.column;
    tile.exists = index < t.per_block && row < t.rows;
    return tile;
  }
};

// A piece is a row of K taps of one pixel and group, in the words that hold it.
template <typename E, int K>
struct Taps {
  static constexpr bool kHalves = sizeof(E) == 2;
  static constexpr int kWords = (K > 3 ? 8 : 4) / (kHalves ? 2 : 1);

  FASTIB_INLINE int64_t bytes(const InvolutionParams& p, int pixels) { return K * p.G * pixels * kWords * 4; }

  // Brings row u of the taps of `pixels` pixels from first + u * step on, for each u; what lies outside is left out.
  // A thread brings the same word of every so many pieces: a whole number of words apart.
  FASTIB_INLINE void stage(const InvolutionParams& p, int64_t first, int64_t step, int pixels, int thread,
                           uint32_t* shared) {
    constexpr int kAhead = kThreads / kWords * (K * K);
    static_assert(!kHalves || kAhead % 2 == 0);
    const int64_t all = p.B * p.Ho * p.Wo * p.G * (K * K);
    const int pieces = pixels * static_cast<int>(p.G), w = thread % kWords;
#pragma unroll 1
    for (int u = 0; u < K; ++u) {
      const int64_t begin = (first + u * step) * p.G * (K * K) + u * K;
      int64_t piece = begin + thread / kWords * (K * K);
      uint32_t* to = shared + u * pieces * kWords;
      if (begin >= 0 && begin + int64_t(pieces) * (K * K) + kWords <= all) {
        const uint32_t* from = static_cast<const uint32_t*>(p.weight) + (kHalves ? piece >> 1 : piece) + w;
#pragma unroll 4
        for (int i = thread; i < pieces * kWords; i += kThreads, from += kHalves ? kAhead / 2 : kAhead) to[i] = *from;
      } else {
#pragma unroll 1
        for (int i = thread; i < pieces * kWords; i += kThreads, piece += kAhead)
          if (piece >= 0 && piece + K <= all) to[i] = word(p.weight, piece, w, all);
      }
    }
  }

  // Word w of a piece that begins at that element, of `all`.
  FASTIB_INLINE uint32_t word(const void* weight, int64_t piece, int w, int64_t all) {
    if constexpr (kHalves) {
      const int64_t at = (piece >> 1) + w;
      if (2 * at + 1 < all) return static_cast<const uint32_t*>(weight)[at];
      return 2 * at < all ? static_cast<const uint16_t*>(weight)[2 * at] : 0;
    } else {
      return w < K ? static_cast<const uint32_t*>(weight)[piece + w] : 0;
    }
  }

  // Where row u of a pixel and group lies. place: which of the pixels that were brought; begins: its first element's
  // number, or one as odd.
  struct Piece {
    const uint32_t* words;
    int begins;
  };

  FASTIB_INLINE Piece piece(const InvolutionParams& p, const uint32_t* shared, int pixels, int u, int place, int group,
                            int64_t pixel) {
    const int G = static_cast<int>(p.G);
    return {shared + ((u * pixels + place) * G + group) * kWords, (static_cast<int>(pixel & 1) & G) + group + u};
  }

  // The taps of the piece `ahead` pixels behind `first`.
  FASTIB_INLINE void read(float (&tap)[K], const InvolutionParams& p, const Piece& first, int ahead) {
    const int G = static_cast<int>(p.G);
    const uint32_t* from = first.words + ahead * (G * kWords);
    const int shift = ((ahead & G) + first.begins & 1) * 16;  // a piece may begin within a word
    uint32_t word[kWords + 1];
    constexpr int n = kWords < 4 ? kWords : 4;
#pragma unroll
    for (int i = 0; i < kWords; i += n) {
      const Pack<uint32_t, n> pack = *reinterpret_cast<const Pack<uint32_t, n>*>(from + i);
#pragma unroll
      for (int k = 0; k < n; ++k) word[i + k] = pack.e[k];
    }
    word[kWords] = 0;
#pragma unroll
    for (int v = 0; v < K; ++v) {
      if constexpr (kHalves) {
        const uint64_t wide = static_cast<uint64_t>(word[v / 2 + 1]) << 32 | word[v / 2];
        tap[v] = element_of<E>(static_cast<uint32_t>(wide >> shift), v % 2);
      } else {
        tap[v] = bits_float(word[v]);
      }
    }
  }
};

// Writes n elements of shared memory to `to + begin`. In memory of two bytes an element they begin at the second of a
// word where `begin` is odd, as there.
template <typename E>
FASTIB_INLINE void write_words(E* to, int64_t begin, int n, int thread, const uint32_t* shared) {
  if constexpr (sizeof(E) == 4) {
    for (int i = thread; i < n; i += kThreads) reinterpret_cast<uint32_t*>(to + begin)[i] = shared[i];
  } else {
    const int odd = static_cast<int>(begin & 1), end = odd + n;
    E* const even = to + (begin - odd);
    for (int i = thread; 2 * i < end; i += kThreads) {
      if (2 * i >= odd && 2 * i + 1 < end) {
        reinterpret_cast<uint32_t*>(even)[i] = shared[i];
      } else {
        const int half = 2 * i < odd ? 1 : 0;
        even[2 * i + half].bits = static_cast<uint16_t>(shared[i] >> half * 16);
      }
    }
  }
}

}  // namespace fastib::involution_cuda
