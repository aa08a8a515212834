// What the kernels use of ONNX Runtime's C interface, declared by place, so that no header of it is needed to
// compile them. Functions stand in one table whose order never changes: new ones are only added at its end. The
// places are those of the table of version 24 (ONNX Runtime 1.24), which is asked for by that number.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kVersion = 24;

struct Status;
struct Value;
struct Info;
struct Context;
struct Domain;
struct Options;
struct InferContext;

enum Type : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kUint16 = 4, kInt32 = 6, kInt64 = 7 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// The table of functions; each is named at its place.
class Api {
 public:
  Status* fail(const char* message) const {
    constexpr int kFailed = 1;
    return at<Status* (*)(int, const char*)>(0)(kFailed, message);
  }
  const char* message(const Status* status) const {
    return at<const char* (*)(const Status*)>(2)(status);
  }
  Status* domain(const char* name, Domain** out) const {
    return at<Status* (*)(const char*, Domain**)>(26)(name, out);
  }
  Status* add(Domain* domain, const void* op) const {
    return at<Status* (*)(Domain*, const void*)>(27)(domain, op);
  }
  Status* add(Options* options, Domain* domain) const {
    return at<Status* (*)(Options*, Domain*)>(28)(options, domain);
  }
  Status* data(const Value* value, void** out) const {
    return at<Status* (*)(const Value*, void**)>(51)(value, out);
  }
  Status* attribute(const Info* info, const char* name, float* out) const {
    return at<Status* (*)(const Info*, const char*, float*)>(85)(info, name, out);
  }
  Status* attribute(const Info* info, const char* name, int64_t* out) const {
    return at<Status* (*)(const Info*, const char*, int64_t*)>(86)(info, name, out);
  }
  Status* input(const Context* context, size_t index, const Value** out) const {
    return at<Status* (*)(const Context*, size_t, const Value**)>(90)(context, index, out);
  }
  Status* output(Context* context, size_t index, const int64_t* dims, size_t rank, Value** out) const {
    return at<Status* (*)(Context*, size_t, const int64_t*, size_t, Value**)>(91)(context, index, dims,
                                                                                  rank, out);
  }
  void release(Status* status) const { at<void (*)(Status*)>(93)(status); }
  Status* constant(const Info* info, size_t index, int* is_constant, const Value** out) const {
    return at<Status* (*)(const Info*, size_t, int*, const Value**)>(249)(info, index, is_constant, out);
  }
  Status* parallel(const Context* context, void (*run)(void*, size_t), size_t total, size_t batches,
                   void* data) const {
    return at<Status* (*)(const Context*, void (*)(void*, size_t), size_t, size_t, void*)>(274)(
        context, run, total, batches, data);
  }

  // Dimensions stay the value's own. The older functions make a copy for each tensor, which takes 0.3 µs.
  Status* shape(const Value* value, Type* type, const int64_t** dims, size_t* rank) const {
    return at<Status* (*)(const Value*, Type*, const int64_t**, size_t*)>(414)(value, type, dims, rank);
  }

 private:
  template <typename F>
  F at(size_t place) const {
    return reinterpret_cast<F>(reinterpret_cast<void* const*>(this)[place]);
  }
};

struct ApiBase {
  const Api* (*get)(uint32_t version);
  const char* (*version)();
};

// An operator as ONNX Runtime knows it; functions that stay empty have a meaning of their own there.
struct Op {
  uint32_t version = kVersion;
  void* (*create)(const Op*, const Api*, const Info*) = nullptr;
  const char* (*name)(const Op*) = nullptr;
  const char* (*provider)(const Op*) = nullptr;
  Type (*input_type)(const Op*, size_t) = nullptr;
  size_t (*input_count)(const Op*) = nullptr;
  Type (*output_type)(const Op*, size_t) = nullptr;
  size_t (*output_count)(const Op*) = nullptr;
  void (*compute)(void*, Context*) = nullptr;
  void (*destroy)(void*) = nullptr;
  Characteristic (*input_characteristic)(const Op*, size_t) = nullptr;
  Characteristic (*output_characteristic)(const Op*, size_t) = nullptr;
  int (*input_memory)(const Op*, size_t) = nullptr;
  int (*variadic_input_min)(const Op*) = nullptr;
  int (*variadic_input_same)(const Op*) = nullptr;
  int (*variadic_output_min)(const Op*) = nullptr;
  int (*variadic_output_same)(const Op*) = nullptr;
  Status* (*create_v2)(const Op*, const Api*, const Info*, void**) = nullptr;
  Status* (*compute_v2)(void*, Context*) = nullptr;
  Status* (*infer)(const Op*, InferContext*) = nullptr;
  int (*start_version)(const Op*) = nullptr;
  int (*end_version)(const Op*) = nullptr;
  size_t (*may_inplace)(int**, int**) = nullptr;
  void (*release_may_inplace)(int*, int*) = nullptr;
  size_t (*alias_map)(int**, int**) = nullptr;
  void (*release_alias_map)(int*, int*) = nullptr;
};

}  // namespace ort
