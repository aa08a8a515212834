// Registers that hold matrices (AMX): eight of up to 16 rows of 64 bytes. One instruction multiplies two of them and
// adds the product to a third, as many multiplications as 256 of those for vectors, in the time of some ten.
#pragma once

#include <array>
#include <cstdlib>

#include "simd.h"

// Older Clangs call them by other names. For tests, LIFECYCLE_VECTORS computes everything as a processor without such
// registers does, LIFECYCLE_EMULATED as one with them, whose instructions are functions here.
#if LIFECYCLE_AVX512 && defined(__linux__) && !defined(LIFECYCLE_VECTORS) && !defined(LIFECYCLE_EMULATED) && \
    (defined(__AMX_INT8__) || defined(__AMXINT8__))
#define LIFECYCLE_MATRICES 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define LIFECYCLE_MATRICES 0
#endif

namespace lifecycle {

constexpr size_t kMatrixRows = 16, kMatrixBytes = 64;

// Whether this process may use them: the system has to be asked, and gives all its threads room for them.
inline bool has_matrices() {
#if LIFECYCLE_MATRICES
  constexpr long kAsk = 0x1023, kMatrices = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kAsk, kMatrices) == 0;
  return granted;
#elif defined(LIFECYCLE_EMULATED) && LIFECYCLE_AVX512
  return true;
#else
  return false;
#endif
}

struct Shape {
  size_t rows, bytes;
};
typedef std::array<Shape, 8> Shapes;

// What follows is written as assembler, for compilers' intrinsics take no template arguments, and some of them do not
// know that a register is read from memory. Strides are bytes from row to row.
#if LIFECYCLE_MATRICES
inline void configure(const Shapes& shapes) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  size_t i = 0;
  for (const Shape& shape : shapes) {
    config.rows[i] = (uint8_t)shape.rows;
    config.bytes[i++] = (uint16_t)shape.bytes;
  }
  asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void release() { asm volatile("tilerelease"); }
template <int R>
LIFECYCLE_INLINE void clear_matrix() {
  asm volatile("tilezero %%tmm%c0" ::"i"(R));
}
template <int R>
LIFECYCLE_INLINE void load_matrix(const void* from, size_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(R) : "memory");
}
template <int R>
LIFECYCLE_INLINE void store_matrix(void* to, size_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(R) : "memory");
}
// Sums += signed bytes [rows, 4 * n] times unsigned ones [n, columns * 4], four of k side by side.
template <int Sums, int Signed, int Unsigned>
LIFECYCLE_INLINE void multiply_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Signed), "i"(Unsigned));
}
// The same of signed bytes.
template <int Sums, int Left, int Right>
LIFECYCLE_INLINE void multiply_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Left), "i"(Right));
}
#else
// The same as plain functions, as the processor's manual describes the instructions: tests of what is written with them
// run without them. What they would refuse ends the process.
struct Matrix {
  Shape shape;
  alignas(64) uint8_t bytes[kMatrixRows][kMatrixBytes];
};
inline Matrix* matrices() {
  thread_local Matrix all[8];
  return all;
}
inline void allow(bool holds) {
  if (!holds) std::abort();
}
inline void configure(const Shapes& shapes) {
  for (size_t i = 0; i < shapes.size(); ++i) {
    const Shape shape = shapes[i];
    allow(shape.rows - 1 < kMatrixRows && shape.bytes - 1 < kMatrixBytes && shape.bytes % 4 == 0);
    matrices()[i] = {shape, {}};
  }
}
inline void release() {
  for (size_t i = 0; i < 8; ++i) matrices()[i] = {};
}
template <int R>
void clear_matrix() {
  std::memset(matrices()[R].bytes, 0, sizeof(Matrix::bytes));
}
template <int R>
void load_matrix(const void* from, size_t stride) {
  Matrix& to = matrices()[R];
  clear_matrix<R>();
  for (size_t i = 0; i < to.shape.rows; ++i) {
    std::memcpy(to.bytes[i], static_cast<const char*>(from) + i * stride, to.shape.bytes);
  }
}
template <int R>
void store_matrix(void* to, size_t stride) {
  const Matrix& from = matrices()[R];
  for (size_t i = 0; i < from.shape.rows; ++i) {
    std::memcpy(static_cast<char*>(to) + i * stride, from.bytes[i], from.shape.bytes);
  }
}
template <int Sums, int Left, int Right, typename Byte>
void multiply_matrices() {
  Matrix &sums = matrices()[Sums], &left = matrices()[Left], &right = matrices()[Right];
  allow(sums.shape.rows != 0 && left.shape.rows == sums.shape.rows && right.shape.bytes == sums.shape.bytes &&
        left.shape.bytes == 4 * right.shape.rows);
  for (size_t i = 0; i < sums.shape.rows; ++i) {
    for (size_t k = 0; k < left.shape.bytes; ++k) {
      for (size_t j = 0; j < sums.shape.bytes / 4; ++j) {
        int32_t sum;
        std::memcpy(&sum, sums.bytes[i] + 4 * j, 4);
        sum += (int8_t)left.bytes[i][k] * (Byte)right.bytes[k / 4][4 * j + k % 4];
        std::memcpy(sums.bytes[i] + 4 * j, &sum, 4);
      }
    }
  }
}
template <int Sums, int Signed, int Unsigned>
void multiply_bytes() {
  multiply_matrices<Sums, Signed, Unsigned, uint8_t>();
}
template <int Sums, int Left, int Right>
void multiply_signed() {
  multiply_matrices<Sums, Left, Right, int8_t>();
}
#endif

// The registers of this thread as [rows, bytes] each, as long as this lives.
class Matrices {
 public:
  explicit Matrices(const Shapes& shapes) { configure(shapes); }
  ~Matrices() { release(); }
  Matrices(const Matrices&) = delete;
  Matrices& operator=(const Matrices&) = delete;
};

}  // namespace lifecycle
