// What kernels give of contributions: a statistic of them, or a summary.
#pragma once

#include <stdint.h>

#include "../statistic.h"

namespace htv {

constexpr int kMostFields = 3;  // of a summary: total, votes, and spread or logs

// How many values there are for a coordinate.
constexpr int fields_of(Statistic statistic, bool summary) {
  return !summary ? 1 : keeps_spread(statistic) || keeps_logs(statistic) ? 3 : 2;
}

// Where they go.
struct Fields {
  void* at[kMostFields] = {};
};

}  // namespace htv
