// The types of vectors of 16 values. Written as the compiler's own, which it takes apart where registers are shorter.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

// For tests, LIFECYCLE_PLAIN computes everything as a processor without these instructions does, LIFECYCLE_PAIRS as one
// whose only products of bytes are those of pairs.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    !defined(LIFECYCLE_PLAIN)
#define LIFECYCLE_AVX512 1
#else
#define LIFECYCLE_AVX512 0
#endif
#if defined(__AVX2__) && defined(__FMA__) && !LIFECYCLE_AVX512 && !defined(LIFECYCLE_PLAIN)
#define LIFECYCLE_AVX2 1
#else
#define LIFECYCLE_AVX2 0
#endif
#if ((LIFECYCLE_AVX512 && defined(__AVX512VNNI__)) || (LIFECYCLE_AVX2 && defined(__AVXVNNI__))) && \
    !defined(LIFECYCLE_PAIRS)
#define LIFECYCLE_VNNI 1
#else
#define LIFECYCLE_VNNI 0
#endif
#if LIFECYCLE_AVX512 || LIFECYCLE_AVX2
#include <immintrin.h>
#endif

#define LIFECYCLE_UNROLL _Pragma("GCC unroll 16")
#define LIFECYCLE_INLINE __attribute__((always_inline)) inline

namespace lifecycle {

constexpr int kLanes = 16;
typedef float v8f __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef int8_t v16c __attribute__((vector_size(16), may_alias));

#if LIFECYCLE_AVX2

// Two vectors as one, whose halves are in registers: one that is wider than registers the compiler keeps in memory.
template <typename Half>
struct Two {
  typedef std::remove_cvref_t<decltype(Half{}[0])> Value;
  Half low, high;

  Two() = default;
  LIFECYCLE_INLINE Two(Half low, Half high) : low(low), high(high) {}
  LIFECYCLE_INLINE Two(Value value) : low(value - Half{}), high(low) {}
  template <typename... Values>
    requires(sizeof...(Values) == kLanes)
  LIFECYCLE_INLINE Two(Values... values) {
    const Value all[] = {(Value)values...};
    std::memcpy(&low, all, sizeof(Half));
    std::memcpy(&high, all + sizeof(Half) / sizeof(Value), sizeof(Half));
  }
  template <typename Other>
  LIFECYCLE_INLINE explicit Two(const Two<Other>& other) : low((Half)other.low), high((Half)other.high) {}

  LIFECYCLE_INLINE Value operator[](size_t i) const {
    constexpr size_t kEach = sizeof(Half) / sizeof(Value);
    return i < kEach ? low[i] : high[i - kEach];
  }
  LIFECYCLE_INLINE Two operator-() const { return {-low, -high}; }
  LIFECYCLE_INLINE Two operator~() const { return {~low, ~high}; }

#define LIFECYCLE_BOTH(op) \
  friend LIFECYCLE_INLINE Two operator op(Two a, Two b) { return {a.low op b.low, a.high op b.high}; } \
  LIFECYCLE_INLINE Two& operator op##=(Two b) { return *this = *this op b; }
  LIFECYCLE_BOTH(+)
  LIFECYCLE_BOTH(-)
  LIFECYCLE_BOTH(*)
  LIFECYCLE_BOTH(/)
  LIFECYCLE_BOTH(&)
  LIFECYCLE_BOTH(|)
  LIFECYCLE_BOTH(^)
  LIFECYCLE_BOTH(<<)
  LIFECYCLE_BOTH(>>)
#undef LIFECYCLE_BOTH
#define LIFECYCLE_BOTH(op) \
  friend LIFECYCLE_INLINE auto operator op(Two a, Two b) { \
    return Two<decltype(a.low op b.low)>{a.low op b.low, a.high op b.high}; \
  }
  LIFECYCLE_BOTH(<)
  LIFECYCLE_BOTH(<=)
  LIFECYCLE_BOTH(>)
  LIFECYCLE_BOTH(>=)
  LIFECYCLE_BOTH(==)
  LIFECYCLE_BOTH(!=)
#undef LIFECYCLE_BOTH
};

typedef int16_t v16s __attribute__((vector_size(32)));
typedef uint16_t v16w __attribute__((vector_size(32)));
typedef uint8_t v32u __attribute__((vector_size(32)));
typedef Two<v8f> v16f;
typedef Two<v8i> v16i;
typedef Two<v16s> v32s;
typedef Two<v16w> v32w;
typedef Two<v32u> v64u;

template <typename V>
constexpr bool kIsTwo = false;
template <typename Half>
constexpr bool kIsTwo<Two<Half>> = true;

#else

typedef float v16f __attribute__((vector_size(64), may_alias));
typedef int32_t v16i __attribute__((vector_size(64), may_alias));
typedef int16_t v32s __attribute__((vector_size(64), may_alias));
typedef uint16_t v32w __attribute__((vector_size(64), may_alias));
typedef uint8_t v64u __attribute__((vector_size(64), may_alias));
template <typename V>
constexpr bool kIsTwo = false;

#endif

template <typename V>
LIFECYCLE_INLINE V load(const void* from) {
  V found;
  if constexpr (kIsTwo<V>) {
    std::memcpy(&found.low, from, sizeof(V) / 2);
    std::memcpy(&found.high, static_cast<const char*>(from) + sizeof(V) / 2, sizeof(V) / 2);
  } else {
    std::memcpy(&found, from, sizeof(V));
  }
  return found;
}

template <typename V>
LIFECYCLE_INLINE void store(void* to, V value) {
  if constexpr (kIsTwo<V>) {
    std::memcpy(to, &value.low, sizeof(V) / 2);
    std::memcpy(static_cast<char*>(to) + sizeof(V) / 2, &value.high, sizeof(V) / 2);
  } else {
    std::memcpy(to, &value, sizeof(V));
  }
}

}  // namespace lifecycle
