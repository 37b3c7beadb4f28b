// What kernels ask of the device beyond CUDA C++: instructions without an operator, asynchronous
// copies, launches. Not everybody has a GPU: tests/cuda/emulator.h says the same for the CPU, so
// that tests run kernels as they stand.
#pragma once

#if defined(HTV_EMULATED)
#include "emulator.h"
#else

#include <cuda_runtime.h>
#include <stdint.h>

#include <torch/headeronly/util/Exception.h>

namespace htv::cuda {

// Shared memory whose size the launch says.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

// ---- numbers ----

// Minimum and maximum that are NaN if either is.
#define HTV_BINARY(name, type, letter, instruction)                              \
  __device__ __forceinline__ type name(type a, type b) {                         \
    type result;                                                                 \
    asm(instruction " %0, %1, %2;" : "=" letter(result) : letter(a), letter(b)); \
    return result;                                                               \
  }
HTV_BINARY(min_nan, float, "f", "min.NaN.f32")
HTV_BINARY(max_nan, float, "f", "max.NaN.f32")
HTV_BINARY(min_nan_f16x2, uint32_t, "r", "min.NaN.f16x2")
HTV_BINARY(max_nan_f16x2, uint32_t, "r", "max.NaN.f16x2")
HTV_BINARY(min_nan_bf16x2, uint32_t, "r", "min.NaN.bf16x2")
HTV_BINARY(max_nan_bf16x2, uint32_t, "r", "max.NaN.bf16x2")
#undef HTV_BINARY

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
  return result;
}
__device__ __forceinline__ float bfloat_to_float(uint16_t bits) {
  return __uint_as_float(uint32_t(bits) << 16);
}

// ---- matrices of signs ----

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(at));
}

// Four matrices of 8 rows of 16 bytes: lane 8 j + r names row r of matrix j, and gets word lane % 4
// of row lane / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(row)));
}

// sums (16 x 8, int32) += a (16 x 32, int8) b (32 x 8, int8), spread over the lanes as mma.m16n8k32
// says.
__device__ __forceinline__ void multiply_signs(int32_t (&sums)[4], const uint32_t (&a)[4],
                                               const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- copies of 16 bytes to shared memory, in groups ----

__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits for this thread's copies but those of the last `pending` groups.
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- launches ----

// The bytes of shared memory a block may have on the current device.
inline int64_t most_shared_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  const cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  STD_TORCH_CHECK(error == cudaSuccess, "htv: ", cudaGetErrorString(error));
  return bytes;
}

// Raises if the launch was refused; never waits for the kernel.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), "htv: a CUDA kernel would need ", blocks,
                  " blocks, more than 2^31 - 1");
  if (shared_bytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    STD_TORCH_CHECK(error == cudaSuccess, "htv: ", cudaGetErrorString(error));
  }
  kernel<<<unsigned(blocks), threads, shared_bytes, stream>>>(
      static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess,
                  "htv: a CUDA kernel was not launched: ", cudaGetErrorString(error));
}

}  // namespace htv::cuda

#endif
