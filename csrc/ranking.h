// What an order statistic ranks.
#pragma once

#include "statistic.h"

namespace htv {

struct Ranking {
  Statistic statistic;
  Parameters parameters;
  int64_t ranked;  // values of a coordinate: contributions, or the means of buckets of them
  // The ranks it depends on, from 0: both middle ones, or the ends of what is not trimmed.
  int64_t low, high;
};

inline Ranking ranking_of(Statistic statistic, const Parameters& p) {
  const bool buckets = statistic == Statistic::median_of_means;
  const int64_t n = buckets ? p.count : p.groups;
  int64_t low = (n - 1) / 2, high = n / 2;
  if (statistic == Statistic::median && p.count != 0) low = high = p.count < 0 ? low : high;
  if (is_ranked_mean(statistic)) low = p.count, high = n - 1 - p.count;
  return {statistic, p, n, low, high};
}

}  // namespace htv
