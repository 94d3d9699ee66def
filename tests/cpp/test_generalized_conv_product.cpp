// The products of generalized convolution on every instruction set of this machine against plain loops in double:
// tensors that end where their memory ends, any split of the work.
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
  int64_t B, K, H, D, rows, columns;
  bool last, transposed, inverse;
  int64_t pixels() const { return rows * columns; }
  // Place of channel c of C in pixel i of image b.
  int64_t at(int64_t C, int64_t b, int64_t c, int64_t i) const {
    return last ? (b * pixels() + i) * C + c : (b * C + c) * pixels() + i;
  }
};

std::vector<float> draw(int64_t n, uint32_t seed) {
  std::vector<float> values(n);
  for (float& x : values) seed = seed * 1664525u + 1013904223u, x = static_cast<float>(seed >> 8) / (1 << 23) - 1;
  return values;
}

bool close(const std::vector<float>& actual, const std::vector<double>& expected, int64_t terms) {
  for (size_t i = 0; i < actual.size(); ++i)
    if (!(std::abs(actual[i] - expected[i]) <= 1e-7 * terms + 1e-6 * std::abs(expected[i]))) return false;
  return true;
}

void run_product(const Case& c) {
  const int64_t N = c.H * c.D, images = c.B * c.pixels();
  const std::vector<float> x = draw(images * c.K, 1), weight = draw(N * c.K, 2), bias = draw(N, 3);
  std::vector<double> expected(images * N);
  int64_t side = 1;
  while (side * side < c.H) ++side;
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < c.pixels(); ++i) {
        const int64_t head = n / c.D, sign = c.inverse ? -1 : 1;
        const int64_t row = i / c.columns + sign * (head / side - (side - 1) / 2);
        const int64_t column = i % c.columns + sign * (head % side - (side - 1) / 2);
        double sum = c.H == 1 ? bias[n] : 0;
        const bool inside = row >= 0 && row < c.rows && column >= 0 && column < c.columns;
        for (int64_t k = 0; inside && k < c.K; ++k)
          sum += double(x[c.at(c.K, b, k, row * c.columns + column)]) * weight[c.transposed ? k * N + n : n * c.K + k];
        expected[c.at(N, b, n, i)] = sum;
      }
  std::vector<float> out(images * N);
  GeneralizedConvProductParams p{};
  p.B = c.B, p.rows = c.rows, p.columns = c.columns, p.K = c.K, p.N = N, p.H = c.H;
  p.inverse = c.inverse, p.transposed = c.transposed, p.weight_stride = c.transposed ? N : c.K;
  p.x = x.data(), p.weight = weight.data(), p.bias = c.H == 1 ? bias.data() : nullptr, p.out = out.data();
  const int64_t units = c.last ? generalized_conv_pixel_units(p) : generalized_conv_plane_units(p);
  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    for (int64_t step : {units, int64_t(1), int64_t(3)}) {
      std::fill(out.begin(), out.end(), NAN);
      for (int64_t unit = 0; unit < units; unit += step)
        (c.last ? generalized_conv_pixels : generalized_conv_planes)(p, unit, std::min(unit + step, units));
      CHECK(close(out, expected, c.K), isa, " K", c.K, " H", c.H, " D", c.D, " ", c.rows, "x", c.columns,
            c.last ? " last" : "", c.transposed ? " transposed" : "", c.inverse ? " inverse" : "", " step ", step);
    }
  }
}

// Both products at once against one after the other: the same bits.
void run_both(const Case& c, int64_t results) {
  const int64_t N = c.H * c.D, images = c.B * c.pixels();
  const std::vector<float> x = draw(images * c.K, 6), w_v = draw(N * c.K, 7), w_o = draw(results * N, 8);
  std::vector<float> values(images * N), expected(images * results), out(images * results);
  GeneralizedConvBothParams p{};
  p.values.B = p.result.B = c.B, p.values.rows = p.result.rows = c.rows,
  p.values.columns = p.result.columns = c.columns;
  p.values.K = p.values.weight_stride = c.K, p.values.N = N, p.values.H = c.H, p.values.weight = w_v.data();
  p.result.K = p.result.weight_stride = N, p.result.N = results, p.result.H = 1, p.result.weight = w_o.data();
  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    p.values.x = x.data(), p.values.out = values.data(), p.result.x = values.data(), p.result.out = expected.data();
    for (const GeneralizedConvProductParams& product : {p.values, p.result}) {
      if (c.last)
        generalized_conv_pixels(product, 0, generalized_conv_pixel_units(product));
      else
        generalized_conv_planes(product, 0, generalized_conv_plane_units(product));
    }
    std::vector<float> kept(values.size(), NAN);
    p.result.x = nullptr, p.result.out = out.data();
    const auto kernel = c.last ? generalized_conv_both_pixels : generalized_conv_both_planes;
    bool same = true;
    for (float* keep : {kept.data(), static_cast<float*>(nullptr)}) {
      p.values.out = keep;
      std::fill(out.begin(), out.end(), NAN);
      kernel(p, 0, 1), kernel(p, 1, c.B);
      same = same && out == expected;
    }
    CHECK(same && kept == values, isa, " K", c.K, " H", c.H, " D", c.D, " ", c.rows, "x", c.columns,
          c.last ? " last" : "");
  }
}

void run_gradient(const Case& c, int64_t parts) {
  const int64_t N = c.H * c.D, images = c.B * c.pixels();
  const std::vector<float> x = draw(images * c.K, 4), grad = draw(images * N, 5);
  std::vector<double> weight(N * c.K), bias(N);
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < c.pixels(); ++i) {
        const double g = grad[c.at(N, b, n, i)];
        bias[n] += g;
        for (int64_t k = 0; k < c.K; ++k) weight[n * c.K + k] += g * x[c.at(c.K, b, k, i)];
      }
  std::vector<float> weight_parts(parts * N * c.K), bias_parts(parts * N), weight_sum(N * c.K), bias_sum(N);
  GeneralizedConvWeightParams p{};
  p.B = c.B, p.pixels = c.pixels(), p.K = c.K, p.N = N, p.parts = parts;
  p.grad = grad.data(), p.x = x.data();
  p.weight_parts = weight_parts.data(), p.bias_parts = bias_parts.data();
  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    std::fill(weight_parts.begin(), weight_parts.end(), NAN), std::fill(bias_parts.begin(), bias_parts.end(), NAN);
    const auto kernel = c.last ? generalized_conv_grad_weight_pixels : generalized_conv_grad_weight_planes;
    kernel(p, 0, parts / 2), kernel(p, parts / 2, parts);
    generalized_conv_reduce(p, weight_sum.data(), bias_sum.data(), 0, N / 2);
    generalized_conv_reduce(p, weight_sum.data(), bias_sum.data(), N / 2, N);
    CHECK(close(weight_sum, weight, images) && close(bias_sum, bias, images), isa, " K", c.K, " N", N, " ", c.rows, "x",
          c.columns, c.last ? " last" : "", " parts ", parts);
  }
}

int main() {
  using Sizes = std::array<int64_t, 5>;  // K, H, D, rows, columns
  for (bool last : {false, true})
    for (const auto& [K, H, D, rows, columns] : {Sizes{1, 1, 1, 1, 1},
                                                 {5, 9, 3, 4, 5},
                                                 {16, 9, 32, 14, 14},
                                                 {33, 1, 37, 7, 9},
                                                 {8, 25, 2, 2, 3},
                                                 {3, 6, 16, 19, 17},
                                                 {17, 4, 8, 23, 31},
                                                 {2, 32, 1, 1, 40},
                                                 {4, 2, 24, 3, 1}}) {
      for (bool transposed : {false, true})
        for (bool inverse : {false, true}) run_product({2, K, H, D, rows, columns, last, transposed, inverse});
      run_both({2, K, H, D, rows, columns, last, false, false}, 7);
      for (int64_t parts : {1, 2}) run_gradient({2, K, H, D, rows, columns, last, false, false}, parts);
    }
  return report();
}
