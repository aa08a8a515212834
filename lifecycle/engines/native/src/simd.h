// What is done with vectors of 16 values. Only what the compiler's own have no form for uses intrinsics, each with a plain
// form beside it.
#pragma once

#include <utility>

#include "vectors.h"

namespace lifecycle {

// Up to 16 values of four bytes, zeros behind them.
template <typename V = v16f>
LIFECYCLE_INLINE V some(const void* from, size_t count) {
  if (count >= kLanes) return load<V>(from);
  V found{};
  std::memcpy(&found, from, count * sizeof(float));
  return found;
}

// 8 floats, zeros behind them.
LIFECYCLE_INLINE v16f half(const void* from) {
#if LIFECYCLE_AVX512
  return (v16f)_mm512_zextps256_ps512(_mm256_loadu_ps(static_cast<const float*>(from)));
#elif LIFECYCLE_AVX2
  return {load<v8f>(from), v8f{}};
#else
  return some(from, kLanes / 2);
#endif
}

template <typename V>
LIFECYCLE_INLINE void put(void* to, V values, size_t count) {
  if (count >= kLanes) return store(to, values);
  std::memcpy(to, &values, count * sizeof(float));
}

LIFECYCLE_INLINE v16f spread(float value) { return value - v16f{}; }
LIFECYCLE_INLINE v16i spread(int32_t value) { return value - v16i{}; }
LIFECYCLE_INLINE v16f to_float(v16i x) {
#if LIFECYCLE_AVX2
  return {__builtin_convertvector(x.low, v8f), __builtin_convertvector(x.high, v8f)};
#else
  return __builtin_convertvector(x, v16f);
#endif
}
// Of whole numbers.
LIFECYCLE_INLINE v16i to_integer(v16f x) {
#if LIFECYCLE_AVX2
  return {__builtin_convertvector(x.low, v8i), __builtin_convertvector(x.high, v8i)};
#else
  return __builtin_convertvector(x, v16i);
#endif
}
// Compilers turn these conversions into single moves where they are written as such only.
LIFECYCLE_INLINE v16i widened(v16c x) {
#if LIFECYCLE_AVX512
  return (v16i)_mm512_cvtepi8_epi32((__m128i)x);
#elif LIFECYCLE_AVX2
  return {(v8i)_mm256_cvtepi8_epi32((__m128i)x), (v8i)_mm256_cvtepi8_epi32(_mm_srli_si128((__m128i)x, 8))};
#else
  return __builtin_convertvector(x, v16i);
#endif
}
// Of values that bytes have room for.
LIFECYCLE_INLINE v16c narrowed(v16i x) {
#if LIFECYCLE_AVX512
  return (v16c)_mm512_cvtepi32_epi8((__m512i)x);
#elif LIFECYCLE_AVX2
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)x.low, (__m256i)x.high), 0xd8);
  return (v16c)_mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
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
#elif LIFECYCLE_AVX2
  return {(v8f)_mm256_max_ps((__m256)a.low, (__m256)b.low), (v8f)_mm256_max_ps((__m256)a.high, (__m256)b.high)};
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
#elif LIFECYCLE_AVX2
  return _mm256_movemask_epi8((__m256i)(mask.low & mask.high)) == -1;
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

// A product that stays one where a sum follows: where there are instructions for both at once, rounded once, the compiler
// must not use them.
LIFECYCLE_INLINE v16f rounded_product(v16f x) {
#if LIFECYCLE_AVX512
  asm("" : "+v"(x));
#elif LIFECYCLE_AVX2
  asm("" : "+x"(x.low), "+x"(x.high));
#endif
  return x;
}

// The nearest integers, halves to even, of values below 2^22.
LIFECYCLE_INLINE v16f rounded(v16f x) {
  const v16f magic = spread(12582912.0f);
  return (x + magic) - magic;
}

// Whether products of bytes are added in pairs first, which 16 bits may have room for.
constexpr bool kInPairs = (LIFECYCLE_AVX512 || LIFECYCLE_AVX2) && !LIFECYCLE_VNNI;

#if LIFECYCLE_AVX512 || LIFECYCLE_AVX2
// The sums of two products each of integers of 16 bits.
LIFECYCLE_INLINE v16i pair_products(v32s a, v32s b) {
#if LIFECYCLE_AVX512
  return (v16i)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return {(v8i)_mm256_madd_epi16((__m256i)a.low, (__m256i)b.low),
          (v8i)_mm256_madd_epi16((__m256i)a.high, (__m256i)b.high)};
#endif
}

// acc + the sums of two products each, of unsigned bytes of weights with signed ones that all lanes share; 16 bits have to
// have room for them.
LIFECYCLE_INLINE v32s dot_pairs(v32s acc, v16i weights, int32_t four) {
#if LIFECYCLE_AVX512
  return acc + (v32s)_mm512_maddubs_epi16((__m512i)weights, _mm512_set1_epi32(four));
#else
  const __m256i x = _mm256_set1_epi32(four);
  return acc + v32s{(v16s)_mm256_maddubs_epi16((__m256i)weights.low, x),
                    (v16s)_mm256_maddubs_epi16((__m256i)weights.high, x)};
#endif
}

// acc + the sums of two pairs each.
LIFECYCLE_INLINE v16i add_pairs(v16i acc, v32s pairs) { return acc + pair_products(pairs, (v32s)spread(0x00010001)); }
#else
// For code that is never made there (kInPairs).
v32s dot_pairs(v32s acc, v16i weights, int32_t four);
v16i add_pairs(v16i acc, v32s pairs);
#endif

// acc + the sums of four products each, of the unsigned bytes of weights with 4 signed ones that all lanes share.
LIFECYCLE_INLINE v16i dot(v16i acc, v16i weights, int32_t four) {
#if LIFECYCLE_VNNI && LIFECYCLE_AVX512
  return (v16i)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)weights, _mm512_set1_epi32(four));
#elif LIFECYCLE_VNNI
  const __m256i x = _mm256_set1_epi32(four);
  return {(v8i)_mm256_dpbusd_avx_epi32((__m256i)acc.low, (__m256i)weights.low, x),
          (v8i)_mm256_dpbusd_avx_epi32((__m256i)acc.high, (__m256i)weights.high, x)};
#elif LIFECYCLE_AVX512 || LIFECYCLE_AVX2
  // 16 bits have no room for two of them: every other one at a time.
  const v32s w = (v32s)weights, x = (v32s)spread(four);
  return acc + pair_products(w & 255, x << 8 >> 8) + pair_products((v32s)((v32w)w >> 8), x >> 8);
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
#elif LIFECYCLE_AVX2
  return {(v8f)_mm256_fmadd_ps((__m256)a.low, (__m256)b.low, (__m256)c.low),
          (v8f)_mm256_fmadd_ps((__m256)a.high, (__m256)b.high, (__m256)c.high)};
#else
  return a * b + c;
#endif
}

// x * 2^n of whole numbers n from -127 on; some number of those below.
LIFECYCLE_INLINE v16f scaled(v16f x, v16f n) {
#if LIFECYCLE_AVX512
  return (v16f)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  const v16f above = larger(n, spread(-127.0f)), bounded = select(above < spread(128.0f), above, spread(128.0f));
  return x * (v16f)((to_integer(bounded) + 127) << 23);
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

#if LIFECYCLE_AVX2
// Rows of 8 values each as columns.
LIFECYCLE_INLINE void transpose8(v8f (&rows)[8]) {
  __m256 r[8], t[8];
  LIFECYCLE_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  LIFECYCLE_UNROLL for (int i = 0; i < 8; i += 4) {
    LIFECYCLE_UNROLL for (int j = 0; j < 2; ++j) {
      r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
      r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
    }
  }
  LIFECYCLE_UNROLL for (int j = 0; j < 4; ++j) {
    rows[j] = (v8f)_mm256_permute2f128_ps(r[j], r[j + 4], 0x20);
    rows[j + 4] = (v8f)_mm256_permute2f128_ps(r[j], r[j + 4], 0x31);
  }
}
#endif

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
#elif LIFECYCLE_AVX2
  v8f parts[2][2][8];
  LIFECYCLE_UNROLL for (int i = 0; i < 16; ++i) {
    parts[i / 8][0][i % 8] = rows[i].low;
    parts[i / 8][1][i % 8] = rows[i].high;
  }
  LIFECYCLE_UNROLL for (int i = 0; i < 4; ++i) transpose8(parts[i / 2][i % 2]);
  LIFECYCLE_UNROLL for (int i = 0; i < 16; ++i) rows[i] = {parts[0][i / 8][i % 8], parts[1][i / 8][i % 8]};
#else
  v16f columns[16];
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) columns[j][i] = rows[i][j];
  for (int i = 0; i < 16; ++i) rows[i] = columns[i];
#endif
}

}  // namespace lifecycle
