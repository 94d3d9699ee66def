// Involution's gradient to the weight: the products of grad_out with the x of each tap, summed over a group's channels.
#pragma once

#include "involution_dot.h"
#include "involution_pack.h"
#include "stream.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

template <typename E>
class InvolutionGradWeight {
 public:
  explicit InvolutionGradWeight(const InvolutionGradParams& g)
      : g(g), p(g.forward), group(p.C / p.G), planes(summed<U>(group)) {
    const int64_t s = p.stride, d = p.dilation, halo = (p.K - 1) * d;
    pad = p.K / 2 * d;
    rows = most_rows(p, p.Ho);
    const int64_t width = divide_up(p.Wo, W) * W;
    x = {nullptr, 0, s, divide_up(width + halo / s + 2, W) * W, 0, (rows - 1) * s + halo + 1, -pad};
    grad = {nullptr, 0, 1, width, 0, rows, 0};
    x.plane_step = spread(x.rows * x.row_step());
    grad.plane_step = spread(grad.rows * grad.row_step());
    // Pixels of a tile that lie `apart` rows from each other read rows of x that are `between` apart, as taps do, or 2
    // of it.
    const int64_t shared = common_divisor(s, d);
    between = d;
    if (d == shared && s / shared <= 2)
      apart = 1, pattern = s / shared;
    else if (s == shared)
      apart = d / shared, pattern = 1;
    else
      apart = 1, pattern = 0;
  }

  void lay_out(Layout& memory) {
    const int64_t all = involution_groups(p) * planes;
    memory.take(x.dst, all * x.plane_step + W);
    memory.take(grad.dst, all * grad.plane_step + W);
    memory.take(x_column, p.K);
    if (x_column)
      for (int64_t v = 0, q = 0; v < p.K; ++v, q += p.dilation) x_column[v] = q % p.stride * x.width + q / p.stride;
    if (p.channels_last) memory.take(out, kDotRows * taps() * W, false);
    if (streamed())
      memory.take(rows_out, p.channels_last ? kDotRows * W * p.G * p.K * p.K : p.K * p.K * streamed_rows() * p.Wo,
                  false);
  }

  void unit(int64_t index, int64_t later) {
    at = band(p, index, p.Ho), next = pixels_around(p, later);
    x.first_row = at.begin * p.stride - pad;
    x.rows = (at.end - at.begin - 1) * p.stride + (p.K - 1) * p.dilation + 1;
    grad.first_row = at.begin, grad.rows = at.end - at.begin;
    x.pack(image(static_cast<const E*>(p.x), p.x_stride, at.b, at.g * group, p.Hi, p.Wi), at.groups, group);
    grad.pack(image(static_cast<const E*>(g.grad_out), g.grad_out_stride, at.b, at.g * group, p.Ho, p.Wo), at.groups,
              group);
    const Weights<E> all = weights(static_cast<E*>(g.grad_weight), g.grad_weight_stride, at.b, at.g);
    to = all;
    if (streamed() && !p.channels_last) {
      for (int64_t i = at.begin; i < at.end; i += streamed_rows()) {
        const int64_t n = smaller(streamed_rows(), at.end - i), step = streamed_rows() * p.Wo;
        to = {rows_out - i * p.Wo, p.K * step, step, p.Wo, 1};
        some_rows(i, i + n);
        for (int64_t tap = 0; tap < p.K * p.K; ++tap)
          stream_bytes(all.at(tap / p.K, tap % p.K, i, 0), rows_out + tap * step, n * p.Wo * sizeof(E));
      }
      end_stream();
      return;
    }
    for (int64_t phase = 0; phase < apart; ++phase) some_rows(at.begin + phase, at.end);
    if (streamed()) end_stream();
  }

 private:
  using T = Compute<E>;
  using U = Operand<E>;
  static constexpr int64_t W = kLanes<T>;

  // A step between planes that spreads them over the sets of a cache: an odd number of vectors.
  static int64_t spread(int64_t units) { return (divide_up(units, W) | 1) * W; }

  // Whether results go past the caches: more than they would hold, in rows that follow each other in memory.
  bool streamed() const {
    const int64_t bytes = p.B * p.G * p.K * p.K * p.Ho * p.Wo * static_cast<int64_t>(sizeof(E));
    if (!kCanStream || bytes < kStreamedBytes) return false;
    if (p.channels_last) return involution_groups(p) == p.G && g.grad_weight_stride[5] == p.G * p.K * p.K;
    return apart == 1 && g.grad_weight_stride[4] == p.Wo;
  }

  // Rows that are streamed together: long enough to be whole lines of the cache for the most part.
  int64_t streamed_rows() const { return divide_up(1024, p.Wo * sizeof(E) * kDotRows) * kDotRows; }

  // Rows i, i + apart, ... below `end`.
  void some_rows(int64_t i, int64_t end) {
    if (pattern)
      for (; i + (kDotRows - 1) * apart < end; i += kDotRows * apart) tiles<kDotRows>(i);
    if (pattern && kDotRows > 3 && i + apart < end) tiles<2>(i), i += 2 * apart;
    for (; i < end; i += apart) tiles<1>(i);
  }

  // Rows i, i + apart, ... of all columns.
  template <int R>
  void tiles(int64_t i) {
    const Upcoming<E> next_grad{
        static_cast<const E*>(g.grad_out), g.grad_out_stride, next, group, p.Ho, p.Wo, at.end - at.begin};
    for (int64_t r = 0; r < R; ++r)
      for (int64_t k = 0; k < at.groups; ++k) next_grad.ask(i - at.begin + r * apart, k);
    for (int64_t j = 0; j < p.Wo; j += W) {
      const int64_t n = smaller(p.Wo - j, W);
      if (p.channels_last)
        dense_taps<R>(i, j, n);
      else
        window<R>(0, i, j, to.at(0, 0, i, j), n, to.u, to.v, apart * to.row);
    }
  }

  // Taps of n pixels in each of R rows, group by group.
  template <int R>
  void dense_taps(int64_t i, int64_t j, int64_t n) {
    const bool stream = streamed();
    const int64_t all = p.K * p.K, line = 64 / sizeof(E), pixel = stream ? p.G * all : to.column,
                  row = stream ? W * pixel : apart * to.row;
    E* const first = stream ? rows_out : to.at(0, 0, i, j);
    for (int64_t k = 0; k < at.groups; ++k) {
      E* const taps_out = first + k * (stream ? all : g.grad_weight_stride[1]);
      if (!stream)
        for (int r = 0; r < R; ++r)  // what flush will write, in the second cache
          for (int64_t l = 0; l < n; ++l)
            for (int64_t tap = 0; tap < all - 1 + line; tap += line)
              __builtin_prefetch(taps_out + r * row + l * pixel + smaller(tap, all - 1), 1, 2);
      window<R>(k, i, j, out, W, p.K * W, W, taps() * W);
      for (int r = 0; r < R; ++r) flush(out + r * taps() * W, n, taps_out + r * row, pixel);
    }
    if (stream)
      for (int r = 0; r < R; ++r) stream_bytes(to.at(0, 0, i + r * apart, j), first + r * row, n * pixel * sizeof(E));
  }

  template <int R, typename Out>
  void window(int64_t k, int64_t i, int64_t j, Out* sums, int64_t lanes, int64_t u, int64_t v, int64_t row) const {
    const DotWindow<U, Out> dots{
        p.K,
        planes,
        lanes,
        x.dst + k * planes * x.plane_step + (i * p.stride - pad - x.first_row) * x.row_step() + j,
        grad.dst + k * planes * grad.plane_step + (i - grad.first_row) * grad.row_step() + j,
        x_column,
        x.plane_step,
        between * x.row_step(),
        grad.plane_step,
        apart * grad.row_step(),
        sums,
        u,
        v,
        row};
    if (pattern == 2)
      dot_window<U, Out, 2, R>(dots);
    else
      dot_window<U, Out, 1, R>(dots);
  }

  int64_t taps() const { return divide_up(p.K * p.K, W) * W; }  // of one pixel, in whole vectors

  // Vectors of pixels (taps, lanes) -> the dense taps of n pixels. Taps often are one more than fill whole vectors.
  void flush(const T* sums, int64_t n, E* pixels, int64_t step) const {
    const int64_t all = p.K * p.K;
    int64_t tap = 0;
    for (; tap + 1 < all; tap += W, sums += W * W) {
      Vec<T> square[W];
      for (int l = 0; l < W; ++l) square[l] = load(sums + l * W);
      transpose<T>(square);
      E* to = pixels + tap;
      for (int64_t l = 0; l < n; ++l, to += step) store_part(to, square[l], all - tap);
    }
    if (tap < all)
      for (int64_t l = 0; l < n; ++l) store_float(pixels + l * step + tap, sums[l]);
  }

  const InvolutionGradParams& g;
  const InvolutionParams& p;
  int64_t group, planes, pad, rows, apart, between, pattern;
  ChannelPlanes<U> x, grad;
  Weights<E> to{};
  Band at{}, next{};
  int64_t* x_column = nullptr;
  T* out = nullptr;
  E* rows_out = nullptr;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
