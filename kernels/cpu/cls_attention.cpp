// Attention of the class token alone for one instruction set; see cls_attention.h.
//
// Floors of one image: the forward reads the H N D elements of k, the backward reads them again and writes as many:
// memory is the bound. So k is read from front to back, a block of tokens through all heads where the heads of a token
// are neighbours, as in views of a packed qkv, and the lines of the blocks behind are asked for while this one is
// worked on.
#include "cls_attention.h"

#include <cmath>
#include <limits>
#include <new>

#include "stream.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

thread_local Scratch scratch;

constexpr int64_t kTokens = 8;  // of a block of the backward

// Asks for the cache lines of `bytes` that lie `ahead` bytes behind p; they need not exist. They go to the second
// cache: a block of tokens in all heads and the next one would push each other out of the first.
inline void prefetch(const void* p, int64_t ahead, int64_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(ahead);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(at + i), 0, 2);
}

// The heads of one unit.
struct Unit {
  int64_t b, first, heads;
  Unit(const ClsAttentionParams& p, int64_t u) : b(u / p.groups) {
    const int64_t group = u % p.groups;
    first = group * p.H / p.groups;
    heads = (group + 1) * p.H / p.groups - first;
  }
};

// One head's query (D) times a factor, in the order of load_two, and back.
template <typename E, typename T>
void pack_query(T* dst, const E* row, int64_t D, T factor) {
  constexpr int W = kLanes<T>;
  int64_t d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    Vec<T> a, b;
    load_two(row + d, a, b);
    store(dst + d, a * factor), store(dst + d + W, b * factor);
  }
  for (; d < D; ++d) dst[d] = load_float(row + d) * factor;
}

template <typename E, typename T>
void unpack_query(E* row, const T* src, int64_t D) {
  constexpr int W = kLanes<T>;
  int64_t d = 0;
  for (; d + 2 * W <= D; d += 2 * W) store_two(row + d, load(src + d), load(src + d + W));
  for (; d < D; ++d) store_float(row + d, src[d]);
}

// Adds to sums[l] the products of kVecs vectors of columns of row l, and prefetches those `ahead` bytes on.
template <int kVecs, int kRows, typename E, typename T>
inline __attribute__((always_inline)) void dot_columns(const T* q, const E* row, int64_t stride, int64_t ahead,
                                                       Vec<T> (&sums)[kRows]) {
  constexpr int W = kLanes<T>;
  Vec<T> query[kVecs];
  for (int v = 0; v < kVecs; ++v) query[v] = load(q + v * W);
#pragma GCC unroll 16
  for (int l = 0; l < kRows; ++l, row += stride) {
    asm("" : "+r"(row));  // one address at a time: the compiler would keep all of them, and load them from the stack
    prefetch(row, ahead, kVecs * W * sizeof(E));
    if constexpr (kVecs == 1) {
      sums[l] += query[0] * load_row(row);
    } else {
      Vec<T> even = sums[l], odd{};
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; v += 2) {
        Vec<T> a, b;
        load_two(row + v * W, a, b);
        even += query[v] * a;
        odd += query[v + 1] * b;
      }
      sums[l] = even + odd;
    }
  }
}

// Dot products of a packed query with kRows rows of k, to `to`.
template <int kRows, typename E, typename T>
void dots(T* to, const T* q, const E* k, int64_t stride, int64_t D, int64_t ahead) {
  constexpr int W = kLanes<T>;
  Vec<T> sums[kRows] = {};
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W) dot_columns<4>(q + d, k + d, stride, ahead, sums);
  for (; d + 2 * W <= D; d += 2 * W) dot_columns<2>(q + d, k + d, stride, ahead, sums);
  for (; d + W <= D; d += W) dot_columns<1>(q + d, k + d, stride, ahead, sums);
  for (; d < D; ++d)
    for (int l = 0; l < kRows; ++l) sums[l][0] += q[d] * load_float(k + l * stride + d);
  if constexpr (kRows == 1)
    *to = horizontal_sum<T>(sums[0]);
  else
    store(to, sum_each<T>(sums));
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
  const int64_t from = p.maps_only ? p.prefix : 0, cut = from > p.first_key ? from - p.first_key : 0;
  if (!scratch.reserve(Scratch::padded_bytes<T>(p.H * width) + Scratch::padded_bytes<T>(p.H * padded)))
    throw std::bad_alloc();
  T* q = scratch.take<T>(p.H * width);
  T* scores = scratch.take<T>(p.H * padded);
  const int64_t stride = p.k_stride[2], ahead = W * stride * static_cast<int64_t>(sizeof(E));
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit(p, u);
    const E* q_rows = static_cast<const E*>(p.q) + unit.b * p.q_stride[0] + unit.first * p.q_stride[1];
    const E* k = static_cast<const E*>(p.k) + unit.b * p.k_stride[0] + unit.first * p.k_stride[1];
    for (int64_t h = 0; h < unit.heads; ++h)
      pack_query(q + h * width, q_rows + h * p.q_stride[1], p.D, static_cast<T>(p.scale * kLog2e));
    const auto block = [&](int64_t h, int64_t j) {
      const E* rows = k + h * p.k_stride[1] + (p.first_key + j) * stride;
      T* to = scores + h * padded + j;
      if (j + W <= keys)
        dots<W>(to, q + h * width, rows, stride, p.D, ahead);
      else
        for (int64_t l = 0; j + l < keys; ++l) dots<1>(to + l, q + h * width, rows + l * stride, stride, p.D, ahead);
    };
    if (p.k_stride[1] > stride)  // each head's keys lie together
      for (int64_t h = 0; h < unit.heads; ++h)
        for (int64_t j = 0; j < keys; j += W) block(h, j);
    else
      for (int64_t j = 0; j < keys; j += W)
        for (int64_t h = 0; h < unit.heads; ++h) block(h, j);
    for (int64_t h = 0; h < unit.heads; ++h) {
      T* s = scores + h * padded;
      for (int64_t j = keys; j < padded; ++j) s[j] = -std::numeric_limits<T>::infinity();
      softmax(s, padded);
      const auto write = [&]<typename P>(P* probs) {
        probs += (unit.b * p.H + unit.first + h) * (p.N - from);
        for (int64_t i = from; i < p.first_key; ++i) store_float(probs++, T(0));
        unpack_rows(Rows<P>{probs, 0}, s + cut, padded, 1, keys - cut, T(1));
      };
      p.maps_only ? write(static_cast<E*>(p.probs)) : write(static_cast<T*>(p.probs));
    }
  }
}

// kVecs vectors of columns of n tokens: grad_q += sum of ds_j k_j, and grad_k_j = ds_j q.
template <int kVecs, bool kStream, typename E, typename T>
void gradient_columns(const T* ds, const T* q, Rows<const E> k, T* grad_q, Rows<E> grad_k, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> query[kVecs], sum[kVecs];
  for (int v = 0; v < kVecs; ++v) query[v] = load(q + v * W), sum[v] = load(grad_q + v * W);
  for (int64_t j = 0; j < n; ++j) {
    const E* key = k.row(j);
    E* grad_key = grad_k.row(j);
    if constexpr (kVecs == 1) {
      sum[0] += ds[j] * load_row(key);
      store_row(grad_key, ds[j] * query[0]);
    } else {
      for (int v = 0; v < kVecs; v += 2) {
        Vec<T> a, b;
        load_two(key + v * W, a, b);
        sum[v] += ds[j] * a, sum[v + 1] += ds[j] * b;
        if constexpr (kStream)
          stream_two(grad_key + v * W, ds[j] * query[v], ds[j] * query[v + 1]);
        else
          store_two(grad_key + v * W, ds[j] * query[v], ds[j] * query[v + 1]);
      }
    }
  }
  for (int v = 0; v < kVecs; ++v) store(grad_q + v * W, sum[v]);
}

// The same for all columns of one head. kStream: past the caches.
template <bool kStream, typename E, typename T>
void gradients(const T* ds, const T* q, Rows<const E> k, T* grad_q, Rows<E> grad_k, int64_t n, int64_t D) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < n; ++j)
    prefetch(k.row(j), kTokens * k.stride * static_cast<int64_t>(sizeof(E)), D * sizeof(E));
  const auto keys = [&](int64_t d) { return Rows<const E>{k.p + d, k.stride}; };
  const auto to = [&](int64_t d) { return Rows<E>{grad_k.p + d, grad_k.stride}; };
  int64_t d = 0;
  for (; d + 4 * W <= D; d += 4 * W) gradient_columns<4, kStream>(ds, q + d, keys(d), grad_q + d, to(d), n);
  for (; d + 2 * W <= D; d += 2 * W) gradient_columns<2, kStream>(ds, q + d, keys(d), grad_q + d, to(d), n);
  for (; d + W <= D; d += W) gradient_columns<1, false>(ds, q + d, keys(d), grad_q + d, to(d), n);
  for (; d < D; ++d)
    for (int64_t j = 0; j < n; ++j) {
      grad_q[d] += ds[j] * load_float(k.row(j) + d);
      store_float(grad_k.row(j) + d, ds[j] * q[d]);
    }
}

// Whether grad_k exceeds the caches and consists of whole vectors.
template <typename E>
bool streams(const ClsAttentionGradParams& g) {
  const ClsAttentionParams& p = g.forward;
  const int64_t size = sizeof(E), bytes = p.B * p.H * p.N * p.D * size;
  uint64_t places = reinterpret_cast<uintptr_t>(g.grad_k) | p.D * size;
  for (int64_t stride : g.grad_k_stride) places |= stride * size;
  return kStreamed<E> && bytes >= kStreamedBytes && places % kVectorBytes == 0 && p.D % (2 * kLanes<Compute<E>>) == 0;
}

template <bool kStream, typename E>
void backward(const ClsAttentionGradParams& g, int64_t begin, int64_t end) {
  using T = Compute<E>;
  const ClsAttentionParams& p = g.forward;
  const int64_t width = round_to_lanes<T>(p.D), from = p.N - g.columns;
  if (!scratch.reserve(2 * Scratch::padded_bytes<T>(p.H * width) + Scratch::padded_bytes<T>(p.H * p.N)))
    throw std::bad_alloc();
  T* q = scratch.take<T>(p.H * width);
  T* grad_q = scratch.take<T>(p.H * width);
  T* ds = scratch.take<T>(p.H * p.N);
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit(p, u);
    const E* q_rows = static_cast<const E*>(p.q) + unit.b * p.q_stride[0] + unit.first * p.q_stride[1];
    const E* k = static_cast<const E*>(p.k) + unit.b * p.k_stride[0] + unit.first * p.k_stride[1];
    E* grad_k = static_cast<E*>(g.grad_k) + unit.b * g.grad_k_stride[0] + unit.first * g.grad_k_stride[1];
    E* grad_q_rows = static_cast<E*>(g.grad_q) + unit.b * g.grad_q_stride[0] + unit.first * g.grad_q_stride[1];
    for (int64_t h = 0; h < unit.heads; ++h) {
      const int64_t row = (unit.b * p.H + unit.first + h) * p.N;
      const T* probs = static_cast<const T*>(p.probs) + row;
      const T* grad = static_cast<const T*>(g.grad) + (unit.b * p.H + unit.first + h) * g.columns;
      const T delta = dot(probs + from, grad, g.columns), scale = static_cast<T>(p.scale);
      for (int64_t j = 0; j < from; ++j) ds[h * p.N + j] = probs[j] * -delta * scale;
      for (int64_t j = from; j < p.N; ++j) ds[h * p.N + j] = probs[j] * (grad[j - from] - delta) * scale;
      pack_query(q + h * width, q_rows + h * p.q_stride[1], p.D, T(1));
    }
    for (int64_t i = 0; i < unit.heads * width; ++i) grad_q[i] = 0;
    for (int64_t j = 0; j < p.N; j += kTokens)
      for (int64_t h = 0; h < unit.heads; ++h) {
        const Rows<const E> keys{k + h * p.k_stride[1] + j * p.k_stride[2], p.k_stride[2]};
        const Rows<E> to{grad_k + h * g.grad_k_stride[1] + j * g.grad_k_stride[2], g.grad_k_stride[2]};
        gradients<kStream, E, T>(ds + h * p.N + j, q + h * width, keys, grad_q + h * width, to,
                                 smaller(kTokens, p.N - j), p.D);
      }
    for (int64_t h = 0; h < unit.heads; ++h)
      unpack_query(grad_q_rows + h * g.grad_q_stride[1], grad_q + h * width, p.D);
  }
  if constexpr (kStream) end_stream();
}

template <typename E>
void backward(const ClsAttentionGradParams& g, int64_t begin, int64_t end) {
  return streams<E>(g) ? backward<kStreamed<E>, E>(g, begin, end) : backward<false, E>(g, begin, end);
}

}  // namespace

void cls_attention_forward(const ClsAttentionParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { forward<decltype(element)>(p, begin, end); });
}

void cls_attention_backward(const ClsAttentionGradParams& g, int64_t begin, int64_t end) {
  with_element(g.forward.dtype, [&](auto element) { backward<decltype(element)>(g, begin, end); });
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
