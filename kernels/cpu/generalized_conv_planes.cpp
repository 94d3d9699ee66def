// The products of generalized convolution where each channel is a plane, for one instruction set; see
// generalized_conv_product.h.
//
// The image is the right operand, its lanes pixels of a plane; the weight is read where it lies. A head's shift moves a
// plane by one distance: a vector is stored that far away, with zeros for what would wrap round a side.
#include <new>

#include "gemm_tile.h"
#include "part_sum.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

constexpr int W = kLanes<float>;
using Lanes = Simd<float>::ivec;

thread_local Scratch scratch;

// Where a head's plane goes.
struct Move {
  int64_t away;          // pixel p goes to p - away
  const int32_t* stays;  // per pixel of the block: -1 where it stays in its row, else 0
};

// Lanes [0, n) of x to places [to, to + n) of a plane of `pixels`, as far as they exist.
inline void store_clipped(float* plane, int64_t pixels, int64_t to, Vec<float> x, int64_t n) {
  if (n == W && to >= 0 && to + W <= pixels) return store(plane + to, x);
  float lanes[W];
  store(lanes, x);
  const int64_t first = to < 0 ? -to : 0, last = smaller(n, pixels - to);
  if (first < last) std::memcpy(plane + to + first, lanes + first, (last - first) * sizeof(float));
}

// Sets to zero those of a plane's pixels [first, last) that no pixel moves to.
void clear(float* plane, int64_t pixels, int64_t away, int64_t first, int64_t last) {
  for (int64_t i = first; i < smaller(last, -away); ++i) plane[i] = 0;
  for (int64_t i = pixels - away > first ? pixels - away : first; i < last; ++i) plane[i] = 0;
}

}  // namespace

void generalized_conv_planes(const GeneralizedConvProductParams& p, int64_t begin, int64_t end) {
  const int64_t pixels = p.rows * p.columns, window = generalized_conv_window(p.H), D = p.N / p.H;
  const PixelBlocks blocks(pixels);
  const int64_t room = round_to_lanes<float>(smaller(pixels, kBlockPixels));
  if (!scratch.reserve(Scratch::padded_bytes<float>(p.K * room) + Scratch::padded_bytes<int32_t>(window * room) +
                       Scratch::padded_bytes<Move>(p.H) + Scratch::padded_bytes<int32_t>(p.N)))
    throw std::bad_alloc();
  float* image = scratch.take<float>(p.K * room);
  int32_t* stays = scratch.take<int32_t>(window * room);
  Move* moves = scratch.take<Move>(p.H);
  int32_t* heads = scratch.take<int32_t>(p.N);
  for (int64_t c = 0; c < p.N; ++c) heads[c] = static_cast<int32_t>(c / D);
  for (int64_t head = 0; head < p.H; ++head) {
    const Offset by = generalized_conv_offset(window, head, p.inverse);
    moves[head] = {by.row * p.columns + by.column, stays + head % window * room};
  }
  const Left<float> weight{p.weight, p.transposed ? 1 : p.weight_stride, p.transposed ? p.weight_stride : 1};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks.count, block = unit % blocks.count;
    const int64_t first = blocks.first(block), last = blocks.first(block + 1), n = last - first;
    const int64_t padded = round_to_lanes<float>(n);
    pack_rows(image, padded, Rows<const float>{p.x + b * p.K * pixels + first, pixels}, p.K, n);
    float* out = p.out + b * p.N * pixels;
    const Right<float> right{image, padded, W};
    if (p.H == 1) {
      gemm(p.N, padded / W, p.K, weight, right, [&p, out, pixels, first, n](int64_t m, int64_t v, Vec<float> sum) {
        if (p.bias) sum += p.bias[m];
        store_part(out + m * pixels + first + v * W, sum, n - v * W);
      });
      continue;
    }
    for (int64_t side = 0; side < window; ++side) {
      const int64_t by = generalized_conv_offset(window, side, p.inverse).column;
      for (int64_t i = 0; i < padded; ++i) {
        const int64_t column = (first + i) % p.columns - by;
        stays[side * room + i] = column >= 0 && column < p.columns ? -1 : 0;
      }
    }
    for (int64_t m = 0; m < p.N; ++m) clear(out + m * pixels, pixels, moves[heads[m]].away, first, last);
    gemm(p.N, padded / W, p.K, weight, right,
         [out, moves, heads, pixels, first, n](int64_t m, int64_t v, Vec<float> sum) {
           const Move& move = moves[heads[m]];
           Lanes stays;
           std::memcpy(&stays, move.stays + v * W, sizeof(stays));
           store_clipped(out + m * pixels, pixels, first + v * W - move.away, (Vec<float>)((Lanes)sum & stays),
                         smaller(W, n - v * W));
         });
  }
}

void generalized_conv_grad_weight_planes(const GeneralizedConvWeightParams& p, int64_t begin, int64_t end) {
  const PixelBlocks blocks(p.pixels);
  const int64_t vecs = divide_up(p.K, W), room = smaller(p.pixels, kBlockPixels) * vecs * W;
  if (!scratch.reserve(Scratch::padded_bytes<float>(room))) throw std::bad_alloc();
  float* columns = scratch.take<float>(room);
  for (int64_t part = begin; part < end; ++part) {
    const int64_t start = part * p.B * blocks.count / p.parts, stop = (part + 1) * p.B * blocks.count / p.parts;
    for (int64_t unit = start; unit < stop; ++unit) {
      const int64_t b = unit / blocks.count, first = blocks.first(unit % blocks.count);
      const int64_t n = blocks.first(unit % blocks.count + 1) - first;
      const float* grad = p.grad + b * p.N * p.pixels + first;
      pack_columns(columns, Rows<const float>{p.x + b * p.K * p.pixels + first, p.pixels}, p.K, n);
      const PartSum sum(p, part, unit > start);
      gemm(p.N, vecs, n, Left<float>{grad, p.pixels, 1}, Right<float>{columns, W, W * n},
           [sum](int64_t m, int64_t v, Vec<float> x) { sum.weight(m, v, x); });
      for (int64_t m = 0; p.bias_parts && m < p.N; ++m) {
        Vec<float> bias{};
        for (int64_t i = 0; i < n; i += W) bias += load_part(grad + m * p.pixels + i, n - i);
        bias[0] = horizontal_sum<float>(bias);
        sum.bias(m, bias, 1);
      }
    }
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
