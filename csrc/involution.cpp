// Bindings of involution (kernels/cpu/involution.h, kernels/cuda/involution.h).
#include "../kernels/cpu/involution.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "parallel.h"
#include "tensor.h"
#ifdef FASTIB_WITH_CUDA
#include "../kernels/cuda/involution.h"
#include "cuda_stream.h"
#endif

namespace fastib {
namespace {

const std::vector<int> kWeightColumnsLast = {0, 1, 2, 3, 4, 5}, kWeightTapsLast = {0, 4, 5, 1, 2, 3};

template <size_t n>
void set_strides(int64_t (&strides)[n], const Tensor& t) {
  for (size_t i = 0; i < n; ++i) strides[i] = t.stride(i);
}

void check_shape(const Tensor& t, const char* name, const Tensor& x, const std::vector<int64_t>& shape) {
  STD_TORCH_CHECK(t.defined() && t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), name,
                  " must be on the device of x");
  check_tensor(t, name, x.scalar_type(), shape);
}

// One call: its sizes, and inputs in the layout that the kernels read, copied where they are in neither.
struct Call {
  InvolutionParams params{};
  Tensor x, weight;

  Call(const Tensor& x_in, const Tensor& weight_in, int64_t stride, int64_t dilation) : x(x_in), weight(weight_in) {
    InvolutionParams& p = params;
    STD_TORCH_CHECK(x.dim() == 4, "x must have shape (B, C, Hi, Wi), but has ", shape_text(x.sizes()));
    STD_TORCH_CHECK(weight.dim() == 6, "weight must have shape (B, G, K, K, Ho, Wo), but has ",
                    shape_text(weight.sizes()));
    STD_TORCH_CHECK(stride >= 1 && stride < 1 << 20, "stride must be 1 or more, but is ", stride);
    STD_TORCH_CHECK(dilation >= 1 && dilation < 1 << 20, "dilation must be 1 or more, but is ", dilation);
    p.dtype = kernel_dtype(x, "x");
    p.B = x.size(0), p.C = x.size(1), p.Hi = x.size(2), p.Wi = x.size(3);
    p.G = weight.size(1), p.K = weight.size(2);
    p.stride = stride, p.dilation = dilation;
    p.Ho = p.Hi ? (p.Hi - 1) / stride + 1 : 0, p.Wo = p.Wi ? (p.Wi - 1) / stride + 1 : 0;
    STD_TORCH_CHECK(p.K % 2 == 1 && p.K < 1 << 15, "weight must have an odd K, but has ", p.K);
    STD_TORCH_CHECK(p.G ? p.C % p.G == 0 : p.C == 0, "x must have a multiple of the weight's ", p.G,
                    " groups as channels, but has ", p.C);
    check_shape(x, "x", x, {p.B, p.C, p.Hi, p.Wi});
    check_shape(weight, "weight", x, {p.B, p.G, p.K, p.K, p.Ho, p.Wo});
    p.channels_last = is_channels_last(x);
    if (empty()) return;

    x = readable(x);
    const bool fits = p.channels_last ? p.K == 1 || (weight.stride(3) == 1 && weight.stride(2) == p.K)
                                      : p.Wo == 1 || weight.stride(5) == 1;
    if (!fits) weight = copy_in_order(weight, p.channels_last ? kWeightTapsLast : kWeightColumnsLast);
    p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr();
    image_strides(p.x_stride, x);
    weight_strides(p.weight_stride, weight);
  }

  bool empty() const { return x.numel() == 0 || params.G == 0; }

  // An image whose channels or columns are dense, as those of x are.
  Tensor readable(const Tensor& t) const {
    const bool fits = params.channels_last ? t.size(1) == 1 || t.stride(1) == 1 : t.size(3) == 1 || t.stride(3) == 1;
    return fits ? t : copy_in_order(t, image_order(params.channels_last));
  }

  Tensor empty_image(int64_t rows, int64_t columns) const {
    return empty_in_order(x, {params.B, params.C, rows, columns}, image_order(params.channels_last));
  }

  Tensor empty_weight() const {
    const InvolutionParams& p = params;
    return empty_in_order(x, {p.B, p.G, p.K, p.K, p.Ho, p.Wo}, p.channels_last ? kWeightTapsLast : kWeightColumnsLast);
  }

  // A dimension of size 1 may have any stride: the dense one gets 1.
  void image_strides(int64_t (&strides)[4], const Tensor& t) const {
    set_strides(strides, t);
    strides[params.channels_last ? 1 : 3] = 1;
  }

  void weight_strides(int64_t (&strides)[6], const Tensor& t) const {
    set_strides(strides, t);
    if (params.channels_last)
      strides[2] = params.K, strides[3] = 1;
    else
      strides[5] = 1;
  }
};

struct BackwardCall : Call {
  InvolutionGradParams gradients{};
  Tensor grad_out, grad_x, grad_weight;

  BackwardCall(const Tensor& grad_out_in, const Tensor& x, const Tensor& weight, int64_t stride, int64_t dilation)
      : Call(x, weight, stride, dilation), grad_out(grad_out_in) {
    const InvolutionParams& p = params;
    check_shape(grad_out, "grad_out", x, {p.B, p.C, p.Ho, p.Wo});
    grad_x = empty_image(p.Hi, p.Wi), grad_weight = empty_weight();
    if (empty()) {
      torch::stable::zero_(grad_x), torch::stable::zero_(grad_weight);
      return;
    }
    grad_out = readable(grad_out);
    gradients.forward = p;
    gradients.grad_out = grad_out.const_data_ptr();
    gradients.grad_x = grad_x.mutable_data_ptr(), gradients.grad_weight = grad_weight.mutable_data_ptr();
    image_strides(gradients.grad_out_stride, grad_out);
    image_strides(gradients.grad_x_stride, grad_x);
    weight_strides(gradients.grad_weight_stride, grad_weight);
  }
};

Tensor forward(Tensor x, Tensor weight, int64_t stride, int64_t dilation) {
  Call call(x, weight, stride, dilation);
  InvolutionParams& p = call.params;
  Tensor out = call.empty_image(p.Ho, p.Wo);
  if (call.empty()) return out;
  p.out = out.mutable_data_ptr();
  call.image_strides(p.out_stride, out);
  in_parallel(involution_units(p), [&](int64_t begin, int64_t end) { involution_forward(p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_out, Tensor x, Tensor weight, int64_t stride, int64_t dilation) {
  const BackwardCall call(grad_out, x, weight, stride, dilation);
  if (!call.empty())
    in_parallel(involution_units(call.params),
                [&](int64_t begin, int64_t end) { involution_backward(call.gradients, begin, end); });
  return {call.grad_x, call.grad_weight};
}

#ifdef FASTIB_WITH_CUDA
void check_launch(const char* error) { STD_TORCH_CHECK(!error, "CUDA kernels of involution: ", error ? error : ""); }

void check_cuda_dtype(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, "x must be float32, bfloat16 or float16 on a GPU");
}

Tensor forward_cuda(Tensor x, Tensor weight, int64_t stride, int64_t dilation) {
  const CudaDevice device(x);
  Call call(x, weight, stride, dilation);
  check_cuda_dtype(x);
  InvolutionParams& p = call.params;
  Tensor out = call.empty_image(p.Ho, p.Wo);
  if (call.empty()) return out;
  p.out = out.mutable_data_ptr();
  call.image_strides(p.out_stride, out);
  check_launch(involution_forward_cuda(p, device.stream()));
  return out;
}

std::tuple<Tensor, Tensor> backward_cuda(Tensor grad_out, Tensor x, Tensor weight, int64_t stride, int64_t dilation) {
  const CudaDevice device(x);
  const BackwardCall call(grad_out, x, weight, stride, dilation);
  check_cuda_dtype(x);
  if (!call.empty()) check_launch(involution_backward_cuda(call.gradients, device.stream()));
  return {call.grad_x, call.grad_weight};
}
#endif

}  // namespace
}  // namespace fastib

STABLE_TORCH_LIBRARY_IMPL(fastib, CPU, m) {
  m.impl("involution", TORCH_BOX(&fastib::forward));
  m.impl("involution_backward", TORCH_BOX(&fastib::backward));
}

#ifdef FASTIB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastib, CUDA, m) {
  m.impl("involution", TORCH_BOX(&fastib::forward_cuda));
  m.impl("involution_backward", TORCH_BOX(&fastib::backward_cuda));
}
#endif
