// The op contract of htv/ops/schema.py, checked once for all devices.
#pragma once

#include <algorithm>
#include <string>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "dtype.h"
#include "statistic.h"

namespace htv {

using torch::stable::Tensor;

// Arithmetic of integers that callers give: what 64 bits do not hold is refused.
class Checked {
  const std::string& op_;

  int64_t held(bool overflows, int64_t result) const {
    STD_TORCH_CHECK(
        !overflows, op_,
        ": sizes, strides or paddings are too large: their product does not fit 64 bits");
    return result;
  }

 public:
  explicit Checked(const std::string& op) : op_(op) {}

  int64_t sum(int64_t a, int64_t b) const {
    int64_t result = 0;
    const bool overflows = __builtin_add_overflow(a, b, &result);
    return held(overflows, result);
  }
  int64_t product(int64_t a, int64_t b) const {
    int64_t result = 0;
    const bool overflows = __builtin_mul_overflow(a, b, &result);
    return held(overflows, result);
  }
  template <class... More>
  int64_t product(int64_t a, int64_t b, More... more) const {
    return product(product(a, b), more...);
  }
};

// Whether all elements of a tensor lie in memory it has: a storage may have been freed, or be too
// short.
inline void check_memory(const std::string& op, const char* argument, const Tensor& tensor) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), op, ": ", argument,
                  " must be dense, of strided layout");
  if (tensor.numel() == 0) return;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const Checked checked(op);
  int64_t last = tensor.storage_offset();
  for (int64_t d = 0; d < tensor.dim(); ++d)
    last = checked.sum(last, checked.product(tensor.size(d) - 1, tensor.stride(d)));
  const bool inside =
      last < bytes / int64_t(tensor.element_size()) && tensor.const_data_ptr() != nullptr;
  STD_TORCH_CHECK(inside, op, ": ", argument, " reaches beyond its storage of ", bytes,
                  " bytes: was it freed or resized?");
}

// Statistics travel by number (HTV_STATISTICS): a string argument would cost an allocation, which
// the stable ABI does not give back, at every call.
inline Statistic statistic_of(const std::string& op, int64_t number) {
  STD_TORCH_CHECK(is_statistic(number), op, ": unknown statistic ", number);
  return static_cast<Statistic>(number);
}

inline Dtype dtype_of(const std::string& op, const char* argument, const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, op, ": ", argument, " must be float64, float32, bfloat16 or float16");
  }
}

inline torch::headeronly::ScalarType compute_type(Dtype dtype) {
  return dtype == Dtype::float64 ? torch::headeronly::ScalarType::Double
                                 : torch::headeronly::ScalarType::Float;
}

inline void check_matrix(const std::string& op, const char* argument, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, op, ": ", argument, " must have 2 dimensions, got ",
                  tensor.dim());
  check_memory(op, argument, tensor);
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", argument, " must be contiguous");
}

// Statistics that ops on factors serve.
inline void check_factored(const std::string& op, Statistic statistic) {
  STD_TORCH_CHECK(statistic != Statistic::sign_agreement && statistic != Statistic::median_of_means,
                  op, ": does not serve statistic ", static_cast<int64_t>(statistic));
}

// The statistic with its integer parameter checked against the number of groups.
inline Parameters parameters_for(const std::string& op, Statistic statistic, int64_t groups,
                                 int64_t count, double votes, double k) {
  STD_TORCH_CHECK(groups >= 1, op, ": needs at least one group");
  STD_TORCH_CHECK(groups < (int64_t(1) << 31), op, ": more than 2^31 - 1 groups");
  switch (statistic) {
    case Statistic::trimmed_mean:
    case Statistic::winsorized_mean:
      STD_TORCH_CHECK(0 <= count && count <= (groups - 1) / 2, op,
                      ": count must satisfy 0 <= 2 * count < groups, got count = ", count, " of ",
                      groups, " groups");
      break;
    case Statistic::median_of_means:
      STD_TORCH_CHECK(1 <= count && count <= groups, op, ": count must be 1 to ", groups,
                      " buckets, got ", count);
      break;
    case Statistic::median:
      STD_TORCH_CHECK(-1 <= count && count <= 1, op,
                      ": count must be -1, 0 or 1 for the median, got ", count);
      break;
    default: count = std::clamp<int64_t>(count, 0, groups + 1);  // |sum of signs| lies in 0..groups
  }
  return {groups, count, votes, k};
}

// Floats, which count some votes, must hold them.
inline void check_countable(Dtype dtype, int64_t groups) {
  STD_TORCH_CHECK(dtype == Dtype::float64 || groups <= int64_t(1) << 24,
                  "votes of more than 2^24 groups are counted in float64 only, got ", groups,
                  " groups");
}

// The longest group, after checking that the groups cover the rows in order.
inline int64_t longest_group(const std::string& op, const Tensor& offsets, int64_t rows) {
  STD_TORCH_CHECK(offsets.is_cpu(), op, ": offsets must be on the CPU");
  STD_TORCH_CHECK(offsets.scalar_type() == torch::headeronly::ScalarType::Long, op,
                  ": offsets must be int64");
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) >= 2 && offsets.is_contiguous(), op,
                  ": offsets must be a contiguous vector of groups + 1 entries, at least 2");
  check_memory(op, "offsets", offsets);
  const int64_t* const at = static_cast<const int64_t*>(offsets.const_data_ptr());
  const int64_t groups = offsets.size(0) - 1;
  STD_TORCH_CHECK(at[0] == 0 && at[groups] == rows, op,
                  ": offsets must run from 0 to the number of rows, ", rows, "; got ", at[0],
                  " to ", at[groups]);
  int64_t longest = 0;
  for (int64_t e = 0; e < groups; ++e) {
    STD_TORCH_CHECK(at[e] <= at[e + 1], op, ": offsets must not decrease, as they do after entry ",
                    e);
    longest = std::max(longest, at[e + 1] - at[e]);
  }
  return longest;
}

}  // namespace htv
