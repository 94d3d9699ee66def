// Attention of one (batch, head) pair in scratch memory, forward and backward, with an additive term on the scores.
//
// Queries go in blocks of kQueryBlock rows, keys in blocks of at most kKeyBlock; the scores of a block stay in cache and
// nothing of size N x N exists. `Term` supplies the additive term in units of log 2 and collects its gradient:
//   const T* row(i, j0, n);  void add_gradient(i, j0, n, ds);
#pragma once

#include <cstdint>
#include <limits>

#include "../common/philox.h"
#include "dropout_row.h"
#include "gemm_tile.h"
#include "pack.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

inline constexpr int64_t kQueryBlock = 24;
inline constexpr int64_t kKeyBlock = 320;
inline constexpr double kLog2e = 1.4426950408889634;

struct AttentionSizes {
  int64_t N, D;
  double scale;
  double dropout;  // on the probabilities
  uint64_t seed;
};

template <typename T>
class AttentionCore {
 public:
  static int64_t scratch_bytes(const AttentionSizes& s, bool backward) {
    const int64_t keys = round_to_lanes<T>(s.N), width = round_to_lanes<T>(s.D);
    const int64_t rows = Scratch::padded_bytes<T>(s.N * width), columns = Scratch::padded_bytes<T>(keys * s.D);
    const int64_t block = Scratch::padded_bytes<T>(kQueryBlock * (key_block(keys) + 2 * kLanes<T>));
    const int64_t query_block = Scratch::padded_bytes<T>(kQueryBlock * width);
    const int64_t mask = Scratch::padded_bytes<int8_t>(dropout_row_bytes(kKeyBlock + kLanes<T>));
    return (backward ? 7 * rows + 2 * columns + 2 * block + query_block : 2 * rows + columns + block + query_block) +
           3 * Scratch::padded_bytes<T>(kQueryBlock) + mask;
  }

  void init(const AttentionSizes& sizes, bool backward, Scratch& scratch) {
    s_ = sizes;
    keys_ = round_to_lanes<T>(s_.N);
    width_ = round_to_lanes<T>(s_.D);
    block_ = key_block(keys_);
    row_stride_ = block_ + 2 * kLanes<T>;
    q_ = scratch.take<T>(s_.N * width_);
    k_columns_ = scratch.take<T>(keys_ * s_.D);
    scores_ = scratch.take<T>(kQueryBlock * row_stride_);
    out_ = scratch.take<T>(kQueryBlock * width_);
    row_max_ = scratch.take<T>(kQueryBlock);
    row_sum_ = scratch.take<T>(kQueryBlock);
    delta_ = scratch.take<T>(kQueryBlock);
    mask_ = scratch.take<int8_t>(dropout_row_bytes(kKeyBlock + kLanes<T>));
    v_ = scratch.take<T>(s_.N * width_);
    if (backward) {
      k_ = scratch.take<T>(s_.N * width_);
      v_columns_ = scratch.take<T>(keys_ * s_.D);
      grad_out_ = scratch.take<T>(s_.N * width_);
      grad_k_ = scratch.take<T>(s_.N * width_);
      grad_v_ = scratch.take<T>(s_.N * width_);
      grad_scores_ = scratch.take<T>(kQueryBlock * row_stride_);
    }
    score_unit_ = static_cast<T>(s_.scale * kLog2e);
    threshold_ = dropout_threshold(s_.dropout);
    kept_scale_ = s_.dropout > 0 ? static_cast<T>(dropout_scale(s_.dropout)) : T(1);
  }

  template <typename E, typename Term>
  void forward(const E* q, int64_t q_stride, const E* k, int64_t k_stride, const E* v, int64_t v_stride, E* out,
               int64_t out_stride, T* lse, uint64_t first_element, Term& term) {
    pack_rows(q_, width_, q, q_stride, s_.N, s_.D);
    pack_columns(k_columns_, k, k_stride, s_.N, s_.D);
    pack_rows(v_, width_, v, v_stride, s_.N, s_.D);
    for (int64_t i0 = 0; i0 < s_.N; i0 += kQueryBlock) {
      const int64_t rows = smaller(kQueryBlock, s_.N - i0);
      for (int64_t r = 0; r < rows; ++r) {
        row_max_[r] = -std::numeric_limits<T>::infinity();
        row_sum_[r] = 0;
      }
      for (int64_t j0 = 0; j0 < keys_; j0 += block_) {
        const int64_t n = smaller(block_, keys_ - j0);
        score_block(scores_, q_, k_columns_, i0, rows, j0, n);
        for (int64_t r = 0; r < rows; ++r) {
          const T shrink = softmax_row(scores_ + r * row_stride_, i0 + r, r, j0, n, term);
          if (s_.dropout > 0) drop(scores_ + r * row_stride_, n, first_element + (i0 + r) * s_.N + j0);
          if (j0 > 0)
            for (int64_t d = 0; d < width_; ++d) out_[r * width_ + d] *= shrink;
        }
        weighted_rows(out_, scores_, v_, rows, j0, n, j0 > 0);
      }
      for (int64_t r = 0; r < rows; ++r) {
        unpack_rows(out + (i0 + r) * out_stride, out_stride, out_ + r * width_, width_, 1, s_.D,
                    kept_scale_ / row_sum_[r]);
        lse[i0 + r] = (row_max_[r] + std::log2(row_sum_[r])) * static_cast<T>(0.6931471805599453);
      }
    }
  }

  template <typename E, typename Term>
  void backward(const E* q, int64_t q_stride, const E* k, int64_t k_stride, const E* v, int64_t v_stride, const E* out,
                int64_t out_stride, const E* grad_out, int64_t grad_out_stride, const T* lse, E* grad_q,
                int64_t grad_q_stride, E* grad_k, int64_t grad_k_stride, E* grad_v, int64_t grad_v_stride,
                uint64_t first_element, Term& term) {
    pack_rows(q_, width_, q, q_stride, s_.N, s_.D);
    pack_rows(k_, width_, k, k_stride, s_.N, s_.D);
    pack_columns(k_columns_, k, k_stride, s_.N, s_.D);
    pack_columns(v_columns_, v, v_stride, s_.N, s_.D);
    pack_rows(grad_out_, width_, grad_out, grad_out_stride, s_.N, s_.D);
    for (int64_t i = 0; i < s_.N * width_; ++i) grad_k_[i] = grad_v_[i] = 0;
    for (int64_t i0 = 0; i0 < s_.N; i0 += kQueryBlock) {
      const int64_t rows = smaller(kQueryBlock, s_.N - i0);
      for (int64_t r = 0; r < rows; ++r) delta_[r] = dot(grad_out_ + (i0 + r) * width_, out + (i0 + r) * out_stride);
      for (int64_t j0 = 0; j0 < keys_; j0 += block_) {
        const int64_t n = smaller(block_, keys_ - j0);
        score_block(scores_, q_, k_columns_, i0, rows, j0, n);
        score_block(grad_scores_, grad_out_, v_columns_, i0, rows, j0, n);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t i = i0 + r;
          grad_row(scores_ + r * row_stride_, grad_scores_ + r * row_stride_, i, j0, n,
                   lse[i] * static_cast<T>(kLog2e), delta_[r], first_element + i * s_.N + j0, term);
        }
        weighted_columns(grad_v_, scores_, grad_out_, i0, rows, j0, n);
        weighted_columns(grad_k_, grad_scores_, q_, i0, rows, j0, n);
        weighted_rows(out_, grad_scores_, k_, rows, j0, n, j0 > 0);
      }
      unpack_rows(grad_q + i0 * grad_q_stride, grad_q_stride, out_, width_, rows, s_.D, static_cast<T>(s_.scale));
    }
    unpack_rows(grad_k, grad_k_stride, grad_k_, width_, s_.N, s_.D, static_cast<T>(s_.scale));
    unpack_rows(grad_v, grad_v_stride, grad_v_, width_, s_.N, s_.D, T(1));
  }

 private:
  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  // The keys in as few equal blocks as kKeyBlock allows.
  static int64_t key_block(int64_t keys) {
    const int64_t blocks = (keys + kKeyBlock - 1) / kKeyBlock;
    return blocks ? round_to_lanes<T>((keys + blocks - 1) / blocks) : 0;
  }

  // dst (rows, n) = left rows [i0, ...) times columns [j0, ...).
  void score_block(T* dst, const T* left, const T* columns, int64_t i0, int64_t rows, int64_t j0, int64_t n) {
    constexpr int W = kLanes<T>;
    gemm<T>(rows, n / W, s_.D, Left<T>{left + i0 * width_, width_, 1}, Right<T>{columns + j0 * s_.D, W, W * s_.D},
            [&](int64_t m, int64_t v, Vec<T> x) { store(dst + m * row_stride_ + v * W, x); });
  }

  // dst (rows, D) = (or +=) block (rows, keys) times rows [j0, ...) of right.
  void weighted_rows(T* dst, const T* block, const T* right, int64_t rows, int64_t j0, int64_t n, bool add) {
    constexpr int W = kLanes<T>;
    const Left<T> a{block, row_stride_, 1};
    const Right<T> b{right + j0 * width_, width_, W};
    const int64_t keys = smaller(n, s_.N - j0);
    if (add)
      gemm<T>(rows, width_ / W, keys, a, b, [&](int64_t m, int64_t v, Vec<T> x) {
        T* p = dst + m * width_ + v * W;
        store(p, load(p) + x);
      });
    else
      gemm<T>(rows, width_ / W, keys, a, b,
              [&](int64_t m, int64_t v, Vec<T> x) { store(dst + m * width_ + v * W, x); });
  }

  // dst rows [j0, ...) += block^T (keys, rows) times rows [i0, ...) of right.
  void weighted_columns(T* dst, const T* block, const T* right, int64_t i0, int64_t rows, int64_t j0, int64_t n) {
    constexpr int W = kLanes<T>;
    T* first = dst + j0 * width_;
    gemm<T>(smaller(n, s_.N - j0), width_ / W, rows, Left<T>{block, 1, row_stride_},
            Right<T>{right + i0 * width_, width_, W}, [&](int64_t m, int64_t v, Vec<T> x) {
              T* p = first + m * width_ + v * W;
              store(p, load(p) + x);
            });
  }

  // Scores to unnormalised probabilities; returns what earlier sums of this row shrink by.
  template <typename Term>
  T softmax_row(T* s, int64_t i, int64_t r, int64_t j0, int64_t n, Term& term) {
    constexpr int W = kLanes<T>;
    const T* bias = term.row(i, j0, n);
    const Vec<T> unit = splat(score_unit_);
    Vec<T> best = splat(row_max_[r]);
    for (int64_t j = 0; j < n; j += W) {
      const Vec<T> x = load(s + j) * unit + load(bias + j);
      store(s + j, x);
      best = maximum<T>(best, x);
    }
    const T top = horizontal_max<T>(best);
    const Vec<T> shift = splat(top);
    Vec<T> sum{};
    for (int64_t j = 0; j < n; j += W) {
      const Vec<T> p = exp2_vec(load(s + j) - shift);
      store(s + j, p);
      sum += p;
    }
    const T shrink = exp2_vec(splat(row_max_[r] - top))[0];
    row_sum_[r] = row_sum_[r] * shrink + horizontal_sum<T>(sum);
    row_max_[r] = top;
    return shrink;
  }

  // Scores to probabilities as the forward used them, and gradients of those to gradients of the scores.
  template <typename Term>
  void grad_row(T* s, T* ds, int64_t i, int64_t j0, int64_t n, T lse, T delta, uint64_t first_element, Term& term) {
    constexpr int W = kLanes<T>;
    const T* bias = term.row(i, j0, n);
    const Vec<T> unit = splat(score_unit_), shift = splat(lse), mean = splat(delta);
    if (s_.dropout > 0) {
      const int8_t* keep = dropout_row(mask_, n, first_element, s_.seed, kAttnDropoutStream, threshold_);
      for (int64_t j = 0; j < n; j += W) {
        const Vec<T> p = exp2_vec(load(s + j) * unit + (load(bias + j) - shift));
        store(s + j, keep_lanes<T>(p * kept_scale_, keep + j));
        store(ds + j, p * (keep_lanes<T>(load(ds + j) * kept_scale_, keep + j) - mean));
      }
    } else {
      for (int64_t j = 0; j < n; j += W) {
        const Vec<T> p = exp2_vec(load(s + j) * unit + (load(bias + j) - shift));
        store(s + j, p);
        store(ds + j, p * (load(ds + j) - mean));
      }
    }
    term.add_gradient(i, j0, n, ds);
  }

  void drop(T* p, int64_t n, uint64_t first_element) {
    const int8_t* keep = dropout_row(mask_, n, first_element, s_.seed, kAttnDropoutStream, threshold_);
    for (int64_t j = 0; j < n; j += kLanes<T>) store(p + j, keep_lanes<T>(load(p + j), keep + j));
  }

  template <typename E>
  T dot(const T* a, const E* b) const {
    T sum = 0;
    for (int64_t d = 0; d < s_.D; ++d) sum += a[d] * static_cast<T>(load_float(b + d));
    return sum;
  }

  AttentionSizes s_;
  int64_t keys_ = 0;        // N rounded up to whole vectors
  int64_t width_ = 0;       // D rounded up to whole vectors
  int64_t block_ = 0;       // keys of a block
  int64_t row_stride_ = 0;  // of scores_ and grad_scores_
  T score_unit_ = 0, kept_scale_ = 1;
  uint32_t threshold_ = 0;
  T *q_ = nullptr, *k_ = nullptr, *v_ = nullptr, *grad_out_ = nullptr;  // (N, width_)
  T *grad_k_ = nullptr, *grad_v_ = nullptr;                            // (N, width_)
  T *k_columns_ = nullptr, *v_columns_ = nullptr;                      // (keys_ / lanes, D, lanes)
  T *scores_ = nullptr, *grad_scores_ = nullptr;                       // (kQueryBlock, row_stride_)
  T* out_ = nullptr;                                                   // (kQueryBlock, width_)
  T *row_max_ = nullptr, *row_sum_ = nullptr, *delta_ = nullptr;       // (kQueryBlock,)
  int8_t* mask_ = nullptr;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
