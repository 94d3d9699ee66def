// Bindings of the depth-wise block (kernels/cpu/depthwise_block.h): the passes, and what lies between them.
#include "../kernels/cpu/depthwise_block.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "tensor.h"

namespace fastib {
namespace {

struct Inputs {
  Tensor x, gamma1, beta1, weight, bias, gamma2, beta2;
};

template <typename T>
const T* numbers(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// What the kernels read of the parameters, in the compute type T: (C) arrays, and the weight as (9, C).
template <typename T>
struct Arrays {
  int64_t C;
  std::vector<T> shift1, inv1, shift2, inv2, weight;

  Arrays(const Tensor& kernel, int64_t channels) : C(channels), shift1(C), inv1(C), shift2(C), inv2(C), weight(9 * C) {
    const T* from = numbers<T>(kernel);
    for (int64_t c = 0; c < C; ++c)
      for (int k = 0; k < 9; ++k) weight[k * C + c] = from[c * 9 + k];
  }

  // Channels [first, end) of one norm. offset: what its input lacks, the convolution's bias; null for none.
  static void set(std::vector<T>& shift, std::vector<T>& inv, const T* mean, const T* variance, const T* offset,
                  double eps, int64_t first, int64_t end) {
    for (int64_t c = first; c < end; ++c) {
      shift[c] = (offset ? offset[c] : T(0)) - mean[c];
      inv[c] = static_cast<T>(1.0 / std::sqrt(static_cast<double>(variance[c]) + eps));
    }
  }

  void point(DepthwiseBlockParams& params, const Inputs& in) const {
    params.norm1 = {shift1.data(), inv1.data(), in.gamma1.const_data_ptr(), in.beta1.const_data_ptr()};
    params.norm2 = {shift2.data(), inv2.data(), in.gamma2.const_data_ptr(), in.beta2.const_data_ptr()};
    params.weight = weight.data();
  }
};

// Checks everything the kernels rely on, and makes it dense.
DepthwiseBlockParams check(Inputs& in, int64_t grid_h, int64_t grid_w) {
  DepthwiseBlockParams params{};
  STD_TORCH_CHECK(in.x.dim() == 3, "x must have shape (B, P, C), but has ", shape_text(in.x.sizes()));
  STD_TORCH_CHECK(grid_h >= 0 && grid_w >= 0, "grid_h and grid_w must not be negative");
  params.dtype = kernel_dtype(in.x, "x");
  params.B = in.x.size(0), params.C = in.x.size(2), params.grid_h = grid_h, params.grid_w = grid_w;
  check_cpu_tensor(in.x, "x", in.x.scalar_type(), {params.B, grid_h * grid_w, params.C});
  const ScalarType wide = accumulation_dtype(in.x);
  const std::pair<Tensor*, const char*> vectors[] = {
      {&in.gamma1, "gamma1"}, {&in.beta1, "beta1"}, {&in.bias, "bias"}, {&in.gamma2, "gamma2"}, {&in.beta2, "beta2"}};
  for (const auto& [tensor, name] : vectors) {
    check_cpu_tensor(*tensor, name, wide, {params.C});
    *tensor = dense(*tensor);
  }
  check_cpu_tensor(in.weight, "weight", wide, {params.C, 1, 3, 3});
  in.weight = dense(in.weight), in.x = dense(in.x);
  params.x = in.x.const_data_ptr();
  return params;
}

int64_t units(const DepthwiseBlockParams& p, int64_t images) {
  return (p.B + images - 1) / images * ((p.C + p.unit_channels - 1) / p.unit_channels);
}

// All passes; after each but the last one `after` for the channels that it was run for.
void run(DepthwiseBlockParams& p, bool training, const AfterForward& after) {
  const int64_t threads = torch::stable::get_num_threads();
  if (const int64_t channels = training ? depthwise_block_resident_channels(p, kForwardMaps, threads) : 0) {
    p.unit_channels = channels;
    return in_parallel((p.C + channels - 1) / channels,
                       [&](int64_t begin, int64_t end) { depthwise_block_forward_resident(p, after, begin, end); });
  }
  p.unit_channels = kUnitChannels;
  for (const ForwardPass pass : {ForwardPass::x_statistics, ForwardPass::conv_statistics, ForwardPass::output}) {
    if (training || pass == ForwardPass::output)
      in_parallel(units(p, 1), [&](int64_t begin, int64_t end) { depthwise_block_forward(p, pass, begin, end); });
    if (pass != ForwardPass::output) after(pass, 0, p.C);
  }
}

void run(DepthwiseBlockGradParams& g, const AfterBackward& after) {
  DepthwiseBlockParams& p = g.forward;
  const int64_t threads = torch::stable::get_num_threads();
  if (const int64_t channels = depthwise_block_resident_channels(p, kBackwardMaps, threads)) {
    p.unit_channels = channels;
    return in_parallel((p.C + channels - 1) / channels,
                       [&](int64_t begin, int64_t end) { depthwise_block_backward_resident(g, after, begin, end); });
  }
  p.unit_channels = kUnitChannels;
  for (const BackwardPass pass : {BackwardPass::norm2, BackwardPass::norm1, BackwardPass::x}) {
    in_parallel(units(p, kUnitGroup),
                [&](int64_t begin, int64_t end) { depthwise_block_backward(g, pass, begin, end); });
    if (pass != BackwardPass::x) after(pass, 0, p.C);
  }
}

template <typename T>
void compute(DepthwiseBlockParams params, const Inputs& in, const Tensor* given, Tensor& used, double eps1,
             double eps2) {
  const int64_t C = params.C;
  Arrays<T> arrays(in.weight, C);
  arrays.point(params, in);
  T* stats = static_cast<T*>(used.mutable_data_ptr());
  if (given) std::copy_n(numbers<T>(*given), 4 * C, stats);
  std::vector<T> partial(given ? 0 : 3 * params.B * C);
  std::vector<double> mean(C), variance(C);
  params.partial = partial.data();
  run(params, !given, [&](ForwardPass pass, int64_t first, int64_t count) {
    const bool norm2 = pass == ForwardPass::conv_statistics;
    const T* bias = norm2 ? numbers<T>(in.bias) : nullptr;
    T* own = stats + (norm2 ? 2 * C : 0);
    if (!given) {
      depthwise_block_merge(params, first, count, mean.data(), variance.data());
      for (int64_t c = first; c < first + count; ++c)
        own[c] = static_cast<T>(mean[c] + (bias ? bias[c] : T(0))), own[C + c] = static_cast<T>(variance[c]);
    }
    auto &shift = norm2 ? arrays.shift2 : arrays.shift1, &inv = norm2 ? arrays.inv2 : arrays.inv1;
    Arrays<T>::set(shift, inv, own, own + C, bias, norm2 ? eps2 : eps1, first, first + count);
  });
}

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor gamma1, Tensor beta1, Tensor weight, Tensor bias, Tensor gamma2,
                                   Tensor beta2, std::optional<Tensor> statistics, int64_t grid_h, int64_t grid_w,
                                   double eps1, double eps2) {
  Inputs in{x, gamma1, beta1, weight, bias, gamma2, beta2};
  DepthwiseBlockParams params = check(in, grid_h, grid_w);
  const ScalarType wide = accumulation_dtype(x);
  Tensor given;
  if (statistics.has_value()) {
    check_cpu_tensor(*statistics, "statistics", wide, {4, params.C});
    given = dense(*statistics);
  }
  STD_TORCH_CHECK(statistics.has_value() || params.B * grid_h * grid_w > 0 || params.C == 0,
                  "x must not be empty where its statistics are asked for");
  Tensor out = new_empty(x, {params.B, grid_h * grid_w, params.C}, x.scalar_type());
  Tensor used = new_empty(x, {4, params.C}, wide);
  if (params.C == 0) return {out, used};
  params.out = out.mutable_data_ptr();
  const Tensor* constants = statistics.has_value() ? &given : nullptr;
  if (wide == ScalarType::Double) {
    compute<double>(params, in, constants, used, eps1, eps2);
  } else {
    compute<float>(params, in, constants, used, eps1, eps2);
  }
  return {out, used};
}

struct Gradients {
  Tensor x, gamma1, beta1, weight, bias, gamma2, beta2;
};

template <typename T>
void differentiate(DepthwiseBlockGradParams g, const Inputs& in, const Tensor& used, bool training, double eps1,
                   double eps2, Gradients& out) {
  const int64_t C = g.forward.C, groups = (g.forward.B + kUnitGroup - 1) / kUnitGroup;
  const double places = training ? static_cast<double>(g.forward.B * g.forward.grid_h * g.forward.grid_w) : INFINITY;
  Arrays<T> arrays(in.weight, C);
  const T* stats = numbers<T>(used);
  Arrays<T>::set(arrays.shift1, arrays.inv1, stats, stats + C, nullptr, eps1, 0, C);
  Arrays<T>::set(arrays.shift2, arrays.inv2, stats + 2 * C, stats + 3 * C, numbers<T>(in.bias), eps2, 0, C);
  arrays.point(g.forward, in);
  std::vector<T> partial(groups * 11 * C), mean_d1(2 * C), mean_d2(2 * C);
  std::vector<double> sums(11 * C);
  g.partial = partial.data();
  g.mean_d1 = mean_d1.data(), g.mean_d1_hat = mean_d1.data() + C;
  g.mean_d2 = mean_d2.data(), g.mean_d2_hat = mean_d2.data() + C;
  const auto array = [](Tensor& of) { return static_cast<T*>(of.mutable_data_ptr()); };
  run(g, [&](BackwardPass pass, int64_t first, int64_t count) {
    const bool norm2 = pass == BackwardPass::norm2;
    depthwise_block_sum(g, norm2 ? 2 : 11, first, count, sums.data());
    T *beta = array(norm2 ? out.beta2 : out.beta1), *gamma = array(norm2 ? out.gamma2 : out.gamma1);
    std::vector<T>& mean = norm2 ? mean_d2 : mean_d1;
    for (int64_t c = first; c < first + count; ++c) {
      beta[c] = static_cast<T>(sums[c]), gamma[c] = static_cast<T>(sums[C + c]);
      mean[c] = static_cast<T>(sums[c] / places), mean[C + c] = static_cast<T>(sums[C + c] / places);
      if (norm2) {  // in training the mean that norm2 takes away holds the bias
        array(out.bias)[c] = training ? T(0) : static_cast<T>(sums[c] * numbers<T>(in.gamma2)[c] * arrays.inv2[c]);
      } else {
        for (int k = 0; k < 9; ++k) array(out.weight)[c * 9 + k] = static_cast<T>(sums[(2 + k) * C + c]);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_out, Tensor x, Tensor gamma1,
                                                                            Tensor beta1, Tensor weight, Tensor bias,
                                                                            Tensor gamma2, Tensor beta2, Tensor used,
                                                                            bool training, int64_t grid_h,
                                                                            int64_t grid_w, double eps1, double eps2) {
  Inputs in{x, gamma1, beta1, weight, bias, gamma2, beta2};
  DepthwiseBlockGradParams g{};
  g.forward = check(in, grid_h, grid_w);
  const int64_t B = g.forward.B, C = g.forward.C;
  const ScalarType wide = accumulation_dtype(x);
  check_cpu_tensor(grad_out, "grad_out", x.scalar_type(), {B, grid_h * grid_w, C});
  check_cpu_tensor(used, "used", wide, {4, C});
  grad_out = dense(grad_out), used = dense(used);
  const auto vector = [&] { return new_empty(x, {C}, wide); };
  Gradients out{new_empty(x, {B, grid_h * grid_w, C}, x.scalar_type()),
                vector(),
                vector(),
                new_empty(x, {C, 1, 3, 3}, wide),
                vector(),
                vector(),
                vector()};
  g.grad_out = grad_out.const_data_ptr(), g.grad_x = out.x.mutable_data_ptr();
  if (C > 0) {
    if (wide == ScalarType::Double) {
      differentiate<double>(g, in, used, training, eps1, eps2, out);
    } else {
      differentiate<float>(g, in, used, training, eps1, eps2, out);
    }
  }
  return {out.x, out.gamma1, out.beta1, out.weight, out.bias, out.gamma2, out.beta2};
}

}  // namespace
}  // namespace fastib

STABLE_TORCH_LIBRARY_IMPL(fastib, CPU, m) {
  m.impl("depthwise_block", TORCH_BOX(&fastib::forward));
  m.impl("depthwise_block_backward", TORCH_BOX(&fastib::backward));
}
