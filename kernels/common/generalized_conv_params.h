// Arguments of the per-head shift of generalized convolution, on every device (Bootstrapping ViTs, Eq. 3-4).
#pragma once

#include <cstdint>

#include "inline.h"

namespace fastib {

// out[b, c, i, j] = x[b, c, i + row, j + column] with the offset of c's head, zero outside; `inverse` turns all offsets
// round. Strides are in elements of `element_size` bytes; channels_last says which dimension of x and out is dense: the
// channels, else the columns. Values are moved, never computed with.
struct GeneralizedConvShiftParams {
  int64_t element_size;  // 2, 4 or 8
  bool channels_last, inverse;
  int64_t B, H, D;  // D channels a head
  int64_t rows, columns;
  const void* x;
  void* out;
  int64_t x_stride[4], out_stride[4];
};

struct Offset {
  int64_t row, column;
};

// Sides of the window: the least whose square holds all heads.
FASTIB_INLINE int64_t generalized_conv_window(int64_t heads) {
  int64_t side = 1;
  while (side * side < heads) ++side;
  return side;
}

// Heads take the window's places row by row; an even window reaches one place further below and to the right.
FASTIB_INLINE Offset generalized_conv_offset(int64_t window, int64_t head, bool inverse) {
  const int64_t row = head / window - (window - 1) / 2, column = head % window - (window - 1) / 2;
  return inverse ? Offset{-row, -column} : Offset{row, column};
}

}  // namespace fastib
