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

  Answer(const Asked& asked, const Tensor& like, const std::vector<int64_t>& shape, Dtype dtype) {
    for (int f = 0; f < fields_of(asked.statistic, asked.summary); ++f)
      tensors.push_back(torch::stable::new_empty(like, shape, compute_type(dtype)));
  }
  bool empty() const { return tensors[0].numel() == 0; }
  Fields fields() {
    Fields found;
    for (size_t f = 0; f < tensors.size(); ++f) found.at[f] = tensors[f].mutable_data_ptr();
    return found;
  }
  std::tuple<Tensor, Tensor> value() const {
    return {tensors[0], sum_in_order(tensors[0], {mask_sum})};
  }
  // Total, votes, spread and logs; what is not kept has no elements.
  std::tuple<Tensor, Tensor, Tensor, Tensor> summary(const Asked& asked) const {
    const auto kept = [&](bool is) {
      return is ? tensors[2] : torch::stable::new_empty(tensors[0], {0});
    };
    return {tensors[0], tensors[1], kept(keeps_spread(asked.statistic)),
            kept(keeps_logs(asked.statistic))};
  }
};

}  // namespace htv::cpu
