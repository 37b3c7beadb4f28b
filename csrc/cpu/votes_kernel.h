// What the linear op hands to the kernel that counts votes where no group has more than one row.
#pragma once

#include "../dtype.h"
#include "../statistic.h"
#include "isa.h"
#include "sign_planes_kernel.h"

namespace htv {

// A tile of coordinates is the unit of work and of the count of what the mask keeps.
constexpr int64_t kVotesOut = 32, kVotesIn = 256;

struct VotesTask {
  const void* x;            // (rows, in)
  const void* grad_output;  // (rows, out)
  Dtype dtype;
  int64_t rows, in, out;
  Statistic statistic;  // and_mask, xor_mask or sign_sum
  Parameters parameters;
  SignPlanes signs_x, signs_g;
  // (out, in): the sum of all contributions, to be replaced by E times the statistic.
  void* value;
  int64_t* kept;  // coordinates the mask keeps, one number per tile

  int64_t tiles_in() const { return (in + kVotesIn - 1) / kVotesIn; }
  int64_t tiles() const { return (out + kVotesOut - 1) / kVotesOut * tiles_in(); }
};

// Computes tiles first <= tile < last.
HTV_DECLARE_PER_ISA(void votes_kernel(const VotesTask& task, int64_t first, int64_t last))

}  // namespace htv
