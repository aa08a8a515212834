// Vectors of 16 values. Written with the compiler's own vectors, which it splits where registers are shorter; only
// what has no such form uses intrinsics, each with a plain form beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

// LIFECYCLE_PLAIN is for tests: everything as a processor without these instructions computes it.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__) && !defined(LIFECYCLE_PLAIN)
#define LIFECYCLE_AVX512 1
#include <immintrin.h>
#else
#define LIFECYCLE_AVX512 0
#endif

#define LIFECYCLE_UNROLL _Pragma("GCC unroll 16")
#define LIFECYCLE_INLINE __attribute__((always_inline)) inline

namespace lifecycle {

constexpr int kLanes = 16;
typedef float v16f __attribute__((vector_size(64), may_alias));
typedef int32_t v16i __attribute__((vector_size(64), may_alias));
typedef uint8_t v64u __attribute__((vector_size(64), may_alias));
typedef int8_t v16c __attribute__((vector_size(16), may_alias));

template <typename V>
LIFECYCLE_INLINE V load(const void* from) {
  V found;
  std::memcpy(&found, from, sizeof(V));
  return found;
}

template <typename V>
LIFECYCLE_INLINE void store(void* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// Up to 16 values of four bytes, zeros behind them.
template <typename V = v16f>
LIFECYCLE_INLINE V some(const void* from, size_t count) {
  if (count >= kLanes) return load<V>(from);
  V found{};
  std::memcpy(&found, from, count * sizeof(float));
  return found;
}

template <typename V>
LIFECYCLE_INLINE void put(void* to, V values, size_t count) {
  if (count >= kLanes) return store(to, values);
  std::memcpy(to, &values, count * sizeof(float));
}

LIFECYCLE_INLINE v16f spread(float value) { return value - v16f{}; }
LIFECYCLE_INLINE v16i spread(int32_t value) { return value - v16i{}; }
LIFECYCLE_INLINE v16f to_float(v16i x) { return __builtin_convertvector(x, v16f); }
// Compilers turn these conversions into single moves where they are written as such only.
LIFECYCLE_INLINE v16i widened(v16c x) {
#if LIFECYCLE_AVX512
  return (v16i)_mm512_cvtepi8_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, v16i);
#endif
}
LIFECYCLE_INLINE v16c narrowed(v16i x) {
#if LIFECYCLE_AVX512
  return (v16c)_mm512_cvtepi32_epi8((__m512i)x);
#else
  return __builtin_convertvector(x, v16c);
#endif
}
LIFECYCLE_INLINE v16f select(v16i mask, v16f yes, v16f no) {
  return (v16f)((mask & (v16i)yes) | (~mask & (v16i)no));
}
// The larger of each pair; where either is no number, `b`.
LIFECYCLE_INLINE v16f larger(v16f a, v16f b) {
#if LIFECYCLE_AVX512
  return (v16f)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return select(a > b, a, b);
#endif
}
LIFECYCLE_INLINE v16i larger(v16i a, v16i b) { return (v16i)select(a > b, (v16f)a, (v16f)b); }

LIFECYCLE_INLINE v16f magnitude(v16f x) { return (v16f)((v16i)x & 0x7fffffff); }
// Whether a comparison holds in all lanes.
LIFECYCLE_INLINE bool all(v16i mask) {
#if LIFECYCLE_AVX512
  return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
#else
  int32_t found = -1;
  for (int i = 0; i < kLanes; ++i) found &= mask[i];
  return found != 0;
#endif
}

template <typename T, typename V>
LIFECYCLE_INLINE T sum(V x) {
  T total = 0;
  LIFECYCLE_UNROLL for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

// The largest of numbers.
LIFECYCLE_INLINE float largest(v16f x) {
#if LIFECYCLE_AVX512
  return _mm512_reduce_max_ps((__m512)x);
#else
  float found = x[0];
  for (int i = 1; i < kLanes; ++i) found = x[i] > found ? x[i] : found;
  return found;
#endif
}

// Asks for memory that is read soon. At the end of a page the processor stops looking ahead by itself.
inline void expect(const void* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

// A product that stays one where a sum follows: with AVX512 the compiler must not make both one operation, rounded once.
LIFECYCLE_INLINE v16f rounded_product(v16f x) {
#if LIFECYCLE_AVX512
  asm("" : "+v"(x));
#endif
  return x;
}

// The nearest integers, halves to even, of values below 2^22.
LIFECYCLE_INLINE v16f rounded(v16f x) {
  const v16f magic = spread(12582912.0f);
  return (x + magic) - magic;
}

// acc + the sums of four products each, of the unsigned bytes of weights with 4 signed ones that all lanes share.
LIFECYCLE_INLINE v16i dot(v16i acc, v16i weights, int32_t four) {
#if LIFECYCLE_AVX512
  return (v16i)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, _mm512_set1_epi32(four));
#else
  LIFECYCLE_UNROLL for (int k = 0; k < 4; ++k) {
    acc += ((weights >> (8 * k)) & 255) * (int32_t)(int8_t)((uint32_t)four >> (8 * k));
  }
  return acc;
#endif
}

LIFECYCLE_INLINE float float_of(uint32_t bits) {
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

// a * b + c, rounded once where there are matrices, whose sums are added elsewhere: both have to have the same bits.
LIFECYCLE_INLINE v16f multiply_add(v16f a, v16f b, v16f c) {
#if LIFECYCLE_AVX512
  return (v16f)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

// x * 2^n of whole numbers n from -127 on.
LIFECYCLE_INLINE v16f scaled(v16f x, v16f n) {
#if LIFECYCLE_AVX512
  return (v16f)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const v16f bounded = select(n < spread(128.0f), n, spread(128.0f));
  return x * (v16f)((__builtin_convertvector(bounded, v16i) + 127) << 23);
#endif
}

// e to the power of x, within 2 units of the last place; exactly 1 at 0, and 0 below -87.
LIFECYCLE_INLINE v16f exponential(v16f x) {
  const v16f n = rounded(x * 1.44269504088896341f);
  const v16f r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  v16f p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return select(x < spread(-87.0f), v16f{}, scaled(p, n));
}

// f(0), f(1), .., f(N - 1), of numbers that are known to the compiler.
template <int N, typename F>
LIFECYCLE_INLINE void each(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// Rows of 16 values each as columns.
LIFECYCLE_INLINE void transpose16(v16f (&rows)[16]) {
#if LIFECYCLE_AVX512
  __m512 r[16], t[16];
  LIFECYCLE_UNROLL for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  LIFECYCLE_UNROLL for (int i = 0; i < 16; i += 4) {
    LIFECYCLE_UNROLL for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
  LIFECYCLE_UNROLL for (int i = 0; i < 16; i += 8) {
    LIFECYCLE_UNROLL for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
    }
  }
  LIFECYCLE_UNROLL for (int j = 0; j < 4; ++j) {
    rows[j] = (v16f)_mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
    rows[j + 4] = (v16f)_mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0x88);
    rows[j + 8] = (v16f)_mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
    rows[j + 12] = (v16f)_mm512_shuffle_f32x4(t[j + 4], t[j + 12], 0xdd);
  }
#else
  v16f columns[16];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) columns[j][i] = rows[i][j];
  for (int i = 0; i < 16; ++i) rows[i] = columns[i];
#endif
}

}  // namespace lifecycle
