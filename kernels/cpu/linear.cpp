// The products of a linear layer for one instruction set; see linear.h.
//
// Floor: 2 K N operations a row. A few rows of the left operand are copied and stay in the first cache, while the
// packed right one comes from the second, panel by panel; what the next tile reads and this one writes is asked for
// between the panels. No row is waited for, whatever the rows' strides.
#include "linear.h"

#include <new>

#include "ahead.h"
#include "gemm_tile.h"
#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

constexpr int W = kLanes<float>;
constexpr int kVecs = 2;                                // of a panel
constexpr int kRows = kVectorRegisters == 32 ? 14 : 6;  // of a tile
constexpr int64_t kDepth = 192;                         // of a tile, at most
constexpr int64_t kRowsDepth = 96;                      // where thousands of rows are summed: short sums round less

thread_local Scratch scratch;

// The summed dimension in nearly equal parts, at least one: f(first, count).
template <typename F>
void by_depth(int64_t K, int64_t most, F&& f) {
  const int64_t parts = K > most ? divide_up(K, most) : 1;
  for (int64_t part = 0; part < parts; ++part) f(part * K / parts, (part + 1) * K / parts - part * K / parts);
}

// Where rows [first, first + count) begin.
void find_rows(const float** to, const LinearRows& rows, int64_t first, int64_t count) {
  for (int64_t i = 0, group = first / rows.group, row = first % rows.group; i < count; ++i) {
    to[i] = rows.p + group * rows.outer + row * rows.inner;
    if (++row == rows.group) row = 0, ++group;
  }
}

// What goes over memory is in functions of its own: as parts of larger ones their loops do not stay in registers.

// Asks for the cache lines of elements [first, first + n) of some rows, to be read or written.
template <int kWrite>
__attribute__((noinline)) void ask_for(const float* const* rows, int64_t count, int64_t first, int64_t n) {
  asm volatile("");
  for (int64_t i = 0; i < count; ++i) ask_for_lines<kWrite>(rows[i] + first, n * sizeof(float));
}

// Elements [first, first + n) of some rows to rows that lie `stride` apart, in whole vectors, `column` apart.
__attribute__((noinline)) void copy(float* to, int64_t stride, int64_t column, const float* const* rows, int64_t count,
                                    int64_t first, int64_t n) {
  for (int64_t i = 0; i < count; ++i, to += stride) {
    const float* from = rows[i] + first;
    float* at = to;
    int64_t k = 0;
    for (; k + W <= n; k += W, at += column) store(at, load(from + k));
    if (k < n) store(at, load_part(from + k, n - k));
  }
}

// The panels of one tile: f(v, vecs) for each, and before it ahead(first, last) for its share of `count` things.
template <typename Ahead, typename F>
void by_panels(int64_t vecs, int64_t count, Ahead&& ahead, F&& f) {
  const int64_t panels = divide_up(vecs, kVecs);
  for (int64_t panel = 0; panel < panels; ++panel) {
    ahead(panel * count / panels, (panel + 1) * count / panels);
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

// One panel of a tile of M rows, to rows of `to` that lie `to_row` apart, of `lanes` numbers from here on: onto what is
// there, or onto `bias` where it is not null. A function of its own: as part of a larger one it is short of registers.
// Numbers, no structs: what is put together on the stack from its parts waits for all stores before it.
__attribute__((noinline)) void product(int64_t M, int64_t vecs, int64_t K, const float* a, int64_t a_row,
                                       int64_t a_step, const float* b, int64_t b_vec, float* to, int64_t to_row,
                                       int64_t lanes, bool onto, const float* bias) {
  const auto sink = [=](int64_t m, int64_t v, Vec<float> x) {
    float* at = to + m * to_row + v * W;
    if (onto)
      x += load_part(at, lanes - v * W);
    else if (bias)
      x += load_part(bias + v * W, lanes - v * W);
    store_part(at, x, lanes - v * W);
  };
  if (M == kRows && vecs == kVecs) return tile<kRows, kVecs>(K, a, a_row, a_step, b, W, b_vec, sink);
  const Left<float> left{a, a_row, a_step};
  const Right<float> right{b, W, b_vec};
  if (vecs == kVecs)
    tile_rows<kRows, kVecs>(M, K, left, right, sink, Nothing{});
  else
    tile_rows<kRows, 1>(M, K, left, right, sink, Nothing{});
}

}  // namespace

void linear(const LinearParams& p, int64_t begin, int64_t end) {
  constexpr int64_t stride = kDepth + W;  // an odd number of lines: rows fall into different sets of a cache
  const int64_t N = p.N, vecs = divide_up(N, W);
  if (!scratch.reserve(Scratch::padded_bytes<float>(p.K * vecs * W) + Scratch::padded_bytes<float>(kRows * stride)))
    throw std::bad_alloc();
  float *weight = scratch.take<float>(p.K * vecs * W), *left = scratch.take<float>(kRows * stride);
  by_depth(p.K, kDepth, [&](int64_t k, int64_t depth) {  // (vectors, depth, W)
    pack_matrix(weight + k * vecs * W, p.weight + k * p.step, N, p.lane, depth, p.step);
  });
  const float *rows[2 * kRows], *to[kRows];  // `rows`: a tile's and the next one's
  for (int64_t first = begin; first < end; first += kRows) {
    const int64_t count = smaller(kRows, end - first), more = smaller(kRows, end - first - count);
    find_rows(rows, p.from, first, count + more);
    for (int64_t i = 0; i < count; ++i) to[i] = p.to + (first + i) * N;
    by_depth(p.K, kDepth, [&](int64_t k, int64_t depth) {
      copy(left, stride, W, rows, count, k, depth);
      const bool last = k + depth == p.K;
      const float* const* next = last ? rows + count : rows;
      const int64_t next_k = last ? 0 : k + depth, next_depth = smaller(kDepth, p.K - next_k);
      const auto ahead = [&](int64_t i, int64_t end) { ask_for<0>(next + i, end - i, next_k, next_depth); };
      by_panels(vecs, last ? more : count, ahead, [&](int64_t v, int64_t n) {
        const int64_t lanes = N - v * W;
        if (k == 0) ask_for<1>(to, count, v * W, smaller(n * W, lanes));
        product(count, n, depth, left, stride, 1, weight + (k * vecs + v * depth) * W, depth * W,
                p.to + first * N + v * W, N, lanes, k > 0, p.bias ? p.bias + v * W : nullptr);
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
  constexpr int64_t width = (kRows + W - 1) / W * W, column = (kRowsDepth + 1) * W;  // in lines an odd number, as above
  const int64_t sums_size = tiles * vecs * kRows * W;
  if (!scratch.reserve(Scratch::padded_bytes<float>(vecs * column) + Scratch::padded_bytes<float>(kRowsDepth * width) +
                       Scratch::padded_bytes<float>(sums_size)))
    throw std::bad_alloc();
  float *right = scratch.take<float>(vecs * column), *left = scratch.take<float>(kRowsDepth * width);
  // (tiles, panels, kRows, vectors of a panel, W). Each thread has its own: where the rows of two lie side by side,
  // what the processor fetches ahead for one takes lines away from the other.
  float* const sums = scratch.take<float>(sums_size);
  const float *left_rows[2 * kRowsDepth], *right_rows[2 * kRowsDepth];  // a part's and the next one's
  by_depth(p.rows, kRowsDepth, [&](int64_t first, int64_t depth) {
    const int64_t more = smaller(kRowsDepth, p.rows - first - depth);
    find_rows(left_rows, p.left, first, depth + more);
    find_rows(right_rows, p.right, first, depth + more);
    copy(right, W, column, right_rows, depth, n_begin, N);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t m = m_begin + tile * kRows, count = smaller(kRows, m_end - m);
      copy(left, width, W, left_rows, depth, m, smaller(width, p.M - m));
      if (p.left_sum && n_begin == 0)
        for (int64_t at = 0; at < count; at += W)
          add_rows(p.left_sum + m + at, count - at, left + at, width, depth, first == 0);
      const bool turns = tile + 1 == tiles;
      const float *const *next = turns ? left_rows + depth : left_rows, *const *const right_next = right_rows + depth;
      const int64_t next_m = turns ? m_begin : m + kRows, next_count = smaller(kRows, m_end - next_m);
      const auto ahead = [&](int64_t i, int64_t end) { ask_for<0>(next + i, end - i, next_m, next_count); };
      by_panels(vecs, turns ? more : depth, ahead, [&](int64_t v, int64_t n) {
        const int64_t done = tile * vecs + v, all = tiles * vecs, i = done * more / all, end = (done + n) * more / all;
        ask_for<0>(right_next + i, end - i, n_begin, N);
        const float* const to = sums + done * kRows * W;
        ask_for<1>(&to, 1, 0, n * kRows * W);
        product(count, n, depth, left, 1, width, right + v * column, column, sums + done * kRows * W, n * W, n * W,
                first > 0, nullptr);
      });
    }
  });
  for (int64_t m = m_begin; m < m_end; ++m) {
    const int64_t tile = (m - m_begin) / kRows, i = (m - m_begin) % kRows;
    for (int64_t v = 0; v < vecs; ++v) {
      const int64_t panel = v / kVecs * kVecs, n = smaller(kVecs, vecs - panel);
      store_part(p.to + m * p.N + n_begin + v * W,
                 load(sums + (tile * vecs + panel) * kRows * W + (i * n + v - panel) * W), N - v * W);
    }
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
