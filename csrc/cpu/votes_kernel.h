// What the linear op hands to the kernel that counts votes of groups of one row: the sign of a
// contribution is the product of its factors' signs, so votes are counted on sign planes, beside
// sums that are there already. (A product too small for its type still votes.)
#pragma once

#include "../dtype.h"
#include "../statistic.h"
#include "isa.h"
#include "sign_planes_kernel.h"

namespace htv {

// Tiles that are served at once: what torch multiplies fast, and a cache holds.
constexpr int64_t kVotesTileOut = 256, kVotesTileIn = 512;

struct VotesTask {
  const void* x;            // (rows, in)
  const void* grad_output;  // (rows, out)
  Dtype dtype;
  int64_t rows, in, out;
  SignPlanes signs_x, signs_g;
  Statistic statistic;  // a mask by votes, or the sign sum
  Parameters parameters;
  void* sums;   // (out, in) in the compute type: of all rows; becomes E times the statistic
  void* votes;  // (out, in): where votes go, and sums stay as they are; null otherwise
};

// Coordinates out_begin <= o < out_end, in_begin <= i < in_end. Ranges begin at multiples of the
// tile's sizes.
struct VotesTile {
  int64_t out_begin, out_end, in_begin, in_end;
};

inline int64_t votes_tiles(int64_t out, int64_t in) {
  return (out + kVotesTileOut - 1) / kVotesTileOut * ((in + kVotesTileIn - 1) / kVotesTileIn);
}

inline VotesTile votes_tile(const VotesTask& task, int64_t tile) {
  const int64_t across = (task.in + kVotesTileIn - 1) / kVotesTileIn;
  const int64_t o = tile / across * kVotesTileOut, i = tile % across * kVotesTileIn;
  const int64_t height = task.out - o, width = task.in - i;
  return {o, o + (height < kVotesTileOut ? height : kVotesTileOut), i,
          i + (width < kVotesTileIn ? width : kVotesTileIn)};
}

// Returns how many coordinates of a tile the mask keeps.
HTV_DECLARE_PER_ISA(int64_t votes_kernel(const VotesTask& task, const VotesTile& tile))

}  // namespace htv
