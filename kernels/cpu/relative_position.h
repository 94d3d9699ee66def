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

  // A head's terms and masks are kept for all its images while they fit beside the tensors in the second cache, and are
  // made again block by block beyond that.
  static constexpr int64_t kTableBytes = int64_t{3} << 16;
  static constexpr int64_t kMaskTableBytes = int64_t{1} << 20;

  static int64_t scratch_bytes(const Geometry& g) {
    const int64_t n = row_length(g);
    return Scratch::padded_bytes<T>(2 * g.grid_h) + Scratch::padded_bytes<T>(2 * g.grid_w + kLanes<T>) +
           2 * Scratch::padded_bytes<T>(n) + Scratch::padded_bytes<T>(table_length(g)) +
           Scratch::padded_bytes<int8_t>(mask_bytes(g));
  }

  void init(const Geometry& g, Scratch& scratch) {
    geometry_ = g;
    row_table_ = scratch.take<T>(2 * g.grid_h);
    column_table_ = scratch.take<T>(2 * g.grid_w + kLanes<T>);
    const int64_t n = row_length(g);
    token_row_ = scratch.take<T>(n);
    token_column_ = scratch.take<T>(n);
    mask_ = scratch.take<int8_t>(mask_bytes(g));
    table_stride_ = round_to_lanes<T>(g.N) + kLanes<T>;
    table_ = scratch.take<T>(table_length(g));
    if (!keeps_table(g)) table_ = nullptr;
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
    if (g.dropout > 0 && keeps_masks(g))
      for (int64_t i = g.prefix; i < g.N; ++i) draw(i, mask_ + i * mask_row_bytes(g));
    if (table_)
      for (int64_t i = 0; i < g.N; ++i) fill(table_ + i * table_stride_, i, 0, round_to_lanes<T>(g.N));
  }

  // Term of queries [i0, i0 + rows) against keys [j0, j0 + n), -infinity from key N on; n is a whole number of vectors.
  // Written to block (rows, block_stride), one vector of slack a row, unless the head's table holds it.
  Rows<const T> terms(int64_t i0, int64_t rows, int64_t j0, int64_t n, T* block, int64_t block_stride) const {
    if (table_) return {table_ + i0 * table_stride_ + j0, table_stride_};
    for (int64_t r = 0; r < rows; ++r) fill(block + r * block_stride, i0 + r, j0, n);
    return {block, block_stride};
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
  static bool keeps_table(const Geometry& g) {
    return g.N * (round_to_lanes<T>(g.N) + kLanes<T>) * static_cast<int64_t>(sizeof(T)) <= kTableBytes;
  }

  void fill(T* dst, int64_t i, int64_t j0, int64_t n) const {
    const Geometry& g = geometry_;
    constexpr int W = kLanes<T>;
    const int64_t end = j0 + n < g.N ? j0 + n : g.N;
    const int64_t plain_end = i < g.prefix || end < g.prefix ? end : g.prefix;
    int64_t j = j0;
    for (; j < plain_end; j += W) store(dst + (j - j0), Vec<T>{});
    if (i >= g.prefix) {
      const int64_t y = (i - g.prefix) / g.grid_w, x = (i - g.prefix) % g.grid_w;
      const int8_t* keep = g.dropout > 0 ? mask_row(i) : nullptr;
      j = j0 > g.prefix ? j0 : g.prefix;
      int64_t key_row = (j - g.prefix) / g.grid_w;
      int64_t column = (j - g.prefix) % g.grid_w;
      for (; j < end; j += g.grid_w - column, column = 0, ++key_row) {
        const Vec<T> row_part = splat(row_table_[key_row - y + g.grid_h - 1]);
        const T* columns = column_table_ + (g.grid_w - 1 - x) + column;
        const int64_t count = smaller(g.grid_w - column, end - j);
        T* out = dst + (j - j0);
        if (keep)
          for (int64_t c = 0; c < count; c += W) store(out + c, keep_lanes<T>(row_part + load(columns + c), keep + j + c));
        else
          for (int64_t c = 0; c < count; c += W) store(out + c, row_part + load(columns + c));
      }
    }
    for (int64_t t = end; t < j0 + n; ++t) dst[t - j0] = -std::numeric_limits<T>::infinity();
  }

  static int64_t table_length(const Geometry& g) {
    return keeps_table(g) ? g.N * (round_to_lanes<T>(g.N) + kLanes<T>) : 0;
  }

  static int64_t row_length(const Geometry& g) { return g.N + kLanes<T>; }

  static int64_t mask_row_bytes(const Geometry& g) { return dropout_row_bytes(g.N); }
  static bool keeps_masks(const Geometry& g) { return g.N * mask_row_bytes(g) <= kMaskTableBytes; }
  static int64_t mask_bytes(const Geometry& g) {
    if (g.dropout <= 0) return 0;
    return keeps_masks(g) ? g.N * mask_row_bytes(g) : mask_row_bytes(g);
  }

  uint64_t first_element(int64_t i) const {
    return (static_cast<uint64_t>(head_) * geometry_.N + i) * static_cast<uint64_t>(geometry_.N);
  }

  const int8_t* draw(int64_t i, int8_t* into) const {
    return dropout_row(into, geometry_.N, first_element(i), geometry_.seed, kRpeDropoutStream, threshold_);
  }

  const int8_t* mask_row(int64_t i) const {
    if (!keeps_masks(geometry_)) return draw(i, mask_);
    return mask_ + i * mask_row_bytes(geometry_) + (first_element(i) & 3);
  }

  Geometry geometry_;
  int64_t head_ = 0;
  T alpha_ = 0, center_row_ = 0, center_column_ = 0, kept_scale_ = 0;
  uint32_t threshold_ = 0;
  T* row_table_ = nullptr;     // (2 grid_h - 1) over the row offset
  T* column_table_ = nullptr;  // (2 grid_w - 1) over the column offset
  T* token_row_ = nullptr;     // grid row of each token
  T* token_column_ = nullptr;  // grid column of each token
  int8_t* mask_ = nullptr;     // a head's dropout masks by rows, or one row
  T* table_ = nullptr;         // (N, table_stride_), a head's terms, or null
  int64_t table_stride_ = 0;
  double sum_square_ = 0, sum_row_ = 0, sum_column_ = 0;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
