// The distance of unit tokens and its gradient on every instruction set of this machine, against plain loops in double:
// rows that end where their memory ends, either sequence the longer one, odd channel counts, any split, threads.
#include <algorithm>
#include <random>
#include <string>
#include <thread>

#include "../../kernels/cpu/dispatch.h"
#include "../../kernels/cpu/feature_alignment.h"
#include "check.h"
#include "tensor.h"

using namespace fastib;

struct Case {
  int64_t B, L, C, student_step, teacher_step;
  bool center;
  int64_t gap;   // elements left out after each token
  double shift;  // mean of the tokens, which centring takes off
};

template <typename E, size_t n>
Tensor<E, n> rows(const int64_t (&shape)[n], int64_t gap = 0) {
  int order[n];
  for (size_t k = 0; k < n; ++k) order[k] = static_cast<int>(k);
  return {shape, order, n - 1, gap};
}

// An averaged token brought to length 1, in double.
struct Unit {
  std::vector<double> value, size;  // size: of the terms that each value is made of
  double factor = 0, relative = 0;  // relative: what a rounding of all terms does to the unit token

  Unit(const double* from, int64_t step, int64_t C, bool center, double eps) : value(C), size(C) {
    double mean = 0, mean_size = 0, squares = 0, terms = 0;
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t r = 0; r < step; ++r)
        value[c] += from[r * C + c] / step, size[c] += std::fabs(from[r * C + c]) / step;
      if (center) mean += value[c] / C, mean_size += size[c] / C;
    }
    for (int64_t c = 0; c < C; ++c) {
      value[c] -= mean, size[c] += mean_size;
      squares += value[c] * value[c], terms += size[c] * size[c];
    }
    factor = 1 / std::sqrt(squares + C * eps), relative = std::sqrt(terms) * factor;
    for (int64_t c = 0; c < C; ++c) value[c] *= factor, size[c] *= factor;
  }
};

template <typename E>
struct Problem {
  using T = typename Element<E>::Sum;
  const Case& c;
  Tensor<E, 3> student, teacher, direction, grad_student;
  Tensor<T, 2> loss, factor, grad;
  std::vector<double> ss, ts, gs;
  double eps = 1e-5;

  explicit Problem(const Case& c)
      : c(c),
        student(rows<E, 3>({c.B, c.L * c.student_step, c.C}, c.gap)),
        teacher(rows<E, 3>({c.B, c.L * c.teacher_step, c.C}, c.gap)),
        direction(rows<E, 3>({c.B, c.L, c.C})),
        grad_student(rows<E, 3>({c.B, c.L * c.student_step, c.C})),
        loss(rows<T, 2>({c.B, c.L})),
        factor(loss),
        grad(loss) {
    std::mt19937 random(static_cast<unsigned>(c.L * 31 + c.C));
    std::normal_distribution<double> normal;
    const auto draw = [&](std::vector<double>& values, double shift) {
      return [&values, &normal, &random, shift](auto& e) {
        using X = std::remove_reference_t<decltype(e)>;
        e = Element<X>::from(normal(random) + shift), values.push_back(Element<X>::to(e));
      };
    };
    student.each(draw(ss, c.shift)), teacher.each(draw(ts, -c.shift)), grad.each(draw(gs, 0));
  }

  FeatureAlignmentParams params(bool gradient) {
    FeatureAlignmentParams p{};
    p.dtype = Element<E>::dtype, p.center = c.center, p.B = c.B, p.L = c.L, p.C = c.C, p.eps = eps;
    p.student_step = c.student_step, p.teacher_step = c.teacher_step;
    p.student = student.data.data(), p.teacher = teacher.data.data(), p.loss = loss.data.data();
    std::copy_n(student.stride, 2, p.student_stride), std::copy_n(teacher.stride, 2, p.teacher_stride);
    if (gradient) p.direction = direction.data.data(), p.factor = factor.data.data();
    return p;
  }

  FeatureAlignmentGradParams grad_params() {
    FeatureAlignmentGradParams g{};
    g.dtype = Element<E>::dtype, g.B = c.B, g.L = c.L, g.C = c.C, g.step = c.student_step;
    g.grad = grad.data.data(), g.direction = direction.data.data(), g.factor = factor.data.data();
    g.grad_student = grad_student.data.data();
    return g;
  }

  void clear() {
    for (auto* data : {&direction.data, &grad_student.data}) data->assign(data->size(), Element<E>::from(kGuard));
    for (auto* data : {&loss.data, &factor.data}) data->assign(data->size(), Element<T>::from(kGuard));
  }

  void check_forward(const std::string& where, bool gradient) {
    std::vector<double> losses, loss_size, factors, factor_size, directions, direction_size;
    for (int64_t u = 0; u < c.B * c.L; ++u) {
      const Unit s(&ss[u * c.student_step * c.C], c.student_step, c.C, c.center, eps);
      const Unit t(&ts[u * c.teacher_step * c.C], c.teacher_step, c.C, c.center, eps);
      double sum = 0, along = 0;
      for (int64_t k = 0; k < c.C; ++k) {
        const double d = s.value[k] - t.value[k];
        sum += d * d, along += d * s.value[k];
      }
      losses.push_back(sum), loss_size.push_back((sum + 2 * std::sqrt(sum)) * (s.relative + t.relative));
      factors.push_back(2 * s.factor), factor_size.push_back(2 * s.factor * s.relative);
      for (int64_t k = 0; k < c.C; ++k) {
        directions.push_back(s.value[k] - t.value[k] - along * s.value[k]);
        direction_size.push_back(2 * (s.size[k] + t.size[k]) +
                                 3 * (s.relative + t.relative) * (std::fabs(s.value[k]) + std::fabs(t.value[k])));
      }
    }
    compare(loss, losses, loss_size, where + " loss");
    if (!gradient) return;
    compare(factor, factors, factor_size, where + " factor");
    compare(direction, directions, direction_size, where + " direction");
  }

  // The gradient is that of the direction as it is stored.
  void check_backward(const std::string& where) {
    std::vector<double> stored, factors, exact, size;
    direction.each([&](E& e) { stored.push_back(Element<E>::to(e)); });
    factor.each([&](T& e) { factors.push_back(e); });
    for (int64_t u = 0; u < c.B * c.L; ++u)
      for (int64_t r = 0; r < c.student_step; ++r)
        for (int64_t k = 0; k < c.C; ++k) {
          exact.push_back(gs[u] * factors[u] / c.student_step * stored[u * c.C + k]);
          size.push_back(std::fabs(exact.back()));
        }
    compare(grad_student, exact, size, where + " grad_student", 4);
  }
};

template <typename E>
void run(const Case& c) {
  Problem<E> problem(c);
  const std::string name = "L" + std::to_string(c.L) + " C" + std::to_string(c.C) + " steps " +
                           std::to_string(c.student_step) + "," + std::to_string(c.teacher_step) +
                           (c.center ? " centred" : "") + " dtype " +
                           std::to_string(static_cast<int>(Element<E>::dtype));
  const int64_t units = c.B * c.L;
  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    problem.clear();
    feature_alignment_forward(problem.params(false), 0, units);
    problem.check_forward(isa + " " + name + " alone", false);
    problem.clear();
    const FeatureAlignmentParams p = problem.params(true);
    const FeatureAlignmentGradParams g = problem.grad_params();
    feature_alignment_forward(p, 0, units);
    feature_alignment_backward(g, 0, units);
    problem.check_forward(isa + " " + name, true);
    problem.check_backward(isa + " " + name);
    const auto loss = problem.loss.data, factor = problem.factor.data;
    const auto grad = problem.grad_student.data;
    problem.clear();
    std::vector<std::thread> threads;
    for (int64_t u = 0; u < units; ++u)
      threads.emplace_back([&p, &g, u] {
        feature_alignment_forward(p, u, u + 1);
        feature_alignment_backward(g, u, u + 1);
      });
    for (std::thread& thread : threads) thread.join();
    CHECK(same(loss, problem.loss.data) && same(factor, problem.factor.data) && same(grad, problem.grad_student.data),
          isa, " ", name, " depends on the split");
  }
}

int main() {
  const Case cases[] = {
      {2, 5, 33, 1, 1, true, 0, 0.0},  {1, 4, 288, 1, 4, true, 3, 2.0}, {2, 3, 17, 4, 1, true, 0, 1.0},
      {1, 7, 1, 1, 2, true, 1, 0.0},   {3, 2, 5, 3, 1, false, 0, 0.5},  {1, 6, 64, 1, 3, false, 5, 0.0},
      {2, 3, 130, 2, 1, true, 1, 4.0},
  };
  for (const Case& c : cases) run<float>(c), run<double>(c), run<bfloat16>(c), run<float16>(c);
  return report();
}
