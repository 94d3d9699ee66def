// The quadratic relative position term of one head, row by row (DearKD Eq. 2):
//   b_ij = -alpha (|d|^2 - 2 center . d),  d = pos(j) - pos(i),  0 where i or j is a prefix token.
// It splits into a part in rows and a part in columns, so two tables over the offset replace an N x N read.
#pragma once

#include <cstdint>
#include <limits>

#include "dropout_row.h"
#include "pack.h"
#include "simd.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

template <typename T>
class RelativePosition {
 public:
  struct Geometry {
    int64_t N, grid_h, grid_w, prefix;
    double dropout;
    uint64_t seed;
  };

  // The masks of a head are kept while they are small; beyond that they are drawn again for every image.
  static constexpr int64_t kMaskTableBytes = int64_t{1} << 20;

  static int64_t scratch_bytes(const Geometry& g) {
    const int64_t n = row_length(g);
    return Scratch::padded_bytes<T>(2 * g.grid_h) + Scratch::padded_bytes<T>(2 * g.grid_w + kLanes<T>) +
           3 * Scratch::padded_bytes<T>(n) + Scratch::padded_bytes<int8_t>(mask_bytes(g));
  }

  void init(const Geometry& g, Scratch& scratch) {
    geometry_ = g;
    row_table_ = scratch.take<T>(2 * g.grid_h);
    column_table_ = scratch.take<T>(2 * g.grid_w + kLanes<T>);
    const int64_t n = row_length(g);
    bias_ = scratch.take<T>(n);
    token_row_ = scratch.take<T>(n);
    token_column_ = scratch.take<T>(n);
    mask_ = scratch.take<int8_t>(mask_bytes(g));
    threshold_ = dropout_threshold(g.dropout);
    kept_scale_ = static_cast<T>(dropout_scale(g.dropout));
    for (int64_t j = 0; j < n; ++j) {
      const bool patch = j >= g.prefix && j < g.N;
      token_row_[j] = patch ? static_cast<T>((j - g.prefix) / g.grid_w) : T(0);
      token_column_[j] = patch ? static_cast<T>((j - g.prefix) % g.grid_w) : T(0);
    }
  }

  // alpha and center of head h; the tables are in units of log 2 and hold the dropout's scale.
  void set_head(int64_t h, T alpha, T center_row, T center_column) {
    const Geometry& g = geometry_;
    alpha_ = alpha;
    center_row_ = center_row;
    center_column_ = center_column;
    const T unit = static_cast<T>(1.4426950408889634) * (g.dropout > 0 ? kept_scale_ : T(1));
    for (int64_t y = 1 - g.grid_h; y < g.grid_h; ++y) {
      const T d = static_cast<T>(y);
      row_table_[y + g.grid_h - 1] = -alpha * (d * d - 2 * center_row * d) * unit;
    }
    for (int64_t x = 1 - g.grid_w; x < g.grid_w; ++x) {
      const T d = static_cast<T>(x);
      column_table_[x + g.grid_w - 1] = -alpha * (d * d - 2 * center_column * d) * unit;
    }
    head_ = h;
    if (g.dropout > 0 && keeps_table(g))
      for (int64_t i = g.prefix; i < g.N; ++i) draw(i, mask_ + i * mask_row_bytes(g));
  }

  // Term of query i against keys [j0, j0 + n), n a whole number of vectors; -infinity from key N on.
  const T* row(int64_t i, int64_t j0, int64_t n) {
    const Geometry& g = geometry_;
    constexpr int W = kLanes<T>;
    int64_t first = 0;  // key that bias_[0] stands for
    if (i < g.prefix) {
      for (int64_t j = 0; j < n; j += W) store(bias_ + j, Vec<T>{});
      first = j0;
    } else {
      const int64_t y = (i - g.prefix) / g.grid_w, x = (i - g.prefix) % g.grid_w;
      const int64_t end = j0 + n < g.N ? j0 + n : g.N;
      int64_t key_row = 0;
      if (j0 < g.prefix) {
        for (int64_t j = 0; j < g.prefix; ++j) bias_[j] = 0;
      } else {
        key_row = (j0 - g.prefix) / g.grid_w;
        first = g.prefix + key_row * g.grid_w;
      }
      const T* columns = column_table_ + (g.grid_w - 1 - x);
      T* out = bias_ + (g.prefix + key_row * g.grid_w - first);
      for (; g.prefix + key_row * g.grid_w < end; ++key_row, out += g.grid_w) {
        const Vec<T> row_part = splat(row_table_[key_row - y + g.grid_h - 1]);
        for (int64_t c = 0; c < g.grid_w; c += W) store(out + c, row_part + load(columns + c));
      }
      if (g.dropout > 0) {
        const int8_t* keep = mask_row(i) + j0;
        T* b = bias_ + (j0 - first);
        for (int64_t j = 0; j < n; j += W) store(b + j, keep_lanes<T>(load(b + j), keep + j));
      }
    }
    for (int64_t j = g.N > j0 ? g.N : j0; j < j0 + n; ++j) bias_[j - first] = -std::numeric_limits<T>::infinity();
    return bias_ + (j0 - first);
  }

  void clear_gradient() { sum_square_ = sum_row_ = sum_column_ = 0; }

  // Adds query i's share, given the gradient ds of its scores against keys [j0, j0 + n).
  void add_gradient(int64_t i, int64_t j0, int64_t n, const T* ds) {
    const Geometry& g = geometry_;
    constexpr int W = kLanes<T>;
    if (i < g.prefix) return;
    const Vec<T> y = splat(token_row_[i]), x = splat(token_column_[i]);
    const int8_t* keep = g.dropout > 0 ? mask_row(i) + j0 : nullptr;
    Vec<T> square{}, row{}, column{};
    const auto add = [&](int64_t j, Vec<T> s) {
      const Vec<T> dy = load(token_row_ + j0 + j) - y, dx = load(token_column_ + j0 + j) - x;
      const Vec<T> sy = s * dy, sx = s * dx;
      row += sy;
      column += sx;
      square += sy * dy;
      square += sx * dx;
    };
    int64_t j = 0;
    for (; j < n && j0 + j < g.prefix; j += W) {
      Vec<T> s = load(ds + j);
      for (int l = 0; l < W; ++l)
        if (j0 + j + l < g.prefix) s[l] = 0;
      add(j, keep ? keep_lanes<T>(s, keep + j) : s);
    }
    if (keep)
      for (; j < n; j += W) add(j, keep_lanes<T>(load(ds + j), keep + j));
    else
      for (; j < n; j += W) add(j, load(ds + j));
    sum_square_ += horizontal_sum<T>(square);
    sum_row_ += horizontal_sum<T>(row);
    sum_column_ += horizontal_sum<T>(column);
  }

  // (alpha, center row, center column) of what add_gradient collected.
  void gradient(double* out) const {
    const double unit = geometry_.dropout > 0 ? static_cast<double>(kept_scale_) : 1.0;
    out[0] = unit * (2.0 * (center_row_ * sum_row_ + center_column_ * sum_column_) - sum_square_);
    out[1] = unit * 2.0 * alpha_ * sum_row_;
    out[2] = unit * 2.0 * alpha_ * sum_column_;
  }

 private:
  // A row may begin and end inside a grid row, and is written by whole vectors.
  static int64_t row_length(const Geometry& g) { return g.N + 2 * (g.grid_w + kLanes<T>); }

  static int64_t mask_row_bytes(const Geometry& g) { return dropout_row_bytes(g.N); }
  static bool keeps_table(const Geometry& g) { return g.N * mask_row_bytes(g) <= kMaskTableBytes; }
  static int64_t mask_bytes(const Geometry& g) {
    if (g.dropout <= 0) return 0;
    return keeps_table(g) ? g.N * mask_row_bytes(g) : mask_row_bytes(g);
  }

  uint64_t first_element(int64_t i) const {
    return (static_cast<uint64_t>(head_) * geometry_.N + i) * static_cast<uint64_t>(geometry_.N);
  }

  const int8_t* draw(int64_t i, int8_t* into) const {
    return dropout_row(into, geometry_.N, first_element(i), geometry_.seed, kRpeDropoutStream, threshold_);
  }

  const int8_t* mask_row(int64_t i) const {
    if (!keeps_table(geometry_)) return draw(i, mask_);
    return mask_ + i * mask_row_bytes(geometry_) + (first_element(i) & 3);
  }

  Geometry geometry_;
  int64_t head_ = 0;
  T alpha_ = 0, center_row_ = 0, center_column_ = 0, kept_scale_ = 0;
  uint32_t threshold_ = 0;
  T* row_table_ = nullptr;     // (2 grid_h - 1) over the row offset
  T* column_table_ = nullptr;  // (2 grid_w - 1) over the column offset
  T* bias_ = nullptr;
  T* token_row_ = nullptr;     // grid row of each token
  T* token_column_ = nullptr;  // grid column of each token
  int8_t* mask_ = nullptr;
  double sum_square_ = 0, sum_row_ = 0, sum_column_ = 0;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
