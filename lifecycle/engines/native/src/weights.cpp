// The weights of products in tiles, and that kernels with the same share them.
#include <cstring>
#include <map>
#include <mutex>
#include <random>

#include "products.h"

namespace lifecycle {
namespace {

// 128 bits of what bytes are: two sums that each byte reaches through other numbers, from a beginning that no file can
// have been made for.
struct Digest {
  uint64_t a, b;

  void add(const void* from, size_t bytes) {
    const char* at = static_cast<const char*>(from);
    for (; bytes >= 8; bytes -= 8, at += 8) {
      uint64_t word;
      std::memcpy(&word, at, 8);
      mix(word);
    }
    uint64_t rest = bytes;
    std::memcpy(reinterpret_cast<char*>(&rest) + 1, at, bytes);
    mix(rest);
  }
  void mix(uint64_t word) {
    a = (a ^ word) * 0x9e3779b97f4a7c15;
    a ^= a >> 32;
    b = (b + word) * 0xc2b2ae3d27d4eb4f;
    b ^= b >> 29;
  }
};

size_t bytes_of(const Tensor& tensor) {
  const bool is_byte = tensor.type == ort::kUint8 || tensor.type == ort::kInt8;
  return (size_t)tensor.size() * (is_byte ? 1 : sizeof(float));
}

}  // namespace

std::shared_ptr<const Weights> shared(const std::vector<Tensor>& of, const std::vector<int64_t>& sizes,
                                      const std::function<void(Weights&)>& make) {
  static std::mutex lock;
  static std::map<std::pair<uint64_t, uint64_t>, std::weak_ptr<const Weights>> all;
  static const Digest begin = [] {
    std::random_device random;
    auto word = [&] { return (uint64_t)random() << 32 | random(); };
    return Digest{word(), word()};
  }();
  Digest digest = begin;
  digest.add(sizes.data(), sizes.size() * sizeof(int64_t));
  for (const Tensor& tensor : of) digest.add(tensor.data, tensor ? bytes_of(tensor) : 0);
  const std::lock_guard<std::mutex> guard(lock);
  std::erase_if(all, [](const auto& entry) { return entry.second.expired(); });
  std::weak_ptr<const Weights>& place = all[{digest.a, digest.b}];
  if (std::shared_ptr<const Weights> found = place.lock()) return found;
  auto made = std::make_shared<Weights>();
  make(*made);
  place = made;
  return made;
}

void Weights::allocate(bool with_zeros) {
  // Matrices are read whole, and may end behind the last tile.
  packed.reset(tiles() * tile_bytes() + kMatrixRows * kMatrixBytes);
  scales.reset(tiles() * blocks() * kLanes);
  if (with_zeros) zeros.reset(tiles() * blocks() * kLanes);
}

size_t Weights::tiles() const {
  const size_t wide = is_rowwise ? kRowwiseTiles : kBlockTiles, tiles = (columns + kLanes - 1) / kLanes;
  return (tiles + wide - 1) / wide * wide;
}

void Weights::set_bias(const Tensor& given) {
  if (!given) return;
  require(given.size() == (int64_t)columns, "a bias of another width than its product");
  std::memcpy(bias.reset(tiles() * kLanes), given.as<float>(), columns * sizeof(float));
}

}  // namespace lifecycle
