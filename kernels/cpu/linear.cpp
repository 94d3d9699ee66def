// The products of a linear layer for one instruction set; see linear.h.
//
// Floor: 2 K N operations a row. A few rows of the left operand are copied and stay in the first cache, while the
// packed right one comes from the second, panel by panel; what the next tile reads and this one writes is asked for
// between the panels. No row is waited for, whatever the rows' strides.
#include "linear.h"

#include <new>

#include "gemm_tile.h"
#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

constexpr int W = kLanes<float>;
constexpr int kVecs = 2;                                // of a panel
constexpr int kRows = kVectorRegisters == 32 ? 14 : 6;  // of a tile
constexpr int64_t kDepth = 192;                         // of a tile, at most

thread_local Scratch scratch;

// The summed dimension in nearly equal parts, at least one: f(first, count).
template <typename F>
void by_depth(int64_t K, F&& f) {
  const int64_t parts = K > kDepth ? divide_up(K, kDepth) : 1;
  for (int64_t part = 0; part < parts; ++part) f(part * K / parts, (part + 1) * K / parts - part * K / parts);
}

// Where rows [first, first + count) begin.
void find_rows(const float** to, const LinearRows& rows, int64_t first, int64_t count) {
  for (int64_t i = 0, group = first / rows.group, row = first % rows.group; i < count; ++i) {
    to[i] = rows.p + group * rows.outer + row * rows.inner;
    if (++row == rows.group) row = 0, ++group;
  }
}

// Asks for the cache lines of n elements, to be read or written.
template <int kWrite>
inline void ask_for(const float* p, int64_t n) {
  asm volatile("");  // calls of a function that only prefetches would be removed
  const intptr_t begin = reinterpret_cast<intptr_t>(p);
  for (intptr_t line = begin & -64; line < begin + n * 4; line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(line), kWrite, 2);
}

// f(i) for the share of `count` things that falls to one of `shares` steps.
template <typename F>
void in_share(int64_t share, int64_t shares, int64_t count, F&& f) {
  for (int64_t i = share * count / shares; i < (share + 1) * count / shares; ++i) f(i);
}

// One tile's panels: f(v, vecs) for each, and before it ahead(i) for its share of `count` things.
template <typename Ahead, typename F>
void by_panels(int64_t vecs, int64_t count, Ahead&& ahead, F&& f) {
  const int64_t panels = divide_up(vecs, kVecs);
  for (int64_t panel = 0; panel < panels; ++panel) {
    in_share(panel, panels, count, ahead);
    f(panel * kVecs, smaller(kVecs, vecs - panel * kVecs));
  }
}

// The sums of `depth` rows, `stride` apart, onto `lanes` numbers: set where they are fresh. In several parts: no
// addition waits for the one before it, and each part rounds less.
void add_rows(float* to, int64_t lanes, const float* rows, int64_t stride, int64_t depth, bool fresh) {
  constexpr int kParts = 8;
  Vec<float> part[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= depth; i += kParts)
#pragma GCC unroll 8
    for (int k = 0; k < kParts; ++k) part[k] += load(rows + (i + k) * stride);
  for (; i < depth; ++i) part[0] += load(rows + i * stride);
  for (int half = kParts / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) part[k] += part[k + half];
  store_part(to, fresh ? part[0] : load_part(to, lanes) + part[0], lanes);
}

// A function of its own: where it is part of a larger one, the compiler may be short of registers.
template <typename Sink>
__attribute__((noinline)) void product(int64_t M, int64_t vecs, int64_t K, Left<float> a, Right<float> b, Sink sink) {
  if (vecs == kVecs)
    tile_rows<kRows, kVecs>(M, K, a, b, sink, Nothing{});
  else
    tile_rows<kRows, 1>(M, K, a, b, sink, Nothing{});
}

}  // namespace

void linear(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t N = p.N, vecs = divide_up(N, W), stride = kDepth + W;
  if (!scratch.reserve(Scratch::padded_bytes<float>(p.K * vecs * W) + Scratch::padded_bytes<float>(kRows * stride)))
    throw std::bad_alloc();
  float *weight = scratch.take<float>(p.K * vecs * W), *left = scratch.take<float>(kRows * stride);
  by_depth(p.K, [&](int64_t k, int64_t depth) {  // (vectors, depth, W)
    pack_matrix(weight + k * vecs * W, p.weight + k * p.step, N, p.lane, depth, p.step);
  });
  const float* rows[2 * kRows];  // a tile's and the next one's
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = smaller(kRows, end - first), more = smaller(kRows, end - first - count);
    find_rows(rows, p.from, first, count + more);
    by_depth(p.K, [&](int64_t k, int64_t depth) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t at = 0; at < depth; at += W)
          store(left + i * stride + at, load_part(rows[i] + k + at, depth - at));
      const bool last = k + depth == p.K;
      const float* const* next = last ? rows + count : rows;
      const int64_t next_k = last ? 0 : k + depth, next_depth = smaller(kDepth, p.K - next_k);
      const auto ahead = [&](int64_t i) { ask_for<0>(next[i] + next_k, next_depth); };
      by_panels(vecs, last ? more : count, ahead, [&](int64_t v, int64_t n) {
        float* to = p.to + first * N + v * W;
        const float* bias = p.bias ? p.bias + v * W : nullptr;
        const int64_t lanes = N - v * W;
        if (k == 0)
          for (int64_t i = 0; i < count; ++i) ask_for<1>(to + i * N, smaller(n * W, lanes));
        const Right<float> panel{weight + (k * vecs + v * depth) * W, W, depth * W};
        product(count, n, depth, Left<float>{left, stride, 1}, panel, [=](int64_t i, int64_t w, Vec<float> x) {
          float* at = to + i * N + w * W;
          if (k > 0)
            x += load_part(at, lanes - w * W);
          else if (bias)
            x += load_part(bias + w * W, lanes - w * W);
          store_part(at, x, lanes - w * W);
        });
      });
    });
  }
}

void linear_weight(const LinearWeightParams& p, int64_t begin, int64_t end) {
  const bool of_left = p.M > p.N;
  const int64_t last = smaller(end * kLinearUnit, of_left ? p.M : p.N);
  const int64_t m_begin = of_left ? begin * kLinearUnit : 0, m_end = of_left ? last : p.M;
  const int64_t n_begin = of_left ? 0 : begin * kLinearUnit, N = (of_left ? p.N : last) - n_begin;
  const int64_t vecs = divide_up(N, W), tiles = divide_up(m_end - m_begin, kRows);
  constexpr int64_t width = (kRows + W - 1) / W * W;
  if (!scratch.reserve(Scratch::padded_bytes<float>(kDepth * vecs * W) + Scratch::padded_bytes<float>(kDepth * width)))
    throw std::bad_alloc();
  float *right = scratch.take<float>(kDepth * vecs * W), *left = scratch.take<float>(kDepth * width);
  const float *left_rows[2 * kDepth], *right_rows[2 * kDepth];  // a part's and the next one's
  by_depth(p.rows, [&](int64_t first, int64_t depth) {
    const int64_t more = smaller(kDepth, p.rows - first - depth);
    find_rows(left_rows, p.left, first, depth + more);
    find_rows(right_rows, p.right, first, depth + more);
    for (int64_t i = 0; i < depth; ++i)
      for (int64_t v = 0; v < vecs; ++v)
        store(right + (v * depth + i) * W, load_part(right_rows[i] + n_begin + v * W, N - v * W));
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = m_begin + tile * kRows, count = smaller(kRows, m_end - m);
      for (int64_t i = 0; i < depth; ++i)
        for (int64_t at = 0; at < width; at += W)
          store(left + i * width + at, load_part(left_rows[i] + m + at, p.M - m - at));
      if (p.left_sum && n_begin == 0)
        for (int64_t at = 0; at < count; at += W)
          add_rows(p.left_sum + m + at, count - at, left + at, width, depth, first == 0);
      in_share(tile, tiles, more, [&](int64_t i) { ask_for<0>(right_rows[depth + i] + n_begin, N); });
      const bool turns = tile + 1 == tiles;
      const float* const* next = turns ? left_rows + depth : left_rows;
      const int64_t next_m = turns ? m_begin : m + kRows, next_count = smaller(kRows, m_end - next_m);
      const auto ahead = [&](int64_t i) { ask_for<0>(next[i] + next_m, next_count); };
      by_panels(vecs, turns ? more : depth, ahead, [&](int64_t v, int64_t n) {
        float* to = p.to + m * p.N + n_begin + v * W;
        const int64_t row = p.N, lanes = N - v * W;
        for (int64_t i = 0; i < count; ++i) ask_for<1>(to + i * row, smaller(n * W, lanes));
        const Right<float> panel{right + v * depth * W, W, depth * W};
        product(count, n, depth, Left<float>{left, 1, width}, panel, [=](int64_t i, int64_t w, Vec<float> x) {
          float* at = to + i * row + w * W;
          if (first > 0) x += load_part(at, lanes - w * W);
          store_part(at, x, lanes - w * W);
        });
      });
    }
  });
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
