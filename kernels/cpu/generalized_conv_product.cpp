// The products of generalized convolution for one instruction set; see generalized_conv_product.h.
//
// Floor: 2 N M operations a pixel and product, less a head's part of the rows that its shift takes out of the image. A
// block of pixels and the packed weight stay in the second cache while the register tile goes over them. Images are
// read where they lie; those that go into planes are turned block by block.
#include "generalized_conv_product.h"

#include <new>

#include "gemm_tile.h"
#include "generalized_conv_edges.h"
#include "part_lanes.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

constexpr int W = kLanes<float>;

thread_local Scratch scratch;

constexpr bool kManyRegisters = kVectorRegisters == 32;

// Tiles for operands that come from far: where the left one's steps are dense, few rows of it at a time, so that it is
// gone through seldom; else as many rows as lie side by side. A panel is what goes over the left operand at once.
constexpr int kWidePanel = kManyRegisters ? 6 : 2;

template <typename F>
void by_panels(int64_t vecs, Left<float> a, F&& f) {
  const int64_t width = a.step == 1 ? kWidePanel : 2;
  for (int64_t v = 0; v < vecs; v += width) f(v, smaller(width, vecs - v));
}

template <typename Sink>
void product(int64_t M, int64_t vecs, int64_t K, Left<float> a, Right<float> b, Sink sink) {
  if (a.step == 1)
    gemm_in_tiles<kManyRegisters ? 4 : 6, kWidePanel>(M, vecs, K, a, b, sink);
  else
    gemm_in_tiles<kManyRegisters ? 14 : 6, 2>(M, vecs, K, a, b, sink);
}

// The blocks of an outer image as left operand, their pixels or their channels as its rows. Planes that lie a power of
// two apart fall on the same few places of the caches: such blocks are copied.
class OuterBlocks {
 public:
  static int64_t bytes(const GeneralizedConvSizes& s, int64_t N) { return Scratch::padded_bytes<float>(room(s, N)); }

  // Takes bytes(s, N) of the scratch memory.
  OuterBlocks(const GeneralizedConvSizes& s, int64_t N)
      : s_(s), N_(N), copy_(room(s, N) ? scratch.take<float>(room(s, N)) : nullptr) {}

  Left<float> pixels(const float* image, int64_t first, int64_t last) const {
    if (s_.channels_last) return {image + first * N_, N_, 1};
    const Rows<const float> planes = block(image, first, last);
    return {planes.p, 1, planes.stride};
  }

  Left<float> channels(const float* image, int64_t first, int64_t last) const {
    if (s_.channels_last) return {image + first * N_, 1, N_};
    const Rows<const float> planes = block(image, first, last);
    return {planes.p, planes.stride, 1};
  }

 private:
  static constexpr int64_t kStride = kBlockPixels;

  static int64_t room(const GeneralizedConvSizes& s, int64_t N) {
    return !s.channels_last && s.pixels() % 256 == 0 ? N * kStride : 0;
  }

  Rows<const float> block(const float* image, int64_t first, int64_t last) const {
    const Rows<const float> planes{image + first, s_.pixels()};
    if (!copy_) return planes;
    for (int64_t c = 0; c < N_; ++c) std::memcpy(copy_ + c * kStride, planes.row(c), (last - first) * sizeof(float));
    return {copy_, kStride};
  }

  GeneralizedConvSizes s_;
  int64_t N_;
  float* copy_;
};

// f(first, last) of blocks of the pixels [begin, end).
template <typename F>
void by_blocks(int64_t begin, int64_t end, F&& f) {
  for (int64_t first = begin; first < end; first += kBlockPixels) f(first, smaller(first + kBlockPixels, end));
}

class Into {
 public:
  static int64_t bytes(const GeneralizedConvProductParams& p) {
    const int64_t vecs = divide_up(p.sizes.M, W);
    return OuterBlocks::bytes(p.sizes, p.into.N) + Scratch::padded_bytes<float>(vecs * p.into.N * W) +
           Scratch::padded_bytes<int64_t>(p.sizes.pixels() * p.sizes.H) + Scratch::padded_bytes<int64_t>(vecs);
  }

  // Takes bytes(p) of the scratch memory.
  explicit Into(const GeneralizedConvProductParams& p)
      : s_(p.sizes),
        N_(p.into.N),
        D_(s_.M / s_.H),
        vecs_(divide_up(s_.M, W)),
        inverse_(p.inverse),
        edges_(s_, !p.inverse),
        blocks_(s_, N_),
        weight_(scratch.take<float>(vecs_ * N_ * W)),
        places_(scratch.take<int64_t>(s_.pixels() * s_.H)),
        heads_(scratch.take<int64_t>(vecs_)) {
    pack_matrix(weight_, p.into.p, s_.M, p.into.inner, N_, p.into.outer);
    for_each_place([this](int64_t pixel, int64_t head, int64_t to, int64_t) { places_[pixel * s_.H + head] = to; });
    for (int64_t v = 0; v < vecs_; ++v) {
      const int64_t first = v * W / D_;
      heads_[v] = (v + 1) * W <= (first + 1) * D_ ? first : -1;
    }
  }
  Into(const Into&) = delete;

  const OuterBlocks& blocks() const { return blocks_; }

  // Pixels [begin, end) of one image.
  void operator()(const float* from, float* middle, int64_t begin, int64_t end) const {
    for_each_place([&](int64_t pixel, int64_t head, int64_t, int64_t source) {
      if (source < 0 && pixel >= begin && pixel < end)
        std::memset(middle + pixel * s_.M + head * D_, 0, D_ * sizeof(float));
    });
    by_blocks(begin, end, [&](int64_t first, int64_t last) {
      const Left<float> left = blocks_.pixels(from, first, last);
      by_panels(vecs_, left, [&](int64_t v, int64_t n) {
        const Range needed = edges_.pixels(v, n).and_in(first, last);
        product(needed.size(), n, N_, Left<float>{left.p + (needed.begin - first) * left.row, left.row, left.step},
                Right<float>{weight_ + v * W * N_, W, W * N_},
                [&](int64_t m, int64_t w, Vec<float> sum) { put(middle, needed.begin + m, v + w, sum); });
      });
    });
  }

 private:
  // f(pixel, head, where the head's shift takes the pixel, the pixel that it takes there), -1 for outside.
  template <typename F>
  void for_each_place(F&& f) const {
    const int64_t window = generalized_conv_window(s_.H);
    for (int64_t head = 0; head < s_.H; ++head) {
      const Offset by = generalized_conv_offset(window, head, inverse_);
      const int64_t away = by.row * s_.columns + by.column;
      for (int64_t row = 0, pixel = 0; row < s_.rows; ++row)
        for (int64_t column = 0; column < s_.columns; ++column, ++pixel)
          f(pixel, head, inside(row - by.row, column - by.column) ? pixel - away : -1,
            inside(row + by.row, column + by.column) ? pixel + away : -1);
    }
  }

  bool inside(int64_t row, int64_t column) const {
    return row >= 0 && row < s_.rows && column >= 0 && column < s_.columns;
  }

  // Stores the vector v of a pixel's values where they belong.
  void put(float* middle, int64_t pixel, int64_t v, Vec<float> x) const {
    const int64_t* places = places_ + pixel * s_.H;
    if (heads_[v] >= 0) {
      const int64_t to = places[heads_[v]];
      if (to >= 0) store(middle + to * s_.M + v * W, x);
      return;
    }
    const int64_t end = smaller(v * W + W, s_.M);
    for (int64_t at = v * W; at < end;) {
      const int64_t head = at / D_, next = smaller((head + 1) * D_, end), to = places[head];
      if (to >= 0) store_lanes(middle + to * s_.M + v * W, x, at - v * W, next - v * W);
      at = next;
    }
  }

  GeneralizedConvSizes s_;
  int64_t N_, D_, vecs_;
  bool inverse_;
  Edges edges_;
  OuterBlocks blocks_;
  float* weight_;
  int64_t* places_;  // (pixels, H): where the shift takes a pixel, -1 for nowhere
  int64_t* heads_;   // of each vector, or -1 for several
};

class Back {
 public:
  static int64_t bytes(const GeneralizedConvProductParams& p) {
    const int64_t lanes = round_to_lanes<float>(p.back.N);
    return Scratch::padded_bytes<float>(lanes * p.sizes.M) +
           Scratch::padded_bytes<float>(lanes * block_pixels(p.sizes));
  }

  // Takes bytes(p) of the scratch memory.
  explicit Back(const GeneralizedConvProductParams& p)
      : s_(p.sizes),
        N_(p.back.N),
        lanes_(round_to_lanes<float>(N_)),
        edges_(s_, p.inverse),
        bias_(p.bias),
        weight_(scratch.take<float>(lanes_ * s_.M)),
        block_(scratch.take<float>(lanes_ * block_pixels(s_))) {
    pack_matrix(weight_, p.back.p, N_, p.back.outer, s_.M, p.back.inner);
  }
  Back(const Back&) = delete;

  // Pixels [begin, end) of one image.
  void operator()(const float* middle, float* to, int64_t begin, int64_t end) const {
    by_blocks(begin, end, [&](int64_t first, int64_t last) {
      if (s_.channels_last) return pixels(middle, first, last, to + first * N_, N_);
      pixels(middle, first, last, block_, lanes_);
      turn(last - first, to + first);
    });
  }

 private:
  // Of a block that is turned into planes.
  static int64_t block_pixels(const GeneralizedConvSizes& s) {
    return s.channels_last ? 0 : smaller(s.pixels(), kBlockPixels);
  }

  // A block of pixels, `stride` apart in `to`.
  void pixels(const float* middle, int64_t first, int64_t last, float* to, int64_t stride) const {
    edges_.channels(first, last, [&](Range pixels, Range channels) {
      float* out = to + (pixels.begin - first) * stride;
      product(pixels.size(), lanes_ / W, channels.size(),
              Left<float>{middle + pixels.begin * s_.M + channels.begin, s_.M, 1},
              Right<float>{weight_ + channels.begin * W, W, W * s_.M}, [&](int64_t m, int64_t v, Vec<float> sum) {
                const int64_t lanes = N_ - v * W;
                if (bias_) sum += load_part(bias_ + v * W, lanes);
                store_part(out + m * stride + v * W, sum, lanes);
              });
    });
  }

  // The block's n pixels into planes.
  void turn(int64_t n, float* to) const {
    for (int64_t c = 0; c < N_; c += W)
      for (int64_t i = 0; i < n; i += W) {
        Vec<float> square[W] = {};
        for (int l = 0; l < W && i + l < n; ++l) square[l] = load(block_ + (i + l) * lanes_ + c);
        transpose<float>(square);
        for (int l = 0; l < W && c + l < N_; ++l) store_part(to + (c + l) * s_.pixels() + i, square[l], n - i);
      }
  }

  GeneralizedConvSizes s_;
  int64_t N_, lanes_;
  Edges edges_;
  const float* bias_;
  float *weight_, *block_;
};

// One part of a weight's gradient, summed block by block.
class WeightSum {
 public:
  WeightSum(const GeneralizedConvWeightParams& p, const OuterBlocks& blocks, int64_t part)
      : s_(p.sizes),
        blocks_(blocks),
        edges_(s_, p.inverse),
        N_(p.N),
        weight_(p.wanted ? p.weight_parts + part * p.N * s_.M : nullptr),
        bias_(p.bias_parts ? p.bias_parts + part * p.N : nullptr) {}

  // Pixels [begin, end) of one image.
  void operator()(const float* outer, const float* middle, int64_t begin, int64_t end) {
    by_blocks(begin, end, [&](int64_t first, int64_t last) { block(outer, middle, first, last); });
  }

 private:
  void block(const float* outer, const float* middle, int64_t first, int64_t last) {
    const Left<float> left = blocks_.channels(outer, first, last);
    by_panels(divide_up(s_.M, W), left, [&](int64_t v, int64_t n) {
      const Range filled = edges_.pixels(v, n).and_in(first, last);
      product(N_, n, filled.size(), Left<float>{left.p + (filled.begin - first) * left.step, left.row, left.step},
              Right<float>{middle + filled.begin * s_.M + v * W, s_.M, W}, [&](int64_t m, int64_t w, Vec<float> x) {
                put(weight_ + m * s_.M + (v + w) * W, x, s_.M - (v + w) * W);
              });
    });
    if (bias_) add_bias(left, last - first);
    empty_ = false;
  }

  void add_bias(const Left<float>& channels, int64_t pixels) const {
    if (channels.row == 1)
      for (int64_t c = 0; c < N_; c += W) {
        Vec<float> sum{};
        for (int64_t i = 0; i < pixels; ++i) sum += load_part(channels.p + i * channels.step + c, N_ - c);
        put(bias_ + c, sum, N_ - c);
      }
    else
      for (int64_t c = 0; c < N_; ++c) {
        Vec<float> sum{};
        for (int64_t i = 0; i < pixels; i += W) sum += load_part(channels.p + c * channels.row + i, pixels - i);
        sum[0] = horizontal_sum<float>(sum);
        put(bias_ + c, sum, 1);
      }
  }

  // The first lanes of x.
  void put(float* to, Vec<float> x, int64_t lanes) const {
    store_part(to, empty_ ? x : load_part(to, lanes) + x, lanes);
  }

  GeneralizedConvSizes s_;
  const OuterBlocks& blocks_;
  Edges edges_;
  int64_t N_;
  float *weight_, *bias_;
  bool empty_ = true;
};

// f(image, first, last) of the pixels of units [begin, end), `size` pixels of an image each.
template <typename F>
void by_images(const GeneralizedConvSizes& s, int64_t size, int64_t begin, int64_t end, F&& f) {
  const int64_t units = divide_up(s.pixels(), size);
  for (int64_t unit = begin; unit < end;) {
    const int64_t b = unit / units, stop = smaller(end, (b + 1) * units);
    f(b, unit % units * size, smaller((stop - b * units) * size, s.pixels()));
    unit = stop;
  }
}

// Into or Back alone, from images of `channels` channels to images of `to_channels`.
template <typename Product>
void one_by_one(const GeneralizedConvProductParams& p, const float* from, int64_t channels, float* to,
                int64_t to_channels, int64_t begin, int64_t end) {
  if (!scratch.reserve(Product::bytes(p))) throw std::bad_alloc();
  const Product product(p);
  const int64_t pixels = p.sizes.pixels();
  by_images(p.sizes, kUnitPixels, begin, end, [&](int64_t b, int64_t first, int64_t last) {
    product(from + b * pixels * channels, to + b * pixels * to_channels, first, last);
  });
}

}  // namespace

void generalized_conv_forward(const GeneralizedConvProductParams& p, int64_t begin, int64_t end) {
  const int64_t pixels = p.sizes.pixels(), between = pixels * p.sizes.M;
  if (!scratch.reserve(Into::bytes(p) + Back::bytes(p) + Scratch::padded_bytes<float>(p.middle ? 0 : between)))
    throw std::bad_alloc();
  const Into into(p);
  const Back back(p);
  float* own = p.middle ? nullptr : scratch.take<float>(between);
  for (int64_t b = begin; b < end; ++b) {
    float* middle = own ? own : p.middle + b * between;
    into(p.from + b * pixels * p.into.N, middle, 0, pixels);
    back(middle, p.to + b * pixels * p.back.N, 0, pixels);
  }
}

void generalized_conv_backward(const GeneralizedConvGradParams& p, int64_t begin, int64_t end) {
  const GeneralizedConvProductParams& products = p.products;
  const GeneralizedConvSizes& s = products.sizes;
  const int64_t pixels = s.pixels(), between = pixels * s.M;
  if (!scratch.reserve(Into::bytes(products) + Back::bytes(products) + OuterBlocks::bytes(s, p.w_v.N) +
                       Scratch::padded_bytes<float>(between)))
    throw std::bad_alloc();
  const Into into(products);
  const Back back(products);
  const OuterBlocks x_blocks(s, p.w_v.N);
  float* middle = scratch.take<float>(between);
  for (int64_t part = begin; part < end; ++part) {
    WeightSum w_v(p.w_v, x_blocks, part), w_o(p.w_o, into.blocks(), part);
    for (int64_t b = part * s.B / p.parts; b < (part + 1) * s.B / p.parts; ++b) {
      const float* grad = products.from + b * pixels * products.into.N;
      if (p.w_o.wanted) w_o(grad, p.w_o.middle + b * between, 0, pixels);
      if (!products.to && !p.w_v.wanted) continue;
      into(grad, middle, 0, pixels);
      if (products.to) back(middle, products.to + b * pixels * products.back.N, 0, pixels);
      if (p.w_v.wanted) w_v(p.w_v.outer + b * pixels * p.w_v.N, middle, 0, pixels);
    }
  }
}

void generalized_conv_into(const GeneralizedConvProductParams& p, int64_t begin, int64_t end) {
  one_by_one<Into>(p, p.from, p.into.N, p.middle, p.sizes.M, begin, end);
}

void generalized_conv_back(const GeneralizedConvProductParams& p, int64_t begin, int64_t end) {
  one_by_one<Back>(p, p.middle, p.sizes.M, p.to, p.back.N, begin, end);
}

void generalized_conv_weight(const GeneralizedConvWeightParams& p, int64_t parts, int64_t begin, int64_t end) {
  if (!scratch.reserve(OuterBlocks::bytes(p.sizes, p.N))) throw std::bad_alloc();
  const OuterBlocks blocks(p.sizes, p.N);
  const int64_t pixels = p.sizes.pixels(), count = generalized_conv_blocks(p.sizes);
  for (int64_t part = begin; part < end; ++part) {
    WeightSum sum(p, blocks, part);
    by_images(p.sizes, kBlockPixels, part * count / parts, (part + 1) * count / parts,
              [&](int64_t b, int64_t first, int64_t last) {
                sum(p.outer + b * pixels * p.N, p.middle + b * pixels * p.sizes.M, first, last);
              });
  }
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
