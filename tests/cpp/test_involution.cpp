// involution on every instruction set of this machine, and its CUDA bodies on the host, against plain loops in double:
// tensors that end where their memory ends, strides with gaps, any split of the work, threads.
#include <algorithm>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../kernels/cpu/dispatch.h"
#include "../../kernels/cpu/involution.h"
#include "check.h"
#include "involution_bodies.h"
#include "tensor.h"

using namespace fastib;

struct Case {
  int64_t B, C, G, K, Hi, Wi, stride, dilation;
  bool channels_last;
  int64_t gap;  // elements left out after each row of the dense dimension
  int64_t Ho() const { return (Hi - 1) / stride + 1; }
  int64_t Wo() const { return (Wi - 1) / stride + 1; }
};

template <typename E>
Tensor<E, 4> image(const Case& c, int64_t rows, int64_t columns) {
  const int64_t shape[] = {c.B, c.C, rows, columns};
  const int columns_last[] = {0, 1, 2, 3}, channels_last[] = {0, 2, 3, 1};
  return {shape, c.channels_last ? channels_last : columns_last, 3, c.gap};
}

template <typename E>
Tensor<E, 6> weights(const Case& c) {
  const int64_t shape[] = {c.B, c.G, c.K, c.K, c.Ho(), c.Wo()};
  const int columns_last[] = {0, 1, 2, 3, 4, 5}, taps_last[] = {0, 4, 5, 1, 2, 3};
  return {shape, c.channels_last ? taps_last : columns_last, c.channels_last ? size_t(4) : 5, c.gap};
}

template <typename E>
struct Problem {
  const Case& c;
  Tensor<E, 4> x, grad_out, out, grad_x;
  Tensor<E, 6> weight, grad_weight;
  std::vector<double> exact_out, exact_x, exact_weight;  // sums, and below the sums of the terms' sizes
  std::vector<double> size_out, size_x, size_weight;

  explicit Problem(const Case& c)
      : c(c),
        x(image<E>(c, c.Hi, c.Wi)),
        grad_out(image<E>(c, c.Ho(), c.Wo())),
        out(image<E>(c, c.Ho(), c.Wo())),
        grad_x(image<E>(c, c.Hi, c.Wi)),
        weight(weights<E>(c)),
        grad_weight(weights<E>(c)) {
    std::mt19937 random(static_cast<unsigned>(c.C * 131 + c.K * 17 + c.Wi));
    std::normal_distribution<double> normal;
    std::vector<double> xs, ws, gs;
    const auto draw = [&](std::vector<double>& values) {
      return [&](E& e) { e = Element<E>::from(normal(random)), values.push_back(Element<E>::to(e)); };
    };
    x.each(draw(xs)), weight.each(draw(ws)), grad_out.each(draw(gs));
    const int64_t Ho = c.Ho(), Wo = c.Wo(), pad = c.K / 2 * c.dilation;
    exact_out.assign(gs.size(), 0), exact_x.assign(xs.size(), 0), exact_weight.assign(ws.size(), 0);
    size_out = exact_out, size_x = exact_x, size_weight = exact_weight;
    for (int64_t b = 0, y = 0; b < c.B; ++b)
      for (int64_t ch = 0; ch < c.C; ++ch)
        for (int64_t i = 0; i < Ho; ++i)
          for (int64_t j = 0; j < Wo; ++j, ++y)
            for (int64_t u = 0; u < c.K; ++u)
              for (int64_t v = 0; v < c.K; ++v) {
                const int64_t row = i * c.stride - pad + u * c.dilation, column = j * c.stride - pad + v * c.dilation;
                if (row < 0 || row >= c.Hi || column < 0 || column >= c.Wi) continue;
                const int64_t at = ((b * c.C + ch) * c.Hi + row) * c.Wi + column;
                const int64_t w = ((((b * c.G + ch / (c.C / c.G)) * c.K + u) * c.K + v) * Ho + i) * Wo + j;
                const auto add = [](double& sum, double& size, double term) { sum += term, size += std::fabs(term); };
                add(exact_out[y], size_out[y], ws[w] * xs[at]);
                add(exact_x[at], size_x[at], ws[w] * gs[y]);
                add(exact_weight[w], size_weight[w], xs[at] * gs[y]);
              }
  }

  InvolutionGradParams params() {
    InvolutionGradParams g{};
    InvolutionParams& p = g.forward;
    p.dtype = Element<E>::dtype, p.channels_last = c.channels_last;
    p.B = c.B, p.C = c.C, p.G = c.G, p.K = c.K, p.Hi = c.Hi, p.Wi = c.Wi, p.Ho = c.Ho(), p.Wo = c.Wo();
    p.stride = c.stride, p.dilation = c.dilation;
    p.x = x.data.data(), p.weight = weight.data.data(), p.out = out.data.data();
    g.grad_out = grad_out.data.data(), g.grad_x = grad_x.data.data(), g.grad_weight = grad_weight.data.data();
    std::copy_n(x.stride, 4, p.x_stride), std::copy_n(weight.stride, 6, p.weight_stride);
    std::copy_n(out.stride, 4, p.out_stride), std::copy_n(grad_out.stride, 4, g.grad_out_stride);
    std::copy_n(grad_x.stride, 4, g.grad_x_stride), std::copy_n(grad_weight.stride, 6, g.grad_weight_stride);
    return g;
  }

  void clear() {
    for (auto* data : {&out.data, &grad_x.data, &grad_weight.data})
      data->assign(data->size(), Element<E>::from(kGuard));
  }

  void check_all(const std::string& where) {
    compare(out, exact_out, size_out, where + " out");
    compare(grad_x, exact_x, size_x, where + " grad_x");
    compare(grad_weight, exact_weight, size_weight, where + " grad_weight");
  }
};

template <typename E>
void run(const Case& c) {
  Problem<E> problem(c);
  const std::string name = "C" + std::to_string(c.C) + " K" + std::to_string(c.K) + " " + std::to_string(c.Hi) + "x" +
                           std::to_string(c.Wi) + " stride " + std::to_string(c.stride) + " dilation " +
                           std::to_string(c.dilation) + (c.channels_last ? " channels_last" : "") + " dtype " +
                           std::to_string(static_cast<int>(Element<E>::dtype));
  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    problem.clear();
    const InvolutionGradParams g = problem.params();
    const int64_t units = involution_units(g.forward);
    involution_forward(g.forward, 0, units);
    involution_backward(g, 0, units);
    problem.check_all(isa + " " + name);
    const auto out = problem.out.data, grad_x = problem.grad_x.data, grad_weight = problem.grad_weight.data;
    problem.clear();
    std::vector<std::thread> threads;
    for (int64_t unit = 0; unit < units; ++unit)
      threads.emplace_back([&g, unit] {
        involution_forward(g.forward, unit, unit + 1);
        involution_backward(g, unit, unit + 1);
      });
    for (std::thread& thread : threads) thread.join();
    CHECK(
        same(out, problem.out.data) && same(grad_x, problem.grad_x.data) && same(grad_weight, problem.grad_weight.data),
        isa, " ", name, " depends on the split");
  }
  if constexpr (!std::is_same_v<E, double>) {
    problem.clear();
    const InvolutionGradParams g = problem.params();
    on_host(Element<E>::dtype, g.forward);
    on_host(Element<E>::dtype, g);
    problem.check_all("CUDA body " + name);
  }
}

int main() {
  const Case cases[] = {
      {2, 32, 2, 7, 9, 13, 1, 1, false, 0},  {1, 16, 1, 7, 14, 14, 1, 1, false, 0},
      {1, 16, 1, 7, 8, 8, 1, 1, false, 3},   {1, 20, 1, 3, 7, 17, 2, 1, false, 1},
      {2, 6, 2, 5, 5, 33, 1, 2, false, 0},   {1, 16, 1, 7, 15, 15, 2, 1, false, 0},
      {1, 3, 1, 9, 4, 4, 1, 1, false, 0},    {1, 4, 4, 3, 9, 6, 3, 2, false, 0},
      {1, 16, 1, 11, 6, 5, 1, 1, false, 0},  {1, 2, 1, 1, 3, 5, 1, 1, false, 2},
      {1, 16, 1, 7, 90, 64, 1, 1, false, 0}, {2, 12, 12, 7, 57, 59, 1, 1, false, 0},
      {1, 40, 1, 7, 11, 23, 2, 1, false, 0}, {1, 16, 1, 9, 9, 16, 1, 2, false, 0},
  };
  for (Case c : cases)
    for (bool last : {false, true}) {
      c.channels_last = last;
      run<float>(c), run<double>(c), run<bfloat16>(c), run<float16>(c);
    }
  return report();
}
