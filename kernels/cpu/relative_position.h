// The quadratic relative position term of one head, row by row (DearKD Eq. 2):
//   b_ij = -alpha (|d|^2 - 2 center . d),  d = pos(j) - pos(i),  0 where i or j is a prefix token.
// It splits into a part in rows and a part in columns, so two short tables replace an N x N read.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "attention_core.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

template <typename T>
class RelativePosition final : public ScoreTerm<T> {
  using Wide = std::conditional_t<std::is_same_v<T, float>, double, long double>;

 public:
  struct Geometry {
    int64_t N, grid_h, grid_w, prefix;
    double dropout;
    uint64_t seed;
  };

  // Up to these sizes a head's term is tabulated and its dropout masks are kept; beyond, both are made row by row.
  static constexpr int64_t kTableBytes = int64_t{4} << 20;
  static constexpr int64_t kMaskBytes = int64_t{1} << 20;
  static constexpr int64_t kMaskBudget = int64_t{3} << 16;  // of the masks of all heads kept at a time

  // Heads worth taking in turn on one image before going to the next: neighbours in memory, with all their masks kept.
  static int64_t heads_in_turn(const Geometry& g, int64_t H) {
    if (g.dropout <= 0) return H;
    const int64_t fit = keeps_masks(g) ? kMaskBudget / (g.N * mask_stride(g)) : 1;
    return fit < 1 ? 1 : smaller(fit, H);
  }

  static int64_t scratch_bytes(const Geometry& g, int64_t heads) {
    return Scratch::padded_bytes<T>(2 * g.grid_h) + Scratch::padded_bytes<T>(2 * g.grid_w + kLanes<T>) +
           2 * Scratch::padded_bytes<T>(row_length(g)) + Scratch::padded_bytes<T>(table_length(g)) +
           Scratch::padded_bytes<int64_t>(heads) + Scratch::padded_bytes<int8_t>(mask_bytes(g, heads));
  }

  void init(const Geometry& g, int64_t heads, Scratch& scratch) {
    geometry_ = g;
    heads_ = heads;
    drawn_head_ = scratch.take<int64_t>(heads);
    for (int64_t slot = 0; slot < heads; ++slot) drawn_head_[slot] = -1;
    row_table_ = scratch.take<T>(2 * g.grid_h);
    column_table_ = scratch.take<T>(2 * g.grid_w + kLanes<T>);
    token_row_ = scratch.take<T>(row_length(g));
    token_column_ = scratch.take<T>(row_length(g));
    T* table = scratch.take<T>(table_length(g));
    keep_all_ = scratch.take<int8_t>(mask_bytes(g, heads));
    mask_ = keep_all_ + row_length(g);
    if (g.dropout > 0) std::memset(keep_all_, -1, row_length(g));
    threshold_ = dropout_threshold(g.dropout);
    for (int64_t j = 0; j < row_length(g); ++j) {
      const bool patch = j >= g.prefix && j < g.N;
      token_row_[j] = patch ? static_cast<T>((j - g.prefix) / g.grid_w) : T(0);
      token_column_[j] = patch ? static_cast<T>((j - g.prefix) % g.grid_w) : T(0);
    }
    // Zeros, with -infinity from key N on: the term of a prefix query.
    prefix_row_ = table;
    zeros_ = prefix_row_ + row_length(g);
    row_terms_ = keeps_tables(g) ? zeros_ + row_length(g) : nullptr;
    column_terms_ = keeps_tables(g) ? row_terms_ + g.grid_h * row_length(g) : nullptr;
    for (int64_t j = 0; j < row_length(g); ++j) {
      zeros_[j] = 0;
      prefix_row_[j] = j < g.N ? T(0) : -std::numeric_limits<T>::infinity();
    }
  }

  // alpha and center of head h; the tables are in units of log 2 and hold the dropout's scale.
  void set_head(int64_t h, T alpha, T center_row, T center_column) {
    const Geometry& g = geometry_;
    head_ = h;
    alpha_ = alpha;
    center_row_ = center_row;
    center_column_ = center_column;
    // In a wider type, and rounded once: errors of so few numbers, which all scores share, do not average out.
    const Wide unit = kLog2e * (g.dropout > 0 ? dropout_scale(g.dropout) : 1.0);
    // Bounded, so that the parts in rows and in columns cannot be infinities of opposite sign.
    const Wide bound = std::numeric_limits<T>::max() / 4;
    const auto part = [&](Wide d, Wide center) {
      const Wide x = -alpha * (d * d - 2 * center * d) * unit;
      return static_cast<T>(x > bound ? bound : x < -bound ? -bound : x);
    };
    for (int64_t y = 1 - g.grid_h; y < g.grid_h; ++y) row_table_[y + g.grid_h - 1] = part(y, center_row);
    for (int64_t x = 1 - g.grid_w; x < g.grid_w; ++x) column_table_[x + g.grid_w - 1] = part(x, center_column);
    if (keeps_tables(g)) {
      for (int64_t y = 0; y < g.grid_h; ++y) expand_row(row_terms_ + y * row_length(g), y);
      for (int64_t x = 0; x < g.grid_w; ++x) expand_column(column_terms_ + x * row_length(g), x);
    }
    if (keeps_masks(g)) {
      int8_t* room = mask_ + heads_ * g.N * mask_stride(g);
      masks_ = mask_ + (h % heads_) * g.N * mask_stride(g);
      if (drawn_head_[h % heads_] != h)
        for (int64_t i = g.prefix; i < g.N; ++i)
          std::memcpy(masks_ + i * mask_stride(g), draw(i, room), mask_stride(g));
      drawn_head_[h % heads_] = h;
    }
  }

  // Term of query i against keys [j0, j0 + n), -infinity from key N on; n is a whole number of vectors. Where the
  // head's tables are not kept it is written to `room` (n), and holds until the next call.
  TermRow<T> row(int64_t i, int64_t j0, int64_t n, T* room) const override {
    const Geometry& g = geometry_;
    if (i < g.prefix) return {prefix_row_ + j0, zeros_, keeps_all(j0)};
    const int64_t y = (i - g.prefix) / g.grid_w, x = (i - g.prefix) % g.grid_w;
    if (keeps_tables(g) && (g.dropout <= 0 || keeps_masks(g)))
      return {row_terms_ + y * row_length(g) + j0, column_terms_ + x * row_length(g) + j0,
              g.dropout > 0 ? mask_row(i) + j0 : nullptr};
    const int8_t* keep = g.dropout > 0 ? mask_row(i) : nullptr;
    for (int64_t t = 0; t < n; ++t) {
      const int64_t j = j0 + t;
      const bool patch = j >= g.prefix && j < g.N && (!keep || keep[j]);
      room[t] = patch ? row_table_[static_cast<int64_t>(token_row_[j]) - y + g.grid_h - 1] +
                            column_table_[static_cast<int64_t>(token_column_[j]) - x + g.grid_w - 1]
                      : prefix_row_[j];
    }
    return {room, zeros_, keeps_all(j0)};
  }

  void clear_gradient() { sum_square_ = sum_row_ = sum_column_ = 0; }

  // Adds query i's share, given the gradient ds of its scores against keys [j0, j0 + n).
  void add_gradient(int64_t i, int64_t j0, int64_t n, const T* ds) override {
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
    const double unit = geometry_.dropout > 0 ? dropout_scale(geometry_.dropout) : 1.0;
    out[0] = unit * (2.0 * (center_row_ * sum_row_ + center_column_ * sum_column_) - sum_square_);
    out[1] = unit * 2.0 * alpha_ * sum_row_;
    out[2] = unit * 2.0 * alpha_ * sum_column_;
  }

 private:
  static int64_t row_length(const Geometry& g) { return round_to_lanes<T>(g.N) + kLanes<T>; }
  static bool keeps_tables(const Geometry& g) {
    return (g.grid_h + g.grid_w) * row_length(g) * static_cast<int64_t>(sizeof(T)) <= kTableBytes;
  }
  static int64_t table_length(const Geometry& g) {
    return (2 + (keeps_tables(g) ? g.grid_h + g.grid_w : 0)) * row_length(g);
  }
  static int64_t mask_stride(const Geometry& g) { return round_to_lanes<T>(g.N); }
  static bool keeps_masks(const Geometry& g) { return g.dropout > 0 && g.N * mask_stride(g) <= kMaskBytes; }
  static int64_t mask_bytes(const Geometry& g, int64_t heads) {
    if (g.dropout <= 0) return 0;
    return row_length(g) + (keeps_masks(g) ? heads * g.N * mask_stride(g) : 0) + dropout_row_bytes(g.N);
  }

  // Masks that drop nothing, in the place of those of a row.
  const int8_t* keeps_all(int64_t j0) const { return geometry_.dropout > 0 ? keep_all_ + j0 : nullptr; }

  // The part in rows of a query in grid row y against every key; -infinity behind the last.
  void expand_row(T* dst, int64_t y) const {
    const Geometry& g = geometry_;
    T* out = dst + g.prefix;
    for (int64_t key_row = 0; key_row < g.grid_h; ++key_row, out += g.grid_w) {
      const Vec<T> part = splat(row_table_[key_row - y + g.grid_h - 1]);
      for (int64_t c = 0; c < g.grid_w; c += kLanes<T>) store(out + c, part);
    }
    for (int64_t j = 0; j < g.prefix; ++j) dst[j] = 0;
    for (int64_t j = g.N; j < row_length(g); ++j) dst[j] = prefix_row_[j];
  }

  // The part in columns of a query in grid column x against every key.
  void expand_column(T* dst, int64_t x) const {
    const Geometry& g = geometry_;
    const T* columns = column_table_ + (g.grid_w - 1 - x);
    T* out = dst + g.prefix;
    for (int64_t key_row = 0; key_row < g.grid_h; ++key_row, out += g.grid_w)
      for (int64_t c = 0; c < g.grid_w; c += kLanes<T>) store(out + c, load(columns + c));
    for (int64_t j = 0; j < g.prefix; ++j) dst[j] = 0;
    for (int64_t j = g.N; j < row_length(g); ++j) dst[j] = 0;
  }

  uint64_t first_element(int64_t i) const {
    return (static_cast<uint64_t>(head_) * geometry_.N + i) * static_cast<uint64_t>(geometry_.N);
  }

  // Masks of row i, every element behind the last kept.
  const int8_t* draw(int64_t i, int8_t* into) const {
    int8_t* row = dropout_row(into, geometry_.N, first_element(i), geometry_.seed, kRpeDropoutStream, threshold_);
    std::memset(row + geometry_.N, -1, kLanes<T>);
    return row;
  }

  const int8_t* mask_row(int64_t i) const {
    return keeps_masks(geometry_) ? masks_ + i * mask_stride(geometry_) : draw(i, mask_);
  }

  Geometry geometry_;
  int64_t head_ = 0;
  T alpha_ = 0, center_row_ = 0, center_column_ = 0;
  uint32_t threshold_ = 0;
  T* row_table_ = nullptr;     // (2 grid_h - 1) over the row offset
  T* column_table_ = nullptr;  // (2 grid_w - 1) over the column offset
  T* token_row_ = nullptr;     // grid row of each token
  T* token_column_ = nullptr;  // grid column of each token
  T* prefix_row_ = nullptr;
  T* zeros_ = nullptr;
  T* row_terms_ = nullptr;         // (grid_h, row_length), or null
  T* column_terms_ = nullptr;      // (grid_w, row_length), or null
  int64_t heads_ = 1;              // heads whose masks are kept, in slot h % heads_
  int64_t* drawn_head_ = nullptr;  // (heads_,)
  int8_t* keep_all_ = nullptr;     // (row_length,)
  int8_t* mask_ = nullptr;         // (heads_, N, mask_stride) dropout masks where they are kept, then room for one row
  int8_t* masks_ = nullptr;        // those of this head
  Wide sum_square_ = 0, sum_row_ = 0, sum_column_ = 0;  // rows cancel each other, and the three sums do
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
