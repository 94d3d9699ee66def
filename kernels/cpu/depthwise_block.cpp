// The depth-wise block for one instruction set; see depthwise_block.h.
//
// A unit copies its channels of an image into scratch, row by row as they lie in memory, and goes on with one vector of
// channels at a time, whose maps stay in the first cache: s with a border of zeros around it, so that the convolution
// has no special cases. What is left is memory: x is read three times forward, x and the gradient three times backward.
#include "depthwise_block.h"

#include <new>

#include "gelu.h"
#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

thread_local Scratch scratch;

// One vector of channels of a norm.
template <typename T>
struct Norm {
  Vec<T> shift, inv, gamma, beta;
  Vec<T> hat(Vec<T> y) const { return (y + shift) * inv; }
  Vec<T> affine(Vec<T> hat) const { return hat * gamma + beta; }
  // The gradient to y from those after the affine map and their means.
  Vec<T> gradient(Vec<T> d, Vec<T> hat, Vec<T> mean_d, Vec<T> mean_d_hat) const {
    return gamma * inv * (d - mean_d - hat * mean_d_hat);
  }
};

// Scratch of one unit, its channels [first, first + count), and what is done with one vector of them.
template <typename E>
struct Unit {
  using T = Compute<E>;
  using V = Vec<T>;
  static constexpr int W = kLanes<T>;
  const DepthwiseBlockParams& p;
  int64_t first = 0, count = 0, columns = 0, lanes = W;  // lanes: of the current vector
  int64_t channel = 0;                                   // where the current vector begins
  const int64_t places, line;
  T *x, *grad;                 // (columns, places, W)
  T *s, *back, *conv, *slope;  // (places, W); the first two with a border

  // Throws std::bad_alloc.
  explicit Unit(const DepthwiseBlockParams& params) : p(params), places(p.grid_h * p.grid_w), line((p.grid_w + 2) * W) {
    const int64_t all = places * kUnitChannels, plain = places * W, bordered = (p.grid_h + 2) * line;
    const int64_t bytes =
        2 * (Scratch::padded_bytes<T>(all) + Scratch::padded_bytes<T>(plain) + Scratch::padded_bytes<T>(bordered));
    if (!scratch.reserve(bytes)) throw std::bad_alloc();
    x = scratch.take<T>(all), grad = scratch.take<T>(all);
    conv = scratch.take<T>(plain), slope = scratch.take<T>(plain);
    s = scratch.take<T>(bordered), back = scratch.take<T>(bordered);
    for (int64_t i = 0; i < bordered; ++i) s[i] = back[i] = T(0);
  }

  void take_block(int64_t block) {
    first = block * kUnitChannels;
    count = smaller(kUnitChannels, p.C - first);
    columns = divide_up(count, W);
  }

  void take_column(int64_t v) {
    channel = first + v * W;
    lanes = smaller(W, count - v * W);
  }

  // Into scratch, row by row. `ahead`: elements from here to what the next unit reads; `written`: what this one writes
  // in the end, or null. Both are asked for already.
  void read(T* to, const void* tensor, int64_t image, int64_t ahead, void* written) const {
    const int64_t start = image * places * p.C + first;
    const E* from = static_cast<const E*>(tensor) + start;
    E* target = static_cast<E*>(written) + start;
    for (int64_t place = 0; place < places; ++place, from += p.C, target += p.C)
      for (int64_t v = 0; v < columns; ++v) {
        store(to + (v * places + place) * W, load_part(from + v * W, smaller(W, count - v * W)));
        __builtin_prefetch(from + v * W + ahead, 0, 2);
        if (written) __builtin_prefetch(target + v * W, 1, 2);
      }
  }

  void write(void* tensor, const T* from, int64_t image) const {
    E* to = static_cast<E*>(tensor) + image * places * p.C + first;
    for (int64_t place = 0; place < places; ++place, to += p.C)
      for (int64_t v = 0; v < columns; ++v)
        store_part(to + v * W, load(from + (v * places + place) * W), smaller(W, count - v * W));
  }

  T* column(T* of, int64_t v) const { return of + v * places * W; }
  V numbers(const void* array) const { return load_part(static_cast<const T*>(array) + channel, lanes); }
  Norm<T> norm(const BlockNorm& of) const {
    return {numbers(of.shift), numbers(of.inv), numbers(of.gamma), numbers(of.beta)};
  }
  void taps(V (&tap)[9]) const {
    for (int k = 0; k < 9; ++k) tap[k] = numbers(static_cast<const T*>(p.weight) + k * p.C);
  }

  // s, and its slope where kSlope, of a column of x.
  template <bool kSlope>
  void activate(const T* from) {
    const Norm<T> norm1 = norm(p.norm1);
    T *to = s + line + W, *side = slope;
    for (int64_t i = 0; i < p.grid_h; ++i, to += 2 * W)
      for (int64_t j = 0; j < p.grid_w; ++j, from += W, to += W, side += W) {
        const Gelu<T> y = gelu(norm1.affine(norm1.hat(load(from))));
        store(to, y.value);
        if constexpr (kSlope) store(side, y.slope);
      }
  }

  // conv(s), without its bias.
  void convolve() {
    V tap[9];
    taps(tap);
    const T* corner = s;
    T* to = conv;
    for (int64_t i = 0; i < p.grid_h; ++i, corner += 2 * W)
      for (int64_t j = 0; j < p.grid_w; ++j, corner += W, to += W) {
        V sum{};
#pragma GCC unroll 9
        for (int k = 0; k < 9; ++k) sum += tap[k] * load(corner + k / 3 * line + k % 3 * W);
        store(to, sum);
      }
  }

  // Mean of a column, and the sum of squares about it.
  void statistics(const T* of, int64_t image) const {
    V sum{}, squares{};
    for (int64_t place = 0; place < places; ++place) sum += load(of + place * W);
    const V mean = sum * (T(1) / static_cast<T>(places));
    for (int64_t place = 0; place < places; ++place) {
      const V off = load(of + place * W) - mean;
      squares += off * off;
    }
    T* to = static_cast<T*>(p.partial) + 2 * image * p.C + channel;
    store_part(to, mean, lanes);
    store_part(to + p.C, squares, lanes);
  }

  // GELU(norm2(conv)) + s.
  void combine(T* to) const {
    const Norm<T> norm2 = norm(p.norm2);
    const T *inner = s + line + W, *from = conv;
    for (int64_t i = 0; i < p.grid_h; ++i, inner += 2 * W)
      for (int64_t j = 0; j < p.grid_w; ++j, inner += W, from += W, to += W)
        store(to, gelu(norm2.affine(norm2.hat(load(from)))).value + load(inner));
  }
};

template <typename E>
void forward(const DepthwiseBlockParams& p, ForwardPass pass, int64_t begin, int64_t end) {
  const int64_t blocks = divide_up(p.C, kUnitChannels);
  Unit<E> unit(p);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t image = u / blocks;
    unit.take_block(u % blocks);
    unit.read(unit.x, p.x, image, kUnitChannels, pass == ForwardPass::output ? p.out : nullptr);
    for (int64_t v = 0; v < unit.columns; ++v) {
      auto* column = unit.column(unit.x, v);
      unit.take_column(v);
      if (pass == ForwardPass::x_statistics) {
        unit.statistics(column, image);
        continue;
      }
      unit.template activate<false>(column);
      unit.convolve();
      if (pass == ForwardPass::output) {
        unit.combine(column);
      } else {
        unit.statistics(unit.conv, image);
      }
    }
    if (pass == ForwardPass::output) unit.write(p.out, unit.x, image);
  }
}

// The sums of a group of images that the backward needs, for one vector of channels: of d, of d hat, and in the pass of
// norm1 those of the convolution's weight.
template <typename T>
struct Sums {
  Vec<T> row[11] = {};
};

// d2 = grad_out GELU'(u2): its sums.
template <typename E, typename T>
void backward_norm2(Unit<E>& unit, const T* grad, Sums<T>& sums) {
  const Norm<T> norm2 = unit.norm(unit.p.norm2);
  Vec<T> sum{}, sum_hat{};
  for (int64_t i = 0; i < unit.places * kLanes<T>; i += kLanes<T>) {
    const Vec<T> hat = norm2.hat(load(unit.conv + i));
    const Vec<T> d = load(grad + i) * gelu(norm2.affine(hat)).slope;
    sum += d, sum_hat += d * hat;
  }
  sums.row[0] += sum, sums.row[1] += sum_hat;
}

// The gradient to conv(s), into unit.back.
template <typename E, typename T>
void backward_to_conv(const DepthwiseBlockGradParams& g, Unit<E>& unit, const T* grad) {
  constexpr int W = kLanes<T>;
  const Norm<T> norm2 = unit.norm(unit.p.norm2);
  const Vec<T> mean = unit.numbers(g.mean_d2), mean_hat = unit.numbers(g.mean_d2_hat);
  const T* from = unit.conv;
  T* to = unit.back + unit.line + W;
  for (int64_t i = 0; i < unit.p.grid_h; ++i, to += 2 * W)
    for (int64_t j = 0; j < unit.p.grid_w; ++j, from += W, grad += W, to += W) {
      const Vec<T> hat = norm2.hat(load(from));
      store(to, norm2.gradient(load(grad) * gelu(norm2.affine(hat)).slope, hat, mean, mean_hat));
    }
}

// From there d1 = (grad_out + conv^T) GELU'(u1), in the place of grad; its sums, and those of the convolution's weight.
template <typename E, typename T>
void backward_norm1(Unit<E>& unit, const T* x, T* grad, Sums<T>& sums) {
  constexpr int W = kLanes<T>;
  const int64_t line = unit.line;
  Vec<T> tap[9], grad_tap[9] = {}, sum{}, sum_hat{};
  unit.taps(tap);
  T* to = unit.conv;
  for (int64_t i = 0; i < unit.p.grid_h; ++i)
    for (int64_t j = 0; j < unit.p.grid_w; ++j, to += W) {
      const T* corner = unit.back + i * line + j * W;
      Vec<T> from_conv{};
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) from_conv += tap[8 - k] * load(corner + k / 3 * line + k % 3 * W);
      store(to, from_conv);
    }
  for (int64_t i = 0; i < unit.p.grid_h; ++i)
    for (int64_t j = 0; j < unit.p.grid_w; ++j) {
      const int64_t corner = i * line + j * W;
      const Vec<T> here = load(unit.back + corner + line + W);
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) grad_tap[k] += here * load(unit.s + corner + k / 3 * line + k % 3 * W);
    }
  for (int k = 0; k < 9; ++k) sums.row[2 + k] += grad_tap[k];
  const Norm<T> norm1 = unit.norm(unit.p.norm1);
  for (int64_t i = 0; i < unit.places * W; i += W) {
    const Vec<T> d = (load(grad + i) + load(unit.conv + i)) * load(unit.slope + i);
    sum += d, sum_hat += d * norm1.hat(load(x + i));
    store(grad + i, d);
  }
  sums.row[0] += sum, sums.row[1] += sum_hat;
}

// From d1 to the gradient to x, in its place.
template <typename E, typename T>
void backward_x(const DepthwiseBlockGradParams& g, Unit<E>& unit, const T* x, T* grad) {
  const Norm<T> norm1 = unit.norm(unit.p.norm1);
  const Vec<T> mean = unit.numbers(g.mean_d1), mean_hat = unit.numbers(g.mean_d1_hat);
  for (int64_t i = 0; i < unit.places * kLanes<T>; i += kLanes<T>)
    store(grad + i, norm1.gradient(load(grad + i), norm1.hat(load(x + i)), mean, mean_hat));
}

template <typename E>
void backward(const DepthwiseBlockGradParams& g, BackwardPass pass, int64_t begin, int64_t end) {
  using T = Compute<E>;
  constexpr int kColumns = kUnitChannels / kLanes<T>;
  const DepthwiseBlockParams& p = g.forward;
  const int64_t blocks = divide_up(p.C, kUnitChannels);
  Unit<E> unit(p);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t group = u / blocks;
    unit.take_block(u % blocks);
    Sums<T> sums[kColumns];
    for (int64_t image = group * kUnitGroup; image < smaller(p.B, (group + 1) * kUnitGroup); ++image) {
      const int64_t ahead = unit.places * p.C;
      unit.read(unit.x, p.x, image, ahead, pass == BackwardPass::norm1 ? g.grad_x : nullptr);
      unit.read(unit.grad, pass == BackwardPass::x ? g.grad_x : g.grad_out, image, ahead, nullptr);
      for (int64_t v = 0; v < unit.columns; ++v) {
        T *x = unit.column(unit.x, v), *grad = unit.column(unit.grad, v);
        unit.take_column(v);
        if (pass == BackwardPass::x) {
          backward_x(g, unit, x, grad);
          continue;
        }
        pass == BackwardPass::norm1 ? unit.template activate<true>(x) : unit.template activate<false>(x);
        unit.convolve();
        if (pass == BackwardPass::norm2) {
          backward_norm2(unit, grad, sums[v]);
        } else {
          backward_to_conv(g, unit, grad);
          backward_norm1(unit, x, grad, sums[v]);
        }
      }
      if (pass != BackwardPass::norm2) unit.write(g.grad_x, unit.grad, image);
    }
    if (pass == BackwardPass::x) continue;
    for (int64_t v = 0; v < unit.columns; ++v) {
      unit.take_column(v);
      T* to = static_cast<T*>(g.partial) + group * 11 * p.C + unit.channel;
      for (int row = 0; row < (pass == BackwardPass::norm2 ? 2 : 11); ++row)
        store_part(to + row * p.C, sums[v].row[row], unit.lanes);
    }
  }
}

}  // namespace

void depthwise_block_forward(const DepthwiseBlockParams& p, ForwardPass pass, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { forward<decltype(element)>(p, pass, begin, end); });
}

void depthwise_block_backward(const DepthwiseBlockGradParams& g, BackwardPass pass, int64_t begin, int64_t end) {
  with_element(g.forward.dtype, [&](auto element) { backward<decltype(element)>(g, pass, begin, end); });
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
