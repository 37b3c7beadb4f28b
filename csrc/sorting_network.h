// Sorting networks: a fixed list of compare-exchanges sorts any input, so whole registers of
// coordinates (on a GPU, those of a warp) are sorted at once, without a branch. Lists are made and
// unrolled by the compiler, which drops whatever no result depends on.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <array>
#include <bit>
#include <utility>

#include "statistic.h"

namespace htv::HTV_ISA {

struct CompareExchange {
  int low, high;
};

// Calls f(low, high) for each step of Batcher's merge exchange for n values (Knuth, TAOCP 3, 5.2.2,
// algorithm M), or only for those of its last phase, which merge the sorted values at even with the
// sorted values at odd places.
template <class F>
constexpr void each_step(int n, bool merge_only, const F& f) {
  int top = 1;
  while (2 * top < n) top *= 2;
  for (int p = merge_only ? 1 : top; p > 0; p /= 2) {
    int q = top, r = 0, d = p;
    while (true) {
      for (int i = 0; i < n - d; ++i)
        if ((i & p) == r) f(i, i + d);
      if (q == p) break;
      d = q - p;
      q /= 2;
      r = p;
    }
  }
}

template <int n, bool merge_only>
constexpr auto make_network() {
  constexpr int size = [] {
    int steps = 0;
    if (n > 1) each_step(n, merge_only, [&](int, int) { ++steps; });
    return steps;
  }();
  std::array<CompareExchange, size> steps{};
  int at = 0;
  if (n > 1) each_step(n, merge_only, [&](int low, int high) { steps[at++] = {low, high}; });
  return steps;
}

template <int n, bool merge_only>
constexpr auto kNetwork = make_network<n, merge_only>();
template <int n, bool merge_only, size_t i>
constexpr CompareExchange kStep = kNetwork<n, merge_only>[i];

template <class W>
HTV_INLINE void exchange(W& low, W& high) {
  const W a = low, b = high;
  low = smaller(a, b);
  high = larger(a, b);
}

template <int n, bool merge_only, class W, size_t... i>
HTV_INLINE void run_network(W (&v)[n], std::index_sequence<i...>) {
  (exchange(v[kStep<n, merge_only, i>.low], v[kStep<n, merge_only, i>.high]), ...);
}

template <int n, class W>
HTV_INLINE void sort(W (&v)[n]) {
  run_network<n, false>(v, std::make_index_sequence<kNetwork<n, false>.size()>());
}

// Sorts v, whose values at even places are sorted, as are those at odd places.
template <int n, class W>
HTV_INLINE void merge_interleaved(W (&v)[n]) {
  run_network<n, true>(v, std::make_index_sequence<kNetwork<n, true>.size()>());
}

#if !defined(__CUDACC__)
// Sorts the n values of v from `first` on, which fall and then rise, so that they rise; or, those
// that rise and then fall, so that they fall.
template <bool rising, int n, int first = 0, class W, int size>
HTV_INLINE void sort_bitonic(W (&v)[size]) {
  if constexpr (n > 1) {
    constexpr int half = int(std::bit_ceil(unsigned(n)) / 2);
#pragma GCC unroll 32
    for (int i = first; i + half < first + n; ++i) {
      if constexpr (rising) exchange(v[i], v[i + half]);
      else exchange(v[i + half], v[i]);
    }
    sort_bitonic<rising, half, first>(v);
    sort_bitonic<rising, n - half, first + half>(v);
  }
}
#endif

}  // namespace htv::HTV_ISA
