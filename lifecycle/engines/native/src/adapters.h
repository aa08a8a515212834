#pragma once

#include <atomic>
#include <thread>
#include <type_traits>

#include "kernel.h"
#include "matrices.h"

namespace lifecycle {

// Of what adapters add to a product, x · A · B of another adapter for each token, x · A. T is what x, A and B consist
// of: floats, or pairs of bfloat16s that follow each other in the depth (in B in the rank).
//
// The inputs of a kernel from `first` on: A of all adapters [adapters, depth, parts * rank], the adapter of each token
// and what else is of no use here [tokens, 2], and B of up to three parts that share the columns, [adapters, rank,
// columns of the part], or of pairs [adapters, columns / 16, rank, 16].
template <typename T>
class Adapters {
 public:
  static constexpr size_t kMostParts = 3, kInputs = 2 + kMostParts, kMostRows = 16;
  static constexpr size_t kWide = std::is_same_v<T, float> ? 1 : 2;  // values of a T
  static ort::Type input(size_t index) {
    return index == 1 ? ort::kInt64 : kWide == 1 ? ort::kFloat : ort::kUint16;
  }

  // Tokens are grouped within blocks of so many, those of one adapter in at most as many as a product takes at once.
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
  // The same values as floats.
  const float* inner_floats(size_t token, size_t part) const { return sums_ + token * inner_width_ + part * rank_; }
  size_t adapter_of(size_t token) const { return (size_t)places_[2 * token]; }
  // How many tokens from one on have the same, of `count`.
  size_t sharing(size_t token, size_t count) const {
    size_t i = 1;
    while (i < count && adapter_of(token + i) == adapter_of(token)) ++i;
    return i;
  }
  // Where B of 16 columns lies, of pairs: in a part of that number, so many values from its beginning.
  struct Place {
    const Part& part;
    size_t number, first;
  };
  Place place(size_t column) const {
    size_t p = 0;
    while (column >= parts_[p].columns) column -= parts_[p++].columns;
    return {parts_[p], p, column * rank()};
  }
  // Multiplications in all.
  size_t products() const { return tokens_ * (depth_ * inner_width_ + rank_ * columns_); }

 private:
  void group(size_t adapters, size_t block);
  void multiply(const Few& few) noexcept;
  void multiply_matrices(const Few& few, const T* w) noexcept;

  size_t tokens_, depth_, columns_, inner_width_, rank_ = 0;
  const T* x_ = nullptr;
  const T* a_;
  const int64_t* places_;
  std::vector<Part> parts_;
  std::vector<Few> all_;
  std::vector<size_t> blocks_;  // where in `all_` each block begins, and the end
  float* sums_;  // x · A, [tokens, parts * rank], in the end as it is multiplied with B
  T* inner_;     // the same in pairs
  // What is read often has to lie in other cache lines than what is written.
  alignas(64) std::atomic<size_t> next_{0};
  std::atomic<size_t> done_{0};
};

// The largest number up to 16 that divides n: how many pairs matrices multiply at once.
inline size_t even_share(size_t n) {
  size_t share = std::clamp<size_t>(n, 1, kMatrixRows);
  while (n % share != 0) --share;
  return share;
}

template <typename T>
struct VectorOf {
  typedef v16f Type;
};
template <>
struct VectorOf<uint32_t> {
  typedef v16i Type;
};

// acc += x [MR, depth] times w [depth, 16 * NV columns of `stride`], or of one vector's first `count` columns where that
// `kIsPart`. Sums run over the depth; or `kAsMatrices` they have the bits of those that matrices take of pairs: from
// nothing those of low and those of high halves by themselves, over as many pairs as are multiplied at once, and then
// both together to what was there; but for sums below 2^-126, which are nothing to matrices. Rows of w that are
// `kAhead` of what is read are asked for. Pairs of x may be floats too, which saves parting them.
template <bool kAsMatrices, bool kIsPart = false, size_t kAhead = 0, int MR, int NV, typename X, typename T>
LIFECYCLE_INLINE void add_products(v16f (&acc)[MR][NV], const X* const* x, size_t depth, const T* w, size_t stride,
                                   size_t count = kLanes) {
  typedef typename VectorOf<T>::Type Vector;
  const size_t share = kAsMatrices ? even_share(depth) : depth;
  for (size_t from = 0; from < depth; from += share) {
    v16f first[MR][NV] = {}, second[MR][NV] = {};
    for (size_t k = from; k < from + share; ++k, w += stride) {
      Vector columns[NV];
      LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) {
        columns[j] = kIsPart ? some<Vector>(w, count) : load<Vector>(w + j * kLanes);
        if constexpr (kAhead > 0) __builtin_prefetch(w + kAhead * stride + j * kLanes);
      }
      LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
        LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) {
          if constexpr (kAsMatrices) {
            const X* pair = x[i] + k * (std::is_same_v<X, float> ? 2 : 1);
            first[i][j] = multiply_add(low_half(columns[j]), low_half(pair), first[i][j]);
            second[i][j] = multiply_add(high_half(columns[j]), high_half(pair), second[i][j]);
          } else {
            first[i][j] = dot(first[i][j], columns[j], x[i][k]);
          }
        }
      }
    }
    LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
      LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] += first[i][j] + second[i][j];
    }
  }
}

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
