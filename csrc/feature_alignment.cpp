// Bindings of feature alignment (kernels/cpu/feature_alignment.h).
#include "../kernels/cpu/feature_alignment.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "tensor.h"

namespace fastib {
namespace {

std::tuple<Tensor, Tensor, Tensor> forward(Tensor student, Tensor teacher, bool center, double eps, bool gradient) {
  FeatureAlignmentParams p{};
  STD_TORCH_CHECK(student.dim() == 3, "student must have shape (B, N, C), but has ", shape_text(student.sizes()));
  STD_TORCH_CHECK(teacher.dim() == 3, "teacher must have shape (B, M, C), but has ", shape_text(teacher.sizes()));
  p.dtype = kernel_dtype(student, "student");
  const int64_t N = student.size(1), M = teacher.size(1);
  p.B = student.size(0), p.L = std::min(N, M), p.C = student.size(2);
  check_cpu_tensor(student, "student", student.scalar_type(), {p.B, N, p.C});
  check_cpu_tensor(teacher, "teacher", student.scalar_type(), {p.B, M, p.C});
  STD_TORCH_CHECK(p.L ? N % p.L == 0 && M % p.L == 0 : N == M,
                  "student and teacher must have lengths that divide, but have ", N, " and ", M, " tokens");
  STD_TORCH_CHECK(eps >= 0.0, "eps must not be negative, but is ", eps);
  const ScalarType sums = accumulation_dtype(student);
  Tensor loss = new_empty(student, {p.B, p.L}, sums);
  Tensor direction = new_empty(student, {gradient ? p.B : 0, p.L, p.C}, student.scalar_type());
  Tensor factor = new_empty(student, {gradient ? p.B : 0, p.L}, sums);
  if (loss.numel() == 0) return {loss, direction, factor};
  student = dense_rows(student), teacher = dense_rows(teacher);
  p.student_step = N / p.L, p.teacher_step = M / p.L, p.center = center, p.eps = eps;
  p.student = student.const_data_ptr(), p.teacher = teacher.const_data_ptr();
  for (int i = 0; i < 2; ++i) p.student_stride[i] = student.stride(i), p.teacher_stride[i] = teacher.stride(i);
  p.loss = loss.mutable_data_ptr();
  if (gradient) p.direction = direction.mutable_data_ptr(), p.factor = factor.mutable_data_ptr();
  in_parts(p.B * p.L, [&](int64_t begin, int64_t end) { feature_alignment_forward(p, begin, end); });
  return {loss, direction, factor};
}

Tensor backward(Tensor grad, Tensor direction, Tensor factor, int64_t tokens) {
  FeatureAlignmentGradParams g{};
  STD_TORCH_CHECK(direction.dim() == 3, "direction must have shape (B, L, C), but has ", shape_text(direction.sizes()));
  g.dtype = kernel_dtype(direction, "direction");
  g.B = direction.size(0), g.L = direction.size(1), g.C = direction.size(2);
  const ScalarType sums = accumulation_dtype(direction);
  check_cpu_tensor(direction, "direction", direction.scalar_type(), {g.B, g.L, g.C});
  check_cpu_tensor(grad, "grad", sums, {g.B, g.L});
  check_cpu_tensor(factor, "factor", sums, {g.B, g.L});
  STD_TORCH_CHECK(g.L ? tokens >= 1 && tokens % g.L == 0 : tokens == 0, "tokens must be a multiple of ", g.L,
                  ", but is ", tokens);
  Tensor grad_student = new_empty(direction, {g.B, tokens, g.C}, direction.scalar_type());
  if (grad_student.numel() == 0) return grad_student;
  g.step = tokens / g.L;
  grad = dense(grad), direction = dense(direction), factor = dense(factor);
  g.grad = grad.const_data_ptr(), g.direction = direction.const_data_ptr(), g.factor = factor.const_data_ptr();
  g.grad_student = grad_student.mutable_data_ptr();
  in_parts(g.B * g.L, [&](int64_t begin, int64_t end) { feature_alignment_backward(g, begin, end); });
  return grad_student;
}

}  // namespace
}  // namespace fastib

STABLE_TORCH_LIBRARY_IMPL(fastib, CPU, m) {
  m.impl("feature_alignment", TORCH_BOX(&fastib::forward));
  m.impl("feature_alignment_backward", TORCH_BOX(&fastib::backward));
}
