// One register tile serves every product of attention, generalized convolution and linear layers: rows by vectors, the
// right operand read as vectors, the left one broadcast element by element through two strides (so that it may be
// transposed). An element U is a float, a double, or two bfloat16 along the summed dimension, whose products are summed
// in float.
#pragma once

#include <type_traits>

#include "simd.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

template <typename U>
struct SumType {
  using type = U;
};
template <>
struct SumType<BFloat16Pair> {
  using type = float;
};
template <typename U>
using Sum = typename SumType<U>::type;

template <typename U>
inline constexpr int64_t kSteps = std::is_same_v<U, Sum<U>> ? 1 : 2;  // elements of the summed dimension in one U

inline Vec<float> multiply_add(Vec<float> sum, Vec<float> a, Vec<float> b) { return sum + a * b; }
inline Vec<double> multiply_add(Vec<double> sum, Vec<double> a, Vec<double> b) { return sum + a * b; }
#if defined(__AVX512BF16__)
inline Vec<float> multiply_add(Vec<float> sum, Vec<BFloat16Pair> a, Vec<BFloat16Pair> b) {
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#endif

// Left operand: element (m, k) at p[m * row + k * step].
template <typename U>
struct Left {
  const U* p;
  int64_t row, step;
};

// Right operand: vector v of step k at p[k * step + v * vec].
template <typename U>
struct Right {
  const U* p;
  int64_t step, vec;
};

// sink(m, v, sum) receives the finished vectors of one tile of kRows x kVecs.
template <int kRows, int kVecs, typename U, typename Sink>
inline __attribute__((always_inline)) void tile(int64_t K, const U* a, int64_t a_row, int64_t a_step, const U* b,
                                                int64_t b_step, int64_t b_vec, Sink sink) {
  Vec<Sum<U>> sum[kRows][kVecs] = {};
  for (int64_t k = 0; k < K; ++k) {
    Vec<U> right[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) right[v] = load(b + v * b_vec);
#pragma GCC unroll 32
    for (int m = 0; m < kRows; ++m) {
      const Vec<U> left = splat(a[m * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sum[m][v] = multiply_add(sum[m][v], left, right[v]);
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 32
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sink(m, v, sum[m][v]);
}

// All rows of kVecs columns: full tiles, then one tile of the rows left. before(m, n) precedes the tile of rows
// [m, m + n).
template <int kRows, int kVecs, typename U, typename Sink, typename Before>
inline void tile_rows(int64_t M, int64_t K, Left<U> a, Right<U> b, Sink sink, Before&& before) {
  int64_t m = 0;
  for (; m + kRows <= M; m += kRows) {
    before(m, kRows);
    tile<kRows, kVecs>(K, a.p + m * a.row, a.row, a.step, b.p, b.step, b.vec,
                       [sink, m](int r, int v, Vec<Sum<U>> x) { sink(m + r, v, x); });
  }
  if constexpr (kRows > 1) {
    constexpr int half = (kRows + 1) / 2;
    if (m < M)
      tile_rows<half, kVecs>(
          M - m, K, Left<U>{a.p + m * a.row, a.row, a.step}, b,
          [sink, m](int64_t r, int v, Vec<Sum<U>> x) { sink(m + r, v, x); },
          [&](int64_t r, int64_t n) { before(m + r, n); });
  }
}

struct Nothing {
  void operator()(int64_t, int64_t) const {}
};

// C = A B for M rows and `vecs` vectors of columns; sink(row, vector, sum) stores them. before(m, n) is called once for
// all rows, a few at a time between the tiles: loads that it starts go on while the tiles are computed.
template <typename U, typename Sink, typename Before = Nothing>
inline void gemm(int64_t M, int64_t vecs, int64_t K, Left<U> a, Right<U> b, Sink sink, Before&& before = {}) {
  // Tiles that fill the register file less the right operand and one broadcast: the multiply units stay busy.
  constexpr int rows1 = kVectorRegisters == 32 ? 16 : 8;
  constexpr int rows2 = kVectorRegisters == 32 ? 12 : 6;
  constexpr int rows3 = kVectorRegisters == 32 ? 8 : 4;
  int64_t v = 0;
  while (v < vecs) {
    const Right<U> panel{b.p + v * b.vec, b.step, b.vec};
    const auto shifted = [sink, v](int64_t m, int w, Vec<Sum<U>> x) { sink(m, v + w, x); };
    const auto first = [&](int64_t m, int64_t n) {
      if (v == 0) before(m, n);
    };
    if (vecs - v == 1) {
      tile_rows<rows1, 1>(M, K, a, panel, shifted, first);
      v += 1;
    } else if ((vecs - v) % 2 == 1) {
      tile_rows<rows3, 3>(M, K, a, panel, shifted, first);
      v += 3;
    } else {
      tile_rows<rows2, 2>(M, K, a, panel, shifted, first);
      v += 2;
    }
  }
}

// The same with tiles of another shape, as far as panels of kVecs vectors go.
template <int kRows, int kVecs, typename U, typename Sink>
inline void gemm_in_tiles(int64_t M, int64_t vecs, int64_t K, Left<U> a, Right<U> b, Sink sink) {
  int64_t v = 0;
  const auto shifted = [sink, &v](int64_t m, int64_t w, Vec<Sum<U>> x) { sink(m, v + w, x); };
  for (; v + kVecs <= vecs; v += kVecs)
    tile_rows<kRows, kVecs>(M, K, a, Right<U>{b.p + v * b.vec, b.step, b.vec}, shifted, Nothing{});
  gemm(M, vecs - v, K, a, Right<U>{b.p + v * b.vec, b.step, b.vec}, shifted);
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
