// Products with weights in integers: rows of activations are rounded to int8 by themselves, so that integer sums
// are exact and a row's result depends on no other row.
//
// Weights lie in tiles of 16 columns: for each four values of k, 64 unsigned bytes, [column][k]. That is what one
// instruction multiplies with four values of a row. In 4 bits a byte holds k in its low and k + 4 in its high half.
#include "products.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <random>

#include "simd.h"

namespace lifecycle {
namespace {

// Rows and tiles at once: their sums, of which blocks have two kinds, fill three quarters of the registers.
constexpr int kRowwiseRows = 8, kRowwiseTiles = 3, kBlockRows = 6, kBlockTiles = 2;
constexpr size_t kMostTasks = 32;
// Rows that are multiplied with a group of tiles before the next one: they stay in the second cache.
constexpr size_t kRowsAtOnce = 48;

LIFECYCLE_INLINE int32_t four_of(const int8_t* row, size_t group) {
  int32_t four;
  std::memcpy(&four, row + 4 * group, 4);
  return four;
}

// Weights of the tiles that come next, into the second cache.
LIFECYCLE_INLINE void ahead(const uint8_t* weights) { __builtin_prefetch(weights, 0, 2); }

// Sums of products over `groups` fours of k, of MR rows with NR tiles.
template <int kBits, int MR, int NR>
LIFECYCLE_INLINE void multiply(v16i (&acc)[MR][NR], const uint8_t* weights, size_t tile_bytes,
                               const int8_t* rows, size_t row_bytes, size_t groups) {
  if constexpr (kBits == 8) {
    for (size_t g = 0; g < groups; ++g) {
      v64u w[NR];
      LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) {
        w[j] = load<v64u>(weights + j * tile_bytes + 64 * g);
        ahead(weights + (j + NR) * tile_bytes + 64 * g);
      }
      LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
        const int32_t four = four_of(rows + i * row_bytes, g);
        LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = dot(acc[i][j], w[j], four);
      }
    }
  } else {
    for (size_t g = 0; g < groups; g += 2) {
      v64u low[NR], high[NR];
      LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) {
        const v16i both = load<v16i>(weights + j * tile_bytes + 32 * g);
        ahead(weights + (j + NR) * tile_bytes + 32 * g);
        low[j] = (v64u)(both & 0x0f0f0f0f);
        high[j] = (v64u)((both >> 4) & 0x0f0f0f0f);
      }
      LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
        const int32_t first = four_of(rows + i * row_bytes, g);
        const int32_t second = four_of(rows + i * row_bytes, g + 1);
        LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = dot(acc[i][j], low[j], first);
        LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) acc[i][j] = dot(acc[i][j], high[j], second);
      }
    }
  }
}

// The part that a tile belongs to, and its first column there.
struct Place {
  const Pairs::Part& part;
  size_t number, column;
};
LIFECYCLE_INLINE Place place_of(const Pairs& adapters, size_t tile) {
  size_t column = tile * kLanes, p = 0;
  while (column >= adapters.parts()[p].columns) column -= adapters.parts()[p++].columns;
  return {adapters.parts()[p], p, column};
}

// What adapters add to a tile of MR rows. A row has the same bits whether or not others have its adapter.
template <int MR>
LIFECYCLE_INLINE void adapt(v16f (&total)[MR], const Pairs& adapters, size_t row, size_t tile) {
  const Place place = place_of(adapters, tile);
  const Pairs::Part& part = place.part;
  const size_t rank = adapters.rank();
  const uint32_t* inner = adapters.inner(row, place.number);
  const size_t next = (size_t)(adapters.inner(row + 1, place.number) - inner);
  auto matrix = [&](int i) { return part.of(adapters.adapter_of(row + i), rank) + place.column; };
  if (adapters.share(row, MR)) {
    const uint32_t* b = matrix(0);
    for (size_t r = 0; r < rank; ++r, b += part.columns) {
      const v16i columns = load<v16i>(b);
      LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) total[i] = dot(total[i], columns, inner[i * next + r]);
    }
    return;
  }
  LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
    const uint32_t* b = matrix(i);
    for (size_t r = 0; r < rank; ++r, b += part.columns) {
      total[i] = dot(total[i], load<v16i>(b), inner[i * next + r]);
    }
  }
}

// Asks for what `adapt` reads for some tiles: its rows lie pages apart, and would be waited for at the end of each tile.
void expect_adapters(const Pairs& adapters, size_t row, size_t count, size_t tile, size_t end) {
  const size_t rank = adapters.rank(), shared = adapters.share(row, count) ? 1 : count;
  for (; tile < end; ++tile) {
    const Place place = place_of(adapters, tile);
    for (size_t i = 0; i < shared; ++i) {
      const uint32_t* b = place.part.of(adapters.adapter_of(row + i), rank) + place.column;
      for (size_t r = 0; r < rank; ++r) __builtin_prefetch(b + r * place.part.columns);
    }
  }
}

// MR rows times NR tiles from tile `tile` on.
template <int kBits, int MR, int NR>
void rows_by_tiles(const Weights& w, const Rows& rows, size_t row, size_t tile, float* y) {
  const size_t groups = w.block / 4, blocks = w.blocks();
  const size_t tile_bytes = w.tile_bytes(), block_bytes = groups * 64 * kBits / 8;
  const uint8_t* weights = w.packed.get() + tile * tile_bytes;
  const int8_t* values = rows.values + row * rows.width;
  if (rows.adapters != nullptr) {
    expect_adapters(*rows.adapters, row, MR, tile, std::min(tile + NR, (w.columns + kLanes - 1) / kLanes));
  }
  v16f total[MR][NR] = {};
  for (size_t b = 0; b < blocks; ++b) {
    v16i acc[MR][NR];
    const int32_t* sums = rows.sums + b;
    LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
      LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) {
        acc[i][j] = w.zeros.get() == nullptr
                        ? spread(-w.zero * sums[(row + i) * blocks])
                        : load<v16i>(w.zeros.get() + ((tile + j) * blocks + b) * kLanes) *
                              -sums[(row + i) * blocks];
      }
    }
    multiply<kBits, MR, NR>(acc, weights + b * block_bytes, tile_bytes, values + b * w.block, rows.width,
                            groups);
    LIFECYCLE_UNROLL for (int j = 0; j < NR; ++j) {
      const v16f scale = load<v16f>(w.scales.get() + ((tile + j) * blocks + b) * kLanes);
      LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
        const float of_row = rows.scales[(row + i) * blocks + b];
        // Row-wise, the order of ONNX Runtime's nodes: bits are the same.
        if (w.is_rowwise) {
          total[i][j] = to_float(acc[i][j]) * scale * of_row;
        } else {
          total[i][j] += to_float(acc[i][j]) * (scale * of_row);
        }
      }
    }
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

template <int kBits, int NR>
void some_rows(int count, const Weights& w, const Rows& rows, size_t row, size_t tile, float* y) {
  switch (count) {
    case 1: return rows_by_tiles<kBits, 1, NR>(w, rows, row, tile, y);
    case 2: return rows_by_tiles<kBits, 2, NR>(w, rows, row, tile, y);
    case 3: return rows_by_tiles<kBits, 3, NR>(w, rows, row, tile, y);
    case 4: return rows_by_tiles<kBits, 4, NR>(w, rows, row, tile, y);
    case 5: return rows_by_tiles<kBits, 5, NR>(w, rows, row, tile, y);
    case 6: return rows_by_tiles<kBits, 6, NR>(w, rows, row, tile, y);
  }
  if constexpr (NR == kRowwiseTiles) {
    if (count == 7) return rows_by_tiles<kBits, 7, NR>(w, rows, row, tile, y);
    return rows_by_tiles<kBits, 8, NR>(w, rows, row, tile, y);
  }
}

void some_rows(int count, const Weights& w, const Rows& rows, size_t row, size_t tile, float* y) {
  if (w.is_rowwise) return some_rows<8, kRowwiseTiles>(count, w, rows, row, tile, y);
  if (w.bits == 8) return some_rows<8, kBlockTiles>(count, w, rows, row, tile, y);
  return some_rows<4, kBlockTiles>(count, w, rows, row, tile, y);
}

// One block of a row as int8. `largest` comes back as it is, NaN where a value is none.
float round_block(const float* x, size_t count, bool is_rowwise, int8_t* out, int32_t* total) {
  // The order of positive floats is that of their bits, with what is no number above them all.
  v16i most = {};
  size_t k = 0;
  for (; k + kLanes <= count; k += kLanes) most = larger(most, load<v16i>(x + k) & 0x7fffffff);
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits = std::max(bits, most[i]);
  for (size_t rest = k; rest < count; ++rest) {
    int32_t one;
    std::memcpy(&one, x + rest, 4);
    bits = std::max(bits, one & 0x7fffffff);
  }
  float largest;
  std::memcpy(&largest, &bits, 4);
  // In blocks 127 / largest must be a number too.
  if (!(largest > (is_rowwise ? 0.0f : 1e-35f) && largest < INFINITY)) {
    std::memset(out, 0, count);
    *total = 0;
    return largest - largest;  // 0, or no number
  }
  constexpr float kStep = 1.0f / 127;
  const float inverse = 127 / largest;
  v16i sums = {};
  int32_t rest_sum = 0;
  auto steps = [&](v16f v) {
    // Row-wise as ONNX Runtime's nodes round, in blocks as its operator does.
    return rounded(is_rowwise ? (v / largest) / kStep : v * inverse);
  };
  for (k = 0; k + kLanes <= count; k += kLanes) {
    const v16i q = __builtin_convertvector(steps(load<v16f>(x + k)), v16i);
    sums += q;
    store(out + k, narrowed(q));
  }
  for (; k < count; ++k) {
    const int32_t q = (int32_t)steps(spread(x[k]))[0];
    rest_sum += q;
    out[k] = (int8_t)q;
  }
  *total = sum<int32_t>(sums) + rest_sum;
  return is_rowwise ? largest : largest * kStep;
}

}  // namespace

void gate_row(const float* x, size_t width, float* y) {
  for (size_t k = 0; k < width; k += kLanes) {
    const size_t count = std::min<size_t>(kLanes, width - k);
    const v16f gate = some(x + k, count);
    put(y + k, gate / (exponential(-gate) + 1.0f) * some(x + width + k, count), count);
  }
}

void norm_row(const float* x, const float* skip, const float* gamma, size_t width, float epsilon, float* sum,
              float* y) {
  v16f squares{};
  for (size_t k = 0; k < width; k += kLanes) {
    const size_t count = std::min<size_t>(kLanes, width - k);
    const v16f both = some(x + k, count) + some(skip + k, count);
    squares += both * both;
    put(sum + k, both, count);
  }
  const float scale = 1 / std::sqrt(lifecycle::sum<float>(squares) / (float)width + epsilon);
  for (size_t k = 0; k < width; k += kLanes) {
    const size_t count = std::min<size_t>(kLanes, width - k);
    put(y + k, some(sum + k, count) * scale * some(gamma + k, count), count);
  }
}

namespace {

// The rows of a product as integers, and where there are adapters as pairs, of which they may take the first product
// while the rows are at hand.
void round_rows(const Run& run, const Weights& w, bool is_gated, const float* x, size_t count, const Rows& rows,
                Pairs* adapters) {
  const size_t blocks = w.blocks();
  uint32_t* pairs = nullptr;
  if (adapters != nullptr) adapters->begin(pairs = scratch<uint32_t, 13>(count * w.depth / 2));
  auto round_row = [&](size_t row) {
    int8_t* values = rows.values + row * rows.width;
    const float* from_row = x + row * w.depth;
    if (is_gated) {
      float* gated = scratch<float, 10>(w.depth);
      gate_row(x + 2 * row * w.depth, w.depth, gated);
      from_row = gated;
    }
    if (pairs != nullptr) as_pairs(from_row, w.depth, pairs + row * (w.depth / 2));
    for (size_t b = 0; b < blocks; ++b) {
      const size_t from = b * w.block, size = std::min(w.block, w.depth - from);
      rows.scales[row * blocks + b] = round_block(from_row + from, size, w.is_rowwise, values + from,
                                                  rows.sums + row * blocks + b);
      // What is behind the last value is multiplied too.
      if (size < w.block) std::memset(values + from + size, 0, w.block - size);
    }
  };
  // With few rows, one thread multiplies them while the others begin with the tiles.
  if (adapters == nullptr || count < 8 * kAdaptedBlock) return run.rows(count, w.depth, round_row);
  run.parallel((count + kAdaptedBlock - 1) / kAdaptedBlock, [&](size_t block) {
    const size_t from = block * kAdaptedBlock;
    for (size_t row = from; row < std::min(count, from + kAdaptedBlock); ++row) round_row(row);
    adapters->multiply_block(block);
  });
}

}  // namespace

void product(const Run& run, const Weights& w, bool is_gated, const float* x, size_t count, float* y,
             Pairs* adapters) {
  if (count == 0) return;
  Rows rows;
  rows.width = w.blocks() * w.block;
  rows.values = scratch<int8_t, 0>(count * rows.width);
  rows.scales = scratch<float, 1>(count * w.blocks());
  rows.sums = scratch<int32_t, 2>(count * w.blocks());
  rows.adapters = adapters;
  round_rows(run, w, is_gated, x, count, rows, adapters);
  const size_t wide = w.is_rowwise ? kRowwiseTiles : kBlockTiles;
  const size_t most_rows = w.is_rowwise ? kRowwiseRows : kBlockRows;
  const size_t groups = w.tiles() / wide;
  const size_t parts = (count + kRowsAtOnce - 1) / kRowsAtOnce;
  const size_t each = std::max<size_t>(1, groups * parts / kMostTasks);
  const size_t tasks = (groups + each - 1) / each;
  run.parallel(tasks * parts, [&](size_t task) {
    const size_t first = task / tasks * kRowsAtOnce, last = std::min(count, first + kRowsAtOnce);
    const size_t group = task % tasks * each;
    if (adapters != nullptr) adapters->multiply_rest();
    for (size_t g = group; g < std::min(groups, group + each); ++g) {
      // Rows in shares as equal as can be, for which no share is slow.
      size_t left = last - first, shares = (left + most_rows - 1) / most_rows;
      for (size_t row = first; row < last; --shares) {
        const size_t share = (last - row + shares - 1) / shares;
        some_rows((int)share, w, rows, row, g * wide, y);
        row += share;
      }
    }
  });
}

namespace {

// 128 bits of what bytes are: two sums that each byte reaches through other numbers, from a beginning that no file can
// have been made for.
struct Digest {
  uint64_t a, b;

  void add(const void* from, size_t bytes) {
    const char* at = static_cast<const char*>(from);
    for (; bytes >= 8; bytes -= 8, at += 8) {
      uint64_t word;
      std::memcpy(&word, at, 8);
      mix(word);
    }
    uint64_t rest = bytes;
    std::memcpy(reinterpret_cast<char*>(&rest) + 1, at, bytes);
    mix(rest);
  }
  void mix(uint64_t word) {
    a = (a ^ word) * 0x9e3779b97f4a7c15;
    a ^= a >> 32;
    b = (b + word) * 0xc2b2ae3d27d4eb4f;
    b ^= b >> 29;
  }
};

size_t bytes_of(const Tensor& tensor) {
  const bool is_byte = tensor.type == ort::kUint8 || tensor.type == ort::kInt8;
  return (size_t)tensor.size() * (is_byte ? 1 : sizeof(float));
}

}  // namespace

std::shared_ptr<const Weights> shared(const std::vector<Tensor>& of, const std::vector<int64_t>& sizes,
                                      const std::function<void(Weights&)>& make) {
  static std::mutex lock;
  static std::map<std::pair<uint64_t, uint64_t>, std::weak_ptr<const Weights>> all;
  static const Digest begin = [] {
    std::random_device random;
    auto word = [&] { return (uint64_t)random() << 32 | random(); };
    return Digest{word(), word()};
  }();
  Digest digest = begin;
  digest.add(sizes.data(), sizes.size() * sizeof(int64_t));
  for (const Tensor& tensor : of) digest.add(tensor.data, tensor ? bytes_of(tensor) : 0);
  const std::lock_guard<std::mutex> guard(lock);
  std::erase_if(all, [](const auto& entry) { return entry.second.expired(); });
  std::weak_ptr<const Weights>& place = all[{digest.a, digest.b}];
  if (std::shared_ptr<const Weights> found = place.lock()) return found;
  auto made = std::make_shared<Weights>();
  make(*made);
  place = made;
  return made;
}

void Weights::allocate(bool with_zeros) {
  packed.reset(tiles() * tile_bytes());
  scales.reset(tiles() * blocks() * kLanes);
  if (with_zeros) zeros.reset(tiles() * blocks() * kLanes);
}

size_t Weights::tiles() const {
  const size_t wide = is_rowwise ? kRowwiseTiles : kBlockTiles, tiles = (columns + kLanes - 1) / kLanes;
  return (tiles + wide - 1) / wide * wide;
}

void Weights::set_bias(const Tensor& given) {
  if (!given) return;
  require(given.size() == (int64_t)columns, "a bias of another width than its product");
  std::memcpy(bias.reset(tiles() * kLanes), given.as<float>(), columns * sizeof(float));
}

}  // namespace lifecycle
