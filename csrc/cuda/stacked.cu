// htv::stacked on CUDA: checks, and what comes around the kernels of stacked_kernel.cu.
#include "stacked.h"

#include <string>
#include <tuple>

#include "launch.h"
#include "ops.h"

namespace htv::cuda {

std::tuple<Tensor, Tensor> stacked(Tensor grads, int64_t code, int64_t count, double votes,
                                   double k) {
  const std::string op = "htv::stacked";
  check_matrix(op, "grads", grads);
  const Statistic statistic = statistic_of(op, code);
  const Dtype dtype = dtype_of(op, "grads", grads);
  const Parameters parameters = parameters_for(op, statistic, grads.size(0), count, votes, k);
  const int64_t coordinates = grads.size(1);
  const OnDevice device(grads);
  Tensor value = torch::stable::new_empty(grads, {coordinates}, compute_type(dtype));
  StackedTask task{grads.const_data_ptr(),   coordinates, statistic, parameters,
                   value.mutable_data_ptr(), nullptr,     0,         0};
  if (statistic == Statistic::median_of_means)
    task.bucket = parameters.groups / parameters.count,
    task.longer = parameters.groups % parameters.count;
  Tensor mask_sum;
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    PartialMaskSums mask(grads, stacked_mask_parts<T>(task));
    task.mask_sums = mask.parts();
    if (coordinates > 0) run_stacked<T>(task, device.stream());
    mask_sum = mask.total(device.stream());
  });
  return {value, mask_sum};
}

}  // namespace htv::cuda
