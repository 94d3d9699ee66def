// Bindings of generalized convolution: its per-head shift (kernels/cpu/generalized_conv.h,
// kernels/cuda/generalized_conv.h) and the products of float32 on the CPU (kernels/cpu/generalized_conv_product.h).
#include "../kernels/cpu/generalized_conv.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../kernels/cpu/generalized_conv_product.h"
#include "tensor.h"
#ifdef FASTIB_WITH_CUDA
#include "../kernels/cuda/generalized_conv.h"
#include "cuda_stream.h"
#endif

namespace fastib {
namespace {

// Whether x, which must have four dimensions, counts as channels last.
bool channels_last(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape (B, C, rows, columns), but has ", shape_text(x.sizes()));
  return is_channels_last(x);
}

// One call: its sizes, x in a layout that the kernels read (copied where it is in neither), and the result.
struct ShiftCall {
  GeneralizedConvShiftParams params{};
  Tensor x, out;

  ShiftCall(const Tensor& x_in, int64_t num_heads, bool inverse) : x(x_in) {
    GeneralizedConvShiftParams& p = params;
    p.channels_last = channels_last(x);
    const std::vector<int>& order = image_order(p.channels_last);
    STD_TORCH_CHECK(num_heads >= 1 && num_heads < 1 << 20, "num_heads must be 1 or more, but is ", num_heads);
    STD_TORCH_CHECK(x.size(1) % num_heads == 0, "x must have a multiple of ", num_heads, " channels, but has ",
                    x.size(1));
    kernel_dtype(x, "x");
    check_tensor(x, "x", x.scalar_type(), std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
    p.element_size = x.element_size(), p.inverse = inverse;
    p.B = x.size(0), p.H = num_heads, p.D = x.size(1) / num_heads, p.rows = x.size(2), p.columns = x.size(3);
    out = empty_in_order(x, {p.B, x.size(1), p.rows, p.columns}, order);
    if (empty()) return;
    const int dense = order.back();
    if (x.size(dense) > 1 && x.stride(dense) != 1) x = copy_in_order(x, order);
    p.x = x.const_data_ptr(), p.out = out.mutable_data_ptr();
    for (int i = 0; i < 4; ++i) p.x_stride[i] = x.stride(i), p.out_stride[i] = out.stride(i);
    p.x_stride[dense] = p.out_stride[dense] = 1;  // a dimension of size 1 may have any stride
  }

  bool empty() const { return x.numel() == 0; }
};

Tensor shift(Tensor x, int64_t num_heads, bool inverse) {
  const ShiftCall call(x, num_heads, inverse);
  if (!call.empty())
    torch::stable::parallel_for(0, generalized_conv_units(call.params), 1,
                                [&](int64_t begin, int64_t end) { generalized_conv_shift(call.params, begin, end); });
  return call.out;
}

constexpr int64_t kParts = 8;  // of the weight's gradient, at most

// A float32 image, dense in `order`: itself, or a copy.
Tensor dense_in_order(const Tensor& image, const char* name, const std::vector<int>& order) {
  const std::vector<int64_t> sizes(image.sizes().begin(), image.sizes().end());
  check_cpu_tensor(image, name, ScalarType::Float, sizes);
  int64_t elements = 1;
  for (size_t i = order.size(); i-- > 0;) {
    if (sizes[order[i]] > 1 && image.stride(order[i]) != elements) return copy_in_order(image, order);
    elements *= sizes[order[i]];
  }
  return image;
}

// What the products of x are, all but x and out. The weight gets dense rows, the bias dense elements.
GeneralizedConvProductParams make_product(const Tensor& x, int64_t channels, Tensor& weight,
                                          std::optional<Tensor>& bias, int64_t num_heads, bool transposed) {
  GeneralizedConvProductParams p{};
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have two dimensions, but has ", weight.dim());
  p.B = x.size(0), p.rows = x.size(2), p.columns = x.size(3), p.K = channels;
  p.N = weight.size(transposed), p.H = num_heads, p.transposed = transposed;
  check_cpu_tensor(weight, "weight", ScalarType::Float,
                   transposed ? std::vector<int64_t>{p.K, p.N} : std::vector<int64_t>{p.N, p.K});
  STD_TORCH_CHECK(num_heads >= 1 && num_heads < 1 << 20 && p.N % num_heads == 0,
                  "num_heads must be 1 or more and divide ", p.N, " channels, but is ", num_heads);
  STD_TORCH_CHECK(!bias || num_heads == 1, "bias must be None where num_heads is not 1");
  if (bias) check_cpu_tensor(*bias, "bias", ScalarType::Float, {p.N});
  weight = dense_rows(weight);
  if (bias) bias = dense(*bias);
  p.weight_stride = weight.stride(0), p.weight = weight.const_data_ptr<float>();
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  return p;
}

Tensor product(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t num_heads, bool inverse, bool transposed) {
  const bool last = channels_last(x);
  const std::vector<int>& order = image_order(last);
  x = dense_in_order(x, "x", order);
  GeneralizedConvProductParams p = make_product(x, x.size(1), weight, bias, num_heads, transposed);
  Tensor out = empty_in_order(x, {p.B, p.N, p.rows, p.columns}, order);
  if (out.numel() == 0) return out;
  p.inverse = inverse, p.x = x.const_data_ptr<float>(), p.out = out.mutable_data_ptr<float>();
  const auto kernel = last ? generalized_conv_pixels : generalized_conv_planes;
  torch::stable::parallel_for(0, last ? generalized_conv_pixel_units(p) : generalized_conv_plane_units(p), 1,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return out;
}

// The values are empty where they are not kept.
std::tuple<Tensor, Tensor> both(Tensor x, Tensor w_v, Tensor w_o, std::optional<Tensor> bias, int64_t num_heads,
                                bool keep) {
  const bool last = channels_last(x);
  const std::vector<int>& order = image_order(last);
  x = dense_in_order(x, "x", order);
  std::optional<Tensor> none;
  GeneralizedConvBothParams p{};
  p.values = make_product(x, x.size(1), w_v, none, num_heads, false);
  p.result = make_product(x, p.values.N, w_o, bias, 1, false);
  const int64_t B = p.values.B, rows = p.values.rows, columns = p.values.columns;
  Tensor out = empty_in_order(x, {B, p.result.N, rows, columns}, order);
  Tensor values =
      keep ? empty_in_order(x, {B, p.values.N, rows, columns}, order) : new_empty(x, {0}, ScalarType::Float);
  if (B * rows * columns == 0) return {out, values};
  p.values.x = x.const_data_ptr<float>();
  p.values.out = keep ? values.mutable_data_ptr<float>() : nullptr, p.result.out = out.mutable_data_ptr<float>();
  const auto kernel = last ? generalized_conv_both_pixels : generalized_conv_both_planes;
  torch::stable::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {out, values};
}

std::tuple<Tensor, Tensor> grad_weight(Tensor grad, Tensor x, bool bias) {
  GeneralizedConvWeightParams p{};
  const bool last = channels_last(x);
  const std::vector<int>& order = image_order(last);
  STD_TORCH_CHECK(grad.dim() == 4, "grad must have shape (B, C, rows, columns), but has ", shape_text(grad.sizes()));
  grad = dense_in_order(grad, "grad", order), x = dense_in_order(x, "x", order);
  for (int dim : {0, 2, 3})
    STD_TORCH_CHECK(grad.size(dim) == x.size(dim), "grad must have the pixels of x, ", shape_text(x.sizes()),
                    ", but has ", shape_text(grad.sizes()));
  p.B = x.size(0), p.pixels = x.size(2) * x.size(3), p.K = x.size(1), p.N = grad.size(1);
  p.parts = std::clamp<int64_t>(p.B * PixelBlocks(p.pixels).count / 2, 1, kParts);
  Tensor weight_sum = new_empty(x, {p.N, p.K}, ScalarType::Float);
  Tensor bias_sum = new_empty(x, {bias ? p.N : 0}, ScalarType::Float);
  if (p.B * p.pixels == 0) {
    torch::stable::zero_(weight_sum), torch::stable::zero_(bias_sum);
    return {weight_sum, bias_sum};
  }
  Tensor weight_parts = new_empty(x, {p.parts, p.N, p.K}, ScalarType::Float);
  Tensor bias_parts = new_empty(x, {p.parts, bias ? p.N : 0}, ScalarType::Float);
  p.grad = grad.const_data_ptr<float>(), p.x = x.const_data_ptr<float>();
  p.weight_parts = weight_parts.mutable_data_ptr<float>();
  p.bias_parts = bias ? bias_parts.mutable_data_ptr<float>() : nullptr;
  const auto kernel = last ? generalized_conv_grad_weight_pixels : generalized_conv_grad_weight_planes;
  torch::stable::parallel_for(0, p.parts, 1, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  float *weight_out = weight_sum.mutable_data_ptr<float>(), *bias_out = bias_sum.mutable_data_ptr<float>();
  torch::stable::parallel_for(
      0, p.N, 16, [&](int64_t begin, int64_t end) { generalized_conv_reduce(p, weight_out, bias_out, begin, end); });
  return {weight_sum, bias_sum};
}

#ifdef FASTIB_WITH_CUDA
Tensor shift_cuda(Tensor x, int64_t num_heads, bool inverse) {
  const CudaDevice device(x);
  const ShiftCall call(x, num_heads, inverse);
  if (call.empty()) return call.out;
  const char* error = generalized_conv_shift_cuda(call.params, device.stream());
  STD_TORCH_CHECK(!error, "CUDA kernels of generalized_conv: ", error ? error : "");
  return call.out;
}
#endif

}  // namespace
}  // namespace fastib

STABLE_TORCH_LIBRARY_IMPL(fastib, CPU, m) {
  m.impl("generalized_conv_both", TORCH_BOX(&fastib::both));
  m.impl("generalized_conv_grad_weight", TORCH_BOX(&fastib::grad_weight));
  m.impl("generalized_conv_product", TORCH_BOX(&fastib::product));
  m.impl("generalized_conv_shift", TORCH_BOX(&fastib::shift));
}

#ifdef FASTIB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastib, CUDA, m) { m.impl("generalized_conv_shift", TORCH_BOX(&fastib::shift_cuda)); }
#endif
