// The CPU kernels of mhca_attention, on every instruction set of this machine, against plain loops in double: odd
// sizes, strides with gaps, dropout, threads; nothing outside the tensors may be written, and no split changes a bit.
#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>

#include "../../kernels/cpu/dispatch.h"
#include "../../kernels/cpu/mhca_attention.h"
#include "check.h"
#include "naive_mhca.h"
#include "tensor.h"

using namespace fastib;

struct Case {
  int64_t B, H, grid_h, grid_w, prefix, D;
  double rpe_dropout, attn_dropout;
};

// (B, H, N, D) laid out as (B, N, H, D + gap), all of it a guard value until written.
template <typename T>
struct Strided {
  std::vector<T> data;
  int64_t stride[3];
  const Case& c;
  int64_t N;

  Strided(const Case& c, int64_t N, int64_t gap, double guard) : c(c), N(N) {
    stride[1] = c.D + gap, stride[2] = c.H * stride[1], stride[0] = N * stride[2];
    data.assign(c.B * stride[0], Element<T>::from(guard));
  }
  T& at(int64_t b, int64_t h, int64_t n, int64_t d) { return data[b * stride[0] + h * stride[1] + n * stride[2] + d]; }
  template <typename F>
  void each(F&& f) {
    for (int64_t b = 0, i = 0; b < c.B; ++b)
      for (int64_t h = 0; h < c.H; ++h)
        for (int64_t n = 0; n < N; ++n)
          for (int64_t d = 0; d < c.D; ++d, ++i) f(at(b, h, n, d), i);
  }
  void fill(std::vector<double>& values, std::mt19937& random, double size) {
    std::normal_distribution<double> normal(0, size);
    values.resize(c.B * c.H * N * c.D);
    each([&](T& x, int64_t i) { x = Element<T>::from(normal(random)), values[i] = Element<T>::to(x); });
  }
  std::vector<double> values() {
    std::vector<double> result(c.B * c.H * N * c.D);
    each([&](T& x, int64_t i) { result[i] = Element<T>::to(x); });
    return result;
  }
  bool gaps_untouched(int64_t gap, double guard) {
    const T expected = Element<T>::from(guard);
    for (int64_t row = 0; row < c.B * N * c.H; ++row) {
      for (int64_t d = c.D; d < c.D + gap; ++d) {
        if (std::memcmp(&data[row * stride[1] + d], &expected, sizeof(T)) != 0) return false;
      }
    }
    return true;
  }
};

static void compare(const std::string& what, const std::vector<double>& got, const std::vector<double>& expected,
                    double tolerance, double size = 0) {
  double error = 0;
  for (double x : expected) size = std::max(size, std::abs(x));
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = std::abs(got[i] - expected[i]);
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
  }
  CHECK(error <= tolerance * std::max(size, 1e-3), what, ": error ", error, " of ", size, ", allowed ", tolerance);
}

template <typename F>
static void on_threads(int64_t units, int threads, const F& f) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) pool.emplace_back([&, t] { f(units * t / threads, units * (t + 1) / threads); });
  for (auto& thread : pool) thread.join();
}

template <typename T>
static void check_case(const Case& c, const std::string& isa) {
  using Sum = typename Element<T>::Sum;
  const int64_t N = c.prefix + c.grid_h * c.grid_w, gap = 3;
  const double guard = 12345;
  std::mt19937 random(static_cast<unsigned>(N * 131 + c.D));
  NaiveMhca naive;
  naive.B = c.B, naive.H = c.H, naive.N = N, naive.D = c.D;
  naive.grid_h = c.grid_h, naive.grid_w = c.grid_w, naive.num_prefix_tokens = c.prefix;
  naive.scale = 1 / std::sqrt(c.D), naive.seed = 0x123456789abcdef0;
  naive.rpe_dropout = c.rpe_dropout, naive.attn_dropout = c.attn_dropout;
  Strided<T> q(c, N, gap, NAN), k(c, N, gap, NAN), v(c, N, gap, NAN), grad_out(c, N, gap, NAN);
  q.fill(naive.q, random, 1), k.fill(naive.k, random, 1), v.fill(naive.v, random, 1);
  grad_out.fill(naive.grad_out, random, 1);
  std::vector<Sum> alpha(c.H), center(2 * c.H);
  std::uniform_real_distribution<double> uniform(-1, 1);
  for (auto& x : alpha) naive.alpha.push_back(x = static_cast<Sum>(0.6 + 0.5 * uniform(random)));
  for (auto& x : center) naive.center.push_back(x = static_cast<Sum>(uniform(random)));
  naive.run();

  struct Result {
    Strided<T> out, grad_q, grad_k, grad_v;
    std::vector<Sum> stats, grad_alpha, grad_center;
    std::vector<double> grad_position;
  };
  auto run = [&](int threads) {
    Strided<T> fresh(c, N, gap, guard);
    Result r{fresh,
             fresh,
             fresh,
             fresh,
             std::vector<Sum>(2 * c.B * c.H * N, Sum(NAN)),
             std::vector<Sum>(c.H, Sum(NAN)),
             std::vector<Sum>(2 * c.H, Sum(NAN)),
             std::vector<double>(3 * c.B * c.H, NAN)};
    MhcaAttentionGradParams g{};
    MhcaAttentionParams& p = g.forward;
    p.dtype = Element<T>::dtype;
    p.B = c.B, p.H = c.H, p.N = N, p.D = c.D;
    p.grid_h = c.grid_h, p.grid_w = c.grid_w, p.num_prefix_tokens = c.prefix;
    p.q = q.data.data(), p.k = k.data.data(), p.v = v.data.data(), p.out = r.out.data.data();
    p.alpha = alpha.data(), p.center = center.data(), p.stats = r.stats.data();
    p.scale = naive.scale, p.rpe_dropout = c.rpe_dropout, p.attn_dropout = c.attn_dropout, p.seed = naive.seed;
    g.grad_out = grad_out.data.data();
    g.grad_q = r.grad_q.data.data(), g.grad_k = r.grad_k.data.data(), g.grad_v = r.grad_v.data.data();
    g.grad_position = r.grad_position.data();
    for (auto* stride : {&p.q_stride, &p.k_stride, &p.v_stride, &p.out_stride, &g.grad_out_stride, &g.grad_q_stride,
                         &g.grad_k_stride, &g.grad_v_stride}) {
      std::copy(q.stride, q.stride + 3, *stride);
    }
    on_threads(c.B * c.H, threads, [&](int64_t begin, int64_t end) { mhca_attention_forward(p, begin, end); });
    on_threads(c.B * c.H, threads, [&](int64_t begin, int64_t end) { mhca_attention_backward(g, begin, end); });
    mhca_attention_reduce_position(g, r.grad_alpha.data(), r.grad_center.data());
    return r;
  };

  Result one = run(1), three = run(3);
  std::ostringstream name;
  name << isa << " dtype " << int(Element<T>::dtype) << " B" << c.B << " H" << c.H << " N" << N << " D" << c.D
       << " prefix " << c.prefix << " dropout " << c.rpe_dropout << "/" << c.attn_dropout << " ";
  const double tolerance = 12 * Element<T>::unit + 64 * Element<T>::sum_unit;
  compare(name.str() + "out", one.out.values(), naive.out, tolerance);
  compare(name.str() + "stats", {one.stats.begin(), one.stats.end()}, naive.stats, 64 * Element<T>::sum_unit);
  compare(name.str() + "grad_q", one.grad_q.values(), naive.grad_q, tolerance);
  compare(name.str() + "grad_k", one.grad_k.values(), naive.grad_k, tolerance);
  compare(name.str() + "grad_v", one.grad_v.values(), naive.grad_v, tolerance);
  compare(name.str() + "grad_alpha", {one.grad_alpha.begin(), one.grad_alpha.end()}, naive.grad_alpha, tolerance,
          naive.grad_alpha_terms);
  compare(name.str() + "grad_center", {one.grad_center.begin(), one.grad_center.end()}, naive.grad_center, tolerance,
          naive.grad_center_terms);

  auto same = [](const auto& a, const auto& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
  };
  CHECK(same(one.out.data, three.out.data) && same(one.stats, three.stats), name.str(),
        "the split changed the forward");
  CHECK(same(one.grad_q.data, three.grad_q.data) && same(one.grad_k.data, three.grad_k.data) &&
            same(one.grad_v.data, three.grad_v.data) && same(one.grad_position, three.grad_position),
        name.str(), "the split changed the backward");
  for (Strided<T>* x : {&one.out, &one.grad_q, &one.grad_k, &one.grad_v}) {
    CHECK(x->gaps_untouched(gap, guard), name.str(), "something outside the tensor was written");
  }
}

int main() {
  const Case cases[] = {
      {1, 1, 1, 1, 0, 1, 0, 0},       {2, 3, 1, 1, 1, 8, 0, 0},      {3, 2, 7, 9, 0, 16, 0, 0},
      {2, 2, 8, 8, 1, 24, 0.1, 0},    {1, 2, 14, 14, 1, 16, 0, 0},   {1, 1, 14, 14, 1, 32, 0.1, 0.2},
      {1, 1, 16, 16, 1, 48, 0, 0.3},  {1, 2, 5, 3, 2, 64, 0.5, 0.5}, {1, 1, 4, 6, 5, 80, 0, 0},
      {1, 1, 6, 5, 1, 128, 0.1, 0},   {1, 2, 3, 4, 1, 7, 1, 0},      {1, 2, 3, 4, 1, 13, 0, 1},
      {1, 1, 33, 34, 1, 9, 0.1, 0.1}, {1, 1, 1, 1101, 0, 33, 0, 0},  {1, 2, 3, 4, 17, 3, 0, 0},
      {1, 1, 1, 2, 0, 200, 0, 0},
  };
  for (const std::string& isa : cpu_isas()) {
    CHECK(set_cpu_isa(isa) && cpu_isa() == isa);
    for (const Case& c : cases) {
      check_case<float>(c, isa), check_case<double>(c, isa), check_case<bfloat16>(c, isa), check_case<float16>(c, isa);
    }
    std::cout << isa << " done" << std::endl;
  }
  CHECK(!set_cpu_isa("nonsense"));
  return report();
}
