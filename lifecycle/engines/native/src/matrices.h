// Registers that hold matrices (AMX): eight of up to 16 rows of 64 bytes. One instruction multiplies two of them and
// adds the product to a third, as many multiplications as 256 of those for vectors, in the time of some ten.
#pragma once

#include <array>
#include <utility>

#include "simd.h"

// Older Clangs call them by other names. LIFECYCLE_VECTORS is for tests: everything as a processor without such registers
// computes it.
#if LIFECYCLE_AVX512 && defined(__linux__) && !defined(LIFECYCLE_VECTORS) && \
    ((defined(__AMX_INT8__) && defined(__AMX_BF16__)) || (defined(__AMXINT8__) && defined(__AMXBF16__)))
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
#else
  return false;
#endif
}

struct Shape {
  size_t rows, bytes;
};

// The registers of this thread as [rows, bytes] each, as long as this lives.
class Matrices {
 public:
  typedef std::array<Shape, 8> Shapes;
  explicit Matrices(const Shapes& shapes) {
#if LIFECYCLE_MATRICES
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
#else
    (void)shapes;
#endif
  }
  ~Matrices() {
#if LIFECYCLE_MATRICES
    asm volatile("tilerelease");
#endif
  }
  Matrices(const Matrices&) = delete;
  Matrices& operator=(const Matrices&) = delete;
};

// What follows is written as assembler, for compilers' intrinsics take no template arguments, and some of them do not
// know that a register is read from memory. Strides are bytes from row to row.
#if LIFECYCLE_MATRICES
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
// Sums += pairs of bfloat16s [rows, n] times such [n, columns].
template <int Sums, int Left, int Right>
LIFECYCLE_INLINE void multiply_pairs() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Left), "i"(Right));
}
#else
template <int R>
void clear_matrix() {}
template <int R>
void load_matrix(const void*, size_t) {}
template <int R>
void store_matrix(void*, size_t) {}
template <int Sums, int Signed, int Unsigned>
void multiply_bytes() {}
template <int Sums, int Left, int Right>
void multiply_signed() {}
template <int Sums, int Left, int Right>
void multiply_pairs() {}
#endif

// f(0), f(1), .., f(N - 1), of numbers that are known to the compiler.
template <int N, typename F>
LIFECYCLE_INLINE void each(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

}  // namespace lifecycle
