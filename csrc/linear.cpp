// Bindings of the linear layer's products on the CPU; see kernels/cpu/linear.h.
#include "../kernels/cpu/linear.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "parallel.h"
#include "tensor.h"

namespace fastib {
namespace {

// A (B, P, n) tensor as rows; copied where its last dimension is not dense.
struct Matrix {
  Tensor tensor;
  LinearRows rows;

  Matrix(const Tensor& t, const char* name, int64_t B, int64_t P, int64_t n) {
    check_cpu_tensor(t, name, ScalarType::Float, {B, P, n});
    tensor = dense_rows(t);
    rows = {tensor.const_data_ptr<float>(), std::max<int64_t>(P, 1), tensor.stride(0), tensor.stride(1)};
  }
};

// One call: its sizes, and the weight as the kernels read it.
struct Call {
  int64_t B, P, I, O;
  Matrix x;
  Tensor weight;

  Call(const Tensor& x_in, const Tensor& weight_in)
      : B((check_dims(x_in, "x", 3), x_in.size(0))),
        P(x_in.size(1)),
        I(x_in.size(2)),
        O((check_dims(weight_in, "weight", 2), weight_in.size(0))),
        x(x_in, "x", B, P, I),
        weight(weight_in) {
    check_cpu_tensor(weight, "weight", ScalarType::Float, {O, I});
    weight = dense(weight);
  }

  static void check_dims(const Tensor& t, const char* name, int64_t dims) {
    STD_TORCH_CHECK(t.dim() == dims, name, " must have ", dims, " dimensions, but has ", t.dim());
  }

  int64_t rows() const { return B * P; }
};

void run(const LinearParams& p, int64_t rows) {
  if (p.N > 0) in_parallel(rows, [&](int64_t begin, int64_t end) { linear(p, begin, end); });
}

Tensor forward(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const Call call(x, weight);
  if (bias) check_cpu_tensor(*bias, "bias", ScalarType::Float, {call.O}), bias = dense(*bias);
  const Tensor out = new_empty(x, {call.B, call.P, call.O}, ScalarType::Float);
  run({call.x.rows, call.I, call.O, 1, call.I, call.weight.const_data_ptr<float>(),
       bias ? bias->const_data_ptr<float>() : nullptr, out.mutable_data_ptr<float>()},
      call.rows());
  return out;
}

// Those not needed are empty.
std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight,
                                            bool need_bias) {
  STD_TORCH_CHECK(need_weight || !need_bias, "need_bias must be false where need_weight is: both are summed at once");
  const Call call(x, weight);
  const Matrix grad_out(grad, "grad", call.B, call.P, call.O);
  const auto empty = [&](bool needed, std::initializer_list<int64_t> shape) {
    return needed ? new_empty(x, shape, ScalarType::Float) : new_empty(x, {0}, ScalarType::Float);
  };
  const Tensor grad_x = empty(need_x, {call.B, call.P, call.I});
  const Tensor grad_weight = empty(need_weight, {call.O, call.I}), grad_bias = empty(need_bias, {call.O});
  if (need_weight) {
    const LinearWeightParams p{grad_out.rows,
                               call.x.rows,
                               call.rows(),
                               call.O,
                               call.I,
                               grad_weight.mutable_data_ptr<float>(),
                               need_bias ? grad_bias.mutable_data_ptr<float>() : nullptr};
    in_parallel(linear_weight_units(p), [&](int64_t begin, int64_t end) { linear_weight(p, begin, end); });
  }
  if (need_x)  // last, for who comes next reads it
    run({grad_out.rows, call.O, call.I, call.I, 1, call.weight.const_data_ptr<float>(), nullptr,
         grad_x.mutable_data_ptr<float>()},
        call.rows());
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastib

STABLE_TORCH_LIBRARY_IMPL(fastib, CPU, m) {
  m.impl("linear", TORCH_BOX(&fastib::forward));
  m.impl("linear_backward", TORCH_BOX(&fastib::backward));
}
