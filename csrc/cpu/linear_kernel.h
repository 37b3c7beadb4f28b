// What the linear op hands to the kernel of a CPU level.
#pragma once

#include "../dtype.h"
#include "../statistic.h"
#include "level.h"
#include "sign_planes.h"

namespace htv {

// A tile of coordinates is the unit of work: one thread sees all its groups, in order.
constexpr int64_t kTileOut = 64, kTileIn = 192, kLeastTileOut = 16;
constexpr int64_t kBlockRows = 128;  // rows packed at a time

struct LinearTask {
  const void* x;            // (rows, in)
  const void* grad_output;  // (rows, out)
  Dtype dtype;
  int64_t rows, in, out;
  const int64_t* offsets;  // (groups + 1)
  Statistic statistic;
  Parameters parameters;
  bool single_rows;    // no group has more than one row
  SignPlanes signs_x, signs_g;  // then, and where votes count
  int64_t tile_out;    // height of a tile, at most kTileOut
  void* value;         // (out, in)
  int64_t* mask_sums;  // one per tile
};

inline int64_t tiles_in(int64_t in) { return (in + kTileIn - 1) / kTileIn; }
inline int64_t linear_tiles(int64_t out, int64_t in, int64_t tile_out) {
  return (out + tile_out - 1) / tile_out * tiles_in(in);
}

// The height of tiles: less than kTileOut where a few threads would else have none.
inline int64_t linear_tile_out(int64_t out, int64_t in, int64_t threads) {
  int64_t height = kTileOut;
  while (height > kLeastTileOut && linear_tiles(out, in, height) < threads) height /= 2;
  return height;
}

// Scratch of one thread, in bytes: packed rows of x and grad_output; sum, votes and unfinished product of the tile.
inline int64_t linear_scratch_bytes(Dtype dtype) {
  const int64_t element = dtype == Dtype::float64 ? 8 : 4;
  return element * (kBlockRows * (kTileIn + kTileOut) + 3 * kTileOut * kTileIn);
}

// Computes tiles first <= tile < last; scratch is aligned to 64 bytes.
HTV_DECLARE_PER_LEVEL(void linear_kernel(const LinearTask& task, int64_t first, int64_t last, void* scratch))

}  // namespace htv
