// Attention over a cache, for decoding rows, chunks of prompts and guesses alike.
//
// Keys are taken in tiles that begin at multiples of kTile of their own positions, and a token's sums run over them in
// that order, dimension by dimension and key by key. So a token gets the same bits alone and among others, however
// its text was cut. (What is no number among the values of a text reaches its other tokens of the same piece too.)
#include "attention.h"

#include <algorithm>
#include <cmath>

#include "attention_tiles.h"

namespace lifecycle {
namespace {

// Queries that share the reading of a tile: their sums stay in the second cache.
constexpr size_t kQueries = 48;
// Heads are a multiple of this wide.
constexpr size_t kHeadStep = 8;

}  // namespace

template <typename T>
struct Attention<T>::Step {
  const float* qkv;                // [tokens, width]
  const int64_t* places;           // [tokens, 2]
  const float *cos, *sin;
  size_t rotary_rows;
  const int32_t *last, *counts;    // of each row: its last position, and its new tokens
  const float *k_scale, *v_scale;  // [kv_heads, depth], for integers
  T *keys, *values;                // [rows, kv_heads, capacity, depth / kValues], tokens `stride` apart
  float* queries;                  // [kv_heads, tokens * group, depth]
  float* out;                      // [tokens, heads * depth]
  const size_t* firsts;            // of each row that has new tokens, the first of them
  size_t rows, tokens, depth, stride, capacity, group;

  size_t start(size_t row) const { return (size_t)(last[row] + 1 - counts[row]); }
  float* queries_of(size_t token, size_t kv_head) const {
    return queries + (kv_head * tokens + token) * group * depth;
  }
};

template <typename T>
ort::Type Attention<T>::input(size_t index) {
  switch (index) {
    case 3: case 4: return kCache;
    case 5: case 6: case 16: return ort::kInt32;
    case 9: case 17: return ort::kInt64;
    default: return ort::kFloat;
  }
}

template <typename T>
bool Attention<T>::is_optional(size_t index) {
  return index == 1 || index == 2 || (index >= 7 && index <= 15);
}

template <typename T>
Attention<T>::Attention(const ort::Api& api, const ort::Info* info) : api(api) {
  heads_ = (size_t)attribute<int64_t>(api, info, "num_heads", 0);
  kv_heads_ = (size_t)attribute<int64_t>(api, info, "kv_num_heads", 0);
  require(kv_heads_ > 0 && heads_ % kv_heads_ == 0, "attention with heads that cannot be shared out");
  rotates_ = attribute<int64_t>(api, info, "do_rotary", 0) != 0;
  interleaved_ = attribute<int64_t>(api, info, "rotary_interleaved", 0) != 0;
  window_ = attribute<int64_t>(api, info, "local_window_size", -1);
  scale_ = attribute<float>(api, info, "scale", 0);
  softcap_ = attribute<float>(api, info, "softcap", 0);
}

// Tokens of a row that are attended for together.
template <typename T>
struct Attention<T>::Piece {
  uint32_t row, first, last;
};

// What a call is given, all but its places looked at.
template <typename T>
typename Attention<T>::Step Attention<T>::read(const Run& run) const {
  Tensor qkv = run.input(0), keys = run.input(3), values = run.input(4), last = run.input(5);
  Tensor cos = run.input(7), sin = run.input(8), k_scale = run.input(12), v_scale = run.input(13);
  Tensor counts = run.input(16), places = run.input(17);
  Step step{};
  require(qkv.dims.size() == 2 && keys.dims.size() == 4, "attention with inputs of another rank");
  step.rows = (size_t)keys.dims[0];
  step.tokens = (size_t)qkv.dims[0];
  step.capacity = (size_t)keys.dims[2];
  step.depth = (size_t)keys.dims[3] * kValues<T>;
  step.group = heads_ / kv_heads_;
  require(step.depth % kHeadStep == 0, "attention heads have to be a multiple of 8 wide");
  require((size_t)qkv.dims[1] == (heads_ + 2 * kv_heads_) * step.depth, "queries of another width");
  require((size_t)keys.dims[1] == kv_heads_ && values.dims == keys.dims, "a cache of another shape");
  require((size_t)places.size() == 2 * step.tokens, "tokens without their places");
  require((size_t)last.size() == step.rows && (size_t)counts.size() == step.rows, "rows without their lengths");
  step.qkv = qkv.as<float>();
  step.last = last.as<int32_t>();
  step.counts = counts.as<int32_t>();
  step.places = places.as<int64_t>();
  if (rotates_) {
    require(cos && sin && cos.dims.size() == 2 && (size_t)cos.dims[1] == step.depth / 2 && sin.dims == cos.dims,
            "rotary tables of another width");
    step.cos = cos.as<float>();
    step.sin = sin.as<float>();
    step.rotary_rows = (size_t)cos.dims[0];
  }
  if (kIsInteger<T>) {
    require((size_t)k_scale.size() == kv_heads_ * step.depth && v_scale.size() == k_scale.size(),
            "a cache of integers without a scale for each channel");
    step.k_scale = k_scale.as<float>();
    step.v_scale = v_scale.as<float>();
  }
  return step;
}

// Every token follows the one before it, and every row has room; fills in where rows begin.
template <typename T>
void Attention<T>::check_places(Step& step, std::vector<size_t>& firsts) const {
  firsts.resize(step.rows);
  std::vector<int32_t> seen(step.rows);
  for (size_t token = 0; token < step.tokens; ++token) {
    const int64_t row = step.places[2 * token], place = step.places[2 * token + 1];
    require(row >= 0 && row < (int64_t)step.rows, "a token of a row that is not there");
    if (place == 0) firsts[(size_t)row] = token;
    require(place == seen[(size_t)row]++ && firsts[(size_t)row] + (size_t)place == token,
            "a token that does not follow the one before it");
  }
  step.firsts = firsts.data();
  for (size_t row = 0; row < step.rows; ++row) {
    const int64_t count = step.counts[row], end = (int64_t)step.last[row] + 1;
    require(count == seen[row], "rows with other tokens than those that are given");
    if (count == 0) continue;
    require(count > 0 && end >= count && end <= (int64_t)step.capacity, "a row that does not fit into its cache");
    require(!rotates_ || end <= (int64_t)step.rotary_rows, "a row beyond the rotary tables");
  }
}

// Long rows first, so that none is begun when the others are done.
template <typename T>
std::vector<typename Attention<T>::Piece> Attention<T>::pieces_of(const Step& step) const {
  std::vector<Piece> pieces;
  const size_t tokens = std::max<size_t>(1, kQueries / step.group);
  for (size_t row = 0; row < step.rows; ++row) {
    const size_t count = (size_t)step.counts[row];
    for (size_t first = 0; first < count; first += tokens) {
      pieces.push_back({(uint32_t)row, (uint32_t)first, (uint32_t)std::min(count, first + tokens)});
    }
  }
  auto work_of = [&](const Piece& p) { return (size_t)(step.start(p.row) + p.last) * (p.last - p.first); };
  std::stable_sort(pieces.begin(), pieces.end(),
                   [&](const Piece& a, const Piece& b) { return work_of(a) > work_of(b); });
  return pieces;
}

template <typename T>
void Attention<T>::run(const Run& run) {
  Step step = read(run);
  std::vector<size_t> firsts;
  check_places(step, firsts);
  Tensor keys = run.input(3), values = run.input(4);
  step.out = static_cast<float*>(run.output(0, {(int64_t)step.tokens, (int64_t)(heads_ * step.depth)}));
  step.keys = static_cast<T*>(run.output(1, keys.dims));
  step.values = static_cast<T*>(run.output(2, values.dims));
  // Values that begin right behind the first key stand behind each: both fill the same pages.
  const size_t each = step.depth / kValues<T>;
  const bool alternate = values.as<T>() == keys.as<T>() + each;
  step.stride = alternate ? 2 * each : each;
  require(!alternate || (step.keys == keys.data && step.values == values.data),
          "keys and values that alternate have to be written in place");
  if (step.keys != keys.data) std::memcpy(step.keys, keys.data, (size_t)keys.size() * sizeof(T));
  if (step.values != values.data) std::memcpy(step.values, values.data, (size_t)values.size() * sizeof(T));
  // A few more are read than there are, for nothing.
  step.queries = scratch<float, 3>((step.tokens * heads_ + kFewQueries) * step.depth);
  constexpr size_t kAtOnce = 32;
  run.parallel((step.tokens + kAtOnce - 1) / kAtOnce, [&](size_t part) {
    for (size_t t = part * kAtOnce; t < std::min(step.tokens, (part + 1) * kAtOnce); ++t) rotate(step, t);
  });
  const std::vector<Piece> pieces = pieces_of(step);
  run.parallel(pieces.size() * kv_heads_, [&](size_t i) {
    const Piece& piece = pieces[i / kv_heads_];
    attend(step, piece.row, i % kv_heads_, piece.first, piece.last);
  });
}

// Puts a token's keys and values into the cache and its queries where they are read from, both rotated.
template <typename T>
void Attention<T>::rotate(const Step& step, size_t token) const {
  const size_t row = (size_t)step.places[2 * token], position = step.start(row) + (size_t)step.places[2 * token + 1];
  const size_t depth = step.depth, half = depth / 2;
  const float* from = step.qkv + token * (heads_ + 2 * kv_heads_) * depth;
  const float scale = scale_ != 0 ? scale_ : 1 / std::sqrt((float)depth);
  float* turned = scratch<float, 4>(depth);
  auto turn = [&](const float* x) {
    if (!rotates_) {
      std::memcpy(turned, x, depth * sizeof(float));
      return;
    }
    const float *cos = step.cos + position * half, *sin = step.sin + position * half;
    if (interleaved_) {
      for (size_t d = 0; d < half; ++d) {
        turned[2 * d] = x[2 * d] * cos[d] - x[2 * d + 1] * sin[d];
        turned[2 * d + 1] = x[2 * d + 1] * cos[d] + x[2 * d] * sin[d];
      }
      return;
    }
    for (size_t d = 0; d < half; ++d) {
      turned[d] = x[d] * cos[d] - x[d + half] * sin[d];
      turned[d + half] = x[d + half] * cos[d] + x[d] * sin[d];
    }
  };
  for (size_t head = 0; head < heads_; ++head) {
    const size_t kv_head = head / step.group;
    turn(from + head * depth);
    float* to = step.queries_of(token, kv_head) + head % step.group * depth;
    // Keys are stored by their scale, which queries make up for.
    const float* k_scale = kIsInteger<T> ? step.k_scale + kv_head * depth : nullptr;
    for (size_t d = 0; d < depth; ++d) to[d] = turned[d] * scale * (k_scale != nullptr ? k_scale[d] : 1);
  }
  for (size_t kv_head = 0; kv_head < kv_heads_; ++kv_head) {
    const size_t place = ((row * kv_heads_ + kv_head) * step.capacity + position) * step.stride;
    const float* key = from + (heads_ + kv_head) * depth;
    turn(key);
    put(turned, step.k_scale + kv_head * depth, depth, step.keys + place);
    put(key + kv_heads_ * depth, step.v_scale + kv_head * depth, depth, step.values + place);
  }
}

// What tokens `first` to `last` of a row read through the heads that share one of keys.
template <typename T>
void Attention<T>::attend(const Step& step, size_t row, size_t kv_head, size_t first, size_t last) const {
  const size_t depth = step.depth, stride = step.stride, group = step.group;
  const size_t start = step.start(row), token = step.firsts[row] + first;
  const size_t count = (last - first) * group;
  // Read by one pass, keys and values need not be kept as they are computed with; the sums are the same.
  const size_t width = (depth + kLanes - 1) / kLanes * kLanes;
  const bool is_few = count <= kFewQueries && width == depth;
  const float* queries = step.queries_of(token, kv_head);
  const size_t head = (row * kv_heads_ + kv_head) * step.capacity * stride;
  float* columns = scratch<float, 5>(depth * kTile);
  float* room = scratch<float, 6>(width * kTile);
  float* scores = scratch<float, 7>(std::max(count, kFewQueries) * kTile);
  float* sums = scratch<float, 8>(count * width);
  const size_t vectors = (count + kLanes - 1) / kLanes * kLanes;
  float* state = scratch<float, 9>(vectors * (3 + kLanes));
  float *largest = state, *decay = state + vectors, *now = state + 2 * vectors, *totals = state + 3 * vectors;
  std::fill(largest, largest + vectors, kLowest);
  std::fill(now, now + vectors, kLowest);
  std::memset(sums, 0, count * width * sizeof(float));
  std::memset(totals, 0, count * kLanes * sizeof(float));

  const size_t end = start + last;
  const size_t begin = window_ > 0 && start + first + 1 > (size_t)window_ ? start + first + 1 - (size_t)window_ : 0;
  for (size_t tile = begin / kTile * kTile; tile < end; tile += kTile) {
    const size_t keys = std::min(kTile, end - tile);
    expect(step.values + head + tile * stride, keys * stride * sizeof(T));
    const T* here = step.keys + head + tile * stride;
    if (!is_few) transpose(here, keys, depth, stride, columns);
    if (is_few) {
      score_few(count, queries, depth, here, keys, stride, scores);
    } else {
      few_at_a_time(count, [&]<int MQ>(size_t i) {
        score<MQ>(queries + i * depth, depth, columns, scores + i * kTile);
      });
    }
    if (softcap_ > 0) soften(scores, count * kTile, softcap_);
    for (size_t i = 0; i < count; ++i) {
      const size_t position = start + first + i / group;
      const size_t from = window_ > 0 && position + 1 > (size_t)window_ ? position + 1 - (size_t)window_ : 0;
      now[i] = largest_of(scores + i * kTile, tile, from, position);
    }
    for (size_t i = 0; i < count; i += kLanes) {
      const v16f before = load<v16f>(largest + i), after = larger(load<v16f>(now + i), before);
      store(decay + i, exponential(before - after));
      store(largest + i, after);
    }
    for (size_t i = 0; i < count; ++i) {
      v16f total = load<v16f>(totals + i * kLanes) * decay[i];
      LIFECYCLE_UNROLL for (int j = 0; j < kVectors; ++j) {
        float* at = scores + i * kTile + j * kLanes;
        const v16f weight = exponential(load<v16f>(at) - largest[i]);
        total += weight;
        store(at, weight);
      }
      store(totals + i * kLanes, total);
    }
    if (tile + kTile < end) {
      const size_t next = std::min(kTile, end - tile - kTile);
      expect(step.keys + head + (tile + kTile) * stride, next * stride * sizeof(T));
    }
    const T* stored = step.values + head + tile * stride;
    const float* values = is_few ? nullptr : as_floats(stored, keys, depth, stride, width, room);
    const size_t apart = values == room ? width : stride;
    few_at_a_time(count, [&]<int MQ>(size_t i) {
      const float* weights = scores + i * kTile;
      if (is_few) return gather_all<MQ>(weights, decay + i, stored, keys, stride, width, sums + i * width);
      gather_all<MQ>(weights, decay + i, values, keys, apart, width, sums + i * width);
    });
  }
  for (size_t i = 0; i < count; ++i) {
    const size_t of_head = (kv_head * group + i % group) * depth;
    float* to = step.out + (token + i / group) * heads_ * depth + of_head;
    const float total = sum<float>(load<v16f>(totals + i * kLanes));
    const float* v_scale = kIsInteger<T> ? step.v_scale + kv_head * depth : nullptr;
    for (size_t d = 0; d < depth; ++d) {
      to[d] = sums[i * width + d] / total * (v_scale != nullptr ? v_scale[d] : 1);
    }
  }
}

template class Attention<float>;
template class Attention<int8_t>;
template class Attention<Fours>;

}  // namespace lifecycle
