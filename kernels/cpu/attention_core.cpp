// Attention of one pair for one instruction set; see attention_core.h.
#include "attention_core.h"

#include <limits>
#include <utility>

namespace fastib::FASTIB_ISA_NAMESPACE {

// The longest row whose mask is drawn at once.
template <typename U>
int64_t AttentionCore<U>::mask_row_length(const AttentionSizes& s) {
  return (s.extra ? round_to_lanes<T>(s.N) : kKeyBlock) + kLanes<T>;
}

// Elements of a block of scores: kQueryBlock rows of a block of keys, and at least one row of all keys to fold.
template <typename U>
int64_t AttentionCore<U>::block_size(const AttentionSizes& s) {
  const int64_t keys = round_to_lanes<T>(s.N), block = kQueryBlock * row_stride(key_block(keys));
  return s.extra && block < row_stride(keys) ? row_stride(keys) : block;
}

template <typename U>
int64_t AttentionCore<U>::scratch_bytes(const AttentionSizes& s, bool backward) {
  const int64_t keys = round_to_lanes<T>(s.N), width = round_to_lanes<T>(s.D);
  const int64_t rows = Scratch::padded_bytes<T>(s.N * width), columns = Scratch::padded_bytes<T>(keys * s.D);
  const int64_t block = Scratch::padded_bytes<T>(block_size(s)), fold = Scratch::padded_bytes<T>(keys);
  const int64_t query_block = Scratch::padded_bytes<T>(kQueryBlock * width);
  const int64_t mask = Scratch::padded_bytes<int8_t>(dropout_row_bytes(mask_row_length(s)));
  return (backward ? 3 * rows + 2 * columns + (2 + kPaired) * block + (1 + 2 * kPaired) * query_block + fold
                   : rows + columns + block) +
         2 * query_block + fold + 3 * Scratch::padded_bytes<T>(kQueryBlock) + mask;
}

template <typename U>
void AttentionCore<U>::init(const AttentionSizes& sizes, bool backward, Scratch& scratch) {
  s_ = sizes;
  keys_ = round_to_lanes<T>(s_.N);
  width_ = round_to_lanes<T>(s_.D);
  depth_ = summed<U>(s_.D);
  left_width_ = round_to_lanes<T>(depth_);
  block_ = key_block(keys_);
  whole_ = block_ == keys_;
  row_stride_ = row_stride(block_);
  folded_ = s_.extra ? s_.extra + 1 : 0;
  fold_rows_ = smaller(kQueryBlock, block_size(s_) / row_stride(keys_));
  q_ = scratch.take<U>(kQueryBlock * left_width_);
  k_columns_ = scratch.take<U>(keys_ * depth_);
  scores_ = scratch.take<T>(block_size(s_));
  out_ = scratch.take<T>(kQueryBlock * width_);
  fold_ = scratch.take<T>(keys_);
  row_max_ = scratch.take<T>(kQueryBlock);
  row_sum_ = scratch.take<T>(kQueryBlock);
  delta_ = scratch.take<T>(kQueryBlock);
  mask_ = scratch.take<int8_t>(dropout_row_bytes(mask_row_length(s_)));
  if (backward) {
    k_ = scratch.take<U>(summed<U>(s_.N) * width_);
    v_columns_ = scratch.take<U>(keys_ * depth_);
    grad_out_ = scratch.take<U>(kQueryBlock * left_width_);
    q_right_ = kPaired ? scratch.take<U>(kQueryBlock * width_) : q_;
    grad_out_right_ = kPaired ? scratch.take<U>(kQueryBlock * width_) : grad_out_;
    grad_k_ = scratch.take<T>(s_.N * width_);
    grad_v_ = scratch.take<T>(s_.N * width_);
    grad_scores_ = scratch.take<T>(block_size(s_));
    grad_scores_left_ = kPaired ? scratch.take<U>(block_size(s_)) : reinterpret_cast<U*>(grad_scores_);
    fold_grad_ = scratch.take<T>(keys_);
  } else {
    v_ = scratch.take<U>(summed<U>(s_.N) * width_);
  }
  score_unit_ = static_cast<T>(s_.scale * kLog2e);
  threshold_ = dropout_threshold(s_.dropout);
  kept_scale_ = s_.dropout > 0 ? static_cast<T>(dropout_scale(s_.dropout)) : T(1);
}

template <typename U>
template <typename E>
void AttentionCore<U>::forward(const AttentionInputs<E>& x, const AttentionInputs<E>& next, Rows<E> out, T* stats,
                               uint64_t first_element, const ScoreTerm<T>& term) {
  pack_columns(k_columns_, x.k, s_.N, s_.D);
  pack_right(v_, width_, x.v, s_.N, s_.D);
  if (folded_) forward_folded(x, next, out, stats, first_element, term);
  for (int64_t i0 = folded_; i0 < s_.N; i0 += kQueryBlock) {
    const int64_t rows = smaller(kQueryBlock, s_.N - i0), token = i0 - s_.extra;
    pack_left(q_, left_width_, x.q.from(i0), rows, s_.D);
    for (int64_t j0 = 0; j0 < keys_; j0 += block_) {
      const int64_t n = smaller(block_, keys_ - j0);
      score_block(
          i0, rows, j0, n, term, [](T* p, int64_t, Vec<T> x) { store(p, x); },
          once(j0, next.q.from(i0), only(out.from(token))));
      softmax_block(rows, n, j0 > 0, kPaired && s_.dropout <= 0);
      if (s_.dropout > 0)
        for (int64_t r = 0; r < rows; ++r) {
          T* p = scores_ + r * row_stride_;
          drop(p, n, first_element + mask_row(i0 + r) + j0);
          if constexpr (kPaired) pair_along(reinterpret_cast<U*>(p), p, n);
        }
      weighted_rows(out_, reinterpret_cast<const U*>(scores_), v_, rows, j0, n, j0 > 0,
                    once(j0, next.k.from(i0), next.v.from(i0)));
    }
    for (int64_t r = 0; r < rows; ++r) {
      unpack_rows(out.from(token + r), out_ + r * width_, width_, 1, s_.D, kept_scale_ / row_sum_[r]);
      stats[i0 + r] = row_max_[r];
      stats[s_.N + i0 + r] = row_sum_[r];
    }
  }
}

// Row 0 of the output: v weighted by token 0's probabilities and the mean of the extra tokens'.
template <typename U>
template <typename E>
void AttentionCore<U>::forward_folded(const AttentionInputs<E>& x, const AttentionInputs<E>& next, Rows<E> out,
                                      T* stats, uint64_t first_element, const ScoreTerm<T>& term) {
  const int64_t block_stride = std::exchange(row_stride_, row_stride(keys_));
  for (int64_t i0 = 0; i0 < folded_; i0 += fold_rows_) {
    const int64_t rows = smaller(fold_rows_, folded_ - i0);
    pack_left(q_, left_width_, x.q.from(i0), rows, s_.D);
    score_block(i0, rows, 0, keys_, term, [](T* p, int64_t, Vec<T> x) { store(p, x); }, Ahead(next.q.from(i0), s_.D));
    softmax_block(rows, keys_, false, false);
    for (int64_t r = 0; r < rows; ++r) {
      if (s_.dropout > 0) drop(scores_ + r * row_stride_, keys_, first_element + mask_row(i0 + r));
      delta_[r] = fold_share(i0 + r) * kept_scale_ / row_sum_[r];
      stats[i0 + r] = row_max_[r];
      stats[s_.N + i0 + r] = row_sum_[r];
    }
    fold(delta_, rows, i0 > 0);
  }
  if constexpr (kPaired) pair_along(reinterpret_cast<U*>(fold_), fold_, keys_);
  weighted_rows(out_, reinterpret_cast<const U*>(fold_), v_, 1, 0, keys_, false, Ahead());
  unpack_rows(out, out_, width_, 1, s_.D, T(1));
  Ahead(next.k, next.v, s_.D)(0, folded_);
  row_stride_ = block_stride;
}

template <typename U>
template <typename E>
void AttentionCore<U>::backward(const AttentionGradInputs<E>& x, const AttentionGradInputs<E>& next, const T* stats,
                                const AttentionGrads<E>& grad, uint64_t first_element, ScoreTerm<T>& term) {
  pack_right(k_, width_, x.forward.k, s_.N, s_.D);
  pack_columns(k_columns_, x.forward.k, s_.N, s_.D);
  pack_columns(v_columns_, x.forward.v, s_.N, s_.D);
  if (folded_) backward_folded(x, next, stats, grad, first_element, term);
  for (int64_t i0 = folded_; i0 < s_.N; i0 += kQueryBlock) {
    const int64_t rows = smaller(kQueryBlock, s_.N - i0), token = i0 - s_.extra;
    pack_queries(x.forward.q.from(i0), rows);
    pack_left(grad_out_, left_width_, x.grad_out.from(token), rows, s_.D);
    if constexpr (kPaired) pack_right(grad_out_right_, width_, x.grad_out.from(token), rows, s_.D);
    if (!whole_)
      for (int64_t r = 0; r < rows; ++r) delta_[r] = delta(x.grad_out.row(token + r), x.out.row(token + r));
    for (int64_t j0 = 0; j0 < keys_; j0 += block_) {
      const int64_t n = smaller(block_, keys_ - j0);
      probability_block(i0, rows, j0, n, term, stats, once(j0, next.forward.q.from(i0), grad.q.from(i0)));
      weight_gradient_block(rows, j0, n, once(j0, next.forward.k.from(i0), grad.k.from(i0)));
      for (int64_t r = 0; r < rows; ++r) {
        T* ds = grad_scores_ + r * row_stride_;
        score_gradient(r, ds, n, first_element + mask_row(i0 + r) + j0, whole_ ? nullptr : delta_ + r);
        for (int64_t j = 0; j < n; j += kSumKeys) term.add_gradient(i0 + r, j0 + j, smaller(kSumKeys, n - j), ds + j);
        if (kPaired && (r % 2 == 1 || r + 1 == rows)) pair_rows(r & ~int64_t{1}, rows, n);
      }
      weighted_columns(grad_v_, scores_, grad_out_right_, rows, j0, n, i0 > 0,
                       once(i0 - folded_, next.forward.v.from(j0), grad.v.from(j0)));
      weighted_columns(grad_k_, grad_scores_, q_right_, rows, j0, n, i0 > 0, Ahead());
      weighted_rows(
          out_, grad_scores_left_, k_, rows, j0, n, j0 > 0,
          once(j0, only(next.grad_out.from(token)), whole_ ? JoinedRows<const E>{} : only(next.out.from(token))));
    }
    unpack_rows(grad.q.from(i0), out_, width_, rows, s_.D, static_cast<T>(s_.scale));
  }
  unpack_rows(grad.k, grad_k_, width_, s_.N, s_.D, static_cast<T>(s_.scale));
  unpack_rows(grad.v, grad_v_, width_, s_.N, s_.D, T(1));
}

// The folded rows have one gradient of their probabilities, and in the gradient of v one row of weights.
template <typename U>
template <typename E>
void AttentionCore<U>::backward_folded(const AttentionGradInputs<E>& x, const AttentionGradInputs<E>& next,
                                       const T* stats, const AttentionGrads<E>& grad, uint64_t first_element,
                                       const ScoreTerm<T>& term) {
  const int64_t block_stride = std::exchange(row_stride_, row_stride(keys_));
  pack_left(grad_out_, left_width_, x.grad_out, 1, s_.D);
  if constexpr (kPaired) pack_right(grad_out_right_, width_, x.grad_out, 1, s_.D);
  product(
      grad_out_, v_columns_, 1, 0, keys_,
      [dp = fold_grad_](int64_t, int64_t v, Vec<T> x) { store(dp + v * kLanes<T>, x); },
      Ahead(only(next.grad_out), s_.D));
  for (int64_t i0 = 0; i0 < folded_; i0 += fold_rows_) {
    const int64_t rows = smaller(fold_rows_, folded_ - i0);
    pack_queries(x.forward.q.from(i0), rows);
    probability_block(i0, rows, 0, keys_, term, stats, Ahead(next.forward.q.from(i0), grad.q.from(i0), s_.D));
    for (int64_t r = 0; r < rows; ++r) {
      T* ds = grad_scores_ + r * row_stride_;
      score_gradient(r, fold_grad_, keys_, first_element + mask_row(i0 + r), nullptr);
      delta_[r] = fold_share(i0 + r);
      for (int64_t j = 0; j < keys_; j += kLanes<T>) store(ds + j, load(ds + j) * delta_[r]);
    }
    fold(delta_, rows, i0 > 0);
    if constexpr (kPaired)
      for (int64_t r = 0; r < rows; r += 2) pair_rows(r, rows, keys_);
    weighted_columns(grad_k_, grad_scores_, q_right_, rows, 0, keys_, i0 > 0, Ahead());
    weighted_rows(out_, grad_scores_left_, k_, rows, 0, keys_, false, Ahead());
    unpack_rows(grad.q.from(i0), out_, width_, rows, s_.D, static_cast<T>(s_.scale));
  }
  if constexpr (kPaired) pair_across(reinterpret_cast<U*>(fold_), fold_, nullptr, keys_);
  weighted_columns(grad_v_, fold_, grad_out_right_, 1, 0, keys_, false, Ahead());
  Ahead(next.forward.k, grad.k, s_.D)(0, folded_);
  row_stride_ = block_stride;
}

// The folded row's weights: the rows of scores_, each times its factor, onto what earlier ones left there if `add` says
// so. In four parts, which round less than one sum does.
template <typename U>
void AttentionCore<U>::fold(const T* factors, int64_t rows, bool add) {
  constexpr int kParts = 4;
  for (int64_t j = 0; j < keys_; j += kLanes<T>) {
    Vec<T> part[kParts] = {};
    int64_t r = 0;
    for (; r + kParts <= rows; r += kParts)
#pragma GCC unroll 4
      for (int k = 0; k < kParts; ++k) part[k] += load(scores_ + (r + k) * row_stride_ + j) * factors[r + k];
    for (; r < rows; ++r) part[0] += load(scores_ + r * row_stride_ + j) * factors[r];
    const Vec<T> sum = (part[0] + part[1]) + (part[2] + part[3]);
    store(fold_ + j, add ? load(fold_ + j) + sum : sum);
  }
}

// The keys in as few equal blocks as kKeyBlock allows.
template <typename U>
int64_t AttentionCore<U>::key_block(int64_t keys) {
  const int64_t blocks = (keys + kKeyBlock - 1) / kKeyBlock;
  return blocks ? round_to_lanes<T>((keys + blocks - 1) / blocks) : 0;
}

// left (rows, D) times columns [j0, ...), each finished vector handed to sink(row, vector, x).
template <typename U>
template <typename Sink>
void AttentionCore<U>::product(const U* left, const U* columns, int64_t rows, int64_t j0, int64_t n, Sink&& sink,
                               const Ahead& ahead) {
  constexpr int W = kLanes<T>;
  gemm<U>(rows, n / W, depth_, Left<U>{left, left_width_, 1}, Right<U>{columns + j0 * depth_, W, W * depth_}, sink,
          ahead);
}

// q_ times keys plus the term, in units of log 2, handed to sink(address in scores_, row, x).
template <typename U>
template <typename Sink>
void AttentionCore<U>::score_block(int64_t i0, int64_t rows, int64_t j0, int64_t n, const ScoreTerm<T>& term,
                                   Sink&& sink, const Ahead& ahead) {
  TermRow<T> terms[kQueryBlock];
  for (int64_t r = 0; r < rows; ++r) {
    terms[r] = term.row(i0 + r, j0, n, scores_ + r * row_stride_);
    if (!terms[0].b) break;
  }
  const auto run = [&](auto&& add) {
    product(
        q_, k_columns_, rows, j0, n,
        [add, sink, unit = splat(score_unit_), scores = scores_, stride = row_stride_](int64_t m, int64_t v, Vec<T> x) {
          sink(scores + m * stride + v * kLanes<T>, m, x * unit + add(m, v * kLanes<T>));
        },
        ahead);
  };
  if (terms[0].keep)
    run([&terms](int64_t m, int64_t j) {
      return keep_lanes<T>(load(terms[m].a + j) + load(terms[m].b + j), terms[m].keep + j);
    });
  else if (terms[0].b)
    run([&terms](int64_t m, int64_t j) { return load(terms[m].a + j) + load(terms[m].b + j); });
  else
    run([a = terms[0].a](int64_t, int64_t j) { return load(a + j); });
}

// scores_ = probabilities, out of the scores and each row's two stats.
template <typename U>
void AttentionCore<U>::probability_block(int64_t i0, int64_t rows, int64_t j0, int64_t n, const ScoreTerm<T>& term,
                                         const T* stats, const Ahead& ahead) {
  T factor[kQueryBlock];
  for (int64_t r = 0; r < rows; ++r) factor[r] = 1 / stats[s_.N + i0 + r];
  score_block(
      i0, rows, j0, n, term,
      [top = stats + i0, &factor](T* p, int64_t r, Vec<T> x) { store(p, exp2_vec(x - top[r]) * factor[r]); }, ahead);
}

// grad_scores_ = the gradient of what v was weighted with.
template <typename U>
void AttentionCore<U>::weight_gradient_block(int64_t rows, int64_t j0, int64_t n, const Ahead& ahead) {
  product(
      grad_out_, v_columns_, rows, j0, n,
      [ds = grad_scores_, stride = row_stride_](int64_t m, int64_t v, Vec<T> x) {
        store(ds + m * stride + v * kLanes<T>, x);
      },
      ahead);
}

// Scores to unnormalised probabilities, as the left operand if `pairs` says so, with the rows' maxima and sums. Of
// blocks that come later these are running ones, and what earlier blocks left in out_ shrinks.
template <typename U>
void AttentionCore<U>::softmax_block(int64_t rows, int64_t n, bool later, bool pairs) {
  constexpr int W = kLanes<T>;
  const auto keep = [pairs](T* row, int64_t j, Vec<T> p, Vec<T> p2, int vectors) {
    if constexpr (kPaired)
      if (pairs) return store(reinterpret_cast<U*>(row) + j / 2, pair_along(p, p2));
    store(row + j, p);
    if (vectors == 2) store(row + j + W, p2);
  };
  T top[kQueryBlock];
  for (int64_t r = 0; r < rows; ++r) {
    const T* s = scores_ + r * row_stride_;
    // Finite: a block may hold -infinity alone.
    Vec<T> best = splat(later ? row_max_[r] : std::numeric_limits<T>::lowest());
    for (int64_t j = 0; j < n; j += W) best = maximum<T>(best, load(s + j));
    top[r] = horizontal_max<T>(best);
  }
  for (int64_t r = 0; r < rows; ++r) {
    T* s = scores_ + r * row_stride_;
    Vec<T> sum{}, sum2{};
    int64_t j = 0;
    for (; j + 2 * W <= n; j += 2 * W) {
      const Vec<T> p = exp2_vec(load(s + j) - top[r]), p2 = exp2_vec(load(s + j + W) - top[r]);
      keep(s, j, p, p2, 2);
      sum += p;
      sum2 += p2;
    }
    if (j < n) {
      const Vec<T> p = exp2_vec(load(s + j) - top[r]);
      keep(s, j, p, Vec<T>{}, 1);
      sum += p;
    }
    T before = 0;
    if (later) {
      const T shrink = exp2_vec(splat(row_max_[r] - top[r]))[0];
      before = row_sum_[r] * shrink;
      for (int64_t d = 0; d < width_; ++d) out_[r * width_ + d] *= shrink;
    }
    row_sum_[r] = before + horizontal_sum<T>(sum + sum2);
    row_max_[r] = top[r];
  }
}

// The masks of n elements of a row.
template <typename U>
const int8_t* AttentionCore<U>::draw(int64_t n, uint64_t first_element) {
  return dropout_row(mask_, n, first_element, s_.seed, kAttnDropoutStream, threshold_);
}

template <typename U>
void AttentionCore<U>::drop(T* p, int64_t n, uint64_t first_element) {
  const int8_t* keep = draw(n, first_element);
  for (int64_t j = 0; j < n; j += kLanes<T>) store(p + j, keep_lanes<T>(load(p + j), keep + j));
}

// Row r: the gradient of its scores, p (dp - delta), from dp, that of what v was weighted with, and dropout applied to
// p. delta is the sum of p dp. Where the row is not whole it is given; else it is divided by the sum of p, so that rows
// of v that are alike leave no gradient, however p was rounded.
template <typename U>
void AttentionCore<U>::score_gradient(int64_t r, const T* dp, int64_t n, uint64_t first_element, const T* delta) {
  T *p = scores_ + r * row_stride_, *ds = grad_scores_ + r * row_stride_;
  const int8_t* keep = s_.dropout > 0 ? draw(n, first_element) : nullptr;
  const auto run = [&](auto&& kept) {
    T mean = 0;
    if (delta) {
      mean = *delta;
    } else {
      constexpr int kParts = 4;  // which round less than one sum does, and do not wait for each other
      Vec<T> sum[kParts] = {}, weighted[kParts] = {};
      const auto add = [&](int part, int64_t j) {
        sum[part] += load(p + j);
        weighted[part] += load(p + j) * kept(j, load(dp + j));
      };
      const auto total = [](const Vec<T>(&part)[kParts]) {
        return horizontal_sum<T>((part[0] + part[1]) + (part[2] + part[3]));
      };
      int64_t j = 0;
      for (; j + kParts * kLanes<T> <= n; j += kParts * kLanes<T>)
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) add(part, j + part * kLanes<T>);
      for (; j < n; j += kLanes<T>) add(0, j);
      mean = total(weighted) / total(sum);
    }
    for (int64_t j = 0; j < n; j += kLanes<T>) store(ds + j, load(p + j) * (kept(j, load(dp + j)) - mean));
  };
  if (!keep) return run([](int64_t, Vec<T> x) { return x; });
  const auto kept = [keep, scale = kept_scale_](int64_t j, Vec<T> x) { return keep_lanes<T>(x * scale, keep + j); };
  run(kept);
  for (int64_t j = 0; j < n; j += kLanes<T>) store(p + j, kept(j, load(p + j)));
}

// The same sum from a row of the output and its gradient. Of rows of v that are alike it is what grad_out v^T is, and
// their difference a rounding of out: in float32 it is summed as that product is. In float64, where nothing is wider,
// lanes lose less; 16 bits of out lose more.
template <typename U>
template <typename E>
auto AttentionCore<U>::delta(const E* grad_out, const E* out) const -> T {
  if constexpr (std::is_same_v<E, float>) {
    float sum = 0;
    for (int64_t d = 0; d < s_.D; ++d) sum += grad_out[d] * out[d];
    return sum;
  } else {
    return dot(grad_out, out, s_.D);
  }
}

// Rows r and r + 1 of the two blocks as operands: paired across in place, the scores' gradients paired along too.
template <typename U>
void AttentionCore<U>::pair_rows(int64_t r, int64_t rows, int64_t n) {
  if constexpr (kPaired) {
    const bool below = r + 1 < rows;
    T *p = scores_ + r * row_stride_, *ds = grad_scores_ + r * row_stride_;
    U* left = grad_scores_left_ + r * row_stride_;
    pair_across(reinterpret_cast<U*>(p), p, below ? p + row_stride_ : nullptr, n);
    pair_along(left, ds, n);
    if (below) pair_along(left + row_stride_, ds + row_stride_, n);
    pair_across(reinterpret_cast<U*>(ds), ds, below ? ds + row_stride_ : nullptr, n);
  }
}

// dst (rows, D) = (or +=) block (rows, keys) times rows [j0, ...) of right.
template <typename U>
void AttentionCore<U>::weighted_rows(T* dst, const U* block, const U* right, int64_t rows, int64_t j0, int64_t n,
                                     bool add, const Ahead& ahead) {
  for (int64_t j = 0; j < n; j += kSumKeys)
    weighted(dst, rows, summed<U>(smaller(smaller(kSumKeys, n - j), s_.N - j0 - j)),
             Left<U>{block + j / kSteps<U>, row_stride_, 1}, right + (j0 + j) / kSteps<U> * width_, add || j > 0,
             j > 0 ? Ahead() : ahead);
}

// dst rows [j0, ...) = (or +=) block^T (keys, rows) times right (rows, D).
template <typename U>
void AttentionCore<U>::weighted_columns(T* dst, const T* block, const U* right, int64_t rows, int64_t j0, int64_t n,
                                        bool add, const Ahead& ahead) {
  weighted(dst + j0 * width_, smaller(n, s_.N - j0), summed<U>(rows),
           Left<U>{reinterpret_cast<const U*>(block), 1, kSteps<U> * row_stride_}, right, add, ahead);
}

// dst (rows, width_) = (or +=) left (rows, depth) times right (depth, width_).
template <typename U>
void AttentionCore<U>::weighted(T* dst, int64_t rows, int64_t depth, Left<U> left, const U* right, bool add,
                                const Ahead& ahead) {
  constexpr int W = kLanes<T>;
  const auto run = [&](auto&& sink) {
    gemm<U>(rows, width_ / W, depth, left, Right<U>{right, width_, W}, sink, ahead);
  };
  if (add)
    run([dst, width = width_](int64_t m, int64_t v, Vec<T> x) {
      T* p = dst + m * width + v * W;
      store(p, load(p) + x);
    });
  else
    run([dst, width = width_](int64_t m, int64_t v, Vec<T> x) { store(dst + m * width + v * W, x); });
}

// q as it is summed over D, and over the queries.
template <typename U>
template <typename E>
void AttentionCore<U>::pack_queries(JoinedRows<const E> q, int64_t rows) {
  pack_left(q_, left_width_, q, rows, s_.D);
  if constexpr (kPaired) pack_right(q_right_, width_, q, rows, s_.D);
}

#define FASTIB_INSTANTIATE(E)                                                                                     \
  template void AttentionCore<Operand<E>>::forward(const AttentionInputs<E>&, const AttentionInputs<E>&, Rows<E>, \
                                                   Compute<E>*, uint64_t, const ScoreTerm<Compute<E>>&);          \
  template void AttentionCore<Operand<E>>::backward(const AttentionGradInputs<E>&, const AttentionGradInputs<E>&, \
                                                    const Compute<E>*, const AttentionGrads<E>&, uint64_t,        \
                                                    ScoreTerm<Compute<E>>&);
FASTIB_INSTANTIATE(float)
FASTIB_INSTANTIATE(double)
FASTIB_INSTANTIATE(bfloat16)
FASTIB_INSTANTIATE(float16)
#undef FASTIB_INSTANTIATE
template class AttentionCore<float>;
template class AttentionCore<double>;
#if defined(__AVX512BF16__)
template class AttentionCore<BFloat16Pair>;
#endif

}  // namespace fastib::FASTIB_ISA_NAMESPACE
