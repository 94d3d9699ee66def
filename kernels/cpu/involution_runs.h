// What the kernels of involution share: the tensors of a unit of work, and runs of taps.
#pragma once

#include <new>

#include "involution.h"
#include "involution_weights.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

template <typename E>
Image<E> image(E* p, const int64_t (&stride)[4], int64_t b, int64_t c, int64_t rows, int64_t columns) {
  return {p + b * stride[0] + c * stride[1], stride[1], stride[2], stride[3], rows, columns};
}

template <typename E>
Weights<E> weights(E* p, const int64_t (&stride)[6], int64_t b, int64_t g) {
  return {p + b * stride[0] + g * stride[1], stride[2], stride[3], stride[4], stride[5]};
}

// The rows [begin, end) of pair (b, g) that a unit of work stands for, of an image with `rows` rows.
struct Band {
  int64_t b, g, begin, end;
};

inline Band band(const InvolutionParams& p, int64_t unit, int64_t rows) {
  const int64_t bands = involution_bands(p), pair = unit / bands, k = unit % bands;
  return {pair / p.G, pair % p.G, k * rows / bands, (k + 1) * rows / bands};
}

inline int64_t most_rows(const InvolutionParams& p, int64_t rows) {
  const int64_t bands = involution_bands(p);
  return (rows + bands - 1) / bands;
}

inline int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

// Takes scratch memory in two passes: the first adds up, the second hands out. What is handed out holds zeros.
class Layout {
 public:
  explicit Layout(Scratch* scratch) : scratch_(scratch) {}

  template <typename T>
  void take(T*& p, int64_t n) {
    bytes_ += Scratch::padded_bytes<T>(n);
    if (!scratch_) return;
    p = scratch_->take<T>(n);
    std::memset(static_cast<void*>(p), 0, n * sizeof(T));
  }

  int64_t bytes() const { return bytes_; }

 private:
  Scratch* scratch_;
  int64_t bytes_ = 0;
};

// Gives each of `works` its memory, as its member lay_out says.
template <typename... Works>
void give_memory(Scratch& scratch, Works&... works) {
  Layout sizes(nullptr);
  (works.lay_out(sizes), ...);
  if (!scratch.reserve(sizes.bytes())) throw std::bad_alloc();
  Layout memory(&scratch);
  (works.lay_out(memory), ...);
}

// Points a row of tiles at the weights that the next row will read: row i for the first run, from row u of taps on, and
// `rise` rows less for each run that follows. The many short rows of a kernel map are beyond the hardware's guess.
template <typename E>
void look_ahead(TapRow& row, const InvolutionParams& p, const Weights<const E>& w, int64_t u, int64_t i, int64_t rise) {
  constexpr int64_t size = sizeof(E), line = 64;
  const int64_t pixels = smaller(p.Wo, kAheadPixels) - 1;
  row.ahead_pixel = w.column * size;
  if (p.channels_last) {  // pixels in turn, a line of each in every second run
    row.ahead = reinterpret_cast<const char*>(w.at(0, 0, i, 0));
    row.ahead_tap = pixels > 0 ? 2 * row.ahead_pixel : 0;
    row.ahead_run[0] = pixels > 0 ? row.ahead_pixel : 0, row.ahead_run[1] = line - row.ahead_run[0];
  } else {
    row.ahead = reinterpret_cast<const char*>(w.at(u, 0, i, pixels));
    row.ahead_tap = w.v * size;
    row.ahead_run[0] = row.ahead_run[1] = (w.u - rise * w.row) * size;
  }
}

// Up to `most` runs of `taps` taps. A run for whose length no function is compiled is cut into runs of one tap.
template <typename M>
class Runs {
 public:
  // Pixel p and tap t meet in column p * s + t * d, d counted in units.
  void init(int64_t most, int64_t taps, int64_t s, int64_t d) {
    constexpr int64_t W = kLanes<typename M::Sum>;
    const int64_t g = common_divisor(s, d);
    most_ = most, x_tap_ = d * W, taps_ = taps;
    function_ = tap_row_function<M>(taps, s / g, d / g);
    cut_ = !function_;
    if (cut_) function_ = tap_row<M, 1, 1, 1>;
    row.x_step = (cut_ || taps == 1 ? s : g) * W;
  }

  void lay_out(Layout& memory) {
    memory.take(x_offset_, most_ * taps_);
    memory.take(w_offset_, most_ * taps_);
  }

  void clear() {
    row.runs = 0;
    row.x_offset = x_offset_, row.w_offset = w_offset_;
  }

  void add(int64_t x_offset, int64_t w_offset) {
    for (int64_t t = 0; t < (cut_ ? taps_ : taps_ ? 1 : 0); ++t) {
      x_offset_[row.runs] = x_offset + t * x_tap_;
      w_offset_[row.runs++] = w_offset + t * row.w_tap;
    }
  }

  void operator()(const typename M::Unit* x, const typename M::Unit* w, typename M::Sum* out, int64_t pixels) const {
    function_(row, x, w, out, pixels);
  }

  TapRow row{};

 private:
  TapRowFunction<M> function_ = nullptr;
  bool cut_ = false;
  int64_t most_ = 0, x_tap_ = 0, taps_ = 0;
  int64_t *x_offset_ = nullptr, *w_offset_ = nullptr;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
