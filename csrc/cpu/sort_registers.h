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

// Whether networks compare integers. Against floats, AMD has twice the rate for it; Intel has the
// same rate, but half of it in registers of 512 bits.
#if defined(HTV_INTEGER_ORDER)
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

// Whether any value was NaN. Two values are looked at by one comparison.
template <class V>
class NanSeen {
#if defined(__AVX512F__)
  static constexpr bool single = sizeof(Real<V>) == 4;
  std::conditional_t<single, __mmask16, __mmask8> seen_ = 0;

 public:
  HTV_INLINE void add(V a, V b) {
    if constexpr (single) seen_ |= _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q);
    else seen_ |= _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_UNORD_Q);
  }
  HTV_INLINE V poison(V v) const {
    const V nan = splat<V>(Real<V>(NAN));
    if constexpr (single) return (V)_mm512_mask_mov_ps((__m512)v, seen_, (__m512)nan);
    else return (V)_mm512_mask_mov_pd((__m512d)v, seen_, (__m512d)nan);
  }
#else
  Mask<V> seen_ = Lane<V>::none();

 public:
  HTV_INLINE void add(V a, V b) { seen_ |= (a != a) | (b != b); }
  HTV_INLINE V poison(V v) const { return seen_ ? splat<V>(Real<V>(NAN)) : v; }
#endif
  HTV_INLINE void add(V v) { add(v, v); }
};

// The values of one register of coordinates, as they lie in memory
template <class V>
struct Strided {
  static constexpr bool may_be_nan = true;

  const V* values;
  int64_t stride;
  HTV_INLINE V operator()(int64_t k) const { return values[k * stride]; }
  HTV_INLINE Strided from(int64_t k) const { return {values + k * stride, stride}; }
};

// or formed as they are read, each time: g[k] * x[row[k]], of finite factors.
template <class V>
struct Products {
  static constexpr bool may_be_nan = false;

  const V* x;
  const Real<V>* g;
  const int32_t* row;
  HTV_INLINE V operator()(int64_t k) const { return splat<V>(g[k]) * x[row[k]]; }
  HTV_INLINE Products from(int64_t k) const { return {x, g + k, row + k}; }
};

constexpr int kMostSorted = 16;  // values sorted by one network

// Sorted keys of n values. As integers, NaN lie beyond the infinities: the ends tell whether there
// are any, which is less work than to look at each of many values.
template <class V, int n, class Values>
HTV_INLINE void sorted_keys(const Values& values, NanSeen<V>& nan,
                            typename Order<V>::Key (&keys)[n]) {
  using O = Order<V>;
  constexpr bool by_ends = kIntegerOrder<V> && n >= 8;
  V previous{};
#pragma GCC unroll 16
  for (int k = 0; k < n; ++k) {
    const V value = values(k);
    if constexpr (Values::may_be_nan && !by_ends)
      if (k % 2 == 1 || k + 1 == n) nan.add(k % 2 == 1 ? previous : value, value);
    previous = value;
    keys[k] = O::key(value);
  }
  sort(keys);
  if constexpr (Values::may_be_nan && by_ends) nan.add(O::value(keys[0]), O::value(keys[n - 1]));
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
