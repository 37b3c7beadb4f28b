// htv::norm_sums on the CPU: checks and threads. The loops are in norm_kernel.cpp.
#include "norm_kernel.h"

#include <tuple>

#include "../contract.h"
#include "parallel.h"

namespace htv::cpu {
namespace {

void check_like(const std::string& op, const char* argument, const Tensor& tensor, Dtype dtype, const Tensor& x,
                int64_t dims) {
  STD_TORCH_CHECK(tensor.is_cpu() && dtype_of(op, argument, tensor) == dtype, op, ": ", argument,
                  " must be on the CPU, in the type the contract says");
  STD_TORCH_CHECK(tensor.dim() == dims && tensor.is_contiguous(), op, ": ", argument, " must have ", dims,
                  " dimensions and be contiguous");
  for (int64_t d = 0; d < dims; ++d)
    STD_TORCH_CHECK(tensor.size(d) == x.size(d), op, ": ", argument, " must have the shape of x, or its first ", dims,
                    " dims; in dim ", d, " it has ", tensor.size(d), " and x ", x.size(d));
}

}  // namespace

std::tuple<Tensor, Tensor> norm_sums(Tensor grad, Tensor x, Tensor mean, Tensor rstd) {
  const std::string op = "htv::norm_sums";
  const Dtype dtype = dtype_of(op, "x", x), computed = dtype == Dtype::float64 ? dtype : Dtype::float32;
  STD_TORCH_CHECK(x.dim() == 3, op, ": x must have 3 dimensions, got ", x.dim());
  check_like(op, "x", x, dtype, x, 3);
  check_like(op, "grad", grad, dtype, x, 3);
  check_like(op, "mean", mean, computed, x, 2);
  check_like(op, "rstd", rstd, computed, x, 2);
  const int64_t samples = x.size(0), rows = x.size(1), features = x.size(2), chunks = norm_chunks(features);
  Tensor scale = torch::stable::new_empty(mean, {samples, features});
  Tensor shift = torch::stable::new_empty(mean, {samples, features});
  const NormTask task{grad.const_data_ptr(), x.const_data_ptr(),       dtype,
                      rows,                  features,                 mean.const_data_ptr(),
                      rstd.const_data_ptr(), scale.mutable_data_ptr(), shift.mutable_data_ptr()};
  const auto kernel = HTV_PER_LEVEL(norm_kernel);
  const int64_t work = (rows + 1) * (features < kNormChunk ? features : kNormChunk);
  parallel_chunks(samples * chunks, work, 0, [&](int64_t first, int64_t last, void*) { kernel(task, first, last); });
  return {scale, shift};
}

}  // namespace htv::cpu
