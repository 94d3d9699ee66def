// Attention links for one instruction set; see attention_link.h.
//
// One image's augmented maps a = w attn + bias are made kChannels channels at a time and stay in cache: compared with
// the teacher's, turned into gradients in place, and multiplied back. Floors of one image: the teacher's C S elements
// read once, and 2 C M S operations forward, 4 more with gradients.
#include "attention_link.h"

#include <cmath>
#include <new>

#include "ahead.h"
#include "operand.h"
#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

thread_local Scratch scratch;

constexpr int64_t kChannels = 48;  // channels of a block
constexpr int kSide = 4;           // of them compared side by side

// Square root of `square`, the sum of the squares of x (n). Far from 1 they are summed anew, in double.
template <typename T>
T norm(T square, const T* x, int64_t n) {
  if (square > T(1e-30) && square < T(1e30)) return std::sqrt(square);
  double wide = 0;
  for (int64_t i = 0; i < n; ++i) wide += static_cast<double>(x[i]) * x[i];
  return static_cast<T>(std::sqrt(wide));
}

template <typename T>
T inverse(T norm, T eps) {
  return 1 / (norm > eps || norm != norm ? norm : eps);
}

template <typename E>
class Links {
  using T = Compute<E>;
  using U = Operand<E>;
  static constexpr bool kPaired = kSteps<U> == 2;
  static constexpr int W = kLanes<T>;

 public:
  explicit Links(const AttentionLinkParams& params) : p(params) {
    positions = round_to_lanes<T>(p.S);
    maps = round_to_lanes<T>(p.M);
    left_width = round_to_lanes<T>(summed<U>(p.M));
    const int64_t channels = (p.C + kChannels - 1) / kChannels * kChannels;
    int64_t bytes = Scratch::padded_bytes<U>(channels * left_width) +
                    Scratch::padded_bytes<U>(summed<U>(p.M) * positions) +
                    Scratch::padded_bytes<T>(kChannels * positions) + Scratch::padded_bytes<T>(kSide * positions) +
                    Scratch::padded_bytes<E>(kPaired ? kChannels * maps : 0);
    if (p.gradients)
      bytes +=
          Scratch::padded_bytes<U>(maps * summed<U>(p.S)) + Scratch::padded_bytes<T>(maps * positions) +
          Scratch::padded_bytes<T>(p.C * maps) + Scratch::padded_bytes<T>(p.C) +
          (kPaired ? Scratch::padded_bytes<U>(channels * maps) + Scratch::padded_bytes<U>(kChannels * positions) : 0);
    if (!scratch.reserve(bytes)) throw std::bad_alloc();
    weight = scratch.take<U>(channels * left_width);
    attn = scratch.take<U>(summed<U>(p.M) * positions);
    block = scratch.take<T>(kChannels * positions);
    target = scratch.take<T>(kSide * positions);
    rounded = scratch.take<E>(kPaired ? kChannels * maps : 0);
    if (p.gradients) {
      attn_columns = scratch.take<U>(maps * summed<U>(p.S));
      grad_attn = scratch.take<T>(maps * positions);
      grad_weight = scratch.take<T>(p.C * maps);
      grad_bias = scratch.take<T>(p.C);
      weight_down = kPaired ? scratch.take<U>(channels * maps) : weight;
      block_left = kPaired ? scratch.take<U>(kChannels * positions) : reinterpret_cast<U*>(block);
    }
    pack_weight();
  }

  void run(int64_t chunk) {
    const int64_t first = chunk * p.B / p.chunks, last = (chunk + 1) * p.B / p.chunks;
    if (p.gradients) {
      for (int64_t i = 0; i < p.C * maps; ++i) grad_weight[i] = 0;
      for (int64_t c = 0; c < p.C; ++c) grad_bias[c] = 0;
    }
    for (int64_t b = first; b < last; ++b) image(b);
    if (p.gradients) {
      T* weight_part = static_cast<T*>(p.weight_parts) + chunk * p.C * p.M;
      for (int64_t c = 0; c < p.C; ++c)
        for (int64_t m = 0; m < p.M; ++m) weight_part[c * p.M + m] = grad_weight[c * maps + m];
      std::memcpy(static_cast<T*>(p.bias_parts) + chunk * p.C, grad_bias, p.C * sizeof(T));
    }
  }

 private:
  // Maps that a block of channels is linked to lie in [first, last), from a whole vector on.
  struct Range {
    int64_t first, last;
  };

  Range linked(int64_t c0, int64_t channels) const {
    if (!p.mask) return {0, p.M};
    int64_t first = p.M, last = 0;
    for (int64_t c = c0; c < c0 + channels; ++c)
      for (int64_t m = 0; m < p.M; ++m)
        if (p.mask[c * p.M + m]) {
          first = smaller(first, m);
          last = m + 1 > last ? m + 1 : last;
        }
    return first < last ? Range{first / W * W, last} : Range{0, 0};
  }

  // The weights, 0 where masked, as left operands: rows, and downwards for the gradient of attn.
  void pack_weight() {
    const T* from = static_cast<const T*>(p.weight);
    for (int64_t c0 = 0; c0 < p.C; c0 += kChannels) {
      const int64_t channels = smaller(kChannels, p.C - c0);
      const auto kept = [&](int64_t i) { return !p.mask || p.mask[i] ? from[i] : T(0); };
      if constexpr (kPaired) {
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t m = 0; m < p.M; ++m) store_float(rounded + c * p.M + m, kept((c0 + c) * p.M + m));
        const Rows<const E> rows{rounded, p.M};
        pack_left(weight + c0 * left_width, left_width, rows, channels, p.M);
        if (p.gradients) pack_right(weight_down + c0 / 2 * maps, maps, rows, channels, p.M);
      } else {
        for (int64_t c = c0; c < c0 + channels; ++c)
          for (int64_t m = 0; m < p.M; ++m) {
            T w = kept(c * p.M + m);
            if constexpr (sizeof(E) < sizeof(T)) {  // rounded to the dtype of attn, as autocast does
              E low;
              store_float(&low, w);
              w = load_float(&low);
            }
            weight[c * left_width + m] = w;
          }
      }
    }
  }

  void image(int64_t b) {
    const Rows<const E> rows{static_cast<const E*>(p.attn) + b * p.attn_stride[0], p.attn_stride[1]};
    pack_right(attn, positions, rows, p.M, p.S);
    if (p.gradients) {
      pack_columns(attn_columns, rows, p.M, p.S);
      for (int64_t i = 0; i < maps * positions; ++i) grad_attn[i] = 0;
    }
    for (int64_t c0 = 0; c0 < p.C; c0 += kChannels) {
      const int64_t channels = smaller(kChannels, p.C - c0);
      const Range range = linked(c0, channels);
      augment(c0, channels, range, Ahead(only(teachers(b).from(c0)), p.S));
      int64_t c = 0;
      for (; c + kSide <= channels; c += kSide) compare<kSide>(b, c0 + c, block + c * positions);
      for (; c < channels; ++c) compare<1>(b, c0 + c, block + c * positions);
      if (p.gradients) add_gradients(c0, channels, range);
    }
    if (p.gradients) {
      E* out = static_cast<E*>(p.grad_attn) + b * p.M * p.S;
      unpack_rows(Rows<E>{out, p.S}, grad_attn, positions, p.M, p.S, T(1));
    }
  }

  Rows<const E> teachers(int64_t b) const {
    return {static_cast<const E*>(p.target) + b * p.target_stride[0], p.target_stride[1]};
  }

  // block (channels, positions) = weight attn + bias, 0 behind the last position.
  void augment(int64_t c0, int64_t channels, Range range, const Ahead& ahead) {
    const T* bias = static_cast<const T*>(p.bias) + c0;
    gemm<U>(
        channels, positions / W, summed<U>(range.last - range.first),
        Left<U>{weight + c0 * left_width + range.first / kSteps<U>, left_width, 1},
        Right<U>{attn + range.first / kSteps<U> * positions, positions, W},
        [bias, to = block, stride = positions](int64_t m, int64_t v, Vec<T> x) {
          store(to + m * stride + v * W, x + bias[m]);
        },
        ahead);
    if (p.S < positions)
      for (int64_t c = 0; c < channels; ++c) {
        T* last = block + c * positions + positions - W;
        store(last, load_part(last, p.S - (positions - W)));
      }
  }

  // The losses of n channels; their maps a become the gradients to them. Side by side, so that no sum waits for itself.
  template <int n>
  void compare(int64_t b, int64_t c, T* a) {
    const Rows<const E> teacher = teachers(b).from(c);
    const T eps = static_cast<T>(p.eps);
    const int64_t stride = positions;
    T* const t = target;
    Vec<T> a_squares[n] = {}, t_squares[n] = {};
    for (int64_t s = 0; s < stride; s += W)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        const Vec<T> x = load(a + i * stride + s), y = load_part(teacher.row(i) + s, p.S - s);
        store(t + i * stride + s, y);
        a_squares[i] += x * x;
        t_squares[i] += y * y;
      }
    T a_norm[n], a_factor[n], t_factor[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      a_norm[i] = norm(horizontal_sum<T>(a_squares[i]), a + i * stride, stride);
      a_factor[i] = inverse(a_norm[i], eps);
      t_factor[i] = inverse(norm(horizontal_sum<T>(t_squares[i]), t + i * stride, stride), eps);
    }
    const auto unit = [&](int i, int64_t s) { return load(a + i * stride + s) * a_factor[i]; };
    const auto unit_t = [&](int i, int64_t s) { return load(t + i * stride + s) * t_factor[i]; };
    Vec<T> loss[n] = {}, along[n] = {};
    for (int64_t s = 0; s < stride; s += W)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        const Vec<T> u = unit(i, s), d = u - unit_t(i, s);
        loss[i] += d * d;
        along[i] += d * u;
      }
    const int64_t at = b * p.C + c;
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) static_cast<T*>(p.loss)[at + i] = horizontal_sum<T>(loss[i]);
    if (!p.gradients) return;
    T towards[n], factor[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      towards[i] = a_norm[i] > eps ? horizontal_sum<T>(along[i]) : T(0);  // the length of a does not count
      factor[i] = 2 * (p.scale ? static_cast<const T*>(p.scale)[at + i] : T(1)) * a_factor[i];
    }
    Vec<T> sum[n] = {};
    for (int64_t s = 0; s < stride; s += W)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) {
        const Vec<T> u = unit(i, s), gradient = (u - unit_t(i, s) - u * towards[i]) * factor[i];
        store(a + i * stride + s, gradient);
        sum[i] += gradient;
      }
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) grad_bias[c + i] += horizontal_sum<T>(sum[i]);
  }

  void add_gradients(int64_t c0, int64_t channels, Range range) {
    if constexpr (kPaired)
      for (int64_t c = 0; c < channels; c += 2) {
        T* row = block + c * positions;
        const bool below = c + 1 < channels;
        pair_along(block_left + c * positions, row, positions);
        if (below) pair_along(block_left + (c + 1) * positions, row + positions, positions);
        pair_across(reinterpret_cast<U*>(row), row, below ? row + positions : nullptr, positions);
      }
    const auto add = [](T* to, int64_t stride) {
      return [to, stride](int64_t m, int64_t v, Vec<T> x) {
        T* at = to + m * stride + v * W;
        store(at, load(at) + x);
      };
    };
    const int64_t down_stride = kPaired ? maps : left_width;
    gemm<U>(range.last - range.first, positions / W, summed<U>(channels),
            Left<U>{weight_down + c0 / kSteps<U> * down_stride + range.first, 1, down_stride},
            Right<U>{reinterpret_cast<const U*>(block), kSteps<U> * positions, W},
            add(grad_attn + range.first * positions, positions));
    gemm<U>(channels, (range.last - range.first + W - 1) / W, summed<U>(p.S), Left<U>{block_left, positions, 1},
            Right<U>{attn_columns + range.first * summed<U>(p.S), W, W * summed<U>(p.S)},
            add(grad_weight + c0 * maps + range.first, maps));
  }

  const AttentionLinkParams& p;
  int64_t positions, maps, left_width;          // S, M and summed(M) rounded up to whole vectors
  U *weight = nullptr, *weight_down = nullptr;  // (C, left_width), (summed(C), maps)
  U *attn = nullptr, *attn_columns = nullptr;   // (summed(M), positions), (maps / lanes, summed(S), lanes)
  T *block = nullptr, *target = nullptr;        // (kChannels, positions), (kSide, positions)
  U* block_left = nullptr;                      // (kChannels, positions)
  T *grad_attn = nullptr, *grad_weight = nullptr, *grad_bias = nullptr;  // (maps, positions), (C, maps), (C,)
  E* rounded = nullptr;                                                  // (kChannels, M)
};

template <typename E>
void run(const AttentionLinkParams& p, int64_t begin, int64_t end) {
  Links<E> links(p);
  for (int64_t chunk = begin; chunk < end; ++chunk) links.run(chunk);
}

}  // namespace

void attention_link(const AttentionLinkParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { run<decltype(element)>(p, begin, end); });
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
