// Order statistics of any number of values per coordinate: ranks are found by counting, in passes
// over the values.
//
// Values are searched as integer keys. A pass counts the keys below a pivot; pivots come from
// linear interpolation between the counts known so far, which takes some 5 to 10 passes, and from
// bisection where that does not help. Now and then the ends of what is left are moved to keys that
// are there, which ends searches among ties.
//
// `Values` of the functions below are the passes a kernel can make over the keys of one coordinate:
//
//     size                              how many
//     survey()                          Survey<Key>: the extremes, and the counts around zero
//     below(pivot)                      how many keys are smaller
//     around(low, high)                 the least key >= low and the greatest < high
//     sum_inside(low, high)             Inside<V>: of the values strictly between two
#pragma once

#include <type_traits>

#include "../order_keys.h"
#include "device.h"

namespace htv::cuda {

using namespace htv::generic;

template <class Key>
struct Extremes {
  Key least, greatest;
};

template <class Key>
struct Survey {
  Extremes<Key> extremes;
  int negative, not_positive;
};

template <class V>
struct Inside {
  V sum;
  int at_most_low, at_least_high;  // values
};

// Where the rank lies between low and high, of which `below_low` and `below_high` keys are smaller.
template <class V, class Key = typename Lane<V>::Int>
HTV_HOST_DEVICE Key interpolated(Key low, Key high, int below_low, int below_high, int rank) {
  using Unsigned = std::make_unsigned_t<Key>;
  const V from = value_of<V>(low), to = value_of<V>(Key(high - 1));
  const V share = (V(rank - below_low) + V(0.5)) / V(below_high - below_low);
  const V guess = from + (to - from) * share;
  // Infinite or NaN
  if (!(guess - guess == 0)) return low + Key((Unsigned(high) - Unsigned(low)) / 2);
  const Key key = key_of(guess);
  return key <= low ? low + 1 : key >= high ? high - 1 : key;
}

// The key of a rank, counted from 0.
template <class V, class Values, class Key = typename Lane<V>::Int>
__device__ Key search(const Values& values, const Survey<Key>& survey, int rank) {
  using Unsigned = std::make_unsigned_t<Key>;
  if (survey.negative <= rank && rank < survey.not_positive) return 0;
  // The key lies in [low, high).
  Key low = survey.extremes.least, high = survey.extremes.greatest + 1;
  int below_low = 0, below_high = values.size;  // so many keys are smaller
  if (rank < survey.negative) {
    if (high > 0) high = 0, below_high = survey.negative;
  } else if (low < 1) {
    low = 1, below_low = survey.not_positive;
  }
  for (int pass = 0; Unsigned(high) - Unsigned(low) > 1; ++pass) {
    if (below_low == rank || below_high == rank + 1 || pass % 4 == 3) {
      const Extremes<Key> left = values.around(low, high);
      low = left.least, high = left.greatest + 1;
      if (below_low == rank) return low;
      if (below_high == rank + 1) return high - 1;
      continue;
    }
    const Key pivot = pass % 4 == 2 ? low + Key((Unsigned(high) - Unsigned(low)) / 2)
                                    : interpolated<V>(low, high, below_low, below_high, rank);
    const int below = values.below(pivot);
    if (below <= rank) low = pivot, below_low = below;
    else high = pivot, below_high = below;
  }
  return low;
}

// The statistic of values none of which is NaN.
template <class V, class Values>
__device__ V select_statistic(const Values& values, Statistic statistic, const Parameters& p) {
  using Key = typename Lane<V>::Int;
  const auto survey = values.survey();
  const int count = int(p.count);
  const auto ranked = [&](int rank) { return search<V>(values, survey, rank); };
  if (is_ranked_mean(statistic)) {
    const V low = value_of<V>(ranked(count)), high = value_of<V>(ranked(values.size - 1 - count));
    if (low == high) return low;
    const Inside<V> inside = values.sum_inside(low, high);
    const V ends = V(inside.at_most_low - count) * low + V(inside.at_least_high - count) * high;
    const V inner = inside.sum + ends;
    return statistic == Statistic::trimmed_mean
               ? trimmed_mean(inner, p.groups, p.count)
               : winsorized_mean(inner, low, high, p.groups, p.count);
  }
  const int64_t interpolation = interpolation_of(statistic, p);
  const int lower = (values.size - 1) / 2, higher = values.size / 2;
  const V low = value_of<V>(ranked(interpolation > 0 ? higher : lower));
  V high = low;
  if (lower < higher && interpolation == 0) {
    // The higher one, unless more keys than the lower one's rank say are its own.
    const Key next = key_of(low) + 1;
    if (values.below(next) <= higher)
      high = value_of<V>(values.around(next, survey.extremes.greatest + 1).least);
  }
  return median<V>([&](int64_t rank) { return rank == lower ? low : high; }, values.size,
                   interpolation);
}

}  // namespace htv::cuda
