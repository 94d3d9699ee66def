// One register tile serves every product of attention: rows by vectors, the right operand read as vectors, the left one
// broadcast element by element through two strides (so that it may be transposed).
#pragma once

#include "simd.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Left operand: element (m, k) at p[m * row + k * step].
template <typename T>
struct Left {
  const T* p;
  int64_t row, step;
};

// Right operand: vector v of step k at p[k * step + v * vec].
template <typename T>
struct Right {
  const T* p;
  int64_t step, vec;
};

// sink(m, v, sum) receives the finished vectors of one tile of kRows x kVecs.
template <int kRows, int kVecs, typename T, typename Sink>
inline __attribute__((always_inline)) void tile(int64_t K, const T* a, int64_t a_row, int64_t a_step, const T* b,
                                                int64_t b_step, int64_t b_vec, Sink&& sink) {
  Vec<T> sum[kRows][kVecs] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vec<T> right[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) right[v] = load(b + v * b_vec);
#pragma GCC unroll 32
    for (int m = 0; m < kRows; ++m) {
      const Vec<T> left = splat(a[m * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[m][v] += left * right[v];
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 32
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sink(m, v, sum[m][v]);
}

// All rows of kVecs columns: full tiles, then one tile of the rows left.
template <int kRows, int kVecs, typename T, typename Sink>
inline void tile_rows(int64_t M, int64_t K, Left<T> a, Right<T> b, Sink&& sink) {
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows)
    tile<kRows, kVecs>(K, a.p + m * a.row, a.row, a.step, b.p, b.step, b.vec,
                       [&](int r, int v, Vec<T> x) { sink(m + r, v, x); });
  if constexpr (kRows > 1) {
    constexpr int half = (kRows + 1) / 2;
    if (m < M)
      tile_rows<half, kVecs>(M - m, K, Left<T>{a.p + m * a.row, a.row, a.step}, b,
                             [&](int64_t r, int v, Vec<T> x) { sink(m + r, v, x); });
  }
}

// C = A B for M rows and `vecs` vectors of columns; sink(row, vector, sum) stores them.
template <typename T, typename Sink>
inline void gemm(int64_t M, int64_t vecs, int64_t K, Left<T> a, Right<T> b, Sink&& sink) {
  // Tiles that fill the register file less the right operand and one broadcast: the multiply units stay busy.
  constexpr int rows1 = kVectorRegisters == 32 ? 16 : 8;
  constexpr int rows2 = kVectorRegisters == 32 ? 12 : 6;
  constexpr int rows3 = kVectorRegisters == 32 ? 8 : 4;
  int64_t v = 0;
  while (v < vecs) {
    const Right<T> panel{b.p + v * b.vec, b.step, b.vec};
    const auto shifted = [&](int64_t m, int w, Vec<T> x) { sink(m, v + w, x); };
    if (vecs - v == 1) {
      tile_rows<rows1, 1>(M, K, a, panel, shifted);
      v += 1;
    } else if ((vecs - v) % 2 == 1) {
      tile_rows<rows3, 3>(M, K, a, panel, shifted);
      v += 3;
    } else {
      tile_rows<rows2, 2>(M, K, a, panel, shifted);
      v += 2;
    }
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
