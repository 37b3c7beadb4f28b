// What the norm_sums op hands to the kernel of a CPU level.
#pragma once

#include "../dtype.h"
#include "level.h"

namespace htv {

// Features of one sample are the unit of work, so results do not depend on the threads.
constexpr int64_t kNormChunk = 1024;

struct NormTask {
  const void* grad;  // (samples, rows, features)
  const void* x;     // the same
  Dtype dtype;
  int64_t rows, features;
  const void* mean;  // (samples, rows) in the compute type
  const void* rstd;  // the same
  void* scale;       // (samples, features) in the compute type
  void* shift;       // the same
};

inline int64_t norm_chunks(int64_t features) { return (features + kNormChunk - 1) / kNormChunk; }

// Computes chunks first <= chunk < last, those of a sample beside each other.
HTV_DECLARE_PER_LEVEL(void norm_kernel(const NormTask& task, int64_t first, int64_t last))

}  // namespace htv
