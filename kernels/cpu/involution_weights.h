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

  static int64_t units(int64_t K) { return M::paired ? (K + 1) / 2 : K; }
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
    } else if (by_pixel) {
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t v = 0; v < K; v += W) store(dst + at(run, v, j), load_part(w.at(u, v, i, j), K - v));
    } else {
      for (int64_t v = 0; v < K; ++v)
        for (int64_t j = 0; j < columns; j += W) store(dst + at(run, v, j), load_part(w.at(u, v, i, j), columns - j));
    }
  }

 private:
  template <typename E>
  void stage_pairs(int64_t run, const Weights<const E>& w, int64_t u, int64_t i) const {
#if defined(__AVX512BF16__)
    for (int64_t t = 0; t < count; ++t) {
      const int64_t low = kReversed ? K - 1 - 2 * t : 2 * t, high = kReversed ? low - 1 : low + 1;
      const int64_t shift = kReversed ? 2 * t - left : 0;
      Unit* to = dst + run * run_step() + t * pitch;
      for (int64_t a = 0; a < columns; a += W) {
        const int64_t from = a + shift, next = kReversed ? from + 1 : from;
        __m512i pair = load_halves(w.at(u, low, i, from), -from, columns - from);
        if (high >= 0 && high < K) pair = pair_up(pair, load_halves(w.at(u, high, i, next), -next, columns - next));
        _mm512_storeu_si512(to + a, pair);
      }
    }
#endif
  }

  template <typename E>
  void stage_pairs_by_pixel(int64_t run, const Weights<const E>& w, int64_t u, int64_t i) const {
#if defined(__AVX512BF16__)
    const __mmask16 taps = (1u << K) - 1;
    if constexpr (!kReversed) {
      for (int64_t j = 0; j < columns; ++j)
        _mm256_storeu_si256((__m256i*)(dst + at(run, 0, j)), _mm256_maskz_loadu_epi16(taps, w.at(u, 0, i, j)));
    } else {
      int16_t order[16];
      for (int k = 0; k < 16; ++k) {
        const int tap = static_cast<int>(K) - 1 - k;
        order[k] = static_cast<int16_t>(tap < 0 ? 15 : k % 2 ? 16 + tap : tap);  // 15: beyond the taps, 0
      }
      const __m256i pick = _mm256_loadu_si256((const __m256i*)order);
      __m256i here = _mm256_setzero_si256();
      for (int64_t j = left ? -1 : 0; j < columns; ++j) {
        if (j == 0 && !left) here = _mm256_maskz_loadu_epi16(taps, w.at(u, 0, i, 0));
        const bool inside = j + 1 < columns;
        const __m256i next = _mm256_maskz_loadu_epi16(inside ? taps : 0, w.at(u, 0, i, inside ? j + 1 : j));
        _mm256_storeu_si256((__m256i*)(dst + at(run, 0, j)), _mm256_permutex2var_epi16(here, pick, next));
        here = next;
      }
    }
#endif
  }
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
