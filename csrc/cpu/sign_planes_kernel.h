// Signs of a matrix as bits, packed once: a product of two signs is then an exclusive or, and a sum
// of them a population count over as many rows as an integer has bits.
#pragma once

#include "../dtype.h"
#include "isa.h"

namespace htv {

// Bit planes of a (rows, columns) matrix, each [word][column] of integers as wide as the matrix'
// compute type; bits of rows that are not there are 0.
struct SignPlanes {
  void* negative;  // v < 0
  void* nonzero;   // v != 0, NaN included
  int64_t words, stride;

  template <class Int>
  Int* negative_at(int64_t word, int64_t column) const {
    return static_cast<Int*>(negative) + word * stride + column;
  }
  template <class Int>
  Int* nonzero_at(int64_t word, int64_t column) const {
    return static_cast<Int*>(nonzero) + word * stride + column;
  }
};

inline int64_t plane_words(Dtype dtype, int64_t rows) {
  const int64_t bits = dtype == Dtype::float64 ? 64 : 32;
  return (rows + bits - 1) / bits;
}

// Columns of a plane, padded to whole register tiles of every instruction set.
inline int64_t plane_stride(int64_t columns) { return (columns + 31) / 32 * 32; }

inline int64_t planes_bytes(Dtype dtype, int64_t rows, int64_t columns) {
  return 2 * plane_words(dtype, rows) * plane_stride(columns) * compute_bytes(dtype);
}

// The planes of a matrix, laid out in memory of `planes_bytes`, aligned to 64 bytes.
inline SignPlanes planes_in(void* memory, Dtype dtype, int64_t rows, int64_t columns) {
  char* const nonzero = static_cast<char*>(memory) + planes_bytes(dtype, rows, columns) / 2;
  return {memory, nonzero, plane_words(dtype, rows), plane_stride(columns)};
}

// Fills words first <= word < last of the planes of a contiguous matrix.
HTV_DECLARE_PER_ISA(void sign_planes_kernel(const void* matrix, Dtype dtype, int64_t rows,
                                            int64_t columns, const SignPlanes& planes,
                                            int64_t first, int64_t last))

}  // namespace htv
