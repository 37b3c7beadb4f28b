// Registers the CUDA kernels for the ops that htv/ops/schema.py declares.
#include <torch/csrc/stable/library.h>

#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(htv, CUDA, m) {
  m.impl("stacked", TORCH_BOX(&htv::cuda::stacked));
  m.impl("linear", TORCH_BOX(&htv::cuda::linear));
}
