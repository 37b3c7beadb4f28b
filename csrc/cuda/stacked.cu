// htv::stacked on CUDA: one thread per coordinate, neighbouring threads on neighbouring coordinates.
//
// Streaming statistics pass once over the groups. Order statistics sort few values in registers; of many, they search
// the value of a rank bit by bit, counting smaller values in a pass over the groups per bit.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <tuple>

#include "../contract.h"

// Weak: it lives in torch's CUDA library, and this file must also load beside a torch without one.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace htv::cuda {
namespace {

using namespace htv::generic;

constexpr int kThreads = 256;

struct StackedTask {
  const void* grads;  // (groups, coordinates)
  int64_t coordinates;
  Statistic statistic;
  Parameters parameters;
  void* value;        // (coordinates)
  double* mask_sums;  // one per block
};

__device__ __forceinline__ double load(const double* from) { return __ldg(from); }
__device__ __forceinline__ float load(const float* from) { return __ldg(from); }
__device__ __forceinline__ float load(const BFloat16* from) {
  return __uint_as_float(uint32_t(__ldg(&from->bits)) << 16);
}
__device__ __forceinline__ float load(const Float16* from) {
  return __half2float(__ushort_as_half(__ldg(&from->bits)));
}

// The sum over a block in a fixed order; the result is thread 0's.
__device__ double block_sum(double term) {
  __shared__ double terms[kThreads];
  terms[threadIdx.x] = term;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) terms[threadIdx.x] += terms[threadIdx.x + half];
  }
  return terms[0];
}

// ---- streaming ----

template <class State, class V, class T>
__global__ void __launch_bounds__(kThreads) streaming(StackedTask task) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  double mask = 0;
  if (at < task.coordinates) {
    const T* grads = static_cast<const T*>(task.grads) + at;
    State state{};
#pragma unroll 8
    for (int64_t e = 0; e < task.parameters.groups; ++e) state.update(load(grads + e * task.coordinates), e + 1);
    const Outcome<V> outcome = state.finalize(task.parameters);
    static_cast<V*>(task.value)[at] = outcome.value;
    mask = outcome.mask;
  }
  if constexpr (State::masks) {
    const double sum = block_sum(mask);
    if (threadIdx.x == 0) task.mask_sums[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) sum_in_order(const double* parts, int64_t n, double* total) {
  double mine = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) mine += parts[i];
  const double sum = block_sum(mine);
  if (threadIdx.x == 0) *total = sum;
}

// ---- order: on integer keys that compare as the values do, NaN above all ----

template <class V>
struct Keys {
  using Key = typename Lane<V>::Int;
  static constexpr Key kLargest = sizeof(Key) == 4 ? Key(0x7fffffff) : Key(0x7fffffffffffffff);

  __device__ static Key of(V v) {
    const Key bits = Lane<V>::bits(v == v ? v : V(NAN)) & (v == v ? Key(-1) : kLargest);
    return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & kLargest);
  }
  __device__ static V value(Key key) { return Lane<V>::from_bits(key ^ ((key >> (8 * sizeof(Key) - 1)) & kLargest)); }
};

// What is ranked at one coordinate: the i-th of `size` values. They set `nan` if a contribution is NaN.
template <class T>
struct Groups {
  using V = Compute<T>;
  const T* grads;
  int64_t stride, size;

  __device__ Groups(const StackedTask& task, int64_t at)
      : grads(static_cast<const T*>(task.grads) + at), stride(task.coordinates), size(task.parameters.groups) {}

  __device__ __forceinline__ V operator()(int64_t i, bool& nan) const {
    const V v = load(grads + i * stride);
    nan |= v != v;
    return v;
  }
};

template <class T>
struct BucketMeans {
  using V = Compute<T>;
  const T* grads;
  int64_t stride, size, shorter, longer;  // the first `longer` buckets have one group more than `shorter`

  __device__ BucketMeans(const StackedTask& task, int64_t at)
      : grads(static_cast<const T*>(task.grads) + at),
        stride(task.coordinates),
        size(task.parameters.count),
        shorter(task.parameters.groups / size),
        longer(task.parameters.groups % size) {}

  __device__ V operator()(int64_t i, bool& nan) const {
    const int64_t groups = shorter + (i < longer);
    const T* row = grads + (i * shorter + min(i, longer)) * stride;
    V sum{};
    for (int64_t e = 0; e < groups; ++e, row += stride) {
      const V v = load(row);
      nan |= v != v;
      sum += v;
    }
    return sum / V(groups);
  }
};

// Bitonic sort of N (a power of two) keys; every index is known to the compiler, so they stay in registers.
template <int N, class Key>
__device__ __forceinline__ void sort(Key (&keys)[N]) {
#pragma unroll
  for (int run = 2; run <= N; run *= 2)
#pragma unroll
    for (int distance = run / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < N; ++i)
        if ((i & distance) == 0) {
          const Key a = keys[i], b = keys[i + distance];
          const bool ascending = (i & run) == 0;
          keys[i] = ascending ? min(a, b) : max(a, b);
          keys[i + distance] = ascending ? max(a, b) : min(a, b);
        }
}

template <int N, class Values>
__global__ void __launch_bounds__(kThreads) order_in_registers(StackedTask task) {
  using V = typename Values::V;
  using K = Keys<V>;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= task.coordinates) return;
  const Values values(task, at);
  bool nan = false;
  typename K::Key keys[N];
#pragma unroll
  for (int i = 0; i < N; ++i) keys[i] = i < values.size ? K::of(values(i, nan)) : K::kLargest;
  sort(keys);
  V sorted[N];  // read at ranks unknown to the compiler: in local memory
#pragma unroll
  for (int i = 0; i < N; ++i) sorted[i] = K::value(keys[i]);
  const V value = order_statistic<V>(task.statistic, [&](int64_t r) { return sorted[r]; }, task.parameters);
  static_cast<V*>(task.value)[at] = nan ? V(NAN) : value;
}

// The largest key that at most `rank` keys are smaller than is the key of that rank.
template <class Values, class V = typename Values::V>
__device__ __noinline__ V search(const Values& values, int64_t rank) {
  using K = Keys<V>;
  using Key = typename K::Key;
  bool nan = false;
  Key found = -K::kLargest - 1;
  for (int bit = 8 * sizeof(Key) - 1; bit >= 0; --bit) {
    const Key candidate = found ^ (Key(1) << bit);  // the first step clears the sign bit, the others set theirs
    int64_t smaller = 0;
    for (int64_t i = 0; i < values.size; ++i) smaller += K::of(values(i, nan)) < candidate;
    if (smaller <= rank) found = candidate;
  }
  return K::value(found);
}

// Ranks count to n - 1 - count, given the values of the first and the last of them.
template <class Values, class V = typename Values::V>
__device__ V inner_sum_between(const Values& values, V low, V high, int64_t count) {
  if (low == high) return V(values.size - 2 * count) * low;
  bool nan = false;
  V inside{};
  int64_t lows = -count, highs = -count;
  for (int64_t i = 0; i < values.size; ++i) {
    const V v = values(i, nan);
    lows += v <= low;
    highs += v >= high;
    if (low < v && v < high) inside += v;
  }
  return inside + (V(lows) * low + V(highs) * high);
}

template <class Values>
__global__ void __launch_bounds__(kThreads) order_by_search(StackedTask task) {
  using V = typename Values::V;
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= task.coordinates) return;
  const Parameters& p = task.parameters;
  const Values values(task, at);
  bool nan = false;
  for (int64_t i = 0; i < values.size; ++i) values(i, nan);
  V value;
  if (task.statistic == Statistic::trimmed_mean || task.statistic == Statistic::winsorized_mean) {
    const V low = search(values, p.count), high = search(values, p.groups - 1 - p.count);
    const V inner = inner_sum_between(values, low, high, p.count);
    value = task.statistic == Statistic::trimmed_mean ? trimmed_mean(inner, p.groups, p.count)
                                                      : winsorized_mean(inner, low, high, p.groups, p.count);
  } else {
    value = order_statistic<V>(task.statistic, [&](int64_t r) { return search(values, r); }, p);
  }
  static_cast<V*>(task.value)[at] = nan ? V(NAN) : value;
}

template <class T>
void launch(const StackedTask& task, unsigned blocks, cudaStream_t stream) {
  using V = Compute<T>;
  const bool is_streaming = with_streaming<V>(task.statistic, [&](auto state) {
    streaming<decltype(state), V, T><<<blocks, kThreads, 0, stream>>>(task);
  });
  if (is_streaming) return;
  const bool buckets = task.statistic == Statistic::median_of_means;
  const int64_t ranked = buckets ? task.parameters.count : task.parameters.groups;
  const auto kernel = buckets ? (ranked <= 8 ? order_in_registers<8, BucketMeans<T>> : order_by_search<BucketMeans<T>>)
                      : ranked <= 8  ? order_in_registers<8, Groups<T>>
                      : ranked <= 32 ? order_in_registers<32, Groups<T>>
                      : ranked <= 64 ? order_in_registers<64, Groups<T>>
                                     : order_by_search<Groups<T>>;
  kernel<<<blocks, kThreads, 0, stream>>>(task);
}

std::tuple<Tensor, Tensor> stacked(Tensor grads, int64_t code, int64_t count, double votes, double k) {
  const std::string op = "htv::stacked";
  check_matrix(op, "grads", grads);
  const Statistic statistic = statistic_of(op, code);
  const Dtype dtype = dtype_of(op, "grads", grads);
  const Parameters parameters = parameters_for(op, statistic, grads.size(0), count, votes, k);
  const int64_t coordinates = grads.size(1), blocks = (coordinates + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), op, ": too many coordinates, ", coordinates);

  const torch::stable::accelerator::DeviceGuard guard(grads.get_device_index());
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(grads.get_device_index(), &current));
  const cudaStream_t stream = static_cast<cudaStream_t>(current);

  constexpr auto real64 = torch::headeronly::ScalarType::Double;
  const bool masks = statistic == Statistic::and_mask || statistic == Statistic::xor_mask ||
                     statistic == Statistic::geometric_mean || statistic == Statistic::sand_mask;
  Tensor value = torch::stable::new_empty(grads, {coordinates}, compute_type(dtype));
  Tensor mask_sum = torch::stable::new_empty(grads, {}, real64);
  Tensor parts = torch::stable::new_empty(grads, {masks ? blocks : 0}, real64);
  const StackedTask task{grads.const_data_ptr(),
                         coordinates,
                         statistic,
                         parameters,
                         value.mutable_data_ptr(),
                         static_cast<double*>(parts.mutable_data_ptr())};
  if (blocks > 0)
    with_dtype(dtype, [&](auto element) { launch<decltype(element)>(task, unsigned(blocks), stream); });
  sum_in_order<<<1, kThreads, 0, stream>>>(task.mask_sums, masks ? blocks : 0,
                                           static_cast<double*>(mask_sum.mutable_data_ptr()));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
  return {value, mask_sum};
}

}  // namespace
}  // namespace htv::cuda

STABLE_TORCH_LIBRARY_IMPL(htv, CUDA, m) { m.impl("stacked", TORCH_BOX(&htv::cuda::stacked)); }
