// head_token_attention on every instruction set against plain loops in double, on tensors that end where their memory
// ends: for sanitizers.
#include "../../kernels/cpu/head_token_attention.h"

#include <random>

#include "../../kernels/cpu/dispatch.h"
#include "naive_mhca.h"
#include "tensor.h"

using namespace fastib;

struct Case {
  int64_t B, H, N, T, D;
  double dropout;
};

// (B, H, n, D) laid out as (B, n, H, D), with a gap behind each row of heads.
template <typename E>
struct Rows : Tensor<E, 4> {
  Rows(const Case& c, int64_t n) : Tensor<E, 4>({c.B, c.H, std::max<int64_t>(n, 1), c.D}, {0, 2, 1, 3}, 2, 5) {}
  HeadTokenTensor view() { return {this->data.data(), {this->stride[0], this->stride[1], this->stride[2]}}; }
};

// The rows [first, first + n) of each (b, h) of a dense (B, H, tokens, D).
std::vector<double> part(const std::vector<double>& x, const Case& c, int64_t first, int64_t n) {
  std::vector<double> rows;
  for (int64_t pair = 0; pair < c.B * c.H; ++pair) {
    const double* at = x.data() + (pair * (c.N + c.T) + first) * c.D;
    rows.insert(rows.end(), at, at + n * c.D);
  }
  return rows;
}

template <typename E>
void check(Rows<E>& tensor, const std::vector<double>& exact, const std::string& where) {
  double largest = 1;
  for (double x : exact) largest = std::max(largest, std::fabs(x));
  const double size = largest * (64 + 12 * Element<E>::unit / Element<E>::sum_unit);
  if (!exact.empty()) compare(tensor, exact, std::vector<double>(exact.size(), size), where, 1);
}

template <typename E>
void check_case(const Case& c, const std::string& isa) {
  using Sum = typename Element<E>::Sum;
  const int64_t tokens = c.N + c.T;
  NaiveMhca naive{};
  naive.B = c.B, naive.H = c.H, naive.N = tokens, naive.D = c.D, naive.grid_w = 1, naive.num_prefix_tokens = tokens;
  naive.scale = 0.3, naive.attn_dropout = c.dropout, naive.seed = 77;
  naive.alpha.assign(c.H, 0), naive.center.assign(2 * c.H, 0);

  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  Rows<E> inputs[6] = {{c, c.N}, {c, c.N}, {c, c.N}, {c, c.T}, {c, c.T}, {c, c.T}}, grad_out(c, c.N);
  std::vector<double>* joined[] = {&naive.q, &naive.k, &naive.v};
  const auto fill = [&](Rows<E>& tensor, std::vector<double>& all, int64_t first, int64_t n) {
    all.resize(c.B * c.H * tokens * c.D);
    int64_t k = 0;
    if (n)
      tensor.each([&](E& e) {
        e = Element<E>::from(normal(random));
        all[(k / (n * c.D) * tokens + first) * c.D + k % (n * c.D)] = Element<E>::to(e), ++k;
      });
  };
  for (int i = 0; i < 3; ++i) fill(inputs[i], *joined[i], 0, c.N), fill(inputs[3 + i], *joined[i], c.N, c.T);
  fill(grad_out, naive.grad_out, 0, c.N);
  for (int64_t pair = 0; pair < c.B * c.H; ++pair)
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t d = 0; d < c.D; ++d)
        naive.grad_out[(pair * tokens + c.N + t) * c.D + d] = naive.grad_out[pair * tokens * c.D + d] / c.T;
  naive.run();
  std::vector<double> exact = part(naive.out, c, 0, c.N);
  for (int64_t pair = 0; pair < c.B * c.H; ++pair)
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t d = 0; d < c.D; ++d)
        exact[pair * c.N * c.D + d] += naive.out[(pair * tokens + c.N + t) * c.D + d] / c.T;

  Rows<E> out(c, c.N);
  Rows<E> grads[6] = {{c, c.N}, {c, c.N}, {c, c.N}, {c, c.T}, {c, c.T}, {c, c.T}};
  std::vector<Sum> stats(2 * c.B * c.H * tokens, Sum(NAN));
  HeadTokenAttentionGradParams g{};
  HeadTokenAttentionParams& p = g.forward;
  p.dtype = Element<E>::dtype, p.B = c.B, p.H = c.H, p.N = c.N, p.T = c.T, p.D = c.D;
  p.scale = naive.scale, p.attn_dropout = c.dropout, p.seed = naive.seed;
  p.inputs = {inputs[0].view(), inputs[1].view(), inputs[2].view(),
              inputs[3].view(), inputs[4].view(), inputs[5].view()};
  p.out = out.view(), p.stats = stats.data();
  g.grad_out = grad_out.view();
  g.grads = {grads[0].view(), grads[1].view(), grads[2].view(), grads[3].view(), grads[4].view(), grads[5].view()};
  head_token_attention_forward(p, 0, c.B * c.H);
  head_token_attention_backward(g, 0, c.B * c.H);

  const std::string where = isa + " dtype " + std::to_string(int(Element<E>::dtype)) + " N " + std::to_string(c.N) +
                            " T " + std::to_string(c.T) + " D " + std::to_string(c.D) + " ";
  check(out, exact, where + "out");
  const std::vector<double>* gradients[] = {&naive.grad_q, &naive.grad_k, &naive.grad_v};
  for (int i = 0; i < 3; ++i) {
    check(grads[i], part(*gradients[i], c, 0, c.N), where + "gradient " + std::to_string(i));
    check(grads[3 + i], part(*gradients[i], c, c.N, c.T), where + "gradient of extra " + std::to_string(i));
  }
}

int main() {
  const Case cases[] = {
      {2, 2, 65, 4, 48, 0},  {1, 2, 33, 6, 64, 0.3},  {1, 1, 1, 3, 8, 0},     {2, 1, 5, 0, 7, 0},
      {1, 2, 20, 60, 16, 0}, {1, 1, 1100, 5, 8, 0.2}, {1, 1, 3, 150, 8, 0.1},
  };
  for (const std::string& isa : cpu_isas()) {
    CHECK(set_cpu_isa(isa) && cpu_isa() == isa);
    for (const Case& c : cases) {
      check_case<float>(c, isa), check_case<double>(c, isa), check_case<bfloat16>(c, isa), check_case<float16>(c, isa);
    }
  }
  return report();
}
