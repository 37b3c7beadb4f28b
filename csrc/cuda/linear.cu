// htv::linear on CUDA, where no group has more than one row: checks, and what comes around the
// kernels of linear_kernel.cu.
#include "linear.h"

#include <array>
#include <string>
#include <tuple>

#include "launch.h"
#include "ops.h"

namespace htv::cuda {
namespace {

using torch::headeronly::ScalarType;

// The plain sum of contributions, by torch's own product, in the type that is computed with.
Tensor add_up(const Tensor& x, const Tensor& grad_output, Dtype dtype) {
  const Tensor transposed = torch::stable::transpose(grad_output, 0, 1);
#if !defined(HTV_EMULATED)  // torch has this one for CUDA only
  if (dtype == Dtype::bfloat16 || dtype == Dtype::float16) {
    std::array<StableIValue, 3> stack{torch::stable::detail::from(transposed),
                                      torch::stable::detail::from(x),
                                      torch::stable::detail::from(ScalarType::Float)};
    TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
#endif
  const auto computed = [&](const Tensor& t) { return torch::stable::to(t, compute_type(dtype)); };
  return torch::stable::matmul(computed(transposed), computed(x));
}

// A sign matrix and the memory it lies in.
struct Signs {
  Tensor signs, columns;
  SignMatrix matrix;

  Signs(const Tensor& of, Dtype dtype, cudaStream_t stream) {
    const int64_t width = padded(of.size(1), kSignTile), depth = padded(of.size(0), kSignDepth);
    const int64_t column_bytes =
        dtype == Dtype::float64 ? sizeof(Column<double>) : sizeof(Column<float>);
    signs = torch::stable::new_empty(of, {width, depth}, ScalarType::Char);
    columns = torch::stable::new_empty(of, {width, column_bytes}, ScalarType::Char);
    matrix = {static_cast<int8_t*>(signs.mutable_data_ptr()), columns.mutable_data_ptr(), width,
              depth};
    with_dtype(dtype, [&](auto element) {
      pack_signs<decltype(element)>(of.const_data_ptr(), of.size(0), of.size(1), matrix, stream);
    });
  }
};

}  // namespace

std::tuple<Tensor, Tensor> linear(Tensor x, Tensor grad_output, Tensor offsets, int64_t code,
                                  int64_t count, double votes, double k) {
  const std::string op = "htv::linear";
  check_matrix(op, "x", x);
  check_matrix(op, "grad_output", grad_output);
  STD_TORCH_CHECK(grad_output.device() == x.device(), op,
                  ": x and grad_output must be on one device");
  const Statistic statistic = statistic_of(op, code);
  STD_TORCH_CHECK(statistic == Statistic::mean || statistic == Statistic::and_mask ||
                      statistic == Statistic::xor_mask || statistic == Statistic::sign_sum ||
                      (is_order(statistic) && statistic != Statistic::median_of_means),
                  op, ": CUDA does not serve statistic ", code);
  Dtype dtype = dtype_of(op, "x", x);
  STD_TORCH_CHECK(dtype_of(op, "grad_output", grad_output) == dtype, op,
                  ": x and grad_output must have one dtype");
  const int64_t rows = x.size(0), in = x.size(1), out = grad_output.size(1);
  STD_TORCH_CHECK(grad_output.size(0) == rows, op, ": x has ", rows, " rows, grad_output ",
                  grad_output.size(0));
  STD_TORCH_CHECK(longest_group(op, offsets, rows) <= 1, op,
                  ": CUDA serves groups of at most one row");
  const Parameters parameters = parameters_for(op, statistic, offsets.size(0) - 1, count, votes, k);

  const OnDevice device(x);
  const cudaStream_t stream = device.stream();
  const bool ranks = is_order(statistic);
  if (ranks && compute_type(dtype) == ScalarType::Float && dtype != Dtype::float32) {
    dtype = Dtype::float32;
    x = torch::stable::to(x, ScalarType::Float);
    grad_output = torch::stable::to(grad_output, ScalarType::Float);
  }
  const bool sums = !ranks && statistic != Statistic::sign_sum;
  Tensor value = sums ? add_up(x, grad_output, dtype)
                      : torch::stable::new_empty(x, {out, in}, compute_type(dtype));
  STD_TORCH_CHECK(value.is_contiguous(), op, ": torch's product is not contiguous");
  if (statistic == Statistic::mean || value.numel() == 0)
    return {value, PartialMaskSums(x, 0).total(stream)};

  const Signs of_x(x, dtype, stream), of_g(grad_output, dtype, stream);
  LinearTask task{x.const_data_ptr(),
                  grad_output.const_data_ptr(),
                  rows,
                  in,
                  out,
                  statistic,
                  parameters,
                  of_x.matrix,
                  of_g.matrix,
                  value.mutable_data_ptr(),
                  nullptr};
  PartialMaskSums mask(x, has_mask(statistic) ? task.tiles() : 0);
  task.mask_sums = mask.parts();
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if (ranks) rank_products<T>(task, stream);
    else apply_votes<T>(task, stream);
  });
  return {value, mask.total(stream)};
}

}  // namespace htv::cuda
