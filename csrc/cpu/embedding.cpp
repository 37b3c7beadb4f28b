// htv::embedding on the CPU: checks, rows sorted by token, threads. The loops are in
// embedding_kernel.cpp.
#include <algorithm>
#include <numeric>
#include <torch/csrc/stable/library.h>
#include <tuple>
#include <vector>

#include "../op_checks.h"
#include "embedding_kernel.h"
#include "parallel.h"

namespace htv::cpu {
namespace {

// The vector's values, checked to lie in 0 <= value < limit.
const int64_t* indices(const std::string& op, const char* argument, const Tensor& tensor,
                       int64_t rows, int64_t limit) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == torch::headeronly::ScalarType::Long,
                  op, ": ", argument, " must be int64 on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows && tensor.is_contiguous(), op, ": ",
                  argument, " must be a contiguous vector with an entry for each of the ", rows,
                  " rows of grad_output");
  check_memory(op, argument, tensor);
  const int64_t* const values = static_cast<const int64_t*>(tensor.const_data_ptr());
  for (int64_t r = 0; r < rows; ++r)
    STD_TORCH_CHECK(0 <= values[r] && values[r] < limit, op, ": ", argument, " must lie in 0 to ",
                    limit - 1, ", got ", values[r]);
  return values;
}

}  // namespace

std::tuple<Tensor, Tensor> embedding(Tensor grad_output, Tensor ids, Tensor voter,
                                     int64_t num_embeddings, int64_t groups, int64_t code,
                                     int64_t count, double votes, double k) {
  const std::string op = "htv::embedding";
  check_matrix(op, "grad_output", grad_output);
  STD_TORCH_CHECK(num_embeddings >= 0, op, ": num_embeddings must not be negative, got ",
                  num_embeddings);
  const Statistic statistic = statistic_of(op, code);
  STD_TORCH_CHECK(statistic == Statistic::mean || statistic == Statistic::and_mask ||
                      statistic == Statistic::xor_mask || statistic == Statistic::sign_sum,
                  op, ": does not serve statistic ", code);
  const Dtype dtype = dtype_of(op, "grad_output", grad_output);
  const Parameters parameters = parameters_for(op, statistic, groups, count, votes, k);
  STD_TORCH_CHECK(dtype == Dtype::float64 || groups <= int64_t(1) << 24, op,
                  ": votes of more than 2^24 groups are counted in float64 only, got ", groups,
                  " groups");
  const int64_t rows = grad_output.size(0), features = grad_output.size(1);
  const int64_t* const token_of = indices(op, "ids", ids, rows, num_embeddings);
  const int64_t* const voter_of = indices(op, "voter", voter, rows, groups);

  const Checked checked(op);
  checked.product(checked.sum(num_embeddings, kEmbeddingTokens),
                  checked.sum(features, kEmbeddingFeatures), int64_t(8));
  Tensor value = new_tensor({num_embeddings, features}, compute_type(dtype));
  if (value.numel() == 0) return {value, sum_in_order({})};
  std::vector<int64_t> starts(num_embeddings + 1), sorted(rows);
  for (int64_t r = 0; r < rows; ++r) ++starts[token_of[r] + 1];
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t r = 0; r < rows; ++r) sorted[next[token_of[r]]++] = r;
  const auto by_voter = [&](int64_t a, int64_t b) { return voter_of[a] < voter_of[b]; };
  if (!std::is_sorted(voter_of, voter_of + rows))
    for (int64_t t = 0; t < num_embeddings; ++t)
      std::stable_sort(sorted.begin() + starts[t], sorted.begin() + starts[t + 1], by_voter);

  EmbeddingTask task{grad_output.const_data_ptr(),
                     dtype,
                     num_embeddings,
                     features,
                     sorted.data(),
                     starts.data(),
                     voter_of,
                     statistic,
                     parameters,
                     value.mutable_data_ptr(),
                     nullptr};
  std::vector<double> mask_sums(task.chunks());
  task.mask_sums = mask_sums.data();
  const int64_t tokens = std::max<int64_t>(1, num_embeddings);
  const int64_t work =
      (rows / tokens + 1) * kEmbeddingTokens * std::min(features, kEmbeddingFeatures) / 8;
  const auto kernel = HTV_PER_ISA(embedding_kernel);
  parallel_chunks(task.chunks(), work, 0,
                  [&](int64_t first, int64_t last, void*) { kernel(task, first, last); });
  return {value, sum_in_order(mask_sums)};
}

}  // namespace htv::cpu

STABLE_TORCH_LIBRARY_IMPL(htv, CPU, m) { m.impl("embedding", TORCH_BOX(&htv::cpu::embedding)); }
