// The per-head shift for one instruction set; see generalized_conv.h.
//
// Floor: every element is read once and written once. Where channels are dense a pixel takes a run of each of its
// neighbours; where columns are, a plane is one copy that starts at another place, and the places that wrapped round an
// edge are set to zero.
#include "generalized_conv.h"

#include <vector>

#include "simd.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

using Bytes = uint8_t __attribute__((vector_size(kVectorBytes)));

inline void store_bytes(char* to, Bytes x) { std::memcpy(to, &x, sizeof(x)); }

inline Bytes load_bytes(const char* from) {
  Bytes x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

// A short run of n bytes, or zeros where `from` is null. The last vector overlaps the one before it.
inline void move_run(char* to, const char* from, int64_t n) {
  if (n < kVectorBytes) {
    if (from)
      std::memcpy(to, from, n);
    else
      std::memset(to, 0, n);
    return;
  }
  for (int64_t at = 0; at < n; at += kVectorBytes) {
    const int64_t place = at + kVectorBytes <= n ? at : n - kVectorBytes;
    store_bytes(to + place, from ? load_bytes(from + place) : Bytes{});
  }
}

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

void shift_channels(const GeneralizedConvShiftParams& p, int64_t begin, int64_t end) {
  const int64_t size = p.element_size, window = generalized_conv_window(p.H), run = p.D * size;
  std::vector<Offset> offsets(p.H);
  for (int64_t head = 0; head < p.H; ++head) offsets[head] = generalized_conv_offset(window, head, p.inverse);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / p.rows, i = unit % p.rows;
    const char* x = static_cast<const char*>(p.x) + b * p.x_stride[0] * size;
    char* out = static_cast<char*>(p.out) + (b * p.out_stride[0] + i * p.out_stride[2]) * size;
    for (int64_t j = 0; j < p.columns; ++j)
      for (int64_t head = 0; head < p.H; ++head) {
        const Offset at = offsets[head];
        const int64_t row = i + at.row, column = j + at.column;
        const bool inside = row >= 0 && row < p.rows && column >= 0 && column < p.columns;
        const int64_t from = row * p.x_stride[2] + column * p.x_stride[3] + head * p.D;
        move_run(out + (j * p.out_stride[3] + head * p.D) * size, inside ? x + from * size : nullptr, run);
      }
  }
}

// Zeros in columns [from, to) of rows [begin, end): runs too short for memset.
template <typename Word>
void clear_columns(char* plane, int64_t row, int64_t begin, int64_t end, int64_t from, int64_t to) {
  for (int64_t j = from; j < to; ++j)
    for (int64_t i = begin; i < end; ++i) reinterpret_cast<Word*>(plane)[i * row + j] = 0;
}

template <typename Word>
void shift_columns(const GeneralizedConvShiftParams& p, int64_t begin, int64_t end) {
  const int64_t size = sizeof(Word), channels = p.H * p.D, window = generalized_conv_window(p.H);
  const bool whole = p.x_stride[2] == p.columns && p.out_stride[2] == p.columns;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / channels, c = unit % channels;
    const Offset at = generalized_conv_offset(window, c / p.D, p.inverse);
    const int64_t first_row = larger(0, -at.row), end_row = p.rows - larger(0, at.row);
    const int64_t first = larger(0, -at.column), last = p.columns - larger(0, at.column);
    char* out = static_cast<char*>(p.out) + (b * p.out_stride[0] + c * p.out_stride[1]) * size;
    for (int64_t i = 0; i < p.rows; ++i)
      if (i < first_row || i >= end_row || first >= last)
        std::memset(out + i * p.out_stride[2] * size, 0, p.columns * size);
    if (first_row >= end_row || first >= last) continue;
    const char* x = static_cast<const char*>(p.x) + (b * p.x_stride[0] + c * p.x_stride[1]) * size;
    x += ((first_row + at.row) * p.x_stride[2] + first + at.column) * size;
    char* to = out + (first_row * p.out_stride[2] + first) * size;
    const int64_t count = end_row - first_row;
    if (whole) {
      std::memcpy(to, x, ((count - 1) * p.columns + last - first) * size);
    } else {
      for (int64_t r = 0; r < count; ++r)
        std::memcpy(to + r * p.out_stride[2] * size, x + r * p.x_stride[2] * size, (last - first) * size);
    }
    clear_columns<Word>(out, p.out_stride[2], first_row, end_row, 0, first);
    clear_columns<Word>(out, p.out_stride[2], first_row, end_row, last, p.columns);
  }
}

}  // namespace

void generalized_conv_shift(const GeneralizedConvShiftParams& p, int64_t begin, int64_t end) {
  if (p.channels_last) return shift_channels(p, begin, end);
  switch (p.element_size) {
    case 2:
      return shift_columns<uint16_t>(p, begin, end);
    case 4:
      return shift_columns<uint32_t>(p, begin, end);
    default:
      return shift_columns<uint64_t>(p, begin, end);
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
