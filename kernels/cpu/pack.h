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

// src (n, D) with stride -> dst (n, padded), zero beyond D.
template <typename E, typename T>
inline void pack_rows(T* dst, int64_t padded, const E* src, int64_t stride, int64_t n, int64_t D) {
  for (int64_t i = 0; i < n; ++i) {
    T* row = dst + i * padded;
    for (int64_t d = 0; d < D; ++d) row[d] = load_float(src + i * stride + d);
    for (int64_t d = D; d < padded; ++d) row[d] = 0;
  }
}

// src (n, D) with stride -> dst (n / lanes, D, lanes): each vector holds one column of `lanes` rows, zero beyond n.
template <typename E, typename T>
inline void pack_columns(T* dst, const E* src, int64_t stride, int64_t n, int64_t D) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W)
    for (int64_t d = 0; d < D; ++d) {
      const E* p = src + j * stride + d;
      T* out = dst + (j * D + d * W);
      for (int l = 0; l < W; ++l) out[l] = load_float(p + l * stride);
    }
  if (j < n)
    for (int64_t d = 0; d < D; ++d)
      for (int l = 0; l < W; ++l) dst[j * D + d * W + l] = j + l < n ? load_float(src + (j + l) * stride + d) : T(0);
}

// dst (n, D) with stride = src (n, padded) * factor.
template <typename E, typename T>
inline void unpack_rows(E* dst, int64_t stride, const T* src, int64_t padded, int64_t n, int64_t D, T factor) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t d = 0; d < D; ++d) store_float(dst + i * stride + d, src[i * padded + d] * factor);
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
