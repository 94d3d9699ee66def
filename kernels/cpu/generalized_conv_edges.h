// What the shift of generalized convolution leaves out of its products: no more than whole rows of the image.
#pragma once

#include "generalized_conv_product.h"
#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end > begin ? end - begin : 0; }
  Range and_in(int64_t first, int64_t last) const { return {begin > first ? begin : first, smaller(end, last)}; }
};

// The rows that the shift takes out of the image, or has nothing to fill with. Heads go through the window row by row,
// so that those left are neighbours.
class Edges {
 public:
  // Of the middle image; of the image that is shifted, with `inverse` turned round.
  Edges(const GeneralizedConvSizes& s, bool inverse)
      : s_(s), window_(generalized_conv_window(s.H)), inverse_(inverse) {}

  // Pixels of the vectors [v, v + n) of the middle image.
  Range pixels(int64_t v, int64_t n) const {
    const int64_t D = s_.M / s_.H, last = smaller((v + n) * kLanes<float>, s_.M) - 1;
    const int64_t a = offset(v * kLanes<float> / D), b = offset(last / D), least = smaller(a, b), most = a + b - least;
    const int64_t begin = most < 0 ? -most : 0, end = s_.rows - (least > 0 ? least : 0);
    return {begin * s_.columns, end * s_.columns};
  }

  // f(pixels, channels) of the pixels [first, last), as many together as have the same channels of the middle image.
  template <typename F>
  void channels(int64_t first, int64_t last, F&& f) const {
    for (int64_t row = first / s_.columns; row * s_.columns < last;) {
      const Range here = heads(row);
      int64_t next = row + 1;
      while (next < s_.rows && heads(next).begin == here.begin && heads(next).end == here.end) ++next;
      const int64_t D = s_.M / s_.H;
      f(Range{row * s_.columns, next * s_.columns}.and_in(first, last), Range{here.begin * D, here.end * D});
      row = next;
    }
  }

 private:
  int64_t offset(int64_t head) const { return generalized_conv_offset(window_, head, inverse_).row; }

  Range heads(int64_t row) const {
    Range range{0, s_.H};
    while (range.begin < s_.H && outside(row + offset(range.begin))) ++range.begin;
    while (range.end > range.begin && outside(row + offset(range.end - 1))) --range.end;
    return range;
  }
  bool outside(int64_t row) const { return row < 0 || row >= s_.rows; }

  GeneralizedConvSizes s_;
  int64_t window_;
  bool inverse_;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
