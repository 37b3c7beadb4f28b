// The ops served on CUDA; their contract is in htv/ops/schema.py.
#pragma once

#include <tuple>

#include "../op_checks.h"

namespace htv::cuda {

std::tuple<Tensor, Tensor> stacked(Tensor grads, int64_t statistic, int64_t count, double votes,
                                   double k);
// Groups of at most one row.
std::tuple<Tensor, Tensor> linear(Tensor x, Tensor grad_output, Tensor offsets, int64_t statistic,
                                  int64_t count, double votes, double k);

}  // namespace htv::cuda
