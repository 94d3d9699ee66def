// Every operator of the library. CPU and CUDA implementations are registered beside their bindings, in csrc/<op>.cpp;
// fakes, autograd and Triton implementations in fastib/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastib, m) {
  m.def(
      "feature_alignment(Tensor student, Tensor teacher, bool center, float eps, bool gradient) -> (Tensor loss, "
      "Tensor direction, Tensor factor)");
  m.def("feature_alignment_backward(Tensor grad, Tensor direction, Tensor factor, int tokens) -> Tensor");
  m.def(
      "generalized_conv(Tensor x, Tensor w_v, Tensor w_o, Tensor? bias, int num_heads, bool keep) -> (Tensor out, "
      "Tensor values)");
  m.def(
      "generalized_conv_backward(Tensor grad, Tensor x, Tensor w_v, Tensor w_o, Tensor values, int num_heads, bool "
      "need_x, bool need_v, bool need_o, bool need_bias) -> (Tensor grad_x, Tensor grad_w_v, Tensor grad_w_o, Tensor "
      "grad_bias)");
  m.def("generalized_conv_shift(Tensor x, int num_heads, bool inverse) -> Tensor");
  m.def("involution(Tensor x, Tensor weight, int stride, int dilation) -> Tensor");
  m.def(
      "involution_backward(Tensor grad_out, Tensor x, Tensor weight, int stride, int dilation) -> (Tensor grad_x, "
      "Tensor grad_weight)");
  m.def(
      "attention_link_loss(Tensor attn, Tensor weight, Tensor bias, Tensor target, Tensor? mask, float eps) -> Tensor");
  m.def(
      "attention_link_loss_backward(Tensor grad, Tensor attn, Tensor weight, Tensor bias, Tensor target, Tensor? mask, "
      "float eps) -> (Tensor grad_attn, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "attention_link_loss_and_gradients(Tensor attn, Tensor weight, Tensor bias, Tensor target, Tensor? mask, "
      "float eps) -> (Tensor loss, Tensor grad_attn, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "cls_attention(Tensor q, Tensor k, int num_prefix_tokens, float scale, bool over_all, bool maps_only) -> Tensor");
  m.def(
      "cls_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor probs, float scale) -> "
      "(Tensor grad_q, Tensor grad_k)");
  m.def(
      "depthwise_block(Tensor x, Tensor gamma1, Tensor beta1, Tensor weight, Tensor bias, Tensor gamma2, Tensor beta2, "
      "Tensor? statistics, int grid_h, int grid_w, float eps1, float eps2) -> (Tensor out, Tensor used)");
  m.def(
      "depthwise_block_backward(Tensor grad_out, Tensor x, Tensor gamma1, Tensor beta1, Tensor weight, Tensor bias, "
      "Tensor gamma2, Tensor beta2, Tensor used, bool training, int grid_h, int grid_w, float eps1, float eps2) -> "
      "(Tensor grad_x, Tensor grad_gamma1, Tensor grad_beta1, Tensor grad_weight, Tensor grad_bias, "
      "Tensor grad_gamma2, Tensor grad_beta2)");
  m.def(
      "head_token_attention(Tensor q, Tensor k, Tensor v, Tensor q_extra, Tensor k_extra, Tensor v_extra, "
      "Tensor? seed, float scale, float attn_dropout) -> (Tensor out, Tensor stats)");
  m.def(
      "head_token_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor q_extra, Tensor k_extra, "
      "Tensor v_extra, Tensor out, Tensor stats, Tensor? seed, float scale, float attn_dropout) -> "
      "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_extra, Tensor grad_k_extra, Tensor grad_v_extra)");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias) -> "
      "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "mhca_attention(Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor center, Tensor? seed, int grid_h, int grid_w, "
      "int num_prefix_tokens, float scale, float rpe_dropout, float attn_dropout) -> (Tensor out, Tensor stats)");
  m.def(
      "mhca_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor center, Tensor out, "
      "Tensor stats, Tensor? seed, int grid_h, int grid_w, int num_prefix_tokens, float scale, float rpe_dropout, "
      "float attn_dropout) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_alpha, Tensor grad_center)");
}
