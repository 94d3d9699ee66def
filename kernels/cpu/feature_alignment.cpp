// Distance of unit tokens for one instruction set; see feature_alignment.h.
//
// Floor: student and teacher are read once, and in training the gradient's direction is written once and read once. A
// pair of averaged tokens lies in the first cache while it is centred, measured and compared.
#include "feature_alignment.h"

#include <cmath>
#include <new>

#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

thread_local Scratch scratch;

// Tokens whose rows are asked for ahead of their turn, where several rows are read side by side.
constexpr int64_t kAhead = 2;

// dst (padded) = mean of `step` rows, zero beyond C; returns the sum over C.
template <typename E, typename T>
T average(T* dst, int64_t padded, Rows<const E> rows, int64_t step, int64_t C) {
  constexpr int W = kLanes<T>;
  const T share = T(1) / static_cast<T>(step);
  TurnedSum<T> total;
  for (int64_t c = 0; c < padded; c += W) {
    for (int64_t r = 0; step > 1 && r < step; ++r) __builtin_prefetch(rows.row(kAhead * step + r) + c, 0, 2);
    Vec<T> sum = load_part(rows.row(0) + c, C - c);
    for (int64_t r = 1; r < step; ++r) sum += load_part(rows.row(r) + c, C - c);
    if (step > 1) sum *= share;
    store(dst + c, sum);
    total.add(sum);
  }
  return total.total();
}

// A token less a rounded mean: what the rounding left of its mean, and 1 / sqrt(sum of squares about it + C eps).
template <typename T>
struct Centered {
  T rest, factor;
};

// Takes the mean, of the row's `sum`, off the first C of a padded row if it `centers`; behind them stands what is left.
template <typename T>
Centered<T> center(T* x, int64_t padded, int64_t C, bool centers, T sum, double eps) {
  constexpr int W = kLanes<T>;
  const T channels = static_cast<T>(C), mean = centers ? sum / channels : T(0);
  TurnedSum<T> total, squares;
  for (int64_t c = 0; c < padded; c += W) {
    Vec<T> value = load(x + c) - mean;
    if (c + W > C)
      for (int64_t l = C - c; l < W; ++l) value[l] = 0;
    store(x + c, value);
    total.add(value);
    squares.add(value * value);
  }
  const T rest = centers ? total.total() / channels : T(0);
  for (int64_t c = C; c < padded; ++c) x[c] = rest;
  const T square = squares.total() - channels * rest * rest;
  return {rest, 1 / std::sqrt((square < 0 ? T(0) : square) + static_cast<T>(C * eps))};
}

template <typename E>
void forward(const FeatureAlignmentParams& p, int64_t begin, int64_t end) {
  using T = Compute<E>;
  constexpr int W = kLanes<T>;
  const int64_t padded = round_to_lanes<T>(p.C);
  if (!scratch.reserve(2 * Scratch::padded_bytes<T>(padded))) throw std::bad_alloc();
  T* s = scratch.take<T>(padded);
  T* t = scratch.take<T>(padded);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / p.L, l = u % p.L;
    const E* student = static_cast<const E*>(p.student) + b * p.student_stride[0];
    const E* teacher = static_cast<const E*>(p.teacher) + b * p.teacher_stride[0];
    const Rows<const E> students{student + l * p.student_step * p.student_stride[1], p.student_stride[1]};
    const Rows<const E> teachers{teacher + l * p.teacher_step * p.teacher_stride[1], p.teacher_stride[1]};
    const T s_sum = average(s, padded, students, p.student_step, p.C);
    const T t_sum = average(t, padded, teachers, p.teacher_step, p.C);
    const auto [s_rest, s_factor] = center(s, padded, p.C, p.center, s_sum, p.eps);
    const auto [t_rest, t_factor] = center(t, padded, p.C, p.center, t_sum, p.eps);
    TurnedSum<T> squares, products;
    for (int64_t c = 0; c < padded; c += W) {
      const Vec<T> unit = (load(s + c) - s_rest) * s_factor, difference = unit - (load(t + c) - t_rest) * t_factor;
      squares.add(difference * difference);
      products.add(difference * unit);
      store(s + c, unit), store(t + c, difference);
    }
    static_cast<T*>(p.loss)[u] = squares.total();
    if (!p.direction) continue;
    const T along = products.total();
    E* direction = static_cast<E*>(p.direction) + u * p.C;
    for (int64_t c = 0; c < p.C; c += W) store_part(direction + c, load(t + c) - load(s + c) * along, p.C - c);
    static_cast<T*>(p.factor)[u] = 2 * s_factor;
  }
}

template <typename E>
void backward(const FeatureAlignmentGradParams& g, int64_t begin, int64_t end) {
  using T = Compute<E>;
  constexpr int W = kLanes<T>;
  for (int64_t u = begin; u < end; ++u) {
    const T scale = static_cast<const T*>(g.grad)[u] * static_cast<const T*>(g.factor)[u] / static_cast<T>(g.step);
    const E* direction = static_cast<const E*>(g.direction) + u * g.C;
    E* to = static_cast<E*>(g.grad_student) + u * g.step * g.C;
    for (int64_t c = 0; c < g.C; c += W) {
      const Vec<T> value = load_part(direction + c, g.C - c) * scale;
      for (int64_t r = 0; r < g.step; ++r) store_part(to + r * g.C + c, value, g.C - c);
    }
  }
}

}  // namespace

void feature_alignment_forward(const FeatureAlignmentParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { forward<decltype(element)>(p, begin, end); });
}

void feature_alignment_backward(const FeatureAlignmentGradParams& g, int64_t begin, int64_t end) {
  with_element(g.dtype, [&](auto element) { backward<decltype(element)>(g, begin, end); });
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
