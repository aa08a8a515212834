// What a cache holds of keys and values: floats, or integers that a scale of their channel multiplies.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace lifecycle {

// Two values of 4 bits, the first in the lower half, each 8 above what it stands for.
struct Fours {
  uint8_t both;
};

template <typename T>
constexpr bool kIsInteger = !std::is_same_v<T, float>;
// Values in one of them.
template <typename T>
constexpr size_t kValues = std::is_same_v<T, Fours> ? 2 : 1;

typedef uint8_t v8u __attribute__((vector_size(8)));
typedef uint16_t v8w __attribute__((vector_size(16)));

// 16 values as floats.
LIFECYCLE_INLINE v16f floats(const float* from) { return load<v16f>(from); }
LIFECYCLE_INLINE v16f floats(const int8_t* from) { return to_float(widened(load<v16c>(from))); }
LIFECYCLE_INLINE v16f floats(const Fours* from) {
  const v8w both = __builtin_convertvector(load<v8u>(from), v8w);
  return to_float(widened((v16c)((both | both << 4) & 0x0f0f) - 8));
}

// Up to 16 values, zeros behind them.
LIFECYCLE_INLINE v16f floats(const float* from, size_t count) { return some(from, count); }
template <typename T>
LIFECYCLE_INLINE v16f floats(const T* from, size_t count) {
  if (count >= kLanes) return floats(from);
  T room[kLanes / kValues<T>];
  std::memset(room, kValues<T> == 2 ? 0x88 : 0, sizeof room);
  std::memcpy(room, from, count / kValues<T> * sizeof(T));
  return floats(room);
}

// Rows [count, depth] of a cache, `stride` apart, as rows of floats [count, width]: its own memory, or `room`.
template <typename T>
const float* as_floats(const T* from, size_t count, size_t depth, size_t stride, size_t width, float* room) {
  if constexpr (!kIsInteger<T>) {
    if (width == depth) return from;
  }
  for (size_t t = 0; t < count; ++t) {
    for (size_t d = 0; d < width; d += kLanes) {
      store(room + t * width + d, floats(from + t * stride + d / kValues<T>, depth - d));
    }
  }
  return room;
}

// Up to 16 rows of 64 bytes or less, `stride` bytes apart, as columns of four bytes, zeros behind them.
LIFECYCLE_INLINE void columns_of(const void* from, size_t count, size_t stride, size_t bytes, v16f (&rows)[16]) {
  const char* at = static_cast<const char*>(from);
  if (count == kLanes && bytes == 64) {
    LIFECYCLE_UNROLL for (size_t i = 0; i < kLanes; ++i) rows[i] = load<v16f>(at + i * stride);
  } else if (count == kLanes && bytes == 32) {
    LIFECYCLE_UNROLL for (size_t i = 0; i < kLanes; ++i) rows[i] = half(at + i * stride);
  } else {
    for (size_t i = 0; i < kLanes; ++i) {
      rows[i] = v16f{};
      if (i < count) std::memcpy(&rows[i], at + i * stride, bytes);
    }
  }
  transpose16(rows);
}

// Calls use(d, column) with dimension after dimension of up to 16 keys [count, depth], `stride` apart.
template <typename Use>
LIFECYCLE_INLINE void each_column(const float* keys, size_t count, size_t depth, size_t stride, const Use& use) {
  v16f rows[kLanes];
  for (size_t d = 0; d < depth; d += kLanes) {
    const size_t left = std::min<size_t>(kLanes, depth - d);
    columns_of(keys + d, count, stride * sizeof(float), left * sizeof(float), rows);
    LIFECYCLE_UNROLL for (size_t j = 0; j < kLanes; ++j) {
      if (j < left) use(d + j, rows[j]);
    }
  }
}

// Four bytes of integers are transposed as one value, 64 integers of each key at a time.
template <typename T, typename Use>
LIFECYCLE_INLINE void each_column(const T* keys, size_t count, size_t depth, size_t stride, const Use& use) {
  constexpr int kBits = 8 / kValues<T>, kEach = 32 / kBits;
  constexpr size_t kAtOnce = 64, kBytes = kAtOnce / kValues<T>;
  v16f rows[kLanes];
  auto columns = [&](size_t d, v16f column) __attribute__((always_inline)) {
    // 8 above a value of 4 bits is the value itself, with its highest bit turned.
    const v16i all = kBits == 4 ? (v16i)column ^ (int32_t)0x88888888 : (v16i)column;
    LIFECYCLE_UNROLL for (int k = 0; k < kEach; ++k) {
      use(d + k, to_float(all << (32 - kBits - k * kBits) >> (32 - kBits)));
    }
  };
  size_t d = 0;
  for (; d + kAtOnce <= depth; d += kAtOnce) {
    columns_of(keys + d / kValues<T>, count, stride, kBytes, rows);
    LIFECYCLE_UNROLL for (size_t j = 0; j < kBytes / 4; ++j) columns(d + kEach * j, rows[j]);
  }
  if (d < depth) {
    columns_of(keys + d / kValues<T>, count, stride, (depth - d) / kValues<T>, rows);
    for (size_t j = 0; d + kEach * j < depth; ++j) columns(d + kEach * j, rows[j]);
  }
}

inline void put(const float* from, const float*, size_t count, float* to) { std::memcpy(to, from, count * sizeof(float)); }
template <typename T>
void put(const float* from, const float* scales, size_t count, T* to) {
  constexpr float kMost = kValues<T> == 2 ? 7.0f : 127.0f, kLeast = -kMost - 1;
  for (size_t i = 0; i < count; i += kLanes) {
    const size_t here = std::min<size_t>(kLanes, count - i);
    const v16f steps = rounded(some(from + i, here) / some(scales + i, here));
    const v16f low = select(steps > spread(kLeast), steps, spread(kLeast));
    const v16f bounded = select(low < spread(kMost), low, spread(kMost));
    const v16c bytes = narrowed(to_integer(bounded));
    if constexpr (kValues<T> == 2) {
      const v8w pairs = (v8w)(bytes + 8);
      const v8u stored = __builtin_convertvector((v8w)(pairs | pairs >> 4), v8u);
      std::memcpy(to + i / 2, &stored, here / 2);
    } else {
      std::memcpy(to + i, &bytes, here);
    }
  }
}

}  // namespace lifecycle
