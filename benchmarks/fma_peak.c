/* Loops that touch registers alone: what the arithmetic units of one core do at best. Built by ceilings.py with
   -march=native, for this machine only. Each function does `iterations` rounds and returns the operations per round.
   The accumulators are variables of their own: an array of them would be kept in memory. */
#include <stdint.h>

#if defined(__AVX512F__)
#define BYTES 64
#define CHAINS 24
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11) f(12) f(13) f(14) f(15) f(16) f(17) \
    f(18) f(19) f(20) f(21) f(22) f(23)
#elif defined(__AVX__)
#define BYTES 32
#define CHAINS 12
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#else
#define BYTES 16
#define CHAINS 12
#define EACH(f) f(0) f(1) f(2) f(3) f(4) f(5) f(6) f(7) f(8) f(9) f(10) f(11)
#endif

typedef float vector __attribute__((vector_size(BYTES)));
#define LANES ((int)(BYTES / sizeof(float)))

/* Keeps a value in a register and out of the optimiser's sight. */
#if defined(__AVX512F__)
#define PIN(x) __asm__ volatile("" : "+v"(x))
#elif defined(__x86_64__)
#define PIN(x) __asm__ volatile("" : "+x"(x))
#elif defined(__aarch64__)
#define PIN(x) __asm__ volatile("" : "+w"(x))
#else
#define PIN(x) __asm__ volatile("" : "+m"(x))
#endif

double fma_float32(int64_t iterations) {
  vector a = {0}, b = {0};
  a += 0.999f;
  b += 0.001f;
  PIN(a);
  PIN(b);
#define BEGIN(c) vector acc##c = a + (float)c;
#define FMA(c) acc##c = acc##c * a + b;
#define HOLD(c) PIN(acc##c);
  EACH(BEGIN)
  for (int64_t i = 0; i < iterations; ++i) {
    EACH(FMA)
    EACH(HOLD)
  }
  return 2.0 * CHAINS * LANES;
}

#if defined(__AVX512BF16__)
#include <immintrin.h>

double dot_bfloat16(int64_t iterations) {
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00), b = (__m512bh)_mm512_set1_epi16(0x3c01);
#define BEGIN_DOT(c) __m512 dot##c = _mm512_set1_ps((float)c);
#define DOT(c) dot##c = _mm512_dpbf16_ps(dot##c, a, b);
#define HOLD_DOT(c) PIN(dot##c);
  EACH(BEGIN_DOT)
  for (int64_t i = 0; i < iterations; ++i) {
    EACH(DOT)
    EACH(HOLD_DOT)
  }
  return 2.0 * 2.0 * CHAINS * 16;
}
#else
/* 0: this processor has no bfloat16 dot product. */
double dot_bfloat16(int64_t iterations) {
  (void)iterations;
  return 0.0;
}
#endif
