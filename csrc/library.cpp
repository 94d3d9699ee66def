// Every operator of the library. CPU and CUDA implementations are registered beside their bindings, in csrc/<op>.cpp;
// fakes, autograd and Triton implementations in fastib/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastib, m) {
  m.def("involution(Tensor x, Tensor weight, int stride, int dilation) -> Tensor");
  m.def(
      "involution_backward(Tensor grad_out, Tensor x, Tensor weight, int stride, int dilation) -> (Tensor grad_x, "
      "Tensor grad_weight)");
  m.def(
      "mhca_attention(Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor center, Tensor? seed, int grid_h, int grid_w, "
      "int num_prefix_tokens, float scale, float rpe_dropout, float attn_dropout) -> (Tensor out, Tensor stats)");
  m.def(
      "mhca_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor center, Tensor out, "
      "Tensor stats, Tensor? seed, int grid_h, int grid_w, int num_prefix_tokens, float scale, float rpe_dropout, "
      "float attn_dropout) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_alpha, Tensor grad_center)");
}
