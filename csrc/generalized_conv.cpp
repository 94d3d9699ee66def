// Bindings of generalized convolution: its per-head shift (kernels/cpu/generalized_conv.h,
// kernels/cuda/generalized_conv.h) and the products of float32 on the CPU (kernels/cpu/generalized_conv_product.h).
#include "../kernels/cpu/generalized_conv.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../kernels/cpu/generalized_conv_product.h"
#include "parallel.h"
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
    in_parallel(generalized_conv_units(call.params),
                [&](int64_t begin, int64_t end) { generalized_conv_shift(call.params, begin, end); });
  return call.out;
}

// A float32 image, dense in `order`: itself, or a copy.
Tensor dense_in_order(const Tensor& image, const char* name, const std::vector<int64_t>& sizes,
                      const std::vector<int>& order) {
  check_cpu_tensor(image, name, ScalarType::Float, sizes);
  int64_t elements = 1;
  for (size_t i = order.size(); i-- > 0;) {
    if (sizes[order[i]] > 1 && image.stride(order[i]) != elements) return copy_in_order(image, order);
    elements *= sizes[order[i]];
  }
  return image;
}

// One call of the products: its sizes, and x and the weights as the kernels read them.
struct ProductCall {
  GeneralizedConvSizes sizes{};
  const std::vector<int>& order;
  int64_t C, O;
  Tensor x, w_v, w_o;

  ProductCall(const Tensor& x_in, const Tensor& w_v_in, const Tensor& w_o_in, int64_t num_heads)
      : order(image_order(channels_last(x_in))), w_v(w_v_in), w_o(w_o_in) {
    GeneralizedConvSizes& s = sizes;
    s.B = x_in.size(0), C = x_in.size(1), s.rows = x_in.size(2), s.columns = x_in.size(3);
    s.channels_last = channels_last(x_in);
    x = dense_in_order(x_in, "x", {s.B, C, s.rows, s.columns}, order);
    STD_TORCH_CHECK(w_v.dim() == 2, "w_v must have two dimensions, but has ", w_v.dim());
    STD_TORCH_CHECK(w_o.dim() == 2, "w_o must have two dimensions, but has ", w_o.dim());
    s.M = w_v.size(0), s.H = num_heads, O = w_o.size(0);
    STD_TORCH_CHECK(num_heads >= 1 && num_heads < 1 << 20 && s.M % num_heads == 0,
                    "num_heads must be 1 or more and divide the ", s.M, " rows of w_v, but is ", num_heads);
    check_cpu_tensor(w_v, "w_v", ScalarType::Float, {s.M, C});
    check_cpu_tensor(w_o, "w_o", ScalarType::Float, {O, s.M});
    w_v = dense_rows(w_v), w_o = dense_rows(w_o);
  }

  bool few_images() const { return sizes.B < kFewImages; }
  Tensor image(int64_t channels) const {
    return empty_in_order(x, {sizes.B, channels, sizes.rows, sizes.columns}, order);
  }
  int64_t middle_elements() const { return sizes.B * sizes.pixels() * sizes.M + kMiddleSlack; }
  Tensor middle() const { return new_empty(x, {middle_elements()}, ScalarType::Float); }
  GeneralizedConvWeight values_weight() const { return {w_v.const_data_ptr<float>(), C, 1, w_v.stride(0)}; }
  GeneralizedConvWeight out_weight() const { return {w_o.const_data_ptr<float>(), O, w_o.stride(0), 1}; }

 private:
  static constexpr int64_t kFewImages = 8;
};

// One of the products by itself.
void run(void (*product)(const GeneralizedConvProductParams&, int64_t, int64_t),
         const GeneralizedConvProductParams& p) {
  in_parallel(generalized_conv_pixel_units(p.sizes), [&](int64_t begin, int64_t end) { product(p, begin, end); });
}

// The values are empty where they are not kept.
std::tuple<Tensor, Tensor> forward(Tensor x, Tensor w_v, Tensor w_o, std::optional<Tensor> bias, int64_t num_heads,
                                   bool keep) {
  const ProductCall call(x, w_v, w_o, num_heads);
  if (bias) check_cpu_tensor(*bias, "bias", ScalarType::Float, {call.O}), bias = dense(*bias);
  const Tensor out = call.image(call.O), none = new_empty(call.x, {0}, ScalarType::Float);
  const bool one_image_each = call.sizes.B >= 2 * torch::stable::get_num_threads();
  const Tensor values = keep || !one_image_each ? call.middle() : none;
  GeneralizedConvProductParams p{};
  p.sizes = call.sizes, p.into = call.values_weight(), p.back = call.out_weight();
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.from = call.x.const_data_ptr<float>(), p.to = out.mutable_data_ptr<float>();
  p.middle = values.numel() ? values.mutable_data_ptr<float>() : nullptr;
  if (p.sizes.B * p.sizes.pixels() == 0) return {out, values};
  if (one_image_each)
    in_parallel(p.sizes.B, [&](int64_t begin, int64_t end) { generalized_conv_forward(p, begin, end); });
  else
    run(generalized_conv_into, p), run(generalized_conv_back, p);
  return {out, keep ? values : none};
}

// Images, or blocks of few images, are summed in as many parts as this.
int64_t gradient_parts(const ProductCall& call) {
  if (call.few_images()) return std::clamp<int64_t>(generalized_conv_blocks(call.sizes) / 2, 1, 8);
  return std::clamp<int64_t>(call.sizes.B / 4, 8, 32);
}

// The gradient of a weight between an outer image's N channels and the values' M, and of the bias that goes with it:
// in parts, then summed. Nothing is done for a weight without two dimensions.
struct WeightGradient {
  GeneralizedConvWeightParams params{};
  int64_t count;
  Tensor weight, bias, parts, bias_parts;
  bool transposed;  // the weight is (M, N), not (N, M)

  WeightGradient(const ProductCall& call, const Tensor& outer, const float* middle, const Tensor& weight,
                 const Tensor& bias, bool transposed)
      : count(gradient_parts(call)), weight(weight), bias(bias), transposed(transposed) {
    params.sizes = call.sizes, params.N = outer.size(1), params.wanted = weight.dim() == 2;
    params.inverse = transposed, params.outer = outer.const_data_ptr<float>(), params.middle = middle;
    if (!params.wanted) return;
    parts = new_empty(call.x, {count, params.N, call.sizes.M}, ScalarType::Float);
    bias_parts = new_empty(call.x, {count, bias.numel()}, ScalarType::Float);
    params.weight_parts = parts.mutable_data_ptr<float>();
    params.bias_parts = bias.numel() ? bias_parts.mutable_data_ptr<float>() : nullptr;
  }

  void compute() const {
    if (!params.wanted) return;
    in_parallel(count, [&](int64_t begin, int64_t end) { generalized_conv_weight(params, count, begin, end); });
    sum_parts();
  }

  void sum_parts() const {
    if (!params.wanted) return;
    float* weight_out = weight.mutable_data_ptr<float>();
    float* bias_out = params.bias_parts ? bias.mutable_data_ptr<float>() : nullptr;
    const int64_t outer = transposed ? 1 : params.sizes.M, inner = transposed ? params.N : 1;
    torch::stable::parallel_for(0, params.N, 16, [&](int64_t begin, int64_t end) {
      generalized_conv_reduce(params, count, weight_out, outer, inner, bias_out, begin, end);
    });
  }
};

// Those not needed are empty; values are read for grad_w_o and grad_bias alone.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor w_v, Tensor w_o, Tensor values,
                                                    int64_t num_heads, bool need_x, bool need_v, bool need_o,
                                                    bool need_bias) {
  const ProductCall call(x, w_v, w_o, num_heads);
  const GeneralizedConvSizes& s = call.sizes;
  grad = dense_in_order(grad, "grad", {s.B, call.O, s.rows, s.columns}, call.order);
  if (need_o || need_bias) check_cpu_tensor(values, "values", ScalarType::Float, {call.middle_elements()});
  values = dense(values);
  const auto none = [&] { return new_empty(call.x, {0}, ScalarType::Float); };
  Tensor grad_v = need_v ? new_empty(call.x, {s.M, call.C}, ScalarType::Float) : none();
  Tensor grad_o = need_o || need_bias ? new_empty(call.x, {call.O, s.M}, ScalarType::Float) : none();
  Tensor grad_bias = need_bias ? new_empty(call.x, {call.O}, ScalarType::Float) : none();
  if (s.B * s.pixels() == 0) {
    for (Tensor* t : {&grad_v, &grad_o, &grad_bias}) torch::stable::zero_(*t);
    return {need_x ? call.image(call.C) : none(), grad_v, grad_o, grad_bias};
  }
  GeneralizedConvProductParams products{};
  products.sizes = s, products.into = call.out_weight(), products.back = call.values_weight(), products.inverse = true;
  products.from = grad.const_data_ptr<float>();
  const auto make_grad_x = [&] {
    const Tensor grad_x = need_x ? call.image(call.C) : none();
    products.to = need_x ? grad_x.mutable_data_ptr<float>() : nullptr;
    return grad_x;
  };
  const auto of_o = [&] {
    return WeightGradient(call, grad, values.const_data_ptr<float>(), grad_o, grad_bias, false);
  };
  const auto of_v = [&](const float* grad_values) {
    return WeightGradient(call, call.x, grad_values, grad_v, none(), true);
  };
  if (!call.few_images()) {
    const Tensor grad_x = make_grad_x();
    const WeightGradient o = of_o(), v = of_v(nullptr);
    const GeneralizedConvGradParams p{products, v.params, o.params, o.count};
    in_parallel(o.count, [&](int64_t begin, int64_t end) { generalized_conv_backward(p, begin, end); });
    o.sum_parts(), v.sum_parts();
    return {grad_x, grad_v, grad_o, grad_bias};
  }
  of_o().compute();
  if (!need_x && !need_v) return {none(), grad_v, grad_o, grad_bias};
  const Tensor grad_values = call.middle();
  products.middle = grad_values.mutable_data_ptr<float>();
  run(generalized_conv_into, products);
  of_v(products.middle).compute();  // its parts are gone before grad_x takes memory
  const Tensor grad_x = make_grad_x();
  if (need_x) run(generalized_conv_back, products);
  return {grad_x, grad_v, grad_o, grad_bias};
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
  m.impl("generalized_conv", TORCH_BOX(&fastib::forward));
  m.impl("generalized_conv_backward", TORCH_BOX(&fastib::backward));
  m.impl("generalized_conv_shift", TORCH_BOX(&fastib::shift));
}

#ifdef FASTIB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastib, CUDA, m) { m.impl("generalized_conv_shift", TORCH_BOX(&fastib::shift_cuda)); }
#endif
