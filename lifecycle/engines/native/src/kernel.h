// What all operators here have in common: reading tensors, errors, work spread over the runtime's threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort.h"

namespace lifecycle {

// The dimensions of a tensor.
class Dims {
 public:
  Dims() = default;
  Dims(std::initializer_list<int64_t> values) : Dims(values.begin(), values.size()) {}
  Dims(const int64_t* values, size_t count) : count_(count) {
    if (count > kMost) throw std::runtime_error("a tensor of too many dimensions");
    std::copy(values, values + count, values_);
  }
  size_t size() const { return count_; }
  bool empty() const { return count_ == 0; }
  const int64_t* begin() const { return values_; }
  const int64_t* end() const { return values_ + count_; }
  int64_t operator[](size_t i) const { return values_[i]; }
  int64_t back() const { return values_[count_ - 1]; }
  int64_t& back() { return values_[count_ - 1]; }
  bool operator==(const Dims& other) const { return std::equal(begin(), end(), other.begin(), other.end()); }

 private:
  static constexpr size_t kMost = 8;
  int64_t values_[kMost];
  size_t count_ = 0;
};

struct Tensor {
  const void* data = nullptr;
  Dims dims;
  ort::Type type = ort::kUndefined;

  explicit operator bool() const { return data != nullptr; }
  int64_t size() const {
    int64_t count = 1;
    for (int64_t dim : dims) count *= dim;
    return count;
  }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// Memory at the beginning of a cache line, zeroed.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) { reset(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  // Room for `count` values, which keeps its contents only if it was there already.
  T* reset(size_t count) {
    if (count > room_) {
      std::free(data_);
      data_ = nullptr;
      room_ = 0;
      size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
      std::memset(data_, 0, bytes);
      room_ = count;
    }
    return data_;
  }
  T* get() { return data_; }
  const T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t room_ = 0;
};

// Room that a thread keeps for its next use; what was asked for last is what it holds.
template <typename T, int Which>
T* scratch(size_t count) {
  thread_local Buffer<T> buffer;
  return buffer.reset(count);
}

inline void check(const ort::Api& api, ort::Status* status) {
  if (status == nullptr) return;
  const std::string message = api.message(status);
  api.release(status);
  throw std::runtime_error(message);
}

inline void require(bool holds, const char* message) {
  if (!holds) throw std::runtime_error(message);
}

inline Tensor read(const ort::Api& api, const ort::Value* value) {
  Tensor found;
  if (value == nullptr) return found;
  void* data = nullptr;
  check(api, api.data(value, &data));
  const int64_t* dims = nullptr;
  size_t rank = 0;
  check(api, api.shape(value, &found.type, &dims, &rank));
  found.dims = Dims(dims, rank);
  // A tensor without elements may have no address.
  static const char nothing = 0;
  found.data = data != nullptr ? data : &nothing;
  return found;
}

inline Tensor constant(const ort::Api& api, const ort::Info* info, size_t index) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  check(api, api.constant(info, index, &is_constant, &value));
  return is_constant ? read(api, value) : Tensor();
}

template <typename T>
T attribute(const ort::Api& api, const ort::Info* info, const char* name, T otherwise) {
  T found = otherwise;
  if (ort::Status* status = api.attribute(info, name, &found)) {
    api.release(status);
    return otherwise;
  }
  return found;
}

// One run of an operator.
class Run {
 public:
  Run(const ort::Api& api, ort::Context* context) : api_(api), context_(context) {}
  Tensor input(size_t index) const {
    const ort::Value* value = nullptr;
    check(api_, api_.input(context_, index, &value));
    return read(api_, value);
  }
  void* output(size_t index, const Dims& dims) const {
    ort::Value* value = nullptr;
    check(api_, api_.output(context_, index, dims.begin(), dims.size(), &value));
    require(value != nullptr, "a node without an output that its operator writes");
    void* data = nullptr;
    check(api_, api_.data(value, &data));
    return data;
  }
  // work(i) for i below `count`, on the threads of the session.
  template <typename Work>
  void parallel(size_t count, const Work& work) const {
    if (count == 0) return;
    if (count == 1) return work(0);
    struct Call {
      const Work& work;
      std::atomic<bool> failed{false};
    } call{work};
    auto one = [](void* data, size_t index) {
      auto* self = static_cast<Call*>(data);
      // The runtime's threads must not see an exception; the only one is that memory is out.
      try {
        self->work(index);
      } catch (...) {
        self->failed = true;
      }
    };
    check(api_, api_.parallel(context_, one, count, count, &call));
    require(!call.failed, "no memory for a kernel");
  }
  // work(row) for rows of `width` values, some at a time: few values take less time than waking a thread.
  template <typename Work>
  void rows(size_t count, size_t width, const Work& work) const {
    constexpr size_t kAtOnce = 1 << 14;
    const size_t part = std::max<size_t>(1, kAtOnce / std::max<size_t>(1, width));
    parallel((count + part - 1) / part, [&](size_t i) {
      for (size_t row = i * part; row < std::min(count, (i + 1) * part); ++row) work(row);
    });
  }

 private:
  const ort::Api& api_;
  ort::Context* context_;
};

// Makes an operator of a class with kName, kInputs, kOutputs, input(i), output(i), a constructor from the node and
// run(). What it throws becomes an error of the step.
template <typename Kernel>
struct Operator : ort::Op {
  Operator() {
    name = [](const ort::Op*) { return Kernel::kName; };
    provider = [](const ort::Op*) -> const char* { return nullptr; };
    input_count = [](const ort::Op*) -> size_t { return Kernel::kInputs; };
    input_type = [](const ort::Op*, size_t i) { return Kernel::input(i); };
    output_count = [](const ort::Op*) -> size_t { return Kernel::kOutputs; };
    output_type = [](const ort::Op*, size_t i) { return Kernel::output(i); };
    input_characteristic = [](const ort::Op*, size_t i) {
      return Kernel::is_optional(i) ? ort::kOptional : ort::kRequired;
    };
    // What a step is for comes first.
    output_characteristic = [](const ort::Op*, size_t i) { return i == 0 ? ort::kRequired : ort::kOptional; };
    input_memory = [](const ort::Op*, size_t) { return 0; };
    variadic_input_min = [](const ort::Op*) { return 1; };
    variadic_input_same = [](const ort::Op*) { return 1; };
    variadic_output_min = [](const ort::Op*) { return 1; };
    variadic_output_same = [](const ort::Op*) { return 1; };
    start_version = [](const ort::Op*) { return 1; };
    end_version = [](const ort::Op*) { return 2147483647; };
    create_v2 = [](const ort::Op*, const ort::Api* api, const ort::Info* info, void** out) -> ort::Status* {
      try {
        *out = new Kernel(*api, info);
        return nullptr;
      } catch (const std::exception& error) {
        return api->fail(error.what());
      }
    };
    compute_v2 = [](void* data, ort::Context* context) -> ort::Status* {
      auto* kernel = static_cast<Kernel*>(data);
      try {
        kernel->run(Run(kernel->api, context));
        return nullptr;
      } catch (const std::exception& error) {
        return kernel->api.fail(error.what());
      }
    };
    destroy = [](void* data) { delete static_cast<Kernel*>(data); };
  }
};

}  // namespace lifecycle
