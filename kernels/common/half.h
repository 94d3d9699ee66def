// bfloat16 and float16 as bit patterns, converted to and from float with round-to-nearest-even.
//
// The selects are branch-free, so loops over them vectorize. On a GPU one instruction does the same.
#pragma once

#include <cstdint>
#include <cstring>

#include "inline.h"

namespace fastib {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

FASTIB_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FASTIB_INLINE float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

FASTIB_INLINE float to_float(bfloat16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

FASTIB_INLINE float to_float(float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7FFFu;
  const uint32_t normal = (rest << 13) + (112u << 23);
  const uint32_t special = (rest << 13) | 0x7F800000u;  // infinity or NaN
  const uint32_t subnormal = float_bits(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  const uint32_t magnitude = rest >= 0x7C00u ? special : rest < 0x0400u ? subnormal : normal;
  return bits_float(sign | magnitude);
#endif
}

FASTIB_INLINE bfloat16 to_bfloat16(float x) {
#if defined(__CUDA_ARCH__)
  bfloat16 narrow;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
#else
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(nan ? (bits >> 16) | 0x0040u : rounded)};
#endif
}

FASTIB_INLINE float16 to_float16(float x) {
#if defined(__CUDA_ARCH__)
  float16 narrow;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow.bits) : "f"(x));
  return narrow;
#else
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude + 0x0FFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24, whose count is in the low bits.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? 0x7C00u : result;  // 65520 and above round to infinity
  result = magnitude > 0x7F800000u ? 0x7E00u : result;
  return {static_cast<uint16_t>(sign | result)};
#endif
}

FASTIB_INLINE float load_float(const float* p) { return *p; }
FASTIB_INLINE float load_float(const bfloat16* p) { return to_float(*p); }
FASTIB_INLINE float load_float(const float16* p) { return to_float(*p); }

FASTIB_INLINE void store_float(float* p, float x) { *p = x; }
FASTIB_INLINE void store_float(bfloat16* p, float x) { *p = to_bfloat16(x); }
FASTIB_INLINE void store_float(float16* p, float x) { *p = to_float16(x); }

}  // namespace fastib
