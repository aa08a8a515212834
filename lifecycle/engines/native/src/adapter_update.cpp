// What adapters add in floats. The order of a token's sums depends on the shape of its adapter only, not on what tokens are
// beside it.
#include "adapter_update.h"

namespace lifecycle {
namespace {

// Vectors of columns at once: with a few rows their sums fill three quarters of the registers.
constexpr int kMostVectors = LIFECYCLE_AVX512 ? 3 : 1;

// A few rows, by their addresses: y = base + x [rows, depth] times w [depth, `stride` columns]. No base is zeros.
struct FewRows {
  size_t count;
  const float* x[Owners::kMostRows];
  const float* base[Owners::kMostRows];
  float* y[Owners::kMostRows];
};

// The same for 16 * NV columns from `column` on, or for `count` where they are fewer and NV is 0.
template <int MR, int NV>
void accumulate(const FewRows& rows, size_t depth, const float* w, size_t stride, size_t column, size_t count) {
  constexpr bool kIsPart = NV == 0;
  constexpr int kVectors = kIsPart ? 1 : NV;
  v16f acc[MR][kVectors] = {};
  for (size_t k = 0; k < depth; ++k) {
    const float* from = w + k * stride + column;
    LIFECYCLE_UNROLL for (int j = 0; j < kVectors; ++j) {
      const v16f values = kIsPart ? some(from, count) : load<v16f>(from + j * kLanes);
      LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) acc[i][j] += values * rows.x[i][k];
    }
  }
  LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
    LIFECYCLE_UNROLL for (int j = 0; j < kVectors; ++j) {
      const size_t at = column + j * kLanes, size = kIsPart ? count : kLanes;
      if (rows.base[i] != nullptr) acc[i][j] += some(rows.base[i] + at, size);
      put(rows.y[i] + at, acc[i][j], size);
    }
  }
}

template <int NV>
void some_rows(const FewRows& rows, size_t depth, const float* w, size_t stride, size_t column, size_t count = kLanes) {
  each<(int)Owners::kMostRows>([&](auto i) {
    if (rows.count == (size_t)i + 1) accumulate<i + 1, NV>(rows, depth, w, stride, column, count);
  });
}

// The same for columns `from` to `to`.
void columns(const FewRows& rows, size_t depth, const float* w, size_t stride, size_t from, size_t to) {
  size_t c = from;
  for (; c + kMostVectors * kLanes <= to; c += kMostVectors * kLanes) {
    some_rows<kMostVectors>(rows, depth, w, stride, c);
  }
  const size_t left = (to - c) / kLanes;
  if (left == 2) some_rows<2>(rows, depth, w, stride, c);
  if (left == 1) some_rows<1>(rows, depth, w, stride, c);
  c += left * kLanes;
  // As vectors too, for a column must not get other bits where a share ends elsewhere.
  if (c < to) some_rows<0>(rows, depth, w, stride, c, to - c);
}

// B of parts that share the columns, from an input on.
struct Parts {
  struct Part {
    const float* b;
    size_t columns, first;
  } all[AdapterShape::kMostParts];
  size_t count = 0, rank = 0, columns = 0;

  Parts(const Run& run, size_t first, size_t adapters) {
    for (; count < AdapterShape::kMostParts; ++count) {
      const Tensor b = run.input(first + count);
      if (!b) break;
      require(b.dims.size() == 3 && (size_t)b.dims[0] == adapters, "an adapter without its second matrix");
      require(count == 0 || (size_t)b.dims[1] == rank, "an adapter of two ranks");
      rank = (size_t)b.dims[1];
      all[count] = {b.as<float>(), (size_t)b.dims[2], columns};
      columns += (size_t)b.dims[2];
    }
  }
};

// What a step multiplies.
struct Step {
  const float *x, *base, *a;
  float *inner, *y;
  size_t depth, width, inner_width;
  const Parts& parts;

  // x · A of a few tokens.
  void first(const Owners::Few& few) const {
    FewRows rows{few.count, {}, {}, {}};
    for (size_t i = 0; i < few.count; ++i) {
      rows.x[i] = x + few.tokens[i] * depth;
      rows.y[i] = inner + few.tokens[i] * inner_width;
    }
    columns(rows, depth, a + few.adapter * depth * inner_width, inner_width, 0, inner_width);
  }
  // And the product of that with B, for some columns.
  void second(const Owners::Few& few, size_t from, size_t to) const {
    for (size_t p = 0; p < parts.count; ++p) {
      const Parts::Part& part = parts.all[p];
      const size_t begin = std::max(from, part.first), end = std::min(to, part.first + part.columns);
      if (begin >= end) continue;
      FewRows rows{few.count, {}, {}, {}};
      for (size_t i = 0; i < few.count; ++i) {
        const size_t at = few.tokens[i] * width + part.first;
        rows.x[i] = inner + few.tokens[i] * inner_width + p * parts.rank;
        rows.base[i] = base + at;
        rows.y[i] = y + at;
      }
      const float* b = part.b + few.adapter * parts.rank * part.columns;
      columns(rows, parts.rank, b, part.columns, begin - part.first, end - part.first);
    }
  }
};

}  // namespace

void AdapterUpdate::run(const Run& run) {
  const Tensor x = run.input(0), base = run.input(1), a = run.input(2);
  require(x.dims.size() == 2 && base.dims.size() == 2 && x.dims[0] == base.dims[0], "an adapter's input of another rank");
  const size_t tokens = (size_t)x.dims[0], depth = (size_t)x.dims[1], width = (size_t)base.dims[1];
  require(a.dims.size() == 3 && (size_t)a.dims[1] == depth, "an adapter of another depth than its input");
  const size_t adapters = (size_t)a.dims[0], inner_width = (size_t)a.dims[2];
  const Parts parts(run, kBefore, adapters);
  require(parts.columns == width && parts.count * parts.rank == inner_width,
          "an adapter of another width than its product");
  float* y = static_cast<float*>(run.output(0, base.dims));
  if (tokens == 0) return;
  constexpr size_t kBlock = 64;
  const Owners owners(run.input(3), tokens, adapters, kBlock);
  float* inner = scratch<float, 17>(tokens * inner_width);
  const Step step{x.as<float>(), base.as<float>(), a.as<float>(), inner, y, depth, width, inner_width, parts};
  // Few products take less time than waking a thread.
  constexpr size_t kMostTasks = 16, kWorth = 1 << 16;
  const bool is_small = tokens * (depth * inner_width + parts.rank * width) < kWorth;
  const size_t shares = is_small ? 1 : owners.count();
  run.parallel(shares, [&](size_t task) {
    for (size_t f = task; f < owners.count(); f += shares) step.first(owners.few(f));
  });
  const size_t vectors = (width + kLanes - 1) / kLanes;
  const size_t tasks = is_small ? 1 : std::min(kMostTasks, (vectors + kMostVectors - 1) / kMostVectors);
  run.parallel(tasks, [&](size_t task) {
    const size_t from = vectors * task / tasks * kLanes, to = std::min(width, vectors * (task + 1) / tasks * kLanes);
    for (size_t f = 0; f < owners.count(); ++f) step.second(owners.few(f), from, to);
  });
}

}  // namespace lifecycle
