// Multi-head convolutional attention for one instruction set; see mhca_attention.h.
//
// Floors of one pair, forward and backward: 14 N^2 D floating-point operations and 9 N D elements moved. At ViT lengths
// all of a pair's tensors fit the second cache, so the arithmetic is the bound.
#include "mhca_attention.h"

#include <new>

#include "relative_position.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

thread_local Scratch scratch;

template <typename E, typename P>
auto rows(P* base, const int64_t (&stride)[3], Pair at) {
  return only(pair_rows<E>(base, stride, at.b, at.h));
}

template <typename E>
AttentionInputs<E> inputs(const MhcaAttentionParams& p, Pair at) {
  return {rows<E>(p.q, p.q_stride, at), rows<E>(p.k, p.k_stride, at), rows<E>(p.v, p.v_stride, at)};
}

template <typename E>
AttentionGradInputs<E> grad_inputs(const MhcaAttentionGradParams& g, Pair at) {
  const MhcaAttentionParams& p = g.forward;
  return {inputs<E>(p, at), pair_rows<E>(static_cast<const void*>(p.out), p.out_stride, at.b, at.h),
          pair_rows<E>(g.grad_out, g.grad_out_stride, at.b, at.h)};
}

// Sets up scratch, the core and the position term, then runs body(core, term, pair, the one after it or itself) on
// units [begin, end).
template <typename E, typename Body>
void for_each_pair(const MhcaAttentionParams& p, bool backward, int64_t begin, int64_t end, Body&& body) {
  using T = Compute<E>;
  using Term = RelativePosition<T>;
  const AttentionSizes sizes{p.N, 0, p.D, p.scale, p.attn_dropout, p.seed};
  const typename Term::Geometry geometry{p.N, p.grid_h, p.grid_w, p.num_prefix_tokens, p.rpe_dropout, p.seed};
  const int64_t turn = Term::heads_in_turn(geometry, p.H);
  if (!scratch.reserve(AttentionCore<Operand<E>>::scratch_bytes(sizes, backward) + Term::scratch_bytes(geometry, turn)))
    throw std::bad_alloc();
  AttentionCore<Operand<E>> core;
  core.init(sizes, backward, scratch);
  Term term;
  term.init(geometry, turn, scratch);
  const T* alpha = static_cast<const T*>(p.alpha);
  const T* center = static_cast<const T*>(p.center);
  const auto pair = [&](int64_t u) {
    const int64_t first_head = u / (p.B * turn) * turn;
    const int64_t heads = smaller(turn, p.H - first_head), at = u - first_head * p.B;
    const int64_t b = at / heads, h = first_head + at % heads;
    return Pair{b, h, b * p.H + h};
  };
  for (int64_t u = begin; u < end; ++u) {
    const Pair at = pair(u);
    term.set_head(at.h, alpha[at.h], center[2 * at.h], center[2 * at.h + 1]);
    body(core, term, at, pair(smaller(u + 1, end - 1)));
  }
}

template <typename E>
void forward(const MhcaAttentionParams& p, int64_t begin, int64_t end) {
  for_each_pair<E>(p, false, begin, end, [&](auto& core, auto& term, Pair at, Pair next) {
    core.forward(inputs<E>(p, at), inputs<E>(p, next), pair_rows<E>(p.out, p.out_stride, at.b, at.h),
                 static_cast<Compute<E>*>(p.stats) + at.index * 2 * p.N, static_cast<uint64_t>(at.index) * p.N * p.N,
                 term);
  });
}

template <typename E>
void backward(const MhcaAttentionGradParams& g, int64_t begin, int64_t end) {
  const MhcaAttentionParams& p = g.forward;
  for_each_pair<E>(p, true, begin, end, [&](auto& core, auto& term, Pair at, Pair next) {
    const AttentionGrads<E> grads{rows<E>(g.grad_q, g.grad_q_stride, at), rows<E>(g.grad_k, g.grad_k_stride, at),
                                  rows<E>(g.grad_v, g.grad_v_stride, at)};
    term.clear_gradient();
    core.backward(grad_inputs<E>(g, at), grad_inputs<E>(g, next),
                  static_cast<const Compute<E>*>(p.stats) + at.index * 2 * p.N, grads,
                  static_cast<uint64_t>(at.index) * p.N * p.N, term);
    term.gradient(g.grad_position + at.index * 3);
  });
}

}  // namespace

void mhca_attention_forward(const MhcaAttentionParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { forward<decltype(element)>(p, begin, end); });
}

void mhca_attention_backward(const MhcaAttentionGradParams& g, int64_t begin, int64_t end) {
  with_element(g.forward.dtype, [&](auto element) { backward<decltype(element)>(g, begin, end); });
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
