/* Loops that touch registers alone: what the arithmetic units of one core do at best. Built by ceilings.py with
   -march=native, for this machine only. Each function does `iterations` rounds and returns the operations per round. */
#include <stdint.h>

#if defined(__AVX512F__)
#define BYTES 64
#define CHAINS 24
#elif defined(__AVX__)
#define BYTES 32
#define CHAINS 12
#else
#define BYTES 16
#define CHAINS 24
#endif

typedef float vector __attribute__((vector_size(BYTES)));
#define LANES ((int)(BYTES / sizeof(float)))

/* Keeps a value in a register and out of the optimiser's sight. */
#if defined(__x86_64__)
#define PIN(x) __asm__ volatile("" : "+x"(x))
#elif defined(__aarch64__)
#define PIN(x) __asm__ volatile("" : "+w"(x))
#else
#define PIN(x) __asm__ volatile("" : "+m"(x))
#endif

double fma_float32(int64_t iterations) {
  vector acc[CHAINS], a = {0}, b = {0};
  a += 0.999f;
  b += 0.001f;
  for (int c = 0; c < CHAINS; ++c) acc[c] = a + (float)c;
  PIN(a);
  PIN(b);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < CHAINS; ++c) acc[c] = acc[c] * a + b;
#pragma GCC unroll 24
    for (int c = 0; c < CHAINS; ++c) PIN(acc[c]);
  }
  return 2.0 * CHAINS * LANES;
}

#if defined(__AVX512BF16__)
#include <immintrin.h>

double dot_bfloat16(int64_t iterations) {
  __m512 acc[24];
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00), b = (__m512bh)_mm512_set1_epi16(0x3c01);
  for (int c = 0; c < 24; ++c) acc[c] = _mm512_set1_ps((float)c);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 24
    for (int c = 0; c < 24; ++c) acc[c] = _mm512_dpbf16_ps(acc[c], a, b);
#pragma GCC unroll 24
    for (int c = 0; c < 24; ++c) PIN(acc[c]);
  }
  return 2.0 * 2.0 * 24 * 16;
}
#else
/* 0: this processor has no bfloat16 dot product. */
double dot_bfloat16(int64_t iterations) {
  (void)iterations;
  return 0.0;
}
#endif
