// htv::stacked on the CPU: checks, scratch, threads. The loops are in stacked_kernel.cpp.
#include "stacked_kernel.h"

#include <optional>
#include <torch/csrc/stable/library.h>
#include <tuple>
#include <vector>

#include "../op_checks.h"
#include "asked.h"
#include "machine.h"
#include "parallel.h"

namespace htv::cpu {

Answer stacked_answer(const std::string& op, const Tensor& grads, const Asked& asked) {
  check_matrix(op, "grads", grads);
  const Statistic statistic = asked.statistic;
  const Dtype dtype = dtype_of(op, "grads", grads);
  const int64_t coordinates = grads.size(1),
                chunks = (coordinates + kStackedChunk - 1) / kStackedChunk;
  const Parameters parameters = asked.of(op, grads.size(0));
  if (asked.summary) check_countable(dtype, parameters.groups);

  Answer found(asked, {coordinates}, dtype);
  std::vector<double> mask_sums(chunks);
  std::optional<Ranking> ranking;
  if (is_order(statistic)) ranking = ranking_of(statistic, parameters);
  const StackedTask task{grads.const_data_ptr(),
                         dtype,
                         coordinates,
                         statistic,
                         asked.summary,
                         parameters,
                         found.fields(),
                         mask_sums.data(),
                         ranking ? &*ranking : nullptr};
  const int64_t scratch_bytes = ranking ? stacked_scratch_bytes(*ranking) : 0;
  const int64_t work = parameters.groups * (ranking ? select_work(*ranking) : 1);
  const auto kernel = is_order(statistic) ? HTV_PER_RANKING_ISA(stacked_kernel)
                                         : HTV_PER_ISA(stacked_kernel);
  parallel_chunks(
      chunks, work * kStackedChunk, scratch_bytes,
      [&](int64_t first, int64_t last, void* scratch) { kernel(task, first, last, scratch); });
  for (const double sum : mask_sums) found.mask_sum += sum;
  return found;
}

std::tuple<Tensor, Tensor> stacked(Tensor grads, int64_t code, int64_t count, double votes,
                                   double k) {
  const std::string op = "htv::stacked";
  return stacked_answer(op, grads, Asked::value(op, code, count, votes, k)).value();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> stacked_summary(Tensor grads, int64_t code,
                                                           double log_offset) {
  const std::string op = "htv::stacked_summary";
  const Asked asked = Asked::of_summary(op, code, log_offset);
  return stacked_answer(op, grads, asked).summary(asked);
}

}  // namespace htv::cpu

STABLE_TORCH_LIBRARY_IMPL(htv, CPU, m) {
  m.impl("stacked", TORCH_BOX(&htv::cpu::stacked));
  m.impl("stacked_summary", TORCH_BOX(&htv::cpu::stacked_summary));
}
