// Copies of strided rows into dense, padded scratch in the compute type, and back.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "../common/dtype.h"
#include "../common/half.h"
#include "simd.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// The compute type of a stored type: double for double, float for the rest.
template <typename E>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <typename E>
using Compute = typename ComputeType<E>::type;

using fastib::load_float;
using fastib::store_float;
inline double load_float(const double* p) { return *p; }
inline void store_float(double* p, double x) { *p = x; }

template <typename T>
inline int64_t round_to_lanes(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// Rows of a tensor; the stride is in elements.
template <typename E>
struct Rows {
  E* p;
  int64_t stride;
  E* row(int64_t i) const { return p + i * stride; }
  Rows from(int64_t i) const { return {row(i), stride}; }
};

// The first n rows of `first`, then those of `rest`.
template <typename E>
struct JoinedRows {
  Rows<E> first;
  int64_t n;
  Rows<E> rest;
  E* row(int64_t i) const { return i < n ? first.row(i) : rest.row(i - n); }
  JoinedRows from(int64_t i) const { return {first.from(i), n - i, rest}; }
};

template <typename E>
JoinedRows<E> only(Rows<E> rows) {
  return {rows, 0, rows};
}

// f of an element of the stored type that `dtype` names.
template <typename F>
inline void with_element(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::bfloat16:
      return f(bfloat16{});
    case DType::float16:
      return f(float16{});
    case DType::float64:
      return f(double{});
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// One vector of stored elements in the compute type, and back.
template <typename T>
inline Vec<T> load_row(const T* p) {
  return load(p);
}

template <typename T>
inline void store_row(T* p, Vec<T> x) {
  store(p, x);
}

using Words = uint16_t __attribute__((vector_size(kVectorBytes / 2)));
using WideWords = uint32_t __attribute__((vector_size(kVectorBytes)));

inline Vec<float> load_row(const bfloat16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  Words words;
  std::memcpy(&words, p, sizeof(words));
  return (Vec<float>)(__builtin_convertvector(words, WideWords) << 16);
#endif
}

#if !defined(__AVX512BF16__)
// The bits of to_bfloat16 in the upper half of every lane, anything in the lower.
inline WideWords rounded_bfloat16(Vec<float> x) {
  const WideWords bits = (WideWords)x;
  const auto nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return nan ? bits | 0x00400000u : bits + 0x7FFFu + ((bits >> 16) & 1u);
}
#endif

// to_bfloat16 of every lane. Where the processor has an instruction for it, numbers too small for a full mantissa
// become 0, as they do in its products of bfloat16.
inline void store_row(bfloat16* p, Vec<float> x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  const Words words = __builtin_convertvector(rounded_bfloat16(x) >> 16, Words);
  std::memcpy(p, &words, sizeof(words));
#endif
}

inline Vec<float> load_row(const float16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  float lanes[kLanes<float>];
  for (int l = 0; l < kLanes<float>; ++l) lanes[l] = load_float(p + l);
  return load(lanes);
#endif
}

inline void store_row(float16* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  float lanes[kLanes<float>];
  store(lanes, x);
  for (int l = 0; l < kLanes<float>; ++l) store_float(p + l, lanes[l]);
#endif
}

// Two vectors of stored elements in whatever order is cheapest; store_two puts them back in it.
template <typename E, typename V>
inline void load_two(const E* p, V& a, V& b) {
  a = load_row(p), b = load_row(p + sizeof(V) / sizeof(a[0]));
}

template <typename E, typename V>
inline void store_two(E* p, V a, V b) {
  store_row(p, a), store_row(p + sizeof(V) / sizeof(a[0]), b);
}

inline void load_two(const bfloat16* p, Vec<float>& even, Vec<float>& odd) {
  WideWords pairs;
  std::memcpy(&pairs, p, sizeof(pairs));
  even = (Vec<float>)(pairs << 16), odd = (Vec<float>)(pairs & 0xFFFF0000u);
}

// Both rounded to bfloat16, even in the lower half of each lane.
inline WideWords pair_bfloat16(Vec<float> even, Vec<float> odd) {
#if defined(__AVX512BF16__)
  Vec<BFloat16Pair> order;
  for (int l = 0; l < 16; ++l) order[l] = l | (16 + l) << 16;
  const __m512bh words = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (WideWords)_mm512_permutexvar_epi16((__m512i)order, (__m512i)words);
#else
  return rounded_bfloat16(even) >> 16 | (rounded_bfloat16(odd) & 0xFFFF0000u);
#endif
}

inline void store_two(bfloat16* p, Vec<float> even, Vec<float> odd) {
  const WideWords pairs = pair_bfloat16(even, odd);
  std::memcpy(p, &pairs, sizeof(pairs));
}

// Transposes a square of vectors in place: swaps ever smaller blocks across the diagonal.
template <typename T, int kHalf = kLanes<T> / 2>
inline __attribute__((always_inline)) void transpose(Vec<T> (&x)[kLanes<T>]) {
  if constexpr (kHalf > 0) {
    constexpr auto low = [](int l) { return l & kHalf ? kLanes<T> + l - kHalf : l; };
    constexpr auto high = [](int l) { return l & kHalf ? kLanes<T> + l : l + kHalf; };
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if (!(i & kHalf)) {
        const Vec<T> a = x[i], b = x[i + kHalf];
        x[i] = shuffle<T>(a, b, low);
        x[i + kHalf] = shuffle<T>(a, b, high);
      }
    transpose<T, kHalf / 2>(x);
  }
}

// Lane l of the result is the sum of the lanes of x[l]; x is used up. A step adds the odd to the even parts of two
// vectors: lanes within 16 bytes, then groups of 16 bytes, which shuffles without a vector of indices can do.
template <typename T, int kCount = kLanes<T>>
inline __attribute__((always_inline)) Vec<T> sum_each(Vec<T> (&x)[kLanes<T>]) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    constexpr int W = kLanes<T>, kGroup = 16 / sizeof(T);
    constexpr int kSpan = kCount > W / kGroup ? kGroup : W, kPart = kCount > W / kGroup ? 1 : kGroup;
    constexpr auto even = [](int l) {
      const int at = l % kSpan, half = kSpan / 2;
      return l - at + (at < half ? 0 : W) + at % half / kPart * 2 * kPart + at % kPart;
    };
    constexpr auto odd = [even](int l) { return even(l) + kPart; };
#pragma GCC unroll 8
    for (int i = 0; i < kCount / 2; ++i)
      x[i] = shuffle<T>(x[2 * i], x[2 * i + 1], even) + shuffle<T>(x[2 * i], x[2 * i + 1], odd);
    return sum_each<T, kCount / 2>(x);
  }
}

// from (n, D) -> dst (n, padded), zero beyond D.
template <template <typename> class R, typename E, typename T>
inline void pack_rows(T* dst, int64_t padded, R<const E> from, int64_t n, int64_t D) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < n; ++i, dst += padded) {
    const E* src = from.row(i);
    int64_t d = 0;
    for (; d + W <= D; d += W) store(dst + d, load_row(src + d));
    for (; d < padded; ++d) dst[d] = d < D ? load_float(src + d) : T(0);
  }
}

// from (n, D) -> dst (n / lanes, D, lanes): each vector holds one column of `lanes` rows, zero beyond n.
template <template <typename> class R, typename E, typename T>
inline void pack_columns(T* dst, R<const E> from, int64_t n, int64_t D) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < n; j += W, dst += W * D) {
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      Vec<T> square[W] = {};
      for (int l = 0; l < W && j + l < n; ++l) square[l] = load_row(from.row(j + l) + d);
      transpose<T>(square);
      for (int l = 0; l < W; ++l) store(dst + (d + l) * W, square[l]);
    }
    for (; d < D; ++d)
      for (int l = 0; l < W; ++l) dst[d * W + l] = j + l < n ? load_float(from.row(j + l) + d) : T(0);
  }
}

// A matrix in vectors (lanes / W, steps, W), zero beyond its lanes. Element (lane, step) is at
// p[lane * lane_stride + step * step_stride], one of the strides 1.
inline void pack_matrix(float* to, const float* p, int64_t lanes, int64_t lane_stride, int64_t steps,
                        int64_t step_stride) {
  constexpr int W = kLanes<float>;
  if (step_stride == 1) return pack_columns(to, Rows<const float>{p, lane_stride}, lanes, steps);
  for (int64_t at = 0; at < lanes; at += W)
    pack_rows(to + at * steps, W, Rows<const float>{p + at, step_stride}, steps, smaller(W, lanes - at));
}

// to (n, D) = src (n, padded) * factor.
template <template <typename> class R, typename E, typename T>
inline void unpack_rows(R<E> to, const T* src, int64_t padded, int64_t n, int64_t D, T factor) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < n; ++i, src += padded) {
    E* dst = to.row(i);
    int64_t d = 0;
    for (; d + W <= D; d += W) store_row(dst + d, load(src + d) * factor);
    for (; d < D; ++d) store_float(dst + d, src[d] * factor);
  }
}

template <typename E>
inline Compute<E> dot(const E* a, const E* b, int64_t D) {
  using T = Compute<E>;
  constexpr int W = kLanes<T>;
  Vec<T> sum{};
  int64_t d = 0;
  for (; d + W <= D; d += W) sum += load_row(a + d) * load_row(b + d);
  T rest = 0;
  for (; d < D; ++d) rest += load_float(a + d) * load_float(b + d);
  return horizontal_sum<T>(sum) + rest;
}

// Scratch of one thread: grows, is kept for the next call and freed with the thread.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  // Makes room for `bytes`; what was handed out before is gone.
  bool reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    std::free(memory_);
    memory_ = static_cast<char*>(std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign));
    size_ = memory_ ? bytes : 0;
    return memory_ != nullptr;
  }

  template <typename T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(memory_ + used_);
    used_ += padded_bytes<T>(n);
    return p;
  }

  template <typename T>
  static int64_t padded_bytes(int64_t n) {
    return (n * static_cast<int64_t>(sizeof(T)) + kVectorBytes + kAlign - 1) / kAlign * kAlign;
  }

 private:
  static constexpr int64_t kAlign = 64;
  char* memory_ = nullptr;
  int64_t size_ = 0;
  int64_t used_ = 0;
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
