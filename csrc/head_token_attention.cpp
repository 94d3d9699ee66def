// Bindings of attention with extra tokens (kernels/cpu/head_token_attention.h).
#include "../kernels/cpu/head_token_attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "parallel.h"
#include "tensor.h"

namespace fastib {
namespace {

HeadTokenTensor view(const Tensor& t, void* p) { return {p, {t.stride(0), t.stride(1), t.stride(2)}}; }
HeadTokenTensor readable(const Tensor& t) { return view(t, const_cast<void*>(t.const_data_ptr())); }
HeadTokenTensor writable(Tensor& t) { return view(t, t.mutable_data_ptr()); }

// One call: its sizes, and inputs with dense rows. Checks everything the kernel relies on.
struct Call {
  HeadTokenAttentionParams params{};
  Tensor q, k, v, q_extra, k_extra, v_extra;

  Call(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& q_extra_in, const Tensor& k_extra_in,
       const Tensor& v_extra_in, const std::optional<Tensor>& seed, double scale, double attn_dropout) {
    HeadTokenAttentionParams& p = params;
    STD_TORCH_CHECK(q_in.dim() == 4, "q must have shape (B, H, N, D), but has ", shape_text(q_in.sizes()));
    STD_TORCH_CHECK(q_extra_in.dim() == 4, "q_extra must have shape (B, H, T, D), but has ",
                    shape_text(q_extra_in.sizes()));
    p.dtype = kernel_dtype(q_in, "q");
    p.B = q_in.size(0), p.H = q_in.size(1), p.N = q_in.size(2), p.D = q_in.size(3), p.T = q_extra_in.size(2);
    check_probability(attn_dropout, "attn_dropout");
    p.scale = scale, p.attn_dropout = attn_dropout, p.seed = read_seed(seed, attn_dropout > 0);
    const auto take = [&](const Tensor& t, const char* name, int64_t tokens) {
      check_cpu_tensor(t, name, q_in.scalar_type(), {p.B, p.H, tokens, p.D});
      return dense_rows(t);
    };
    q = take(q_in, "q", p.N), k = take(k_in, "k", p.N), v = take(v_in, "v", p.N);
    q_extra = take(q_extra_in, "q_extra", p.T), k_extra = take(k_extra_in, "k_extra", p.T);
    v_extra = take(v_extra_in, "v_extra", p.T);
    p.inputs = {readable(q), readable(k), readable(v), readable(q_extra), readable(k_extra), readable(v_extra)};
  }

  bool empty() const { return q.numel() == 0; }
  Tensor tokens(int64_t n) const { return empty_heads_last(q, params.B, params.H, n, params.D); }
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor q_extra, Tensor k_extra, Tensor v_extra,
                                   std::optional<Tensor> seed, double scale, double attn_dropout) {
  Call call(q, k, v, q_extra, k_extra, v_extra, seed, scale, attn_dropout);
  HeadTokenAttentionParams& p = call.params;
  Tensor out = call.tokens(p.N), stats = new_empty(q, {p.B, p.H, 2, p.N + p.T}, accumulation_dtype(q));
  if (call.empty()) return {out, torch::stable::zero_(stats)};
  p.out = writable(out), p.stats = stats.mutable_data_ptr();
  in_parallel(p.B * p.H, [&](int64_t begin, int64_t end) { head_token_attention_forward(p, begin, end); });
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                    Tensor q_extra, Tensor k_extra, Tensor v_extra,
                                                                    Tensor out, Tensor stats,
                                                                    std::optional<Tensor> seed, double scale,
                                                                    double attn_dropout) {
  HeadTokenAttentionGradParams params{};
  const Call call(q, k, v, q_extra, k_extra, v_extra, seed, scale, attn_dropout);
  params.forward = call.params;
  HeadTokenAttentionParams& p = params.forward;
  check_cpu_tensor(grad_out, "grad_out", q.scalar_type(), {p.B, p.H, p.N, p.D});
  check_cpu_tensor(out, "out", q.scalar_type(), {p.B, p.H, p.N, p.D});
  check_cpu_tensor(stats, "stats", accumulation_dtype(q), {p.B, p.H, 2, p.N + p.T});
  Tensor grad_q = call.tokens(p.N), grad_k = call.tokens(p.N), grad_v = call.tokens(p.N);
  Tensor grad_q_extra = call.tokens(p.T), grad_k_extra = call.tokens(p.T), grad_v_extra = call.tokens(p.T);
  if (call.empty()) {
    for (Tensor* t : {&grad_q_extra, &grad_k_extra, &grad_v_extra}) torch::stable::zero_(*t);
    return {grad_q, grad_k, grad_v, grad_q_extra, grad_k_extra, grad_v_extra};
  }
  grad_out = dense_rows(grad_out), out = dense_rows(out), stats = dense(stats);
  p.out = readable(out), p.stats = const_cast<void*>(stats.const_data_ptr());
  params.grad_out = readable(grad_out);
  params.grads = {writable(grad_q),       writable(grad_k),       writable(grad_v),
                  writable(grad_q_extra), writable(grad_k_extra), writable(grad_v_extra)};
  in_parallel(p.B * p.H, [&](int64_t begin, int64_t end) { head_token_attention_backward(params, begin, end); });
  return {grad_q, grad_k, grad_v, grad_q_extra, grad_k_extra, grad_v_extra};
}

}  // namespace
}  // namespace fastib

STABLE_TORCH_LIBRARY_IMPL(fastib, CPU, m) {
  m.impl("head_token_attention", TORCH_BOX(&fastib::forward));
  m.impl("head_token_attention_backward", TORCH_BOX(&fastib::backward));
}
