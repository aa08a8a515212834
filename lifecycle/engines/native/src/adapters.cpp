// What adapters add. The order of a token's sums depends on the shape of its adapter only, not on what tokens are beside it.
#include "adapters.h"

#include <algorithm>

#include "simd.h"

namespace lifecycle {
namespace {

// Vectors of columns and rows at once: their sums fill three quarters of the registers.
constexpr int kMostVectors = 3;
constexpr size_t kVectorRows = 8;
// Tokens of an adapter from which on matrices are faster.
constexpr size_t kTokensWorthMatrices = 4;
// Rows of a matrix that are asked for ahead of those that are multiplied. A step reads A once for each adapter; what lies
// behind its end is asked for in vain.
constexpr size_t kAhead = 64;

// A few rows, by their addresses: y = base + x [rows, depth] times w [depth, `stride` columns]. No base is zeros.
template <typename T>
struct Rows {
  size_t count;
  const T* x[kVectorRows];
  const float* base[kVectorRows];
  float* y[kVectorRows];
};

// The same for 16 * NV columns from `column` on, or for `count` where they are fewer and NV is 0.
template <int MR, int NV, bool kAsMatrices, typename T>
void accumulate(const Rows<T>& rows, size_t depth, const T* w, size_t stride, size_t column, size_t count) {
  constexpr bool kIsPart = NV == 0;
  constexpr int kVectors = kIsPart ? 1 : NV;
  v16f acc[MR][kVectors] = {};
  add_products<kAsMatrices, kIsPart, kAhead>(acc, rows.x, depth, w + column, stride, count);
  LIFECYCLE_UNROLL for (int i = 0; i < MR; ++i) {
    LIFECYCLE_UNROLL for (int j = 0; j < kVectors; ++j) {
      const size_t at = column + j * kLanes, size = kIsPart ? count : kLanes;
      if (rows.base[i] != nullptr) acc[i][j] += some(rows.base[i] + at, size);
      put(rows.y[i] + at, acc[i][j], size);
    }
  }
}

template <int NV, bool kAsMatrices, typename T>
void some_rows(const Rows<T>& rows, size_t depth, const T* w, size_t stride, size_t column, size_t count = kLanes) {
  each<(int)kVectorRows>([&](auto i) {
    constexpr int kRows = i + 1;
    // More have matrices.
    if constexpr (!kAsMatrices || kRows < (int)kTokensWorthMatrices) {
      if (rows.count == (size_t)kRows) accumulate<kRows, NV, kAsMatrices>(rows, depth, w, stride, column, count);
    }
  });
}

// The same for columns `from` to `to`.
template <bool kAsMatrices, typename T>
void columns(const Rows<T>& rows, size_t depth, const T* w, size_t stride, size_t from, size_t to) {
  size_t c = from;
  for (; c + kMostVectors * kLanes <= to; c += kMostVectors * kLanes) {
    some_rows<kMostVectors, kAsMatrices>(rows, depth, w, stride, c);
  }
  const size_t left = (to - c) / kLanes;
  if (left == 2) some_rows<2, kAsMatrices>(rows, depth, w, stride, c);
  if (left == 1) some_rows<1, kAsMatrices>(rows, depth, w, stride, c);
  c += left * kLanes;
  // As vectors too, for a column must not get other bits where a share ends elsewhere.
  if (c < to) some_rows<0, kAsMatrices>(rows, depth, w, stride, c, to - c);
}

}  // namespace

template <typename T>
Adapters<T>::Adapters(const Run& run, size_t first, size_t tokens, size_t depth, size_t columns,
                      size_t block)
    : tokens_(tokens), depth_(depth), columns_(columns) {
  const Tensor a = run.input(first), places = run.input(first + 1);
  require(a.dims.size() == 3 && (size_t)a.dims[1] == depth, "an adapter of another depth than its input");
  require((size_t)places.size() == 2 * tokens, "not one adapter for each token");
  const size_t adapters = (size_t)a.dims[0];
  inner_width_ = (size_t)a.dims[2];
  a_ = a.as<T>();
  places_ = places.as<int64_t>();
  size_t known = 0;
  for (size_t i = 0; i < kMostParts; ++i) {
    const Tensor b = run.input(first + 2 + i);
    if (!b) break;
    require(b.dims.size() == 3 && (size_t)b.dims[0] == adapters, "an adapter without its second matrix");
    require(i == 0 || (size_t)b.dims[1] == rank_, "an adapter of two ranks");
    require(kWide == 1 || b.dims[2] % kLanes == 0, "a part of a width that is no multiple of 16");
    rank_ = (size_t)b.dims[1];
    parts_.push_back({b.as<T>(), (size_t)b.dims[2], known});
    known += (size_t)b.dims[2];
  }
  require(known == columns && parts_.size() * rank_ == inner_width_, "an adapter of another width than its product");
  require(depth % kWide == 0 && rank_ % kWide == 0, "an adapter of an odd depth or rank");
  group(adapters, block);
  sums_ = scratch<float, 11>(tokens * inner_width_);
  if constexpr (kWide == 1) {
    inner_ = sums_;
  } else {
    // Matrices of rows are read whole, and may end behind the last token.
    inner_ = scratch<T, 12>((tokens + kMatrixRows) * inner_width_ / kWide);
  }
}

// Tokens of one adapter together, a few at a time.
template <typename T>
void Adapters<T>::group(size_t adapters, size_t block) {
  const size_t most = kWide == 2 && has_matrices() ? kMatrixRows : kVectorRows;
  all_.reserve(tokens_);
  for (size_t t = 0; t < tokens_; ++t) {
    if (t % block == 0) blocks_.push_back(all_.size());
    require(places_[2 * t] >= 0 && adapter_of(t) < adapters, "a token of an adapter that is not there");
    size_t f = blocks_.back();
    while (f < all_.size() && (all_[f].adapter != adapter_of(t) || all_[f].count == most)) ++f;
    if (f == all_.size()) {
      all_.emplace_back();
      all_[f].adapter = adapter_of(t);
      all_[f].count = 0;
    }
    all_[f].tokens[all_[f].count++] = t;
  }
  blocks_.push_back(all_.size());
}

template <typename T>
void Adapters<T>::multiply(const Few& few) noexcept {
  const size_t depth = depth_ / kWide;
  const T* w = a_ + few.adapter * depth * inner_width_;
  if (kWide == 2 && has_matrices() && few.count >= kTokensWorthMatrices) {
    multiply_matrices(few, w);
  } else {
    Rows<T> rows{few.count, {}, {}, {}};
    for (size_t i = 0; i < few.count; ++i) {
      rows.x[i] = x_ + few.tokens[i] * depth;
      rows.y[i] = sums_ + few.tokens[i] * inner_width_;
    }
    constexpr bool kMayHave = kWide == 2 && LIFECYCLE_MATRICES;
    if (kMayHave && has_matrices()) {
      columns<kMayHave>(rows, depth, w, inner_width_, 0, inner_width_);
    } else {
      columns<false>(rows, depth, w, inner_width_, 0, inner_width_);
    }
  }
  if constexpr (kWide == 2) {
    for (size_t i = 0; i < few.count; ++i) {
      const size_t at = few.tokens[i] * inner_width_;
      as_pairs(sums_ + at, inner_width_, inner_ + at / kWide);
      if (has_matrices()) {
        for (size_t r = 0; r < inner_width_; ++r) {
          const uint32_t pair = inner_[(at + r) / kWide];
          sums_[at + r] = float_of(r % kWide == 0 ? pair << 16 : pair & 0xffff0000);
        }
      }
    }
  }
}

// In registers: up to three of sums, one of x and one of A.
template <typename T>
void Adapters<T>::multiply_matrices(const Few& few, const T* w) noexcept {
  constexpr int kX = 3, kA = 4;
  constexpr size_t kSums = 3;
  const size_t depth = depth_ / kWide, share = even_share(depth), count = few.count;
  const bool is_whole = few.tokens[count - 1] == few.tokens[0] + count - 1;
  for (size_t column = 0; column < inner_width_;) {
    const size_t left = inner_width_ - column, vectors = std::min(kSums, std::max<size_t>(1, left / kLanes));
    const size_t width = std::min(left, vectors * kLanes), bytes = std::min(left, (size_t)kLanes) * sizeof(float);
    const Shape sums{count, bytes};
    const Matrices registers({sums, sums, sums, {count, share * sizeof(uint32_t)}, {share, bytes}});
    each<kSums>([](auto j) { clear_matrix<j>(); });
    for (size_t k = 0; k < depth; k += share) {
      const T* from = w + k * inner_width_ + column;
      for (size_t row = 0; row < share; ++row) {
        for (size_t j = 0; j < vectors; ++j) __builtin_prefetch(from + (row + kAhead) * inner_width_ + j * kLanes);
      }
      if (is_whole) {
        load_matrix<kX>(x_ + few.tokens[0] * depth + k, depth * sizeof(T));
      } else {
        T some[kMatrixRows * kLanes];
        for (size_t i = 0; i < count; ++i) {
          std::memcpy(some + i * share, x_ + few.tokens[i] * depth + k, share * sizeof(T));
        }
        load_matrix<kX>(some, share * sizeof(T));
      }
      each<kSums>([&](auto j) {
        if ((size_t)j >= vectors) return;
        load_matrix<kA>(from + j * kLanes, inner_width_ * sizeof(T));
        multiply_pairs<j, kX, kA>();
      });
    }
    float found[kSums][kMatrixRows * kLanes];
    each<kSums>([&](auto j) { store_matrix<j>(found[j], kMatrixBytes); });
    for (size_t i = 0; i < count; ++i) {
      float* to = sums_ + few.tokens[i] * inner_width_ + column;
      for (size_t j = 0; j < vectors; ++j) put(to + j * kLanes, load<v16f>(found[j] + i * kLanes), width - j * kLanes);
    }
    column += width;
  }
}

template <typename T>
void Adapters<T>::multiply_block(size_t block) {
  for (size_t f = blocks_[block]; f < blocks_[block + 1]; ++f) {
    multiply(all_[f]);
    done_.fetch_add(1);
  }
}

template <typename T>
void Adapters<T>::multiply_rest() {
  if (done_.load() == all_.size()) return;
  for (size_t f; (f = next_.fetch_add(1)) < all_.size();) {
    multiply(all_[f]);
    done_.fetch_add(1);
  }
}

template class Adapters<float>;
template class Adapters<uint32_t>;

void AdapterUpdate::run(const Run& run) {
  const Tensor x = run.input(0), base = run.input(1);
  require(x.dims.size() == 2 && base.dims.size() == 2 && x.dims[0] == base.dims[0],
          "an adapter's input of another rank");
  const size_t tokens = (size_t)x.dims[0], width = (size_t)base.dims[1];
  float* y = static_cast<float*>(run.output(0, base.dims));
  if (tokens == 0) return;
  constexpr size_t kBlock = 64;
  Adapters<float> adapters(run, 2, tokens, (size_t)x.dims[1], width, kBlock);
  adapters.begin(x.as<float>());
  auto second = [&](const Adapters<float>::Few& few, size_t from, size_t to) {
    for (size_t p = 0; p < adapters.parts().size(); ++p) {
      const auto& part = adapters.parts()[p];
      const size_t begin = std::max(from, part.first), end = std::min(to, part.first + part.columns);
      if (begin >= end) continue;
      Rows<float> rows{few.count, {}, {}, {}};
      for (size_t i = 0; i < few.count; ++i) {
        const size_t at = few.tokens[i] * width + part.first;
        rows.x[i] = adapters.inner(few.tokens[i], p);
        rows.base[i] = base.as<float>() + at;
        rows.y[i] = y + at;
      }
      columns<false>(rows, adapters.rank(), part.of(few.adapter, adapters.rank()), part.columns, begin - part.first,
              end - part.first);
    }
  };
  // Few products take less time than waking a thread.
  constexpr size_t kMostTasks = 16, kWorth = 1 << 16;
  const size_t vectors = (width + kLanes - 1) / kLanes;
  const size_t tasks = adapters.products() < kWorth ? 1 : std::min(kMostTasks, (vectors + 2) / kMostVectors);
  run.parallel(tasks, [&](size_t task) {
    adapters.multiply_rest();
    adapters.wait();
    const size_t from = vectors * task / tasks * kLanes, to = std::min(width, vectors * (task + 1) / tasks * kLanes);
    for (const auto& few : adapters.few()) second(few, from, to);
  });
}

}  // namespace lifecycle
