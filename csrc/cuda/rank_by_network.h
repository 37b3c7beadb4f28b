// Order statistics of few values per coordinate, by networks in a thread's registers.
#pragma once

#include "../sorting_network.h"
#include "words.h"

namespace htv::cuda {

// Networks are compiled for these numbers of values; others are padded with infinities, as many on
// either side (one more above where they are odd), so that the ranks in the middle stay where they
// are.
#define HTV_NETWORKS(use)                                                                          \
  use(2, 1) use(3, 3) use(4, 4) use(6, 5) use(8, 7) use(12, 9) use(16, 13) use(24, 17) use(32, 25) \
      use(48, 33) use(64, 49)

// Fills v with values first to n, by load(i), and padding. present: how many, at least `least`.
template <int n, int least, class Word, class Load>
__device__ __forceinline__ void load_padded(Word (&v)[n], int present, const Load& load) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if (i < least || i < present) v[i] = load(i);
    else v[i] = Word::infinity((i - present) % 2 != 0);
  }
}

// Of the `present` values in v, in any order. V: what the statistic is computed in; result[k]: that
// of coordinate k.
template <int n, bool means, class V, class Word>
__device__ __forceinline__ void rank_words(Word (&v)[n], int present, Statistic statistic,
                                           const Parameters& p, V (&result)[Word::coordinates]) {
  sort(v);
  const int below = (n - present) / 2;  // padding
  // v[i] and v[mirror - i] are as far from the ends: n - 1 or n - 2.
  const int mirror = 2 * below + present - 1;
  static_assert(n % 2 == 0 || n == 3);  // of 3, all are present
#pragma unroll
  for (int k = 0; k < Word::coordinates; ++k) {
    if constexpr (means) {
      const int first = below + int(p.count);
      V inner{}, low{}, high{};
#pragma unroll
      for (int i = 0; i < (n + 1) / 2; ++i) {
        const V a = v[i].at(k);
        V b = v[n - 1 - i].at(k);
        if (i + 2 <= n && mirror != n - 1) b = v[n - 2 - i].at(k);
        if (i == first) low = a, high = b;
        if (i >= first && i <= mirror - i) inner += i < mirror - i ? a + b : a;
      }
      result[k] = statistic == Statistic::trimmed_mean
                      ? trimmed_mean(inner, p.groups, p.count)
                      : winsorized_mean(inner, low, high, p.groups, p.count);
    } else {
      const V low = v[(n - 1) / 2].at(k), high = v[n / 2].at(k);  // of an odd number, the lower
      const auto ranked = [&](int64_t r) { return r == (present - 1) / 2 ? low : high; };
      result[k] = median<V>(ranked, present, interpolation_of(statistic, p));
    }
  }
}

}  // namespace htv::cuda
