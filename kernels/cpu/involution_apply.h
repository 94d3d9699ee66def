// Involution forward, which gathers, and its gradient to x, which spreads the same products.
#pragma once

#include "involution_pack.h"
#include "involution_window.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Rows of x (or of its gradient) around a band, as vectors of channels (vectors, rows, columns, W) from row `first` and
// column -pad on; and one row of pixels.
template <bool kSpread, typename E>
class InvolutionWindow {
 public:
  using T = Compute<E>;
  static constexpr int64_t W = kLanes<T>;

  InvolutionWindow(const InvolutionParams& p, int64_t rows)
      : p(p), group(p.C / p.G), pad(p.K / 2 * p.dilation), rows(rows), function(window_function<kSpread, E>(p)) {
    const int64_t pixels = whole_tiles(p.Wo), reached = (pixels - 1) * p.stride + (p.K - 1) * p.dilation + 1;
    const int64_t held = pad + divide_up(p.Wi, W) * W;
    columns = reached > held ? reached : held;
    padded = divide_up(pixels, W) * W;
    row.K = p.K, row.stride = p.stride, row.dilation = p.dilation;
    row.columns = p.Wo, row.vectors = divide_up(group, W);
    row.x_vector = rows * columns * W, row.x_row = p.dilation * columns * W;
    row.pixels_vector = padded * W;
  }

  void lay_out(Layout& memory) {
    const int64_t taps = p.channels_last ? kPixels * divide_up(p.K * p.K, 16) * 16 : 16 * p.K * p.K;
    memory.take(x, row.vectors * rows * columns * W);
    memory.take(row.pixels, row.vectors * padded * W);
    memory.take(row.staged, taps + 16);
  }

  T* at(int64_t vector, int64_t i) { return x + ((vector * rows + i - first) * columns + pad) * W; }

  // Row t of pixels, with the rows of taps [u_begin, u_end).
  void apply(const Weights<const E>& w, int64_t t, int64_t u_begin, int64_t u_end) {
    row.w = w, row.w.p += t * w.row;
    row.ahead = t + 1 < p.Ho ? w.row : 0;
    row.u_begin = u_begin, row.u_end = u_end;
    row.x = x + (t * p.stride + u_begin * p.dilation - pad - first) * columns * W;
    function(row);
  }

  int64_t channels(int64_t vector) const { return smaller(group - vector * W, W); }

  const InvolutionParams& p;
  int64_t group, pad, rows, columns, padded, first = 0;
  WindowFunction<E> function;
  WindowRow<E> row{};
  T* x = nullptr;
};

template <typename E>
class InvolutionForward {
 public:
  explicit InvolutionForward(const InvolutionParams& p)
      : p(p), window(p, (most_rows(p, p.Ho) - 1) * p.stride + (p.K - 1) * p.dilation + 1) {}

  void lay_out(Layout& memory) { window.lay_out(memory); }

  void unit(int64_t index) {
    const Band at = band(p, index, p.Ho);
    const Weights<const E> w = weights(static_cast<const E*>(p.weight), p.weight_stride, at.b, at.g);
    const int64_t rows = (at.end - at.begin - 1) * p.stride + (p.K - 1) * p.dilation + 1, W = window.W;
    window.first = at.begin * p.stride - window.pad;
    for (int64_t c = 0; c < window.row.vectors; ++c) {
      const auto x = image(static_cast<const E*>(p.x), p.x_stride, at.b, channel(at, c), p.Hi, p.Wi);
      for (int64_t i = window.first; i < window.first + rows; ++i)
        if (i >= 0 && i < p.Hi)
          pack_row(window.at(c, i), x, i, window.channels(c));
        else
          std::memset(window.at(c, i), 0, p.Wi * W * sizeof(Compute<E>));
    }
    for (int64_t t = at.begin; t < at.end; ++t) {
      window.apply(w, t, 0, p.K);
      for (int64_t c = 0; c < window.row.vectors; ++c) {
        const auto y = image(static_cast<E*>(p.out), p.out_stride, at.b, channel(at, c), p.Ho, p.Wo);
        unpack_row(y, t, window.row.pixels + c * window.row.pixels_vector, window.channels(c));
      }
    }
  }

 private:
  int64_t channel(const Band& at, int64_t vector) const { return at.g * window.group + vector * window.W; }

  const InvolutionParams& p;
  InvolutionWindow<false, E> window;
};

// Rows of grad_out in turn, spread over the band of grad_x that a unit owns.
template <typename E>
class InvolutionGradX {
 public:
  explicit InvolutionGradX(const InvolutionGradParams& g) : g(g), p(g.forward), window(p, most_rows(p, p.Hi)) {}

  void lay_out(Layout& memory) { window.lay_out(memory); }

  void unit(int64_t index) {
    const Band at = band(p, index, p.Hi);
    if (at.begin == at.end) return;
    const Weights<const E> w = weights(static_cast<const E*>(p.weight), p.weight_stride, at.b, at.g);
    const int64_t s = p.stride, d = p.dilation;
    window.first = at.begin;
    std::memset(window.x, 0, window.row.vectors * window.row.x_vector * sizeof(Compute<E>));
    const int64_t above = at.begin + window.pad - (p.K - 1) * d;
    const int64_t last = smaller((at.end - 1 + window.pad) / s, p.Ho - 1);
    for (int64_t t = above > 0 ? divide_up(above, s) : 0; t <= last; ++t) {
      const int64_t from = at.begin + window.pad - t * s, to = at.end - 1 + window.pad - t * s;
      const int64_t u_begin = from > 0 ? divide_up(from, d) : 0, u_end = smaller(to / d + 1, p.K);
      if (u_begin >= u_end) continue;
      for (int64_t c = 0; c < window.row.vectors; ++c) {
        const auto from = image(static_cast<const E*>(g.grad_out), g.grad_out_stride, at.b, channel(at, c), p.Ho, p.Wo);
        pack_row(window.row.pixels + c * window.row.pixels_vector, from, t, window.channels(c));
      }
      window.apply(w, t, u_begin, u_end);
    }
    for (int64_t c = 0; c < window.row.vectors; ++c) {
      const auto to = image(static_cast<E*>(g.grad_x), g.grad_x_stride, at.b, channel(at, c), p.Hi, p.Wi);
      for (int64_t i = at.begin; i < at.end; ++i) unpack_row(to, i, window.at(c, i), window.channels(c));
    }
  }

 private:
  int64_t channel(const Band& at, int64_t vector) const { return at.g * window.group + vector * window.W; }

  const InvolutionGradParams& g;
  const InvolutionParams& p;
  InvolutionWindow<true, E> window;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
