// Involution forward, which gathers, and its gradient to x, which spreads the same products.
#pragma once

#include "involution_pack.h"
#include "involution_window.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Rows of x (or of its gradient) around a band, as vectors of channels (groups, vectors, rows, columns, W) from row
// `first` and column -pad on; and one row of pixels.
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
    memory.take(x, involution_groups(p) * row.vectors * row.x_vector, !kSpread);
    memory.take(row.pixels, row.vectors * padded * W);
    memory.take(row.staged, taps + 16);
  }

  // Row i of group g, counted from the first of the unit.
  T* at(int64_t g, int64_t vector, int64_t i) {
    return x + (g * row.vectors + vector) * row.x_vector + ((i - first) * columns + pad) * W;
  }

  // Row t of pixels, with the rows of taps [u_begin, u_end).
  void apply(const Weights<const E>& w, int64_t ahead, int64_t g, int64_t t, int64_t u_begin, int64_t u_end) {
    row.w = w, row.w.p += t * w.row;
    row.ahead = ahead;
    row.u_begin = u_begin, row.u_end = u_end;
    row.x = at(g, 0, t * p.stride + u_begin * p.dilation - pad) - pad * W;
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

  void unit(int64_t index, int64_t later) {
    const Band at = band(p, index, p.Ho), next = band(p, later, p.Ho);
    const E* const all = static_cast<const E*>(p.x);
    const Upcoming<E> next_x{all, p.x_stride, x_around(p, later), window.group, p.Hi, p.Wi, at.end - at.begin};
    const int64_t rows = (at.end - at.begin - 1) * p.stride + (p.K - 1) * p.dilation + 1, W = window.W;
    window.first = at.begin * p.stride - window.pad;
    for (int64_t i = window.first; i < window.first + rows; ++i)
      for (int64_t g = 0; g < at.groups; ++g)
        for (int64_t c = 0; c < window.row.vectors; ++c) {
          const auto x = image(all, p.x_stride, at.b, channel(at, g, c), p.Hi, p.Wi);
          if (i >= 0 && i < p.Hi)
            pack_row(window.at(g, c, i), x, i, window.channels(c));
          else
            std::memset(window.at(g, c, i), 0, p.Wi * W * sizeof(Compute<E>));
        }
    for (int64_t t = at.begin; t < at.end; ++t)
      for (int64_t g = 0; g < at.groups; ++g) {
        next_x.ask(t - at.begin, g);
        window.apply(weights(static_cast<const E*>(p.weight), p.weight_stride, at.b, at.g + g),
                     weights_ahead<E>(p, at, next, t), g, t, 0, p.K);
        for (int64_t c = 0; c < window.row.vectors; ++c) {
          const auto y = image(static_cast<E*>(p.out), p.out_stride, at.b, channel(at, g, c), p.Ho, p.Wo);
          unpack_row(y, t, window.row.pixels + c * window.row.pixels_vector, window.channels(c));
        }
      }
  }

 private:
  int64_t channel(const Band& at, int64_t g, int64_t vector) const {
    return (at.g + g) * window.group + vector * window.W;
  }

  const InvolutionParams& p;
  InvolutionWindow<false, E> window;
};

// Rows of grad_out in turn, spread over the band of grad_x that a unit owns.
template <typename E>
class InvolutionGradX {
 public:
  explicit InvolutionGradX(const InvolutionGradParams& g) : g(g), p(g.forward), window(p, most_rows(p, p.Hi)) {}

  void lay_out(Layout& memory) { window.lay_out(memory); }

  void unit(int64_t index, int64_t later) {
    const Band at = band(p, index, p.Hi), pixels = pixels_around(p, index), next = pixels_around(p, later);
    const Upcoming<E> own_x{static_cast<const E*>(p.x), p.x_stride, x_around(p, index), window.group, p.Hi, p.Wi,
                            pixels.end - pixels.begin};
    const int64_t s = p.stride, d = p.dilation;
    window.first = at.begin;
    std::memset(window.x, 0, at.groups * window.row.vectors * window.row.x_vector * sizeof(Compute<E>));
    for (int64_t t = pixels.begin; t < pixels.end; ++t) {
      const int64_t from = at.begin + window.pad - t * s, to = at.end - 1 + window.pad - t * s;
      const int64_t u_begin = from > 0 ? divide_up(from, d) : 0, u_end = smaller(to / d + 1, p.K);
      if (u_begin >= u_end) continue;
      for (int64_t k = 0; k < at.groups; ++k) {
        for (int64_t c = 0; c < window.row.vectors; ++c) {
          const auto from =
              image(static_cast<const E*>(g.grad_out), g.grad_out_stride, at.b, channel(at, k, c), p.Ho, p.Wo);
          pack_row(window.row.pixels + c * window.row.pixels_vector, from, t, window.channels(c));
        }
        own_x.ask(t - pixels.begin, k);
        window.apply(weights(static_cast<const E*>(p.weight), p.weight_stride, at.b, at.g + k),
                     weights_ahead<E>(p, pixels, next, t), k, t, u_begin, u_end);
      }
    }
    for (int64_t i = at.begin; i < at.end; ++i)
      for (int64_t k = 0; k < at.groups; ++k)
        for (int64_t c = 0; c < window.row.vectors; ++c) {
          const auto to = image(static_cast<E*>(g.grad_x), g.grad_x_stride, at.b, channel(at, k, c), p.Hi, p.Wi);
          unpack_row(to, i, window.at(k, c, i), window.channels(c));
        }
  }

 private:
  int64_t channel(const Band& at, int64_t k, int64_t vector) const {
    return (at.g + k) * window.group + vector * window.W;
  }

  const InvolutionGradParams& g;
  const InvolutionParams& p;
  InvolutionWindow<true, E> window;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
