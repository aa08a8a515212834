// Products in registers of matrices. Sums of integers are exact, so that they have the bits of those of vectors.
#include "products.h"

namespace lifecycle {
namespace {

// Numbers of registers: sums of some tiles, rows, weights; and x · A, B and their sums, whose register has the shape of the
// others' and holds sums of blocks before.
constexpr int kSums = 0, kRows = 3, kWeights = 4, kInner = 5, kColumns = 6, kAdded = 7;

// Of up to so many rows, so many fours of k and of the rank at once.
Shapes shapes(size_t rows, size_t fours, size_t of_rank) {
  const Shape sums{rows, kMatrixBytes};
  return {sums, sums, sums, {rows, 4 * fours}, {fours, kMatrixBytes}, {rows, 4 * of_rank}, {of_rank, kMatrixBytes}, sums};
}

// The largest number up to 16 that divides n: how many fours are multiplied at once.
size_t even_share(size_t n) {
  size_t share = std::clamp<size_t>(n, 1, kMatrixRows);
  while (n % share != 0) --share;
  return share;
}

// Fours of k that are multiplied at once.
size_t fours_of(const Weights& w) { return w.is_rowwise ? kMatrixRows : even_share(w.block / 4); }

// Sums of a tile of adapters for up to 16 rows, [rows, 16], with room for 16 rows more.
void adapter_sums(const Adapters& adapters, size_t row, size_t count, size_t tile, int32_t* sums) {
  const size_t part = adapters.shape.part_of(tile), fours = adapters.shape.fours, share = even_share(fours);
  for (size_t i = 0; i < count; i += adapters.owners.sharing(row + i, count - i)) {
    const uint8_t* b = adapters.tile(adapters.owners.of(row + i), tile);
    clear_matrix<kAdded>();
    for (size_t g = 0; g < fours; g += share) {
      load_matrix<kInner>(adapters.inner(row + i, part) + 4 * g, adapters.inner_bytes());
      load_matrix<kColumns>(b + g * AdapterShape::kTileBytes, AdapterShape::kTileBytes);
      multiply_bytes<kAdded, kInner, kColumns>();
    }
    // Rows of other adapters too; theirs come after them.
    store_matrix<kAdded>(sums + i * kLanes, kMatrixBytes);
  }
}

// y of some tiles, by what products(j, i) gives for a tile and a row.
template <int kTiles, typename Products>
LIFECYCLE_INLINE void finish(const Weights& w, const Rows& rows, size_t row, size_t count, size_t tile, float* y,
                             const Products& products) {
  const size_t columns = w.columns;
  const Adapters* adapters = rows.adapters;
  int32_t added[kTiles][2 * kMatrixRows * kLanes];
  if (adapters != nullptr) {
    adapters->wait();
    for (size_t j = 0; j < kTiles && (tile + j) * kLanes < columns; ++j) {
      adapter_sums(*adapters, row, count, tile + j, added[j]);
    }
  }
  for (size_t j = 0; j < kTiles; ++j) {
    const size_t column = (tile + j) * kLanes;
    if (column >= columns) break;
    const size_t part = adapters == nullptr ? 0 : adapters->shape.part_of(tile + j);
    const float* bias = w.bias.get() == nullptr ? nullptr : w.bias.get() + column;
    float* to = y + row * columns + column;
    for (size_t i = 0; i < count; ++i, to += columns) {
      v16f total = products(j, i);
      if (bias != nullptr) total += load<v16f>(bias);
      if (adapters != nullptr) {
        const uint8_t* of = adapters->tile(adapters->owners.of(row + i), tile + j);
        total = adapters->add(total, load<v16i>(added[j] + i * kLanes), row + i, part, of);
      }
      put(to, total, columns - column);
    }
  }
}

// Tiles in 4 bits as signed bytes, what stands for 0 taken off.
void unpack(const Weights& w, size_t tile, int8_t* to) {
  const size_t blocks = w.blocks(), pairs = w.block / 8;
  const uint8_t* from = w.packed.get() + tile * w.tile_bytes();
  for (size_t b = 0; b < kBlockTiles * blocks; ++b) {
    constexpr int32_t kEach = 0x01010101;
    const size_t place = (tile * blocks + b) * kLanes;
    const v16i zero = (w.zeros.get() == nullptr ? spread(w.zero) : load<v16i>(w.zeros.get() + place)) * kEach;
    for (size_t pair = 0; pair < pairs; ++pair, from += 64, to += 128) {
      const v16i both = load<v16i>(from);
      store(to, (v64u)(both & 0x0f0f0f0f) - (v64u)zero);
      store(to + 64, (v64u)((both >> 4) & 0x0f0f0f0f) - (v64u)zero);
    }
  }
}

}  // namespace

// Without adapters, whatever shape theirs would have.
ProductMatrices::ProductMatrices(size_t rows, const Weights& w, const Adapters* adapters)
    : Matrices(shapes(rows, fours_of(w), even_share(adapters == nullptr ? kMatrixRows : adapters->shape.fours))) {}

// Blocks begin where a stretch does, or lie within one.
bool fit_matrices(const Weights& w) {
  return has_matrices() && (w.is_rowwise || kStretch % w.block == 0 || w.block % kStretch == 0);
}

const int8_t* tiles_of(const Weights& w, size_t tile) {
  if (w.bits == 8) return reinterpret_cast<const int8_t*>(w.packed.get() + tile * w.tile_bytes());
  int8_t* bytes = scratch<int8_t, 15>(kBlockTiles * w.tile_bytes() * 2);
  unpack(w, tile, bytes);
  return bytes;
}

namespace {

void rowwise(const Weights& w, const Rows& rows, size_t row, size_t count, size_t tile, const int8_t* weights,
             float* y) {
  const size_t steps = rows.width / kStretch, tile_bytes = w.tile_bytes();
  const int8_t* values = rows.values + row * rows.width;
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
  finish<kRowwiseTiles>(w, rows, row, count, tile, y, [&](size_t j, size_t i) {
    const v16i sum = load<v16i>(sums[j] + i * kLanes) + spread(rows.offsets[row + i]);
    // The order of ONNX Runtime's nodes: bits are the same.
    return rounded_product(to_float(sum) * load<v16f>(w.scales.get() + (tile + j) * kLanes) * rows.scales[row + i]);
  });
}

// Sums are stored and can be read only some time later: those of the next blocks are begun before that.
template <int kBits>
void in_blocks(const Weights& w, const Rows& rows, size_t row, size_t count, size_t tile, const int8_t* weights,
               float* y) {
  constexpr int kAtOnce = 4, kSumsOf[kAtOnce] = {kSums, kSums + 1, kSums + 2, kAdded};
  const size_t blocks = w.blocks(), step = 4 * fours_of(w), tile_bytes = w.tile_bytes() * (8 / kBits);
  const int8_t* values = rows.values + row * rows.width;
  const bool has_zeros = w.zeros.get() != nullptr;
  float totals[kBlockTiles][kMatrixRows * kLanes];
  int32_t sums[2][kAtOnce][kMatrixRows * kLanes];
  for (size_t j = 0; j < kBlockTiles; ++j, weights += tile_bytes) {
    auto begin = [&](size_t from, int32_t (&to)[kAtOnce][kMatrixRows * kLanes]) {
      each<kAtOnce>([&](auto n) {
        const size_t b = from + n;
        if (b >= blocks) return;
        constexpr int kRegister = kSumsOf[n];
        clear_matrix<kRegister>();
        for (size_t k = b * w.block; k < (b + 1) * w.block; k += step) {
          load_matrix<kRows>(values + in_stretches(k, kMatrixRows * kStretch), kStretch);
          load_matrix<kWeights>(weights + k * kLanes, kMatrixBytes);
          if constexpr (kBits == 8) {
            multiply_bytes<kRegister, kRows, kWeights>();
          } else {
            multiply_signed<kRegister, kRows, kWeights>();
          }
        }
        store_matrix<kRegister>(to[n], kMatrixBytes);
      });
    };
    v16f total[kMatrixRows] = {};
    auto add = [&](size_t b, const int32_t* from) {
      const size_t place = ((tile + j) * blocks + b) * kLanes;
      const v16f scale = load<v16f>(w.scales.get() + place);
      const v16i zero = has_zeros ? load<v16i>(w.zeros.get() + place) : spread(w.zero);
      const float* scales = rows.scales + row * blocks + b;
      const int32_t* of_rows = rows.sums + row * blocks + b;
      LIFECYCLE_UNROLL for (size_t i = 0; i < kMatrixRows; ++i, scales += blocks, of_rows += blocks) {
        v16i sum = load<v16i>(from + i * kLanes);
        if constexpr (kBits == 8) sum -= zero * *of_rows;
        total[i] = multiply_add(to_float(sum), scale * *scales, total[i]);
      }
    };
    begin(0, sums[0]);
    for (size_t from = 0, turn = 0; from < blocks; from += kAtOnce, turn ^= 1) {
      begin(from + kAtOnce, sums[turn ^ 1]);
      for (size_t b = from; b < std::min(blocks, from + kAtOnce); ++b) add(b, sums[turn][b - from]);
    }
    for (size_t i = 0; i < kMatrixRows; ++i) store(totals[j] + i * kLanes, total[i]);
  }
  finish<kBlockTiles>(w, rows, row, count, tile, y,
                      [&](size_t j, size_t i) { return load<v16f>(totals[j] + i * kLanes); });
}

}  // namespace

void rows_by_matrices(const Weights& w, const Rows& rows, size_t row, size_t count, size_t tile, const int8_t* weights,
                      float* y) {
  if (w.is_rowwise) return rowwise(w, rows, row, count, tile, weights, y);
  if (w.bits == 8) return in_blocks<8>(w, rows, row, count, tile, weights, y);
  return in_blocks<4>(w, rows, row, count, tile, weights, y);
}

}  // namespace lifecycle
