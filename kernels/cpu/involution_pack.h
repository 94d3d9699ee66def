// Involution's images brought into the shapes that its tiles read: zero padded, in the compute type.
#pragma once

#include "involution_unit.h"
#include "operand.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Row i of an image -> `row` (columns rounded up to W, W): vectors of channels, zero where there is none.
template <typename E>
inline void pack_row(Compute<E>* row, const Image<const E>& x, int64_t i, int64_t channels) {
  using T = Compute<E>;
  constexpr int W = kLanes<T>;
  const E* from = x.at(0, i, 0);
  const int64_t columns = x.columns, step = x.channels_dense() ? x.column : x.channel;
  if (x.channels_dense()) {
    for (int64_t j = 0; j < columns; ++j, from += step) store(row + j * W, load_part(from, channels));
    return;
  }
  for (int64_t j = 0; j < columns; j += W, from += W) {
    const int64_t n = columns - j;
    Vec<T> square[W];
    for (int c = 0; c < W; ++c) square[c] = c < channels ? load_part(from + c * step, n) : Vec<T>{};
    transpose<T>(square);
    for (int l = 0; l < W; ++l) store(row + (j + l) * W, square[l]);
  }
}

// A row of vectors (columns, W) -> row i of an image.
template <typename E>
inline void unpack_row(const Image<E>& y, int64_t i, const Compute<E>* row, int64_t channels) {
  using T = Compute<E>;
  constexpr int W = kLanes<T>;
  E* to = y.at(0, i, 0);
  const int64_t columns = y.columns, step = y.channels_dense() ? y.column : y.channel;
  if (y.channels_dense()) {
    for (int64_t j = 0; j < columns; ++j, to += step) store_part(to, load(row + j * W), channels);
    return;
  }
  for (int64_t j = 0; j < columns; j += W, to += W) {
    Vec<T> square[W];
    for (int l = 0; l < W; ++l) square[l] = load(row + (j + l) * W);
    transpose<T>(square);
    for (int c = 0; c < W && c < channels; ++c) store_part(to + c * step, square[c], columns - j);
  }
}

// n columns of a plane's channels, `step` apart, and a column's n channels, in planes; zero beyond.
template <typename U, typename E>
inline Vec<U> load_columns(const E* p, int64_t n, int64_t, int64_t) {
  return load_part(p, n);
}

template <typename U, typename E>
inline Vec<U> load_channels(const E* p, int64_t n) {
  return load_part(p, n);
}

#if defined(__AVX512BF16__)
template <>
inline Vec<BFloat16Pair> load_columns<BFloat16Pair>(const bfloat16* p, int64_t n, int64_t channels, int64_t step) {
  const WideWords second = channels > 1 ? (WideWords)load_part(p + step, n) : WideWords{};
  return (WideWords)load_part(p, n) >> 16 | second;
}

template <>
inline Vec<BFloat16Pair> load_channels<BFloat16Pair>(const bfloat16* p, int64_t n) {
  return (Vec<BFloat16Pair>)load_words(p, n);
}
#endif

// An image's channels as planes of kSteps<U> channels each: dst (planes, rows, phases, width). Column q from
// `first_column` on lies in phase q % phases at q / phases, so that columns a stride apart are neighbours. What lies
// around the image is zero already, except for the rows outside of it.
template <typename U>
struct ChannelPlanes {
  static constexpr int W = kLanes<U>;
  U* dst;
  int64_t plane_step, phases, width, first_row, rows, first_column;

  int64_t row_step() const { return phases * width; }

  // No plane holds channels of two groups.
  template <typename E>
  void pack(const Image<const E>& x, int64_t groups, int64_t group) const {
    if (group % kSteps<U> == 0) return pack(x, groups * group);
    ChannelPlanes to = *this;
    Image<const E> from = x;
    for (int64_t g = 0; g < groups; ++g, to.dst += summed<U>(group) * plane_step, from.p += group * x.channel)
      to.pack(from, group);
  }

 private:
  template <typename E>
  void pack(const Image<const E>& x, int64_t channels) const {
    const int64_t planes = summed<U>(channels);
    for (int64_t i = first_row; i < first_row + rows; ++i) {
      U* row = dst + (i - first_row) * row_step();
      if (i < 0 || i >= x.rows) {
        for (int64_t c = 0; c < planes; ++c) std::memset(row + c * plane_step, 0, row_step() * sizeof(U));
      } else if (x.channels_dense()) {
        pack_pixels(x, i, row, channels);
      }
    }
    if (x.channels_dense()) return;
    for (int64_t c = 0; c < planes; ++c) pack_plane(x, c, channels - c * kSteps<U>);
  }

  template <typename E>
  void pack_plane(const Image<const E>& x, int64_t c, int64_t channels) const {
    const ChannelPlanes self = *this;  // in registers, out of reach of the stores
    const int64_t begin = first_row > 0 ? first_row : 0, end = smaller(first_row + rows, x.rows), n = x.columns;
    U* row = dst + c * plane_step + (begin - first_row) * row_step();
    for (int64_t i = begin; i < end; ++i, row += self.row_step()) {
      const E* from = x.at(c * kSteps<U>, i, 0);
      for (int64_t j = 0; j < n; j += W) {
        const Vec<U> values = load_columns<U>(from + j, n - j, channels, x.channel);
        if (self.phases == 1) {
          store(row + j - self.first_column, values);
          continue;
        }
        U part[W];
        store(part, values);
        for (int64_t l = 0; l < W && j + l < n; ++l) *self.place(row, j + l) = part[l];
      }
    }
  }

  template <typename E>
  void pack_pixels(const Image<const E>& x, int64_t i, U* row, int64_t channels) const {
    using T = Compute<E>;
    constexpr int64_t N = W * kSteps<U>;
    for (int64_t phase = 0; phase < phases && phase < x.columns; ++phase)
      for (int64_t j = phase; j < x.columns; j += W * phases)
        for (int64_t c = 0; c < channels; c += N) {
          Vec<T> square[W];
          for (int l = 0; l < W; ++l) {
            const int64_t column = j + l * phases;
            square[l] = column < x.columns ? (Vec<T>)load_channels<U>(x.at(c, i, column), channels - c) : Vec<T>{};
          }
          transpose<T>(square);
          U* to = place(row, j) + c / kSteps<U> * plane_step;
          const int64_t planes = summed<U>(channels - c);
          for (int k = 0; k < W && k < planes; ++k) store(to + k * plane_step, (Vec<U>)square[k]);
        }
  }

  U* place(U* row, int64_t j) const {
    const int64_t q = j - first_column;
    return row + q % phases * width + q / phases;
  }
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
