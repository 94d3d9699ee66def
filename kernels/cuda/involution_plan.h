// Which body runs a call of involution: launch(Body{}, params) is called once for each, in order.
#pragma once

#include "involution_any.h"
#include "involution_channels.h"
#include "involution_columns.h"

namespace fastib::involution_cuda {

template <typename E, int n>
bool packs(const void* p, const int64_t* strides, int dense, int dimensions) {
  bool whole = reinterpret_cast<uintptr_t>(p) % (n * sizeof(E)) == 0;
  for (int i = 0; i < dimensions; ++i) whole = whole && (i == dense || strides[i] % n == 0);
  return whole;
}

// Whether rows of all tensors consist of whole packs of J columns.
template <typename E, int J>
bool columns_pack(const InvolutionParams& p, const InvolutionGradParams* g) {
  bool whole = p.Wi % J == 0 && p.Wo % J == 0 && packs<E, J>(p.x, p.x_stride, 3, 4) &&
               packs<E, J>(p.weight, p.weight_stride, 5, 6);
  if (!g) return whole && packs<E, J>(p.out, p.out_stride, 3, 4);
  return whole && packs<E, J>(g->grad_out, g->grad_out_stride, 3, 4) &&
         packs<E, J>(g->grad_x, g->grad_x_stride, 3, 4) && packs<E, J>(g->grad_weight, g->grad_weight_stride, 5, 6);
}

// Whether a group's channels consist of whole packs of V.
template <typename E, int V>
bool channels_pack(const InvolutionParams& p, const InvolutionGradParams* g) {
  const bool whole = p.C / p.G % V == 0 && packs<E, V>(p.x, p.x_stride, 1, 4);
  if (!g) return whole && packs<E, V>(p.out, p.out_stride, 1, 4);
  return whole && packs<E, V>(g->grad_out, g->grad_out_stride, 1, 4) && packs<E, V>(g->grad_x, g->grad_x_stride, 1, 4);
}

// Whether taps are dense, pixel after pixel, and begin at a whole word.
FASTIB_INLINE bool taps_are_dense(const InvolutionParams& p, const void* taps, const int64_t (&stride)[6]) {
  const int64_t pixel = p.G * p.K * p.K, dense[] = {p.Ho * p.Wo * pixel, p.K * p.K, p.K, 1, p.Wo * pixel, pixel};
  const int64_t sizes[] = {p.B, p.G, p.K, p.K, p.Ho, p.Wo};
  bool whole = reinterpret_cast<uintptr_t>(taps) % 4 == 0;
  for (int i = 0; i < 6; ++i) whole = whole && (stride[i] == dense[i] || sizes[i] == 1);
  return whole;
}

inline constexpr int64_t kSharedBytes = 96 << 10;  // of a block; the smallest chip has 99 KiB

template <typename Body>
bool fits(const typename Body::Params& params, int64_t parts) {
  return parts <= kThreads && Body::shared_bytes(params) <= kSharedBytes;
}

inline constexpr int kTile = 4;  // pixels of a thread

template <typename E, int K, int S, int J, typename Launch>
void forward_columns(const InvolutionParams& p, Launch&& launch) {
  launch(ColumnsForward<E, K, S, kTile / J, J>{}, p);
}

template <typename E, int K, int S, int J, typename Launch>
void backward_columns(const InvolutionGradParams& g, Launch&& launch) {
  if constexpr (S == 1)
    launch(ColumnsGradX<E, K, kTile / J, J>{}, g);
  else
    launch(AnyGradX<E>{}, g);
  launch(ColumnsGradWeight<E, K, S, kTile / J, J>{}, g);
}

template <typename E, int K, int S, typename Launch>
bool forward_tiles(const InvolutionParams& p, Launch&& launch) {
  constexpr int V = 16 / sizeof(E);
  if (p.channels_last) {
    using Body = ChannelsForward<E, K, S, V, kTile>;
    if (!channels_pack<E, V>(p, nullptr) || !taps_are_dense(p, p.weight, p.weight_stride)) return false;
    if (!fits<Body>(p, p.C / V)) return false;
    launch(Body{}, p);
  } else if (columns_pack<E, 4>(p, nullptr)) {
    forward_columns<E, K, S, 4>(p, launch);
  } else if (columns_pack<E, 2>(p, nullptr)) {
    forward_columns<E, K, S, 2>(p, launch);
  } else {
    forward_columns<E, K, S, 1>(p, launch);
  }
  return true;
}

template <typename E, int K, int S, typename Launch>
bool backward_tiles(const InvolutionGradParams& g, Launch&& launch) {
  constexpr int V = 16 / sizeof(E);
  const InvolutionParams& p = g.forward;
  if (p.channels_last) {
    using GradX = ChannelsGradX<E, K, V, kTile>;
    using GradWeight = ChannelsGradWeight<E, K, S, V, kTile * 2 / static_cast<int>(sizeof(E))>;
    if (!channels_pack<E, V>(p, &g) || !taps_are_dense(p, p.weight, p.weight_stride)) return false;
    if (!taps_are_dense(p, g.grad_weight, g.grad_weight_stride)) return false;
    if ((S == 1 && !fits<GradX>(g, p.C / V)) || !fits<GradWeight>(g, p.G)) return false;
    if constexpr (S == 1)
      launch(GradX{}, g);
    else
      launch(AnyGradX<E>{}, g);
    launch(GradWeight{}, g);
  } else if (columns_pack<E, 4>(p, &g)) {
    backward_columns<E, K, S, 4>(g, launch);
  } else if (columns_pack<E, 2>(p, &g)) {
    backward_columns<E, K, S, 2>(g, launch);
  } else {
    backward_columns<E, K, S, 1>(g, launch);
  }
  return true;
}

template <typename E, typename Launch>
void forward(const InvolutionParams& p, Launch&& launch) {
  if (p.dilation == 1 && p.K == 7 && p.stride == 1 && forward_tiles<E, 7, 1>(p, launch)) return;
  if (p.dilation == 1 && p.K == 7 && p.stride == 2 && forward_tiles<E, 7, 2>(p, launch)) return;
  if (p.dilation == 1 && p.K == 3 && p.stride == 1 && forward_tiles<E, 3, 1>(p, launch)) return;
  launch(AnyForward<E>{}, p);
}

template <typename E, typename Launch>
void backward(const InvolutionGradParams& g, Launch&& launch) {
  const InvolutionParams& p = g.forward;
  if (p.dilation == 1 && p.K == 7 && p.stride == 1 && backward_tiles<E, 7, 1>(g, launch)) return;
  if (p.dilation == 1 && p.K == 7 && p.stride == 2 && backward_tiles<E, 7, 2>(g, launch)) return;
  if (p.dilation == 1 && p.K == 3 && p.stride == 1 && backward_tiles<E, 3, 1>(g, launch)) return;
  launch(AnyGradX<E>{}, g);
  launch(AnyGradWeight<E>{}, g);
}

}  // namespace fastib::involution_cuda
