#pragma once

#include <functional>
#include <memory>

#include "adapters.h"

namespace lifecycle {

// Tiles of weights that are multiplied together.
constexpr int kRowwiseTiles = 3, kBlockTiles = 2;

// A matrix [depth, columns] in tiles; see products.cpp.
struct Weights {
  size_t depth = 0, columns = 0;
  size_t block = 0;  // values of k that share a scale, a multiple of 8; all of them, rounded up, row-wise
  int bits = 8;
  bool is_rowwise = false;
  int32_t zero = 128;          // what stands for 0 where there are no `zeros`
  Buffer<uint8_t> packed;      // [tiles, block after block]
  Buffer<float> scales;        // [tiles, blocks, 16]
  Buffer<int32_t> zeros;       // [tiles, blocks, 16], or empty
  Buffer<float> bias;          // [columns], or empty

  size_t blocks() const { return (depth + block - 1) / block; }
  size_t tiles() const;
  size_t tile_bytes() const { return blocks() * block * 16 * bits / 8; }
  void allocate(bool with_zeros);
  void set_bias(const Tensor& given);
};

// Adapters of products, and how many tokens are a block of theirs.
typedef Adapters<uint32_t> Pairs;
inline size_t adapted_block() { return has_matrices() ? kMatrixRows : 8; }

// Activations in int8.
struct Rows {
  int8_t* values = nullptr;   // [rows, width], or for matrices [rows / 16, width / 64, 16, 64]
  float* scales = nullptr;    // [rows, blocks]
  int32_t* sums = nullptr;    // [rows, blocks]
  size_t width = 0;
  bool in_matrices = false;
  const Pairs* adapters = nullptr;  // of these rows
};

// Whether weights can be multiplied in registers of matrices.
bool fit_matrices(const Weights& weights);

// Such registers for products of up to `rows` rows, and for what adapters add to them.
class ProductMatrices : public Matrices {
 public:
  ProductMatrices(size_t rows, const Weights& weights, const Pairs* adapters);
};

// The tiles that are multiplied together, from one on, as bytes; until this thread asks again.
const int8_t* tiles_of(const Weights& weights, size_t tile);

// In such registers: up to 16 rows of y [.., columns] from `row` on, for the columns of the tiles from `tile` on.
void rows_by_matrices(const Weights& weights, const Rows& rows, size_t row, size_t count, size_t tile,
                      const int8_t* tiles, float* y);

// In such registers, what adapters add to a tile of rows: `added` [count, 16], with room for 16 rows more.
void adapt_by_matrices(const Pairs& adapters, size_t row, size_t count, size_t tile, float* added);

// y [count, columns] = x [count, depth] times the weights. Where it `is_gated` the input is [gate, up], 2 * depth wide,
// and silu(gate) * up is multiplied. What adapters add is added, where there are any.
void product(const Run& run, const Weights& weights, bool is_gated, const float* x, size_t count, float* y,
             Pairs* adapters);

// The weights that `make` fills, or those that another kernel made of the same bytes: the graphs of a model share them.
std::shared_ptr<const Weights> shared(const std::vector<Tensor>& of, const std::vector<int64_t>& sizes,
                                      const std::function<void(Weights&)>& make);

// `count` values of a row as int8, in stretches that begin `stride` bytes apart, and their sum. What comes back is their
// scale: the largest of them, in blocks divided by 127; 0 where all are 0 (in blocks next to 0), and NaN where a value is
// none. They begin where a stretch does, or lie within one.
constexpr size_t kStretch = 64;
inline size_t in_stretches(size_t k, size_t stride) { return k / kStretch * stride + k % kStretch; }
float round_block(const float* x, size_t count, bool is_rowwise, int8_t* out, size_t stride, int32_t* total);

// sum [width] = x + skip, and y = sum divided by its root mean square, times gamma.
void norm_row(const float* x, const float* skip, const float* gamma, size_t width, float epsilon, float* sum,
              float* y);

// y [width] = silu(gate) * up of x = [gate, up].
void gate_row(const float* x, size_t width, float* y);

}  // namespace lifecycle
