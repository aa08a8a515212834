#pragma once

#include "kernel.h"

namespace lifecycle {

// y + x · A · B, of another adapter for each token: x [tokens, depth], y [tokens, columns], A of all adapters
// [adapters, depth, parts * rank], the adapter of each token and what else is of no use here [tokens, 2], and B of up to
// three parts that share the columns, [adapters, rank, columns of the part].
class AdapterUpdate {
 public:
  static constexpr const char* kName = "AdapterUpdate";
  static constexpr size_t kMostParts = 3, kInputs = 4 + kMostParts, kOutputs = 1;
  static ort::Type input(size_t index) { return index == 3 ? ort::kInt64 : ort::kFloat; }
  static ort::Type output(size_t) { return ort::kFloat; }
  static bool is_optional(size_t index) { return index > 4; }

  AdapterUpdate(const ort::Api& api, const ort::Info*) : api(api) {}
  void run(const Run& run);

  const ort::Api& api;
};

}  // namespace lifecycle
