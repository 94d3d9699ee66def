// bfloat16 and float16: every bit pattern there and back, and rounding to nearest even against arithmetic in double.
#include "../../kernels/common/half.h"

#include <limits>
#include <random>

#include "check.h"

using namespace fastib;

// The value of a pattern with `exponent_bits` and `mantissa_bits`, from the definition of the format.
static double decode(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const double sign = bits >> 15 ? -1.0 : 1.0;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  return sign * (exponent ? std::ldexp(1 + fraction, exponent - bias) : std::ldexp(fraction, 1 - bias));
}

template <typename T>
static T round_to(float x);
template <>
bfloat16 round_to<bfloat16>(float x) {
  return to_bfloat16(x);
}
template <>
float16 round_to<float16>(float x) {
  return to_float16(x);
}

template <typename T>
static void check_format(int exponent_bits, int mantissa_bits) {
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const T value{static_cast<uint16_t>(bits)};
    const double expected = decode(bits, exponent_bits, mantissa_bits);
    const float got = to_float(value);
    if (std::isnan(expected)) {
      CHECK(std::isnan(got) && std::isnan(to_float(round_to<T>(got))), bits);
    } else {
      CHECK(got == expected && std::signbit(got) == std::signbit(expected), bits, " gives ", got);
      CHECK(round_to<T>(got).bits == bits, bits);
    }
  }
  // Between neighbours: nearest wins, a tie goes to the even pattern. The largest finite value's neighbour is infinity.
  const uint32_t infinity = ((1u << exponent_bits) - 1) << mantissa_bits;
  for (uint32_t bits = 0; bits < infinity; ++bits) {
    const double low = decode(bits, exponent_bits, mantissa_bits);
    const double high = bits + 1 < infinity ? decode(bits + 1, exponent_bits, mantissa_bits)
                                            : 2 * low - decode(bits - 1, exponent_bits, mantissa_bits);
    const float middle = static_cast<float>((low + high) / 2);
    if (middle != (low + high) / 2) continue;
    CHECK(round_to<T>(middle).bits == bits + (bits & 1), bits);
    CHECK(round_to<T>(std::nextafter(middle, 0.0f)).bits == bits, bits);
    CHECK(round_to<T>(std::nextafter(middle, std::numeric_limits<float>::infinity())).bits == bits + 1, bits);
    CHECK(round_to<T>(-middle).bits == (0x8000u | (bits + (bits & 1))), bits);
  }
}

int main() {
  check_format<bfloat16>(8, 7);
  check_format<float16>(5, 10);
  float16 stored;
  store_float(&stored, 1.5f);
  CHECK(load_float(&stored) == 1.5f && stored.bits == 0x3E00);
  return report();
}
