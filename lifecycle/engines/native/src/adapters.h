// What adapters add to products, x · A · B of another adapter for each token.
#pragma once

#include <atomic>
#include <thread>

#include "rows.h"
#include "simd.h"

namespace lifecycle {

// The adapter of each token.
class Owners {
 public:
  static constexpr size_t kMostRows = 8;
  // Tokens of one adapter.
  struct Few {
    size_t adapter, count;
    size_t tokens[kMostRows];
  };

  // places [tokens, 2]: the adapter of each, below `adapters`, and what is of no use here. Those of one adapter are put
  // together, up to kMostRows, within blocks of so many tokens.
  Owners(const Tensor& places, size_t tokens, size_t adapters, size_t block);

  size_t of(size_t token) const { return (size_t)places_[2 * token]; }
  // How many tokens from one on have the same, of `count`.
  size_t sharing(size_t token, size_t count) const { return std::min(count, (size_t)runs_[token]); }
  size_t count() const { return count_; }
  const Few& few(size_t i) const { return all_[i]; }
  // Where a block begins among them; there is one more, which is the end.
  size_t begin(size_t block) const { return begins_[block]; }

 private:
  const int64_t* places_;
  uint32_t* runs_;  // how many from each token on
  Few* all_;
  size_t* begins_;
  size_t count_ = 0;
};

// How a product's adapters lie in the bank [adapters, bytes]. A and B are bytes, for which 128 stands for 0. Tiles of A are
// those of weights, [depth / 4, 16, 4], of 16 columns of [depth, parts * rank]. Behind them are tiles of B, each of 16
// columns of the product: [rank / 4, 16, 4] and 16 scales, floats. A column of A has no scale, those of B bear it.
struct AdapterShape {
  static constexpr size_t kMostParts = 3, kTileBytes = kLanes * 4;

  // The columns of a product are those of some parts, each a multiple of 16, whose products with A and B are their own.
  size_t depth = 0, rank = 0, parts = 0, columns[kMostParts] = {};
  // In bytes: a tile of A, all of them, a tile of B, and an adapter; fours of the rank, and tiles of A.
  size_t inner_tile_bytes = 0, inner_bytes = 0, tile_bytes = 0, bytes = 0, fours = 0, inner_tiles = 0;

  // To be called when all of the first line is known.
  void measure() {
    fours = (rank + 3) / 4;
    inner_tiles = (parts * rank + kLanes - 1) / kLanes;
    inner_tile_bytes = (depth + 3) / 4 * kTileBytes;
    inner_bytes = inner_tiles * inner_tile_bytes;
    tile_bytes = fours * kTileBytes + kLanes * sizeof(float);
    bytes = inner_bytes + all_columns() / kLanes * tile_bytes;
  }
  size_t all_columns() const { return columns[0] + columns[1] + columns[2]; }
  // To which part a tile belongs.
  size_t part_of(size_t tile) const {
    size_t part = 0;
    for (size_t left = tile * kLanes; left >= columns[part]; ++part) left -= columns[part];
    return part;
  }
};

// The adapters of one product. Sums are of integers and therefore exact, whatever takes them, and each token's scales are
// its own: no token's bits depend on others.
class Adapters {
 public:
  // Inputs of a kernel from `first` on: the bank, and the places of `Owners`.
  static constexpr size_t kInputs = 2, kBlock = Owners::kMostRows;
  static ort::Type input(size_t index) { return index == 0 ? ort::kUint8 : ort::kInt64; }

  Adapters(const Run& run, size_t first, const AdapterShape& shape, size_t tokens);
  // Before anything else: x.
  void begin(const Rows& rows) { rows_ = &rows; }
  // Computes x · A of a block of kBlock tokens; either all blocks or none.
  void multiply_block(size_t block);
  // Or of whatever nobody else has begun.
  void multiply_rest();
  // Waits until all of x · A is there; for who has no part left to do. What others have begun cannot fail.
  void wait() const {
    while (done_.load() < owners.count()) std::this_thread::yield();
  }

  // B of 16 columns.
  const uint8_t* tile(size_t adapter, size_t number) const {
    return bank_ + adapter * shape.bytes + shape.inner_bytes + number * shape.tile_bytes;
  }
  // x · A of a token and a part as integers, [rank] and zeros up to a multiple of 4; those of the next token lie
  // `inner_bytes` behind.
  const int8_t* inner(size_t token, size_t part) const {
    return values_ + token * inner_bytes() + part * 4 * shape.fours;
  }
  size_t inner_bytes() const { return shape.parts * 4 * shape.fours; }
  // total + what their sums with a tile of B amount to.
  LIFECYCLE_INLINE v16f add(v16f total, v16i sums, size_t token, size_t part, const uint8_t* tile) const {
    const size_t at = token * shape.parts + part;
    const v16f scale = load<v16f>(tile + shape.fours * AdapterShape::kTileBytes) * scales_[at];
    return multiply_add(to_float(sums + spread(offsets_[at])), scale, total);
  }

  const AdapterShape shape;
  const Owners owners;

 private:
  void multiply(const Owners::Few& few) noexcept;
  void round(size_t token) noexcept;

  const uint8_t* bank_;
  const Rows* rows_ = nullptr;
  float* inner_;      // x · A, [tokens, 16 * tiles of A]
  int8_t* values_;    // the same as integers
  float* scales_;     // [tokens, parts]
  int32_t* offsets_;  // what their sums with B get for what stands for 0, [tokens, parts]
  // What is read often has to lie in other cache lines than what is written.
  alignas(64) std::atomic<size_t> next_{0};
  std::atomic<size_t> done_{0};
};

}  // namespace lifecycle
