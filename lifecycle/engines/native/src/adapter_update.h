#pragma once

#include "adapters.h"

namespace lifecycle {

// y + x · A · B in float32: x [tokens, depth], y [tokens, columns]. Inputs: x, what it is added to, A of all adapters
// [adapters, depth, parts * rank], the places of `Owners`, and B of up to three parts that share the columns, [adapters,
// rank, columns of the part].
class AdapterUpdate {
 public:
  static constexpr const char* kName = "AdapterUpdate";
  static constexpr size_t kBefore = 4, kInputs = kBefore + AdapterShape::kMostParts, kOutputs = 1;
  static ort::Type input(size_t index) { return index == 3 ? ort::kInt64 : ort::kFloat; }
  static ort::Type output(size_t) { return ort::kFloat; }
  static bool is_optional(size_t index) { return index > kBefore; }

  AdapterUpdate(const ort::Api& api, const ort::Info*) : api(api) {}
  void run(const Run& run);

  const ort::Api& api;
};

}  // namespace lifecycle
