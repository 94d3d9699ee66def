// The depth-wise block for one instruction set; see depthwise_block.h.
//
// A unit copies its channels of an image into scratch, row by row as they lie in memory, and goes on with one vector of
// channels at a time, whose maps stay in the first cache: s with a border of zeros around it, so that the convolution
// has no special cases. A resident unit does so with all images, and keeps what later passes need.
#include "depthwise_block.h"

#include <new>

#include "gelu.h"
#include "part_lanes.h"
#include "stream.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

thread_local Scratch scratch;

// One vector of channels of a norm.
template <typename T>
struct Norm {
  Vec<T> shift, inv, gamma, beta, scale = inv * gamma;
  Vec<T> hat(Vec<T> y) const { return (y + shift) * inv; }
  Vec<T> affine(Vec<T> y) const { return (y + shift) * scale + beta; }
  // The gradient to y from those after the affine map and their means.
  Vec<T> gradient(Vec<T> d, Vec<T> hat, Vec<T> mean_d, Vec<T> mean_d_hat) const {
    return scale * (d - mean_d - hat * mean_d_hat);
  }
};

// Scratch of a unit, its channels [first, first + count), and what is done with one vector of them.
template <typename E>
struct Unit {
  using T = Compute<E>;
  using V = Vec<T>;
  static constexpr int W = kLanes<T>, kTurns = 4;
  const DepthwiseBlockParams& p;
  const bool resident;  // maps of all images, or of the current one
  const int64_t places, line, width;
  int64_t first = 0, count = 0, columns = 0, lanes = W;  // lanes: of the current vector
  int64_t channel = 0;                                   // where the current vector begins
  T *x, *conv, *grad, *slope2;                           // (images, width, places, W)
  T* slope1;                                             // (places, W)
  T *s, *back;                                           // (places, W) with a border

  // maps: how many of x, conv, grad and slope2 are used. Throws std::bad_alloc.
  Unit(const DepthwiseBlockParams& params, int maps, bool resident)
      : p(params),
        resident(resident),
        places(p.grid_h * p.grid_w),
        line((p.grid_w + 2) * W),
        width(divide_up(p.unit_channels, W)) {
    const int64_t all = (resident ? p.B : 1) * width * places * W, plain = places * W, bordered = (p.grid_h + 2) * line;
    const int64_t bytes =
        maps * Scratch::padded_bytes<T>(all) + Scratch::padded_bytes<T>(plain) + 2 * Scratch::padded_bytes<T>(bordered);
    if (!scratch.reserve(bytes)) throw std::bad_alloc();
    slope1 = scratch.take<T>(plain);
    s = scratch.take<T>(bordered), back = scratch.take<T>(bordered);
    T** const of_images[] = {&x, &conv, &grad, &slope2};
    for (int map = 0; map < 4; ++map) *of_images[map] = map < maps ? scratch.take<T>(all) : nullptr;
    for (int64_t i = 0; i < bordered; ++i) s[i] = back[i] = T(0);
  }

  void take_block(int64_t block) {
    first = block * p.unit_channels;
    count = smaller(p.unit_channels, p.C - first);
    columns = divide_up(count, W);
  }

  void take_column(int64_t v) {
    channel = first + v * W;
    lanes = smaller(W, count - v * W);
  }

  // Vector v of an image in one of the maps.
  T* column(T* map, int64_t image, int64_t v) const { return map + ((resident ? image * width : 0) + v) * places * W; }

  // Into scratch, row by row. `ahead`: elements from here to what is read next; `written`: what this unit writes in the
  // end, or null. Both are asked for already.
  void read(T* map, const void* tensor, int64_t image, int64_t ahead, void* written) const {
    const int64_t start = image * places * p.C + first;
    const E* from = static_cast<const E*>(tensor) + start;
    E* target = static_cast<E*>(written) + start;
    T* to = column(map, image, 0);
    for (int64_t place = 0; place < places; ++place, from += p.C, target += p.C)
      for (int64_t v = 0; v < columns; ++v) {
        store(to + (v * places + place) * W, load_part(from + v * W, smaller(W, count - v * W)));
        __builtin_prefetch(from + v * W + ahead, 0, 2);
        if (written) __builtin_prefetch(target + v * W, 1, 2);
      }
  }

  void write(void* tensor, T* map, int64_t image) const {
    E* to = static_cast<E*>(tensor) + image * places * p.C + first;
    const T* from = column(map, image, 0);
    if constexpr (sizeof(E) == sizeof(T)) {
      if (streams(to)) {
        for (int64_t place = 0; place < places; ++place, to += p.C)
          for (int64_t v = 0; v < columns; ++v) stream_vector(to + v * W, load(from + (v * places + place) * W));
        return end_stream();
      }
    }
    for (int64_t place = 0; place < places; ++place, to += p.C)
      for (int64_t v = 0; v < columns; ++v)
        store_part(to + v * W, load(from + (v * places + place) * W), smaller(W, count - v * W));
  }

  // Whether whole cache lines are written that nothing reads soon.
  bool streams(const E* to) const {
    const int64_t row = p.C * static_cast<int64_t>(sizeof(E));
    return resident && p.B * places * row >= kStreamedBytes && (reinterpret_cast<intptr_t>(to) | row) % 64 == 0;
  }

  V numbers(const void* array) const { return load_part(static_cast<const T*>(array) + channel, lanes); }
  Norm<T> norm(const BlockNorm& of) const {
    return {numbers(of.shift), numbers(of.inv), numbers(of.gamma), numbers(of.beta)};
  }
  void taps(V (&tap)[9]) const {
    for (int k = 0; k < 9; ++k) tap[k] = numbers(static_cast<const T*>(p.weight) + k * p.C);
  }

  // s of a column of x. Beside it slope1, or without kSlope s once more, in the place of x.
  template <bool kSlope>
  void activate(T* column) {
    const Norm<T> norm1 = norm(p.norm1);
    T *to = s + line + W, *beside = kSlope ? slope1 : column;
    for (int64_t i = 0; i < p.grid_h; ++i, to += 2 * W)
      for (int64_t j = 0; j < p.grid_w; ++j, column += W, to += W, beside += W) {
        const Gelu<T> y = gelu(norm1.affine(load(column)));
        store(to, y.value);
        store(beside, kSlope ? y.slope : y.value);
      }
  }

  // conv(s), without its bias.
  void convolve(T* to) {
    V tap[9];
    taps(tap);
    const T* corner = s;
    for (int64_t i = 0; i < p.grid_h; ++i, corner += 2 * W)
      for (int64_t j = 0; j < p.grid_w; ++j, corner += W, to += W) {
        V sum{};
#pragma GCC unroll 9
        for (int k = 0; k < 9; ++k) sum += tap[k] * load(corner + k / 3 * line + k % 3 * W);
        store(to, sum);
      }
  }

  // body(place, turn) for all places; sums that take turns do not wait for each other.
  template <typename Body>
  void in_turns(Body&& body) const {
    int64_t place = 0;
    for (; place + kTurns <= places; place += kTurns)
#pragma GCC unroll 4
      for (int turn = 0; turn < kTurns; ++turn) body(place + turn, turn);
    for (; place < places; ++place) body(place, 0);
  }

  static V total(const V (&sums)[kTurns]) { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }

  // Mean of a column, what rounding took from it, and the sum of squares about both: a map that is nearly constant has
  // little else.
  void statistics(const T* of, int64_t image) const {
    const T share = T(1) / static_cast<T>(places);
    V sum[kTurns] = {}, rests[kTurns] = {}, squared[kTurns] = {};
    in_turns([&](int64_t place, int turn) { sum[turn] += load(of + place * W); });
    const V mean = total(sum) * share;
    in_turns([&](int64_t place, int turn) {
      const V off = load(of + place * W) - mean;
      rests[turn] += off;
      squared[turn] += off * off;
    });
    const V rest = total(rests), squares = total(squared);
    const V lost = rest * share;
    T* to = static_cast<T*>(p.partial) + 3 * image * p.C + channel;
    store_part(to, mean, lanes);
    store_part(to + p.C, lost, lanes);
    store_part(to + 2 * p.C, squares - rest * lost, lanes);
  }

  // GELU(norm2(conv)) + s, in the place of s.
  void combine(T* s, const T* conv) const {
    const Norm<T> norm2 = norm(p.norm2);
    for (int64_t i = 0; i < places * W; i += W) store(s + i, gelu(norm2.affine(load(conv + i))).value + load(s + i));
  }
};

// One pass over the unit's channels of an image.
template <typename E>
void forward(Unit<E>& unit, ForwardPass pass, int64_t image, int64_t ahead) {
  const DepthwiseBlockParams& p = unit.p;
  const bool fresh = !unit.resident, writes = pass == ForwardPass::output;
  if (fresh || pass == ForwardPass::x_statistics)
    unit.read(unit.x, p.x, image, ahead, fresh && writes ? p.out : nullptr);
  for (int64_t v = 0; v < unit.columns; ++v) {
    auto *x = unit.column(unit.x, image, v), *conv = unit.column(unit.conv, image, v);
    unit.take_column(v);
    if (pass == ForwardPass::x_statistics) {
      unit.statistics(x, image);
      continue;
    }
    if (fresh || pass == ForwardPass::conv_statistics) {
      unit.template activate<false>(x);
      unit.convolve(conv);
    }
    writes ? unit.combine(x, conv) : unit.statistics(conv, image);
  }
  if (writes) unit.write(p.out, unit.x, image);
}

template <typename E>
void forward(const DepthwiseBlockParams& p, ForwardPass pass, int64_t begin, int64_t end) {
  const int64_t blocks = divide_up(p.C, p.unit_channels);
  Unit<E> unit(p, kForwardMaps, false);
  for (int64_t u = begin; u < end; ++u) {
    unit.take_block(u % blocks);
    forward(unit, pass, u / blocks, p.unit_channels);
  }
}

template <typename E>
void forward_resident(const DepthwiseBlockParams& p, const AfterForward& after, int64_t begin, int64_t end) {
  Unit<E> unit(p, kForwardMaps, true);
  for (int64_t block = begin; block < end; ++block) {
    unit.take_block(block);
    for (const ForwardPass pass : {ForwardPass::x_statistics, ForwardPass::conv_statistics, ForwardPass::output}) {
      for (int64_t image = 0; image < p.B; ++image) forward(unit, pass, image, unit.places * p.C);
      if (pass != ForwardPass::output) after(pass, unit.first, unit.count);
    }
  }
}

// The sums of a group of images that the backward needs, for one vector of channels: of d, of d hat, and in the pass of
// norm1 those of the convolution's weight.
template <typename T>
struct Sums {
  Vec<T> row[11] = {};
};

// slope2 of a column of conv(s).
template <typename E, typename T>
void slopes(Unit<E>& unit, const T* conv, T* slope2) {
  const Norm<T> norm2 = unit.norm(unit.p.norm2);
  for (int64_t i = 0; i < unit.places * kLanes<T>; i += kLanes<T>)
    store(slope2 + i, gelu(norm2.affine(load(conv + i))).slope);
}

// d2 = grad_out slope2: its sums.
template <typename E, typename T>
void backward_norm2(Unit<E>& unit, const T* conv, const T* grad, const T* slope2, Sums<T>& sums) {
  const Norm<T> norm2 = unit.norm(unit.p.norm2);
  Vec<T> sum{}, sum_hat{};
  for (int64_t i = 0; i < unit.places * kLanes<T>; i += kLanes<T>) {
    const Vec<T> d = load(grad + i) * load(slope2 + i);
    sum += d, sum_hat += d * norm2.hat(load(conv + i));
  }
  sums.row[0] += sum, sums.row[1] += sum_hat;
}

// The gradient to conv(s), into unit.back.
template <typename E, typename T>
void backward_to_conv(const DepthwiseBlockGradParams& g, Unit<E>& unit, const T* conv, const T* grad, const T* slope2) {
  constexpr int W = kLanes<T>;
  const Norm<T> norm2 = unit.norm(unit.p.norm2);
  const Vec<T> mean = unit.numbers(g.mean_d2), mean_hat = unit.numbers(g.mean_d2_hat);
  T* to = unit.back + unit.line + W;
  for (int64_t i = 0; i < unit.p.grid_h; ++i, to += 2 * W)
    for (int64_t j = 0; j < unit.p.grid_w; ++j, conv += W, grad += W, slope2 += W, to += W)
      store(to, norm2.gradient(load(grad) * load(slope2), norm2.hat(load(conv)), mean, mean_hat));
}

// From there d1 = (grad_out + conv^T) slope1, in the place of grad; its sums, and those of the convolution's weight.
template <typename E, typename T>
void backward_norm1(Unit<E>& unit, const T* x, T* grad, Sums<T>& sums) {
  constexpr int W = kLanes<T>;
  const int64_t line = unit.line;
  const Norm<T> norm1 = unit.norm(unit.p.norm1);
  Vec<T> tap[9], grad_tap[9] = {}, sum{}, sum_hat{};
  unit.taps(tap);
  const T *corner = unit.back, *slope1 = unit.slope1;
  for (int64_t i = 0; i < unit.p.grid_h; ++i, corner += 2 * W)
    for (int64_t j = 0; j < unit.p.grid_w; ++j, corner += W, x += W, grad += W, slope1 += W) {
      Vec<T> from_conv{};
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) from_conv += tap[8 - k] * load(corner + k / 3 * line + k % 3 * W);
      const Vec<T> d = (load(grad) + from_conv) * load(slope1);
      sum += d, sum_hat += d * norm1.hat(load(x));
      store(grad, as_stored<E>(d));
    }
  sums.row[0] += sum, sums.row[1] += sum_hat;
  for (int64_t i = 0; i < unit.p.grid_h; ++i)
    for (int64_t j = 0; j < unit.p.grid_w; ++j) {
      const int64_t corner = i * line + j * W;
      const Vec<T> here = load(unit.back + corner + line + W);
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) grad_tap[k] += here * load(unit.s + corner + k / 3 * line + k % 3 * W);
    }
  for (int k = 0; k < 9; ++k) sums.row[2 + k] += grad_tap[k];
}

// From d1 to the gradient to x, in its place.
template <typename E, typename T>
void backward_x(const DepthwiseBlockGradParams& g, Unit<E>& unit, const T* x, T* grad) {
  const Norm<T> norm1 = unit.norm(unit.p.norm1);
  const Vec<T> mean = unit.numbers(g.mean_d1), mean_hat = unit.numbers(g.mean_d1_hat);
  for (int64_t i = 0; i < unit.places * kLanes<T>; i += kLanes<T>)
    store(grad + i, norm1.gradient(load(grad + i), norm1.hat(load(x + i)), mean, mean_hat));
}

// One pass over the unit's channels of a group of images.
template <typename E>
void backward(const DepthwiseBlockGradParams& g, Unit<E>& unit, BackwardPass pass, int64_t group) {
  using T = Compute<E>;
  const DepthwiseBlockParams& p = g.forward;
  const bool fresh = !unit.resident, starts = pass == BackwardPass::norm2;
  Sums<T> sums[kUnitChannels / kLanes<T>];
  for (int64_t image = group * kUnitGroup; image < smaller(p.B, (group + 1) * kUnitGroup); ++image) {
    if (fresh || starts) {
      const int64_t ahead = unit.places * p.C;
      unit.read(unit.x, p.x, image, ahead, pass == BackwardPass::norm1 ? g.grad_x : nullptr);
      unit.read(unit.grad, pass == BackwardPass::x ? g.grad_x : g.grad_out, image, ahead, nullptr);
    }
    for (int64_t v = 0; v < unit.columns; ++v) {
      const auto at = [&](T* map) { return unit.column(map, image, v); };
      T *x = at(unit.x), *conv = at(unit.conv), *grad = at(unit.grad), *slope2 = at(unit.slope2);
      unit.take_column(v);
      if (pass == BackwardPass::x) {
        backward_x(g, unit, x, grad);
        continue;
      }
      unit.template activate<true>(x);
      if (fresh || starts) {
        unit.convolve(conv);
        slopes(unit, conv, slope2);
      }
      if (starts) {
        backward_norm2(unit, conv, grad, slope2, sums[v]);
      } else {
        backward_to_conv(g, unit, conv, grad, slope2);
        backward_norm1(unit, x, grad, sums[v]);
      }
    }
    if (pass == BackwardPass::x || (fresh && !starts)) unit.write(g.grad_x, unit.grad, image);
  }
  if (pass == BackwardPass::x) return;
  for (int64_t v = 0; v < unit.columns; ++v) {
    unit.take_column(v);
    T* to = static_cast<T*>(g.partial) + group * 11 * p.C + unit.channel;
    for (int row = 0; row < (starts ? 2 : 11); ++row) store_part(to + row * p.C, sums[v].row[row], unit.lanes);
  }
}

template <typename E>
void backward(const DepthwiseBlockGradParams& g, BackwardPass pass, int64_t begin, int64_t end) {
  const int64_t blocks = divide_up(g.forward.C, g.forward.unit_channels);
  Unit<E> unit(g.forward, kBackwardMaps, false);
  for (int64_t u = begin; u < end; ++u) {
    unit.take_block(u % blocks);
    backward(g, unit, pass, u / blocks);
  }
}

template <typename E>
void backward_resident(const DepthwiseBlockGradParams& g, const AfterBackward& after, int64_t begin, int64_t end) {
  Unit<E> unit(g.forward, kBackwardMaps, true);
  for (int64_t block = begin; block < end; ++block) {
    unit.take_block(block);
    for (const BackwardPass pass : {BackwardPass::norm2, BackwardPass::norm1, BackwardPass::x}) {
      for (int64_t group = 0; group < divide_up(g.forward.B, kUnitGroup); ++group) backward(g, unit, pass, group);
      if (pass != BackwardPass::x) after(pass, unit.first, unit.count);
    }
  }
}

}  // namespace

void depthwise_block_forward(const DepthwiseBlockParams& p, ForwardPass pass, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { forward<decltype(element)>(p, pass, begin, end); });
}

void depthwise_block_forward_resident(const DepthwiseBlockParams& p, const AfterForward& after, int64_t begin,
                                      int64_t end) {
  with_element(p.dtype, [&](auto element) { forward_resident<decltype(element)>(p, after, begin, end); });
}

void depthwise_block_backward(const DepthwiseBlockGradParams& g, BackwardPass pass, int64_t begin, int64_t end) {
  with_element(g.forward.dtype, [&](auto element) { backward<decltype(element)>(g, pass, begin, end); });
}

void depthwise_block_backward_resident(const DepthwiseBlockGradParams& g, const AfterBackward& after, int64_t begin,
                                       int64_t end) {
  with_element(g.forward.dtype, [&](auto element) { backward_resident<decltype(element)>(g, after, begin, end); });
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
