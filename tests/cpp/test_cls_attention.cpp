// The class token's attention on every instruction set of this machine, against plain loops in double: tensors that end
// where their memory ends, heads before and behind tokens, any grouping of the heads, any split of the work, threads.
#include <algorithm>
#include <random>
#include <string>
#include <thread>

#include "../../kernels/cpu/cls_attention.h"
#include "../../kernels/cpu/dispatch.h"
#include "check.h"
#include "tensor.h"

using namespace fastib;

struct Case {
  int64_t B, H, N, D, first_key;
  bool heads_last;
  int64_t gap;  // elements left out after each row of k and of its gradient

  int64_t prefix() const { return std::min<int64_t>(2, N - 1); }  // of the maps, and of keys whose grad is not given
};

template <typename E>
Tensor<E, 4> keys(const Case& c) {
  const int64_t shape[] = {c.B, c.H, c.N, c.D};
  const int heads_first[] = {0, 1, 2, 3}, heads_last[] = {0, 2, 1, 3};
  return {shape, c.heads_last ? heads_last : heads_first, 3, c.gap};
}

template <typename E, size_t n>
Tensor<E, n> dense(const int64_t (&shape)[n]) {
  int order[n];
  for (size_t k = 0; k < n; ++k) order[k] = static_cast<int>(k);
  return {shape, order, n - 1, 0};
}

template <typename E>
struct Problem {
  using Wide = std::conditional_t<std::is_same_v<E, double>, double, float>;
  const Case& c;
  Tensor<E, 3> q, grad_q, maps;
  Tensor<Wide, 3> probs, grad;
  Tensor<E, 4> k, grad_k;
  std::vector<double> qs, ks, gs;
  double scale = 0.3;

  explicit Problem(const Case& c)
      : c(c),
        q(dense<E, 3>({c.B, c.H, c.D})),
        grad_q(q),
        maps(dense<E, 3>({c.B, c.H, c.N - c.prefix()})),
        probs(dense<Wide, 3>({c.B, c.H, c.N})),
        grad(dense<Wide, 3>({c.B, c.H, c.N - c.prefix()})),
        k(keys<E>(c)),
        grad_k(k) {
    std::mt19937 random(static_cast<unsigned>(c.N * 31 + c.D));
    std::normal_distribution<double> normal;
    const auto draw = [&](std::vector<double>& values) {
      return [&]<typename T>(T& e) { e = Element<T>::from(normal(random)), values.push_back(Element<T>::to(e)); };
    };
    q.each(draw(qs)), k.each(draw(ks)), grad.each(draw(gs));
    for (int64_t row = 0; row < c.B * c.H; ++row) gs.insert(gs.begin() + row * c.N, c.prefix(), 0.0);
  }

  ClsAttentionGradParams params(int64_t groups) {
    ClsAttentionGradParams g{};
    ClsAttentionParams& p = g.forward;
    p.dtype = Element<E>::dtype, p.B = c.B, p.H = c.H, p.N = c.N, p.D = c.D, p.groups = groups;
    p.first_key = c.first_key, p.prefix = c.prefix(), p.scale = scale;
    g.columns = c.N - c.prefix();
    p.q = q.data.data(), p.k = k.data.data(), p.probs = probs.data.data();
    g.grad = grad.data.data(), g.grad_q = grad_q.data.data(), g.grad_k = grad_k.data.data();
    std::copy_n(q.stride, 2, p.q_stride), std::copy_n(k.stride, 3, p.k_stride);
    std::copy_n(grad_q.stride, 2, g.grad_q_stride), std::copy_n(grad_k.stride, 3, g.grad_k_stride);
    return g;
  }

  void clear() {
    probs.data.assign(probs.data.size(), Element<Wide>::from(kGuard));
    for (auto* data : {&grad_q.data, &grad_k.data, &maps.data}) data->assign(data->size(), Element<E>::from(kGuard));
  }

  // The gradients are those of the probabilities as they are stored.
  void check(const std::string& where) {
    std::vector<double> exact, size, cut, cut_size, stored, exact_q(qs.size()), size_q(qs.size()), exact_k(ks.size()),
        size_k(ks.size());
    probs.each([&](Wide& e) { stored.push_back(e); });
    for (int64_t row = 0; row < c.B * c.H; ++row) {
      const double *query = &qs[row * c.D], *key = &ks[row * c.N * c.D];
      std::vector<double> s(c.N), terms(c.N);
      double top = -INFINITY, sum = 0, largest = 1, delta = 0, delta_size = 0;
      for (int64_t j = 0; j < c.N; ++j) {
        for (int64_t d = 0; d < c.D; ++d) {
          s[j] += scale * query[d] * key[j * c.D + d], terms[j] += std::fabs(scale * query[d] * key[j * c.D + d]);
        }
        if (j < c.first_key) continue;
        top = std::max(top, s[j]), largest = std::max(largest, terms[j]);
      }
      for (int64_t j = c.first_key; j < c.N; ++j) sum += std::exp(s[j] - top);
      for (int64_t j = 0; j < c.N; ++j) {
        exact.push_back(j < c.first_key ? 0 : std::exp(s[j] - top) / sum), size.push_back(largest * exact.back());
        if (j >= c.prefix()) cut.push_back(exact.back()), cut_size.push_back(size.back());
        const double term = stored[row * c.N + j] * gs[row * c.N + j];
        delta += term, delta_size += std::fabs(term);
      }
      for (int64_t j = 0; j < c.N; ++j) {
        const double p = stored[row * c.N + j] * scale, g = gs[row * c.N + j];
        const double ds = p * (g - delta), ds_size = p * (std::fabs(g) + delta_size);
        for (int64_t d = 0; d < c.D; ++d) {
          const int64_t at = (row * c.N + j) * c.D + d;
          exact_k[at] = ds * query[d], size_k[at] = ds_size * std::fabs(query[d]);
          exact_q[row * c.D + d] += ds * ks[at], size_q[row * c.D + d] += ds_size * std::fabs(ks[at]);
        }
      }
    }
    compare(probs, exact, size, where + " probs");
    compare(maps, cut, cut_size, where + " maps");
    compare(grad_q, exact_q, size_q, where + " grad_q");
    compare(grad_k, exact_k, size_k, where + " grad_k");
  }
};

template <typename E>
void run(const Case& c) {
  Problem<E> problem(c);
  const std::string name = "H" + std::to_string(c.H) + " N" + std::to_string(c.N) + " D" + std::to_string(c.D) +
                           (c.heads_last ? " heads last" : "") + " gap " + std::to_string(c.gap) + " dtype " +
                           std::to_string(static_cast<int>(Element<E>::dtype));
  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    problem.clear();
    const ClsAttentionGradParams whole = problem.params(1);
    cls_attention_forward(whole.forward, 0, c.B);
    cls_attention_backward(whole, 0, c.B);
    ClsAttentionParams maps = whole.forward;
    maps.maps_only = true, maps.probs = problem.maps.data.data();
    cls_attention_forward(maps, 0, c.B);
    problem.check(isa + " " + name);
    const auto probs = problem.probs.data, grad_q = problem.grad_q.data, grad_k = problem.grad_k.data;
    for (int64_t groups : {c.H, (c.H + 1) / 2}) {
      problem.clear();
      const ClsAttentionGradParams g = problem.params(groups);
      std::vector<std::thread> threads;
      for (int64_t unit = 0; unit < c.B * groups; ++unit)
        threads.emplace_back([&g, unit] {
          cls_attention_forward(g.forward, unit, unit + 1);
          cls_attention_backward(g, unit, unit + 1);
        });
      for (std::thread& thread : threads) thread.join();
      CHECK(same(probs, problem.probs.data) && same(grad_q, problem.grad_q.data) && same(grad_k, problem.grad_k.data),
            isa, " ", name, " depends on the split");
    }
  }
}

int main() {
  const Case cases[] = {
      {2, 6, 17, 64, 1, true, 0}, {1, 3, 65, 24, 0, true, 5}, {1, 5, 37, 80, 2, true, 64},
      {2, 1, 9, 1, 1, true, 0},   {1, 2, 1, 16, 0, true, 0},  {1, 4, 40, 33, 3, true, 1},
      {1, 7, 16, 48, 0, true, 0}, {1, 2, 5, 128, 4, true, 0}, {1, 3, 130, 37, 1, true, 27},
  };
  for (Case c : cases)
    for (bool last : {true, false}) {
      c.heads_last = last;
      run<float>(c), run<double>(c), run<bfloat16>(c), run<float16>(c);
    }
  // Large enough to be written past the caches.
  run<float>({2, 6, 2100, 64, 1, true, 0}), run<bfloat16>({2, 6, 2100, 128, 1, true, 0});
  return report();
}
