// What C++ tests of kernels share: element types, and tensors that end where their memory ends.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "../../kernels/common/dtype.h"
#include "../../kernels/common/half.h"
#include "check.h"

namespace fastib {

// Unit roundoff of the element and of the arithmetic, and the conversions the kernels do not offer in double.
template <typename T>
struct Element;
template <>
struct Element<float> {
  using Sum = float;
  static constexpr DType dtype = DType::float32;
  static constexpr double unit = 0x1p-24, sum_unit = 0x1p-24;
  static float from(double x) { return static_cast<float>(x); }
  static double to(float x) { return x; }
};
template <>
struct Element<double> {
  using Sum = double;
  static constexpr DType dtype = DType::float64;
  static constexpr double unit = 0x1p-53, sum_unit = 0x1p-53;
  static double from(double x) { return x; }
  static double to(double x) { return x; }
};
template <>
struct Element<bfloat16> {
  using Sum = float;
  static constexpr DType dtype = DType::bfloat16;
  static constexpr double unit = 0x1p-8, sum_unit = 0x1p-24;
  static bfloat16 from(double x) { return to_bfloat16(static_cast<float>(x)); }
  static double to(bfloat16 x) { return to_float(x); }
};
template <>
struct Element<float16> {
  using Sum = float;
  static constexpr DType dtype = DType::float16;
  static constexpr double unit = 0x1p-11, sum_unit = 0x1p-24;
  static float16 from(double x) { return to_float16(static_cast<float>(x)); }
  static double to(float16 x) { return to_float(x); }
};

// Memory on cache lines, as torch gives it.
template <typename E>
struct OnLines {
  using value_type = E;
  OnLines() = default;
  template <typename Other>
  OnLines(const OnLines<Other>&) {}
  E* allocate(size_t n) { return static_cast<E*>(::operator new(n * sizeof(E), std::align_val_t(64))); }
  void deallocate(E* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const OnLines&) const { return true; }
  bool operator!=(const OnLines&) const { return false; }
};
template <typename E>
using Memory = std::vector<E, OnLines<E>>;

constexpr double kGuard = 7.0;

// A tensor whose dimensions lie in memory in `order`, a gap after the innermost group, and nothing after its last
// element.
template <typename E, size_t n>
struct Tensor {
  std::vector<int64_t> sizes;
  int64_t stride[n];
  Memory<E> data;

  Tensor(const int64_t (&shape)[n], const int (&order)[n], size_t gap_at, int64_t gap) : sizes(shape, shape + n) {
    int64_t step = 1, last = 0;
    for (size_t k = n; k-- > 0;) {
      stride[order[k]] = step, step *= shape[order[k]];
      if (k == gap_at) step += gap;
    }
    for (size_t k = 0; k < n; ++k) last += (shape[k] - 1) * stride[k];
    data.assign(last + 1, Element<E>::from(kGuard));
  }

  template <typename F>
  void each(F&& f) {
    int64_t at[n] = {};
    for (bool more = true; more;) {
      int64_t offset = 0;
      for (size_t k = 0; k < n; ++k) offset += at[k] * stride[k];
      f(data[offset]);
      more = false;
      for (size_t k = n; k-- > 0 && !more;)
        if (++at[k] < sizes[k])
          more = true;
        else
          at[k] = 0;
    }
  }
};

// Checks each element against its exact value. size: of the sum that it is, the sum of the terms' absolute values.
// steps: how many roundings of the size pass. What lies between the elements must not have been written.
template <typename E, size_t n>
void compare(Tensor<E, n>& tensor, const std::vector<double>& exact, const std::vector<double>& size,
             const std::string& where, double steps = 200) {
  size_t k = 0, written = 0;
  tensor.each([&](E& e) {
    const double error = std::fabs(Element<E>::to(e) - exact[k]);
    const double smallest = Element<E>::dtype == DType::float16 ? 0x1p-25 : 1e-30;  // half a step near 0
    const double allowed =
        1.01 * Element<E>::unit * std::fabs(exact[k]) + steps * Element<E>::sum_unit * size[k] + smallest;
    CHECK(error <= allowed, where, " element ", k, " error ", error, " allowed ", allowed);
    ++k;
  });
  for (E e : tensor.data) written += Element<E>::to(e) != kGuard;
  CHECK(written <= k, where, " wrote between its elements");
}

template <typename E>
bool same(const Memory<E>& a, const Memory<E>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(E)) == 0;
}

}  // namespace fastib
