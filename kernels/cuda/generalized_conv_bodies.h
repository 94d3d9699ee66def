// CUDA bodies of the per-head shift, and which of them runs a call. Memory is the bound: a thread writes whole packs.
#pragma once

#include "../common/generalized_conv_params.h"
#include "tile.h"

namespace fastib::generalized_conv_cuda {

// Channels are dense: a thread moves V channels of one head for J columns.
template <typename E, int V>
struct ChannelsShift {
  using Params = GeneralizedConvShiftParams;
  static constexpr int kBlocks = 8, J = 4;

  static int64_t threads(const Params& p) { return p.B * (p.H * p.D / V) * p.rows * divide_up(p.columns, J); }

  FASTIB_INLINE void run(const Params& p, int64_t block, int thread) {
    const int parts = static_cast<int>(p.H * p.D / V), rows = static_cast<int>(p.rows);
    const Place at = place_of_part(block, thread, p.B, parts, rows, divide_up(p.columns, J), 1, J);
    if (!at.exists) return;
    const int c = at.part * V;
    const Offset offset = generalized_conv_offset(generalized_conv_window(p.H), c / static_cast<int>(p.D), p.inverse);
    const int64_t row = at.row + offset.row;
    const E* x = static_cast<const E*>(p.x) + at.b * p.x_stride[0] + row * p.x_stride[2] + c;
    E* out = static_cast<E*>(p.out) + at.b * p.out_stride[0] + at.row * p.out_stride[2] + c;
    Pack<E, V> pack[J] = {};
#pragma unroll
    for (int t = 0; t < J; ++t) {
      const int64_t column = at.column + t + offset.column;
      if (row >= 0 && row < p.rows && column >= 0 && column < p.columns)
        pack[t] = *reinterpret_cast<const Pack<E, V>*>(x + column * p.x_stride[3]);
    }
#pragma unroll
    for (int t = 0; t < J; ++t)
      if (at.column + t < p.columns) *reinterpret_cast<Pack<E, V>*>(out + (at.column + t) * p.out_stride[3]) = pack[t];
  }
};

// Columns are dense: a thread moves V columns of R rows of one channel. What it reads may begin anywhere in a pack.
template <typename E, int V>
struct ColumnsShift {
  using Params = GeneralizedConvShiftParams;
  static constexpr int kBlocks = 8, R = V >= 4 ? 2 : 4;

  static int64_t threads(const Params& p) { return p.B * p.H * p.D * divide_up(p.rows, R) * (p.columns / V); }

  FASTIB_INLINE void run(const Params& p, int64_t block, int thread) {
    const int channels = static_cast<int>(p.H * p.D);
    const Place at =
        place_of(block, thread, p.B, channels, divide_up(p.rows, R), static_cast<int>(p.columns / V), R, V);
    if (!at.exists) return;
    const Offset offset =
        generalized_conv_offset(generalized_conv_window(p.H), at.part / static_cast<int>(p.D), p.inverse);
    const E* x = static_cast<const E*>(p.x) + at.b * p.x_stride[0] + at.part * p.x_stride[1];
    E* out = static_cast<E*>(p.out) + at.b * p.out_stride[0] + at.part * p.out_stride[1] + at.column;
    Pack<E, V> pack[R] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = at.row + r + offset.row;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const int64_t column = at.column + k + offset.column;
        if (row >= 0 && row < p.rows && column >= 0 && column < p.columns)
          pack[r].e[k] = x[row * p.x_stride[2] + column];
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (at.row + r < p.rows) *reinterpret_cast<Pack<E, V>*>(out + (at.row + r) * p.out_stride[2]) = pack[r];
  }
};

// Whether the accesses of packs of n elements, which strides but that of `dense` lead to, are aligned.
template <typename E, int n>
bool packs(const void* p, const int64_t (&strides)[4], int dense) {
  bool whole = reinterpret_cast<uintptr_t>(p) % (n * sizeof(E)) == 0;
  for (int i = 0; i < 4; ++i) whole = whole && (i == dense || strides[i] % n == 0);
  return whole;
}

// launch(Body{}, params) is called once.
template <typename E, typename Launch>
void shift(const GeneralizedConvShiftParams& p, Launch&& launch) {
  constexpr int V = 16 / sizeof(E);
  if (p.channels_last) {
    if (p.D % V == 0 && packs<E, V>(p.x, p.x_stride, 1) && packs<E, V>(p.out, p.out_stride, 1))
      launch(ChannelsShift<E, V>{}, p);
    else
      launch(ChannelsShift<E, 1>{}, p);
  } else if (p.columns % 4 == 0 && packs<E, 4>(p.out, p.out_stride, 3)) {
    launch(ColumnsShift<E, 4>{}, p);
  } else if (p.columns % 2 == 0 && packs<E, 2>(p.out, p.out_stride, 3)) {
    launch(ColumnsShift<E, 2>{}, p);
  } else {
    launch(ColumnsShift<E, 1>{}, p);
  }
}

}  // namespace fastib::generalized_conv_cuda
