// Involution forward, and its gradient to x, which is the same sum over taps with the weights of other pixels.
#pragma once

#include "involution_runs.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

template <typename M, typename E>
class InvolutionForward {
 public:
  explicit InvolutionForward(const InvolutionParams& p) : p(p), group(p.C / p.G), pad(p.K / 2 * p.dilation) {
    const int64_t halo = (p.K - 1) * p.dilation, taps = WeightRuns<M, false>::units(p.K);
    rows = (most_rows(p, p.Ho) - 1) * p.stride + halo + 1;
    x = {nullptr, 0, 0, -pad, (p.Wo - 1) * p.stride + halo + 1};
    const int64_t pitch = p.channels_last ? p.Wo : divide_up(p.Wo, W) * W;
    staged = {nullptr, p.K, taps, p.Wo, 0, pitch, p.channels_last};
    runs.init(p.K, taps, p.stride, M::paired ? 2 : p.dilation);
    runs.row.w_pixel = kStaged ? staged.pixel_step() : p.weight_stride[5];
    runs.row.w_tap = kStaged ? staged.tap_step() : p.weight_stride[3];
    runs.row.out_step = W;
  }

  void lay_out(Layout& memory) {
    memory.take(x.dst, rows * x.columns * W);
    memory.take(out, p.Wo * W);
    if (kStaged) memory.take(staged.dst, p.K * staged.run_step() + W);
    if (M::paired) memory.take(staged.masks, staged.masks_needed(p.K, p.Wo));
    if (staged.masks) staged.make_masks();
    runs.lay_out(memory);
  }

  void unit(int64_t index) {
    const Band at = band(p, index, p.Ho);
    const Weights<const E> w = weights(static_cast<const E*>(p.weight), p.weight_stride, at.b, at.g);
    runs.clear();
    for (int64_t u = 0; u < p.K; ++u)
      runs.add(u * p.dilation * x.columns * W, u * (kStaged ? staged.run_step() : p.weight_stride[2]));
    x.first_row = at.begin * p.stride - pad;
    x.rows = (at.end - at.begin - 1) * p.stride + (p.K - 1) * p.dilation + 1;
    for (int64_t c = 0; c < group; c += W) {
      const int64_t channels = smaller(group - c, W), first = at.g * group + c;
      x.pack(image(static_cast<const E*>(p.x), p.x_stride, at.b, first, p.Hi, p.Wi), channels);
      const Image<E> y = image(static_cast<E*>(p.out), p.out_stride, at.b, first, p.Ho, p.Wo);
      for (int64_t i = at.begin; i < at.end; ++i) {
        const Unit* from = nullptr;
        if constexpr (kStaged) {
          for (int64_t u = 0; u < p.K; ++u) staged.stage(u, w, u, i);
          from = staged.dst;
        } else {
          from = w.at(0, 0, i, 0);
        }
        look_ahead(runs.row, p, w, 0, smaller(i + 1, p.Ho - 1), 0);
        runs(x.at(i * p.stride - pad, -pad), from, out, p.Wo);
        unpack_row(y, i, out, channels);
      }
    }
  }

 private:
  using Unit = typename M::Unit;
  using Sum = typename M::Sum;
  static constexpr int64_t W = kLanes<Sum>;
  static constexpr bool kStaged = M::paired || sizeof(E) != sizeof(Unit);

  const InvolutionParams& p;
  int64_t group, pad, rows;
  ChannelVectors<M> x;
  WeightRuns<M, false> staged;
  Runs<M> runs;
  Sum* out = nullptr;
};

// Row and column q of x meet tap v in row and column (q + pad - v d) / s of grad_out, where that divides. Columns of
// one class, q = a s + class, have the same taps; from the last tap down they lie `ahead` apart.
template <typename M, typename E>
class InvolutionGradX {
 public:
  explicit InvolutionGradX(const InvolutionGradParams& g) : g(g), p(g.forward), group(p.C / p.G) {
    const int64_t s = p.stride, d = p.dilation;
    pad = p.K / 2 * d, left = divide_up(pad, s);
    skip = s / common_divisor(s, d), ahead = d / common_divisor(s, d);
    rows = smaller(p.Ho, (most_rows(p, p.Hi) + (p.K - 1) * d) / s + 2);
    grad = {nullptr, 0, 0, -left, left + p.Wo + (s - 1 + pad) / s};
    const int64_t pitch = p.channels_last ? grad.columns : left + divide_up(p.Wo, W) * W + (s - 1 + pad) / s;
    staged = {nullptr,        p.K, WeightRuns<M, true>::padded_units(p.K, p.channels_last), p.Wo, left, pitch,
              p.channels_last};
  }

  void lay_out(Layout& memory) {
    memory.take(grad.dst, rows * grad.columns * W);
    memory.take(out, p.Wi * W);
    memory.take(staged.dst, p.K * staged.run_step() + W);
    if (M::paired) memory.take(staged.masks, staged.masks_needed(p.K, p.Wo));
    if (staged.masks) staged.make_masks();
    memory.take(row_of_run, p.K);
    memory.take(classes, p.stride);
    if (classes)
      for (int64_t q = 0; q < p.stride; ++q) new (classes + q) Class(), init_class(q);
    Runs<M> sizes;
    sizes.init(p.K, p.K, 1, 1);
    for (int64_t q = 0; q < p.stride; ++q) (classes ? classes[q].runs : sizes).lay_out(memory);
  }

  void unit(int64_t index) {
    const Band at = band(p, index, p.Hi);
    if (at.begin == at.end) return;
    const int64_t s = p.stride, d = p.dilation;
    const Weights<const E> w = weights(static_cast<const E*>(p.weight), p.weight_stride, at.b, at.g);
    const int64_t first = at.begin + pad - (p.K - 1) * d, last = (at.end - 1 + pad) / s;
    grad.first_row = first > 0 ? divide_up(first, s) : 0;
    grad.rows = smaller(last, p.Ho - 1) - grad.first_row + 1;
    for (int64_t c = 0; c < group; c += W) {
      const int64_t channels = smaller(group - c, W), channel = at.g * group + c;
      grad.pack(image(static_cast<const E*>(g.grad_out), g.grad_out_stride, at.b, channel, p.Ho, p.Wo), channels);
      const Image<E> to = image(static_cast<E*>(g.grad_x), g.grad_x_stride, at.b, channel, p.Hi, p.Wi);
      for (int64_t i = at.begin; i < at.end; ++i) {
        stage_row(w, i);
        for (int64_t q = 0; q < s && q < p.Wi; ++q) apply(classes[q], q, w);
        unpack_row(to, i, out, channels);
      }
    }
  }

 private:
  using Unit = typename M::Unit;
  using Sum = typename M::Sum;
  static constexpr int64_t W = kLanes<Sum>;

  struct Class {
    int64_t last_tap, offset;  // of the last tap: its index, and its column less a
    int64_t pixels;
    Runs<M> runs;
  };

  void init_class(int64_t q) {
    const int64_t s = p.stride, d = p.dilation;
    Class& made = classes[q];
    int64_t tap = p.K - 1, taps = 0;
    while (tap >= 0 && (q + pad - tap * d) % s) --tap;
    if (tap >= 0) taps = tap / skip + 1;
    made.last_tap = tap, made.offset = tap < 0 ? 0 : (q + pad - tap * d) / s;
    made.pixels = divide_up(p.Wi - q, s);
    made.runs.init(p.K, M::paired ? WeightRuns<M, true>::units(taps) : taps, 1, M::paired ? 2 : ahead);
    made.runs.row.out_step = s * W;
    made.runs.row.w_pixel = staged.pixel_step();
    if constexpr (M::paired) {
      made.runs.row.w_tap = p.channels_last ? staged.tap_step() + 2 * staged.pixel_step() : staged.tap_step();
    } else {
      made.runs.row.w_tap = ahead * staged.pixel_step() - skip * staged.tap_step();
    }
  }

  // The weights that row i of x meets: a run for each row of grad_out.
  void stage_row(const Weights<const E>& w, int64_t i) {
    count = 0;
    for (int64_t u = 0; u < p.K; ++u) {
      const int64_t t = i + pad - u * p.dilation;
      if (t < 0 || t % p.stride || t / p.stride >= p.Ho) continue;
      staged.stage(count, w, u, t / p.stride);
      if (!count) first_u = u, next_row = smaller(t / p.stride + 1, p.Ho - 1);
      row_of_run[count++] = t / p.stride;
    }
  }

  void apply(Class& of, int64_t q, const Weights<const E>& w) {
    of.runs.clear();
    look_ahead(of.runs.row, p, w, first_u, next_row, 1);
    for (int64_t r = 0; r < count; ++r) {
      const Unit* from = grad.at(row_of_run[r], of.offset);
      if constexpr (M::paired) {
        of.runs.add(from - grad.dst, staged.at(r, 0, p.channels_last ? of.offset : -left));
      } else {
        of.runs.add(from - grad.dst, staged.at(r, of.last_tap, of.offset));
      }
    }
    of.runs(grad.dst, staged.dst, out + q * W, of.pixels);
  }

  const InvolutionGradParams& g;
  const InvolutionParams& p;
  int64_t group, pad, left, skip, ahead, rows, count = 0, first_u = 0, next_row = 0;
  ChannelVectors<M> grad;
  WeightRuns<M, true> staged;
  Sum* out = nullptr;
  int64_t* row_of_run = nullptr;
  Class* classes = nullptr;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
