#include "adapters.h"

namespace lifecycle {

Owners::Owners(const Tensor& places, size_t tokens, size_t adapters, size_t block) : places_(places.as<int64_t>()) {
  require((size_t)places.size() == 2 * tokens, "not one adapter for each token");
  all_ = scratch<Few, 11>(tokens);
  begins_ = scratch<size_t, 12>(tokens / block + 2);
  runs_ = scratch<uint32_t, 18>(tokens);
  for (size_t t = tokens; t-- > 0;) runs_[t] = t + 1 < tokens && of(t + 1) == of(t) ? runs_[t + 1] + 1 : 1;
  for (size_t t = 0; t < tokens; ++t) {
    if (t % block == 0) begins_[t / block] = count_;
    require(places_[2 * t] >= 0 && of(t) < adapters, "a token of an adapter that is not there");
    size_t f = begins_[t / block];
    while (f < count_ && (all_[f].adapter != of(t) || all_[f].count == kMostRows)) ++f;
    if (f == count_) {
      all_[f].adapter = of(t);
      all_[f].count = 0;
      ++count_;
    }
    all_[f].tokens[all_[f].count++] = t;
  }
  begins_[(tokens + block - 1) / block] = count_;
}

namespace {

// What stands for 0.
constexpr int32_t kZero = 128;

// The number of adapters in a bank.
size_t adapters_of(const Tensor& bank, const AdapterShape& shape) {
  require(bank.dims.size() == 2 && (size_t)bank.dims[1] == shape.bytes, "adapters of another shape than their product");
  return (size_t)bank.dims[0];
}

// Tiles of A that are multiplied together.
constexpr int kMostTiles = LIFECYCLE_AVX512 ? 3 : 1;
// Bytes of A that are asked for ahead of those that are multiplied. A step that decodes reads A once for each adapter; what
// lies behind its end is asked for in vain.
constexpr size_t kAhead = 2048;

// found [tokens, `width`] of MR tokens = their rows of x times NT tiles of A.
template <int MR, int NT>
void inner_products(const Rows& rows, const size_t* tokens, size_t depth, const uint8_t* a, size_t tile_bytes,
                    float* found, size_t width) {
  // Few sums wait for each other: they are taken in parts.
  constexpr int kParts = MR * NT <= 2 ? 4 : MR * NT <= 6 ? 2 : 1;
  const int8_t* x[MR];
  LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) x[i] = rows.row(tokens[i]);
  const size_t stride = rows.stride();
  v16f total[MR][NT] = {};
  for (size_t b = 0; b < rows.blocks; ++b) {
    v16i acc[kParts][MR][NT] = {};
    const size_t end = std::min((b + 1) * rows.block, (depth + 3) / 4 * 4);
    for (size_t k = b * rows.block; k < end;) {
      // A stretch, or what of it belongs to the block.
      const size_t fours = (std::min(end, (k / kStretch + 1) * kStretch) - k) / 4, at = in_stretches(k, stride);
      const uint8_t* from = a + k / 4 * AdapterShape::kTileBytes;
      auto multiply = [&](size_t g, int part) __attribute__((always_inline)) {
        v16i w[NT];
        LIFECYCLE_UNROLL for (int j = 0; j < NT; ++j) {
          const uint8_t* four = from + j * tile_bytes + g * AdapterShape::kTileBytes;
          w[j] = load<v16i>(four);
          __builtin_prefetch(four + kAhead);
        }
        LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
          int32_t four;
          std::memcpy(&four, x[i] + at + 4 * g, 4);
          LIFECYCLE_UNROLL for (int j = 0; j < NT; ++j) acc[part][i][j] = dot(acc[part][i][j], w[j], four);
        }
      };
      size_t g = 0;
      for (; g + kParts <= fours; g += kParts) {
        LIFECYCLE_UNROLL for (int part = 0; part < kParts; ++part) multiply(g + part, part);
      }
      for (; g < fours; ++g) multiply(g, 0);
      k += 4 * fours;
    }
    LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
      const size_t place = tokens[i] * rows.blocks + b;
      const float scale = rows.scales[place] * (rows.is_rowwise ? kStep : 1);
      LIFECYCLE_UNROLL for (int j = 0; j < NT; ++j) {
        v16i sum = spread(-kZero * rows.sums[place]);
        LIFECYCLE_UNROLL for (int part = 0; part < kParts; ++part) sum += acc[part][i][j];
        total[i][j] = multiply_add(to_float(sum), spread(scale), total[i][j]);
      }
    }
  }
  LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
    LIFECYCLE_UNROLL for (int j = 0; j < NT; ++j) store(found + tokens[i] * width + j * kLanes, total[i][j]);
  }
}

}  // namespace

Adapters::Adapters(const Run& run, size_t first, const AdapterShape& shape, size_t tokens)
    : shape(shape), owners(run.input(first + 1), tokens, adapters_of(run.input(first), shape), kBlock),
      bank_(run.input(first).as<uint8_t>()) {
  // Matrices of rows are read whole, and may end behind the last token.
  values_ = scratch<int8_t, 13>((tokens + kMatrixRows) * inner_bytes());
  scales_ = scratch<float, 14>(tokens * shape.parts);
  offsets_ = scratch<int32_t, 16>(tokens * shape.parts);
  inner_ = scratch<float, 17>(tokens * shape.inner_tiles * kLanes);
}

void Adapters::multiply(const Owners::Few& few) noexcept {
  const size_t tiles = shape.inner_tiles, width = tiles * kLanes, tile_bytes = shape.inner_tile_bytes;
  const uint8_t* a = bank_ + few.adapter * shape.bytes;
  for (size_t tile = 0, some; tile < tiles; tile += some) {
    some = std::min<size_t>(kMostTiles, tiles - tile);
    each<(int)Owners::kMostRows>([&](auto i) {
      each<kMostTiles>([&](auto j) {
        if (few.count != (size_t)i + 1 || some != (size_t)j + 1) return;
        inner_products<i + 1, j + 1>(*rows_, few.tokens, shape.depth, a + tile * tile_bytes, tile_bytes,
                                     inner_ + tile * kLanes, width);
      });
    });
  }
  for (size_t i = 0; i < few.count; ++i) round(few.tokens[i]);
}

// x · A of a token as integers.
void Adapters::round(size_t token) noexcept {
  const float* inner = inner_ + token * shape.inner_tiles * kLanes;
  for (size_t part = 0; part < shape.parts; ++part) {
    const size_t at = token * shape.parts + part;
    int8_t* to = values_ + token * inner_bytes() + part * 4 * shape.fours;
    std::memset(to + shape.rank, 0, 4 * shape.fours - shape.rank);
    int32_t sum;
    scales_[at] = round_block(inner + part * shape.rank, shape.rank, false, to, kStretch, &sum);
    offsets_[at] = -kZero * sum;
  }
}

void Adapters::multiply_block(size_t block) {
  for (size_t f = owners.begin(block); f < owners.begin(block + 1); ++f) {
    multiply(owners.few(f));
    done_.fetch_add(1);
  }
}

void Adapters::multiply_rest() {
  if (done_.load() == owners.count()) return;
  for (size_t f; (f = next_.fetch_add(1)) < owners.count();) {
    multiply(owners.few(f));
    done_.fetch_add(1);
  }
}

}  // namespace lifecycle
