// Bindings of the class token's attention (kernels/cpu/cls_attention.h).
#include "../kernels/cpu/cls_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "tensor.h"

namespace fastib {
namespace {

constexpr int64_t kUnits = 64;  // at least so many units, where there are heads for it

// Checks everything the kernel relies on and fills in all but `probs`. q and k get dense rows.
ClsAttentionParams make_params(Tensor& q, Tensor& k, double scale) {
  ClsAttentionParams params{};
  STD_TORCH_CHECK(k.dim() == 4, "k must have shape (B, H, N, D), but has ", shape_text(k.sizes()));
  params.dtype = kernel_dtype(k, "k");
  params.B = k.size(0), params.H = k.size(1), params.N = k.size(2), params.D = k.size(3);
  check_cpu_tensor(k, "k", k.scalar_type(), {params.B, params.H, params.N, params.D});
  check_cpu_tensor(q, "q", k.scalar_type(), {params.B, params.H, params.D});
  q = dense_rows(q), k = dense_rows(k);
  params.q = q.const_data_ptr(), params.k = k.const_data_ptr();
  for (int i = 0; i < 2; ++i) params.q_stride[i] = q.stride(i);
  for (int i = 0; i < 3; ++i) params.k_stride[i] = k.stride(i);
  params.scale = scale;
  // All heads of an image together, as long as there are images for many threads.
  params.groups = params.B ? std::min(params.H, (kUnits + params.B - 1) / params.B) : 0;
  return params;
}

Tensor forward(Tensor q, Tensor k, int64_t num_prefix_tokens, double scale, bool over_all, bool maps_only) {
  ClsAttentionParams params = make_params(q, k, scale);
  STD_TORCH_CHECK(num_prefix_tokens >= 0 && num_prefix_tokens <= params.N,
                  "num_prefix_tokens must be in [0, N], but is ", num_prefix_tokens, " with N = ", params.N);
  Tensor probs = new_empty(k, {params.B, params.H, params.N - (maps_only ? num_prefix_tokens : 0)},
                           maps_only ? k.scalar_type() : accumulation_dtype(k));
  if (probs.numel() == 0) return probs;
  params.first_key = over_all ? 0 : num_prefix_tokens, params.prefix = num_prefix_tokens;
  params.maps_only = maps_only, params.probs = probs.mutable_data_ptr();
  in_parts(params.B * params.groups, [&](int64_t begin, int64_t end) { cls_attention_forward(params, begin, end); });
  return probs;
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor q, Tensor k, Tensor probs, double scale) {
  ClsAttentionGradParams params{};
  params.forward = make_params(q, k, scale);
  const int64_t B = params.forward.B, H = params.forward.H, N = params.forward.N, D = params.forward.D;
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(2) <= N, "grad must have shape (B, H, at most N), but has ",
                  shape_text(grad.sizes()));
  params.columns = grad.size(2);
  check_cpu_tensor(grad, "grad", accumulation_dtype(k), {B, H, params.columns});
  check_cpu_tensor(probs, "probs", accumulation_dtype(k), {B, H, N});
  Tensor grad_q = new_empty(q, {B, H, D}, q.scalar_type());
  Tensor grad_k = empty_heads_last(k, B, H, N, D);
  if (q.numel() == 0) return {grad_q, grad_k};
  grad = dense(grad), probs = dense(probs);
  params.grad = grad.const_data_ptr();
  params.forward.probs = const_cast<void*>(probs.const_data_ptr());
  params.grad_q = grad_q.mutable_data_ptr(), params.grad_k = grad_k.mutable_data_ptr();
  for (int i = 0; i < 2; ++i) params.grad_q_stride[i] = grad_q.stride(i);
  for (int i = 0; i < 3; ++i) params.grad_k_stride[i] = grad_k.stride(i);
  in_parts(B * params.forward.groups, [&](int64_t begin, int64_t end) { cls_attention_backward(params, begin, end); });
  return {grad_q, grad_k};
}

}  // namespace
}  // namespace fastib

STABLE_TORCH_LIBRARY_IMPL(fastib, CPU, m) {
  m.impl("cls_attention", TORCH_BOX(&fastib::forward));
  m.impl("cls_attention_backward", TORCH_BOX(&fastib::backward));
}
