// Rows of activations: as integers, gated, normed.
#include <algorithm>
#include <cmath>

#include "rows.h"

namespace lifecycle {

float round_block(const float* x, size_t count, bool is_rowwise, int8_t* out, size_t stride, int32_t* total) {
  auto place = [&](size_t k) { return out + in_stretches(k, stride); };
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
    for (size_t from = 0; from < count; from += kStretch) std::memset(place(from), 0, std::min(kStretch, count - from));
    *total = 0;
    return largest - largest;  // 0, or no number
  }
  const float inverse = 127 / largest;
  v16i sums = {};
  int32_t rest_sum = 0;
  auto steps = [&](v16f v) {
    const v16f quick = v * inverse, whole = rounded(quick);
    // In blocks as ONNX Runtime's operator rounds, row-wise as its nodes do: they divide twice, which makes a difference
    // only near halves, and takes eight times as long.
    constexpr float kNearHalf = 0.4999f;
    if (!is_rowwise || all(magnitude(quick - whole) < spread(kNearHalf))) return whole;
    return rounded((v / largest) / kStep);
  };
  for (k = 0; k + kLanes <= count; k += kLanes) {
    const v16i q = to_integer(steps(load<v16f>(x + k)));
    sums += q;
    store(place(k), narrowed(q));
  }
  for (; k < count; ++k) {
    const int32_t q = (int32_t)steps(spread(x[k]))[0];
    rest_sum += q;
    *place(k) = (int8_t)q;
  }
  *total = sum<int32_t>(sums) + rest_sum;
  return is_rowwise ? largest : largest * kStep;
}

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

}  // namespace lifecycle
