// The products of generalized convolution where channels are last, for one instruction set; see
// generalized_conv_product.h.
//
// Floor: 2 K N operations a pixel and product. A block of pixels and the packed weight stay in the second cache while
// the register tile goes over them; pixels are read where they lie.
#include "generalized_conv_product.h"

#include <new>

#include "ahead.h"
#include "gemm_tile.h"
#include "image_by_image.h"
#include "part_sum.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

constexpr int W = kLanes<float>;

thread_local Scratch scratch;

// Where the shift takes each head of a block's pixels.
class Targets {
 public:
  Targets(const GeneralizedConvProductParams& p, int64_t* memory) : p_(p), to_(memory) {}

  // Fills in the pixels [first, first + n), and sets to zero what no pixel is shifted to.
  void find(int64_t first, int64_t n) const {
    const int64_t window = generalized_conv_window(p_.H), D = p_.N / p_.H;
    for (int64_t head = 0; head < p_.H; ++head) {
      const Offset by = generalized_conv_offset(window, head, p_.inverse);
      int64_t row = first / p_.columns % p_.rows, column = first % p_.columns;
      for (int64_t m = 0; m < n; ++m) {
        const int64_t pixel = first + m, away = by.row * p_.columns + by.column;
        to_[m * p_.H + head] = inside(row - by.row, column - by.column) ? pixel - away : -1;
        if (!inside(row + by.row, column + by.column))
          std::memset(p_.out + pixel * p_.N + head * D, 0, D * sizeof(float));
        if (++column == p_.columns) column = 0, ++row;
        if (row == p_.rows) row = 0;
      }
    }
  }

  // Stores channels [c, c + W) of the block's pixel m.
  void store_vector(int64_t m, int64_t c, Vec<float> x) const {
    const int64_t D = p_.N / p_.H, end = smaller(c + W, p_.N);
    float lanes[W];
    store(lanes, x);
    for (int64_t at = c; at < end;) {
      const int64_t head = at / D, next = smaller((head + 1) * D, end), to = to_[m * p_.H + head];
      if (to >= 0) std::memcpy(p_.out + to * p_.N + at, lanes + (at - c), (next - at) * sizeof(float));
      at = next;
    }
  }

  // The same where the vector lies in one head.
  void store_vector(int64_t m, int64_t c, int64_t head, Vec<float> x) const {
    const int64_t to = to_[m * p_.H + head];
    if (to >= 0) store(p_.out + to * p_.N + c, x);
  }

 private:
  bool inside(int64_t row, int64_t column) const {
    return row >= 0 && row < p_.rows && column >= 0 && column < p_.columns;
  }

  const GeneralizedConvProductParams& p_;
  int64_t* to_;  // (n, H) pixels, -1 for none
};

// One product, its weight packed.
class PixelProduct {
 public:
  static int64_t bytes(const GeneralizedConvProductParams& p) {
    const int64_t vecs = divide_up(p.N, W);
    return Scratch::padded_bytes<float>(vecs * p.K * W) + Scratch::padded_bytes<int64_t>(kBlockPixels * p.H) +
           Scratch::padded_bytes<int64_t>(vecs);
  }

  // Takes bytes(p) of the scratch memory.
  explicit PixelProduct(const GeneralizedConvProductParams& p)
      : p_(p),
        vecs_(divide_up(p.N, W)),
        weight_(scratch.take<float>(vecs_ * p.K * W)),
        targets_(p_, scratch.take<int64_t>(kBlockPixels * p.H)),
        heads_(scratch.take<int64_t>(vecs_)) {
    const int64_t D = p.N / p.H;
    for (int64_t v = 0; v < vecs_; ++v) {
      const int64_t first = v * W / D;
      heads_[v] = (v + 1) * W <= (first + 1) * D ? first : -1;
    }
    pack_weight();
  }
  PixelProduct(const PixelProduct&) = delete;

  void pixels(int64_t begin, int64_t end) const {
    for (int64_t first = begin; first < end; first += kBlockPixels) block(first, smaller(kBlockPixels, end - first));
  }

  void image(const float* x, float* out) {
    p_.x = x, p_.out = out;
    pixels(0, p_.rows * p_.columns);
  }

 private:
  // As right operand: (vectors of N, K, W), zero beyond N.
  void pack_weight() {
    const Rows<const float> rows{p_.weight, p_.weight_stride};
    if (!p_.transposed) return pack_columns(weight_, rows, p_.N, p_.K);
    for (int64_t n = 0; n < p_.N; n += W)
      pack_rows(weight_ + n * p_.K, W, Rows<const float>{p_.weight + n, p_.weight_stride}, p_.K, smaller(W, p_.N - n));
  }

  void block(int64_t first, int64_t n) const {
    const float* x = p_.x + first * p_.K;
    const auto product = [&](auto sink) {
      const Ahead next(only(Rows<const float>{x + kBlockPixels * p_.K, p_.K}), p_.K);
      gemm(n, vecs_, p_.K, Left<float>{x, p_.K, 1}, Right<float>{weight_, W, W * p_.K}, sink, next);
    };
    if (p_.H == 1) {
      product([this, first](int64_t m, int64_t v, Vec<float> sum) {
        if (p_.bias) sum += load_part(p_.bias + v * W, p_.N - v * W);
        store_part(p_.out + (first + m) * p_.N + v * W, sum, p_.N - v * W);
      });
    } else {
      targets_.find(first, n);
      product([this](int64_t m, int64_t v, Vec<float> sum) {
        if (heads_[v] < 0)
          targets_.store_vector(m, v * W, sum);
        else
          targets_.store_vector(m, v * W, heads_[v], sum);
      });
    }
  }

  GeneralizedConvProductParams p_;
  int64_t vecs_;
  float* weight_;
  Targets targets_;
  int64_t* heads_;  // of each vector, or -1 for several
};

}  // namespace

void generalized_conv_pixels(const GeneralizedConvProductParams& p, int64_t begin, int64_t end) {
  if (!scratch.reserve(PixelProduct::bytes(p))) throw std::bad_alloc();
  PixelProduct(p).pixels(begin * kUnitPixels, smaller(end * kUnitPixels, p.B * p.rows * p.columns));
}

void generalized_conv_both_pixels(const GeneralizedConvBothParams& p, int64_t begin, int64_t end) {
  image_by_image<PixelProduct>(p, scratch, begin, end);
}

void generalized_conv_grad_weight_pixels(const GeneralizedConvWeightParams& p, int64_t begin, int64_t end) {
  const int64_t vecs = divide_up(p.K, W), padded = vecs * W, pixels = p.B * p.pixels;
  const bool whole = padded == p.K;
  if (!whole && !scratch.reserve(Scratch::padded_bytes<float>(kBlockPixels * padded))) throw std::bad_alloc();
  float* copy = whole ? nullptr : scratch.take<float>(kBlockPixels * padded);
  for (int64_t part = begin; part < end; ++part) {
    const int64_t start = part * pixels / p.parts;
    const PixelBlocks blocks((part + 1) * pixels / p.parts - start);
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t first = start + blocks.first(block), n = start + blocks.first(block + 1) - first;
      const float *x = p.x + first * p.K, *grad = p.grad + first * p.N;
      if (!whole) pack_rows(copy, padded, Rows<const float>{x, p.K}, n, p.K);
      const PartSum sum(p, part, block > 0);
      gemm(p.N, vecs, n, Left<float>{grad, 1, p.N}, Right<float>{whole ? x : copy, padded, W},
           [sum](int64_t m, int64_t v, Vec<float> x) { sum.weight(m, v, x); });
      for (int64_t c = 0; p.bias_parts && c < p.N; c += W) {
        Vec<float> bias{};
        for (int64_t i = 0; i < n; ++i) bias += load_part(grad + i * p.N + c, p.N - c);
        sum.bias(c, bias, p.N - c);
      }
    }
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
