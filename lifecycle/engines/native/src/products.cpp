// Products with weights in integers: rows of activations are rounded to int8 by themselves, so that integer sums
// are exact and a row's result depends on no other row.
//
// Weights lie in tiles of 16 columns: for each four values of k, 64 unsigned bytes, [column][k]. That is what one
// instruction multiplies with four values of a row. In 4 bits a byte holds k in its low and k + 4 in its high half.
#include "products.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>

#include "columns.h"

namespace lifecycle {
namespace {

// Rows at once: their sums, of which blocks have two kinds, fill three quarters of the registers. So many that they are
// all there are have their second kind in memory in blocks, which takes less time than two shares of them. With AVX2 there
// are half as many registers, of half the length.
constexpr int kRowwiseRows = LIFECYCLE_AVX512 ? 8 : 5, kBlockRows = LIFECYCLE_AVX512 ? 6 : 5;
constexpr int kAllBlockRows = LIFECYCLE_AVX512 ? 8 : 5;
constexpr size_t kMostTasks = 32;
// Fewer rows take as long in vectors: both wait for the weights. In blocks, most of the time goes into what follows their
// sums.
constexpr size_t kWorthMatrices = 12, kWorthMatricesInBlocks = 32;
// Rows that are multiplied with a group of tiles before the next one: they stay in the second cache. Vectors take so long
// that weights may be read anew for each part, matrices do not: theirs are as many rows as there is room for.
constexpr size_t kRowsAtOnce = 48, kMatrixRoom = 1 << 19;
// Rows from which on blocks of them have their adapters' first product taken where they are rounded. Of few, one thread
// takes it while the others begin with the tiles.
constexpr size_t kOwnProducts = 64;

LIFECYCLE_INLINE int32_t four_of(const int8_t* row, size_t group) {
  int32_t four;
  std::memcpy(&four, row + 4 * group, 4);
  return four;
}

// Weights of the tiles that come next, into the second cache.
LIFECYCLE_INLINE void ahead(const uint8_t* weights) { __builtin_prefetch(weights, 0, 2); }

// What weights are: of 4 bits, of 8, or of 8 of which none is above 127.
enum class Bits { kFour, kEight, kSmallEight };
// Fours of k of which pairs of products with weights of 4 bits have room in 16 bits: 8 * 2 * 15 * 127 < 2^15.
constexpr size_t kMostPairs = 8;

// use(i, j, w, four) for MR rows and NR tiles of weights of 4 bits: two fours of k, which share bytes, after two others.
template <int MR, int NR, typename Use>
LIFECYCLE_INLINE void each_two(const uint8_t* weights, size_t tile_bytes, const int8_t* rows, size_t row_bytes,
                               size_t from, size_t to, const Use& use) {
  for (size_t g = from; g < to; g += 2) {
    v16i low[NR], high[NR];
    LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) {
      const v16i both = load<v16i>(weights + j * tile_bytes + 32 * g);
      ahead(weights + (j + NR) * tile_bytes + 32 * g);
      low[j] = both & 0x0f0f0f0f;
      high[j] = (both >> 4) & 0x0f0f0f0f;
    }
    LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
      const int32_t first = four_of(rows + i * row_bytes, g), second = four_of(rows + i * row_bytes, g + 1);
      LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) use(i, j, low[j], first);
      LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) use(i, j, high[j], second);
    }
  }
}

// Sums of products over `groups` fours of k, of MR rows with NR tiles.
template <Bits kBits, int MR, int NR>
LIFECYCLE_INLINE void multiply(v16i (&acc)[MR][NR], const uint8_t* weights, size_t tile_bytes,
                               const int8_t* rows, size_t row_bytes, size_t groups) {
  if constexpr (kBits != Bits::kFour) {
    for (size_t g = 0; g < groups; ++g) {
      v16i w[NR];
      LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) {
        w[j] = load<v16i>(weights + j * tile_bytes + 64 * g);
        ahead(weights + (j + NR) * tile_bytes + 64 * g);
      }
      LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
        const int32_t four = four_of(rows + i * row_bytes, g);
        LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) {
          if constexpr (kBits == Bits::kSmallEight) {
            acc[i][j] = add_pairs(acc[i][j], dot_pairs(v32s{}, w[j], four));
          } else {
            acc[i][j] = dot(acc[i][j], w[j], four);
          }
        }
      }
    }
  } else if constexpr (kInPairs) {
    for (size_t from = 0; from < groups; from += kMostPairs) {
      v32s pairs[MR][NR] = {};
      each_two<MR, NR>(weights, tile_bytes, rows, row_bytes, from, std::min(groups, from + kMostPairs),
                       [&](int i, int j, v16i w, int32_t four) __attribute__((always_inline)) {
                         pairs[i][j] = dot_pairs(pairs[i][j], w, four);
                       });
      LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
        LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = add_pairs(acc[i][j], pairs[i][j]);
      }
    }
  } else {
    each_two<MR, NR>(weights, tile_bytes, rows, row_bytes, 0, groups,
                     [&](int i, int j, v16i w, int32_t four) __attribute__((always_inline)) {
                       acc[i][j] = dot(acc[i][j], w, four);
                     });
  }
}

// What adapters add to a tile of MR rows. A row has the same bits whether or not others have its adapter.
template <int MR>
LIFECYCLE_INLINE void adapt(v16f (&total)[MR], const Adapters& adapters, size_t row, size_t number) {
  const size_t part = adapters.shape.part_of(number), fours = adapters.shape.fours;
  const int8_t* inner = adapters.inner(row, part);
  const size_t inner_bytes = adapters.inner_bytes();
  if (adapters.owners.sharing(row, MR) == MR) {
    const uint8_t* tile = adapters.tile(adapters.owners.of(row), number);
    v16i sums[MR] = {};
    for (size_t g = 0; g < fours; ++g) {
      const v16i b = load<v16i>(tile + g * AdapterShape::kTileBytes);
      LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) sums[i] = dot(sums[i], b, four_of(inner + i * inner_bytes, g));
    }
    LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) total[i] = adapters.add(total[i], sums[i], row + i, part, tile);
    return;
  }
  LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
    const uint8_t* tile = adapters.tile(adapters.owners.of(row + i), number);
    v16i sums = {};
    for (size_t g = 0; g < fours; ++g) {
      sums = dot(sums, load<v16i>(tile + g * AdapterShape::kTileBytes), four_of(inner + i * inner_bytes, g));
    }
    total[i] = adapters.add(total[i], sums, row + i, part, tile);
  }
}

// Asks for what is read of adapters for some tiles: it would be waited for at the end of each.
void expect_adapters(const Weights& w, const Adapters& adapters, size_t row, size_t count, size_t tile) {
  const size_t wide = w.is_rowwise ? kRowwiseTiles : kBlockTiles, all = w.columns / kLanes;
  const size_t bytes = (std::min(tile + wide, all) - std::min(tile, all)) * adapters.shape.tile_bytes;
  for (size_t i = 0; i < count; i += adapters.owners.sharing(row + i, count - i)) {
    expect(adapters.tile(adapters.owners.of(row + i), tile), bytes);
  }
}

// Whether weights are row-wise, in blocks, or in blocks of which each has what stands for its 0.
enum class Kind { kRowwise, kBlocks, kBlocksWithZeros };

// MR rows times NR tiles from tile `tile` on.
template <Bits kBits, Kind kKind, int MR, int NR>
void rows_by_tiles(const Weights& w, const Rows& rows, size_t row, size_t tile, float* y) {
  const size_t groups = w.block / 4, blocks = w.blocks();
  const size_t tile_bytes = w.tile_bytes(), block_bytes = groups * 8 * (size_t)w.bits;
  const uint8_t* weights = w.packed.get() + tile * tile_bytes;
  const int8_t* values = rows.values + row * rows.width;
  if (rows.adapters != nullptr) {
    expect_adapters(w, *rows.adapters, row, MR, tile);
  }
  v16f total[MR][NR] = {};
  for (size_t b = 0; b < blocks; ++b) {
    v16i acc[MR][NR];
    LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
      const size_t place = (row + i) * blocks + b;
      LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) {
        if constexpr (kKind == Kind::kBlocksWithZeros) {
          acc[i][j] = load<v16i>(w.zeros.get() + ((tile + j) * blocks + b) * kLanes) * -rows.sums[place];
        } else {
          acc[i][j] = spread(rows.offsets[place]);
        }
      }
    }
    multiply<kBits, MR, NR>(acc, weights + b * block_bytes, tile_bytes, values + b * w.block, rows.width,
                            groups);
    LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) {
      const v16f scale = load<v16f>(w.scales.get() + ((tile + j) * blocks + b) * kLanes);
      LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
        const float of_row = rows.scales[(row + i) * blocks + b];
        // Row-wise, the order of ONNX Runtime's nodes: bits are the same.
        if constexpr (kKind == Kind::kRowwise) {
          total[i][j] = rounded_product(to_float(acc[i][j]) * scale * of_row);
        } else {
          total[i][j] = multiply_add(to_float(acc[i][j]), scale * of_row, total[i][j]);
        }
      }
    }
    if constexpr (kKind != Kind::kRowwise && MR > kBlockRows) asm volatile("" : "+m"(total));
  }
  if (rows.adapters != nullptr) rows.adapters->wait();
  LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) {
    const size_t column = (tile + j) * kLanes;
    if (column >= w.columns) break;
    v16f found[MR];
    LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
      found[i] = total[i][j];
      if (w.bias.get() != nullptr) found[i] += load<v16f>(w.bias.get() + column);
    }
    if (rows.adapters != nullptr) adapt(found, *rows.adapters, row, tile + j);
    LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
      put(y + (row + i) * w.columns + column, found[i], w.columns - column);
    }
  }
}

template <Bits kBits, Kind kKind>
void some_rows(int count, const Weights& w, const Rows& rows, size_t row, size_t tile, float* y) {
  constexpr bool kIsRowwise = kKind == Kind::kRowwise;
  each<kIsRowwise ? kRowwiseRows : kAllBlockRows>([&](auto i) {
    if (count != i + 1) return;
    rows_by_tiles<kBits, kKind, i + 1, kIsRowwise ? kRowwiseTiles : kBlockTiles>(w, rows, row, tile, y);
  });
}

template <Bits kBits>
void rows_in_blocks(int count, const Weights& w, const Rows& rows, size_t row, size_t tile, float* y) {
  if (w.zeros.get() != nullptr) return some_rows<kBits, Kind::kBlocksWithZeros>(count, w, rows, row, tile, y);
  some_rows<kBits, Kind::kBlocks>(count, w, rows, row, tile, y);
}

void some_rows(int count, const Weights& w, const Rows& rows, size_t row, size_t tile, float* y) {
  if (w.bits == 4) return rows_in_blocks<Bits::kFour>(count, w, rows, row, tile, y);
  if (!w.is_rowwise) return rows_in_blocks<Bits::kEight>(count, w, rows, row, tile, y);
  if constexpr (kInPairs) {
    if (w.is_small) return some_rows<Bits::kSmallEight, Kind::kRowwise>(count, w, rows, row, tile, y);
  }
  some_rows<Bits::kEight, Kind::kRowwise>(count, w, rows, row, tile, y);
}

// The rows of a product as integers, of which adapters may take their first product while they are at hand.
void round_rows(const Run& run, const Weights& w, bool is_gated, const float* x, size_t count, const Rows& rows,
                Adapters* adapters) {
  const size_t blocks = w.blocks(), stride = rows.stride();
  if (adapters != nullptr) adapters->begin(rows);
  auto round_row = [&](size_t row) {
    int8_t* values = rows.row(row);
    const float* from_row = x + row * w.depth;
    if (is_gated) {
      float* gated = scratch<float, 10>(w.depth);
      gate_row(x + 2 * row * w.depth, w.depth, gated);
      from_row = gated;
    }
    auto place = [&](size_t k) { return values + in_stretches(k, stride); };
    for (size_t b = 0; b < blocks; ++b) {
      const size_t from = b * w.block, size = std::min(w.block, w.depth - from);
      const size_t at = row * blocks + b;
      rows.scales[at] = round_block(from_row + from, size, w.is_rowwise, place(from), stride, rows.sums + at);
      rows.offsets[at] = -w.zero * rows.sums[at];
    }
    // What is behind the last value is multiplied too.
    for (size_t k = w.depth; k < rows.width; k = (k / kStretch + 1) * kStretch) {
      std::memset(place(k), 0, std::min((k / kStretch + 1) * kStretch, rows.width) - k);
    }
  };
  if (adapters == nullptr || count < kOwnProducts) return run.rows(count, w.depth, round_row);
  run.parallel((count + Adapters::kBlock - 1) / Adapters::kBlock, [&](size_t block) {
    const size_t from = block * Adapters::kBlock;
    for (size_t row = from; row < std::min(count, from + Adapters::kBlock); ++row) round_row(row);
    adapters->multiply_block(block);
  });
}

// The largest of each column of the logits of some rows and tiles, which have just been written.
void find_tops(const Weights& w, size_t first, size_t last, size_t tile, size_t end, const float* y, float* tops) {
  const size_t from = tile * kLanes, to = std::min(end * kLanes, w.columns);
  for (size_t row = first; row < last && from < to; ++row) {
    float* found = tops + row * columns_of(w.columns) + from / kColumn;
    const bool are_numbers = scan_columns(y + row * w.columns + from, to - from, found);
    if (!are_numbers) *found = std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace

void product(const Run& run, const Weights& w, bool is_gated, const float* x, size_t count, float* y,
             float* tops, Adapters* adapters) {
  if (count == 0) return;
  Rows rows;
  const size_t worth = w.is_rowwise ? kWorthMatrices : kWorthMatricesInBlocks;
  rows.in_matrices = count >= worth && fit_matrices(w);
  rows.is_rowwise = w.is_rowwise;
  rows.block = w.block;
  rows.blocks = w.blocks();
  rows.width = w.blocks() * w.block;
  if (rows.in_matrices) rows.width = (rows.width + kStretch - 1) / kStretch * kStretch;
  // Matrices of rows are read whole, and may end behind the last row.
  rows.values = scratch<int8_t, 0>((count + kMatrixRows) * rows.width);
  rows.scales = scratch<float, 1>((count + kMatrixRows) * w.blocks());
  rows.sums = scratch<int32_t, 2>((count + kMatrixRows) * w.blocks());
  rows.offsets = scratch<int32_t, 4>((count + kMatrixRows) * w.blocks());
  rows.adapters = adapters;
  round_rows(run, w, is_gated, x, count, rows, adapters);
  const size_t wide = w.is_rowwise ? kRowwiseTiles : kBlockTiles;
  const size_t most_in_blocks = count <= (size_t)kAllBlockRows ? kAllBlockRows : kBlockRows;
  const size_t most_rows = rows.in_matrices ? kMatrixRows : w.is_rowwise ? kRowwiseRows : most_in_blocks;
  const size_t groups = w.tiles() / wide;
  const size_t room = kMatrixRoom / rows.width / kMatrixRows * kMatrixRows;
  const size_t at_once = rows.in_matrices ? std::max(kRowsAtOnce, room) : kRowsAtOnce;
  const size_t parts = (count + at_once - 1) / at_once;
  // Tasks begin where columns of logits do.
  const size_t grain = tops != nullptr ? std::lcm(wide, kColumn / kLanes) / wide : 1;
  const size_t each = (std::max<size_t>(1, groups * parts / kMostTasks) + grain - 1) / grain * grain;
  const size_t tasks = (groups + each - 1) / each;
  run.parallel(tasks * parts, [&](size_t task) {
    const size_t first = task / tasks * at_once, last = std::min(count, first + at_once);
    const size_t group = task % tasks * each;
    if (adapters != nullptr) adapters->multiply_rest();
    std::optional<ProductMatrices> registers;
    if (rows.in_matrices) registers.emplace(std::min(last - first, most_rows), w, adapters);
    for (size_t g = group; g < std::min(groups, group + each); ++g) {
      if (rows.in_matrices) {
        if (adapters != nullptr) expect_adapters(w, *adapters, first, last - first, g * wide);
        const int8_t* tiles = tiles_of(w, g * wide);
        for (size_t row = first; row < last; row += kMatrixRows) {
          rows_by_matrices(w, rows, row, std::min(kMatrixRows, last - row), g * wide, tiles, y);
        }
        continue;
      }
      // Rows in shares as equal as can be, for which no share is slow.
      size_t shares = (last - first + most_rows - 1) / most_rows;
      for (size_t row = first; row < last; --shares) {
        const size_t share = (last - row + shares - 1) / shares;
        some_rows((int)share, w, rows, row, g * wide, y);
        row += share;
      }
    }
    if (tops != nullptr) find_tops(w, first, last, group * wide, (group + each) * wide, y, tops);
  });
}

}  // namespace lifecycle
