// The operators, and the door through which ONNX Runtime takes them.
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <mutex>
#include <optional>

#include "adapter_update.h"
#include "attention.h"
#include "columns.h"
#include "products.h"

namespace lifecycle {
namespace {

size_t rows_of(const Tensor& x, size_t depth) {
  require(depth > 0 && !x.dims.empty() && (size_t)x.dims.back() == depth, "an input of another width than its weights");
  return (size_t)(x.size() / (int64_t)depth);
}

// Where weights were mapped from a file, they need not stay in memory beside their packed form: the system may take
// their pages back, and reads them again if need be.
void not_needed(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  const uintptr_t from = ((uintptr_t)tensor.data + page - 1) / page * page;
  const uintptr_t to = ((uintptr_t)tensor.data + (uintptr_t)tensor.size()) / page * page;
  if (to > from) madvise((void*)from, to - from, MADV_PAGEOUT);
#else
  (void)tensor;
#endif
}

// A product whose first inputs are x and weights; what adapters add may follow them.
class Product {
 public:
  // What is computed, and of logits the largest of each column (see columns.h), where the node says `tops`.
  static constexpr size_t kOutputs = 2;
  static ort::Type output(size_t) { return ort::kFloat; }

  // What a node says of its adapters are the `rank` and the columns of each part, `part0` and so on.
  Product(const ort::Api& api, const ort::Info* info, size_t own_inputs)
      : api(api), own_inputs_(own_inputs), is_gated_(attribute<int64_t>(api, info, "gated", 0) != 0),
        has_tops_(attribute<int64_t>(api, info, "tops", 0) != 0) {
    // Below these no product of two of them can be too large for an integer.
    constexpr int64_t kMostRank = 1 << 16, kMostColumns = INT32_MAX;
    const int64_t rank = attribute<int64_t>(api, info, "rank", 0);
    for (const char* part : {"part0", "part1", "part2"}) {
      const int64_t columns = attribute<int64_t>(api, info, part, 0);
      if (columns == 0) break;
      require(rank > 0 && rank <= kMostRank, "adapters of a rank that none has");
      require(columns > 0 && columns < kMostColumns && columns % kLanes == 0,
              "adapters of a width that is no multiple of 16");
      adapted_.columns[adapted_.parts++] = (size_t)columns;
    }
    adapted_.rank = (size_t)rank;
  }
  void run(const Run& run) {
    Tensor x = run.input(0);
    const size_t depth = weights_->depth, columns = weights_->columns, count = rows_of(x, depth << is_gated_);
    Dims dims = x.dims;
    dims.back() = (int64_t)columns;
    float* y = static_cast<float*>(run.output(0, dims));
    float* tops = nullptr;
    if (has_tops_) {
      dims.back() = (int64_t)columns_of(columns);
      tops = static_cast<float*>(run.output(1, dims));
    }
    std::optional<Adapters> adapters;
    if (run.input(own_inputs_)) {
      require(adapted_.parts > 0, "adapters of a product that says nothing of theirs");
      adapters.emplace(run, own_inputs_, adapted_, count);
    }
    product(run, *weights_, is_gated_, x.as<float>(), count, y, tops, adapters ? &*adapters : nullptr);
  }

  const ort::Api& api;

 protected:
  void set_weights(std::shared_ptr<const Weights> weights) {
    weights_ = std::move(weights);
    adapted_.depth = weights_->depth;
    adapted_.measure();
    require(adapted_.parts == 0 || adapted_.all_columns() == weights_->columns,
            "adapters of another width than their product");
  }

 private:
  std::shared_ptr<const Weights> weights_;
  size_t own_inputs_;
  bool is_gated_, has_tops_;
  AdapterShape adapted_;
};

// x [.., K], weights int8 [K, N], or [N, K] where `transposed`, their scales [N], and a bias [N].
class RowwiseMatMul : public Product {
 public:
  static constexpr const char* kName = "RowwiseMatMul";
  static constexpr size_t kOwn = 4, kInputs = kOwn + Adapters::kInputs;
  static ort::Type input(size_t index) {
    if (index >= kOwn) return Adapters::input(index - kOwn);
    return index == 1 ? ort::kInt8 : ort::kFloat;
  }
  static bool is_optional(size_t index) { return index >= 3; }

  RowwiseMatMul(const ort::Api& api, const ort::Info* info) : Product(api, info, kOwn) {
    const Tensor given = constant(api, info, 1), scales = constant(api, info, 2), bias = constant(api, info, 3);
    require(given && scales && given.dims.size() == 2, "RowwiseMatMul needs constant weights");
    const bool transposed = attribute<int64_t>(api, info, "transposed", 0) != 0;
    require(given.size() > 0 && scales.size() == given.dims[!transposed], "RowwiseMatMul needs a scale for each column");
    set_weights(shared({given, scales, bias}, {0, transposed, given.dims[0], given.dims[1]}, [&](Weights& w) {
      fill(w, given, scales, transposed);
      w.set_bias(bias);
    }));
    not_needed(given);
  }

 private:
  static void fill(Weights& w, const Tensor& given, const Tensor& scales, bool transposed) {
    w.is_rowwise = true;
    w.depth = (size_t)given.dims[transposed];
    w.columns = (size_t)given.dims[!transposed];
    w.block = (w.depth + 7) / 8 * 8;
    w.allocate(false);
    const int8_t* from = given.as<int8_t>();
    // Of 7 bits (`weight_bits`), none is above 127 with 64 for 0.
    uint8_t bits = 0;
    for (int64_t i = 0; i < given.size(); ++i) bits |= (uint8_t)(from[i] + 64);
    w.is_small = bits < 128;
    w.zero = w.is_small ? 64 : 128;
    const size_t by_k = transposed ? 1 : w.columns, by_n = transposed ? w.depth : 1;
    uint8_t* to = w.packed.get();
    for (size_t tile = 0; tile < w.tiles(); ++tile) {
      for (size_t k = 0; k < w.block; k += 4, to += 64) {
        std::memset(to, w.zero, 64);
        for (size_t i = 0; i < 4 && k + i < w.depth; ++i) {
          const size_t first = (k + i) * by_k + tile * 16 * by_n;
          for (size_t n = 0; n < 16 && tile * 16 + n < w.columns; ++n) {
            to[4 * n + i] = (uint8_t)(from[first + n * by_n] + w.zero);
          }
        }
      }
    }
    for (size_t n = 0; n < w.columns; ++n) w.scales.get()[n] = kStep * scales.as<float>()[n];
  }
};

// As com.microsoft's: x [.., K], weights [N, blocks, bytes], scales [N, blocks], zeros [N, bytes], -, bias [N].
class MatMulNBits : public Product {
 public:
  static constexpr const char* kName = "MatMulNBits";
  static constexpr size_t kOwn = 6, kInputs = kOwn + Adapters::kInputs;
  static ort::Type input(size_t index) {
    if (index >= kOwn) return Adapters::input(index - kOwn);
    constexpr ort::Type kTypes[] = {ort::kFloat, ort::kUint8, ort::kFloat, ort::kUint8, ort::kInt32, ort::kFloat};
    return kTypes[index];
  }
  static bool is_optional(size_t index) { return index >= 3; }

  MatMulNBits(const ort::Api& api, const ort::Info* info) : Product(api, info, kOwn) {
    const int64_t depth = attribute<int64_t>(api, info, "K", 0), columns = attribute<int64_t>(api, info, "N", 0);
    const int64_t bits = attribute<int64_t>(api, info, "bits", 4), block = attribute<int64_t>(api, info, "block_size", 0);
    // Below 2^31 no product of two of them can be too large for an integer.
    for (int64_t size : {depth, columns, block}) require(size > 0 && size < INT32_MAX, "MatMulNBits of no known size");
    require((bits == 4 || bits == 8) && block % 8 == 0, "MatMulNBits with attributes that are not known");
    const Tensor given = constant(api, info, 1), scales = constant(api, info, 2), zeros = constant(api, info, 3);
    const Tensor bias = constant(api, info, 5);
    const int64_t blocks = (depth + block - 1) / block;
    require(given && given.dims == Dims{columns, blocks, block * bits / 8},
            "MatMulNBits with weights of another shape");
    require(scales && scales.size() == columns * blocks, "MatMulNBits with scales of another size");
    require(!zeros || zeros.size() == columns * ((blocks * bits + 7) / 8), "MatMulNBits with other zero points");
    set_weights(shared({given, scales, zeros, bias}, {1, depth, columns, bits, block}, [&](Weights& w) {
      w.depth = (size_t)depth;
      w.columns = (size_t)columns;
      w.bits = (int)bits;
      w.block = (size_t)block;
      w.zero = 1 << (bits - 1);
      fill(w, given, scales, zeros);
      w.set_bias(bias);
    }));
    not_needed(given);
  }

 private:
  static void fill(Weights& w, const Tensor& given, const Tensor& scales, const Tensor& zeros) {
    const size_t blocks = w.blocks(), bytes = w.block * (size_t)w.bits / 8;
    const size_t zeros_row = (blocks * (size_t)w.bits + 7) / 8;
    w.allocate((bool)zeros);
    for (size_t column = 0; column < w.columns; ++column) {
      const size_t tile = column / 16, n = column % 16;
      for (size_t b = 0; b < blocks; ++b) {
        const uint8_t* from = given.as<uint8_t>() + (column * blocks + b) * bytes;
        pack(w, from, w.packed.get() + tile * w.tile_bytes() + b * bytes * 16 + 4 * n);
        const size_t place = (tile * blocks + b) * 16 + n;
        w.scales.get()[place] = scales.as<float>()[column * blocks + b];
        if (zeros) {
          const uint8_t* row = zeros.as<uint8_t>() + column * zeros_row;
          w.zeros.get()[place] = w.bits == 8 ? row[b] : row[b / 2] >> (4 * (b % 2)) & 15;
        }
      }
    }
  }

  // One block of a column, from its place in the first 64 bytes on.
  static void pack(const Weights& w, const uint8_t* from, uint8_t* to) {
    if (w.bits == 8) {
      for (size_t k = 0; k < w.block; k += 4, to += 64) std::memcpy(to, from + k, 4);
      return;
    }
    for (size_t k = 0; k < w.block; k += 8, to += 64) {
      for (size_t i = 0; i < 4; ++i) {
        const size_t low = k + i, high = low + 4;
        to[i] = (uint8_t)((from[low / 2] >> (4 * (low % 2)) & 15) | (from[high / 2] >> (4 * (high % 2)) & 15) << 4);
      }
    }
  }
};

// x [.., 2 * width] = [gate, up] to silu(gate) * up, the same bits as a gated product has inside.
class Gate {
 public:
  static constexpr const char* kName = "Gate";
  static constexpr size_t kInputs = 1, kOutputs = 1;
  static ort::Type input(size_t) { return ort::kFloat; }
  static ort::Type output(size_t) { return ort::kFloat; }
  static bool is_optional(size_t) { return false; }

  Gate(const ort::Api& api, const ort::Info*) : api(api) {}
  void run(const Run& run) {
    Tensor x = run.input(0);
    require(!x.dims.empty() && x.dims.back() % 2 == 0, "a gate without as many values");
    const size_t width = (size_t)x.dims.back() / 2, rows = rows_of(x, 2 * width);
    Dims dims = x.dims;
    dims.back() = (int64_t)width;
    float* y = static_cast<float*>(run.output(0, dims));
    run.rows(rows, width, [&](size_t row) { gate_row(x.as<float>() + 2 * row * width, width, y + row * width); });
  }

  const ort::Api& api;
};

// The sum of x and skip, and it divided by its root mean square and times gamma.
class SkipNorm {
 public:
  static constexpr const char* kName = "SkipNorm";
  static constexpr size_t kInputs = 3, kOutputs = 2;
  static ort::Type input(size_t) { return ort::kFloat; }
  static ort::Type output(size_t) { return ort::kFloat; }
  static bool is_optional(size_t) { return false; }

  SkipNorm(const ort::Api& api, const ort::Info* info)
      : api(api), epsilon_(attribute<float>(api, info, "epsilon", 1e-5f)) {}
  void run(const Run& run) {
    const Tensor x = run.input(0), skip = run.input(1), gamma = run.input(2);
    const size_t width = (size_t)gamma.size(), rows = rows_of(x, width);
    require(skip.dims == x.dims, "a norm of two inputs of different shapes");
    float* y = static_cast<float*>(run.output(0, x.dims));
    float* sum = static_cast<float*>(run.output(1, x.dims));
    run.rows(rows, width, [&](size_t row) {
      const size_t at = row * width;
      norm_row(x.as<float>() + at, skip.as<float>() + at, gamma.as<float>(), width, epsilon_, sum + at, y + at);
    });
  }

  const ort::Api& api;

 private:
  float epsilon_;
};

}  // namespace
}  // namespace lifecycle

extern "C" __attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::Options* options,
                                                                                  const ort::ApiBase* base) {
  using namespace lifecycle;
  static const Operator<RowwiseMatMul> rowwise;
  static const Operator<MatMulNBits> blocks;
  static const Operator<Gate> gate;
  static const Operator<SkipNorm> norm;
  static const Operator<AdapterUpdate> update;
  static const Operator<Attention<float>> attention;
  static const Operator<Attention<int8_t>> attention_int8;
  static const Operator<Attention<Fours>> attention_int4;
  const ort::Api* api = base->get(ort::kVersion);
  if (api == nullptr) return base->get(1)->fail("the kernels of lifecycle need ONNX Runtime 1.24 or newer");
  // One domain serves all sessions; what holds it is never unloaded.
  static std::mutex lock;
  const std::lock_guard<std::mutex> guard(lock);
  static ort::Domain* domain = nullptr;
  if (domain == nullptr) {
    ort::Domain* made = nullptr;
    if (ort::Status* status = api->domain("lifecycle", &made)) return status;
    const ort::Op* const all[] = {&rowwise, &blocks,    &gate,           &norm,
                                  &update,  &attention, &attention_int8, &attention_int4};
    for (const ort::Op* op : all) {
      if (ort::Status* status = api->add(made, op)) return status;
    }
    domain = made;
  }
  return api->add(options, domain);
}
