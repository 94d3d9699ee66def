// Involution's images brought into the shapes that its tiles read: zero padded, in the compute type.
#pragma once

#include "involution_unit.h"

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

// Planes of an image's channels: dst (channels, rows, phases, width). Column q from `first_column` on lies in phase
// q % phases at q / phases, so that columns a stride apart are neighbours. What lies around the image is zero already,
// except for the rows outside of it.
template <typename T>
struct ChannelPlanes {
  static constexpr int W = kLanes<T>;
  T* dst;
  int64_t channel_step, phases, width, first_row, rows, first_column;

  int64_t row_step() const { return phases * width; }

  template <typename E>
  void pack(const Image<const E>& x, int64_t channels) const {
    for (int64_t i = first_row; i < first_row + rows; ++i) {
      T* row = dst + (i - first_row) * row_step();
      if (i < 0 || i >= x.rows) {
        for (int64_t c = 0; c < channels; ++c) std::memset(row + c * channel_step, 0, row_step() * sizeof(T));
      } else if (x.channels_dense()) {
        pack_pixels(x, i, row, channels);
      }
    }
    if (x.channels_dense()) return;
    for (int64_t c = 0; c < channels; ++c) pack_plane(x, c);
  }

 private:
  template <typename E>
  void pack_plane(const Image<const E>& x, int64_t c) const {
    const ChannelPlanes self = *this;  // in registers, out of reach of the stores
    const int64_t begin = first_row > 0 ? first_row : 0, end = smaller(first_row + rows, x.rows), n = x.columns;
    T* row = dst + c * channel_step + (begin - first_row) * row_step();
    for (int64_t i = begin; i < end; ++i, row += self.row_step()) {
      const E* from = x.at(c, i, 0);
      for (int64_t j = 0; j < n; j += W) {
        const Vec<T> values = load_part(from + j, n - j);
        if (self.phases == 1) {
          store(row + j - self.first_column, values);
          continue;
        }
        T part[W];
        store(part, values);
        for (int64_t l = 0; l < W && j + l < n; ++l) *self.place(row, j + l) = part[l];
      }
    }
  }

  template <typename E>
  void pack_pixels(const Image<const E>& x, int64_t i, T* row, int64_t channels) const {
    for (int64_t phase = 0; phase < phases && phase < x.columns; ++phase)
      for (int64_t j = phase; j < x.columns; j += W * phases)
        for (int64_t c = 0; c < channels; c += W) {
          Vec<T> square[W];
          for (int l = 0; l < W; ++l) {
            const int64_t column = j + l * phases;
            square[l] = column < x.columns ? load_part(x.at(c, i, column), channels - c) : Vec<T>{};
          }
          transpose<T>(square);
          T* to = place(row, j) + c * channel_step;
          for (int k = 0; k < W && c + k < channels; ++k) store(to + k * channel_step, square[k]);
        }
  }

  T* place(T* row, int64_t j) const {
    const int64_t q = j - first_column;
    return row + q % phases * width + q / phases;
  }
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
