// Sums over the taps of an involution window, for a row of pixels; lanes are channels, so that a weight is broadcast:
//   gather: out[j] = sum over taps (u, v) of w[u, v, j] * x[u][j * S + v * D]
//   spread: x[u][j * S + v * D] += w[u, v, j] * g[j], the gradient of the former
// The weights of a tile of pixels are first staged, in the compute type and at fixed places: all that a product's
// address then needs is known at compile time.
#pragma once

#include "involution_unit.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Tiles of 14 and 7 pixels divide the widths of image models, and fill 16 registers with room for operands.
inline constexpr int kPixels = 14, kFewPixels = 7;
inline int64_t whole_tiles(int64_t pixels) { return divide_up(pixels, kFewPixels) * kFewPixels; }

// One row of pixels. Rows of vectors hold W channels a pixel; steps in elements.
template <typename E>
struct WindowRow {
  using T = Compute<E>;
  int64_t K, stride, dilation;
  Weights<const E> w;  // of this row
  int64_t columns, vectors;
  int64_t ahead;  // from a weight to one that will be read soon
  T* x;           // (vectors, rows of taps, columns) from the first tap of pixel 0 on
  int64_t x_vector, x_row;
  T* pixels;  // out or g: (vectors, columns)
  int64_t pixels_vector;
  int64_t u_begin, u_end;  // rows of taps that count
  T* staged;
};

// Weights of the pixels of one tile: (taps, 16) where the columns are dense in memory, else (pixels, padded taps).
// N: taps a row, 0 where that is known at run time only.
template <int N, bool kTapsDense>
struct Stage {
  int64_t K;
  static constexpr int64_t kSlots = 16;
  int64_t side() const { return N ? N : K; }
  int64_t pixel() const { return kTapsDense ? divide_up(side() * side(), 16) * 16 : 1; }
  int64_t tap() const { return kTapsDense ? 1 : kSlots; }

  // Pixels [j, j + n) of at most `pixels`; those that are missing get zeros.
  template <typename E>
  void fill(const WindowRow<E>& row, int64_t j, int64_t n, int64_t pixels) const {
    using T = Compute<E>;
    constexpr int W = kLanes<T>;
    T* const dst = row.staged;
    if constexpr (kTapsDense) {
      const int64_t first = row.u_begin * side(), last = row.u_end * side(), line = 64 / sizeof(E);
      const E* from = row.w.at(0, 0, 0, j);
      for (int64_t p = 0; p < n; ++p, from += row.w.column) {
        for (int64_t k = first; k < last - 1 + line; k += line)
          __builtin_prefetch(from + row.ahead + smaller(k, last - 1), 0, 2);
        for (int64_t k = first; k < last; k += W) store(dst + p * pixel() + k, load_part(from + k, last - k));
      }
      for (int64_t p = n; p < pixels; ++p)
        for (int64_t k = first; k < last; k += W) store(dst + p * pixel() + k, Vec<T>{});
    } else {
      const int64_t v_step = row.w.v, ahead = row.ahead, end = row.u_end;
      for (int64_t u = row.u_begin; u < end; ++u) {
        const E* from = row.w.at(u, 0, 0, j);
        T* to = dst + u * side() * kSlots;
        for (int64_t v = 0; v < side(); ++v, from += v_step, to += kSlots) {
          __builtin_prefetch(from + ahead, 0, 2);  // into the second cache: x fills the first
          for (int64_t k = 0; k < kSlots; k += W) store(to + k, load_part(from + k, n - k));
        }
      }
    }
  }
};

template <int N, int S, int D, bool kTapsDense, int P, typename T>
inline void gather_tile(const T* x, int64_t x_row, const T* w, T* out) {
  constexpr int W = kLanes<T>;
  constexpr Stage<N, kTapsDense> stage{N};
  Vec<T> sum[P] = {};
  for (int u = 0; u < N; ++u, x += x_row, w += N * stage.tap()) {
#pragma GCC unroll 64
    for (int at = 0; at <= (P - 1) * S + (N - 1) * D; ++at) {
      const Vec<T> value = in_register(load(x + at * W));
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) {
        const int place = at - v * D, p = place / S;
        if (place >= 0 && place % S == 0 && p < P) sum[p] += splat(w[p * stage.pixel() + v * stage.tap()]) * value;
      }
    }
  }
#pragma GCC unroll 64
  for (int p = 0; p < P; ++p) store(out + p * W, sum[p]);
}

template <int N, int S, int D, bool kTapsDense, int P, typename T>
inline void spread_tile(T* x, int64_t x_row, const T* w, const T* g, int64_t rows) {
  constexpr int W = kLanes<T>;
  constexpr Stage<N, kTapsDense> stage{N};
  Vec<T> value[P];
#pragma GCC unroll 64
  for (int p = 0; p < P; ++p) value[p] = in_register(load(g + p * W));
  for (int64_t u = 0; u < rows; ++u, x += x_row, w += N * stage.tap()) {
#pragma GCC unroll 64
    for (int at = 0; at <= (P - 1) * S + (N - 1) * D; ++at) {
      Vec<T> sum = load(x + at * W);
#pragma GCC unroll 16
      for (int v = 0; v < N; ++v) {
        const int place = at - v * D, p = place / S;
        if (place >= 0 && place % S == 0 && p < P) sum += splat(w[p * stage.pixel() + v * stage.tap()]) * value[p];
      }
      store(x + at * W, sum);
    }
  }
}

// The same for any K, stride and dilation, a pixel and tap at a time.
template <bool kSpread, bool kTapsDense, typename E>
void any_tile(const WindowRow<E>& row, const Stage<0, kTapsDense>& stage, Compute<E>* x, Compute<E>* pixels,
              int64_t n) {
  using T = Compute<E>;
  constexpr int W = kLanes<T>;
  for (int64_t p = 0; p < n; ++p) {
    const T* w = row.staged + p * stage.pixel();
    Vec<T> own = kSpread ? load(pixels + p * W) : Vec<T>{};
    for (int64_t u = row.u_begin; u < row.u_end; ++u)
      for (int64_t v = 0; v < row.K; ++v) {
        T* place = x + (u - row.u_begin) * row.x_row + (p * row.stride + v * row.dilation) * W;
        const Vec<T> weight = splat(w[(u * row.K + v) * stage.tap()]);
        if constexpr (kSpread)
          store(place, load(place) + weight * own);
        else
          own += weight * load(place);
      }
    if constexpr (!kSpread) store(pixels + p * W, own);
  }
}

// Pixels [j, j + P) of a row, of which those beyond the row count for nothing.
template <bool kSpread, int N, int S, int D, bool kTapsDense, int P, typename E>
void window_tile(const WindowRow<E>& row, int64_t j) {
  constexpr int W = kLanes<Compute<E>>;
  const Stage<N, kTapsDense> stage{row.K};
  stage.fill(row, j, smaller(row.columns - j, P), P);
  Compute<E>*x = row.x + j * (S ? S : row.stride) * W, *pixels = row.pixels + j * W;
  for (int64_t c = 0; c < row.vectors; ++c, x += row.x_vector, pixels += row.pixels_vector) {
    if constexpr (N == 0) {
      any_tile<kSpread, kTapsDense>(row, stage, x, pixels, P);
    } else {
      const Compute<E>* w = row.staged + row.u_begin * N * stage.tap();
      if constexpr (kSpread)
        spread_tile<N, S, D, kTapsDense, P>(x, row.x_row, w, pixels, row.u_end - row.u_begin);
      else
        gather_tile<N, S, D, kTapsDense, P>(x, row.x_row, w, pixels);
    }
  }
}

template <bool kSpread, int N, int S, int D, bool kTapsDense, typename E>
void window_row(const WindowRow<E>& row) {
  int64_t j = 0;
  for (; j + kFewPixels < row.columns; j += kPixels) window_tile<kSpread, N, S, D, kTapsDense, kPixels>(row, j);
  if (j < row.columns) window_tile<kSpread, N, S, D, kTapsDense, kFewPixels>(row, j);
}

template <typename E>
using WindowFunction = void (*)(const WindowRow<E>&);

template <bool kSpread, bool kTapsDense, int S, int D, typename E>
WindowFunction<E> window_function(int64_t K) {
  switch (K) {
    case 3:
      return window_row<kSpread, 3, S, D, kTapsDense, E>;
    case 5:
      return window_row<kSpread, 5, S, D, kTapsDense, E>;
    case 7:
      return window_row<kSpread, 7, S, D, kTapsDense, E>;
    case 9:
      return window_row<kSpread, 9, S, D, kTapsDense, E>;
  }
  return window_row<kSpread, 0, 0, 0, kTapsDense, E>;
}

template <bool kSpread, bool kTapsDense, typename E>
WindowFunction<E> window_function(const InvolutionParams& p) {
  if constexpr (!std::is_same_v<E, double>) {
    if (p.stride == 1 && p.dilation == 1) return window_function<kSpread, kTapsDense, 1, 1, E>(p.K);
    if (p.stride == 2 && p.dilation == 1) return window_function<kSpread, kTapsDense, 2, 1, E>(p.K);
    if (p.stride == 1 && p.dilation == 2) return window_function<kSpread, kTapsDense, 1, 2, E>(p.K);
  }
  return window_row<kSpread, 0, 0, 0, kTapsDense, E>;
}

template <bool kSpread, typename E>
WindowFunction<E> window_function(const InvolutionParams& p) {
  return p.channels_last ? window_function<kSpread, true, E>(p) : window_function<kSpread, false, E>(p);
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
