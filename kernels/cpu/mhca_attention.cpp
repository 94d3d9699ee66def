// Multi-head convolutional attention for one instruction set; see mhca_attention.h.
//
// Floors of one pair, forward and backward: 14 N^2 D multiply-add halves and 9 N D elements moved. At ViT lengths all of a
// pair's tensors fit the second cache, so the arithmetic is the bound.
#include "mhca_attention.h"

#include <new>

#include "attention_core.h"
#include "relative_position.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

thread_local Scratch scratch;

template <typename E>
const E* pair(const void* base, const int64_t (&stride)[3], int64_t b, int64_t h) {
  return static_cast<const E*>(base) + b * stride[0] + h * stride[1];
}

template <typename E>
E* pair(void* base, const int64_t (&stride)[3], int64_t b, int64_t h) {
  return static_cast<E*>(base) + b * stride[0] + h * stride[1];
}

// Sets up scratch, the core and the position term, then runs body(core, term, b, h, first attention element) on each pair.
template <typename E, typename Body>
void for_each_pair(const MhcaAttentionParams& p, bool backward, int64_t begin, int64_t end, Body&& body) {
  using T = Compute<E>;
  const AttentionSizes sizes{p.N, p.D, p.scale, p.attn_dropout, p.seed};
  const typename RelativePosition<T>::Geometry geometry{p.N, p.grid_h, p.grid_w, p.num_prefix_tokens, p.rpe_dropout,
                                                        p.seed};
  if (!scratch.reserve(AttentionCore<T>::scratch_bytes(sizes, backward) + RelativePosition<T>::scratch_bytes(geometry)))
    throw std::bad_alloc();
  AttentionCore<T> core;
  core.init(sizes, backward, scratch);
  RelativePosition<T> term;
  term.init(geometry, scratch);
  const T* alpha = static_cast<const T*>(p.alpha);
  const T* center = static_cast<const T*>(p.center);
  int64_t head = -1;
  for (int64_t u = begin; u < end; ++u) {
    const int64_t h = u / p.B, b = u % p.B;
    if (h != head) term.set_head(h, alpha[h], center[2 * h], center[2 * h + 1]);
    head = h;
    body(core, term, b, h, static_cast<uint64_t>(b * p.H + h) * p.N * p.N);
  }
}

template <typename E>
void forward(const MhcaAttentionParams& p, int64_t begin, int64_t end) {
  using T = Compute<E>;
  for_each_pair<E>(p, false, begin, end, [&](auto& core, auto& term, int64_t b, int64_t h, uint64_t first_element) {
    core.forward(pair<E>(p.q, p.q_stride, b, h), p.q_stride[2], pair<E>(p.k, p.k_stride, b, h), p.k_stride[2],
                 pair<E>(p.v, p.v_stride, b, h), p.v_stride[2], pair<E>(p.out, p.out_stride, b, h), p.out_stride[2],
                 static_cast<T*>(p.lse) + (b * p.H + h) * p.N, first_element, term);
  });
}

template <typename E>
void backward(const MhcaAttentionGradParams& g, int64_t begin, int64_t end) {
  using T = Compute<E>;
  const MhcaAttentionParams& p = g.forward;
  for_each_pair<E>(p, true, begin, end, [&](auto& core, auto& term, int64_t b, int64_t h, uint64_t first_element) {
    term.clear_gradient();
    core.backward(pair<E>(p.q, p.q_stride, b, h), p.q_stride[2], pair<E>(p.k, p.k_stride, b, h), p.k_stride[2],
                  pair<E>(p.v, p.v_stride, b, h), p.v_stride[2], pair<E>(static_cast<const void*>(p.out), p.out_stride, b, h),
                  p.out_stride[2], pair<E>(g.grad_out, g.grad_out_stride, b, h), g.grad_out_stride[2],
                  static_cast<const T*>(p.lse) + (b * p.H + h) * p.N, pair<E>(g.grad_q, g.grad_q_stride, b, h),
                  g.grad_q_stride[2], pair<E>(g.grad_k, g.grad_k_stride, b, h), g.grad_k_stride[2],
                  pair<E>(g.grad_v, g.grad_v_stride, b, h), g.grad_v_stride[2], first_element, term);
    term.gradient(g.grad_position + (b * p.H + h) * 3);
  });
}

}  // namespace

void mhca_attention_forward(const MhcaAttentionParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::float32: return forward<float>(p, begin, end);
    case DType::bfloat16: return forward<bfloat16>(p, begin, end);
    case DType::float16: return forward<float16>(p, begin, end);
    case DType::float64: return forward<double>(p, begin, end);
  }
}

void mhca_attention_backward(const MhcaAttentionGradParams& g, int64_t begin, int64_t end) {
  switch (g.forward.dtype) {
    case DType::float32: return backward<float>(g, begin, end);
    case DType::bfloat16: return backward<bfloat16>(g, begin, end);
    case DType::float16: return backward<float16>(g, begin, end);
    case DType::float64: return backward<double>(g, begin, end);
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
