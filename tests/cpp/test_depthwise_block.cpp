// The depth-wise block pass by pass on every instruction set of this machine, against plain loops in double: tensors
// that end where their memory ends, channels that fill no vector, grids of one row, several groups of images, any split
// of the work, threads. Each pass is checked on what the pass before it has stored, and resident units on the passes.
#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <thread>

#include "../../kernels/cpu/depthwise_block.h"
#include "../../kernels/cpu/dispatch.h"
#include "check.h"
#include "tensor.h"

using namespace fastib;

struct Case {
  int64_t B, C, grid_h, grid_w;
  bool training;
};

// A number and the size of the terms that it is made of: a rounding of each of them moves it by at most a unit of that.
struct Sized {
  double value = 0, size = 0;
};
Sized operator+(Sized a, Sized b) { return {a.value + b.value, a.size + b.size}; }
Sized operator-(Sized a, Sized b) { return {a.value - b.value, a.size + b.size}; }
Sized operator*(Sized a, Sized b) {
  return {a.value * b.value, a.size * std::fabs(b.value) + std::fabs(a.value) * b.size};
}
Sized& operator+=(Sized& a, Sized b) { return a = a + b; }
Sized exactly(double x) { return {x, std::fabs(x)}; }

Sized gelu(Sized x) { return {0.5 * x.value * std::erfc(-x.value * std::sqrt(0.5)), 1.2 * x.size}; }
Sized gelu_slope(Sized x) {
  const double bell = std::exp(-0.5 * x.value * x.value) / std::sqrt(2 * 3.14159265358979324);
  return {0.5 * std::erfc(-x.value * std::sqrt(0.5)) + x.value * bell, 1 + x.size};
}

template <typename E>
struct Problem {
  using T = typename Element<E>::Sum;
  using Numbers = Memory<T>;
  using Map = std::vector<Sized>;  // (B, P, C)
  const Case& c;
  const int64_t places, blocks, groups;
  Memory<E> x, grad_out, out, grad_x;
  Numbers weight, shift[2], inv[2], gamma[2], beta[2], partial, grad_partial, mean_d[2], mean_d_hat[2];
  std::string where;

  explicit Problem(const Case& c)
      : c(c),
        places(c.grid_h * c.grid_w),
        blocks((c.C + kUnitChannels - 1) / kUnitChannels),
        groups((c.B + kUnitGroup - 1) / kUnitGroup) {
    std::mt19937 random(static_cast<unsigned>(c.C * 31 + places));
    std::normal_distribution<double> normal;
    const auto draw = [&](auto& memory, int64_t count, double mean, double deviation) {
      using X = typename std::remove_reference_t<decltype(memory)>::value_type;
      for (int64_t i = 0; i < count; ++i) memory.push_back(Element<X>::from(mean + deviation * normal(random)));
    };
    const int64_t all = c.B * places * c.C;
    draw(x, all, 0.5, 1), draw(grad_out, all, 0, 1), draw(weight, 9 * c.C, 0, 0.4);
    out.resize(all), grad_x.resize(all), partial.resize(3 * c.B * c.C), grad_partial.resize(groups * 11 * c.C);
    for (int norm = 0; norm < 2; ++norm) {
      draw(gamma[norm], c.C, 1, 0.3), draw(beta[norm], c.C, 0, 0.3);
      shift[norm].resize(c.C), inv[norm].resize(c.C), mean_d[norm].resize(c.C), mean_d_hat[norm].resize(c.C);
    }
  }

  DepthwiseBlockGradParams params() {
    DepthwiseBlockGradParams g{};
    DepthwiseBlockParams& p = g.forward;
    p.dtype = Element<E>::dtype, p.B = c.B, p.C = c.C, p.grid_h = c.grid_h, p.grid_w = c.grid_w;
    p.unit_channels = kUnitChannels;
    p.x = x.data(), p.weight = weight.data(), p.out = out.data(), p.partial = partial.data();
    p.norm1 = {shift[0].data(), inv[0].data(), gamma[0].data(), beta[0].data()};
    p.norm2 = {shift[1].data(), inv[1].data(), gamma[1].data(), beta[1].data()};
    g.grad_out = grad_out.data(), g.grad_x = grad_x.data(), g.partial = grad_partial.data();
    g.mean_d2 = mean_d[1].data(), g.mean_d2_hat = mean_d_hat[1].data();
    g.mean_d1 = mean_d[0].data(), g.mean_d1_hat = mean_d_hat[0].data();
    return g;
  }

  template <typename F>
  void each(F&& f) const {  // f(image, row, column, channel, index)
    int64_t index = 0;
    for (int64_t b = 0; b < c.B; ++b)
      for (int64_t i = 0; i < c.grid_h; ++i)
        for (int64_t j = 0; j < c.grid_w; ++j)
          for (int64_t k = 0; k < c.C; ++k) f(b, i, j, k, index++);
  }

  // What the kernel makes of `from`, with a factor of its own for each channel and offset.
  Map mixed(const Map& from, bool transposed) const {
    Map to(from.size());
    each([&](int64_t b, int64_t i, int64_t j, int64_t k, int64_t at) {
      for (int64_t u = -1; u <= 1; ++u)
        for (int64_t v = -1; v <= 1; ++v) {
          if (i + u < 0 || i + u >= c.grid_h || j + v < 0 || j + v >= c.grid_w) continue;
          const int64_t tap = transposed ? (1 - u) * 3 + 1 - v : (1 + u) * 3 + 1 + v;
          to[at] += exactly(Element<T>::to(weight[tap * c.C + k])) *
                    from[((b * c.grid_h + i + u) * c.grid_w + j + v) * c.C + k];
        }
    });
    return to;
  }

  Map numbers(const Memory<E>& from) const {
    Map to;
    for (E e : from) to.push_back({Element<E>::to(e), std::fabs(Element<E>::to(e))});
    return to;
  }
  template <typename F>
  Map map(F&& f) const {  // f(index, channel)
    Map to(x.size());
    each([&](int64_t, int64_t, int64_t, int64_t k, int64_t at) { to[at] = f(at, k); });
    return to;
  }
  Map hats(const Map& y, int norm) const {
    return map([&](int64_t at, int64_t k) { return (y[at] + exactly(shift[norm][k])) * exactly(inv[norm][k]); });
  }
  Map affine(const Map& hat, int norm) const {
    return map([&](int64_t at, int64_t k) { return hat[at] * exactly(gamma[norm][k]) + exactly(beta[norm][k]); });
  }

  void near(double got, Sized exact, const std::string& what, double unit = 0) const {
    const double smallest = Element<E>::dtype == DType::float16 ? 0x1p-25 : 1e-30;
    const double allowed =
        1.01 * unit * std::fabs(exact.value) + 200 * Element<E>::sum_unit * exact.size + (unit ? smallest : 1e-30);
    CHECK(std::fabs(got - exact.value) <= allowed, where, " ", what, " ", got, " exact ", exact.value, " allowed ",
          allowed);
  }
  void near(const Memory<E>& got, const Map& exact, const std::string& what) const {
    for (size_t i = 0; i < got.size(); ++i) near(Element<E>::to(got[i]), exact[i], what, Element<E>::unit);
  }

  Map sums(const Map& of) const {
    Map to(c.C);
    each([&](int64_t, int64_t, int64_t, int64_t k, int64_t at) { to[k] += of[at]; });
    return to;
  }
  Map times(const Map& a, const Map& b) const {
    return map([&](int64_t at, int64_t) { return a[at] * b[at]; });
  }

  // The statistics of `of` as the passes found them, and what the next pass takes of them.
  void merge(const DepthwiseBlockParams& p, const Map& of, int norm) {
    std::vector<double> mean(c.C), variance(c.C);
    depthwise_block_merge(p, 0, c.C, mean.data(), variance.data());
    const double share = 1.0 / static_cast<double>(c.B * places);
    const Map total = sums(of);
    Map squares(c.C);
    each([&](int64_t, int64_t, int64_t, int64_t k, int64_t at) {
      const Sized off = of[at] - Sized{total[k].value * share, total[k].size * share};
      squares[k] += off * off;
    });
    for (int64_t k = 0; k < c.C; ++k) {
      near(mean[k], {total[k].value * share, total[k].size * share}, "mean");
      near(variance[k], {squares[k].value * share, squares[k].size * share}, "variance");
      shift[norm][k] = static_cast<T>(-mean[k]), inv[norm][k] = static_cast<T>(1 / std::sqrt(variance[k] + 1e-5));
    }
  }

  // Sums of the rows of the backward against the exact ones; the means that the next pass takes away.
  void merge_gradients(const DepthwiseBlockGradParams& g, const std::vector<Map>& exact, int norm) {
    const int64_t rows = static_cast<int64_t>(exact.size());
    std::vector<double> found(rows * c.C);
    depthwise_block_sum(g, rows, 0, c.C, found.data());
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < c.C; ++k)
        near(found[row * c.C + k], exact[row][k], "norm " + std::to_string(norm + 1) + " sum " + std::to_string(row));
    const double share = c.training ? 1.0 / static_cast<double>(c.B * places) : 0;
    for (int64_t k = 0; k < c.C; ++k)
      mean_d[norm][k] = static_cast<T>(found[k] * share), mean_d_hat[norm][k] = static_cast<T>(found[c.C + k] * share);
  }
  // The gradient in front of a norm from d behind it.
  Map before(const Map& d, const Map& hat, int norm) const {
    return map([&](int64_t at, int64_t k) {
      return exactly(gamma[norm][k]) * exactly(inv[norm][k]) *
             (d[at] - exactly(mean_d[norm][k]) - hat[at] * exactly(mean_d_hat[norm][k]));
    });
  }

  using Pass = std::function<void(int64_t, int64_t)>;
  using Runner = std::function<void(int64_t units, const Pass&)>;

  // All passes in resident units, with what a run before found between them.
  void run_resident(const Runner& runner, int64_t channels) {
    DepthwiseBlockGradParams g = params();
    g.forward.unit_channels = channels;
    const auto nothing = [](auto, int64_t, int64_t) {};
    const int64_t count = (c.C + channels - 1) / channels;
    runner(count,
           [&](int64_t begin, int64_t end) { depthwise_block_forward_resident(g.forward, nothing, begin, end); });
    runner(count, [&](int64_t begin, int64_t end) { depthwise_block_backward_resident(g, nothing, begin, end); });
  }

  // All passes, each run by `runner`, and checked unless it is to be compared with a run before.
  void run(const Runner& runner, bool checked) {
    const DepthwiseBlockGradParams g = params();
    const DepthwiseBlockParams& p = g.forward;
    const auto forward = [&](ForwardPass pass) {
      runner(c.B * blocks, [&](int64_t begin, int64_t end) { depthwise_block_forward(p, pass, begin, end); });
    };
    const auto backward = [&](BackwardPass pass) {
      runner(groups * blocks, [&](int64_t begin, int64_t end) { depthwise_block_backward(g, pass, begin, end); });
    };
    if (!checked) {  // the arrays between the passes are there already
      forward(ForwardPass::x_statistics), forward(ForwardPass::conv_statistics), forward(ForwardPass::output);
      backward(BackwardPass::norm2), backward(BackwardPass::norm1), backward(BackwardPass::x);
      return;
    }
    const Map in = numbers(x), grad = numbers(grad_out);
    forward(ForwardPass::x_statistics);
    merge(p, in, 0);
    const Map hat1 = hats(in, 0), u1 = affine(hat1, 0);
    const Map s = map([&](int64_t at, int64_t) { return gelu(u1[at]); }), conv = mixed(s, false);
    forward(ForwardPass::conv_statistics);
    merge(p, conv, 1);
    const Map hat2 = hats(conv, 1), u2 = affine(hat2, 1);
    forward(ForwardPass::output);
    near(out, map([&](int64_t at, int64_t) { return gelu(u2[at]) + s[at]; }), "out");

    const Map d2 = map([&](int64_t at, int64_t) { return grad[at] * gelu_slope(u2[at]); });
    backward(BackwardPass::norm2);
    merge_gradients(g, {sums(d2), sums(times(d2, hat2))}, 1);
    const Map at_conv = before(d2, hat2, 1), at_s = mixed(at_conv, true);
    const Map d1 = map([&](int64_t at, int64_t) { return (grad[at] + at_s[at]) * gelu_slope(u1[at]); });
    std::vector<Map> exact{sums(d1), sums(times(d1, hat1))};
    for (int64_t tap = 0; tap < 9; ++tap) {
      Map row(c.C);
      each([&](int64_t b, int64_t i, int64_t j, int64_t k, int64_t at) {
        const int64_t r = i + tap / 3 - 1, q = j + tap % 3 - 1;
        if (r >= 0 && r < c.grid_h && q >= 0 && q < c.grid_w)
          row[k] += at_conv[at] * s[((b * c.grid_h + r) * c.grid_w + q) * c.C + k];
      });
      exact.push_back(row);
    }
    backward(BackwardPass::norm1);
    merge_gradients(g, exact, 0);
    near(grad_x, d1, "d1");
    const Map stored = numbers(grad_x);
    backward(BackwardPass::x);
    near(grad_x, before(stored, hat1, 0), "grad_x");
  }
};

template <typename E>
void run(const Case& c) {
  Problem<E> problem(c);
  const auto whole = [](int64_t units, const auto& pass) { pass(0, units); };
  const auto split = [](int64_t units, const auto& pass) {
    std::vector<std::thread> threads;
    for (int64_t u = 0; u < units; ++u) threads.emplace_back([&pass, u] { pass(u, u + 1); });
    for (std::thread& thread : threads) thread.join();
  };
  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    problem.where = isa + " B" + std::to_string(c.B) + " C" + std::to_string(c.C) + " grid " +
                    std::to_string(c.grid_h) + "x" + std::to_string(c.grid_w) +
                    (c.training ? " training" : " evaluation") + " dtype " +
                    std::to_string(static_cast<int>(Element<E>::dtype));
    problem.run(whole, true);
    const auto out = problem.out, grad_x = problem.grad_x;
    const auto partial = problem.partial, grad_partial = problem.grad_partial;
    const auto check_same = [&](const std::string& what) {
      CHECK(same(out, problem.out) && same(grad_x, problem.grad_x) && same(partial, problem.partial) &&
                same(grad_partial, problem.grad_partial),
            problem.where, " depends on ", what);
      for (auto* memory : {&problem.out, &problem.grad_x})
        std::fill(memory->begin(), memory->end(), Element<E>::from(NAN));
      for (auto* memory : {&problem.partial, &problem.grad_partial}) std::fill(memory->begin(), memory->end(), NAN);
    };
    check_same("nothing");
    problem.run(split, false), check_same("the split");
    problem.run_resident(whole, 64), check_same("residence");
    problem.run_resident(split, 16), check_same("the width of resident units");
  }
}

int main() {
  const Case cases[] = {
      {2, 64, 4, 4, true},  {9, 5, 3, 5, true},  {3, 70, 1, 6, true},   {17, 1, 2, 1, true},
      {1, 130, 7, 9, true}, {4, 33, 1, 1, true}, {10, 17, 5, 2, false},
  };
  for (const Case& c : cases) run<float>(c), run<double>(c), run<bfloat16>(c), run<float16>(c);
  return report();
}
