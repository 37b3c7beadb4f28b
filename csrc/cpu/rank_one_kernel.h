// What the linear op hands to the order kernel for groups of at most one row.
#pragma once

#include "../dtype.h"
#include "isa.h"
#include "select_cost.h"
#include "sign_planes_kernel.h"

namespace htv {

// A tile of coordinates: some registers of columns of x, packed once for the rows of the tile.
constexpr int64_t kRankOneOut = 32, kRankOneRegisters = 4;

struct RankOneTask {
  const void* x;            // (rows, in)
  const void* grad_output;  // (rows, out)
  Dtype dtype;
  int64_t rows, in, out;  // groups without a row contribute zeros
  const Ranking* ranking;
  SignPlanes signs_x, signs_g;
  void* value;  // (out, in)
};

inline int64_t rank_one_width(Dtype dtype) {
  return kRankOneRegisters * kWidestRegister / compute_bytes(dtype);
}

inline int64_t rank_one_tiles(const RankOneTask& task) {
  const int64_t width = rank_one_width(task.dtype);
  return (task.out + kRankOneOut - 1) / kRankOneOut * ((task.in + width - 1) / width);
}

// Scratch of one thread, in bytes: packed x, values of two registers of coordinates, packed g, one
// column of it and the numbers of its rows.
inline int64_t rank_one_scratch_bytes(const RankOneTask& task) {
  const int64_t ranked = task.ranking->ranked;
  return kWidestRegister * (kRankOneRegisters * task.rows + 2 * ranked) +
         select_scratch_bytes(*task.ranking) + 8 * (kRankOneOut + 2) * task.rows;
}

// Computes tiles first <= tile < last; scratch is aligned to 64 bytes.
HTV_DECLARE_PER_ISA(void rank_one_kernel(const RankOneTask& task, int64_t first, int64_t last,
                                         void* scratch))

}  // namespace htv
