#pragma once

// What attention does with a tile of keys and values: scores, sums, and keys as columns.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "stored.h"

namespace lifecycle {

constexpr size_t kTile = 64;
constexpr int kVectors = kTile / kLanes;
constexpr int kMostQueries = 6;
// Vectors of keys or values that queries are multiplied with at once: so many that their sums stay in registers.
constexpr int kWide = LIFECYCLE_AVX512 ? 4 : 1;
// So many queries take columns of keys as they come.
constexpr size_t kFewQueries = 8;
// Below all scores, yet a number, so that differences to it are numbers.
constexpr float kLowest = -1e30f;

// scores [MQ, kTile] = queries [MQ, depth] times keys [depth, kTile].
template <int MQ>
void score(const float* queries, size_t depth, const float* keys, float* scores) {
  constexpr int NV = kWide;
  for (size_t t = 0; t < kTile; t += NV * kLanes) {
    v16f acc[MQ][NV] = {};
    for (size_t d = 0; d < depth; ++d) {
      v16f k[NV];
      LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) k[j] = load<v16f>(keys + d * kTile + t + j * kLanes);
      LIFECYCLE_UNROLL for (int i = 0; i < MQ; ++i) {
        const v16f q = spread(queries[i * depth + d]);
        LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] += q * k[j];
      }
    }
    LIFECYCLE_UNROLL for (int i = 0; i < MQ; ++i) {
      LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) store(scores + i * kTile + t + j * kLanes, acc[i][j]);
    }
  }
}

// sums [MQ, width], 16 * NV of them from `sums` on, = sums * decay + weights [MQ, kTile] times values [count, width], which
// are `stride` apart.
template <int MQ, int NV, typename T>
void gather(const float* weights, const float* decay, const T* values, size_t count, size_t stride, size_t width,
            float* sums) {
  v16f acc[MQ][NV];
  LIFECYCLE_UNROLL for (int i = 0; i < MQ; ++i) {
    LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) {
      acc[i][j] = load<v16f>(sums + i * width + j * kLanes) * decay[i];
    }
  }
  for (size_t t = 0; t < count; ++t) {
    v16f v[NV];
    LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) v[j] = floats(values + t * stride + j * kLanes / kValues<T>);
    LIFECYCLE_UNROLL for (int i = 0; i < MQ; ++i) {
      const v16f w = spread(weights[i * kTile + t]);
      LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] += w * v[j];
    }
  }
  LIFECYCLE_UNROLL for (int i = 0; i < MQ; ++i) {
    LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) store(sums + i * width + j * kLanes, acc[i][j]);
  }
}

template <int MQ, typename T>
void gather_all(const float* weights, const float* decay, const T* values, size_t count, size_t stride, size_t width,
                float* sums) {
  size_t d = 0;
  for (; d + kWide * kLanes <= width; d += kWide * kLanes)
    gather<MQ, kWide>(weights, decay, values + d / kValues<T>, count, stride, width, sums + d);
  for (; d < width; d += kLanes)
    gather<MQ, 1>(weights, decay, values + d / kValues<T>, count, stride, width, sums + d);
}

// The largest of a query's scores with the keys from `tile` on, of which it sees those at `from` to `position`; the
// others become minus infinity.
inline float largest_of(float* scores, size_t tile, size_t from, size_t position) {
  v16f most = spread(kLowest);
  if (tile >= from && tile + kTile <= position + 1) {
    LIFECYCLE_UNROLL for (int j = 0; j < kVectors; ++j) most = larger(load<v16f>(scores + j * kLanes), most);
  } else {
    for (int j = 0; j < kVectors; ++j) {
      const v16i key = v16i{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + ((int32_t)tile + j * kLanes);
      const v16i is_seen = (key <= (int32_t)position) & (key >= (int32_t)from);
      const v16f score = select(is_seen, load<v16f>(scores + j * kLanes), spread(-INFINITY));
      store(scores + j * kLanes, score);
      most = larger(score, most);
    }
  }
  return largest(most);
}

inline void soften(float* scores, size_t count, float cap) {
  for (size_t i = 0; i < count; i += kLanes) {
    const v16f x = load<v16f>(scores + i) * (2 / cap);
    store(scores + i, cap - 2 * cap / (exponential(x) + 1.0f));
  }
}

// f.template operator()<MQ>(first) for all of `count` vectors, a few at a time, as many each time as can be.
template <typename F>
LIFECYCLE_INLINE void few_at_a_time(size_t count, const F& f) {
  for (size_t i = 0; i < count;) {
    const size_t left = count - i, times = (left + kMostQueries - 1) / kMostQueries, now = (left + times - 1) / times;
    switch (now) {
      case 6: f.template operator()<6>(i); i += 6; break;
      case 5:
      case 4: f.template operator()<4>(i); i += 4; break;
      case 3: f.template operator()<3>(i); i += 3; break;
      case 2: f.template operator()<2>(i); i += 2; break;
      default: f.template operator()<1>(i); i += 1;
    }
  }
}

// Keys [count, depth], `stride` apart and up to kTile, as columns of floats [depth, kTile], with some numbers behind them.
template <typename T>
void transpose(const T* keys, size_t count, size_t depth, size_t stride, float* columns) {
  for (size_t t = 0; t < kTile; t += kLanes) {
    const size_t here = count > t ? std::min<size_t>(count - t, kLanes) : 0;
    each_column(keys + t * stride, here, depth, stride,
                [&](size_t d, v16f column) { store(columns + d * kTile + t, column); });
  }
}

template <int MQ, typename T>
void score_columns(const float* queries, size_t depth, const T* keys, size_t count, size_t stride, float* scores) {
  for (size_t t = 0; t < kTile; t += kLanes) {
    const size_t here = count > t ? std::min<size_t>(count - t, kLanes) : 0;
    v16f acc[MQ] = {};
    if (here > 0) {
      each_column(keys + t * stride, here, depth, stride, [&](size_t d, v16f column) {
        LIFECYCLE_UNROLL for (int i = 0; i < MQ; ++i) acc[i] += queries[i * depth + d] * column;
      });
    }
    LIFECYCLE_UNROLL for (int i = 0; i < MQ; ++i) store(scores + i * kTile + t, acc[i]);
  }
}

// The scores of so few queries that columns are used as they come; some more may be computed for nothing.
template <typename T>
void score_few(size_t queries_count, const float* queries, size_t depth, const T* keys, size_t count, size_t stride,
               float* scores) {
  switch (queries_count) {
    case 1: return score_columns<1>(queries, depth, keys, count, stride, scores);
    case 2: return score_columns<2>(queries, depth, keys, count, stride, scores);
    case 3: return score_columns<3>(queries, depth, keys, count, stride, scores);
    case 4: return score_columns<4>(queries, depth, keys, count, stride, scores);
    default: return score_columns<kFewQueries>(queries, depth, keys, count, stride, scores);
  }
}

}  // namespace lifecycle
