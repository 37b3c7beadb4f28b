// Sorting networks: a fixed list of compare-exchanges sorts any input, so whole registers of coordinates
// are sorted at once, without a branch.
#pragma once

#include <cstdint>
#include <vector>

namespace htv {

// Leaves the smaller value at `low`, the larger at `high`.
struct CompareExchange {
  int32_t low, high;
};

// Batcher's merge exchange for n values (Knuth, TAOCP 3, 5.2.2, algorithm M), without the steps
// that ranks first <= r < last do not depend on.
inline std::vector<CompareExchange> sorting_network(int64_t n, int64_t first, int64_t last) {
  std::vector<CompareExchange> steps;
  int64_t top = 1;
  while (2 * top < n) top *= 2;
  for (int64_t p = top; p > 0; p /= 2) {
    int64_t q = top, r = 0, d = p;
    while (true) {
      for (int64_t i = 0; i < n - d; ++i)
        if ((i & p) == r) steps.push_back({int32_t(i), int32_t(i + d)});
      if (q == p) break;
      d = q - p;
      q /= 2;
      r = p;
    }
  }
  std::vector<bool> needed(n);
  for (int64_t r = first; r < last; ++r) needed[r] = true;
  std::vector<CompareExchange> kept;
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    if (!needed[step->low] && !needed[step->high]) continue;
    needed[step->low] = needed[step->high] = true;
    kept.push_back(*step);
  }
  return {kept.rbegin(), kept.rend()};
}

}  // namespace htv
