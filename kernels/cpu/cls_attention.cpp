// Attention of the class token alone for one instruction set; see cls_attention.h.
//
// Floors of one pair: the forward reads N D elements of k and does 2 N D operations, the backward reads them again and
// writes as many: memory is the bound, so each key is touched once in each direction and nothing is packed.
#include "cls_attention.h"

#include <cmath>
#include <limits>
#include <new>

#include "pack.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

thread_local Scratch scratch;

constexpr double kLog2e = 1.4426950408889634;

// Dot products of q (D, padded with zeros to whole vectors) with lanes-many rows of k, a row in each lane.
template <typename E, typename T>
Vec<T> dots(const T* q, Rows<const E> k, int64_t D) {
  constexpr int W = kLanes<T>;
  Vec<T> sums[W];
  for (int l = 0; l < W; ++l) {
    const E* row = k.row(l);
    Vec<T> sum{};
    int64_t d = 0;
    for (; d + W <= D; d += W) sum += load(q + d) * load_row(row + d);
    T rest = 0;
    for (; d < D; ++d) rest += q[d] * load_float(row + d);
    sum[0] += rest;
    sums[l] = sum;
  }
  transpose<T>(sums);
  for (int half = W / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
  return sums[0];
}

// Scores in units of log 2 to probabilities; n is a whole number of vectors, padding holds -infinity.
template <typename T>
void softmax(T* s, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> best = splat(-std::numeric_limits<T>::infinity());
  for (int64_t j = 0; j < n; j += W) best = maximum<T>(best, load(s + j));
  const T top = horizontal_max<T>(best);
  Vec<T> sum{};
  for (int64_t j = 0; j < n; j += W) {
    const Vec<T> p = exp2_vec(load(s + j) - top);
    store(s + j, p);
    sum += p;
  }
  const T factor = 1 / horizontal_sum<T>(sum);
  for (int64_t j = 0; j < n; j += W) store(s + j, load(s + j) * factor);
}

template <typename E>
void forward(const ClsAttentionParams& p, int64_t begin, int64_t end) {
  using T = Compute<E>;
  constexpr int W = kLanes<T>;
  const int64_t width = round_to_lanes<T>(p.D), keys = p.N - p.first_key, padded = round_to_lanes<T>(keys);
  if (!scratch.reserve(Scratch::padded_bytes<T>(width) + Scratch::padded_bytes<T>(padded))) throw std::bad_alloc();
  T* q = scratch.take<T>(width);
  T* scores = scratch.take<T>(padded);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / p.H, h = u % p.H;
    const E* q_row = static_cast<const E*>(p.q) + b * p.q_stride[0] + h * p.q_stride[1];
    const Rows<const E> k{static_cast<const E*>(p.k) + b * p.k_stride[0] + h * p.k_stride[1], p.k_stride[2]};
    E* probs = static_cast<E*>(p.probs) + u * p.N;
    for (int64_t d = 0; d < width; ++d)
      q[d] = d < p.D ? load_float(q_row + d) * static_cast<T>(p.scale * kLog2e) : T(0);
    int64_t j = 0;
    for (; j + W <= keys; j += W) store(scores + j, dots<E, T>(q, k.from(p.first_key + j), p.D));
    for (; j < keys; ++j) {
      const E* row = k.row(p.first_key + j);
      T sum = 0;
      for (int64_t d = 0; d < p.D; ++d) sum += q[d] * load_float(row + d);
      scores[j] = sum;
    }
    for (; j < padded; ++j) scores[j] = -std::numeric_limits<T>::infinity();
    softmax(scores, padded);
    for (int64_t i = 0; i < p.first_key; ++i) store_float(probs + i, T(0));
    unpack_rows(Rows<E>{probs + p.first_key, 0}, scores, padded, 1, keys, T(1));
  }
}

// kVecs vectors of columns: grad_q = sum of ds_j k_j, and grad_k_j = ds_j q.
template <int kVecs, typename E, typename T>
void gradient_columns(const T* ds, const T* q, Rows<const E> k, T* grad_q, Rows<E> grad_k, int64_t N) {
  constexpr int W = kLanes<T>;
  Vec<T> query[kVecs], sum[kVecs] = {};
  for (int v = 0; v < kVecs; ++v) query[v] = load(q + v * W);
  for (int64_t j = 0; j < N; ++j) {
    const E* key = k.row(j);
    E* grad_key = grad_k.row(j);
    for (int v = 0; v < kVecs; ++v) {
      sum[v] += ds[j] * load_row(key + v * W);
      store_row(grad_key + v * W, ds[j] * query[v]);
    }
  }
  for (int v = 0; v < kVecs; ++v) store(grad_q + v * W, sum[v]);
}

template <typename E>
void backward(const ClsAttentionGradParams& g, int64_t begin, int64_t end) {
  using T = Compute<E>;
  constexpr int W = kLanes<T>;
  const ClsAttentionParams& p = g.forward;
  const int64_t width = round_to_lanes<T>(p.D);
  if (!scratch.reserve(2 * Scratch::padded_bytes<T>(width) + Scratch::padded_bytes<T>(p.N))) throw std::bad_alloc();
  T* q = scratch.take<T>(width);
  T* grad_q = scratch.take<T>(width);
  T* ds = scratch.take<T>(p.N);
  for (int64_t u = begin; u < end; ++u) {
    const int64_t b = u / p.H, h = u % p.H;
    const E* q_row = static_cast<const E*>(p.q) + b * p.q_stride[0] + h * p.q_stride[1];
    const Rows<const E> k{static_cast<const E*>(p.k) + b * p.k_stride[0] + h * p.k_stride[1], p.k_stride[2]};
    const Rows<E> grad_k{static_cast<E*>(g.grad_k) + b * g.grad_k_stride[0] + h * g.grad_k_stride[1],
                         g.grad_k_stride[2]};
    const E* probs = static_cast<const E*>(p.probs) + u * p.N;
    const E* grad = static_cast<const E*>(g.grad) + u * p.N;
    pack_rows(q, width, Rows<const E>{q_row, 0}, 1, p.D);
    const T delta = dot(probs, grad, p.N);
    for (int64_t j = 0; j < p.N; ++j)
      ds[j] = load_float(probs + j) * (load_float(grad + j) - delta) * static_cast<T>(p.scale);
    int64_t d = 0;
    for (; d + 4 * W <= p.D; d += 4 * W)
      gradient_columns<4>(ds, q + d, Rows<const E>{k.p + d, k.stride}, grad_q + d, Rows<E>{grad_k.p + d, grad_k.stride},
                          p.N);
    for (; d + W <= p.D; d += W)
      gradient_columns<1>(ds, q + d, Rows<const E>{k.p + d, k.stride}, grad_q + d, Rows<E>{grad_k.p + d, grad_k.stride},
                          p.N);
    for (; d < p.D; ++d) {
      T sum = 0;
      for (int64_t j = 0; j < p.N; ++j) {
        sum += ds[j] * load_float(k.row(j) + d);
        store_float(grad_k.row(j) + d, ds[j] * q[d]);
      }
      grad_q[d] = sum;
    }
    E* grad_q_row = static_cast<E*>(g.grad_q) + b * g.grad_q_stride[0] + h * g.grad_q_stride[1];
    unpack_rows(Rows<E>{grad_q_row, 0}, grad_q, width, 1, p.D, T(1));
  }
}

}  // namespace

void cls_attention_forward(const ClsAttentionParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::float32:
      return forward<float>(p, begin, end);
    case DType::bfloat16:
      return forward<bfloat16>(p, begin, end);
    case DType::float16:
      return forward<float16>(p, begin, end);
    case DType::float64:
      return forward<double>(p, begin, end);
  }
}

void cls_attention_backward(const ClsAttentionGradParams& g, int64_t begin, int64_t end) {
  switch (g.forward.dtype) {
    case DType::float32:
      return backward<float>(g, begin, end);
    case DType::bfloat16:
      return backward<bfloat16>(g, begin, end);
    case DType::float16:
      return backward<float16>(g, begin, end);
    case DType::float64:
      return backward<double>(g, begin, end);
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
