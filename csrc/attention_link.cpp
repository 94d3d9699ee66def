// Bindings of attention links (kernels/cpu/attention_link.h).
#include "../kernels/cpu/attention_link.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "tensor.h"

namespace fastib {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// One call: its tensors, with dense rows, and what the kernel is told of them.
struct Call {
  Tensor attn, weight, bias, target, mask, loss;
  AttentionLinkParams params{};

  Call(const Tensor& attn_in, const Tensor& weight_in, const Tensor& bias_in, const Tensor& target_in,
       const std::optional<Tensor>& mask_in, double eps)
      : attn(attn_in), weight(weight_in), bias(bias_in), target(target_in) {
    STD_TORCH_CHECK(attn.dim() == 3, "attn must have shape (B, M, S), but has ", shape_text(attn.sizes()));
    STD_TORCH_CHECK(weight.dim() == 2, "weight must have shape (C, M), but has ", shape_text(weight.sizes()));
    params.dtype = kernel_dtype(attn, "attn");
    params.B = attn.size(0), params.M = attn.size(1), params.S = attn.size(2), params.C = weight.size(0);
    const ScalarType sums = accumulation_dtype(attn);
    check_cpu_tensor(attn, "attn", attn.scalar_type(), {params.B, params.M, params.S});
    check_cpu_tensor(target, "target", attn.scalar_type(), {params.B, params.C, params.S});
    check_cpu_tensor(weight, "weight", sums, {params.C, params.M});
    check_cpu_tensor(bias, "bias", sums, {params.C});
    attn = dense_rows(attn), target = dense_rows(target), weight = dense(weight), bias = dense(bias);
    if (mask_in) {
      check_cpu_tensor(*mask_in, "mask", ScalarType::Bool, {params.C, params.M});
      mask = dense(*mask_in);
      params.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
    }
    STD_TORCH_CHECK(eps >= 0, "eps must not be negative, but is ", eps);
    params.attn = attn.const_data_ptr(), params.target = target.const_data_ptr();
    params.weight = weight.const_data_ptr(), params.bias = bias.const_data_ptr();
    for (int i = 0; i < 2; ++i) {
      params.attn_stride[i] = attn.stride(i), params.target_stride[i] = target.stride(i);
    }
    params.eps = eps;
    loss = new_empty(attn, {params.B, params.C}, sums);
    params.loss = loss.mutable_data_ptr();
    // As many as keep the parts of grad_weight below a sixteenth of the target, and a power of two, which 2, 4 or 8
    // threads share equally.
    const int64_t room =
        params.B * params.S * static_cast<int64_t>(attn.element_size()) / (64 * std::max<int64_t>(params.M, 1));
    params.chunks = 1;
    while (2 * params.chunks <= std::min(params.B, room)) params.chunks *= 2;
  }

  bool empty() const { return params.B == 0 || params.C == 0 || params.S == 0; }

  void run() {
    in_parallel(params.chunks, [&](int64_t begin, int64_t end) { attention_link(params, begin, end); });
  }

  // Loss and gradients of the sum of scale * loss; scale (B, C) or null.
  Gradients run_with_gradients(const void* scale) {
    const int64_t B = params.B, C = params.C, M = params.M, S = params.S;
    const ScalarType sums = accumulation_dtype(attn);
    Tensor grad_attn = new_empty(attn, {B, M, S}, attn.scalar_type());
    Tensor grad_weight = new_empty(attn, {C, M}, sums), grad_bias = new_empty(attn, {C}, sums);
    if (empty()) {
      torch::stable::zero_(loss), torch::stable::zero_(grad_attn);
      return {grad_attn, torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias)};
    }
    Tensor weight_parts = new_empty(attn, {params.chunks, C, M}, sums);
    Tensor bias_parts = new_empty(attn, {params.chunks, C}, sums);
    params.gradients = true;
    params.scale = scale;
    params.grad_attn = grad_attn.mutable_data_ptr();
    params.weight_parts = weight_parts.mutable_data_ptr(), params.bias_parts = bias_parts.mutable_data_ptr();
    run();
    attention_link_reduce(params, grad_weight.mutable_data_ptr(), grad_bias.mutable_data_ptr());
    return {grad_attn, grad_weight, grad_bias};
  }
};

Tensor forward(Tensor attn, Tensor weight, Tensor bias, Tensor target, std::optional<Tensor> mask, double eps) {
  Call call(attn, weight, bias, target, mask, eps);
  if (call.empty()) return torch::stable::zero_(call.loss);
  call.params.chunks = call.params.B;  // there are no parts
  call.run();
  return call.loss;
}

Gradients backward(Tensor grad, Tensor attn, Tensor weight, Tensor bias, Tensor target, std::optional<Tensor> mask,
                   double eps) {
  Call call(attn, weight, bias, target, mask, eps);
  check_cpu_tensor(grad, "grad", accumulation_dtype(attn), {call.params.B, call.params.C});
  grad = dense(grad);
  return call.run_with_gradients(grad.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> both(Tensor attn, Tensor weight, Tensor bias, Tensor target,
                                                std::optional<Tensor> mask, double eps) {
  Call call(attn, weight, bias, target, mask, eps);
  const Gradients gradients = call.run_with_gradients(nullptr);
  return std::tuple_cat(std::make_tuple(call.loss), gradients);
}

}  // namespace
}  // namespace fastib

STABLE_TORCH_LIBRARY_IMPL(fastib, CPU, m) {
  m.impl("attention_link_loss", TORCH_BOX(&fastib::forward));
  m.impl("attention_link_loss_backward", TORCH_BOX(&fastib::backward));
  m.impl("attention_link_loss_and_gradients", TORCH_BOX(&fastib::both));
}
