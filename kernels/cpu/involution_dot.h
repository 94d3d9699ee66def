// Products of involution's gradient to the weight, summed over the channels of a group:
//   out[u][r][lane] = sum over c of g[c][r][lane] * x[c][r * S + u][lane]
// Lanes are pixels of a row, so nothing is summed across lanes. A vector of x serves every (u, r) of the tile that
// meets it.
#pragma once

#include <type_traits>

#include "involution_taps.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Planes of units; steps between channels and between rows.
template <typename Unit>
struct Planes {
  const Unit* p;
  int64_t channel, row;
};

// The tile stores its U * R vectors at out + u * out_tap + r * out_row.
template <typename M, int U, int S, int R>
inline __attribute__((always_inline)) void dot_tile(int64_t channels, Planes<typename M::Unit> x,
                                                    Planes<typename M::Unit> g, typename M::Sum* out, int64_t out_tap,
                                                    int64_t out_row) {
  Vec<typename M::Sum> sum[U][R] = {};
  const typename M::Unit *xc = x.p, *gc = g.p;
  for (int64_t c = 0; c < channels; ++c, xc += x.channel, gc += g.channel) {
    typename M::Operand grad[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) grad[r] = M::operand(gc + r * g.row);
#pragma GCC unroll 32
    for (int at = 0; at < (R - 1) * S + U; ++at) {
      const typename M::Operand value = M::operand(xc + at * x.row);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int u = at - r * S;
        if (u >= 0 && u < U) sum[u][r] = M::dot(sum[u][r], grad[r], value);
      }
    }
  }
#pragma GCC unroll 16
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(out + u * out_tap + r * out_row, sum[u][r]);
}

// All K taps u of a column of taps, in as few tiles as the registers allow.
template <typename M, int S, int R>
void dot_column(int64_t K, int64_t channels, Planes<typename M::Unit> x, Planes<typename M::Unit> g,
                typename M::Sum* out, int64_t out_tap, int64_t out_row) {
  for (int64_t u = 0; u < K;) {
    const int64_t left = K - u;
    const Planes<typename M::Unit> from{x.p + u * x.row, x.channel, x.row};
    typename M::Sum* to = out + u * out_tap;
    const auto run = [&](auto taps) {
      dot_tile<M, decltype(taps)::value, S, R>(channels, from, g, to, out_tap, out_row);
      u += decltype(taps)::value;
    };
    if (kVectorRegisters == 32 && left >= 7 && left != 9)
      run(std::integral_constant<int, 7>{});
    else if (kVectorRegisters == 32 && left >= 5)
      run(std::integral_constant<int, 5>{});
    else if (left >= 4)
      run(std::integral_constant<int, 4>{});
    else if (left == 3)
      run(std::integral_constant<int, 3>{});
    else
      run(std::integral_constant<int, 1>{});
  }
}

// Rows of pixels that one tile takes: sums and operands fill the registers.
inline constexpr int kDotRows = kVectorRegisters == 32 ? 4 : 3;

}  // namespace fastib::FASTIB_ISA_NAMESPACE
