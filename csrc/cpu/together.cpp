// htv::together on the CPU: what htv::stacked and htv::linear answer of several parameters, in one
// call. Of small layers a call takes as long as their kernels.
#include <optional>
#include <torch/csrc/stable/library.h>
#include <vector>

#include "../op_checks.h"
#include "asked.h"

namespace htv::cpu {
namespace {

// E times the statistic, which htv::stacked leaves to its caller.
void scale(Tensor& value, int64_t groups) {
  const auto by = [&](auto* at) {
    for (int64_t i = 0, n = value.numel(); i < n; ++i) at[i] *= groups;
  };
  if (value.scalar_type() == torch::headeronly::ScalarType::Double)
    by(static_cast<double*>(value.mutable_data_ptr()));
  else by(static_cast<float*>(value.mutable_data_ptr()));
}

Tensor dense(const std::string& op, const char* argument, const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  check_memory(op, argument, tensor);
  return torch::stable::contiguous(tensor);
}

}  // namespace

std::vector<Tensor> together(std::vector<Tensor> grads, std::vector<Tensor> x,
                             std::vector<Tensor> grad_output, std::optional<Tensor> offsets,
                             int64_t code, int64_t count, double votes, double k) {
  const std::string op = "htv::together";
  const Asked asked = Asked::value(op, code, count, votes, k);
  check_factored(op, asked.statistic);
  STD_TORCH_CHECK(x.size() == grad_output.size(), op, ": ", x.size(), " tensors in x, ",
                  grad_output.size(), " in grad_output");
  STD_TORCH_CHECK(x.empty() || offsets.has_value(), op, ": x needs offsets");
  int64_t groups = offsets.has_value() ? offsets->numel() - 1 : -1;
  for (const Tensor& of_one : grads) {
    STD_TORCH_CHECK(of_one.dim() == 2, op, ": grads must have 2 dimensions, got ", of_one.dim());
    if (groups < 0) groups = of_one.size(0);
    STD_TORCH_CHECK(of_one.size(0) == groups, op, ": grads of ", of_one.size(0), " groups, not of ",
                    groups);
  }

  std::vector<Tensor> values;
  values.reserve(grads.size() + x.size());
  for (const Tensor& of_one : grads) {
    values.push_back(stacked_answer(op, dense(op, "grads", of_one), asked).tensors[0]);
    scale(values.back(), groups);
  }
  for (size_t i = 0; i < x.size(); ++i)
    values.push_back(linear_answer(op, dense(op, "x", x[i]),
                                   dense(op, "grad_output", grad_output[i]), *offsets, asked)
                         .tensors[0]);
  return values;
}

}  // namespace htv::cpu

STABLE_TORCH_LIBRARY_IMPL(htv, CPU, m) { m.impl("together", TORCH_BOX(&htv::cpu::together)); }
