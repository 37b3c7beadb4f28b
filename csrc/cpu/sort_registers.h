// Order-preserving integers, NaN, and the statistics of values few enough to be sorted in
// registers.
#pragma once

#include "../order_keys.h"
#include "../ranking.h"
#include "../sorting_network.h"
#include "lanes.h"

namespace htv::HTV_ISA {

template <class V>
using Bits = Register<std::make_unsigned_t<typename Lane<V>::Int>>;

// Networks compare integers where the instruction set has min and max of them: twice the rate of
// floats on AMD.
#if defined(__AVX512F__)
template <class V>
constexpr bool kIntegerOrder = sizeof(Real<V>) == 4;
#elif defined(__AVX2__)
template <class V>
constexpr bool kIntegerOrder = sizeof(Real<V>) == 4;
#else
template <class V>
constexpr bool kIntegerOrder = false;
#endif

template <class V>
struct Order {
  using Key = std::conditional_t<kIntegerOrder<V>, Count<V>, V>;
  static HTV_INLINE Key key(V v) {
    if constexpr (kIntegerOrder<V>) return key_of(v);
    else return v;
  }
  static HTV_INLINE V value(Key k) {
    if constexpr (kIntegerOrder<V>) return value_of<V>(k);
    else return k;
  }
  static HTV_INLINE Key highest() { return key(splat<V>(Real<V>(INFINITY))); }
};

// Whether any value was NaN.
template <class V>
class NanSeen {
#if defined(__AVX512F__)
  Bits<V> largest_{};  // magnitude

 public:
  HTV_INLINE void add(V v) {
    const Bits<V> bits = (Bits<V>)v;
    largest_ = larger(largest_, bits + bits);
  }
  HTV_INLINE V poison(V v) const {
    const Bits<V> infinity = (Bits<V>)splat<V>(Real<V>(INFINITY));
    return largest_ > infinity + infinity ? splat<V>(Real<V>(NAN)) : v;
  }
#else
  Mask<V> seen_ = Lane<V>::none();

 public:
  HTV_INLINE void add(V v) { seen_ |= v != v; }
  HTV_INLINE V poison(V v) const { return seen_ ? splat<V>(Real<V>(NAN)) : v; }
#endif
};

// The values of one register of coordinates.
template <class V>
struct Strided {
  const V* values;
  int64_t stride;
  HTV_INLINE V operator()(int64_t k) const { return values[k * stride]; }
  HTV_INLINE Strided from(int64_t k) const { return {values + k * stride, stride}; }
};

constexpr int kMostSorted = 16;  // values sorted by one network

// Sorted keys of n values. As integers, NaN lie beyond the infinities: the ends tell whether there
// are any, which is less work than to look at each of many values.
template <class V, int n, class Values>
HTV_INLINE void sorted_keys(const Values& values, NanSeen<V>& nan,
                            typename Order<V>::Key (&keys)[n]) {
  using O = Order<V>;
  constexpr bool by_ends = kIntegerOrder<V> && n >= 8;
#pragma GCC unroll 16
  for (int k = 0; k < n; ++k) {
    const V value = values(k);
    if constexpr (!by_ends) nan.add(value);
    keys[k] = O::key(value);
  }
  sort(keys);
  if constexpr (by_ends) {
    nan.add(O::value(keys[0]));
    nan.add(O::value(keys[n - 1]));
  }
}

// Values: values(k) is value 0 <= k < n of one register of coordinates.
template <class V, int n, class Values>
HTV_INLINE V median_of_few(const Values& values, int64_t interpolation) {
  using O = Order<V>;
  typename O::Key v[n];
  NanSeen<V> nan;
  sorted_keys<V, n>(values, nan, v);
  const auto rank = [&](int64_t r) { return O::value(v[r]); };
  return nan.poison(median<V>(rank, n, interpolation));
}

template <class V, int n, class Values>
HTV_INLINE V mean_of_few(const Values& values, const Ranking& ranking) {
  V v[n];
  NanSeen<V> nan;
#pragma GCC unroll 16
  for (int k = 0; k < n; ++k) {
    v[k] = values(k);
    nan.add(v[k]);
  }
  sort(v);
  V sorted[n];
  memcpy(sorted, v, sizeof v);
  return nan.poison(order_statistic<V>(
      ranking.statistic, [&](int64_t r) { return sorted[r]; }, ranking.parameters));
}

template <class V, int n, class Source, class Sink>
__attribute__((noinline)) void statistics_of_few(const Ranking& ranking, int64_t registers,
                                                 const Source& source, const Sink& sink) {
  if (is_ranked_mean(ranking.statistic)) {
    for (int64_t j = 0; j < registers; ++j) sink(j, mean_of_few<V, n>(source(j), ranking));
  } else if (ranking.statistic == Statistic::median && ranking.parameters.count != 0) {
    const int64_t interpolation = ranking.parameters.count;
    for (int64_t j = 0; j < registers; ++j) sink(j, median_of_few<V, n>(source(j), interpolation));
  } else {
    for (int64_t j = 0; j < registers; ++j) sink(j, median_of_few<V, n>(source(j), 0));
  }
}

// Calls f(std::integral_constant<int, n>) for first <= n <= last.
template <int first, int last, class F>
HTV_INLINE void with_constant(int64_t n, const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (void)((n == first + i && (f(std::integral_constant<int, first + i>{}), true)) || ...);
  }(std::make_integer_sequence<int, last - first + 1>{});
}

// The statistic of ranking.ranked <= most <= kMostSorted values in each of many registers of
// coordinates: sink(j, statistic of the values source(j)).
template <class V, int most, class Source, class Sink>
void few_statistics(const Ranking& ranking, int64_t registers, const Source& source,
                    const Sink& sink) {
  with_constant<1, most>(
      ranking.ranked, [&](auto n) { statistics_of_few<V, n()>(ranking, registers, source, sink); });
}

}  // namespace htv::HTV_ISA
