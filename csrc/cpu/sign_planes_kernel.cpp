// Packing of sign planes, compiled once per instruction set.
#include "sign_planes_kernel.h"

#include <string.h>

#include "lanes.h"

namespace htv::HTV_ISA {
namespace {

template <class V>
// Signed integers must not overflow.
using Plane = Register<std::make_unsigned_t<typename Lane<V>::Int>>;

template <class V, class T>
void pack_word(const T* matrix, int64_t rows, int64_t columns, Plane<V>* negative,
               Plane<V>* nonzero) {
  constexpr int lanes = kLanes<V>;
  const int64_t registers = (columns + lanes - 1) / lanes;
  // A row at a time: the planes' word stays in L1.
  for (int64_t r = 0; r < rows; ++r, matrix += columns)
    for (int64_t j = 0; j < registers; ++j) {
      const V v = load<V>(matrix + j * lanes, columns - j * lanes);
      negative[j] = negative[j] + negative[j] - (Plane<V>)(v < 0);
      nonzero[j] = nonzero[j] + nonzero[j] - (Plane<V>)(v != 0);
    }
}

template <class T>
void pack_words(const T* matrix, int64_t rows, int64_t columns, const SignPlanes& planes,
                int64_t first, int64_t last) {
  using V = Register<Compute<T>>;
  using Int = typename Lane<V>::Int;
  constexpr int64_t bits = 8 * sizeof(Int);
  for (int64_t word = first; word < last; ++word) {
    Int* const words[] = {planes.negative_at<Int>(word, 0), planes.nonzero_at<Int>(word, 0)};
    for (Int* const plane : words) memset(plane, 0, planes.stride * sizeof(Int));
    const int64_t left = rows - word * bits;
    pack_word<V>(matrix + word * bits * columns, left < bits ? left : bits, columns,
                 reinterpret_cast<Plane<V>*>(words[0]), reinterpret_cast<Plane<V>*>(words[1]));
  }
}

}  // namespace

void sign_planes_kernel(const void* matrix, Dtype dtype, int64_t rows, int64_t columns,
                        const SignPlanes& planes, int64_t first, int64_t last) {
  with_dtype(dtype, [&](auto element) {
    pack_words(static_cast<const decltype(element)*>(matrix), rows, columns, planes, first, last);
  });
}

}  // namespace htv::HTV_ISA
