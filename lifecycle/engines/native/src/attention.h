#pragma once

#include <vector>

#include "kernel.h"
#include "stored.h"

namespace lifecycle {

// GroupQueryAttention of the decoders' graphs, with the nodes that lay tokens out before it and pack them behind it:
// queries, keys and values of rows with different numbers of new tokens, over a cache that is written in place. T is
// what the cache holds: float, int8 or two values of 4 bits each. Inputs are those of ONNX Runtime's operator, but for the first one, [tokens,
// width], and a last one, the row of each token and its place among the row's new ones [tokens, 2].
template <typename T>
class Attention {
 public:
  static constexpr const char* kName = !kIsInteger<T>     ? "PackedAttention"
                                       : kValues<T> == 1 ? "PackedAttentionInt8"
                                                         : "PackedAttentionInt4";
  static constexpr size_t kInputs = 18, kOutputs = 3;
  static constexpr ort::Type kCache = !kIsInteger<T> ? ort::kFloat : kValues<T> == 1 ? ort::kInt8 : ort::kUint8;

  static ort::Type input(size_t index);
  static ort::Type output(size_t index) { return index == 0 ? ort::kFloat : kCache; }
  static bool is_optional(size_t index);

  Attention(const ort::Api& api, const ort::Info* info);
  void run(const Run& run);

  const ort::Api& api;

 private:
  struct Step;
  struct Piece;
  Step read(const Run& run) const;
  void check_places(Step& step, std::vector<size_t>& firsts) const;
  std::vector<Piece> pieces_of(const Step& step) const;
  void rotate(const Step& step, size_t token) const;
  void attend(const Step& step, size_t row, size_t kv_head, size_t first, size_t last) const;

  size_t heads_, kv_heads_;
  bool rotates_, interleaved_;
  int64_t window_;
  float scale_, softcap_;
};

}  // namespace lifecycle
