// The per-head shift on every instruction set of this machine against plain loops: tensors that end where their memory
// ends, strides with gaps, any split of the work.
#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "../../kernels/cpu/dispatch.h"
#include "../../kernels/cpu/generalized_conv.h"
#include "check.h"

using namespace fastib;

struct Case {
  int64_t B, H, D, rows, columns, gap;  // gap: elements left out after each row of the dense dimension
  bool channels_last, inverse;
};

constexpr uint8_t kGuard = 0xA5;

// Strides of an image in the case's layout; returns how many elements it reaches over.
int64_t lay_out(const Case& c, int64_t (&stride)[4]) {
  const int64_t C = c.H * c.D;
  if (c.channels_last)
    stride[1] = 1, stride[3] = C + c.gap, stride[2] = stride[3] * c.columns, stride[0] = stride[2] * c.rows;
  else
    stride[3] = 1, stride[2] = c.columns + c.gap, stride[1] = stride[2] * c.rows, stride[0] = stride[1] * C;
  return 1 + (c.B - 1) * stride[0] + (C - 1) * stride[1] + (c.rows - 1) * stride[2] + (c.columns - 1) * stride[3];
}

template <typename E>
void run(const Case& c) {
  GeneralizedConvShiftParams p{};
  p.element_size = sizeof(E), p.channels_last = c.channels_last, p.inverse = c.inverse;
  p.B = c.B, p.H = c.H, p.D = c.D, p.rows = c.rows, p.columns = c.columns;
  std::vector<E> x(lay_out(c, p.x_stride)), out(lay_out(c, p.out_stride));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<E>(i * 2654435761u + 1);
  p.x = x.data(), p.out = out.data();

  std::vector<E> expected(out.size());
  std::memset(expected.data(), kGuard, expected.size() * sizeof(E));
  int64_t side = 1;
  while (side * side < c.H) ++side;
  for (int64_t b = 0; b < c.B; ++b)
    for (int64_t ch = 0; ch < c.H * c.D; ++ch)
      for (int64_t i = 0; i < c.rows; ++i)
        for (int64_t j = 0; j < c.columns; ++j) {
          const int64_t head = ch / c.D, sign = c.inverse ? -1 : 1;
          const int64_t row = i + sign * (head / side - (side - 1) / 2),
                        column = j + sign * (head % side - (side - 1) / 2);
          const bool inside = row >= 0 && row < c.rows && column >= 0 && column < c.columns;
          const auto at = [&](const int64_t (&s)[4], int64_t r, int64_t k) {
            return b * s[0] + ch * s[1] + r * s[2] + k * s[3];
          };
          expected[at(p.out_stride, i, j)] = inside ? x[at(p.x_stride, row, column)] : E(0);
        }

  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa);
    for (int64_t step : {generalized_conv_units(p), int64_t(1), int64_t(3)}) {
      std::memset(out.data(), kGuard, out.size() * sizeof(E));
      const int64_t units = generalized_conv_units(p);
      for (int64_t unit = 0; unit < units; unit += step) generalized_conv_shift(p, unit, std::min(unit + step, units));
      CHECK(std::memcmp(out.data(), expected.data(), out.size() * sizeof(E)) == 0, isa, " H", c.H, " D", c.D, " ",
            c.rows, "x", c.columns, c.channels_last ? " channels_last" : "", c.inverse ? " inverse" : "", " gap ",
            c.gap, " element ", sizeof(E), " step ", step);
    }
  }
}

int main() {
  for (bool channels_last : {false, true})
    for (bool inverse : {false, true})
      for (int64_t gap : {0, 3})
        for (int64_t H = 1; H <= 32; ++H)
          for (const auto& [D, rows, columns] :
               {std::array<int64_t, 3>{1, 1, 1}, {8, 3, 2}, {33, 4, 5}, {3, 7, 14}, {17, 2, 9}}) {
            const Case c{2, H, D, rows, columns, gap, channels_last, inverse};
            run<uint16_t>(c), run<uint32_t>(c), run<uint64_t>(c);
          }
  return report();
}
