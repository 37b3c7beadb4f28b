// htv::shifted_cross_entropy and its gradient on the CPU: checks and threads. The loops are in
// cross_entropy_kernel.cpp.
#include <algorithm>
#include <optional>
#include <torch/csrc/stable/library.h>
#include <tuple>

#include "../op_checks.h"
#include "cross_entropy_kernel.h"
#include "parallel.h"

namespace htv::cpu {
namespace {

void check_vector(const std::string& op, const char* argument, const Tensor& tensor,
                  torch::headeronly::ScalarType type, int64_t size) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == type, op, ": ", argument,
                  " must be on the CPU, in the type the contract says");
  check_memory(op, argument, tensor);
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == size, op, ": ", argument, " must be (",
                  size, ",)");
}

void check_rows(const std::string& op, const char* argument, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2, op, ": ", argument,
                  " must have 2 dimensions, on the CPU");
  check_memory(op, argument, tensor);
  STD_TORCH_CHECK(tensor.size(1) == 1 || tensor.stride(1) == 1, op, ": ", argument,
                  " must have stride 1 along dim 1");
}

double sum_of(const Tensor& weight, Dtype type) {
  double sum = 0;
  with_dtype(type, [&](auto element) {
    using R = Compute<decltype(element)>;
    const R* const values = static_cast<const R*>(weight.const_data_ptr());
    for (int64_t c = 0; c < weight.size(0); ++c) sum += values[c];
  });
  return sum;
}

CrossEntropyTask checked_task(const std::string& op, const Tensor& logits, const Tensor& targets,
                              const Tensor& shift, double temperature,
                              const std::optional<Tensor>& weight, int64_t ignore_index,
                              double label_smoothing) {
  const Dtype dtype = dtype_of(op, "logits", logits), shift_dtype = dtype_of(op, "shift", shift);
  check_rows(op, "logits", logits);
  check_rows(op, "shift", shift);
  const int64_t rows = logits.size(0), classes = logits.size(1);
  STD_TORCH_CHECK(classes >= 1, op, ": needs at least one class");
  STD_TORCH_CHECK(shift.size(0) == rows && shift.size(1) == classes, op,
                  ": shift must have the shape of logits");
  STD_TORCH_CHECK((dtype == Dtype::float64) == (shift_dtype == Dtype::float64), op,
                  ": logits and shift must both be float64, or none");
  check_vector(op, "targets", targets, torch::headeronly::ScalarType::Long, rows);
  STD_TORCH_CHECK(targets.is_contiguous(), op, ": targets must be contiguous");
  const int64_t* const classes_of = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t r = 0; r < rows; ++r)
    STD_TORCH_CHECK(
        classes_of[r] == ignore_index || (0 <= classes_of[r] && classes_of[r] < classes), op,
        ": targets[", r, "] is ", classes_of[r], ", neither a class, 0 to ", classes - 1,
        ", nor ignore_index, ", ignore_index);
  if (weight) {
    check_vector(op, "weight", *weight, compute_type(dtype), classes);
    STD_TORCH_CHECK(weight->is_contiguous(), op, ": weight must be contiguous");
  }
  return {classes,
          logits.const_data_ptr(),
          dtype,
          logits.stride(0),
          shift.const_data_ptr(),
          shift_dtype,
          shift.stride(0),
          classes_of,
          ignore_index,
          1 / temperature,
          weight ? weight->const_data_ptr() : nullptr,
          weight ? sum_of(*weight, dtype) : double(classes),
          label_smoothing};
}

int64_t work_of(const CrossEntropyTask& task) {
  return 4 * std::min<int64_t>(task.classes, 1 << 20);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> shifted_cross_entropy(Tensor logits, Tensor targets,
                                                         Tensor shift, double temperature,
                                                         std::optional<Tensor> weight,
                                                         int64_t ignore_index,
                                                         double label_smoothing) {
  const CrossEntropyTask task = checked_task("htv::shifted_cross_entropy", logits, targets, shift,
                                             temperature, weight, ignore_index, label_smoothing);
  const auto empty = [&] {
    return torch::stable::new_empty(logits, {logits.size(0)}, compute_type(task.dtype));
  };
  Tensor loss = empty(), peak = empty(), log_sum = empty();
  const CrossEntropyRows rows{loss.mutable_data_ptr(), peak.mutable_data_ptr(),
                              log_sum.mutable_data_ptr()};
  const auto kernel = HTV_PER_ISA(cross_entropy_kernel);
  parallel_chunks(logits.size(0), work_of(task), 0,
                  [&](int64_t first, int64_t last, void*) { kernel(task, rows, first, last); });
  return {loss, peak, log_sum};
}

Tensor shifted_cross_entropy_grad(Tensor grad, Tensor logits, Tensor targets, Tensor shift,
                                  double temperature, std::optional<Tensor> weight,
                                  int64_t ignore_index, double label_smoothing, Tensor peak,
                                  Tensor log_sum) {
  const std::string op = "htv::shifted_cross_entropy_grad";
  const CrossEntropyTask task =
      checked_task(op, logits, targets, shift, temperature, weight, ignore_index, label_smoothing);
  const int64_t rows = logits.size(0);
  check_vector(op, "grad", grad, compute_type(task.dtype), rows);
  check_vector(op, "peak", peak, compute_type(task.dtype), rows);
  check_vector(op, "log_sum", log_sum, compute_type(task.dtype), rows);
  STD_TORCH_CHECK(peak.is_contiguous() && log_sum.is_contiguous(), op,
                  ": peak and log_sum must be contiguous");
  Tensor grad_logits = torch::stable::new_empty(logits, {rows, task.classes});
  const CrossEntropyGrad given{grad.const_data_ptr(), grad.stride(0), peak.const_data_ptr(),
                               log_sum.const_data_ptr(), grad_logits.mutable_data_ptr()};
  const auto kernel = HTV_PER_ISA(cross_entropy_grad_kernel);
  parallel_chunks(rows, work_of(task), 0,
                  [&](int64_t first, int64_t last, void*) { kernel(task, given, first, last); });
  return grad_logits;
}

}  // namespace htv::cpu

STABLE_TORCH_LIBRARY_IMPL(htv, CPU, m) {
  m.impl("shifted_cross_entropy", TORCH_BOX(&htv::cpu::shifted_cross_entropy));
  m.impl("shifted_cross_entropy_grad", TORCH_BOX(&htv::cpu::shifted_cross_entropy_grad));
}
