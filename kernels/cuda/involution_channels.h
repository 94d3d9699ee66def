// CUDA bodies of involution where channels and taps are dense (channels_last), for dilation 1.
//
// A thread owns J columns of V channels of one group; neighbouring threads own neighbouring channels. A vector of x is
// read once for up to J of its V K products.
#pragma once

#include "involution_tile.h"

namespace fastib::involution_cuda {

template <typename E_, int K, int S, int V, int J>
struct ChannelsForward {
  using E = E_;
  using Params = InvolutionParams;
  static constexpr int kBlocks = 2;
  static constexpr int kPad = K / 2;

  static int64_t threads(const Params& p) { return p.B * (p.C / V) * p.Ho * divide_up(p.Wo, J); }

  FASTIB_INLINE void run(const Params& p, int64_t block, int thread) {
    const int parts = static_cast<int>(p.C / V), group = static_cast<int>(p.C / p.G);
    const Place at = place_of_part(block, thread, p.B, parts, static_cast<int>(p.Ho), divide_up(p.Wo, J), 1, J);
    if (!at.exists) return;
    const int c = at.part * V, left = at.column * S - kPad;
    const E* x = static_cast<const E*>(p.x) + at.b * p.x_stride[0] + c;
    const E* weight = static_cast<const E*>(p.weight) + at.b * p.weight_stride[0] + c / group * p.weight_stride[1] +
                      at.row * p.weight_stride[4] + at.column * p.weight_stride[5];

    float sum[J][V] = {};
#pragma unroll 1
    for (int u = 0; u < K; ++u) {
      const int row = at.row * S - kPad + u;
      if (row < 0 || row >= p.Hi) continue;
      float w[K][J];
#pragma unroll
      for (int t = 0; t < J; ++t)
#pragma unroll
        for (int v = 0; v < K; ++v)
          load_pack_or_zero<1>(&w[v][t], weight + t * p.weight_stride[5] + u * K + v, at.column + t < p.Wo);
#pragma unroll
      for (int k = 0; k < (J - 1) * S + K; ++k) {
        float value[V];
        const int column = left + k;
        load_pack_or_zero<V>(value, x + row * p.x_stride[2] + column * p.x_stride[3], column >= 0 && column < p.Wi);
#pragma unroll
        for (int t = 0; t < J; ++t) {
          const int v = k - t * S;
          if (v < 0 || v >= K) continue;
#pragma unroll
          for (int l = 0; l < V; ++l) sum[t][l] += w[v][t] * value[l];
        }
      }
    }
    E* out = static_cast<E*>(p.out) + at.b * p.out_stride[0] + c + at.row * p.out_stride[2];
#pragma unroll
    for (int t = 0; t < J; ++t)
      if (at.column + t < p.Wo) store_pack<V>(out + (at.column + t) * p.out_stride[3], sum[t]);
  }
};

// Stride 1.
template <typename E_, int K, int V, int J>
struct ChannelsGradX {
  using E = E_;
  using Params = InvolutionGradParams;
  static constexpr int kBlocks = 4;
  static constexpr int kPad = K / 2;

  static int64_t threads(const Params& g) {
    return g.forward.B * (g.forward.C / V) * g.forward.Hi * divide_up(g.forward.Wi, J);
  }

  FASTIB_INLINE void run(const Params& g, int64_t block, int thread) {
    const InvolutionParams& p = g.forward;
    const int parts = static_cast<int>(p.C / V), group = static_cast<int>(p.C / p.G);
    const Place at = place_of_part(block, thread, p.B, parts, static_cast<int>(p.Hi), divide_up(p.Wi, J), 1, J);
    if (!at.exists) return;
    const int c = at.part * V;
    const E* grad = static_cast<const E*>(g.grad_out) + at.b * g.grad_out_stride[0] + c;
    const E* weight = static_cast<const E*>(p.weight) + at.b * p.weight_stride[0] + c / group * p.weight_stride[1];

    float sum[J][V] = {};
#pragma unroll 1
    for (int u = 0; u < K; ++u) {
      const int row = at.row + kPad - u;
      if (row < 0 || row >= p.Ho) continue;
#pragma unroll
      for (int k = 0; k < J - 1 + K; ++k) {
        const int column = at.column - kPad + k;
        if (column < 0 || column >= p.Wo) continue;
        float value[V];
        load_pack<V>(value, grad + row * g.grad_out_stride[2] + column * g.grad_out_stride[3]);
        const E* taps = weight + row * p.weight_stride[4] + column * p.weight_stride[5] + u * K;
#pragma unroll
        for (int t = 0; t < J; ++t) {
          const int v = t + K - 1 - k;
          if (v < 0 || v >= K) continue;
          const float w = load_float(taps + v);
#pragma unroll
          for (int l = 0; l < V; ++l) sum[t][l] += w * value[l];
        }
      }
    }
    E* to = static_cast<E*>(g.grad_x) + at.b * g.grad_x_stride[0] + c + at.row * g.grad_x_stride[2];
#pragma unroll
    for (int t = 0; t < J; ++t)
      if (at.column + t < p.Wi) store_pack<V>(to + (at.column + t) * g.grad_x_stride[3], sum[t]);
  }
};

// A thread owns a group's taps at J columns, and walks over the group's channels V at a time.
template <typename E_, int K, int S, int V, int J>
struct ChannelsGradWeight {
  using E = E_;
  using Params = InvolutionGradParams;
  static constexpr int kBlocks = 2;
  static constexpr int kPad = K / 2;

  static int64_t threads(const Params& g) {
    return g.forward.B * g.forward.G * g.forward.Ho * divide_up(g.forward.Wo, J);
  }

  FASTIB_INLINE void run(const Params& g, int64_t block, int thread) {
    const InvolutionParams& p = g.forward;
    const int group = static_cast<int>(p.C / p.G);
    const Place at =
        place_of_part(block, thread, p.B, static_cast<int>(p.G), static_cast<int>(p.Ho), divide_up(p.Wo, J), 1, J);
    if (!at.exists) return;
    const int c0 = at.part * group, left = at.column * S - kPad;
    const E* x = static_cast<const E*>(p.x) + at.b * p.x_stride[0] + c0;
    const E* grad = static_cast<const E*>(g.grad_out) + at.b * g.grad_out_stride[0] + c0 +
                    at.row * g.grad_out_stride[2] + at.column * g.grad_out_stride[3];
    E* to = static_cast<E*>(g.grad_weight) + at.b * g.grad_weight_stride[0] + at.part * g.grad_weight_stride[1] +
            at.row * g.grad_weight_stride[4] + at.column * g.grad_weight_stride[5];

#pragma unroll 1
    for (int u = 0; u < K; ++u) {
      const int row = at.row * S - kPad + u;
      float sum[K][J] = {};
      if (row >= 0 && row < p.Hi) {
#pragma unroll 1
        for (int c = 0; c < group; c += V) {
          float here[J][V];
#pragma unroll
          for (int t = 0; t < J; ++t)
            load_pack_or_zero<V>(here[t], grad + t * g.grad_out_stride[3] + c, at.column + t < p.Wo);
#pragma unroll
          for (int k = 0; k < (J - 1) * S + K; ++k) {
            float value[V];
            const int column = left + k;
            load_pack_or_zero<V>(value, x + row * p.x_stride[2] + column * p.x_stride[3] + c,
                                 column >= 0 && column < p.Wi);
#pragma unroll
            for (int t = 0; t < J; ++t) {
              const int v = k - t * S;
              if (v < 0 || v >= K) continue;
#pragma unroll
              for (int l = 0; l < V; ++l) sum[v][t] += here[t][l] * value[l];
            }
          }
        }
      }
#pragma unroll
      for (int t = 0; t < J; ++t)
#pragma unroll
        for (int v = 0; v < K; ++v)
          if (at.column + t < p.Wo) store_float(to + t * g.grad_weight_stride[5] + u * K + v, sum[v][t]);
    }
  }
};

}  // namespace fastib::involution_cuda
