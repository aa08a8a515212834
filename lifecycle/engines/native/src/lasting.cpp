#include "lasting.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lifecycle {
namespace {

constexpr size_t kLine = 64, kPage = 2 << 20, kStretch = 32 << 20;

constexpr size_t whole(size_t bytes, size_t of) { return (bytes + of - 1) / of * of; }

class Stretch {
 public:
  explicit Stretch(size_t size) : left_(whole(size, kPage)) {
#if defined(__linux__)
    // More than is needed, so that a page begins where it should; what is never touched takes no memory.
    mapped_ = left_ + kPage;
    void* found = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(found);
    next_ = base_ + (whole((size_t)base_, kPage) - (size_t)base_);
    madvise(next_, left_, MADV_HUGEPAGE);
#else
    base_ = next_ = static_cast<char*>(std::aligned_alloc(kPage, left_));
    if (base_ == nullptr) throw std::bad_alloc();
    std::memset(base_, 0, left_);
#endif
  }
  Stretch(const Stretch&) = delete;
  Stretch& operator=(const Stretch&) = delete;
  ~Stretch() {
#if defined(__linux__)
    munmap(base_, mapped_);
#else
    std::free(base_);
#endif
  }

  size_t left() const { return left_; }
  void* take(size_t bytes) {
    char* found = next_;
    next_ += bytes;
    left_ -= bytes;
    return found;
  }

 private:
  size_t left_, mapped_ = 0;
  char *base_ = nullptr, *next_ = nullptr;
};

}  // namespace

std::shared_ptr<void> lasting_memory(size_t bytes) {
  static std::mutex lock;
  static std::weak_ptr<Stretch> last;
  const std::lock_guard<std::mutex> guard(lock);
  bytes = whole(bytes, kLine);
  std::shared_ptr<Stretch> stretch = last.lock();
  if (bytes >= kStretch) {
    // By itself: what comes later would keep it when its model has gone.
    stretch = std::make_shared<Stretch>(bytes);
  } else if (!stretch || stretch->left() < bytes) {
    last = stretch = std::make_shared<Stretch>(kStretch);
  }
  return {stretch, stretch->take(bytes)};
}

}  // namespace lifecycle
