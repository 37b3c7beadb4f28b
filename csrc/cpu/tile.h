// Statistics of grouped products on torch's threads: how rows are cut into blocks and coordinates into tiles.
#pragma once

#include <optional>
#include <vector>

#include "tile_kernel.h"

namespace htv::cpu {

constexpr int64_t kRankedBytes = 768 << 10;  // what the values that are to be ranked may take in L2

// A task with the sizes that follow from the groups and the statistic. Whoever runs it sets where x, grad_output and value are.
class TilePlan {
  std::vector<Piece> pieces_;
  std::vector<RowBlock> blocks_;
  std::optional<Ranking> ranking_;

 public:
  TileTask task{};

  // Group e owns rows offsets[e] * per_offset <= r < offsets[e + 1] * per_offset. in_place: as in the task.
  TilePlan(Statistic statistic, const Parameters& parameters, Dtype dtype, const int64_t* offsets, int64_t per_offset,
           bool in_place = false);
  TilePlan(const TilePlan&) = delete;

  // Chooses the tiles, which are at most tile_in wide, and runs them; returns the sum of the mask.
  double run(int64_t tile_in = kMostTileIn);
};

}  // namespace htv::cpu
