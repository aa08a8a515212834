// Rows of activations in int8.
#pragma once

#include "kernel.h"
#include "matrices.h"

namespace lifecycle {

class Adapters;

// Values of a row lie in stretches that begin `stride` bytes apart.
constexpr size_t kStretch = kMatrixBytes;
inline size_t in_stretches(size_t k, size_t stride) { return k / kStretch * stride + k % kStretch; }

struct Rows {
  int8_t* values = nullptr;  // [rows, width], or for matrices [rows / 16, width / 64, 16, 64]
  float* scales = nullptr;   // [rows, blocks]
  int32_t* sums = nullptr;   // [rows, blocks]
  int32_t* offsets = nullptr;  // what a sum of products gets for what stands for 0 in the weights, [rows, blocks]
  size_t width = 0, block = 0, blocks = 0;
  bool is_rowwise = false, in_matrices = false;
  const Adapters* adapters = nullptr;  // of these rows

  size_t stride() const { return in_matrices ? kMatrixRows * kStretch : kStretch; }
  int8_t* row(size_t i) const {
    const size_t first = i / kMatrixRows * kMatrixRows;
    return values + (in_matrices ? first * width + (i - first) * kStretch : i * width);
  }
};

// What a row-wise scale is multiplied with besides.
constexpr float kStep = 1.0f / 127;

// `count` values of a row as int8, in stretches, and their sum. What comes back is their scale: the largest of them, in
// blocks divided by 127; 0 where all are 0 (in blocks next to 0), and NaN where a value is none. They begin where a
// stretch does, or lie within one.
float round_block(const float* x, size_t count, bool is_rowwise, int8_t* out, size_t stride, int32_t* total);

// sum [width] = x + skip, and y = sum divided by its root mean square, times gamma.
void norm_row(const float* x, const float* skip, const float* gamma, size_t width, float epsilon, float* sum,
              float* y);

// y [width] = silu(gate) * up of x = [gate, up].
void gate_row(const float* x, size_t width, float* y);

}  // namespace lifecycle
