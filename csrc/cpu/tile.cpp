#include "tile.h"

#include <algorithm>

#include "parallel.h"

namespace htv::cpu {
namespace {

constexpr int64_t kBlockRows = 128;          // rows packed at a time, unless all fit
constexpr int64_t kSumTileIn = 160;          // columns of a tile of plain sums
constexpr int64_t kInPlaceRows = 256;        // at a time where nothing of x is packed
constexpr int64_t kPackedBytes = 256 << 10;  // what all packed rows of a tile may take in L2
// Rows per group up to which states are worth their registers.
constexpr int64_t kFewRows = 32;
constexpr int64_t kFewRowsInPlace = 8;

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

TileProblem tile_problem(Statistic statistic, const Parameters& parameters, Dtype dtype) {
  check_countable(dtype, parameters.groups);
  TileProblem problem{};
  problem.statistic = statistic;
  problem.parameters = parameters;
  if (is_order(statistic)) problem.ranking = ranking_of(statistic, parameters);
  problem.dtype = dtype;
  problem.parts = 1;
  return problem;
}

TileBlocks::TileBlocks(const TileProblem& problem, const int64_t* offsets, int64_t per_offset,
                       bool in_place) {
  const int64_t groups = problem.parameters.groups, rows = offsets[groups] * per_offset;
  plan.in_place = in_place;
  plan.few_rows = rows <= (in_place ? kFewRowsInPlace : kFewRows) * groups;
  plan.tile_out = kMostTileOut;
  plan.tile_in = kMostTileIn;
  plan.block_rows = in_place ? kInPlaceRows : kBlockRows;
  if (is_order(problem.statistic)) {
    const int64_t element = compute_bytes(problem.dtype), area = kRankedBytes / (element * groups);
    plan.tile_out = std::clamp(area / 96 / kTileOutStep * kTileOutStep, kTileOutStep, kMostTileOut);
    plan.tile_in =
        std::clamp(area / plan.tile_out / kTileInStep * kTileInStep, kTileInStep, kMostTileIn);
    const int64_t fit = kPackedBytes / (element * (plan.tile_out + (in_place ? 0 : plan.tile_in)));
    if (rows <= fit) plan.block_rows = std::max<int64_t>(rows, 1);
  } else if (problem.statistic == Statistic::mean && !in_place) {
    // Sums need no whole groups, and are kept for a whole tile: as little as serves of an MLP's
    // memory.
    plan.tile_in = kSumTileIn;
    plan.block_rows = kBlockRows / 2;
  }

  // Groups are cut only where they are longer than a block.
  std::vector<int64_t> firsts{0};
  int64_t begin = 0;
  const auto close = [&](int64_t end) {
    blocks_.push_back({begin, end, nullptr, nullptr});
    firsts.push_back(int64_t(pieces_.size()));
    begin = end;
  };
  for (int64_t e = 0; e < groups; ++e) {
    int64_t row = offsets[e] * per_offset;
    const int64_t end = offsets[e + 1] * per_offset;
    if (end - begin > plan.block_rows && row > begin) close(row);
    for (bool begins = true; begins || row < end; begins = false) {
      const int64_t stop = std::min(end, begin + plan.block_rows);
      pieces_.push_back({e, row - begin, stop - begin, begins, stop == end});
      plan.long_groups |= stop < end;
      row = stop;
      if (stop < end) close(stop);
    }
  }
  close(rows);
  for (size_t b = 0; b < blocks_.size(); ++b) {
    blocks_[b].pieces = pieces_.data() + firsts[b];
    blocks_[b].pieces_end = pieces_.data() + firsts[b + 1];
  }
  plan.blocks = blocks_.data();
  plan.blocks_end = plan.blocks + blocks_.size();
}

double run_tiles(const TileProblem& problem, TilePlan plan, TileBuffers buffers,
                 int64_t widest_in) {
  if (problem.out == 0 || problem.in == 0) return 0;
  plan.tile_in = std::min({widest_in, plan.tile_in, up(problem.in, kTileInStep)});
  plan.tile_out = std::min(plan.tile_out, up(problem.out, kTileOutStep));
  // Smaller ones where threads would else have none; a sum of masks that are no integers must not
  // depend on that.
  const int64_t threads =
      problem.statistic == Statistic::sand_mask ? 8 : torch::stable::get_num_threads();
  const auto uneven = [&](int64_t tiles) {
    return tiles < threads || (tiles < 4 * threads && tiles % threads != 0);
  };
  const auto is_tall = [&] { return plan.tile_out > 2 * kTileOutStep; };
  const auto is_wide = [&] { return plan.tile_in > 2 * kTileInStep; };
  while (uneven(plan.tiles(problem)) && (is_tall() || is_wide())) {
    if (is_tall() && (2 * plan.tile_out >= plan.tile_in || !is_wide())) {
      plan.tile_out = up(plan.tile_out / 2, kTileOutStep);
    } else {
      plan.tile_in = up(plan.tile_in / 2, kTileInStep);
    }
  }
  const int64_t tiles = plan.tiles(problem);
  std::vector<double> mask_sums(tiles);
  buffers.mask_sums = mask_sums.data();
  const int64_t rows = (plan.blocks_end - 1)->end;
  const int64_t work = (rows + problem.parameters.groups) * plan.tile_out * plan.tile_in / 16;
  const int64_t scratch_bytes = tile_scratch_bytes(problem, plan, buffers.place != nullptr);
  const auto kernel = HTV_PER_ISA(tile_kernel);
  parallel_chunks(tiles, work, scratch_bytes, [&](int64_t first, int64_t last, void* scratch) {
    TileBuffers own = buffers;
    own.scratch = scratch;
    kernel(problem, plan, own, first, last);
  });
  double sum = 0;
  for (const double part : mask_sums) sum += part;
  return sum;
}

}  // namespace htv::cpu
