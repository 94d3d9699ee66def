// What the kernels of involution share: the tensors of a unit of work, and its scratch memory.
#pragma once

#include <new>

#include "involution.h"
#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// One image, from the first channel of a group on. channel or column is 1.
template <typename E>
struct Image {
  E* p;
  int64_t channel, row, column, rows, columns;
  E* at(int64_t c, int64_t i, int64_t j) const { return p + c * channel + i * row + j * column; }
  bool channels_dense() const { return channel == 1 && column != 1; }

  // Asks for row i of `channels` channels, for the second cache. Inlined: calls of what only prefetches would be
  // dropped.
  inline __attribute__((always_inline)) void ask(int64_t i, int64_t channels) const {
    const bool dense = channels_dense();
    const int64_t lines = dense ? columns : channels, step = dense ? column : channel, n = dense ? channels : columns;
    const E* from = at(0, i, 0);
    for (int64_t k = 0; k < lines; ++k, from += step)
      for (int64_t l = 0; l < n; l += 64 / static_cast<int64_t>(sizeof(E))) __builtin_prefetch(from + l, 0, 2);
  }
};

template <typename E>
Image<E> image(E* p, const int64_t (&stride)[4], int64_t b, int64_t c, int64_t rows, int64_t columns) {
  return {p + b * stride[0] + c * stride[1], stride[1], stride[2], stride[3], rows, columns};
}

// The weights of one (image, group) pair, (K, K, rows, columns). Either the taps are dense or the columns are.
template <typename E>
struct Weights {
  E* p;
  int64_t u, v, row, column;
  E* at(int64_t tap_u, int64_t tap_v, int64_t i, int64_t j) const {
    return p + tap_u * u + tap_v * v + i * row + j * column;
  }
};

template <typename E>
Weights<E> weights(E* p, const int64_t (&stride)[6], int64_t b, int64_t g) {
  return {p + b * stride[0] + g * stride[1], stride[2], stride[3], stride[4], stride[5]};
}

// The rows [begin, end) of groups [g, g + groups) of image b.
struct Band {
  int64_t b, g, groups, begin, end;
};

// What a unit of work stands for, of an image with `rows` rows: cut where a tile of 4 rows ends.
inline Band band(const InvolutionParams& p, int64_t unit, int64_t rows) {
  const int64_t bands = involution_bands(p), groups = involution_groups(p), parts = divide_up(p.G, groups);
  const int64_t b = unit / (parts * bands), first = unit / bands % parts * groups, k = unit % bands;
  const auto cut = [&](int64_t i) { return i < bands ? smaller((i * rows / bands + 2) / 4 * 4, rows) : rows; };
  return {b, first, smaller(groups, p.G - first), cut(k), cut(k + 1)};
}

inline int64_t most_rows(const InvolutionParams& p, int64_t rows) {
  return smaller(rows, divide_up(rows, involution_bands(p)) + 3);
}

// The rows of pixels whose windows meet the band that a unit owns of x.
inline Band pixels_around(const InvolutionParams& p, int64_t unit) {
  Band at = band(p, unit, p.Hi);
  const int64_t pad = p.K / 2 * p.dilation, above = at.begin + pad - (p.K - 1) * p.dilation;
  at.begin = above > 0 ? divide_up(above, p.stride) : 0;
  at.end = smaller((at.end - 1 + pad) / p.stride + 1, p.Ho);
  return at;
}

// The rows of x that the windows of a unit's band of pixels meet.
inline Band x_around(const InvolutionParams& p, int64_t unit) {
  Band at = band(p, unit, p.Ho);
  const int64_t above = at.begin * p.stride - p.K / 2 * p.dilation;
  at.end = smaller(above + (at.end - at.begin - 1) * p.stride + (p.K - 1) * p.dilation + 1, p.Hi);
  at.begin = above > 0 ? above : 0;
  return at;
}

// A band of an image that will be read after `steps` steps, each of which asks for a share of its rows.
template <typename E>
struct Upcoming {
  const E* p;
  const int64_t (&stride)[4];
  Band at;
  int64_t group, rows, columns, steps;

  inline __attribute__((always_inline)) void ask(int64_t step, int64_t k) const {
    const int64_t n = at.end - at.begin;
    if (k >= at.groups) return;
    const auto from = image(p, stride, at.b, (at.g + k) * group, rows, columns);
    for (int64_t i = step * n / steps; i < (step + 1) * n / steps; ++i) from.ask(at.begin + i, group);
  }
};

// From row t of the weights of band `at` to the row that is read about 32 KiB later, there or in the `next` band.
template <typename E>
int64_t weights_ahead(const InvolutionParams& p, const Band& at, const Band& next, int64_t t) {
  const int64_t bytes = at.groups * p.K * p.K * p.Wo * sizeof(E);
  const int64_t rows = smaller((32 << 10) / bytes + 1, at.end - at.begin);  // no row of the next band is left out
  if (t + rows < at.end) return rows * p.weight_stride[4];
  const int64_t row = smaller(next.begin + t + rows - at.end, next.end - 1);
  return (next.b - at.b) * p.weight_stride[0] + (next.g - at.g) * p.weight_stride[1] + (row - t) * p.weight_stride[4];
}

inline int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

// Takes scratch memory in two passes: the first adds up, the second hands out, zeroed where that is asked for.
class Layout {
 public:
  explicit Layout(Scratch* scratch) : scratch_(scratch) {}

  template <typename T>
  void take(T*& p, int64_t n, bool zeroed = true) {
    bytes_ += Scratch::padded_bytes<T>(n);
    if (!scratch_) return;
    p = scratch_->take<T>(n);
    if (zeroed) std::memset(static_cast<void*>(p), 0, n * sizeof(T));
  }

  int64_t bytes() const { return bytes_; }

 private:
  Scratch* scratch_;
  int64_t bytes_ = 0;
};

// Gives each of `works` its memory, as its member lay_out says.
template <typename... Works>
void give_memory(Scratch& scratch, Works&... works) {
  Layout sizes(nullptr);
  (works.lay_out(sizes), ...);
  if (!scratch.reserve(sizes.bytes())) throw std::bad_alloc();
  Layout memory(&scratch);
  (works.lay_out(memory), ...);
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
