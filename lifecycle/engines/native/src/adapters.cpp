// Updates of adapters, in float32. A token's sums run over the depth, then over the rank, in their order, whatever
// tokens are beside it.
#include "adapters.h"

#include <algorithm>

#include "simd.h"

namespace lifecycle {
namespace {

// Rows and vectors of columns at once: their sums fill three quarters of the registers.
constexpr int kMostRows = 8, kMostVectors = 3;

// A few rows, by their addresses: y = base + x [rows, depth] times w [depth, `stride` columns]. No base is zeros.
struct Rows {
  size_t count;
  const float* x[kMostRows];
  const float* base[kMostRows];
  float* y[kMostRows];
};

// The same for 16 * NV columns from `column` on.
template <int MR, int NV>
void accumulate(const Rows& rows, size_t depth, const float* w, size_t stride, size_t column) {
  w += column;
  v16f acc[MR][NV] = {};
  for (size_t k = 0; k < depth; ++k) {
    v16f columns[NV];
    LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) columns[j] = load<v16f>(w + k * stride + j * kLanes);
    LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
      const v16f value = spread(rows.x[i][k]);
      LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) acc[i][j] += value * columns[j];
    }
  }
  LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
    LIFECYCLE_UNROLL for (int j = 0; j < NV; ++j) {
      const size_t at = column + j * kLanes;
      store(rows.y[i] + at, rows.base[i] == nullptr ? acc[i][j] : load<v16f>(rows.base[i] + at) + acc[i][j]);
    }
  }
}

template <int NV>
void some_rows(const Rows& rows, size_t depth, const float* w, size_t stride, size_t column) {
  switch (rows.count) {
    case 1: return accumulate<1, NV>(rows, depth, w, stride, column);
    case 2: return accumulate<2, NV>(rows, depth, w, stride, column);
    case 3: return accumulate<3, NV>(rows, depth, w, stride, column);
    case 4: return accumulate<4, NV>(rows, depth, w, stride, column);
    case 5: return accumulate<5, NV>(rows, depth, w, stride, column);
    case 6: return accumulate<6, NV>(rows, depth, w, stride, column);
    case 7: return accumulate<7, NV>(rows, depth, w, stride, column);
    default: return accumulate<8, NV>(rows, depth, w, stride, column);
  }
}

// The same for columns `from` to `to`.
void columns(const Rows& rows, size_t depth, const float* w, size_t stride, size_t from, size_t to) {
  size_t c = from;
  for (; c + kMostVectors * kLanes <= to; c += kMostVectors * kLanes) {
    some_rows<kMostVectors>(rows, depth, w, stride, c);
  }
  const size_t left = (to - c) / kLanes;
  if (left == 2) some_rows<2>(rows, depth, w, stride, c);
  if (left == 1) some_rows<1>(rows, depth, w, stride, c);
  c += left * kLanes;
  if (c >= to) return;
  // As vectors too, for a column must not get other bits where a share ends elsewhere.
  for (size_t i = 0; i < rows.count; ++i) {
    v16f total{};
    for (size_t k = 0; k < depth; ++k) total += rows.x[i][k] * some(w + k * stride + c, to - c);
    if (rows.base[i] != nullptr) total = some(rows.base[i] + c, to - c) + total;
    put(rows.y[i] + c, total, to - c);
  }
}

// In how many shares `columns` columns of each of `few` groups of rows are computed: one where waking a thread takes
// longer than all of them.
size_t shares_of(size_t few, size_t columns, size_t products) {
  constexpr size_t kMostTasks = 16, kWorth = 1 << 16;
  if (products < kWorth) return 0;
  return std::max<size_t>(1, std::min(kMostTasks / std::min(kMostTasks, few), columns / (kMostVectors * kLanes)));
}

}  // namespace

void AdapterUpdate::run(const Run& run) {
  const Tensor x = run.input(0), base = run.input(1), a = run.input(2), places = run.input(3);
  require(x.dims.size() == 2 && base.dims.size() == 2 && a.dims.size() == 3, "an adapter's input of another rank");
  const size_t tokens = (size_t)x.dims[0], depth = (size_t)x.dims[1], width = (size_t)base.dims[1];
  const size_t adapters = (size_t)a.dims[0], inner_width = (size_t)a.dims[2];
  require((size_t)a.dims[1] == depth && (size_t)base.dims[0] == tokens && (size_t)places.size() == 2 * tokens,
          "an adapter of another depth than its input");
  struct Part {
    const float* b;
    size_t columns, first;
  };
  std::vector<Part> parts;
  size_t rank = 0, known = 0;
  for (size_t i = 0; i < kMostParts; ++i) {
    const Tensor b = run.input(4 + i);
    if (!b) break;
    require(b.dims.size() == 3 && (size_t)b.dims[0] == adapters, "an adapter without its second matrix");
    rank = (size_t)b.dims[1];
    parts.push_back({b.as<float>(), (size_t)b.dims[2], known});
    known += (size_t)b.dims[2];
  }
  require(known == width && parts.size() * rank == inner_width, "an adapter of another width than its product");

  float* y = static_cast<float*>(run.output(0, base.dims));
  if (tokens == 0) return;
  float* inner = scratch<float, 11>(tokens * inner_width);

  // Tokens of one adapter together, a few at a time.
  struct Few {
    size_t adapter, count;
    size_t tokens[kMostRows];
  };
  std::vector<Few> all, open(adapters);
  for (size_t t = 0; t < tokens; ++t) {
    const int64_t adapter = places.as<int64_t>()[2 * t];
    require(adapter >= 0 && adapter < (int64_t)adapters, "a token of an adapter that is not there");
    Few& few = open[(size_t)adapter];
    few.adapter = (size_t)adapter;
    few.tokens[few.count++] = t;
    if (few.count == kMostRows) {
      all.push_back(few);
      few.count = 0;
    }
  }
  for (const Few& few : open) {
    if (few.count > 0) all.push_back(few);
  }
  // Those of one adapter follow each other, so that its weights are read once.
  std::stable_sort(all.begin(), all.end(), [](const Few& a, const Few& b) { return a.adapter < b.adapter; });

  auto first = [&](const Few& few, size_t from, size_t to) {
    Rows rows{few.count, {}, {}, {}};
    for (size_t i = 0; i < few.count; ++i) {
      rows.x[i] = x.as<float>() + few.tokens[i] * depth;
      rows.y[i] = inner + few.tokens[i] * inner_width;
    }
    columns(rows, depth, a.as<float>() + few.adapter * depth * inner_width, inner_width, from, to);
  };
  auto second = [&](const Few& few, size_t from, size_t to) {
    for (size_t p = 0; p < parts.size(); ++p) {
      const Part& part = parts[p];
      const size_t begin = std::max(from, part.first), end = std::min(to, part.first + part.columns);
      if (begin >= end) continue;
      Rows rows{few.count, {}, {}, {}};
      for (size_t i = 0; i < few.count; ++i) {
        rows.x[i] = inner + few.tokens[i] * inner_width + p * rank;
        rows.base[i] = base.as<float>() + few.tokens[i] * width + part.first;
        rows.y[i] = y + few.tokens[i] * width + part.first;
      }
      columns(rows, rank, part.b + few.adapter * rank * part.columns, part.columns, begin - part.first,
              end - part.first);
    }
  };
  auto each = [&](size_t columns, size_t products, const auto& work) {
    const size_t shares = shares_of(all.size(), columns, products);
    if (shares == 0) {
      for (const Few& few : all) work(few, 0, columns);
      return;
    }
    const size_t vectors = (columns + kLanes - 1) / kLanes;
    run.parallel(all.size() * shares, [&](size_t task) {
      const size_t share = task % shares;
      work(all[task / shares], vectors * share / shares * kLanes,
           std::min(columns, vectors * (share + 1) / shares * kLanes));
    });
  };
  if (all.size() == 1) {
    for (const Part& part : parts) expect(part.b + all[0].adapter * rank * part.columns, rank * part.columns * sizeof(float));
  }
  each(inner_width, tokens * depth * inner_width, first);
  each(width, tokens * rank * width, second);
}

}  // namespace lifecycle
