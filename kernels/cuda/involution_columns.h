// CUDA bodies of involution where columns are dense (NCHW), for dilation 1: each a function of (block, thread).
//
// A thread owns R rows of J columns, R J = 4 pixels. For one row of x (or grad_out) at a time it holds the weights of
// all taps that meet it in registers, 4 K of them, and walks over the channels of the group, so a weight is read from
// memory once; a window of x is read once for 4 K products, and its overlaps come from the first cache.
#pragma once

#include "involution_tile.h"

namespace fastib::involution_cuda {

// Channels whose sums a thread holds at a time.
inline constexpr int kChannels = 16;

// Columns [first, first + packs * J) of a row of `columns`, zeros outside; J divides first and columns.
template <int packs, int J, typename E>
FASTIB_INLINE void load_window(float (&window)[packs * J], const E* row, int first, int columns) {
#pragma unroll
  for (int k = 0; k < packs; ++k) {
    const int column = first + k * J;
    load_pack_or_zero<J>(window + k * J, row + column, column >= 0 && column < columns);
  }
}

template <typename E_, int K, int S, int R, int J>
struct ColumnsForward {
  using E = E_;
  using Params = InvolutionParams;
  static constexpr int kBlocks = 3;
  static constexpr int kPad = K / 2, kLeft = (kPad + J - 1) / J * J;  // the window begins at a whole pack
  static constexpr int kPacks = (kLeft - kPad + (J - 1) * S + K + J - 1) / J;

  static int64_t tiles(const Params& p) { return int64_t(divide_up(p.Ho, R)) * (p.Wo / J); }
  static int64_t threads(const Params& p) { return p.B * p.G * divide_up(p.C / p.G, kChannels) * tiles(p); }

  FASTIB_INLINE void run(const Params& p, int64_t block, int thread) {
    const int group = static_cast<int>(p.C / p.G), chunks = divide_up(group, kChannels);
    const Place at = place_of(block, thread, p.B, static_cast<int>(p.G) * chunks, divide_up(p.Ho, R),
                              static_cast<int>(p.Wo) / J, R, J);
    if (!at.exists) return;
    const int g = at.part / chunks, begin = at.part % chunks * kChannels;
    const int channels = group - begin < kChannels ? group - begin : kChannels;
    const int64_t c0 = int64_t(g) * group + begin;
    const E* x = static_cast<const E*>(p.x) + at.b * p.x_stride[0] + c0 * p.x_stride[1];
    const E* weight = static_cast<const E*>(p.weight) + at.b * p.weight_stride[0] + g * p.weight_stride[1] + at.column;

    float sum[kChannels][R * J] = {};
#pragma unroll 1
    for (int step = 0; step < (R - 1) * S + K; ++step) {
      const int row = at.row * S - kPad + step;
      if (row < 0 || row >= p.Hi) continue;
      float w[R][K][J];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int u = step - r * S;
        if (u < 0 || u >= K || at.row + r >= p.Ho) continue;
        const E* from = weight + u * p.weight_stride[2] + (at.row + r) * p.weight_stride[4];
#pragma unroll
        for (int v = 0; v < K; ++v) load_pack<J>(w[r][v], from + v * p.weight_stride[3]);
      }
      const E* from = x + row * p.x_stride[2];
#pragma unroll
      for (int c = 0; c < kChannels; ++c, from += p.x_stride[1]) {
        if (c >= channels) break;
        float window[kPacks * J];
        load_window<kPacks, J>(window, from, at.column * S - kLeft, static_cast<int>(p.Wi));
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int u = step - r * S;
          if (u < 0 || u >= K || at.row + r >= p.Ho) continue;
#pragma unroll
          for (int v = 0; v < K; ++v)
#pragma unroll
            for (int t = 0; t < J; ++t) sum[c][r * J + t] += w[r][v][t] * window[kLeft - kPad + t * S + v];
        }
      }
    }
    E* out =
        static_cast<E*>(p.out) + at.b * p.out_stride[0] + c0 * p.out_stride[1] + at.row * p.out_stride[2] + at.column;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (c < channels && at.row + r < p.Ho)
          store_pack<J>(out + c * p.out_stride[1] + r * p.out_stride[2], sum[c] + r * J);
  }
};

// Stride 1. Pixel q of x meets tap v in column q + K / 2 - v of grad_out, with that column's weight.
template <typename E_, int K, int R, int J>
struct ColumnsGradX {
  using E = E_;
  using Params = InvolutionGradParams;
  static constexpr int kBlocks = 3;
  static constexpr int kPad = K / 2, kLeft = (kPad + J - 1) / J * J;
  static constexpr int kPacks = (kLeft - kPad + J - 1 + K + J - 1) / J;

  static int64_t tiles(const Params& g) { return int64_t(divide_up(g.forward.Hi, R)) * (g.forward.Wi / J); }
  static int64_t threads(const Params& g) {
    return g.forward.B * g.forward.G * divide_up(g.forward.C / g.forward.G, kChannels) * tiles(g);
  }

  FASTIB_INLINE void run(const Params& g, int64_t block, int thread) {
    const InvolutionParams& p = g.forward;
    const int group = static_cast<int>(p.C / p.G), chunks = divide_up(group, kChannels);
    const Place at = place_of(block, thread, p.B, static_cast<int>(p.G) * chunks, divide_up(p.Hi, R),
                              static_cast<int>(p.Wi) / J, R, J);
    if (!at.exists) return;
    const int part = at.part / chunks, begin = at.part % chunks * kChannels;
    const int channels = group - begin < kChannels ? group - begin : kChannels;
    const int64_t c0 = int64_t(part) * group + begin;
    const E* grad = static_cast<const E*>(g.grad_out) + at.b * g.grad_out_stride[0] + c0 * g.grad_out_stride[1];
    const E* weight = static_cast<const E*>(p.weight) + at.b * p.weight_stride[0] + part * p.weight_stride[1];

    float sum[kChannels][R * J] = {};
#pragma unroll 1
    for (int step = 0; step < R - 1 + K; ++step) {
      const int row = at.row - kPad + step;
      if (row < 0 || row >= p.Ho) continue;
      float w[R][K][J];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int u = r + K - 1 - step;
        if (u < 0 || u >= K || at.row + r >= p.Hi) continue;
        const E* from = weight + u * p.weight_stride[2] + row * p.weight_stride[4];
#pragma unroll
        for (int v = 0; v < K; ++v)
#pragma unroll
          for (int t = 0; t < J; ++t) {
            const int column = at.column + t + kPad - v;
            load_pack_or_zero<1>(&w[r][v][t], from + v * p.weight_stride[3] + column, column >= 0 && column < p.Wo);
          }
      }
      const E* from = grad + row * g.grad_out_stride[2];
#pragma unroll
      for (int c = 0; c < kChannels; ++c, from += g.grad_out_stride[1]) {
        if (c >= channels) break;
        float window[kPacks * J];
        load_window<kPacks, J>(window, from, at.column - kLeft, static_cast<int>(p.Wo));
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const int u = r + K - 1 - step;
          if (u < 0 || u >= K || at.row + r >= p.Hi) continue;
#pragma unroll
          for (int v = 0; v < K; ++v)
#pragma unroll
            for (int t = 0; t < J; ++t) sum[c][r * J + t] += w[r][v][t] * window[kLeft - kPad + t + K - 1 - v];
        }
      }
    }
    E* to = static_cast<E*>(g.grad_x) + at.b * g.grad_x_stride[0] + c0 * g.grad_x_stride[1] +
            at.row * g.grad_x_stride[2] + at.column;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (c < channels && at.row + r < p.Hi)
          store_pack<J>(to + c * g.grad_x_stride[1] + r * g.grad_x_stride[2], sum[c] + r * J);
  }
};

template <typename E_, int K, int S, int R, int J>
struct ColumnsGradWeight {
  using E = E_;
  using Params = InvolutionGradParams;
  static constexpr int kBlocks = 4;
  static constexpr int kPad = K / 2, kLeft = (kPad + J - 1) / J * J;
  static constexpr int kPacks = (kLeft - kPad + (J - 1) * S + K + J - 1) / J;

  static int64_t tiles(const Params& g) { return int64_t(divide_up(g.forward.Ho, R)) * (g.forward.Wo / J); }
  static int64_t threads(const Params& g) { return g.forward.B * g.forward.G * tiles(g); }

  FASTIB_INLINE void run(const Params& g, int64_t block, int thread) {
    const InvolutionParams& p = g.forward;
    const int group = static_cast<int>(p.C / p.G);
    const Place at =
        place_of(block, thread, p.B, static_cast<int>(p.G), divide_up(p.Ho, R), static_cast<int>(p.Wo) / J, R, J);
    if (!at.exists) return;
    const int64_t c0 = int64_t(at.part) * group;
    const E* x = static_cast<const E*>(p.x) + at.b * p.x_stride[0] + c0 * p.x_stride[1];
    const E* grad = static_cast<const E*>(g.grad_out) + at.b * g.grad_out_stride[0] + c0 * g.grad_out_stride[1] +
                    at.row * g.grad_out_stride[2] + at.column;
    E* to = static_cast<E*>(g.grad_weight) + at.b * g.grad_weight_stride[0] + at.part * g.grad_weight_stride[1] +
            at.row * g.grad_weight_stride[4] + at.column;

#pragma unroll 1
    for (int step = 0; step < (R - 1) * S + K; ++step) {
      const int row = at.row * S - kPad + step;
      float sum[R][K][J] = {};
      if (row >= 0 && row < p.Hi) {
        const E* values = x + row * p.x_stride[2];
        const E* grads = grad;
#pragma unroll 2
        for (int c = 0; c < group; ++c, values += p.x_stride[1], grads += g.grad_out_stride[1]) {
          float window[kPacks * J];
          load_window<kPacks, J>(window, values, at.column * S - kLeft, static_cast<int>(p.Wi));
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const int u = step - r * S;
            if (u < 0 || u >= K || at.row + r >= p.Ho) continue;
            float here[J];
            load_pack<J>(here, grads + r * g.grad_out_stride[2]);
#pragma unroll
            for (int v = 0; v < K; ++v)
#pragma unroll
              for (int t = 0; t < J; ++t) sum[r][v][t] += here[t] * window[kLeft - kPad + t * S + v];
          }
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int u = step - r * S;
        if (u < 0 || u >= K || at.row + r >= p.Ho) continue;
        E* tap = to + u * g.grad_weight_stride[2] + r * g.grad_weight_stride[4];
#pragma unroll
        for (int v = 0; v < K; ++v) store_pack<J>(tap + v * g.grad_weight_stride[3], sum[r][v]);
      }
    }
  }
};

}  // namespace fastib::involution_cuda
