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

// Where rows are multiplied: where they lie, in panels of a tile's own, or of all tiles'.
enum class RowsLie { in_place, packed_by_tile, packed_once };

// The blocks that rows are cut into, and the plan that points to them: it follows from the groups,
// the statistic and the dtype, but for `paired`, which is left false.
class TileBlocks {
  std::vector<Piece> pieces_;
  std::vector<RowBlock> blocks_;

 public:
  TilePlan plan{};

  // Group e owns rows offsets[e] * per_offset <= r < offsets[e + 1] * per_offset.
  TileBlocks(const TileProblem& problem, const int64_t* offsets, int64_t per_offset, RowsLie rows);
  TileBlocks(const TileBlocks&) = delete;
};

// Computes all tiles; of `buffers`, mask_sums and scratch are provided here. Tiles are the plan's,
// at most widest_in wide, and smaller where threads would else have none. Returns the sum of the
// mask.
double run_tiles(const TileProblem& problem, TilePlan plan, TileBuffers buffers,
                 int64_t widest_in = kMostTileIn);

// The same of two matrices whose rows lie in one piece each: they are packed once for all tiles, or
// for those of as many coordinates at a time as that takes little memory for. paired: the plan's.
double run_matrices(const TileProblem& problem, const int64_t* offsets, bool paired,
                    const TileBuffers& buffers);

}  // namespace htv::cpu
