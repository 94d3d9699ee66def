// The products of generalized convolution on every instruction set of this machine against plain loops in double:
// tensors that end where their memory ends, one image after the other and product by product, any split of the work.
#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "../../kernels/cpu/dispatch.h"
#include "../../kernels/cpu/generalized_conv_product.h"
#include "check.h"

using namespace fastib;

struct Case {
  int64_t B, C, O, H, D, rows, columns;
  bool last;
  int64_t M() const { return H * D; }
  int64_t pixels() const { return rows * columns; }
  // Place of channel c of N in pixel i of image b of an outer image.
  int64_t at(int64_t N, int64_t b, int64_t c, int64_t i) const {
    return last ? (b * pixels() + i) * N + c : (b * N + c) * pixels() + i;
  }
  std::string text() const {
    return " C" + std::to_string(C) + " O" + std::to_string(O) + " H" + std::to_string(H) + " D" + std::to_string(D) +
           " " + std::to_string(rows) + "x" + std::to_string(columns) + (last ? " last" : "");
  }
};

std::vector<float> draw(int64_t n, uint32_t seed) {
  std::vector<float> values(n);
  for (float& x : values) seed = seed * 1664525u + 1013904223u, x = static_cast<float>(seed >> 8) / (1 << 23) - 1;
  return values;
}

bool close(const std::vector<float>& actual, const std::vector<double>& expected, int64_t terms) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(std::abs(actual[i] - expected[i]) <= 1e-7 * terms + 1e-6 * std::abs(expected[i]))) return false;
  return true;
}

// The middle image (B, pixels, M): outer's channels times the weight (n, m), each head taken from its tap.
std::vector<double> into(const Case& c, const std::vector<float>& outer, int64_t N, const GeneralizedConvWeight& w,
                         bool inverse) {
  std::vector<double> middle(c.B * c.pixels() * c.M());
  int64_t side = 1;
  while (side * side < c.H) ++side;
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t i = 0; i < c.pixels(); ++i)
      for (int64_t m = 0; m < c.M(); ++m) {
        const int64_t head = m / c.D, sign = inverse ? -1 : 1;
        const int64_t row = i / c.columns + sign * (head / side - (side - 1) / 2);
        const int64_t column = i % c.columns + sign * (head % side - (side - 1) / 2);
        if (row < 0 || row >= c.rows || column < 0 || column >= c.columns) continue;
        double& sum = middle[(b * c.pixels() + i) * c.M() + m];
        for (int64_t n = 0; n < N; ++n)
          sum += double(outer[c.at(N, b, n, row * c.columns + column)]) * w.p[n * w.outer + m * w.inner];
      }
  return middle;
}

std::vector<double> back(const Case& c, const std::vector<double>& middle, int64_t N, const GeneralizedConvWeight& w,
                         const float* bias) {
  std::vector<double> outer(c.B * c.pixels() * N);
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t i = 0; i < c.pixels(); ++i)
      for (int64_t n = 0; n < N; ++n) {
        double sum = bias ? bias[n] : 0;
        for (int64_t m = 0; m < c.M(); ++m)
          sum += middle[(b * c.pixels() + i) * c.M() + m] * w.p[n * w.outer + m * w.inner];
        outer[c.at(N, b, n, i)] = sum;
      }
  return outer;
}

// (N, M), and the sums of outer (N,) behind it.
std::vector<double> weight_gradient(const Case& c, const std::vector<float>& outer, int64_t N,
                                    const std::vector<double>& middle) {
  std::vector<double> sum(N * c.M() + N);
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t i = 0; i < c.pixels(); ++i)
      for (int64_t n = 0; n < N; ++n) {
        const double g = outer[c.at(N, b, n, i)];
        for (int64_t m = 0; m < c.M(); ++m) sum[n * c.M() + m] += g * middle[(b * c.pixels() + i) * c.M() + m];
        sum[N * c.M() + n] += g;
      }
  return sum;
}

// f(begin, end) over [0, n), `step` at a time.
template <typename F>
void split(int64_t n, int64_t step, F&& f) {
  for (int64_t at = 0; at < n; at += step) f(at, std::min(at + step, n));
}

void run(const Case& c, int64_t parts) {
  const int64_t images = c.B * c.pixels(), M = c.M(), slack = kMiddleSlack;
  const std::vector<float> x = draw(images * c.C, 1), grad = draw(images * c.O, 2), w_v = draw(M * c.C, 3),
                           w_o = draw(c.O * M, 4), bias = draw(c.O, 5);
  const GeneralizedConvWeight of_v{w_v.data(), c.C, 1, c.C}, of_o{w_o.data(), c.O, M, 1};
  const std::vector<double> values = into(c, x, c.C, of_v, false), out = back(c, values, c.O, of_o, bias.data()),
                            grad_values = into(c, grad, c.O, of_o, true),
                            grad_x = back(c, grad_values, c.C, of_v, nullptr),
                            grad_v = weight_gradient(c, x, c.C, grad_values),
                            grad_o = weight_gradient(c, grad, c.O, values);

  GeneralizedConvProductParams forward{}, backward{};
  forward.sizes = backward.sizes = {c.B, c.rows, c.columns, M, c.H, c.last};
  forward.from = x.data(), forward.into = of_v, forward.back = of_o, forward.bias = bias.data();
  backward.from = grad.data(), backward.into = of_o, backward.back = of_v, backward.inverse = true;
  const int64_t units = generalized_conv_pixel_units(forward.sizes);

  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    std::vector<float> middle(images * M + slack, NAN), to(images * c.O, NAN);
    forward.to = to.data();
    for (float* keep : {middle.data(), static_cast<float*>(nullptr)}) {
      std::fill(to.begin(), to.end(), NAN);
      forward.middle = keep;
      split(c.B, 1, [&](int64_t begin, int64_t end) { generalized_conv_forward(forward, begin, end); });
      CHECK(close(middle, values, c.C) && close(to, out, c.C * M), isa, c.text(), keep ? " kept" : "");
    }
    forward.middle = middle.data();
    for (int64_t step : {units, int64_t(1), int64_t(3)}) {
      std::vector<float> again(middle.size(), NAN), result(to.size(), NAN);
      forward.middle = again.data(), forward.to = result.data();
      split(units, step, [&](int64_t begin, int64_t end) { generalized_conv_into(forward, begin, end); });
      split(units, step, [&](int64_t begin, int64_t end) { generalized_conv_back(forward, begin, end); });
      const bool same = std::equal(again.begin(), again.end() - slack, middle.begin());
      CHECK(same && result == to, isa, c.text(), " step ", step, ": not the bits of one image after the other");
    }

    GeneralizedConvGradParams p{};
    std::vector<float> v_parts(parts * c.C * M, NAN), o_parts(parts * c.O * M, NAN), bias_parts(parts * c.O, NAN);
    std::vector<float> to_x(images * c.C, NAN), v_sum(c.C * M), o_sum(c.O * M + c.O), grad_middle(images * M + slack);
    backward.to = to_x.data();
    p.products = backward, p.parts = parts;
    p.w_v = {backward.sizes, c.C, true, x.data(), nullptr, true, v_parts.data(), nullptr};
    p.w_o = {backward.sizes, c.O, false, grad.data(), middle.data(), true, o_parts.data(), bias_parts.data()};
    // w_v's gradient goes to (M, C), w_o's to (O, M), the bias' behind it.
    const auto sum = [&](int64_t count) {
      std::fill(v_sum.begin(), v_sum.end(), NAN), std::fill(o_sum.begin(), o_sum.end(), NAN);
      split(c.C, 2, [&](int64_t begin, int64_t end) {
        generalized_conv_reduce(p.w_v, count, v_sum.data(), 1, c.C, nullptr, begin, end);
      });
      split(c.O, 2, [&](int64_t begin, int64_t end) {
        generalized_conv_reduce(p.w_o, count, o_sum.data(), M, 1, o_sum.data() + c.O * M, begin, end);
      });
      std::vector<float> turned(v_sum.size());
      for (int64_t m = 0; m < M; ++m)
        for (int64_t n = 0; n < c.C; ++n) turned[n * M + m] = v_sum[m * c.C + n];
      const std::vector<double> of_v_only(grad_v.begin(), grad_v.end() - c.C);
      CHECK(close(turned, of_v_only, images * c.O) && close(o_sum, grad_o, images * c.C), isa, c.text(), " parts ",
            count);
    };
    split(parts, 1, [&](int64_t begin, int64_t end) { generalized_conv_backward(p, begin, end); });
    CHECK(close(to_x, grad_x, c.O * M), isa, c.text(), " grad_x");
    sum(parts);

    std::vector<float> x_again(to_x.size(), NAN);
    backward.middle = grad_middle.data(), backward.to = x_again.data(), p.w_v.middle = grad_middle.data();
    split(units, 2, [&](int64_t begin, int64_t end) { generalized_conv_into(backward, begin, end); });
    split(units, 2, [&](int64_t begin, int64_t end) { generalized_conv_back(backward, begin, end); });
    CHECK(x_again == to_x, isa, c.text(), " grad_x: not the bits of one image after the other");
    const int64_t count = std::min(parts, generalized_conv_blocks(backward.sizes));
    for (const GeneralizedConvWeightParams& gradient : {p.w_v, p.w_o})
      split(count, 1, [&](int64_t begin, int64_t end) { generalized_conv_weight(gradient, count, begin, end); });
    sum(count);
  }
}

int main() {
  using Sizes = std::array<int64_t, 6>;  // C, O, H, D, rows, columns
  for (bool last : {false, true})
    for (const auto& [C, O, H, D, rows, columns] : {Sizes{1, 1, 1, 1, 1, 1},
                                                    {5, 7, 9, 3, 4, 5},
                                                    {16, 16, 9, 32, 14, 14},
                                                    {33, 5, 1, 37, 7, 9},
                                                    {8, 40, 25, 2, 2, 3},
                                                    {3, 9, 6, 16, 19, 17},
                                                    {17, 2, 4, 8, 23, 31},
                                                    {18, 3, 4, 6, 16, 32},
                                                    {2, 6, 32, 1, 1, 40},
                                                    {4, 3, 2, 24, 3, 1}})
      for (int64_t parts : {1, 2}) run({3, C, O, H, D, rows, columns, last}, parts);
  return report();
}
