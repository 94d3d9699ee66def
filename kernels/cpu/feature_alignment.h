// Distance of unit tokens, one sequence averaged to the length of the other, on the CPU (Bootstrapping ViTs, Eq. 6).
//
// A unit of work is one compared token of one image; units are independent and the result does not depend on their
// split.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace fastib {

// Strides are in elements; channels are dense. Of the two steps at least one is 1.
struct FeatureAlignmentParams {
  DType dtype;
  bool center;
  int64_t B, L, C;                     // L tokens compared
  int64_t student_step, teacher_step;  // tokens averaged into one
  const void* student;                 // (B, L student_step, C)
  const void* teacher;                 // (B, L teacher_step, C)
  int64_t student_stride[2], teacher_stride[2];
  double eps;
  void* loss;       // (B, L) in the type of sums
  void* direction;  // (B, L, C) dense, or null: the gradient to an averaged token is factor * direction
  void* factor;     // (B, L) in the type of sums, or null
};

struct FeatureAlignmentGradParams {
  DType dtype;
  int64_t B, L, C, step;  // step tokens of the student in each averaged one
  const void* grad;       // (B, L) dense, in the type of sums
  const void* direction;  // (B, L, C) dense
  const void* factor;     // (B, L) dense
  void* grad_student;     // (B, L step, C) dense
};

void feature_alignment_forward(const FeatureAlignmentParams& params, int64_t begin, int64_t end);
void feature_alignment_backward(const FeatureAlignmentGradParams& params, int64_t begin, int64_t end);

}  // namespace fastib
