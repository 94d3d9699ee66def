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

// The rows [begin, end) of pair (b, g) that a unit of work stands for, of an image with `rows` rows.
struct Band {
  int64_t b, g, begin, end;
};

inline Band band(const InvolutionParams& p, int64_t unit, int64_t rows) {
  const int64_t bands = involution_bands(p), inner = p.channels_last ? p.G : bands;
  const int64_t b = unit / (p.G * bands), outer = unit % (p.G * bands) / inner;
  const int64_t g = p.channels_last ? unit % inner : outer, k = p.channels_last ? outer : unit % inner;
  return {b, g, k * rows / bands, (k + 1) * rows / bands};
}

inline int64_t most_rows(const InvolutionParams& p, int64_t rows) { return divide_up(rows, involution_bands(p)); }

inline int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

// Takes scratch memory in two passes: the first adds up, the second hands out. What is handed out holds zeros.
class Layout {
 public:
  explicit Layout(Scratch* scratch) : scratch_(scratch) {}

  template <typename T>
  void take(T*& p, int64_t n) {
    bytes_ += Scratch::padded_bytes<T>(n);
    if (!scratch_) return;
    p = scratch_->take<T>(n);
    std::memset(static_cast<void*>(p), 0, n * sizeof(T));
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
