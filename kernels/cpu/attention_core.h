// Attention of one (batch, head) pair in scratch memory, forward and backward: with a term added to its scores, and
// with extra tokens whose mean output is added to that of token 0.
//
// Queries go in blocks of kQueryBlock rows, keys in blocks of at most kKeyBlock; the scores of a block stay in cache
// and nothing of size N x N exists.
//
// Extra tokens come first among the queries and last among the keys and in the dropout mask. Their rows and that of
// token 0 are folded: the mean of outputs is the mean of probabilities, times v, so that one row of weights takes the
// place of all of them in three of the seven products, and no output of an extra token exists. All have the gradient of
// token 0's output, and what the backward sums over their outputs it sums over their probabilities.
//
// For the backward, `stats` (2, N) keeps each row's largest score, in units of log 2, and the sum of its exponentials
// from there, in the order of the queries. One logarithm of both would round more than the softmax did.
#pragma once

#include <cstdint>

#include "../common/philox.h"
#include "ahead.h"
#include "dropout_row.h"
#include "operand.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

inline constexpr int64_t kQueryBlock = 72;
inline constexpr int64_t kKeyBlock = 1088;
inline constexpr int64_t kSumKeys = 320;  // that are summed in one go: longer sums round more

struct AttentionSizes {
  int64_t N, extra, D;  // tokens in all, extra ones among them
  double scale;
  double dropout;  // on the probabilities
  uint64_t seed;
};

// One query's term against consecutive keys: a + b, kept where `keep` (null: everywhere) says so. Without b it is a,
// the same for all queries.
template <typename T>
struct TermRow {
  const T* a;
  const T* b;
  const int8_t* keep;
};

// What is added to the scores, in units of log 2: -infinity from key N on.
template <typename T>
class ScoreTerm {
 public:
  // The row of query i against keys [j0, j0 + n), a whole number of vectors. It holds until the next call, and may
  // stand in `room` (n).
  virtual TermRow<T> row(int64_t i, int64_t j0, int64_t n, T* room) const = 0;
  // Takes the gradient ds (n) of that row's scores.
  virtual void add_gradient(int64_t i, int64_t j0, int64_t n, const T* ds) = 0;

 protected:
  ~ScoreTerm() = default;
};

// A pair, and its place among all.
struct Pair {
  int64_t b, h, index;
};

// (N, D) of pair (b, h) of a (B, H, N, D) tensor.
template <typename E>
Rows<const E> pair_rows(const void* base, const int64_t (&stride)[3], int64_t b, int64_t h) {
  return {static_cast<const E*>(base) + b * stride[0] + h * stride[1], stride[2]};
}

template <typename E>
Rows<E> pair_rows(void* base, const int64_t (&stride)[3], int64_t b, int64_t h) {
  return {static_cast<E*>(base) + b * stride[0] + h * stride[1], stride[2]};
}

// One pair's tensors, each (N, D). q in the order of the queries, k and v in that of the keys.
template <typename E>
struct AttentionInputs {
  JoinedRows<const E> q, k, v;
};

// Outputs have no rows for the extra tokens.
template <typename E>
struct AttentionGradInputs {
  AttentionInputs<E> forward;
  Rows<const E> out, grad_out;
};

template <typename E>
struct AttentionGrads {
  JoinedRows<E> q, k, v;
};

// U: the element of the packed operands, see operand.h. E: the stored one.
template <typename U>
class AttentionCore {
  using T = Sum<U>;
  static constexpr bool kPaired = kSteps<U> == 2;

 public:
  static int64_t scratch_bytes(const AttentionSizes& s, bool backward);
  void init(const AttentionSizes& sizes, bool backward, Scratch& scratch);
  // first_element: of the pair in the dropout mask.
  template <typename E>
  void forward(const AttentionInputs<E>& x, const AttentionInputs<E>& next, Rows<E> out, T* stats,
               uint64_t first_element, const ScoreTerm<T>& term);
  template <typename E>
  void backward(const AttentionGradInputs<E>& x, const AttentionGradInputs<E>& next, const T* stats,
                const AttentionGrads<E>& grad, uint64_t first_element, ScoreTerm<T>& term);

 private:
  static int64_t key_block(int64_t keys);
  static int64_t row_stride(int64_t keys) { return keys + 2 * kLanes<T>; }
  static int64_t block_size(const AttentionSizes& s);
  static int64_t mask_row_length(const AttentionSizes& s);
  T fold_share(int64_t i) const { return i < s_.extra ? T(1) / static_cast<T>(s_.extra) : T(1); }
  uint64_t mask_row(int64_t i) const { return (i < s_.extra ? s_.N - s_.extra + i : i - s_.extra) * s_.N; }
  // What a product asks for while it runs, with the first of several blocks alone.
  template <typename A, typename B>
  Ahead once(int64_t block, JoinedRows<A> a, JoinedRows<B> b) const {
    return block == 0 ? Ahead(a, b, s_.D) : Ahead();
  }

  template <typename E>
  void forward_folded(const AttentionInputs<E>& x, const AttentionInputs<E>& next, Rows<E> out, T* stats,
                      uint64_t first_element, const ScoreTerm<T>& term);
  template <typename E>
  void backward_folded(const AttentionGradInputs<E>& x, const AttentionGradInputs<E>& next, const T* stats,
                       const AttentionGrads<E>& grad, uint64_t first_element, const ScoreTerm<T>& term);
  template <typename E>
  void pack_queries(JoinedRows<const E> q, int64_t rows);
  template <typename Sink>
  void product(const U* left, const U* columns, int64_t rows, int64_t j0, int64_t n, Sink&& sink, const Ahead& ahead);
  template <typename Sink>
  void score_block(int64_t i0, int64_t rows, int64_t j0, int64_t n, const ScoreTerm<T>& term, Sink&& sink,
                   const Ahead& ahead);
  void probability_block(int64_t i0, int64_t rows, int64_t j0, int64_t n, const ScoreTerm<T>& term, const T* stats,
                         const Ahead& ahead);
  void weight_gradient_block(int64_t rows, int64_t j0, int64_t n, const Ahead& ahead);
  void softmax_block(int64_t rows, int64_t n, bool later, bool pairs);
  void fold(const T* factors, int64_t rows, bool add);
  const int8_t* draw(int64_t n, uint64_t first_element);
  void drop(T* p, int64_t n, uint64_t first_element);
  void score_gradient(int64_t r, const T* dp, int64_t n, uint64_t first_element, const T* delta);
  template <typename E>
  T delta(const E* grad_out, const E* out) const;
  void pair_rows(int64_t r, int64_t rows, int64_t n);
  void weighted_rows(T* dst, const U* block, const U* right, int64_t rows, int64_t j0, int64_t n, bool add,
                     const Ahead& ahead);
  void weighted_columns(T* dst, const T* block, const U* right, int64_t rows, int64_t j0, int64_t n, bool add,
                        const Ahead& ahead);
  void weighted(T* dst, int64_t rows, int64_t depth, Left<U> left, const U* right, bool add, const Ahead& ahead);

  AttentionSizes s_;
  int64_t keys_ = 0;        // N rounded up to whole vectors
  int64_t width_ = 0;       // D rounded up to whole vectors
  int64_t depth_ = 0;       // elements U that D takes where it is summed over
  int64_t left_width_ = 0;  // depth_ rounded up to whole vectors
  int64_t block_ = 0;       // keys of a block
  int64_t folded_ = 0;      // rows that are folded
  int64_t fold_rows_ = 0;   // how many of them scores_ holds against all keys
  int64_t row_stride_ = 0;  // of scores_ and grad_scores_
  bool whole_ = false;      // whether a block has all keys
  T score_unit_ = 0, kept_scale_ = 1;
  uint32_t threshold_ = 0;
  U *q_ = nullptr, *grad_out_ = nullptr;                          // (kQueryBlock, left_width_)
  U *q_right_ = nullptr, *grad_out_right_ = nullptr;              // (summed(kQueryBlock), width_)
  U *k_ = nullptr, *v_ = nullptr;                                 // (summed(N), width_)
  U *k_columns_ = nullptr, *v_columns_ = nullptr;                 // (keys_ / lanes, depth_, lanes)
  T *grad_k_ = nullptr, *grad_v_ = nullptr;                       // (N, width_)
  T *scores_ = nullptr, *grad_scores_ = nullptr;                  // (kQueryBlock or fold_rows_, row_stride_)
  U* grad_scores_left_ = nullptr;                                 // the same
  T* out_ = nullptr;                                              // (kQueryBlock, width_)
  T* fold_ = nullptr;                                             // (keys_,), the weights of the folded row
  T* fold_grad_ = nullptr;                                        // (keys_,), the gradient of every row in it
  T *row_max_ = nullptr, *row_sum_ = nullptr, *delta_ = nullptr;  // (kQueryBlock,)
  int8_t* mask_ = nullptr;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
