// htv::norm_sums and htv::group_norm_backward on the CPU: checks and threads. The loops are in
// norm_kernel.cpp.
#include "norm_kernel.h"

#include <torch/csrc/stable/library.h>
#include <tuple>
#include <vector>

#include "../op_checks.h"
#include "parallel.h"

namespace htv::cpu {
namespace {

void check_like(const std::string& op, const char* argument, const Tensor& tensor, Dtype dtype,
                const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(tensor.is_cpu() && dtype_of(op, argument, tensor) == dtype, op, ": ", argument,
                  " must be on the CPU, in the type the contract says");
  check_memory(op, argument, tensor);
  STD_TORCH_CHECK(tensor.dim() == dims && tensor.is_contiguous(), op, ": ", argument, " must have ",
                  dims, " dimensions and be contiguous");
  for (int64_t d = 0; d < dims; ++d)
    STD_TORCH_CHECK(tensor.size(d) == x.size(d), op, ": ", argument,
                    " must have the shape of x, or its first ", dims, " dims; in dim ", d,
                    " it has ", tensor.size(d), " and x ", x.size(d));
}

}  // namespace

std::tuple<Tensor, Tensor> norm_sums(Tensor grad, Tensor x, Tensor mean, Tensor rstd) {
  const std::string op = "htv::norm_sums";
  const Dtype dtype = dtype_of(op, "x", x), computed = compute_dtype(dtype);
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must have 3 dimensions, got ", x.dim());
  check_like(op, "x", x, dtype, x, 3);
  check_like(op, "grad", grad, dtype, x, 3);
  check_like(op, "mean", mean, computed, x, 2);
  check_like(op, "rstd", rstd, computed, x, 2);
  const int64_t samples = x.size(0), rows = x.size(1), features = x.size(2),
                chunks = norm_chunks(features);
  Tensor scale = torch::stable::new_empty(mean, {samples, features});
  Tensor shift = torch::stable::new_empty(mean, {samples, features});
  if (scale.numel() == 0) return {scale, shift};
  const NormTask task{grad.const_data_ptr(),
                      x.const_data_ptr(),
                      dtype,
                      rows,
                      features,
                      mean.const_data_ptr(),
                      rstd.const_data_ptr(),
                      scale.mutable_data_ptr(),
                      shift.mutable_data_ptr()};
  const auto kernel = HTV_PER_ISA(norm_kernel);
  const int64_t work = (rows + 1) * (features < kNormChunk ? features : kNormChunk);
  parallel_chunks(samples * chunks, work, 0,
                  [&](int64_t first, int64_t last, void*) { kernel(task, first, last); });
  return {scale, shift};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_backward(Tensor grad, Tensor x, Tensor weight,
                                                       Tensor mean, Tensor rstd, bool needs_x) {
  const std::string op = "htv::group_norm_backward";
  const Dtype dtype = dtype_of(op, "x", x), computed = compute_dtype(dtype);
  STD_TORCH_CHECK(x.dim() >= 2, op, ": x must have at least 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(mean.dim() == 2, op, ": mean must have 2 dimensions, got ", mean.dim());
  check_like(op, "x", x, dtype, x, x.dim());
  check_like(op, "grad", grad, dtype, x, x.dim());
  check_like(op, "mean", mean, computed, mean, 2);
  check_like(op, "rstd", rstd, computed, mean, 2);
  check_like(op, "weight", weight, computed, weight, 1);
  const int64_t samples = x.size(0), channels = x.size(1), groups = mean.size(1);
  int64_t space = 1;
  std::vector<int64_t> shape{needs_x ? samples : 0, channels};
  for (int64_t d = 2; d < x.dim(); ++d) {
    shape.push_back(x.size(d));
    space = Checked(op).product(space, x.size(d));
  }
  STD_TORCH_CHECK(mean.size(0) == samples && weight.size(0) == channels && groups >= 1 &&
                      channels % groups == 0,
                  op,
                  ": mean must be (samples, groups) and weight (channels) of x,"
                  " with channels a multiple of groups; ",
                  "got ", mean.size(0), " x ", groups, " and ", weight.size(0), " for ", samples,
                  " x ", channels);
  Tensor scale = torch::stable::new_empty(mean, {samples, channels});
  Tensor shift = torch::stable::new_empty(mean, {samples, channels});
  Tensor grad_x = torch::stable::new_empty(mean, shape);
  if (scale.numel() == 0) return {grad_x, scale, shift};
  const GroupNormTask task{grad.const_data_ptr(),
                           x.const_data_ptr(),
                           dtype,
                           groups,
                           channels / groups,
                           space,
                           weight.const_data_ptr(),
                           mean.const_data_ptr(),
                           rstd.const_data_ptr(),
                           needs_x ? grad_x.mutable_data_ptr() : nullptr,
                           scale.mutable_data_ptr(),
                           shift.mutable_data_ptr()};
  const auto kernel = HTV_PER_ISA(group_norm_kernel);
  const int64_t scratch = group_norm_scratch(task);
  parallel_chunks(
      samples * groups, 2 * (task.channels * space + task.channels), scratch,
      [&](int64_t first, int64_t last, void* memory) { kernel(task, first, last, memory); });
  return {grad_x, scale, shift};
}

}  // namespace htv::cpu

STABLE_TORCH_LIBRARY_IMPL(htv, CPU, m) {
  m.impl("norm_sums", TORCH_BOX(&htv::cpu::norm_sums));
  m.impl("group_norm_backward", TORCH_BOX(&htv::cpu::group_norm_backward));
}
