// htv::stacked on the CPU: checks, scratch, threads. The loops are in stacked_kernel.cpp.
#include "stacked_kernel.h"

#include <optional>
#include <torch/csrc/stable/library.h>
#include <tuple>
#include <vector>

#include "../op_checks.h"
#include "parallel.h"

namespace htv::cpu {

std::tuple<Tensor, Tensor> stacked(Tensor grads, int64_t code, int64_t count, double votes,
                                   double k) {
  const std::string op = "htv::stacked";
  check_matrix(op, "grads", grads);
  const Statistic statistic = statistic_of(op, code);
  const Dtype dtype = dtype_of(op, "grads", grads);
  const int64_t coordinates = grads.size(1),
                chunks = (coordinates + kStackedChunk - 1) / kStackedChunk;
  const Parameters parameters = parameters_for(op, statistic, grads.size(0), count, votes, k);

  Tensor value = torch::stable::new_empty(grads, {coordinates}, compute_type(dtype));
  std::vector<double> mask_sums(chunks);
  std::optional<Ranking> ranking;
  if (is_order(statistic)) ranking = ranking_of(statistic, parameters);
  const StackedTask task{grads.const_data_ptr(),
                         dtype,
                         coordinates,
                         statistic,
                         parameters,
                         value.mutable_data_ptr(),
                         mask_sums.data(),
                         ranking ? &*ranking : nullptr};
  const int64_t scratch_bytes = ranking ? stacked_scratch_bytes(*ranking) : 0;
  const int64_t work = parameters.groups * (ranking ? select_work(*ranking) : 1);
  const auto kernel = HTV_PER_ISA(stacked_kernel);
  parallel_chunks(
      chunks, work * kStackedChunk, scratch_bytes,
      [&](int64_t first, int64_t last, void* scratch) { kernel(task, first, last, scratch); });
  return {value, sum_in_order(grads, mask_sums)};
}

}  // namespace htv::cpu

STABLE_TORCH_LIBRARY_IMPL(htv, CPU, m) { m.impl("stacked", TORCH_BOX(&htv::cpu::stacked)); }
