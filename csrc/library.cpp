// Registers the CPU kernels for the ops that htv/ops/schema.py declares. Load after it.
#include <optional>
#include <torch/csrc/stable/library.h>
#include <tuple>
#include <vector>

#include "op_checks.h"

namespace htv::cpu {
std::tuple<Tensor, Tensor> stacked(Tensor grads, int64_t statistic, int64_t count, double votes, double k);
std::tuple<Tensor, Tensor> linear(Tensor x, Tensor grad_output, Tensor offsets, int64_t statistic, int64_t count,
                                  double votes, double k);
std::tuple<Tensor, Tensor> norm_sums(Tensor grad, Tensor x, Tensor mean, Tensor rstd);
std::tuple<Tensor, Tensor, Tensor> group_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd,
                                                       bool needs_x);
std::tuple<Tensor, Tensor> conv(Tensor x, Tensor grad_output, Tensor offsets, std::vector<int64_t> kernel,
                                std::vector<int64_t> stride, std::vector<int64_t> padding,
                                std::vector<int64_t> dilation, int64_t conv_groups, int64_t statistic, int64_t count,
                                double votes, double k);
std::tuple<Tensor, Tensor> embedding(Tensor grad_output, Tensor ids, Tensor voter, int64_t num_embeddings,
                                     int64_t groups, int64_t statistic, int64_t count, double votes, double k);
std::tuple<Tensor, Tensor, Tensor> shifted_cross_entropy(Tensor logits, Tensor targets, Tensor shift,
                                                         double temperature, std::optional<Tensor> weight,
                                                         int64_t ignore_index, double label_smoothing);
Tensor shifted_cross_entropy_grad(Tensor grad, Tensor logits, Tensor targets, Tensor shift, double temperature,
                                  std::optional<Tensor> weight, int64_t ignore_index, double label_smoothing,
                                  Tensor peak, Tensor log_sum);
}  // namespace htv::cpu

// The statistics this library was built with, "mean=0 and_mask=1 ...", each once, by single spaces. To
// be read and compared by whoever passes numbers to the ops; lives as long as the library.
extern "C" __attribute__((visibility("default"))) const char* htv_statistics() {
#define HTV_USE(name, number, kind) " " #name "=" #number
  static const char table[] = HTV_STATISTICS(HTV_USE);
#undef HTV_USE
  return table + 1;  // without the first space
}

STABLE_TORCH_LIBRARY_IMPL(htv, CPU, m) {
  m.impl("stacked", TORCH_BOX(&htv::cpu::stacked));
  m.impl("norm_sums", TORCH_BOX(&htv::cpu::norm_sums));
  m.impl("group_norm_backward", TORCH_BOX(&htv::cpu::group_norm_backward));
  m.impl("linear", TORCH_BOX(&htv::cpu::linear));
  m.impl("conv", TORCH_BOX(&htv::cpu::conv));
  m.impl("embedding", TORCH_BOX(&htv::cpu::embedding));
  m.impl("shifted_cross_entropy", TORCH_BOX(&htv::cpu::shifted_cross_entropy));
  m.impl("shifted_cross_entropy_grad", TORCH_BOX(&htv::cpu::shifted_cross_entropy_grad));
}
