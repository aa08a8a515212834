// Products in registers of matrices. Sums of integers are exact, so that they have the bits of those of vectors.
#include "products.h"

namespace lifecycle {
namespace {

// Numbers of registers: sums of three tiles, rows, weights; and x · A, B and their sums.
constexpr int kSums = 0, kRows = 3, kWeights = 4, kInner = 5, kColumns = 6, kAdded = 7;
// Of so many rows, and of pairs of the rank that are multiplied at once.
Matrices::Shapes shapes(Shape rows, size_t share) {
  return {rows, rows, rows, rows, {kMatrixRows, kMatrixBytes}, {rows.rows, share * sizeof(uint32_t)}, {share, kMatrixBytes}, rows};
}

}  // namespace

// Without adapters, whatever shape theirs would have.
ProductMatrices::ProductMatrices(size_t rows, const Pairs* adapters)
    : Matrices(shapes({rows, kMatrixBytes}, adapters == nullptr ? kMatrixRows : even_share(adapters->rank()))) {}

void adapt_by_matrices(const Pairs& adapters, size_t row, size_t count, size_t tile, float* added) {
  const Pairs::Place place = adapters.place(tile * kLanes);
  const size_t rank = adapters.rank(), share = even_share(rank);
  const size_t inner_bytes = (size_t)(adapters.inner(row + 1, 0) - adapters.inner(row, 0)) * sizeof(uint32_t);
  for (size_t i = 0; i < count; i += adapters.sharing(row + i, count - i)) {
    const uint32_t* b = place.part.of(adapters.adapter_of(row + i), rank) + place.first;
    clear_matrix<kAdded>();
    for (size_t r = 0; r < rank; r += share) {
      load_matrix<kInner>(adapters.inner(row + i, place.number) + r, inner_bytes);
      load_matrix<kColumns>(b + r * kLanes, kMatrixBytes);
      multiply_pairs<kAdded, kInner, kColumns>();
    }
    // Rows of other adapters too; theirs come after them.
    store_matrix<kAdded>(added + i * kLanes, kMatrixBytes);
  }
}

void rows_by_matrices(const Weights& w, const Rows& rows, size_t row, size_t count, size_t tile, float* y) {
  const size_t columns = w.columns, steps = rows.width / kStretch;
  // Row-wise a tile is one block.
  const size_t tile_bytes = w.block * kLanes;
  const int8_t* values = rows.values + row * rows.width;
  const uint8_t* weights = w.packed.get() + tile * tile_bytes;
  each<kRowwiseTiles>([](auto j) { clear_matrix<kSums + j>(); });
  for (size_t step = 0; step < steps; ++step) {
    load_matrix<kRows>(values + step * kMatrixRows * kStretch, kStretch);
    each<kRowwiseTiles>([&](auto j) {
      load_matrix<kWeights>(weights + j * tile_bytes + step * kMatrixRows * kMatrixBytes, kMatrixBytes);
      multiply_bytes<kSums + j, kRows, kWeights>();
    });
  }
  int32_t sums[kRowwiseTiles][kMatrixRows * kLanes];
  each<kRowwiseTiles>([&](auto j) { store_matrix<kSums + j>(sums[j], kMatrixBytes); });
  float added[kRowwiseTiles][2 * kMatrixRows * kLanes];
  if (rows.adapters != nullptr) {
    rows.adapters->wait();
    for (size_t j = 0; j < kRowwiseTiles && (tile + j) * kLanes < columns; ++j) {
      adapt_by_matrices(*rows.adapters, row, count, tile + j, added[j]);
    }
  }
  for (size_t j = 0; j < kRowwiseTiles; ++j) {
    const size_t column = (tile + j) * kLanes;
    if (column >= columns) break;
    const v16f scale = load<v16f>(w.scales.get() + column);
    const float* bias = w.bias.get() == nullptr ? nullptr : w.bias.get() + column;
    float* to = y + row * columns + column;
    for (size_t i = 0; i < count; ++i, to += columns) {
      const v16i sum = load<v16i>(sums[j] + i * kLanes) - spread(w.zero * rows.sums[row + i]);
      // The order of ONNX Runtime's nodes: bits are the same.
      v16f total = rounded_product(to_float(sum) * scale * rows.scales[row + i]);
      if (bias != nullptr) total += load<v16f>(bias);
      if (rows.adapters != nullptr) total += load<v16f>(added[j] + i * kLanes);
      put(to, total, columns - column);
    }
  }
}

}  // namespace lifecycle
