// Involution's images and weights, brought into the shapes that its tiles read: zero padded, in the compute type.
#pragma once

#include "involution_taps.h"
#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// One image, from the first channel of a group on. channel or column is 1.
template <typename E>
struct Image {
  E* p;
  int64_t channel, row, column, rows, columns;
  E* at(int64_t c, int64_t i, int64_t j) const { return p + c * channel + i * row + j * column; }
};

#if defined(__AVX512BF16__)
// Lanes [0, n) of 16 bit memory, zero beyond; nothing else is read.
inline __m256i load_halves(const bfloat16* p, int64_t n) {
  return _mm256_maskz_loadu_epi16(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1, p);
}

// Lane l: low[l] in the lower half, high[l] in the upper one.
inline __m512i pair_up(__m256i low, __m256i high) {
  static const int16_t order[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                  8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  return _mm512_permutex2var_epi16(_mm512_castsi256_si512(low), _mm512_loadu_si512(order),
                                   _mm512_castsi256_si512(high));
}
#endif

// Vectors of channels: dst (rows, columns, lanes) of an image's rows [first_row, ...) and columns [first_column, ...).
// A unit is an element, or an element and its right neighbour. The columns outside of the image are zero already.
template <typename M>
struct ChannelVectors {
  using Unit = typename M::Unit;
  static constexpr int W = kLanes<typename M::Sum>;
  Unit* dst;
  int64_t first_row, rows, first_column, columns;

  Unit* at(int64_t row, int64_t column) const {
    return dst + ((row - first_row) * columns + column - first_column) * W;
  }

  template <typename E>
  static Vec<typename M::Sum> pixels(const E* p, int64_t n) {
    if constexpr (!M::paired) {
      return load_part(p, n);
    } else {
#if defined(__AVX512BF16__)
      return (Vec<float>)pair_up(load_halves(p, n), load_halves(p + 1, n - 1));
#endif
    }
  }

  // One pixel of an image whose channels are dense.
  template <typename E>
  static Vec<typename M::Sum> pixel(const Image<const E>& x, int64_t i, int64_t j, int64_t channels) {
    if constexpr (!M::paired) {
      return load_part(x.at(0, i, j), channels);
    } else {
#if defined(__AVX512BF16__)
      return (Vec<float>)pair_up(load_halves(x.at(0, i, j), j < 0 ? 0 : channels),
                                 load_halves(x.at(0, i, j + 1), j + 1 < x.columns ? channels : 0));
#endif
    }
  }

  template <typename E>
  void pack(const Image<const E>& x, int64_t channels) const {
    const int64_t from = M::paired && first_column < 0 ? -1 : 0;
    const int64_t to = smaller(x.columns, first_column + columns);
    for (int64_t i = first_row; i < first_row + rows; ++i) {
      if (i < 0 || i >= x.rows) {
        std::memset(at(i, first_column), 0, columns * W * sizeof(Unit));
      } else if (x.channel == 1 && x.column != 1) {
        for (int64_t j = from; j < to; ++j) store((typename M::Sum*)at(i, j), pixel(x, i, j, channels));
      } else {
        pack_row(x, i, to, channels);
      }
    }
  }

 private:
  template <typename E>
  void pack_row(const Image<const E>& x, int64_t i, int64_t to, int64_t channels) const {
    if (M::paired && first_column < 0) {  // nothing, and the first pixel
      Unit* left = at(i, -1);
      std::memset(left, 0, W * sizeof(Unit));
      for (int64_t c = 0; c < channels; ++c) std::memcpy((char*)(left + c) + sizeof(E), x.at(c, i, 0), sizeof(E));
    }
    for (int64_t j = 0; j < to; j += W) {
      const int64_t n = x.columns - j, step = x.channel;
      const E* from = x.at(0, i, j);
      Vec<typename M::Sum> square[W];
      for (int c = 0; c < W; ++c, from += step) square[c] = c < channels ? pixels(from, n) : Vec<typename M::Sum>{};
      transpose<typename M::Sum>(square);
      typename M::Sum* to_column = (typename M::Sum*)at(i, j);
      for (int l = 0; l < W && j + l < to; ++l) store(to_column + l * W, square[l]);
    }
  }
};

// Planes of an image's channels, one unit a column: dst (channels, rows, phases, width). Column q from `first_column`
// on lies in phase q % phases at q / phases, so that columns a stride apart are neighbours. A unit is an element, or
// the elements of two channels; a last channel without a partner has zeros beside it. What lies around the image is
// zero already, except for the rows outside of it.
template <typename M>
struct ChannelPlanes {
  using Unit = typename M::Unit;
  static constexpr int W = kLanes<typename M::Sum>;
  Unit* dst;
  int64_t channel_step, phases, width, first_row, rows, first_column;

  static int64_t planes(int64_t channels) { return M::paired ? (channels + 1) / 2 : channels; }
  int64_t row_step() const { return phases * width; }

  template <typename E>
  void pack(const Image<const E>& x, int64_t channels) const {
    for (int64_t i = first_row; i < first_row + rows; ++i) {
      Unit* row = dst + (i - first_row) * row_step();
      if (i < 0 || i >= x.rows) {
        for (int64_t c = 0; c < planes(channels); ++c)
          std::memset(row + c * channel_step, 0, row_step() * sizeof(Unit));
      } else if (x.channel == 1 && x.column != 1) {
        pack_pixels(x, i, row, channels);
      }
    }
    if (x.channel == 1 && x.column != 1) return;
    for (int64_t c = 0; c < planes(channels); ++c) pack_plane(x, c, channels);
  }

 private:
  template <typename E>
  static Vec<typename M::Sum> columns(const Image<const E>& x, int64_t i, int64_t plane, int64_t j,
                                      [[maybe_unused]] int64_t channels) {
    const int64_t n = x.columns - j;
    if constexpr (!M::paired) {
      return load_part(x.at(plane, i, j), n);
    } else {
#if defined(__AVX512BF16__)
      return (Vec<float>)pair_up(load_halves(x.at(2 * plane, i, j), n),
                                 load_halves(x.at(2 * plane + 1, i, j), 2 * plane + 1 < channels ? n : 0));
#endif
    }
  }

  // One vector of units of the pixel at column j, the units' planes from `plane` on.
  template <typename E>
  static Vec<typename M::Sum> units(const Image<const E>& x, int64_t i, int64_t j, int64_t plane, int64_t channels) {
    if constexpr (!M::paired) {
      return load_part(x.at(plane, i, j), channels - plane);
    } else {
#if defined(__AVX512BF16__)
      const int64_t n = smaller(channels - 2 * plane, 2 * W);
      const __mmask32 mask = n == 2 * W ? ~0u : (1u << n) - 1;
      return (Vec<float>)_mm512_maskz_loadu_epi16(mask, x.at(2 * plane, i, j));
#endif
    }
  }

  template <typename E>
  void pack_plane(const Image<const E>& x, int64_t plane, int64_t channels) const {
    using Sum = typename M::Sum;
    const ChannelPlanes self = *this;  // in registers, out of reach of the stores
    const int64_t begin = first_row > 0 ? first_row : 0, end = smaller(first_row + rows, x.rows), n = x.columns;
    Unit* row = dst + plane * channel_step + (begin - first_row) * row_step();
    for (int64_t i = begin; i < end; ++i, row += self.row_step()) {
      if (self.phases == 1) {
        for (int64_t j = 0; j < n; j += W)
          store((Sum*)(row + j - self.first_column), columns(x, i, plane, j, channels));
        continue;
      }
      for (int64_t j = 0; j < n; j += W) {
        Unit part[W];
        store((Sum*)part, columns(x, i, plane, j, channels));
        for (int64_t l = 0; l < W && j + l < n; ++l) *self.place(row, j + l) = part[l];
      }
    }
  }

  template <typename E>
  void pack_pixels(const Image<const E>& x, int64_t i, Unit* row, int64_t channels) const {
    using Sum = typename M::Sum;
    const int64_t count = planes(channels);
    for (int64_t plane = 0; plane < count; plane += W)
      for (int64_t phase = 0; phase < phases && phase < x.columns; ++phase)
        for (int64_t j = phase; j < x.columns; j += W * phases) {
          Vec<Sum> square[W];
          for (int l = 0; l < W; ++l) {
            const int64_t column = j + l * phases;
            square[l] = column < x.columns ? units(x, i, column, plane, channels) : Vec<Sum>{};
          }
          transpose<Sum>(square);
          Unit* to = place(row, j) + plane * channel_step;
          for (int c = 0; c < W && plane + c < count; ++c) store((Sum*)(to + c * channel_step), square[c]);
        }
  }

  Unit* place(Unit* row, int64_t j) const {
    const int64_t q = j - first_column;
    return row + q % phases * width + q / phases;
  }
};

// A row of pixel vectors (columns, lanes) -> row `i` of an image.
template <typename E>
inline void unpack_row(const Image<E>& y, int64_t i, const Compute<E>* row, int64_t channels) {
  using T = Compute<E>;
  constexpr int W = kLanes<T>;
  if (y.channel == 1 && y.column != 1) {
    for (int64_t j = 0; j < y.columns; ++j) store_part(y.at(0, i, j), load(row + j * W), channels);
    return;
  }
  for (int64_t j = 0; j < y.columns; j += W) {
    Vec<T> square[W];
    for (int l = 0; l < W; ++l) square[l] = load(row + smaller(j + l, y.columns - 1) * W);
    transpose<T>(square);
    for (int c = 0; c < W && c < channels; ++c) store_part(y.at(c, i, j), square[c], y.columns - j);
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
