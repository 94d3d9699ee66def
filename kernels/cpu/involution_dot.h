// Products of involution's gradient to the weight, summed over the channels of a group:
//   out[u][r][lane] = sum over c of g[c][r][lane] * x[c][r * S + u][lane]
// Lanes are pixels of a row, so nothing is summed across lanes. A vector of x serves every (u, r) of the tile that
// meets it.
#pragma once

#include "gemm_tile.h"
#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Where the operands and results of one vector of pixels lie, for R rows and K x K taps; steps in elements.
template <typename U, typename E>
struct DotWindow {
  int64_t K, planes, lanes;  // planes: of kSteps<U> channels each; lanes: pixels that exist
  const U *x, *g;
  const int64_t* x_column;  // (K,) offset of each column of taps in x
  int64_t x_plane, x_row, g_plane, g_row;
  E* out;
  int64_t out_u, out_v, out_row;
};

// N x R sums of one column of taps. While it adds up, it asks for the memory at `ahead` that a later tile will write.
template <typename U, typename E, int N, int S, int R>
inline __attribute__((always_inline)) void dot_tile(const DotWindow<U, E>& at, const U* x, E* out, const E* ahead) {
  const U* g = at.g;
  Vec<Sum<U>> sum[N][R] = {};
  for (int64_t c = 0; c < at.planes; ++c, x += at.x_plane, g += at.g_plane) {
    if (c < N)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + c * at.out_u + r * at.out_row, 1);
    Vec<U> grad[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) grad[r] = in_register(load(g + r * at.g_row));
#pragma GCC unroll 32
    for (int row = 0; row < (R - 1) * S + N; ++row) {
      const Vec<U> value = in_register(load(x + row * at.x_row));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int u = row - r * S;
        if (u >= 0 && u < N) sum[u][r] = multiply_add(sum[u][r], grad[r], value);
      }
    }
  }
#pragma GCC unroll 16
  for (int u = 0; u < N; ++u)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store_part(out + u * at.out_u + r * at.out_row, sum[u][r], at.lanes);
}

template <typename U, typename E, int N, int S, int R>
void dot_columns(const DotWindow<U, E>& window, int64_t u) {
  const DotWindow<U, E> at = window;  // in registers, out of reach of the stores
  const U* x = at.x + u * at.x_row;
  E* out = at.out + u * at.out_u;
  for (int64_t v = 0; v < at.K; ++v) {
    const int64_t later = v + 2 < at.K ? v + 2 : v;
    dot_tile<U, E, N, S, R>(at, x + at.x_column[v], out + v * at.out_v, out + later * at.out_v + at.lanes - 1);
  }
}

// All taps, in as few tiles as the registers allow.
template <typename U, typename E, int S, int R>
void dot_window(const DotWindow<U, E>& at) {
  constexpr bool wide = kVectorRegisters == 32;
  for (int64_t u = 0; u < at.K;) {
    const int64_t left = at.K - u;
    if (wide && left >= 7 && left != 9)
      dot_columns<U, E, 7, S, R>(at, u), u += 7;
    else if (wide && left >= 5)
      dot_columns<U, E, 5, S, R>(at, u), u += 5;
    else if (left >= 4)
      dot_columns<U, E, 4, S, R>(at, u), u += 4;
    else if (left == 3)
      dot_columns<U, E, 3, S, R>(at, u), u += 3;
    else
      dot_columns<U, E, 1, S, R>(at, u), u += 1;
  }
}

// Rows of pixels that one tile takes: sums and operands fill the registers.
inline constexpr int kDotRows = kVectorRegisters == 32 ? 4 : 3;

}  // namespace fastib::FASTIB_ISA_NAMESPACE
