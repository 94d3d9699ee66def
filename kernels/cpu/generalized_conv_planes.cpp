// The products of generalized convolution where each channel is a plane, for one instruction set; see
// generalized_conv_product.h.
//
// The image is the right operand, its lanes pixels of a plane; the weight is read where it lies. A head's shift moves a
// plane by one distance: a vector is stored that far away, with zeros for what would wrap round a side.
#include <new>

#include "gemm_tile.h"
#include "image_by_image.h"
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

// One product.
class PlaneProduct {
 public:
  static int64_t bytes(const GeneralizedConvProductParams& p) {
    return Scratch::padded_bytes<float>(p.K * room(p)) +
           Scratch::padded_bytes<int32_t>(generalized_conv_window(p.H) * room(p)) + Scratch::padded_bytes<Move>(p.H) +
           Scratch::padded_bytes<int32_t>(p.N);
  }

  // Takes bytes(p) of the scratch memory.
  explicit PlaneProduct(const GeneralizedConvProductParams& p)
      : p_(p),
        pixels_(p.rows * p.columns),
        window_(generalized_conv_window(p.H)),
        room_(room(p)),
        image_(scratch.take<float>(p.K * room_)),
        stays_(scratch.take<int32_t>(window_ * room_)),
        moves_(scratch.take<Move>(p.H)),
        heads_(scratch.take<int32_t>(p.N)) {
    for (int64_t c = 0; c < p.N; ++c) heads_[c] = static_cast<int32_t>(c / (p.N / p.H));
    for (int64_t head = 0; head < p.H; ++head) {
      const Offset by = generalized_conv_offset(window_, head, p.inverse);
      moves_[head] = {by.row * p.columns + by.column, stays_ + head % window_ * room_};
    }
  }
  PlaneProduct(const PlaneProduct&) = delete;

  void image(const float* x, float* out) const {
    const PixelBlocks blocks(pixels_);
    for (int64_t block = 0; block < blocks.count; ++block) pixels(x, out, blocks.first(block), blocks.first(block + 1));
  }

  // Those of [first, last) of one image.
  void pixels(const float* x, float* out, int64_t first, int64_t last) const {
    const int64_t n = last - first, padded = round_to_lanes<float>(n);
    pack_rows(image_, padded, Rows<const float>{x + first, pixels_}, p_.K, n);
    const auto product = [&](auto sink) {
      const Left<float> weight{p_.weight, p_.transposed ? 1 : p_.weight_stride, p_.transposed ? p_.weight_stride : 1};
      gemm(p_.N, padded / W, p_.K, weight, Right<float>{image_, padded, W}, sink);
    };
    if (p_.H == 1) {
      product([this, out, first, n](int64_t m, int64_t v, Vec<float> sum) {
        if (p_.bias) sum += p_.bias[m];
        store_part(out + m * pixels_ + first + v * W, sum, n - v * W);
      });
      return;
    }
    for (int64_t side = 0; side < window_; ++side) {
      const int64_t by = generalized_conv_offset(window_, side, p_.inverse).column;
      for (int64_t i = 0; i < padded; ++i) {
        const int64_t column = (first + i) % p_.columns - by;
        stays_[side * room_ + i] = column >= 0 && column < p_.columns ? -1 : 0;
      }
    }
    for (int64_t m = 0; m < p_.N; ++m) clear(out + m * pixels_, pixels_, moves_[heads_[m]].away, first, last);
    product([this, out, first, n](int64_t m, int64_t v, Vec<float> sum) {
      const Move& move = moves_[heads_[m]];
      Lanes stays;
      std::memcpy(&stays, move.stays + v * W, sizeof(stays));
      store_clipped(out + m * pixels_, pixels_, first + v * W - move.away, (Vec<float>)((Lanes)sum & stays),
                    smaller(W, n - v * W));
    });
  }

 private:
  static int64_t room(const GeneralizedConvProductParams& p) {
    return round_to_lanes<float>(smaller(p.rows * p.columns, kBlockPixels));
  }

  GeneralizedConvProductParams p_;
  int64_t pixels_, window_, room_;
  float* image_;  // (K, room)
  int32_t* stays_;
  Move* moves_;
  int32_t* heads_;  // of each channel
};

}  // namespace

void generalized_conv_planes(const GeneralizedConvProductParams& p, int64_t begin, int64_t end) {
  if (!scratch.reserve(PlaneProduct::bytes(p))) throw std::bad_alloc();
  const PlaneProduct product(p);
  const int64_t pixels = p.rows * p.columns;
  const PixelBlocks blocks(pixels);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / blocks.count, block = unit % blocks.count;
    product.pixels(p.x + b * p.K * pixels, p.out + b * p.N * pixels, blocks.first(block), blocks.first(block + 1));
  }
}

void generalized_conv_both_planes(const GeneralizedConvBothParams& p, int64_t begin, int64_t end) {
  image_by_image<PlaneProduct>(p, scratch, begin, end);
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
