// Bindings of multi-head convolutional attention (kernels/cpu/mhca_attention.h).
#include "../kernels/cpu/mhca_attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "parallel.h"
#include "tensor.h"

namespace fastib {
namespace {

struct Options {
  int64_t grid_h, grid_w, num_prefix_tokens;
  double scale, rpe_dropout, attn_dropout;
};

void set_strides(int64_t (&strides)[3], const Tensor& t) {
  for (int i = 0; i < 3; ++i) strides[i] = t.stride(i);
}

// Checks everything the kernel relies on and fills in all but `out` and `stats`. q, k and v get dense rows.
MhcaAttentionParams make_params(Tensor& q, Tensor& k, Tensor& v, Tensor& alpha, Tensor& center,
                                const std::optional<Tensor>& seed, const Options& options) {
  MhcaAttentionParams params{};
  STD_TORCH_CHECK(q.dim() == 4, "q must have shape (B, H, N, D), but has ", shape_text(q.sizes()));
  params.dtype = kernel_dtype(q, "q");
  params.B = q.size(0), params.H = q.size(1), params.N = q.size(2), params.D = q.size(3);
  const std::vector<int64_t> shape = {params.B, params.H, params.N, params.D};
  check_cpu_tensor(q, "q", q.scalar_type(), shape);
  check_cpu_tensor(k, "k", q.scalar_type(), shape);
  check_cpu_tensor(v, "v", q.scalar_type(), shape);
  check_cpu_tensor(alpha, "alpha", accumulation_dtype(q), {params.H});
  check_cpu_tensor(center, "center", accumulation_dtype(q), {params.H, 2});

  STD_TORCH_CHECK(options.grid_h >= 0 && options.grid_w >= 0, "grid_size must not be negative, but is (",
                  options.grid_h, ", ", options.grid_w, ")");
  STD_TORCH_CHECK(options.num_prefix_tokens >= 0 && options.num_prefix_tokens <= params.N,
                  "num_prefix_tokens must be in [0, N], but is ", options.num_prefix_tokens, " with N = ", params.N);
  int64_t patches = 0;
  const bool overflow = __builtin_mul_overflow(options.grid_h, options.grid_w, &patches);
  STD_TORCH_CHECK(!overflow && patches == params.N - options.num_prefix_tokens,
                  "q must have num_prefix_tokens + grid_h * grid_w tokens, ", options.num_prefix_tokens, " + ",
                  options.grid_h, " * ", options.grid_w, ", but has ", params.N);
  check_probability(options.rpe_dropout, "rpe_dropout");
  check_probability(options.attn_dropout, "attn_dropout");

  q = dense_rows(q), k = dense_rows(k), v = dense_rows(v);
  alpha = dense(alpha), center = dense(center);
  params.grid_h = patches ? options.grid_h : 0;
  params.grid_w = patches ? options.grid_w : 1;  // no division by zero where there are prefix tokens alone
  params.num_prefix_tokens = options.num_prefix_tokens;
  params.q = q.const_data_ptr(), params.k = k.const_data_ptr(), params.v = v.const_data_ptr();
  set_strides(params.q_stride, q), set_strides(params.k_stride, k), set_strides(params.v_stride, v);
  params.alpha = alpha.const_data_ptr(), params.center = center.const_data_ptr();
  params.scale = options.scale;
  params.rpe_dropout = options.rpe_dropout, params.attn_dropout = options.attn_dropout;
  params.seed = read_seed(seed, options.rpe_dropout > 0 || options.attn_dropout > 0);
  return params;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor alpha, Tensor center,
                                   std::optional<Tensor> seed, int64_t grid_h, int64_t grid_w,
                                   int64_t num_prefix_tokens, double scale, double rpe_dropout, double attn_dropout) {
  const Options options{grid_h, grid_w, num_prefix_tokens, scale, rpe_dropout, attn_dropout};
  MhcaAttentionParams params = make_params(q, k, v, alpha, center, seed, options);
  Tensor out = empty_heads_last(q, params.B, params.H, params.N, params.D);
  Tensor stats = new_empty(alpha, {params.B, params.H, 2, params.N}, alpha.scalar_type());
  if (q.numel() == 0) return {out, torch::stable::zero_(stats)};
  params.out = out.mutable_data_ptr();
  set_strides(params.out_stride, out);
  params.stats = stats.mutable_data_ptr();
  in_parallel(params.B * params.H, [&](int64_t begin, int64_t end) { mhca_attention_forward(params, begin, end); });
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor alpha,
                                                            Tensor center, Tensor out, Tensor stats,
                                                            std::optional<Tensor> seed, int64_t grid_h, int64_t grid_w,
                                                            int64_t num_prefix_tokens, double scale, double rpe_dropout,
                                                            double attn_dropout) {
  const Options options{grid_h, grid_w, num_prefix_tokens, scale, rpe_dropout, attn_dropout};
  MhcaAttentionGradParams params{};
  params.forward = make_params(q, k, v, alpha, center, seed, options);
  const int64_t B = params.forward.B, H = params.forward.H, N = params.forward.N, D = params.forward.D;
  check_cpu_tensor(grad_out, "grad_out", q.scalar_type(), {B, H, N, D});
  check_cpu_tensor(out, "out", q.scalar_type(), {B, H, N, D});
  check_cpu_tensor(stats, "stats", accumulation_dtype(q), {B, H, 2, N});

  Tensor grad_q = empty_heads_last(q, B, H, N, D);
  Tensor grad_k = empty_heads_last(q, B, H, N, D);
  Tensor grad_v = empty_heads_last(q, B, H, N, D);
  Tensor grad_alpha = new_empty(alpha, {H}, alpha.scalar_type());
  Tensor grad_center = new_empty(alpha, {H, 2}, alpha.scalar_type());
  if (q.numel() == 0) {
    return {grad_q, grad_k, grad_v, torch::stable::zero_(grad_alpha), torch::stable::zero_(grad_center)};
  }
  Tensor grad_position = new_empty(alpha, {B, H, 3}, ScalarType::Double);
  grad_out = dense_rows(grad_out), out = dense_rows(out);
  stats = dense(stats);
  params.forward.out = const_cast<void*>(out.const_data_ptr());
  set_strides(params.forward.out_stride, out);
  params.forward.stats = const_cast<void*>(stats.const_data_ptr());
  params.grad_out = grad_out.const_data_ptr();
  set_strides(params.grad_out_stride, grad_out);
  params.grad_q = grad_q.mutable_data_ptr();
  params.grad_k = grad_k.mutable_data_ptr();
  params.grad_v = grad_v.mutable_data_ptr();
  set_strides(params.grad_q_stride, grad_q);
  set_strides(params.grad_k_stride, grad_k);
  set_strides(params.grad_v_stride, grad_v);
  params.grad_position = grad_position.mutable_data_ptr<double>();
  in_parallel(B * H, [&](int64_t begin, int64_t end) { mhca_attention_backward(params, begin, end); });
  mhca_attention_reduce_position(params, grad_alpha.mutable_data_ptr(), grad_center.mutable_data_ptr());
  return {grad_q, grad_k, grad_v, grad_alpha, grad_center};
}

}  // namespace
}  // namespace fastib

STABLE_TORCH_LIBRARY_IMPL(fastib, CPU, m) {
  m.impl("mhca_attention", TORCH_BOX(&fastib::forward));
  m.impl("mhca_attention_backward", TORCH_BOX(&fastib::backward));
}
