// The products of a linear layer on every instruction set of this machine, against plain loops in double: rows with
// gaps between them and between their groups, tensors that end where their memory ends, sizes that fill no vector, tile
// or depth, and any split of the work, which gives the same bits.
#include "../../kernels/cpu/linear.h"

#include <algorithm>
#include <random>
#include <string>

#include "../../kernels/cpu/dispatch.h"
#include "check.h"
#include "tensor.h"

using namespace fastib;

struct Case {
  int64_t B, P, I, O;
  std::string text() const {
    return " B" + std::to_string(B) + " P" + std::to_string(P) + " I" + std::to_string(I) + " O" + std::to_string(O);
  }
};

constexpr int kDense[] = {0, 1, 2};

int64_t least(int64_t n) { return n > 0 ? n : 1; }  // of the dimensions of memory

// A (B, P, n) tensor with gaps after its rows.
struct Image : Tensor<float, 3> {
  Image(const Case& c, int64_t n, unsigned seed) : Tensor({least(c.B), least(c.P), least(n)}, kDense, 2, 3) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    each([&](float& e) { e = normal(random); });
  }
  LinearRows rows() const { return {data.data(), sizes[1], stride[0], stride[1]}; }
  double at(int64_t row, int64_t i) const { return data[row / sizes[1] * stride[0] + row % sizes[1] * stride[1] + i]; }
};

// A sum of products, and of their sizes.
struct Sum {
  double value = 0, size = 0;
  void add(double x) { value += x, size += std::fabs(x); }
};

void check_all(const Memory<float>& actual, const std::vector<Sum>& exact, int64_t terms, const std::string& where) {
  for (size_t i = 0; i < exact.size(); ++i) {
    const double allowed = 0x1p-24 * exact[i].size * std::min<double>(terms + 2, 300);
    CHECK(std::fabs(actual[i] - exact[i].value) <= allowed, where, " element ", i, " is ", actual[i], " not ",
          exact[i].value);
  }
}

// f(begin, end) over [0, n), `step` at a time.
template <typename F>
void split(int64_t n, int64_t step, F&& f) {
  for (int64_t at = 0; at < n; at += step) f(at, std::min(at + step, n));
}

void run(const Case& c) {
  const int64_t rows = c.B * c.P;
  const Image x(c, c.I, 1), grad(c, c.O, 2);
  Memory<float> weight(c.O * c.I), bias(c.O);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (Memory<float>* of : {&weight, &bias})
    for (float& e : *of) e = normal(random);

  std::vector<Sum> out(rows * c.O), grad_x(rows * c.I), grad_weight(c.O * c.I), grad_bias(c.O);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t o = 0; o < c.O; ++o) {
      const double g = grad.at(row, o);
      out[row * c.O + o].add(bias[o]);
      grad_bias[o].add(g);
      for (int64_t i = 0; i < c.I; ++i) {
        out[row * c.O + o].add(x.at(row, i) * weight[o * c.I + i]);
        grad_x[row * c.I + i].add(g * weight[o * c.I + i]);
        grad_weight[o * c.I + i].add(g * x.at(row, i));
      }
    }

  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    Memory<float> first[4];
    for (int64_t step : {rows + 1, int64_t(29), int64_t(1)}) {
      Memory<float> to[] = {Memory<float>(rows * c.O, NAN), Memory<float>(rows * c.I, NAN),
                            Memory<float>(c.O * c.I, NAN), Memory<float>(c.O, NAN)};
      const LinearParams forward{x.rows(), c.I, c.O, 1, c.I, weight.data(), bias.data(), to[0].data()};
      const LinearParams back{grad.rows(), c.O, c.I, c.I, 1, weight.data(), nullptr, to[1].data()};
      const LinearWeightParams sums{grad.rows(), x.rows(), rows, c.O, c.I, to[2].data(), to[3].data()};
      split(rows, step, [&](int64_t begin, int64_t end) { linear(forward, begin, end); });
      split(rows, step, [&](int64_t begin, int64_t end) { linear(back, begin, end); });
      split(linear_weight_units(sums), step, [&](int64_t begin, int64_t end) { linear_weight(sums, begin, end); });
      const std::string where = isa + c.text() + " in steps of " + std::to_string(step);
      if (step > rows) {
        check_all(to[0], out, c.I, where + ", out");
        check_all(to[1], grad_x, c.O, where + ", grad_x");
        check_all(to[2], grad_weight, rows, where + ", grad_weight");
        check_all(to[3], grad_bias, rows, where + ", grad_bias");
      }
      for (int i = 0; i < 4; ++i) {
        if (step > rows) first[i] = to[i];
        CHECK(to[i].empty() || same(to[i], first[i]), where, ", result ", i, " has other bits");
      }
    }
    const LinearParams plain{x.rows(), c.I, c.O, 1, c.I, weight.data(), nullptr, first[0].data()};
    linear(plain, 0, rows);
    std::vector<Sum> less(out);
    for (size_t i = 0; i < less.size(); ++i) less[i].value -= bias[i % c.O];
    check_all(first[0], less, c.I, isa + c.text() + ", without bias");
  }
}

int main() {
  for (const Case& c : {Case{1, 1, 1, 1}, Case{2, 7, 5, 3}, Case{3, 5, 16, 32}, Case{2, 33, 17, 49},
                        Case{1, 14, 192, 65}, Case{4, 50, 193, 30}, Case{3, 64, 40, 400}, Case{1, 200, 390, 24},
                        Case{2, 193, 66, 67}, Case{1, 3, 0, 4}, Case{2, 0, 3, 5}, Case{1, 4, 3, 0}})
    run(c);
  return report();
}
