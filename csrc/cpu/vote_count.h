// Votes by signs alone: of contributions g[o] * x[i], one row each, the sign is the product of
// their factors' signs. A word of sign planes holds those of as many rows as it has bits.
#pragma once

#include "bits.h"
#include "lanes.h"
#include "tile_kernel.h"

namespace htv::HTV_ISA {

// Whether none of the factors is 0 in any of the rows, for n columns from the given one on.
template <class V>
bool all_vote(const SignPlanes& planes, int64_t rows, int64_t column, int64_t n) {
  using Bits = std::make_unsigned_t<typename Lane<V>::Int>;
  constexpr int64_t bits = 8 * sizeof(Bits);
  Bits missing = 0;
  for (int64_t word = 0; word < planes.words; ++word) {
    const Bits all = Bits(-1) >> (bits - least(bits, rows - word * bits));
    const Bits* const nonzero = planes.nonzero_at<Bits>(word, column);
    for (int64_t i = 0; i < n; ++i) missing |= nonzero[i] ^ all;
  }
  return missing == 0;
}

// (a ^ b) & c
template <class C>
C differing(C a, C b, C c) {
#if defined(__AVX512F__)
  return (C)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x28);
#else
  return (a ^ b) & c;
#endif
}

// net[a][b]: agreeing less dissenting votes of output o + a with the registers of columns from
// `column` on, of the rows whose factors are both not 0. Planes reach beyond the last output and
// column. dense: no factor is 0.
template <class V, int K, int columns>
void count_votes(const FactorSigns& signs, bool dense, int64_t column, int64_t o,
                 Count<V> (&net)[K][columns]) {
  using Int = typename Lane<V>::Int;
  const SignPlanes &x = signs.x, &g = signs.grad_output;
  const auto of_x = [&](const Int* plane, int b) { return read<Count<V>>(plane + b * kLanes<V>); };
  if (dense) {
    Count<V> dissent[K][columns] = {};
    for (int64_t word = 0; word < x.words; ++word) {
      const Int *const negative_x = x.negative_at<Int>(word, column), *const negative_g =
                                                                          g.negative_at<Int>(word,
                                                                                             o);
#pragma GCC unroll 4
      for (int b = 0; b < columns; ++b)
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a) dissent[a][b] += popcount(of_x(negative_x, b) ^ negative_g[a]);
    }
    for (int a = 0; a < K; ++a)
      for (int b = 0; b < columns; ++b) net[a][b] = Int(signs.rows) - 2 * dissent[a][b];
    return;
  }
  constexpr int together = columns / 2;  // as many as there are registers for two counts of each
  for (int first = 0; first < columns; first += together) {
    Count<V> cast[K][together] = {}, dissent[K][together] = {};
    for (int64_t word = 0; word < x.words; ++word) {
      const Int *const nonzero_x = x.nonzero_at<Int>(word, column),
                       *const negative_x = x.negative_at<Int>(word, column),
                       *const nonzero_g = g.nonzero_at<Int>(word, o),
                       *const negative_g = g.negative_at<Int>(word, o);
#pragma GCC unroll 4
      for (int b = 0; b < together; ++b)
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a) {
          const Count<V> both = of_x(nonzero_x, first + b) & nonzero_g[a];
          cast[a][b] += popcount(both);
          dissent[a][b] +=
              popcount(differing(of_x(negative_x, first + b), Count<V>{} + negative_g[a], both));
        }
    }
    for (int a = 0; a < K; ++a)
      for (int b = 0; b < together; ++b) net[a][first + b] = cast[a][b] - 2 * dissent[a][b];
  }
}

}  // namespace htv::HTV_ISA
