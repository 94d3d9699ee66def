// Bindings of the per-head shift of generalized convolution (kernels/cpu/generalized_conv.h,
// kernels/cuda/generalized_conv.h).
#include "../kernels/cpu/generalized_conv.h"

#include <torch/csrc/stable/library.h>

#include "tensor.h"
#ifdef FASTIB_WITH_CUDA
#include "../kernels/cuda/generalized_conv.h"
#include "cuda_stream.h"
#endif

namespace fastib {
namespace {

// One call: its sizes, x in a layout that the kernels read (copied where it is in neither), and the result.
struct ShiftCall {
  GeneralizedConvShiftParams params{};
  Tensor x, out;

  ShiftCall(const Tensor& x_in, int64_t num_heads, bool inverse) : x(x_in) {
    GeneralizedConvShiftParams& p = params;
    STD_TORCH_CHECK(x.dim() == 4, "x must have shape (B, C, rows, columns), but has ", shape_text(x.sizes()));
    STD_TORCH_CHECK(num_heads >= 1 && num_heads < 1 << 20, "num_heads must be 1 or more, but is ", num_heads);
    STD_TORCH_CHECK(x.size(1) % num_heads == 0, "x must have a multiple of ", num_heads, " channels, but has ",
                    x.size(1));
    kernel_dtype(x, "x");
    check_tensor(x, "x", x.scalar_type(), std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
    p.element_size = x.element_size(), p.inverse = inverse;
    p.B = x.size(0), p.H = num_heads, p.D = x.size(1) / num_heads, p.rows = x.size(2), p.columns = x.size(3);
    p.channels_last = is_channels_last(x);
    const std::vector<int>& order = p.channels_last ? kChannelsLast : kColumnsLast;
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

STABLE_TORCH_LIBRARY_IMPL(fastib, CPU, m) { m.impl("generalized_conv_shift", TORCH_BOX(&fastib::shift)); }

#ifdef FASTIB_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastib, CUDA, m) { m.impl("generalized_conv_shift", TORCH_BOX(&fastib::shift_cuda)); }
#endif
