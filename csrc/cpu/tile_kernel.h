// What tile.cpp hands to the kernel of an instruction set: a statistic of grouped products, tile by tile.
//
// The coordinates are a matrix (out, in), and row r of grad_output and x contributes grad_output[r, :, None] * x[r, None, :]
// to the group that owns it. A row of x need not lie in one piece: a convolution's is the window seen by one position.
#pragma once

#include "../dtype.h"
#include "../statistic.h"
#include "isa.h"
#include "select_cost.h"

namespace htv {

// Columns of a row of x that are next to each other in memory.
struct Run {
  int64_t column, offset, length;
};

// Rows of a group within a block of rows that are packed together.
struct Piece {
  int64_t group, first, last;
  bool begins, ends;  // whether they are the group's first, and its last
};

struct RowBlock {
  int64_t begin, end;
  const Piece *pieces, *pieces_end;
};

// The largest tile; every tile is a unit of work: one thread sees all its groups, in order.
constexpr int64_t kMostTileOut = 64, kMostTileIn = 288;
// Tiles are multiples of these, those of a register tile of any instruction set.
constexpr int64_t kTileOutStep = 8, kTileInStep = 32;

// Where runs are read in place, they begin at multiples of so many bytes of columns.
constexpr int64_t kRunStep = kWidestRegister;

// Rows left free between panels, which would else lie a power of two apart and compete for the same lines of a cache.
constexpr int64_t kPanelGap = 3;

// Rows of runs that are no whole registers are put together this many at a time: read back at once, a row would wait for
// each of its stores.
constexpr int64_t kJoinedRows = 16;

struct TileTask {
  const void *x, *x_end;  // row r is at x + r / positions * sample + at[r % positions], in elements
  const int64_t* at;
  int64_t positions, sample;
  // Rows are multiplied where they lie instead of packed. Those of x are then in the compute type, whole registers may be
  // read from where a run begins, and every run begins at a multiple of kRunStep bytes of columns; columns between runs are
  // no coordinates. Those of grad_output lie in panels of kTileOutStep outputs, the last one filled up with zeros: output o
  // of row r is at grad_output + o / kTileOutStep * grad_stride + r * kTileOutStep + o % kTileOutStep.
  bool in_place;
  const Run *runs, *runs_end;  // of all columns, in order
  const void *grad_output, *grad_end;
  int64_t grad_stride;
  Dtype dtype;
  int64_t out, in;
  // Independent problems side by side (groups of a convolution), and what lies between them.
  int64_t parts, x_part, grad_part, value_part;
  const RowBlock *blocks, *blocks_end;
  int64_t block_rows;  // of the largest block
  bool long_groups;  // a group reaches into several blocks
  bool few_rows;     // groups are so short that their states should stay in registers
  bool paired;       // rows of bfloat16 are multiplied two at a time; all groups have an even number of them
  Statistic statistic;
  Parameters parameters;
  const Ranking* ranking;  // of order statistics
  int64_t tile_out, tile_in;
  void* value;  // (out, in): column i of row o is at value + o * value_stride + (place ? place[i] : i)
  int64_t value_stride;
  const int64_t* place;  // -1 for columns that are no coordinates
  int64_t taps, tap_channels;  // columns come tap by tap for so many channels, then for the next; 0: in another order
  double* mask_sums;  // one per tile

  int64_t tiles_out() const { return (out + tile_out - 1) / tile_out; }
  int64_t tiles_in() const { return (in + tile_in - 1) / tile_in; }
  int64_t tiles() const { return parts * tiles_out() * tiles_in(); }
};

// Where the rows of a block lie.
inline int64_t row_table_bytes(const TileTask& task) {
  return (int64_t(sizeof(int64_t)) * task.block_rows + kRunStep - 1) / kRunStep * kRunStep;
}

// Scratch of one thread, in bytes.
inline int64_t tile_scratch_bytes(const TileTask& task) {
  constexpr int64_t most_states = 5;  // registers of a streaming statistic
  const int64_t element = compute_bytes(task.dtype);
  const int64_t width = (task.tile_in + kTileInStep - 1) / kTileInStep * kTileInStep;
  const int64_t height = (task.tile_out + kTileOutStep - 1) / kTileOutStep * kTileOutStep;
  const bool one_block = task.blocks_end - task.blocks == 1;
  const int64_t kept = one_block ? kTileOutStep * kTileInStep : height * width;
  const int64_t per_coordinate = task.ranking ? task.parameters.groups : most_states + task.long_groups;
  const int64_t packed_x = (task.block_rows + kPanelGap) * width + kJoinedRows * (width + kTileInStep);
  const int64_t packed_g = (task.block_rows + kPanelGap) * height;
  const int64_t elements = (task.place ? height * width : 0) + kept * per_coordinate;
  return element * elements + (task.in_place ? row_table_bytes(task) : element * (packed_x + packed_g)) +
         (task.ranking ? select_scratch_bytes(*task.ranking) + 64 : 0);
}

// The least magnitude among values of bfloat16 that are not 0, as bits; 0 where rows cannot be multiplied in pairs.
HTV_DECLARE_PER_ISA(uint16_t least_magnitude(const void* values, int64_t n))

// Computes tiles first <= tile < last; scratch is aligned to 64 bytes.
HTV_DECLARE_PER_ISA(void tile_kernel(const TileTask& task, int64_t first, int64_t last, void* scratch))

}  // namespace htv
