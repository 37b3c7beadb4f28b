#include "tile.h"

#include <algorithm>

#include "machine.h"
#include "parallel.h"

namespace htv::cpu {
namespace {

constexpr int64_t kBlockRows = 128;  // rows packed at a time, unless all fit
constexpr int64_t kSumTileOut = 512, kSumTileIn = 128;
constexpr int64_t kInPlaceRows = 256;        // at a time where nothing of x is packed
constexpr int64_t kPackedBytes = 256 << 10;  // what all packed rows of a tile may take in L2
// Rows that are packed for all tiles: what those of one operand may take at a time, or the share of
// all its columns if that is more, and how many are packed together.
constexpr int64_t kSharedBytes = 6 << 20, kSharedShare = 4;
constexpr int64_t kPackedTogether = 64;
constexpr int64_t kSummedRows = 512;  // of a group, without a stop: one long sum would round more
// Rows per group up to which one cell at a time is faster: of streaming statistics, for their states
// then stay in registers, and of order statistics.
constexpr int64_t kFewRowsStreaming = 8, kFewRowsOrdered = 4;

// Pairs of bfloat16 are multiplied by instructions that the set which ranks may lack.
bool takes_ranking_isa(const TileProblem& problem, const TilePlan& plan) {
  return is_order(problem.statistic) && !plan.paired;
}

// Packs the plan's rows by a kernel for one operand, of so many columns.
template <class Kernel>
void pack_rows(Kernel* kernel, const TileProblem& problem, const TilePlan& plan, int64_t columns) {
  const int64_t begin = plan.blocks->begin, rows = plan.rows();
  parallel_chunks((rows + kPackedTogether - 1) / kPackedTogether, kPackedTogether * columns / 4, 0,
                  [&](int64_t first, int64_t last, void*) {
                    for (int64_t chunk = first; chunk < last; ++chunk)
                      kernel(problem, plan, begin + chunk * kPackedTogether,
                             begin + std::min(rows, (chunk + 1) * kPackedTogether));
                  });
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
                       RowsLie lie) {
  const bool sums = problem.sums(), in_place = lie == RowsLie::in_place;
  const int64_t groups = problem.parameters.groups, rows = offsets[groups] * per_offset;
  plan.in_place = in_place;
  const int64_t few = is_order(problem.statistic) ? kFewRowsOrdered : kFewRowsStreaming;
  plan.few_rows = !sums && rows <= few * groups;
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

  // Blocks end within groups only where those are longer than one.
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
      const int64_t block_end = begin + plan.block_rows;
      const int64_t stop = std::min({end, block_end, row + kSummedRows});
      pieces_.push_back({e, row - begin, stop - begin, begins, stop == end});
      plan.long_groups |= stop < end;
      row = stop;
      if (stop < end && stop == block_end) close(stop);
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
  const int64_t tiles = plan.tiles(problem);
  std::vector<double> mask_sums(tiles);
  buffers.mask_sums = mask_sums.data();
  const int64_t rows = plan.rows();
  const int64_t work = (rows + problem.parameters.groups) * plan.tile_out * plan.tile_in / 16;
  const int64_t scratch_bytes = tile_scratch_bytes(problem, plan, buffers.place != nullptr);
  const auto kernel = takes_ranking_isa(problem, plan) ? HTV_PER_RANKING_ISA(tile_kernel)
                                                       : HTV_PER_ISA(tile_kernel);
  parallel_chunks(tiles, work, scratch_bytes, [&](int64_t first, int64_t last, void* scratch) {
    TileBuffers own = buffers;
    own.scratch = scratch;
    kernel(problem, plan, own, first, last);
  });
  double sum = 0;
  for (const double part : mask_sums) sum += part;
  return sum;
}

double run_matrices(const TileProblem& problem, const int64_t* offsets, bool paired,
                    const TileBuffers& buffers) {
  TileBlocks blocks(problem, offsets, 1, RowsLie::packed_once);
  TilePlan& plan = blocks.plan;
  plan.paired = paired;
  const bool ranks = takes_ranking_isa(problem, plan);
  const int64_t element = bytes_of(problem.dtype), of_value = compute_bytes(problem.dtype);
  const int64_t rows = plan.rows();
  if (problem.out == 0 || problem.in == 0) return 0;
  const int64_t column_bytes = packed_bytes(problem, rows, kTileInStep) / kTileInStep;
  const auto at_once = [&](int64_t columns) {
    const int64_t most = std::max({kSharedBytes / column_bytes, columns / kSharedShare, kTileInStep});
    const int64_t strips = (columns + most - 1) / most;
    return round_up((columns + strips - 1) / strips, kTileInStep);
  };
  const int64_t out = at_once(problem.out), in = at_once(problem.in);
  const Scratch packed_x(in * column_bytes), packed_grad(out * column_bytes);
  plan.packed_x = packed_x.get();
  plan.packed_grad = packed_grad.get();
  TileProblem part = problem;
  double mask_sum = 0;
  for (int64_t left = 0; left < problem.in; left += in) {
    part.in = std::min(in, problem.in - left);
    const Run columns{0, 0, part.in};
    part.x.data = static_cast<const char*>(problem.x.data) + left * element;
    part.x.runs = &columns;
    part.x.runs_end = &columns + 1;
    pack_rows(ranks ? HTV_PER_RANKING_ISA(pack_x_kernel) : HTV_PER_ISA(pack_x_kernel), part, plan,
              part.in);
    for (int64_t top = 0; top < problem.out; top += out) {
      part.out = std::min(out, problem.out - top);
      part.grad_output.data = static_cast<const char*>(problem.grad_output.data) + top * element;
      pack_rows(ranks ? HTV_PER_RANKING_ISA(pack_grad_kernel) : HTV_PER_ISA(pack_grad_kernel), part,
                plan, part.out);
      TileBuffers of_part = buffers;
      for (int f = 0; f < problem.fields(); ++f)
        of_part.values.at[f] = static_cast<char*>(buffers.values.at[f]) +
                               (top * buffers.value_stride + left) * of_value;
      mask_sum += run_tiles(part, plan, of_part);
    }
  }
  return mask_sum;
}

}  // namespace htv::cpu
