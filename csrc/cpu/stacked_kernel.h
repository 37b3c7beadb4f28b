// What the stacked op hands to the kernel of an instruction set.
#pragma once

#include "../dtype.h"
#include "../statistic.h"
#include "isa.h"
#include "select_cost.h"
#include "summary.h"

namespace htv {

// A chunk of coordinates is the unit of work and of the mask's sum, so results do not depend on the
// threads.
constexpr int64_t kStackedChunk = 1024;

struct StackedTask {
  const void* grads;  // (groups, coordinates)
  Dtype dtype;
  int64_t coordinates;
  Statistic statistic;
  bool summary;  // in the place of the statistic
  Parameters parameters;
  Fields values;           // (coordinates) each
  double* mask_sums;       // one per chunk
  const Ranking* ranking;  // order statistics only
};

// The values of the coordinates that are ranked together, in bytes: as many as fit L2, at least a
// pair of registers. A register more per value keeps values of a coordinate from falling into one
// set of L1.
inline int64_t stacked_values_bytes(int64_t ranked) {
  constexpr int64_t l2_share = 192 << 10, least = (2 + 1) * 64;
  return ranked * least > l2_share ? ranked * least : l2_share;
}

// Scratch of one thread, in bytes.
inline int64_t stacked_scratch_bytes(const Ranking& ranking) {
  return stacked_values_bytes(ranking.ranked) + select_scratch_bytes(ranking);
}

// Computes chunks first <= chunk < last; scratch is aligned to 64 bytes.
HTV_DECLARE_PER_ISA(void stacked_kernel(const StackedTask& task, int64_t first, int64_t last,
                                        void* scratch))

}  // namespace htv
