// Rows of involution's weights as the tiles read them: in the unit of the products, zeros left and right of the image.
#pragma once

#include "involution_pack.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// The weights of one (image, group) pair, (K, K, rows, columns). Either the taps are dense or the columns are.
template <typename E>
struct Weights {
  E* p;
  int64_t u, v, row, column;
  E* at(int64_t tap_u, int64_t tap_v, int64_t i, int64_t j) const {
    return p + tap_u * u + tap_v * v + i * row + j * column;
  }
};

// Runs of the K weights of one row of taps. By pixel: dst (runs, columns, count), else (runs, count, columns), where
// count is the units of a run and columns go from -left to pitch - left.
// kReversed: the taps of the gradient to x come from the right, each from the next pixel. A pair t then holds tap
// K - 1 - 2t and, of the right neighbour, tap K - 2 - 2t; where taps are not dense, pixel 0 of pair t is 2t - left.
template <typename M, bool kReversed>
struct WeightRuns {
  using Unit = typename M::Unit;
  static constexpr int W = kLanes<typename M::Sum>;
  Unit* dst;
  int64_t K, count, columns, left, pitch;
  bool by_pixel;
  uint16_t* masks = nullptr;  // (count, blocks of W columns, 2) for pairs: lanes inside of the image, of either half

  static int64_t masks_needed(int64_t K, int64_t columns) { return 2 * units(K) * divide_up(columns, W); }

  void make_masks() const {
    uint16_t* mask = masks;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t a = 0; a < columns; a += W)
        for (int64_t half = 0; half < 2; ++half, ++mask) {
          const int64_t tap = kReversed ? K - 1 - 2 * t - half : 2 * t + half;
          const int64_t from = a + (kReversed ? 2 * t - left + half : 0);
          *mask = 0;
          for (int64_t l = 0; l < W; ++l)
            if (tap >= 0 && tap < K && from + l >= 0 && from + l < columns) *mask |= 1u << l;
        }
  }

  static int64_t units(int64_t K) { return M::paired ? (K + 1) / 2 : K; }
  // Units from pixel to pixel: 8 where that keeps the taps of a pixel in one line of the cache.
  static int64_t padded_units(int64_t K, bool by_pixel) { return by_pixel && units(K) > 4 && K < 8 ? 8 : units(K); }
  int64_t run_step() const { return count * pitch; }
  int64_t pixel_step() const { return by_pixel ? count : 1; }
  int64_t tap_step() const { return by_pixel ? 1 : pitch; }
  int64_t at(int64_t run, int64_t tap, int64_t column) const {
    return run * run_step() + tap * tap_step() + (column + left) * pixel_step();
  }

  template <typename E>
  void stage(int64_t run, const Weights<const E>& w, int64_t u, int64_t i) const {
    if constexpr (M::paired) {
      if (by_pixel)
        stage_pairs_by_pixel(run, w, u, i);
      else
        stage_pairs(run, w, u, i);
    } else {
      if (by_pixel)
        stage_pixels(run, w, u, i);
      else
        stage_columns(run, w, u, i);
    }
  }

 private:
  template <typename E>
  void stage_columns(int64_t run, const Weights<const E>& w, int64_t u, int64_t i) const {
    const int64_t taps = K, from_step = w.v, to_step = pitch, n = columns;
    for (int64_t j = 0; j < n; j += W) {
      const E* from = w.at(u, 0, i, j);
      Unit* to = dst + at(run, 0, j);
      const int64_t some = n - j;
      for (int64_t v = 0; v < taps; ++v) store(to + v * to_step, load_part(from + v * from_step, some));
    }
  }

  template <typename E>
  void stage_pixels(int64_t run, const Weights<const E>& w, int64_t u, int64_t i) const {
    const int64_t taps = K, from_step = w.column, to_step = count, n = columns;
    const E* from = w.at(u, 0, i, 0);
    Unit* to = dst + at(run, 0, 0);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<E, float>)
      if (taps <= 8) {
        for (int64_t j = 0; j < n; ++j, from += from_step, to += to_step)
          _mm256_storeu_ps(to, _mm256_maskz_loadu_ps((1u << taps) - 1, from));
        return;
      }
#endif
    for (int64_t j = 0; j < n; ++j, from += from_step, to += to_step)
      for (int64_t v = 0; v < taps; v += W) store(to + v, load_part(from + v, taps - v));
  }

  template <typename E>
  void stage_pairs([[maybe_unused]] int64_t run, [[maybe_unused]] const Weights<const E>& w, [[maybe_unused]] int64_t u,
                   [[maybe_unused]] int64_t i) const {
#if defined(__AVX512BF16__)
    const int64_t n = columns, units = count, to_step = pitch;
    const int64_t low_step = kReversed ? 2 - 2 * w.v : 2 * w.v, high = kReversed ? 1 - w.v : w.v;
    const E* low = w.at(u, kReversed ? K - 1 : 0, i, kReversed ? -left : 0);
    const uint16_t* mask = masks;
    Unit* to = dst + run * run_step();
    for (int64_t t = 0; t < units; ++t, low += low_step, to += to_step)
      for (int64_t a = 0; a < n; a += W, mask += 2)
        _mm512_storeu_si512(to + a, pair_up(_mm256_maskz_loadu_epi16(mask[0], low + a),
                                            _mm256_maskz_loadu_epi16(mask[1], low + high + a)));
#endif
  }

  template <typename E>
  void stage_pairs_by_pixel([[maybe_unused]] int64_t run, [[maybe_unused]] const Weights<const E>& w,
                            [[maybe_unused]] int64_t u, [[maybe_unused]] int64_t i) const {
#if defined(__AVX512BF16__)
    const __mmask16 taps = (1u << K) - 1;
    if constexpr (!kReversed) {
      const E* from = w.at(u, 0, i, 0);
      Unit* to = dst + at(run, 0, 0);
      for (int64_t j = 0, n = columns, step = w.column, units = count; j < n; ++j, from += step, to += units)
        _mm256_storeu_si256((__m256i*)to, _mm256_maskz_loadu_epi16(taps, from));
    } else {
      int16_t order[16];
      for (int k = 0; k < 16; ++k) {
        const int tap = static_cast<int>(K) - 1 - k;
        order[k] = static_cast<int16_t>(tap < 0 ? 15 : k % 2 ? 16 + tap : tap);  // 15: beyond the taps, 0
      }
      const __m256i pick = _mm256_loadu_si256((const __m256i*)order);
      __m256i here = _mm256_setzero_si256();
      const E* from = w.at(u, 0, i, 0);
      const int64_t first = left ? -1 : 0, n = columns, step = w.column, units = count;
      Unit* to = dst + at(run, 0, first);
      if (!left) here = _mm256_maskz_loadu_epi16(taps, from), from += step;
      for (int64_t j = first; j < n; ++j, from += step, to += units) {
        const __m256i next = _mm256_maskz_loadu_epi16(j + 1 < n ? taps : 0, from);
        _mm256_storeu_si256((__m256i*)to, _mm256_permutex2var_epi16(here, pick, next));
        here = next;
      }
    }
#endif
  }
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
