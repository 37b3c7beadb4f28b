// How an order statistic is found, made once per call: select.h carries it out over registers of coordinates.
#pragma once

#include <stdint.h>

#include <vector>

#include "../statistic.h"
#include "network.h"

namespace htv {

struct Ranking {
  Statistic statistic;
  Parameters parameters;
  int64_t ranked;       // values of a coordinate: contributions, or the means of buckets of them
  int64_t first, last;  // the ranks first <= r < last are what the statistic reads
  std::vector<CompareExchange> network;
};

inline Ranking ranking_of(Statistic statistic, const Parameters& p) {
  int64_t ranked = p.groups, first = (ranked - 1) / 2, last = ranked / 2 + 1;
  if (statistic == Statistic::median_of_means) {
    ranked = p.count, first = (ranked - 1) / 2, last = ranked / 2 + 1;
  } else if (statistic != Statistic::median) {
    first = p.count, last = ranked - p.count;
  }
  return {statistic, p, ranked, first, last, sorting_network(ranked, first, last)};
}

// Memory `order_statistics` needs beside the values, in bytes.
inline int64_t select_scratch_bytes(const Ranking&) { return 0; }

// Operations per value, for dividing work among threads.
inline int64_t select_work(const Ranking& ranking) { return 1 + int64_t(ranking.network.size()) / ranking.ranked; }

}  // namespace htv
