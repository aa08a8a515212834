// Logits of which a grammar allows some, as `masked` in `lifecycle/engines/sampling.py`.
#include <algorithm>
#include <limits>

#include "columns.h"
#include "simd.h"

namespace lifecycle {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Up to 16 logits, and minus infinity where a byte is zero.
LIFECYCLE_INLINE v16f allowed(const float* logits, const uint8_t* mask, size_t count) {
  v16c bytes{};
  std::memcpy(&bytes, mask, std::min<size_t>(count, kLanes));
  return select(widened(bytes) != 0, some(logits, count), spread(kNever));
}

}  // namespace
}  // namespace lifecycle

// Writes `count` logits to `found`, with minus infinity where a byte of `mask` is zero; the first of the largest.
extern "C" __attribute__((visibility("default"))) int64_t lifecycle_mask(const float* logits, const uint8_t* mask,
                                                                         size_t count, float* found) {
  using namespace lifecycle;
  v16f tops = spread(kNever);
  // Where a column is larger than all before it, the largest is in it or behind.
  size_t place = 0;
  float top = kNever;
  for (size_t from = 0; from < count; from += kColumn) {
    const size_t to = std::min(count, from + kColumn);
    v16f here = spread(kNever);
    for (size_t i = from; i < to; i += kLanes) {
      const v16f left = allowed(logits + i, mask + i, to - i);
      put(found + i, left, to - i);
      here = larger(here, left);
    }
    if (all(here <= tops)) continue;
    top = largest(here);
    tops = spread(top);
    place = from;
  }
  while (place + 1 < count && !(found[place] == top)) ++place;
  return (int64_t)place;
}
