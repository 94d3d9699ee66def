// CUDA bodies of involution where channels and taps are dense (channels_last), for dilation 1.
//
// A thread owns J columns of V channels of one group; neighbouring threads own neighbouring channels. A vector of x is
// read once for up to J of its V K products, taps through shared memory.
#pragma once

#include "involution_taps.h"

namespace fastib::involution_cuda {

template <typename E_, int K, int S, int V, int J>
struct ChannelsForward {
  using E = E_;
  using Params = InvolutionParams;
  static constexpr int kBlocks = 2;
  static constexpr int kPad = K / 2;
  using Tiles = BlockTiles<J>;

  FASTIB_INLINE Tiles tiles(const Params& p) { return Tiles::of(p.C / V, p.B, p.Ho, p.Wo); }
  FASTIB_INLINE int pixels(const Tiles& tiles) { return tiles.per_block * J; }
  FASTIB_INLINE int64_t threads(const Params& p) { return Tiles::threads(tiles(p)); }
  FASTIB_INLINE int64_t shared_bytes(const Params& p) { return Taps<E, K>::bytes(p, pixels(tiles(p))); }

  FASTIB_INLINE void stage(const Params& p, int64_t block, int thread, uint32_t* shared) {
    const Tiles all = tiles(p);
    Taps<E, K>::stage(p, Tiles::first_pixel(all, block), 0, pixels(all), thread, shared);
  }

  FASTIB_INLINE void run(const Params& p, int64_t block, int thread, uint32_t* shared) {
    const Tiles all = tiles(p);
    const Tile at = Tiles::tile(all, block, thread);
    if (!at.exists) return;
    const int c = at.part * V, group = c / static_cast<int>(p.C / p.G), left = at.column * S - kPad;
    const int place = static_cast<int>(at.pixel - Tiles::first_pixel(all, block));
    const E* x = static_cast<const E*>(p.x) + at.b * p.x_stride[0] + c;

    float sum[J][V] = {};
#pragma unroll 1
    for (int u = 0; u < K; ++u) {
      const int row = at.row * S - kPad + u;
      if (row < 0 || row >= p.Hi) continue;
      float w[J][K] = {};
      const auto taps = Taps<E, K>::piece(p, shared, pixels(all), u, place, group, at.pixel);
#pragma unroll
      for (int t = 0; t < J; ++t)
        if (at.column + t < p.Wo) Taps<E, K>::read(w[t], p, taps, t);
      const E* from = x + row * p.x_stride[2] + left * p.x_stride[3];
#pragma unroll
      for (int k = 0; k < (J - 1) * S + K; ++k, from += p.x_stride[3]) {
        float value[V];
        load_pack_or_zero<V>(value, from, left + k >= 0 && left + k < p.Wi);
#pragma unroll
        for (int t = 0; t < J; ++t) {
          const int v = k - t * S;
          if (v < 0 || v >= K) continue;
#pragma unroll
          for (int l = 0; l < V; ++l) sum[t][l] += w[t][v] * value[l];
        }
      }
    }
    E* out = static_cast<E*>(p.out) + at.b * p.out_stride[0] + c + at.row * p.out_stride[2];
#pragma unroll
    for (int t = 0; t < J; ++t)
      if (at.column + t < p.Wo) store_pack<V>(out + (at.column + t) * p.out_stride[3], sum[t]);
  }

  FASTIB_INLINE void flush(const Params&, int64_t, int, uint32_t*) {}
};

// Stride 1.
template <typename E_, int K, int V, int J>
struct ChannelsGradX {
  using E = E_;
  using Params = InvolutionGradParams;
  static constexpr int kBlocks = 4;
  static constexpr int kPad = K / 2;
  using Tiles = BlockTiles<J>;

  FASTIB_INLINE Tiles tiles(const Params& g) {
    const InvolutionParams& p = g.forward;
    return Tiles::of(p.C / V, p.B, p.Hi, p.Wi);
  }
  FASTIB_INLINE int pixels(const Tiles& tiles) { return tiles.per_block * J + 2 * kPad; }
  FASTIB_INLINE int64_t threads(const Params& g) { return Tiles::threads(tiles(g)); }
  FASTIB_INLINE int64_t shared_bytes(const Params& g) { return Taps<E, K>::bytes(g.forward, pixels(tiles(g))); }

  // Row u of the taps is that of the pixels kPad - u rows further down.
  FASTIB_INLINE void stage(const Params& g, int64_t block, int thread, uint32_t* shared) {
    const Tiles all = tiles(g);
    const int64_t first = Tiles::first_pixel(all, block) - kPad + int64_t(kPad) * all.W;
    Taps<E, K>::stage(g.forward, first, -all.W, pixels(all), thread, shared);
  }

  FASTIB_INLINE void run(const Params& g, int64_t block, int thread, uint32_t* shared) {
    const InvolutionParams& p = g.forward;
    const Tiles all = tiles(g);
    const Tile at = Tiles::tile(all, block, thread);
    if (!at.exists) return;
    const int c = at.part * V, group = c / static_cast<int>(p.C / p.G);
    const int place = static_cast<int>(at.pixel - Tiles::first_pixel(all, block));
    const E* grad = static_cast<const E*>(g.grad_out) + at.b * g.grad_out_stride[0] + c;

    float sum[J][V] = {};
#pragma unroll 1
    for (int u = 0; u < K; ++u) {
      const int row = at.row + kPad - u;
      if (row < 0 || row >= p.Ho) continue;
      const int64_t pixel = at.pixel + int64_t(kPad - u) * all.W - kPad;
      const auto taps = Taps<E, K>::piece(p, shared, pixels(all), u, place, group, pixel);
      const E* from = grad + row * g.grad_out_stride[2] + (at.column - kPad) * g.grad_out_stride[3];
#pragma unroll
      for (int k = 0; k < J - 1 + K; ++k, from += g.grad_out_stride[3]) {
        if (at.column + k < kPad || at.column + k >= p.Wo + kPad) continue;
        float value[V], w[K];
        load_pack<V>(value, from);
        Taps<E, K>::read(w, p, taps, k);
#pragma unroll
        for (int t = 0; t < J; ++t) {
          const int v = t + K - 1 - k;
          if (v < 0 || v >= K) continue;
#pragma unroll
          for (int l = 0; l < V; ++l) sum[t][l] += w[v] * value[l];
        }
      }
    }
    E* to = static_cast<E*>(g.grad_x) + at.b * g.grad_x_stride[0] + c + at.row * g.grad_x_stride[2];
#pragma unroll
    for (int t = 0; t < J; ++t)
      if (at.column + t < p.Wi) store_pack<V>(to + (at.column + t) * g.grad_x_stride[3], sum[t]);
  }

  FASTIB_INLINE void flush(const Params&, int64_t, int, uint32_t*) {}
};

// A thread owns a group's taps at J columns, and walks over the group's channels V at a time.
template <typename E_, int K, int S, int V, int J>
struct ChannelsGradWeight {
  using E = E_;
  using Params = InvolutionGradParams;
  static constexpr int kBlocks = 2;
  static constexpr int kPad = K / 2;
  using Tiles = BlockTiles<J>;

  FASTIB_INLINE Tiles tiles(const Params& g) {
    const InvolutionParams& p = g.forward;
    return Tiles::of(p.G, p.B, p.Ho, p.Wo);
  }
  FASTIB_INLINE int64_t threads(const Params& g) { return Tiles::threads(tiles(g)); }
  FASTIB_INLINE int64_t shared_bytes(const Params& g) {  // one more: taps may begin within a word
    return (tiles(g).per_block * J * g.forward.G * (K * K) + 1) * sizeof(E) / 4 * 4 + 4;
  }
  // Where the taps of a block begin in grad_weight.
  FASTIB_INLINE int64_t first_tap(const Params& g, int64_t block) {
    return Tiles::first_pixel(tiles(g), block) * g.forward.G * (K * K);
  }

  FASTIB_INLINE void stage(const Params&, int64_t, int, uint32_t*) {}

  FASTIB_INLINE void run(const Params& g, int64_t block, int thread, uint32_t* shared) {
    const InvolutionParams& p = g.forward;
    const int group = static_cast<int>(p.C / p.G), pixel_taps = static_cast<int>(p.G) * (K * K);
    const Tile at = Tiles::tile(tiles(g), block, thread);
    if (!at.exists) return;
    const int c0 = at.part * group, left = at.column * S - kPad;
    const E* x = static_cast<const E*>(p.x) + at.b * p.x_stride[0] + c0;
    const E* grad = static_cast<const E*>(g.grad_out) + at.b * g.grad_out_stride[0] + c0 +
                    at.row * g.grad_out_stride[2] + at.column * g.grad_out_stride[3];
    const int64_t begin = first_tap(g, block);
    E* to = reinterpret_cast<E*>(shared) + (sizeof(E) == 2 ? begin & 1 : 0) + (at.pixel * pixel_taps - begin) +
            at.part * (K * K);

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
          const E* from = x + row * p.x_stride[2] + left * p.x_stride[3] + c;
#pragma unroll
          for (int k = 0; k < (J - 1) * S + K; ++k, from += p.x_stride[3]) {
            float value[V];
            load_pack_or_zero<V>(value, from, left + k >= 0 && left + k < p.Wi);
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
          if (at.column + t < p.Wo) store_float(to + t * pixel_taps + u * K + v, sum[v][t]);
    }
  }

  FASTIB_INLINE void flush(const Params& g, int64_t block, int thread, uint32_t* shared) {
    const int64_t begin = first_tap(g, block), end = first_tap(g, block + 1);
    write_words(static_cast<E*>(g.grad_weight), begin, static_cast<int>(end - begin), thread, shared);
  }
};

}  // namespace fastib::involution_cuda
