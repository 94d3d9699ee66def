// Rows that will be needed soon, asked for while something else is computed.
#pragma once

#include <cstdint>

#include "pack.h"

namespace fastib::FASTIB_ISA_NAMESPACE {

// Asks for the cache lines of some bytes, to be read or written, for the second cache. Part of a function that calls
// `asm volatile("")`: calls of one that only prefetches would be removed.
template <int kWrite>
inline __attribute__((always_inline)) void ask_for_lines(const void* p, int64_t bytes) {
  const intptr_t begin = reinterpret_cast<intptr_t>(p);
  for (intptr_t line = begin & -64; line < begin + bytes; line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(line), kWrite, 2);
}

// One or two tensors of rows of D elements each, or nothing.
class Ahead {
 public:
  Ahead() = default;
  template <typename A>
  Ahead(JoinedRows<A> a, int64_t D) : a_(bytes(a)), length_(D * sizeof(A)) {}
  template <typename A, typename B>
  Ahead(JoinedRows<A> a, JoinedRows<B> b, int64_t D) : a_(bytes(a)), b_(bytes(b)), length_(D * sizeof(A)) {
    static_assert(sizeof(A) == sizeof(B));
  }

  // Rows [m, m + n) of each, to lie in the second cache.
  void operator()(int64_t m, int64_t n) const {
    if (length_ == 0) return;
    prefetch(a_, m, n);
    if (b_.rest.p) prefetch(b_, m, n);
  }

 private:
  template <typename E>
  static Rows<const char> bytes(Rows<E> rows) {
    return {reinterpret_cast<const char*>(rows.p), rows.stride * static_cast<int64_t>(sizeof(E))};
  }
  template <typename E>
  static JoinedRows<const char> bytes(JoinedRows<E> rows) {
    return {bytes(rows.first), rows.n, bytes(rows.rest)};
  }

  __attribute__((noinline)) void prefetch(const JoinedRows<const char>& rows, int64_t m, int64_t n) const {
    asm volatile("");
    for (int64_t i = m; i < m + n; ++i) ask_for_lines<0>(rows.row(i), length_);
  }

  JoinedRows<const char> a_{}, b_{};
  int64_t length_ = 0;  // of a row in bytes
};

}  // namespace fastib::FASTIB_ISA_NAMESPACE
