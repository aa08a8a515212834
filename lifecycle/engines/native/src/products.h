#pragma once

#include <functional>
#include <memory>

#include "adapters.h"

namespace lifecycle {

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
constexpr size_t kAdaptedBlock = 8;

// Activations in int8.
struct Rows {
  int8_t* values = nullptr;   // [rows, width]
  float* scales = nullptr;    // [rows, blocks]
  int32_t* sums = nullptr;    // [rows, blocks]
  size_t width = 0;
  const Pairs* adapters = nullptr;  // of these rows
};

// y [count, columns] = x [count, depth] times the weights. Where it `is_gated` the input is [gate, up], 2 * depth wide,
// and silu(gate) * up is multiplied. What adapters add is added, where there are any.
void product(const Run& run, const Weights& weights, bool is_gated, const float* x, size_t count, float* y,
             Pairs* adapters);

// The weights that `make` fills, or those that another kernel made of the same bytes: the graphs of a model share them.
std::shared_ptr<const Weights> shared(const std::vector<Tensor>& of, const std::vector<int64_t>& sizes,
                                      const std::function<void(Weights&)>& make);

// sum [width] = x + skip, and y = sum divided by its root mean square, times gamma.
void norm_row(const float* x, const float* skip, const float* gamma, size_t width, float epsilon, float* sum,
              float* y);

// y [width] = silu(gate) * up of x = [gate, up].
void gate_row(const float* x, size_t width, float* y);

}  // namespace lifecycle
