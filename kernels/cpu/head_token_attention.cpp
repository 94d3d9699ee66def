// Attention with extra tokens for one instruction set; see head_token_attention.h.
//
// Floors of one pair, forward and backward: (14 N + 8 T) (N + T) D floating-point operations and 9 (N + T) D elements
// moved. As in mhca_attention the arithmetic is the bound. Neither the joined tokens nor the extra ones' outputs are
// ever stored.
#include "head_token_attention.h"

#include <limits>
#include <new>

#include "attention_core.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

thread_local Scratch scratch;

// No term on the scores, but -infinity behind the last key.
template <typename T>
class NoTerm final : public ScoreTerm<T> {
 public:
  static int64_t length(int64_t keys) { return round_to_lanes<T>(keys) + kLanes<T>; }

  NoTerm(T* row, int64_t keys) : row_(row) {
    for (int64_t j = 0; j < length(keys); ++j) row[j] = j < keys ? T(0) : -std::numeric_limits<T>::infinity();
  }
  TermRow<T> row(int64_t, int64_t j0, int64_t, T*) const override { return {row_ + j0, nullptr, nullptr}; }
  void add_gradient(int64_t, int64_t, int64_t, const T*) override {}

 private:
  const T* row_;
};

template <typename E>
Rows<E> rows(const HeadTokenTensor& t, Pair at) {
  return pair_rows<E>(t.p, t.stride, at.b, at.h);
}

// In the order of queries, and of keys.
template <typename E>
JoinedRows<E> extra_first(const HeadTokenTensor& tokens, const HeadTokenTensor& extra, int64_t T, Pair at) {
  return {rows<E>(extra, at), T, rows<E>(tokens, at)};
}

template <typename E>
JoinedRows<E> extra_last(const HeadTokenTensor& tokens, const HeadTokenTensor& extra, int64_t N, Pair at) {
  return {rows<E>(tokens, at), N, rows<E>(extra, at)};
}

template <typename E>
JoinedRows<const E> constant(const JoinedRows<E>& x) {
  return {{x.first.p, x.first.stride}, x.n, {x.rest.p, x.rest.stride}};
}

template <typename E>
AttentionInputs<E> inputs(const HeadTokenAttentionParams& p, Pair at) {
  const HeadTokenInputs& x = p.inputs;
  return {constant(extra_first<E>(x.q, x.q_extra, p.T, at)), constant(extra_last<E>(x.k, x.k_extra, p.N, at)),
          constant(extra_last<E>(x.v, x.v_extra, p.N, at))};
}

template <typename E>
AttentionGradInputs<E> grad_inputs(const HeadTokenAttentionGradParams& g, Pair at) {
  const HeadTokenAttentionParams& p = g.forward;
  return {inputs<E>(p, at), rows<const E>(p.out, at), rows<const E>(g.grad_out, at)};
}

// Sets up scratch, the core and the term, then runs body(core, term, pair, the one after it or itself) on [begin, end).
template <typename E, typename Body>
void for_each_pair(const HeadTokenAttentionParams& p, bool backward, int64_t begin, int64_t end, Body&& body) {
  using T = Compute<E>;
  const int64_t tokens = p.N + p.T, length = NoTerm<T>::length(tokens);
  const AttentionSizes sizes{tokens, p.T, p.D, p.scale, p.attn_dropout, p.seed};
  AttentionCore<Operand<E>> core;
  if (!scratch.reserve(core.scratch_bytes(sizes, backward) + Scratch::padded_bytes<T>(length))) throw std::bad_alloc();
  core.init(sizes, backward, scratch);
  NoTerm<T> term(scratch.take<T>(length), tokens);
  const auto pair = [&](int64_t u) { return Pair{u / p.H, u % p.H, u}; };
  for (int64_t u = begin; u < end; ++u) body(core, term, pair(u), pair(smaller(u + 1, end - 1)));
}

template <typename E>
void forward(const HeadTokenAttentionParams& p, int64_t begin, int64_t end) {
  const int64_t tokens = p.N + p.T;
  for_each_pair<E>(p, false, begin, end, [&](auto& core, auto& term, Pair at, Pair next) {
    core.forward(inputs<E>(p, at), inputs<E>(p, next), rows<E>(p.out, at),
                 static_cast<Compute<E>*>(p.stats) + at.index * 2 * tokens,
                 static_cast<uint64_t>(at.index) * tokens * tokens, term);
  });
}

template <typename E>
void backward(const HeadTokenAttentionGradParams& g, int64_t begin, int64_t end) {
  const HeadTokenAttentionParams& p = g.forward;
  const HeadTokenInputs& to = g.grads;
  const int64_t tokens = p.N + p.T;
  for_each_pair<E>(p, true, begin, end, [&](auto& core, auto& term, Pair at, Pair next) {
    const AttentionGrads<E> grads{extra_first<E>(to.q, to.q_extra, p.T, at), extra_last<E>(to.k, to.k_extra, p.N, at),
                                  extra_last<E>(to.v, to.v_extra, p.N, at)};
    core.backward(grad_inputs<E>(g, at), grad_inputs<E>(g, next),
                  static_cast<const Compute<E>*>(p.stats) + at.index * 2 * tokens, grads,
                  static_cast<uint64_t>(at.index) * tokens * tokens, term);
  });
}

}  // namespace

void head_token_attention_forward(const HeadTokenAttentionParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { forward<decltype(element)>(p, begin, end); });
}

void head_token_attention_backward(const HeadTokenAttentionGradParams& g, int64_t begin, int64_t end) {
  with_element(g.forward.dtype, [&](auto element) { backward<decltype(element)>(g, begin, end); });
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
