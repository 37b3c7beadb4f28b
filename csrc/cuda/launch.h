// What every op does around its kernels.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../op_checks.h"
#include "device.h"

#if !defined(HTV_EMULATED)
// Weak: it lives in torch's CUDA library, and this file must also load beside a torch without one.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);
#endif

namespace htv::cuda {

// Makes a tensor's device the current one, and finds the stream torch works on there.
class OnDevice {
#if defined(HTV_EMULATED)
 public:
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
#else
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;

 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }
#endif
};

constexpr int64_t blocks_for(int64_t items, int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

// ---- sums in a fixed order ----

// The sum over a block of some warps; the result is thread 0's.
template <int threads>
__device__ double block_sum(double term) {
  __shared__ double terms[threads];
  terms[threadIdx.x] = term;
  for (int half = threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) terms[threadIdx.x] += terms[threadIdx.x + half];
  }
  return terms[0];
}

constexpr int kSumThreads = 1024;

template <int threads = kSumThreads>
__global__ void __launch_bounds__(threads)
    sum_parts(const double* parts, int64_t n, double* total) {
  double mine = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < n; i += threads) mine += parts[i];
  const double sum = block_sum<threads>(mine);
  if (threadIdx.x == 0) *total = sum;
}

// A mask's sum, added up by blocks first: `parts` has a place for each of them, or none where there
// is no mask.
class PartialMaskSums {
  Tensor parts_, total_;
  int64_t blocks_;

 public:
  PartialMaskSums(const Tensor& like, int64_t blocks)
      : parts_(torch::stable::new_empty(like, {blocks}, torch::headeronly::ScalarType::Double)),
        total_(torch::stable::new_zeros(like, {}, torch::headeronly::ScalarType::Double)),
        blocks_(blocks) {}

  double* parts() { return static_cast<double*>(parts_.mutable_data_ptr()); }
  Tensor total(cudaStream_t stream) {
    if (blocks_ > 0)
      launch(sum_parts<>, 1, kSumThreads, 0, stream, parts(), blocks_,
             static_cast<double*>(total_.mutable_data_ptr()));
    return total_;
  }
};

}  // namespace htv::cuda
