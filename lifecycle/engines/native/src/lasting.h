// Memory of what is made once and read in every step.
#pragma once

#include <cstddef>
#include <memory>

namespace lifecycle {

// So many bytes, zeroed, at the beginning of a cache line. They are parts of long stretches in pages of 2 MiB, where the
// system has them: in pages of 4 KiB, finding where weights are took 3 to 8 % of a step of a model of 0.5B parameters.
// A stretch goes when all of its parts have gone.
std::shared_ptr<void> lasting_memory(size_t bytes);

template <typename T>
class Lasting {
 public:
  T* reset(size_t count) {
    held_ = lasting_memory(count * sizeof(T));
    return get();
  }
  T* get() { return static_cast<T*>(held_.get()); }
  const T* get() const { return static_cast<const T*>(held_.get()); }

 private:
  std::shared_ptr<void> held_;
};

}  // namespace lifecycle
