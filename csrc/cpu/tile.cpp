#include "tile.h"

#include <algorithm>

#include "parallel.h"

namespace htv::cpu {
namespace {

constexpr int64_t kBlockRows = 128;  // rows packed at a time, unless all fit
constexpr int64_t kSumTileOut = 512, kSumTileIn = 128;
constexpr int64_t kInPlaceRows = 256;        // at a time where nothing of x is packed
constexpr int64_t kPackedBytes = 256 << 10;  // what all packed rows of a tile may take in L2
constexpr int64_t kSharedBytes = 8 << 20;    // what rows may take that are packed for all tiles
constexpr int64_t kPackedTogether = 32;      // of them, at a time
// Rows per group up to which states are worth their registers.
constexpr int64_t kFewRows = 32;
constexpr int64_t kFewRowsInPlace = 8;

// Whether rows of both operands lie in one piece each.
bool is_plain(const TileProblem& problem) {
  return problem.parts == 1 && problem.x.positions == 1 && problem.x.runs_end - problem.x.runs == 1;
}

// Computes all tiles, by rows that are packed once for all of them if they are `shared`. Returns
// the sum of the mask.
double run_blocks(const TileProblem& problem, TilePlan plan, TileBuffers buffers, bool shared) {
  const int64_t begin = plan.blocks->begin, rows = plan.rows();
  const Scratch packed(shared ? packed_bytes(problem, rows) : 0);
  plan.packed = packed.get();
  if (shared) {
    const auto pack = HTV_PER_ISA(pack_kernel);
    parallel_chunks((rows + kPackedTogether - 1) / kPackedTogether,
                    kPackedTogether * (problem.in + problem.out) / 4, 0,
                    [&](int64_t first, int64_t last, void*) {
                      pack(problem, plan, begin + first * kPackedTogether,
                           begin + std::min(rows, last * kPackedTogether));
                    });
  }
  const int64_t tiles = plan.tiles(problem);
  std::vector<double> mask_sums(tiles);
  buffers.mask_sums = mask_sums.data();
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

}  // namespace

TileProblem tile_problem(Statistic statistic, bool summary, const Parameters& parameters,
                         Dtype dtype) {
  check_countable(dtype, parameters.groups);
  TileProblem problem{};
  problem.statistic = statistic;
  problem.summary = summary;
  problem.parameters = parameters;
  if (is_order(statistic)) problem.ranking = ranking_of(statistic, parameters);
  problem.dtype = dtype;
  problem.parts = 1;
  return problem;
}

TileBlocks::TileBlocks(const TileProblem& problem, const int64_t* offsets, int64_t per_offset,
                       bool in_place) {
  const bool sums = problem.sums();
  const int64_t groups = problem.parameters.groups, rows = offsets[groups] * per_offset;
  plan.in_place = in_place;
  plan.few_rows = !sums && rows <= (in_place ? kFewRowsInPlace : kFewRows) * groups;
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
  } else if (sums && !in_place) {
    plan.tile_out = kSumTileOut;
    plan.tile_in = kSumTileIn;
  }

  // Groups are cut only where they are longer than a block.
  std::vector<int64_t> firsts{0};
  int64_t begin = 0;
  const auto close = [&](int64_t end) {
    blocks_.push_back({begin, end, nullptr, nullptr});
    firsts.push_back(int64_t(pieces_.size()));
    begin = end;
  };
  for (int64_t e = 0; e < (sums ? 1 : groups); ++e) {
    int64_t row = sums ? 0 : offsets[e] * per_offset;
    const int64_t end = sums ? rows : offsets[e + 1] * per_offset;
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
  plan.tile_in = std::min({widest_in, plan.tile_in, round_up(problem.in, kTileInStep)});
  plan.tile_out = std::min(plan.tile_out, round_up(problem.out, kTileOutStep));
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
      plan.tile_out = round_up(plan.tile_out / 2, kTileOutStep);
    } else {
      plan.tile_in = round_up(plan.tile_in / 2, kTileInStep);
    }
  }
  const auto fits = [&](int64_t rows) {
    return is_plain(problem) && !plan.in_place && packed_bytes(problem, rows) <= kSharedBytes;
  };
  if (!problem.sums() || !fits(plan.block_rows))
    return run_blocks(problem, plan, buffers, fits(plan.rows()));
  // As many blocks at a time as fit.
  for (const RowBlock* const end = plan.blocks_end;; plan.continues = true) {
    plan.blocks_end = plan.blocks + 1;
    while (plan.blocks_end != end && fits(plan.rows() + plan.block_rows)) ++plan.blocks_end;
    const double sum = run_blocks(problem, plan, buffers, true);
    if (plan.blocks_end == end) return sum;
    plan.blocks = plan.blocks_end;
  }
}

}  // namespace htv::cpu
