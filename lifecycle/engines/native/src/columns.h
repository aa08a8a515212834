// The largest of each so many neighbours among logits: by them the largest of all is found without reading all.
#pragma once

#include <cstddef>

namespace lifecycle {

constexpr size_t kColumn = 64;

constexpr size_t columns_of(size_t count) { return (count + kColumn - 1) / kColumn; }

// The largest of each column of `count` logits; whether all are numbers.
bool scan_columns(const float* logits, size_t count, float* columns);

}  // namespace lifecycle
