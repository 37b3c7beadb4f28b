// Registers the CPU kernels for the ops that htv/ops/schema.py declares. Load after it.
#include <torch/csrc/stable/library.h>
#include <tuple>

#include "contract.h"

namespace htv::cpu {
std::tuple<Tensor, Tensor> stacked(Tensor grads, int64_t statistic, int64_t count, double votes, double k);
std::tuple<Tensor, Tensor> linear(Tensor x, Tensor grad_output, Tensor offsets, int64_t statistic, int64_t count,
                                  double votes, double k);
std::tuple<Tensor, Tensor> norm_sums(Tensor grad, Tensor x, Tensor mean, Tensor rstd);
}  // namespace htv::cpu

STABLE_TORCH_LIBRARY_IMPL(htv, CPU, m) {
  m.impl("stacked", TORCH_BOX(&htv::cpu::stacked));
  m.impl("norm_sums", TORCH_BOX(&htv::cpu::norm_sums));
  m.impl("linear", TORCH_BOX(&htv::cpu::linear));
}
