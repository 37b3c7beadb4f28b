// What tile.cpp hands to the kernel of an instruction set: a statistic of grouped products, tile by
// tile.
//
// The coordinates are a matrix (out, in), and row r of grad_output and x contributes grad_output[r,
// :, None] * x[r, None, :] to the group that owns it. A row of x need not lie in one piece: a
// convolution's is the window seen by one position.
#pragma once

#include "../dtype.h"
#include "../statistic.h"
#include "isa.h"
#include "select_cost.h"
#include "summary.h"

namespace htv {

// Columns of a row of x that are next to each other in memory.
struct Run {
  int64_t column, offset, length;
};

// Rows of a group within a block, which are summed without a stop.
struct Piece {
  int64_t group, first, last;
  bool begins, ends;  // whether they are the group's first, and its last
};

// Rows that are multiplied by a cell before the next cell's turn.
struct RowBlock {
  int64_t begin, end;
  const Piece *pieces, *pieces_end;
};

// The largest tile but for sums; every tile is a unit of work: one thread sees all its groups, in
// order.
constexpr int64_t kMostTileOut = 64, kMostTileIn = 288;
// Tiles are multiples of these, those of a register tile of any instruction set, of which at most so
// many are multiplied together.
constexpr int64_t kTileOutStep = 8, kTileInStep = 32, kMostCells = 2;

// Where runs are read in place, they begin at multiples of so many bytes of columns.
constexpr int64_t kRunStep = kWidestRegister;

// Rows left free between panels, which would else lie a power of two apart and compete for the same
// lines of a cache.
constexpr int64_t kPanelGap = 3;

// Rows of runs that are no whole registers are put together this many at a time: read back at once,
// a row would wait for each of its stores.
constexpr int64_t kJoinedRows = 16;

// The rows of x, in elements: row r of part p begins at
// data + p * part + r / positions * sample + at[r % positions].
struct TileInput {
  const void *data, *end;
  const int64_t* at;
  int64_t positions, sample, part;
  const Run *runs, *runs_end;  // of all columns, in order
};

// The rows of grad_output, in elements: row r of part p begins at data + p * part + r * stride, but
// for plans that read rows in place.
struct TileGrad {
  const void *data, *end;
  int64_t stride, part;
};

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// What is asked.
struct TileProblem {
  Statistic statistic;
  bool summary;  // of contributions, in the place of the statistic
  Parameters parameters;
  Ranking ranking;  // of order statistics
  Dtype dtype;
  int64_t out, in;
  int64_t parts;  // independent problems side by side: groups of a convolution
  TileInput x;
  TileGrad grad_output;

  // Only sums are kept, which do not depend on groups.
  bool sums() const { return statistic == Statistic::mean && !summary; }
  int fields() const { return fields_of(statistic, summary); }
};

// How it is cut and multiplied.
struct TilePlan {
  const RowBlock *blocks, *blocks_end;
  int64_t block_rows;  // of the largest block
  bool long_groups;    // a group has several pieces
  bool few_rows;       // groups are so short that cells are multiplied one by one
  bool paired;         // rows of bfloat16 are multiplied in twos: all groups have an even number
  // Rows are multiplied where they lie instead of packed. Those of x are then in the compute type,
  // whole registers may be read from where a run begins, and every run begins at a multiple of
  // kRunStep bytes of columns; columns between runs are no coordinates. Those of grad_output lie in
  // panels of kTileOutStep outputs, the last one filled up with zeros: output o of row r of part p
  // is at data + p * part + o / kTileOutStep * stride + r * kTileOutStep + o % kTileOutStep.
  bool in_place;
  // Where all rows are packed once for all tiles (see `packed_bytes`); null: each tile packs its
  // own.
  void *packed_x, *packed_grad;
  int64_t tile_out, tile_in;

  int64_t tiles_out(const TileProblem& problem) const {
    return (problem.out + tile_out - 1) / tile_out;
  }
  int64_t tiles_in(const TileProblem& problem) const {
    return (problem.in + tile_in - 1) / tile_in;
  }
  int64_t tiles(const TileProblem& problem) const {
    return problem.parts * tiles_out(problem) * tiles_in(problem);
  }
  bool one_block() const { return blocks_end - blocks == 1; }
  int64_t rows() const { return (blocks_end - 1)->end - blocks->begin; }
  bool packed_once() const { return packed_x != nullptr; }
  int64_t panel_rows() const { return (packed_once() ? rows() : block_rows) + kPanelGap; }
};

// Panels of so many rows and of columns of x or outputs, in bytes.
inline int64_t packed_bytes(const TileProblem& problem, int64_t rows, int64_t columns) {
  return compute_bytes(problem.dtype) * (rows + kPanelGap) * round_up(columns, kTileInStep);
}

// Where results and scratch lie.
struct TileBuffers {
  // In elements: each field of column i of row o of part p is at
  // value + p * value_part + o * value_stride + (place ? place[i] : i).
  Fields values;
  int64_t value_stride, value_part;
  const int64_t* place;  // -1 for columns that are no coordinates
  // Columns come tap by tap for so many channels, then for the next; taps 0: in another order.
  int64_t taps, tap_channels;
  double* mask_sums;  // one per tile
  void* scratch;      // of one thread: tile_scratch_bytes, aligned to 64 bytes
};

// Where the rows of a block lie.
inline int64_t row_table_bytes(int64_t block_rows) {
  return (int64_t(sizeof(int64_t)) * block_rows + kRunStep - 1) / kRunStep * kRunStep;
}

// Scratch of one thread, in bytes. places: whether values are put in places (TileBuffers).
inline int64_t tile_scratch_bytes(const TileProblem& problem, const TilePlan& plan, bool places) {
  constexpr int64_t most_states = 5;  // registers of a streaming statistic
  const bool ranks = is_order(problem.statistic);
  const int64_t element = compute_bytes(problem.dtype);
  const int64_t width = round_up(plan.tile_in, kTileInStep);
  const int64_t height = round_up(plan.tile_out, kTileOutStep);
  const int64_t kept = plan.one_block() ? kTileOutStep * kMostCells * kTileInStep : height * width;
  const int64_t per_coordinate = ranks ? problem.parameters.groups : most_states + plan.long_groups;
  const int64_t packed_x =
      (plan.block_rows + kPanelGap) * width + kJoinedRows * (width + kTileInStep);
  const int64_t packed_g = (plan.block_rows + kPanelGap) * height;
  const int64_t staged = places ? problem.fields() * height * width : 0;
  const int64_t elements = staged + kept * per_coordinate;
  const int64_t packed = plan.packed_once() ? 0 : element * (packed_x + packed_g);
  return element * elements + (plan.in_place ? row_table_bytes(plan.block_rows) : packed) +
         (ranks ? select_scratch_bytes(problem.ranking) + kWidestRegister : 0);
}

// The least magnitude among values of bfloat16 that are not 0, as bits; 0 where rows cannot be
// multiplied in pairs.
HTV_DECLARE_PER_ISA(uint16_t least_magnitude(const void* values, int64_t n))

// Packs rows first <= row < last, of the plan's, of matrices whose rows lie in one piece: those of x
// into plan.packed_x, or those of grad_output into plan.packed_grad.
HTV_DECLARE_PER_ISA(void pack_x_kernel(const TileProblem& problem, const TilePlan& plan,
                                       int64_t first, int64_t last))
HTV_DECLARE_PER_ISA(void pack_grad_kernel(const TileProblem& problem, const TilePlan& plan,
                                          int64_t first, int64_t last))

// Computes tiles first <= tile < last.
HTV_DECLARE_PER_ISA(void tile_kernel(const TileProblem& problem, const TilePlan& plan,
                                     const TileBuffers& buffers, int64_t first, int64_t last))

}  // namespace htv
