// Statistics of grouped products on torch's threads: how rows are cut into blocks and coordinates
// into tiles.
#pragma once

#include <vector>

#include "tile_kernel.h"

namespace htv::cpu {

constexpr int64_t kRankedBytes = 768 << 10;  // what the values that are to be ranked may take in L2

// A problem whose sizes and operands are still to be set: one part. Throws where `dtype` cannot
// count the votes of so many groups.
TileProblem tile_problem(Statistic statistic, bool summary, const Parameters& parameters,
                         Dtype dtype);

// The blocks that rows are cut into, and the plan that points to them: it follows from the groups,
// the statistic and the dtype, but for `paired`, which is left false.
class TileBlocks {
  std::vector<Piece> pieces_;
  std::vector<RowBlock> blocks_;

 public:
  TilePlan plan{};

  // Group e owns rows offsets[e] * per_offset <= r < offsets[e + 1] * per_offset. in_place: the
  // plan's.
  TileBlocks(const TileProblem& problem, const int64_t* offsets, int64_t per_offset,
             bool in_place = false);
  TileBlocks(const TileBlocks&) = delete;
};

// Computes all tiles; of `buffers`, mask_sums and scratch are provided here. Tiles are the plan's,
// at most widest_in wide, and smaller where threads would else have none. Returns the sum of the
// mask.
double run_tiles(const TileProblem& problem, TilePlan plan, TileBuffers buffers,
                 int64_t widest_in = kMostTileIn);

}  // namespace htv::cpu
