// Squares of values in registers.
#pragma once

#include "lanes.h"

namespace htv::HTV_ISA {

// rows[i][j] becomes rows[j][i], by exchanging ever larger squares. rows: as many as V has lanes.
template <class V>
inline __attribute__((always_inline)) void transpose(V* rows) {
  constexpr int n = sizeof(V) / sizeof(V{}[0]);
  decltype(V{} < V{}) low, high;  // which lanes of a pair of rows make up the new pair
#pragma GCC unroll 4
  for (int size = 1; size < n; size *= 2) {
    for (int lane = 0; lane < n; ++lane) {
      low[lane] = lane & size ? n + lane - size : lane;
      high[lane] = lane & size ? n + lane : lane + size;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      if (!(i & size)) {
        const V a = rows[i], b = rows[i + size];
        rows[i] = __builtin_shuffle(a, b, low);
        rows[i + size] = __builtin_shuffle(a, b, high);
      }
  }
}

}  // namespace htv::HTV_ISA
