// The attention links' loss and its gradients on every instruction set of this machine, against plain loops in double:
// tensors that end where their memory ends, masks, odd sizes, any split of the work, threads.
#include <algorithm>
#include <random>
#include <string>
#include <thread>

#include "../../kernels/cpu/attention_link.h"
#include "../../kernels/cpu/dispatch.h"
#include "check.h"
#include "tensor.h"

using namespace fastib;

struct Case {
  int64_t B, M, C, S, chunks, gap;
  bool masked, scaled;
};

template <typename E, size_t n>
Tensor<E, n> rows(const int64_t (&shape)[n], int64_t gap = 0) {
  int order[n];
  for (size_t k = 0; k < n; ++k) order[k] = static_cast<int>(k);
  return {shape, order, n - 1, gap};
}

template <typename E>
struct Problem {
  using T = typename Element<E>::Sum;
  const Case& c;
  Tensor<E, 3> attn, target, grad_attn;
  Tensor<T, 2> weight, loss, scale, grad_weight;
  Tensor<T, 1> bias, grad_bias;
  Tensor<T, 3> weight_parts;
  Tensor<T, 2> bias_parts;
  std::vector<uint8_t> mask;
  std::vector<double> as, ts, ws, bs, scales;

  explicit Problem(const Case& c)
      : c(c),
        attn(rows<E, 3>({c.B, c.M, c.S}, c.gap)),
        target(rows<E, 3>({c.B, c.C, c.S}, c.gap)),
        grad_attn(rows<E, 3>({c.B, c.M, c.S})),
        weight(rows<T, 2>({c.C, c.M})),
        loss(rows<T, 2>({c.B, c.C})),
        scale(loss),
        grad_weight(weight),
        bias(rows<T, 1>({c.C})),
        grad_bias(bias),
        weight_parts(rows<T, 3>({c.chunks, c.C, c.M})),
        bias_parts(rows<T, 2>({c.chunks, c.C})) {
    std::mt19937 random(static_cast<unsigned>(c.M * 31 + c.S));
    std::normal_distribution<double> normal;
    const auto draw = [&](std::vector<double>& values, bool rounded = false) {
      return [&values, &normal, &random, rounded](auto& e) {
        using X = std::remove_reference_t<decltype(e)>;
        e = Element<X>::from(normal(random));
        if (rounded) e = Element<X>::from(Element<E>::to(Element<E>::from(Element<X>::to(e))));
        values.push_back(Element<X>::to(e));
      };
    };
    attn.each(draw(as)), target.each(draw(ts)), bias.each(draw(bs)), scale.each(draw(scales));
    weight.each(draw(ws, true));  // the kernel rounds weights to the type of attn
    for (int64_t i = 0; i < c.C * c.M; ++i) mask.push_back(!c.masked || random() % 3 == 0);
    if (c.masked) std::fill_n(mask.begin(), c.M, 0);
  }

  AttentionLinkParams params(bool gradients) {
    AttentionLinkParams p{};
    p.dtype = Element<E>::dtype, p.B = c.B, p.M = c.M, p.C = c.C, p.S = c.S, p.chunks = c.chunks, p.eps = 1e-12;
    p.attn = attn.data.data(), p.target = target.data.data();
    std::copy_n(attn.stride, 2, p.attn_stride), std::copy_n(target.stride, 2, p.target_stride);
    p.weight = weight.data.data(), p.bias = bias.data.data(), p.mask = c.masked ? mask.data() : nullptr;
    p.loss = loss.data.data(), p.gradients = gradients, p.scale = c.scaled ? scale.data.data() : nullptr;
    p.grad_attn = grad_attn.data.data();
    p.weight_parts = weight_parts.data.data(), p.bias_parts = bias_parts.data.data();
    return p;
  }

  void reduce(const AttentionLinkParams& p) {
    attention_link_reduce(p, grad_weight.data.data(), grad_bias.data.data());
  }

  void clear() {
    grad_attn.data.assign(grad_attn.data.size(), Element<E>::from(kGuard));
    for (auto* data : {&loss.data, &weight_parts.data, &bias_parts.data, &grad_weight.data, &grad_bias.data})
      data->assign(data->size(), Element<T>::from(kGuard));
  }

  void check(const std::string& where, bool gradients) {
    std::vector<double> losses, loss_size, exact_a(as.size()), size_a(as.size()), exact_w(ws.size()), size_w(ws.size());
    std::vector<double> exact_b(bs.size()), size_b(bs.size()), a(c.S), g(c.S), g_size(c.S);
    for (int64_t b = 0; b < c.B; ++b)
      for (int64_t ch = 0; ch < c.C; ++ch) {
        const double* t = &ts[(b * c.C + ch) * c.S];
        double a_square = 0, t_square = 0, along = 0, sum = 0, terms = 0;
        for (int64_t s = 0; s < c.S; ++s) {
          a[s] = bs[ch];
          double size = std::fabs(a[s]);
          for (int64_t m = 0; m < c.M; ++m) {
            if (!mask[ch * c.M + m]) continue;
            const double term = ws[ch * c.M + m] * as[(b * c.M + m) * c.S + s];
            a[s] += term, size += std::fabs(term);
          }
          a_square += a[s] * a[s], t_square += t[s] * t[s], terms += size * size;
        }
        const double a_norm = std::sqrt(a_square), t_norm = std::sqrt(t_square);
        const double relative = std::sqrt(terms) / a_norm;  // what a rounding of the terms does to the unit map
        for (int64_t s = 0; s < c.S; ++s) {
          const double d = a[s] / a_norm - t[s] / t_norm;
          sum += d * d, along += d * a[s] / a_norm;
        }
        losses.push_back(sum), loss_size.push_back((sum + 2) * relative);
        const double factor = 2 * (c.scaled ? scales[b * c.C + ch] : 1) / a_norm;
        for (int64_t s = 0; s < c.S; ++s) {
          g[s] = factor * (a[s] / a_norm - t[s] / t_norm - along * a[s] / a_norm);
          g_size[s] = std::fabs(factor) * (std::fabs(a[s] / a_norm) + std::fabs(t[s] / t_norm) + 1) * relative;
          exact_b[ch] += g[s], size_b[ch] += g_size[s];
          for (int64_t m = 0; m < c.M; ++m) {
            if (!mask[ch * c.M + m]) continue;
            const int64_t at = (b * c.M + m) * c.S + s;
            exact_a[at] += g[s] * ws[ch * c.M + m], size_a[at] += g_size[s] * std::fabs(ws[ch * c.M + m]);
            exact_w[ch * c.M + m] += g[s] * as[at], size_w[ch * c.M + m] += g_size[s] * std::fabs(as[at]);
          }
        }
      }
    compare(loss, losses, loss_size, where + " loss");
    if (!gradients) return;
    // Processors that multiply bfloat16 are given the gradient to a rounded to it.
    const double steps = Element<E>::dtype == DType::bfloat16 ? 0x1p16 : 200;
    compare(grad_attn, exact_a, size_a, where + " grad_attn", steps);
    compare(grad_weight, exact_w, size_w, where + " grad_weight", steps);
    compare(grad_bias, exact_b, size_b, where + " grad_bias", steps);
  }
};

template <typename E>
void run(const Case& c) {
  Problem<E> problem(c);
  const std::string name = "M" + std::to_string(c.M) + " C" + std::to_string(c.C) + " S" + std::to_string(c.S) +
                           (c.masked ? " masked" : "") + " dtype " +
                           std::to_string(static_cast<int>(Element<E>::dtype));
  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    problem.clear();
    attention_link(problem.params(false), 0, c.chunks);
    problem.check(isa + " " + name + " forward", false);
    problem.clear();
    const AttentionLinkParams p = problem.params(true);
    attention_link(p, 0, c.chunks);
    problem.reduce(p);
    problem.check(isa + " " + name, true);
    const auto loss = problem.loss.data, weight = problem.grad_weight.data, bias = problem.grad_bias.data;
    const auto attn = problem.grad_attn.data;
    problem.clear();
    std::vector<std::thread> threads;
    for (int64_t chunk = 0; chunk < c.chunks; ++chunk)
      threads.emplace_back([&p, chunk] { attention_link(p, chunk, chunk + 1); });
    for (std::thread& thread : threads) thread.join();
    problem.reduce(p);
    CHECK(same(loss, problem.loss.data) && same(weight, problem.grad_weight.data) &&
              same(bias, problem.grad_bias.data) && same(attn, problem.grad_attn.data),
          isa, " ", name, " depends on the split");
  }
}

int main() {
  const Case cases[] = {
      {3, 7, 33, 19, 2, 0, false, false}, {2, 72, 40, 49, 1, 3, false, true}, {2, 5, 70, 16, 2, 0, true, false},
      {1, 1, 1, 3, 1, 0, false, true},    {5, 18, 31, 65, 3, 1, true, true},  {1, 24, 64, 196, 1, 0, true, false},
  };
  for (const Case& c : cases) run<float>(c), run<double>(c), run<bfloat16>(c), run<float16>(c);
  return report();
}
