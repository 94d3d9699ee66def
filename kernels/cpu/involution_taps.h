// Sums over the taps of an involution window, for a row of pixels and one vector of channels:
//   out[p] += sum over runs r and taps t of w[r][p, t] * x[r][p * S + t * D]
// Lanes are channels, so a weight is broadcast and no lane is lost at any image width. A vector of x is loaded once and
// serves every (pixel, tap) of the tile that meets it.
#pragma once

#include <utility>

#include "../common/half.h"
#include "simd.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Products of one element a lane.
template <typename T>
struct Single {
  using Unit = T;  // what is loaded per lane and what is broadcast
  using Sum = T;
  using Operand = Vec<T>;
  static constexpr bool paired = false;
  static constexpr int taps = 1;  // of a unit
  static Operand operand(const Unit* p) { return in_register(load(p)); }
  static Operand last(Operand x) { return x; }
  static Vec<T> scale(Vec<T> sum, const Unit* w, Operand x) { return sum + splat(*w) * x; }
  static Vec<T> dot(Vec<T> sum, Operand a, Operand b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
// Products of two bfloat16 a lane: the low half is the earlier tap. Sums are float.
struct Paired {
  using Unit = uint32_t;
  using Sum = float;
  using Operand = __m512i;
  static constexpr bool paired = true;
  static constexpr int taps = 2;
  static Operand operand(const Unit* p) { return in_register(_mm512_loadu_si512(p)); }
  // Of a run of odd length: the second tap of the last pair does not exist, and x may be infinite there.
  static Operand last(Operand x) { return _mm512_and_si512(x, _mm512_set1_epi32(0xFFFF)); }
  static Vec<float> scale(Vec<float> sum, const Unit* w, Operand x) { return dot(sum, _mm512_set1_epi32((int)*w), x); }
  static Vec<float> dot(Vec<float> sum, Operand a, Operand b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Where the operands of a row lie; offsets and steps in units.
struct TapRow {
  int64_t runs;
  const int64_t* x_offset;  // (runs,), from the first pixel's first tap
  const int64_t* w_offset;  // (runs,)
  int64_t x_step;           // between what neighbouring columns of the tile's pattern read
  int64_t w_pixel, w_tap;   // steps of the weights
  int64_t out_step;         // between pixels
  // Memory that the next row will read, asked for while this one is multiplied: bytes between taps and pixels, from
  // even runs to odd ones, and back.
  const char* ahead;
  int64_t ahead_tap, ahead_pixel, ahead_run[2];
};

// Pixels of a full tile; it alone looks ahead.
inline constexpr int kAheadPixels = 14;

// One tile of P pixels: pixel p and tap t meet in column p * S + t * D.
template <typename M, int N, int S, int D, int P>
inline __attribute__((always_inline)) void tap_tile(const TapRow& row, const typename M::Unit* x,
                                                    const typename M::Unit* w, typename M::Sum* out,
                                                    const char* ahead) {
  const int64_t slide = row.w_tap - row.w_pixel * D;
  Vec<typename M::Sum> sum[P] = {};
  int64_t step = row.ahead_run[0], next_step = row.ahead_run[1];
  for (int64_t r = 0; r < row.runs; ++r, ahead += step, std::swap(step, next_step)) {
    const typename M::Unit* xr = x + row.x_offset[r];
    const typename M::Unit* wr = w + row.w_offset[r];
#pragma GCC unroll 64
    for (int at = 0; at <= (P - 1) * S + (N - 1) * D; ++at) {
      const typename M::Operand value = M::operand(xr + at * row.x_step);
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t) {
        const int place = at - t * D;
        if (P == kAheadPixels && place == 0)
          for (int k = t * M::taps; k < (t + 1) * M::taps; ++k) __builtin_prefetch(ahead + k * row.ahead_tap, 0, 2);
        if (place % S == 0 && place >= 0 && place / S < P) {
          const int p = place / S;
          const auto* weight = S == 1 ? wr + at * row.w_pixel + t * slide : wr + p * row.w_pixel + t * row.w_tap;
          sum[p] = M::scale(sum[p], weight, M::paired && t == N - 1 ? M::last(value) : value);
        }
      }
    }
  }
#pragma GCC unroll 64
  for (int p = 0; p < P; ++p) store(out + p * row.out_step, sum[p]);
}

template <typename M, int N, int S, int D, int P>
inline int64_t tap_tiles(const TapRow& row, const typename M::Unit* x, const typename M::Unit* w, typename M::Sum* out,
                         int64_t p, int64_t pixels) {
  for (; p + P <= pixels; p += P)
    tap_tile<M, N, S, D, P>(row, x + p * S * row.x_step, w + p * row.w_pixel, out + p * row.out_step,
                            row.ahead + p * row.ahead_pixel);
  return p;
}

// All pixels of a row. Tiles of 14 and 7 divide the widths of image models, and fill 16 registers with room for
// operands.
template <typename M, int N, int S, int D>
void tap_row(const TapRow& row, const typename M::Unit* x, const typename M::Unit* w, typename M::Sum* out,
             int64_t pixels) {
  int64_t p = tap_tiles<M, N, S, D, 14>(row, x, w, out, 0, pixels);
  p = tap_tiles<M, N, S, D, 7>(row, x, w, out, p, pixels);
  p = tap_tiles<M, N, S, D, 4>(row, x, w, out, p, pixels);
  tap_tiles<M, N, S, D, 1>(row, x, w, out, p, pixels);
}

template <typename M>
using TapRowFunction = void (*)(const TapRow&, const typename M::Unit*, const typename M::Unit*, typename M::Sum*,
                                int64_t);

// The function for runs of `taps` taps whose pattern is (S, D); null where none is compiled.
template <typename M, int S, int D>
TapRowFunction<M> tap_row_function(int64_t taps) {
  switch (taps) {
    case 1:
      return tap_row<M, 1, 1, 1>;
    case 2:
      return tap_row<M, 2, S, D>;
    case 3:
      return tap_row<M, 3, S, D>;
    case 4:
      return tap_row<M, 4, S, D>;
    case 5:
      return tap_row<M, 5, S, D>;
    case 7:
      if constexpr (!M::paired) return tap_row<M, 7, S, D>;
      return nullptr;
    case 9:
      if constexpr (!M::paired) return tap_row<M, 9, S, D>;
      return nullptr;
  }
  return nullptr;
}

template <typename M>
TapRowFunction<M> tap_row_function(int64_t taps, int64_t s, int64_t d) {
  if constexpr (M::paired) {
    return s == 1 && d == 2 ? tap_row_function<M, 1, 2>(taps) : nullptr;
  } else {
    if (s == 1 && d == 1) return tap_row_function<M, 1, 1>(taps);
    if (s == 2 && d == 1) return tap_row_function<M, 2, 1>(taps);
    if (s == 1 && d == 2) return tap_row_function<M, 1, 2>(taps);
    return nullptr;
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
