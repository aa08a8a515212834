#pragma once

#include <atomic>
#include <thread>
#include <type_traits>

#include "kernel.h"
#include "simd.h"

namespace lifecycle {

// Of what adapters add to a product, x · A · B of another adapter for each token, x · A. T is what x, A and B consist
// of: floats, or pairs of bfloat16s that follow each other in the depth (in B in the rank).
//
// The inputs of a kernel from `first` on: A of all adapters [adapters, depth, parts * rank], the adapter of each token
// and what else is of no use here [tokens, 2], and B of up to three parts that share the columns, [adapters, rank,
// columns of the part].
template <typename T>
class Adapters {
 public:
  static constexpr size_t kMostParts = 3, kInputs = 2 + kMostParts, kMostRows = 8;
  static constexpr size_t kWide = std::is_same_v<T, float> ? 1 : 2;  // values of a T
  static ort::Type input(size_t index) {
    return index == 1 ? ort::kInt64 : kWide == 1 ? ort::kFloat : ort::kUint16;
  }

  // Tokens are grouped within blocks of so many.
  Adapters(const Run& run, size_t first, size_t tokens, size_t depth, size_t columns, size_t block);
  // Before anything else: x [tokens, depth].
  void begin(const T* x) { x_ = x; }
  // Computes x · A of a block; either all blocks or none.
  void multiply_block(size_t block);
  // Or of whatever nobody else has begun.
  void multiply_rest();
  // Waits until all of x · A is there; for who has no part left to do. What others have begun cannot fail.
  void wait() const {
    while (done_.load() < all_.size()) std::this_thread::yield();
  }

  // Tokens of one adapter.
  struct Few {
    size_t adapter, count;
    size_t tokens[kMostRows];
  };
  const std::vector<Few>& few() const { return all_; }
  // A part of the columns and its B, for whose rank and x · A of a token there is one measure: T.
  struct Part {
    const T* b;
    size_t columns, first;
    const T* of(size_t adapter, size_t rank) const { return b + adapter * rank * columns; }
  };
  const std::vector<Part>& parts() const { return parts_; }
  size_t rank() const { return rank_ / kWide; }
  const T* inner(size_t token, size_t part) const {
    return inner_ + token * inner_width_ / kWide + part * rank();
  }
  size_t adapter_of(size_t token) const { return (size_t)places_[2 * token]; }
  // Whether tokens from one on have the same.
  bool share(size_t token, size_t count) const {
    for (size_t i = 1; i < count; ++i) {
      if (adapter_of(token + i) != adapter_of(token)) return false;
    }
    return true;
  }
  // Multiplications in all.
  size_t products() const { return tokens_ * (depth_ * inner_width_ + rank_ * columns_); }

 private:
  void group(size_t adapters, size_t block);
  void multiply(const Few& few) noexcept;

  size_t tokens_, depth_, columns_, inner_width_, rank_ = 0;
  const T* x_ = nullptr;
  const T* a_;
  const int64_t* places_;
  std::vector<Part> parts_;
  std::vector<Few> all_;
  std::vector<size_t> blocks_;  // where in `all_` each block begins, and the end
  float* sums_;  // x · A, [tokens, parts * rank]
  T* inner_;     // the same as it is multiplied with B
  // What is read often has to lie in other cache lines than what is written.
  alignas(64) std::atomic<size_t> next_{0};
  std::atomic<size_t> done_{0};
};

// y + x · A · B in float32: x [tokens, depth], y [tokens, columns].
class AdapterUpdate {
 public:
  static constexpr const char* kName = "AdapterUpdate";
  static constexpr size_t kInputs = 2 + Adapters<float>::kInputs, kOutputs = 1;
  static ort::Type input(size_t index) { return index < 2 ? ort::kFloat : Adapters<float>::input(index - 2); }
  static ort::Type output(size_t) { return ort::kFloat; }
  static bool is_optional(size_t index) { return index > 4; }

  AdapterUpdate(const ort::Api& api, const ort::Info*) : api(api) {}
  void run(const Run& run);

  const ort::Api& api;
};

}  // namespace lifecycle
