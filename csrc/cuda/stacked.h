// The stacked op's work, as its kernels see it.
#pragma once

#include "../statistic.h"
#include "device.h"

namespace htv::cuda {

struct StackedTask {
  const void* grads;  // (groups, coordinates)
  int64_t coordinates;
  Statistic statistic;
  Parameters parameters;
  void* value;        // (coordinates)
  double* mask_sums;  // one per block, of statistics with a mask
  int64_t bucket;     // groups of a bucket; the first `longer` ones have one more
  int64_t longer;
};

// How many partial sums of the mask the kernel for elements T writes; then the launch of it, for a
// coordinate or more.
template <class T>
int64_t stacked_mask_parts(const StackedTask& task);
template <class T>
void run_stacked(const StackedTask& task, cudaStream_t stream);

}  // namespace htv::cuda
