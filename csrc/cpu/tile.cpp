#include "tile.h"

#include <algorithm>

#include "parallel.h"

namespace htv::cpu {
namespace {

constexpr int64_t kBlockRows = 128;              // rows packed at a time, unless all fit
constexpr int64_t kSumTileIn = 160;              // columns of a tile of plain sums
constexpr int64_t kInPlaceRows = 256;            // at a time where nothing of x is packed
constexpr int64_t kPackedBytes = 256 << 10;      // what all packed rows of a tile may take in L2
constexpr int64_t kFewRows = 32;                 // rows per group up to which states are worth their registers
constexpr int64_t kFewRowsInPlace = 8;

int64_t up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace

TilePlan::TilePlan(Statistic statistic, const Parameters& parameters, Dtype dtype, const int64_t* offsets,
                   int64_t per_offset, bool in_place) {
  const int64_t groups = parameters.groups, rows = offsets[groups] * per_offset;
  check_countable(dtype, groups);
  task.dtype = dtype;
  task.statistic = statistic;
  task.parameters = parameters;
  task.parts = 1;
  task.in_place = in_place;
  task.few_rows = rows <= (in_place ? kFewRowsInPlace : kFewRows) * groups;
  if (is_order(statistic)) {
    task.ranking = &ranking_.emplace(ranking_of(statistic, parameters));
    const int64_t element = compute_bytes(dtype);
    const int64_t area = kRankedBytes / (element * groups);
    task.tile_out = std::clamp(area / 96 / kTileOutStep * kTileOutStep, kTileOutStep, kMostTileOut);
    task.tile_in = std::clamp(area / task.tile_out / kTileInStep * kTileInStep, kTileInStep, kMostTileIn);
    const int64_t fit = kPackedBytes / (element * (task.tile_out + (in_place ? 0 : task.tile_in)));
    task.block_rows = rows <= fit ? std::max<int64_t>(rows, 1) : in_place ? kInPlaceRows : kBlockRows;
  } else if (in_place) {
    task.tile_out = kMostTileOut;
    task.tile_in = kMostTileIn;
    task.block_rows = kInPlaceRows;
  } else {
    task.tile_out = kMostTileOut;
    // Sums need no whole groups, and are kept for a whole tile: as little as serves of an MLP's memory.
    task.tile_in = statistic == Statistic::mean ? kSumTileIn : kMostTileIn;
    task.block_rows = statistic == Statistic::mean ? kBlockRows / 2 : kBlockRows;
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
    if (end - begin > task.block_rows && row > begin) close(row);
    for (bool begins = true; begins || row < end; begins = false) {
      const int64_t stop = std::min(end, begin + task.block_rows);
      pieces_.push_back({e, row - begin, stop - begin, begins, stop == end});
      task.long_groups |= stop < end;
      row = stop;
      if (stop < end) close(stop);
    }
  }
  close(rows);
  for (size_t b = 0; b < blocks_.size(); ++b) {
    blocks_[b].pieces = pieces_.data() + firsts[b];
    blocks_[b].pieces_end = pieces_.data() + firsts[b + 1];
  }
  task.blocks = blocks_.data();
  task.blocks_end = task.blocks + blocks_.size();
}

double TilePlan::run(int64_t tile_in) {
  if (task.out == 0 || task.in == 0) return 0;
  const TileTask chosen = task;
  task.tile_in = std::min({tile_in, task.tile_in, up(task.in, kTileInStep)});
  task.tile_out = std::min(task.tile_out, up(task.out, kTileOutStep));
  // Smaller ones where threads would else have none; a sum of masks that are no integers must not depend on that.
  const int64_t threads = task.statistic == Statistic::sand_mask ? 8 : torch::stable::get_num_threads();
  const auto uneven = [&](int64_t tiles) { return tiles < threads || (tiles < 4 * threads && tiles % threads != 0); };
  while (uneven(task.tiles()) && (task.tile_out > 2 * kTileOutStep || task.tile_in > 2 * kTileInStep)) {
    if (task.tile_out > 2 * kTileOutStep && (2 * task.tile_out >= task.tile_in || task.tile_in <= 2 * kTileInStep)) {
      task.tile_out = up(task.tile_out / 2, kTileOutStep);
    } else {
      task.tile_in = up(task.tile_in / 2, kTileInStep);
    }
  }
  std::vector<double> mask_sums(task.tiles());
  task.mask_sums = mask_sums.data();
  const int64_t rows = (task.blocks_end - 1)->end;
  const int64_t work = (rows + task.parameters.groups) * task.tile_out * task.tile_in / 16;
  const auto kernel = HTV_PER_ISA(tile_kernel);
  parallel_chunks(task.tiles(), work, tile_scratch_bytes(task),
                  [&](int64_t first, int64_t last, void* scratch) { kernel(task, first, last, scratch); });
  task.tile_in = chosen.tile_in;
  task.tile_out = chosen.tile_out;
  double sum = 0;
  for (const double part : mask_sums) sum += part;
  return sum;
}

}  // namespace htv::cpu
