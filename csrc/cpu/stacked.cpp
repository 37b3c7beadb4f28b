// htv::stacked on the CPU: checks, scratch, threads. The loops are in stacked_kernel.cpp.
#include "stacked_kernel.h"

#include <tuple>
#include <vector>

#include "../contract.h"
#include "parallel.h"

namespace htv::cpu {
namespace {

// How many values of a coordinate are ranked, and which ranks the statistic reads.
struct Ranks {
  int64_t total, first, last;
};

Ranks ranks_of(Statistic statistic, const Parameters& p) {
  switch (statistic) {
    case Statistic::trimmed_mean:
    case Statistic::winsorized_mean: return {p.groups, p.count, p.groups - p.count};
    case Statistic::median_of_means: return {p.count, (p.count - 1) / 2, p.count / 2 + 1};
    default: return {p.groups, (p.groups - 1) / 2, p.groups / 2 + 1};
  }
}

}  // namespace

std::tuple<Tensor, Tensor> stacked(Tensor grads, int64_t code, int64_t count, double votes, double k) {
  const std::string op = "htv::stacked";
  check_matrix(op, "grads", grads);
  const Statistic statistic = statistic_of(op, code);
  const Dtype dtype = dtype_of(op, "grads", grads);
  const int64_t coordinates = grads.size(1), chunks = (coordinates + kStackedChunk - 1) / kStackedChunk;
  const Parameters parameters = parameters_for(op, statistic, grads.size(0), count, votes, k);

  Tensor value = torch::stable::new_empty(grads, {coordinates}, compute_type(dtype));
  std::vector<double> mask_sums(chunks);
  std::vector<CompareExchange> network;
  StackedTask task{grads.const_data_ptr(), dtype, coordinates, statistic, parameters, value.mutable_data_ptr(),
                   mask_sums.data(), nullptr, 0, 0};
  int64_t scratch_bytes = 0, work = parameters.groups;
  if (is_order(statistic)) {
    const Ranks ranks = ranks_of(statistic, parameters);
    network = sorting_network(ranks.total, ranks.first, ranks.last);
    task.network = network.data();
    task.steps = network.size();
    task.ranked = ranks.total;
    scratch_bytes = stacked_scratch_bytes(ranks.total);
    work += task.steps;
  }
  const auto kernel = HTV_PER_LEVEL(stacked_kernel);
  parallel_chunks(chunks, work * kStackedChunk, scratch_bytes,
                  [&](int64_t first, int64_t last, void* scratch) { kernel(task, first, last, scratch); });
  return {value, sum_in_order(grads, mask_sums)};
}

}  // namespace htv::cpu
