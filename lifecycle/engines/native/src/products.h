#pragma once

#include <functional>
#include <memory>

#include "adapters.h"
#include "lasting.h"

namespace lifecycle {

// Tiles of weights that are multiplied together: as many as leave registers for sums of some rows.
constexpr int kRowwiseTiles = LIFECYCLE_AVX512 ? 3 : 1, kBlockTiles = LIFECYCLE_AVX512 ? 2 : 1;

// A matrix [depth, columns] in tiles; see products.cpp.
struct Weights {
  size_t depth = 0, columns = 0;
  size_t block = 0;  // values of k that share a scale, a multiple of 8; all of them, rounded up, row-wise
  int bits = 8;
  bool is_rowwise = false;
  bool is_small = false;       // row-wise, none is above 127: 16 bits hold two products with those of a row
  int32_t zero = 128;          // what stands for 0 where there are no `zeros`
  Lasting<uint8_t> packed;      // [tiles, block after block]
  Lasting<float> scales;        // [tiles, blocks, 16]
  Lasting<int32_t> zeros;       // [tiles, blocks, 16], or empty
  Lasting<float> bias;          // [columns], or empty

  size_t blocks() const { return (depth + block - 1) / block; }
  size_t tiles() const;
  size_t tile_bytes() const { return blocks() * block * 16 * bits / 8; }
  void allocate(bool with_zeros);
  void set_bias(const Tensor& given);
};

// Whether weights can be multiplied in registers of matrices.
bool fit_matrices(const Weights& weights);

// Such registers for products of up to `rows` rows, and for what adapters add to them.
class ProductMatrices : public Matrices {
 public:
  ProductMatrices(size_t rows, const Weights& weights, const Adapters* adapters);
};

// The tiles that are multiplied together, from one on, as bytes; until this thread asks again.
const int8_t* tiles_of(const Weights& weights, size_t tile);

// In such registers: up to 16 rows of y [.., columns] from `row` on, for the columns of the tiles from `tile` on.
void rows_by_matrices(const Weights& weights, const Rows& rows, size_t row, size_t count, size_t tile,
                      const int8_t* tiles, float* y);

// y [count, columns] = x [count, depth] times the weights. Where it `is_gated` the input is [gate, up], 2 * depth wide,
// and silu(gate) * up is multiplied. What adapters add is added, where there are any. `tops` [count, columns_of(columns)]
// or null are the largest of each column of logits, one of them no number where a logit is none.
void product(const Run& run, const Weights& weights, bool is_gated, const float* x, size_t count, float* y,
             float* tops, Adapters* adapters);

// The weights that `make` fills, or those that another kernel made of the same bytes: the graphs of a model share them.
std::shared_ptr<const Weights> shared(const std::vector<Tensor>& of, const std::vector<int64_t>& sizes,
                                      const std::function<void(Weights&)>& make);

}  // namespace lifecycle
