// The CUDA ops on the CPU, for tests: their sources compiled with the emulator, and registered by
// another name.
#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"

STABLE_TORCH_LIBRARY(htv_emulated, m) {
  m.def(
      "stacked(Tensor grads, int statistic, int count, float votes, float k) -> (Tensor, Tensor)");
  m.def(
      "linear(Tensor x, Tensor grad_output, Tensor offsets, int statistic, int count, float votes,"
      " float k)"
      " -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(htv_emulated, CPU, m) {
  m.impl("stacked", TORCH_BOX(&htv::cuda::stacked));
  m.impl("linear", TORCH_BOX(&htv::cuda::linear));
}
