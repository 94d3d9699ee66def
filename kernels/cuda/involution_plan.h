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
    if (!channels_pack<E, V>(p, nullptr)) return false;
    launch(ChannelsForward<E, K, S, V, kTile>{}, p);
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
    if (!channels_pack<E, V>(p, &g)) return false;
    if constexpr (S == 1)
      launch(ChannelsGradX<E, K, V, kTile>{}, g);
    else
      launch(AnyGradX<E>{}, g);
    launch(ChannelsGradWeight<E, K, S, V, kTile>{}, g);
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
