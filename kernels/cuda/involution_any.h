// CUDA bodies of involution for any size, stride, dilation and layout: one result a thread.
#pragma once

#include "involution_tile.h"

namespace fastib::involution_cuda {

template <typename E_>
struct AnyForward {
  using E = E_;
  using Params = InvolutionParams;
  static constexpr int kBlocks = 6;

  static int64_t threads(const Params& p) { return p.B * p.C * p.Ho * p.Wo; }

  FASTIB_INLINE void run(const Params& p, int64_t block, int thread) {
    const int C = static_cast<int>(p.C), Ho = static_cast<int>(p.Ho), Wo = static_cast<int>(p.Wo);
    const Place at = p.channels_last ? place_of_part(block, thread, p.B, C, Ho, Wo, 1, 1)
                                     : place_of(block, thread, p.B, C, Ho, Wo, 1, 1);
    if (!at.exists) return;
    const int64_t pad = p.K / 2 * p.dilation;
    const E* x = static_cast<const E*>(p.x) + at.b * p.x_stride[0] + at.part * p.x_stride[1];
    const E* weight = static_cast<const E*>(p.weight) + at.b * p.weight_stride[0] +
                      at.part / (p.C / p.G) * p.weight_stride[1] + at.row * p.weight_stride[4] +
                      at.column * p.weight_stride[5];
    float sum = 0.0f;
    for (int64_t u = 0; u < p.K; ++u) {
      const int64_t row = at.row * p.stride - pad + u * p.dilation;
      if (row < 0 || row >= p.Hi) continue;
      for (int64_t v = 0; v < p.K; ++v) {
        const int64_t column = at.column * p.stride - pad + v * p.dilation;
        if (column < 0 || column >= p.Wi) continue;
        sum += load_float(weight + u * p.weight_stride[2] + v * p.weight_stride[3]) *
               load_float(x + row * p.x_stride[2] + column * p.x_stride[3]);
      }
    }
    store_float(static_cast<E*>(p.out) + at.b * p.out_stride[0] + at.part * p.out_stride[1] + at.row * p.out_stride[2] +
                    at.column * p.out_stride[3],
                sum);
  }
};

template <typename E_>
struct AnyGradX {
  using E = E_;
  using Params = InvolutionGradParams;
  static constexpr int kBlocks = 6;

  static int64_t threads(const Params& g) { return g.forward.B * g.forward.C * g.forward.Hi * g.forward.Wi; }

  FASTIB_INLINE void run(const Params& g, int64_t block, int thread) {
    const InvolutionParams& p = g.forward;
    const int C = static_cast<int>(p.C), Hi = static_cast<int>(p.Hi), Wi = static_cast<int>(p.Wi);
    const Place at = p.channels_last ? place_of_part(block, thread, p.B, C, Hi, Wi, 1, 1)
                                     : place_of(block, thread, p.B, C, Hi, Wi, 1, 1);
    if (!at.exists) return;
    const int64_t pad = p.K / 2 * p.dilation;
    const E* grad = static_cast<const E*>(g.grad_out) + at.b * g.grad_out_stride[0] + at.part * g.grad_out_stride[1];
    const E* weight =
        static_cast<const E*>(p.weight) + at.b * p.weight_stride[0] + at.part / (p.C / p.G) * p.weight_stride[1];
    float sum = 0.0f;
    for (int64_t u = 0; u < p.K; ++u) {
      const int64_t down = at.row + pad - u * p.dilation, row = down / p.stride;
      if (down < 0 || down - row * p.stride || row >= p.Ho) continue;
      for (int64_t v = 0; v < p.K; ++v) {
        const int64_t right = at.column + pad - v * p.dilation, column = right / p.stride;
        if (right < 0 || right - column * p.stride || column >= p.Wo) continue;
        sum += load_float(weight + u * p.weight_stride[2] + v * p.weight_stride[3] + row * p.weight_stride[4] +
                          column * p.weight_stride[5]) *
               load_float(grad + row * g.grad_out_stride[2] + column * g.grad_out_stride[3]);
      }
    }
    store_float(static_cast<E*>(g.grad_x) + at.b * g.grad_x_stride[0] + at.part * g.grad_x_stride[1] +
                    at.row * g.grad_x_stride[2] + at.column * g.grad_x_stride[3],
                sum);
  }
};

template <typename E_>
struct AnyGradWeight {
  using E = E_;
  using Params = InvolutionGradParams;
  static constexpr int kBlocks = 6;

  static int64_t threads(const Params& g) {
    const InvolutionParams& p = g.forward;
    return p.B * p.G * p.K * p.K * p.Ho * p.Wo;
  }

  FASTIB_INLINE void run(const Params& g, int64_t block, int thread) {
    const InvolutionParams& p = g.forward;
    const int taps = static_cast<int>(p.G * p.K * p.K), Ho = static_cast<int>(p.Ho), Wo = static_cast<int>(p.Wo);
    const Place at = p.channels_last ? place_of_part(block, thread, p.B, taps, Ho, Wo, 1, 1)
                                     : place_of(block, thread, p.B, taps, Ho, Wo, 1, 1);
    if (!at.exists) return;
    const int K = static_cast<int>(p.K), tap = at.part % (K * K), part = at.part / (K * K), u = tap / K, v = tap % K;
    const int64_t pad = p.K / 2 * p.dilation, group = p.C / p.G;
    const int64_t row = at.row * p.stride - pad + u * p.dilation, column = at.column * p.stride - pad + v * p.dilation;
    float sum = 0.0f;
    if (row >= 0 && row < p.Hi && column >= 0 && column < p.Wi) {
      const E* x = static_cast<const E*>(p.x) + at.b * p.x_stride[0] + part * group * p.x_stride[1] +
                   row * p.x_stride[2] + column * p.x_stride[3];
      const E* grad = static_cast<const E*>(g.grad_out) + at.b * g.grad_out_stride[0] +
                      part * group * g.grad_out_stride[1] + at.row * g.grad_out_stride[2] +
                      at.column * g.grad_out_stride[3];
      for (int64_t c = 0; c < group; ++c)
        sum += load_float(x + c * p.x_stride[1]) * load_float(grad + c * g.grad_out_stride[1]);
    }
    store_float(static_cast<E*>(g.grad_weight) + at.b * g.grad_weight_stride[0] + part * g.grad_weight_stride[1] +
                    u * g.grad_weight_stride[2] + v * g.grad_weight_stride[3] + at.row * g.grad_weight_stride[4] +
                    at.column * g.grad_weight_stride[5],
                sum);
  }
};

}  // namespace fastib::involution_cuda
