// What the ops on normalisations hand to the kernels of an instruction set.
#pragma once

#include "../dtype.h"
#include "isa.h"

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
HTV_DECLARE_PER_ISA(void norm_kernel(const NormTask& task, int64_t first, int64_t last))

// One group of one sample's channels is the unit of work.
struct GroupNormTask {
  const void* grad;  // (samples, groups, channels, space)
  const void* x;     // the same
  Dtype dtype;
  int64_t groups, channels, space;
  const void* weight;  // (groups, channels) in the compute type, as all below
  const void* mean;    // (samples, groups)
  const void* rstd;    // the same
  void* grad_x;        // as x, or null if it is not wanted
  void* scale;         // (samples, groups, channels)
  void* shift;         // the same
};

// What each thread needs as scratch: two values for each of a group's.
inline int64_t group_norm_scratch(const GroupNormTask& task) {
  return 2 * task.channels * task.space * compute_bytes(task.dtype);
}

// Computes units first <= unit < last, those of a sample beside each other.
HTV_DECLARE_PER_ISA(void group_norm_kernel(const GroupNormTask& task, int64_t first, int64_t last,
                                           void* scratch))

}  // namespace htv
