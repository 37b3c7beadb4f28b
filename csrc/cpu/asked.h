// What an op is asked for, and what it answers: the value of a statistic and the sum of its mask,
// or a summary of contributions.
#pragma once

#include <cfloat>
#include <cmath>
#include <tuple>
#include <vector>

#include "parallel.h"
#include "summary.h"

namespace htv::cpu {

struct Asked {
  Statistic statistic;
  bool summary;
  Parameters parameters;  // groups are still to be set

  static Asked value(const std::string& op, int64_t code, int64_t count, double votes, double k) {
    return {statistic_of(op, code), false, {0, count, votes, k}};
  }
  static Asked of_summary(const std::string& op, int64_t code, double log_offset) {
    const Statistic statistic = statistic_of(op, code);
    STD_TORCH_CHECK(!is_order(statistic), op, ": there is no summary for statistic ", code);
    STD_TORCH_CHECK(log_offset >= FLT_MIN && std::isfinite(log_offset), op,
                    ": log_offset must be finite and at least ", FLT_MIN, ", got ", log_offset);
    return {statistic, true, {0, 0, 0, 0, log_offset}};
  }
  Parameters of(const std::string& op, int64_t groups) const {
    Parameters checked =
        parameters_for(op, statistic, groups, parameters.count, parameters.votes, parameters.k);
    checked.log_offset = parameters.log_offset;
    return checked;
  }
};

struct Answer {
  std::vector<Tensor> tensors;  // by field
  double mask_sum = 0;

  Answer(const Asked& asked, const std::vector<int64_t>& shape, Dtype dtype) {
    for (int f = 0; f < fields_of(asked.statistic, asked.summary); ++f)
      tensors.push_back(new_tensor(shape, compute_type(dtype)));
  }
  bool empty() const { return tensors[0].numel() == 0; }
  Fields fields() {
    Fields found;
    for (size_t f = 0; f < tensors.size(); ++f) found.at[f] = tensors[f].mutable_data_ptr();
    return found;
  }
  std::tuple<Tensor, Tensor> value() const { return {tensors[0], sum_in_order({mask_sum})}; }
  // Total, votes, spread and logs; what is not kept has no elements.
  std::tuple<Tensor, Tensor, Tensor, Tensor> summary(const Asked& asked) const {
    const auto kept = [&](bool is) {
      return is ? tensors[2] : new_tensor({0}, tensors[0].scalar_type());
    };
    return {tensors[0], tensors[1], kept(keeps_spread(asked.statistic)),
            kept(keeps_logs(asked.statistic))};
  }
};

// What htv::stacked and htv::linear answer, and their summaries.
Answer stacked_answer(const std::string& op, const Tensor& grads, const Asked& asked);
Answer linear_answer(const std::string& op, const Tensor& x, const Tensor& grad_output,
                     const Tensor& offsets, const Asked& asked);

}  // namespace htv::cpu
