// Draws a token by its logits as `lifecycle/engines/sampling.py` does, but for typical-p: the order of the filters, who
// stays of equals, sums in float64. Every pass over a vocabulary is one of vectors, and nothing is sorted.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "columns.h"
#include "kernel.h"
#include "simd.h"

#define LIFECYCLE_EXPORT extern "C" __attribute__((visibility("default")))

namespace lifecycle {
namespace {

typedef double v8d __attribute__((vector_size(64), may_alias));

// Tokens whose weights are added up before single ones are looked at, and how far ahead logits are asked for.
constexpr size_t kBlock = 256, kAhead = 1024;
constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();

constexpr size_t whole(size_t count, size_t of) { return (count + of - 1) / of * of; }

// Integers that are in the order of floats, of which zero has two; and back.
template <typename I, typename F>
I key_of(F value) {
  const F one = value + 0.0f;
  I bits;
  std::memcpy(&bits, &one, sizeof(I));
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

float value_of(int32_t key) { return float_of((uint32_t)(key ^ ((key >> 31) & 0x7fffffff))); }

v8d sum_of(v8d sums, v8f values) { return sums + __builtin_convertvector(values, v8d); }

double total(v8d sums) {
  double found = 0;
  for (int i = 0; i < 8; ++i) found += sums[i];
  return found;
}

struct Found {
  size_t count = 0;
  double mass = 0;
};

// How many keys are at least `least`, and their mass: what they are as floats, or one each. They are padded to 16.
template <bool kAsFloats>
Found at_least(const int32_t* keys, size_t count, int32_t least) {
  v8i counts[2] = {};
  v8d sums[2] = {};
  for (size_t i = 0; i < count; i += 16) {
    LIFECYCLE_UNROLL for (size_t k = 0; k < 2; ++k) {
      const v8i some = load<v8i>(keys + i + 8 * k), is_kept = some >= least;
      counts[k] -= is_kept;
      if constexpr (kAsFloats) sums[k] = sum_of(sums[k], (v8f)(some & is_kept));
    }
  }
  const v8i both = counts[0] + counts[1];
  Found found;
  for (int i = 0; i < 8; ++i) found.count += (size_t)both[i];
  found.mass = kAsFloats ? total(sums[0] + sums[1]) : (double)found.count;
  return found;
}

#if LIFECYCLE_AVX512
// The lanes of so many values.
__mmask16 first(size_t count) { return count < kLanes ? (__mmask16)((1 << count) - 1) : (__mmask16)-1; }
#endif

// Leaves the keys that are at least `bound`, or those that are not, padded as before; how many they are.
size_t keep(int32_t* keys, size_t count, int32_t bound, bool is_above) {
  size_t kept = 0;
#if LIFECYCLE_AVX512
  for (size_t i = 0; i < count; i += kLanes) {
    const v16i some = load<v16i>(keys + i);
    const __mmask16 above = _mm512_cmpge_epi32_mask((__m512i)some, _mm512_set1_epi32(bound));
    const __mmask16 mask = (is_above ? above : (__mmask16)~above) & first(count - i);
    store(keys + kept, (v16i)_mm512_maskz_compress_epi32(mask, (__m512i)some));
    kept += (size_t)__builtin_popcount(mask);
  }
#else
  for (size_t i = 0; i < count; ++i) {
    const int32_t key = keys[i];
    keys[kept] = key;
    kept += (key >= bound) == is_above;
  }
#endif
  std::fill(keys + kept, keys + whole(kept, kLanes), kLowest);
  return kept;
}

struct Least {
  int32_t key;
  // Mass of those above it.
  double above;
};

// The least of the fewest largest keys whose mass is at least `wanted`, looked for from `low` (which has that mass at and
// above it, or as much as there is) up to below `high` (which has not). Keys are left in any order, and
// some are lost; behind them is room for 16 more.
template <bool kAsFloats>
Least least_of(int32_t* keys, size_t count, double wanted, int64_t low, int64_t high) {
  double above = 0;
  std::fill(keys + count, keys + whole(count, kLanes), kLowest);
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const Found found = at_least<kAsFloats>(keys, count, (int32_t)middle);
    const bool is_enough = above + found.mass >= wanted;
    if (is_enough) {
      low = middle;
    } else {
      high = middle;
      above += found.mass;
    }
    // Those above count already, those below never will.
    const size_t left = is_enough ? found.count : count - found.count;
    if (is_enough && left > count - count / 4) continue;
    count = keep(keys, count, (int32_t)middle, is_enough);
  }
  return {(int32_t)low, above};
}

// Room for so many values, and 16 more that vectors may write behind them.
template <typename T, int Which>
T* room(size_t count) {
  return scratch<T, Which>(count + kLanes);
}
constexpr int kTokens = 20, kKeys = 21, kColumns = 22, kKept = 23, kWeights = 24, kEnds = 25, kPlaces = 26;

// The largest of some numbers.
float top_of(const float* values, size_t count) {
  v16f top = spread(-std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) top = larger(load<v16f>(values + i), top);
  float most = largest(top);
  for (; i < count; ++i) most = std::max(most, values[i]);
  return most;
}

// The first of the largest logits, or of those that are no numbers, and its place. Columns may be known, one of them no
// number where a logit is none.
void scan_row(const float* logits, size_t count, int64_t* best, float* top, float* columns, bool is_known) {
  const float* found;
  auto is_none = [](float value) { return value != value; };
  const bool are_numbers = is_known ? std::none_of(columns, columns + columns_of(count), is_none)
                                    : scan_columns(logits, count, columns);
  const float* end = logits + count;
  if (!are_numbers) {
    found = std::find_if(logits, end, is_none);
  } else {
    const float* last = columns + columns_of(count);
    const float* column = std::find((const float*)columns, last, top_of(columns, columns_of(count)));
    found = std::find(logits + (column - columns) * (ptrdiff_t)kColumn, end, *column);
  }
  // Whatever columns say, no place is beyond the logits.
  if (found == end) found = logits;
  *best = found - logits;
  *top = *found;
}

// Appends tokens from `start` to `end` whose keys are at least `bound`, and these; how many there are then.
size_t collect(const float* logits, size_t start, size_t end, int32_t bound, size_t count, int32_t* tokens,
               int32_t* keys) {
  for (size_t i = start; i < end; i += kLanes) {
    const v16i some_keys = key_of<v16i>(some<v16f>(logits + i, end - i));
#if LIFECYCLE_AVX512
    const __mmask16 mask =
        _mm512_mask_cmpge_epi32_mask(first(end - i), (__m512i)some_keys, _mm512_set1_epi32(bound));
    const v16i places = spread((int32_t)i) + v16i{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    store(tokens + count, (v16i)_mm512_maskz_compress_epi32(mask, (__m512i)places));
    store(keys + count, (v16i)_mm512_maskz_compress_epi32(mask, (__m512i)some_keys));
    count += (size_t)__builtin_popcount(mask);
#else
    for (size_t k = 0; k < std::min((size_t)kLanes, end - i); ++k) {
      tokens[count] = (int32_t)(i + k);
      keys[count] = some_keys[k];
      count += some_keys[k] >= bound;
    }
#endif
  }
  return count;
}

// The tokens of the `wanted` largest of `count` logits, in order; the lower of equals. `columns` are their columns' largest.
int32_t* largest_tokens(const float* logits, size_t count, const float* columns, size_t wanted) {
  const size_t num_columns = columns_of(count);
  int32_t* tokens = room<int32_t, kTokens>(count);
  int32_t* keys = room<int32_t, kKeys>(count);
  const int64_t high = (int64_t)key_of<int32_t>(top_of(columns, num_columns)) + 1;
  // As many columns have a logit at least as large as the bound, so the largest are among theirs.
  int32_t bound = kLowest;
  if (wanted <= num_columns) {
    for (size_t i = 0; i < num_columns; ++i) keys[i] = key_of<int32_t>(columns[i]);
    bound = least_of<false>(keys, num_columns, (double)wanted, kLowest, high).key;
  }
  // Their logits are asked for all together: another core may have written them.
  int32_t* places = room<int32_t, kPlaces>(num_columns);
  size_t num_places = 0, found = 0;
  for (size_t column = 0; column < num_columns; ++column) {
    if (key_of<int32_t>(columns[column]) < bound) continue;
    expect(logits + column * kColumn, kColumn * sizeof(float));
    places[num_places++] = (int32_t)column;
  }
  for (size_t i = 0; i < num_places; ++i) {
    const size_t start = (size_t)places[i] * kColumn;
    found = collect(logits, start, std::min(start + kColumn, count), bound, found, tokens, keys);
  }
  const Least least = least_of<false>(keys, found, (double)wanted, bound, high);
  size_t equals = wanted - (size_t)least.above;
  int32_t* end = tokens;
  for (size_t i = 0; i < found; ++i) {
    const int32_t key = key_of<int32_t>(logits[tokens[i]]);
    const bool is_equal = key == least.key;
    if (key < least.key || (is_equal && equals == 0)) continue;
    equals -= is_equal;
    *end++ = tokens[i];
  }
  return tokens;
}

// Zeroes all but the fewest largest weights whose share is at least `top_p`; the lower of equals stay.
void keep_nucleus(float* weights, size_t count, double top_p) {
  v8d sums{};
  for (size_t i = 0; i < count; i += 8) sums = sum_of(sums, load<v8f>(weights + i));
  const double all = total(sums);
  int32_t* keys = room<int32_t, kKeys>(count);
  std::memcpy(keys, weights, count * sizeof(float));
  // The largest weight is 1. All below (1 - p) / n of the total have less than 1 - p of it together.
  const float low = (float)((1.0 - top_p) * all / (double)count * 0.999);
  const int64_t high = (int64_t)key_of<int32_t>(1.0f) + 1;
  const Least least = least_of<true>(keys, count, top_p * all, std::max(key_of<int32_t>(low), 1), high);
  const float bound = value_of(least.key);
  v16i equals{};
  for (size_t i = 0; i < count; i += kLanes) {
    const v16f value = load<v16f>(weights + i);
    equals -= value == bound;
    store(weights + i, select(value < bound, v16f{}, value));
  }
  const double needed = std::max(std::ceil((top_p * all - least.above) / bound), 1.0);
  double surplus = sum<int32_t>(equals) - needed;
  for (size_t i = count; surplus > 0 && i-- > 0;) {
    if (weights[i] != bound) continue;
    weights[i] = 0;
    surplus -= 1;
  }
}

// The index at which the running sum of weights passes `uniform` of the total; it is never one of weight 0.
size_t drawn(const float* weights, size_t count, double uniform) {
  const size_t num_blocks = whole(count, kBlock) / kBlock;
  double* ends = room<double, kEnds>(num_blocks);
  double all = 0;
  for (size_t block = 0; block < num_blocks; ++block) {
    v8d sums[2] = {};
    for (size_t i = block * kBlock; i < std::min((block + 1) * kBlock, count); i += 16) {
      sums[0] = sum_of(sums[0], load<v8f>(weights + i));
      sums[1] = sum_of(sums[1], load<v8f>(weights + i + 8));
    }
    ends[block] = all += total(sums[0] + sums[1]);
  }
  // Rounding may bring the target up to the very end, which nothing is above.
  const double target = std::min(uniform * all, std::nextafter(all, 0.0));
  const size_t block = (size_t)(std::upper_bound(ends, ends + num_blocks, target) - ends);
  double left = target - (block ? ends[block - 1] : 0.0);
  size_t found = block * kBlock;
  for (size_t i = found; i < std::min((block + 1) * kBlock, count); ++i) {
    if (weights[i] == 0) continue;
    found = i;
    if ((left -= weights[i]) < 0) break;
  }
  return found;
}

// The chances of `count` tokens by their logits, the largest 1; padded to 16 with zeros.
void weigh(const float* logits, size_t count, float temperature, float* weights) {
  const size_t full = count / kLanes * kLanes;
  v16f last = spread(-std::numeric_limits<float>::infinity());
  std::memcpy(&last, logits + full, (count - full) * sizeof(float));
  const float most = top_of(logits, count), factor = 1.0f / temperature;
  for (size_t i = 0; i < full; i += kLanes) {
    store(weights + i, exponential((load<v16f>(logits + i) - most) * factor));
  }
  if (full < count) store(weights + full, exponential((last - most) * factor));
}

int64_t draw(const float* logits, size_t count, const float* columns, float temperature, size_t top_k, double top_p,
             double min_p, double uniform) {
  const bool is_cut = 0 < top_k && top_k < count;
  const size_t left = is_cut ? top_k : count, padded = whole(left, kLanes);
  float* weights = room<float, kWeights>(left);
  const int32_t* tokens = nullptr;
  if (is_cut) {
    if (columns == nullptr) {
      float* found = room<float, kColumns>(columns_of(count));
      scan_columns(logits, count, found);
      columns = found;
    }
    tokens = largest_tokens(logits, count, columns, top_k);
    float* kept = room<float, kKept>(left);
    for (size_t i = 0; i < left; ++i) kept[i] = logits[tokens[i]];
    logits = kept;
  }
  weigh(logits, left, temperature, weights);
  if (top_p < 1) keep_nucleus(weights, padded, top_p);
  for (size_t i = 0; i < padded && min_p > 0; i += kLanes) {
    const v16f value = load<v16f>(weights + i);
    // The largest weight is 1, and no filter removes it.
    store(weights + i, select(value < (float)min_p, v16f{}, value));
  }
  // Whatever the weights are, no place is beyond them.
  const size_t place = std::min(drawn(weights, padded, uniform), left - 1);
  return is_cut ? tokens[place] : (int64_t)place;
}

}  // namespace

bool scan_columns(const float* logits, size_t count, float* columns) {
  v16i are_none{};
  bool is_none = false;
  for (size_t start = 0; start < count; start += kColumn) {
    const size_t end = std::min(start + kColumn, count);
    expect(logits + start + kAhead, kColumn * sizeof(float));
    v16f top = spread(logits[start]);
    size_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      const v16f value = load<v16f>(logits + i);
      are_none |= value != value;
      top = larger(value, top);
    }
    float most = largest(top);
    for (; i < end; ++i) {
      is_none |= logits[i] != logits[i];
      most = std::max(most, logits[i]);
    }
    *columns++ = most;
  }
  return !is_none && !sum<int32_t>(are_none);
}

}  // namespace lifecycle

// Of each of `rows` rows of `count` logits the first of the largest (of those that are no numbers, if any), its logit, and
// the largest of each column, unless a product has found these already.
LIFECYCLE_EXPORT void lifecycle_scan(const float* logits, size_t rows, size_t count, int64_t* best, float* tops,
                                     float* columns, int is_known) {
  using namespace lifecycle;
  const size_t num_columns = columns_of(count);
  for (size_t row = 0; row < rows; ++row) {
    scan_row(logits + row * count, count, best + row, tops + row, columns + row * num_columns, is_known != 0);
  }
}

// A token by `count` logits, the largest of them finite; -1 without memory. `columns` are those of `lifecycle_scan` or
// null, `top_k` 0 is none, `uniform` is in [0, 1).
LIFECYCLE_EXPORT int64_t lifecycle_draw(const float* logits, size_t count, const float* columns, float temperature,
                                        size_t top_k, double top_p, double min_p, double uniform) {
  try {
    return lifecycle::draw(logits, count, columns, temperature, top_k, top_p, min_p, uniform);
  } catch (const std::bad_alloc&) {
    return -1;
  }
}
