// The stacked op's kernels for one element type, HTV_ELEMENT: this file is compiled once for each.
//
// Neighbouring threads work on neighbouring coordinates, each on as many as 16 bytes hold.
//
//     streaming statistics   one pass over the groups, states in registers
//     few values             networks in registers (rank_by_network.h); all values of a thread are
//                            read at once
//     more                   the values of some coordinates wait in shared memory while a warp
//                            counts through those of one (rank_by_counting.h)
//     more than fit there    the same by a thread for each coordinate, which reads them again in
//                            every pass
#include <string.h>

#include "counting_kernels.h"
#include "launch.h"
#include "rank_by_network.h"
#include "stacked.h"

namespace htv::cuda {
namespace {

// ---- streaming ----

constexpr int kStreamThreads = 256;
// Of the groups, where there are many groups and few coordinates.
constexpr int kStreamSlices = 8;
constexpr int64_t kFewShares = 64 * 1024;  // too few threads to draw all the bandwidth
// Groups: a sum of batches' sums rounds less than one long sum.
constexpr int kBatch = 16;

template <class State, class T, int bytes>
struct Streaming {
  using S = Share<T, bytes>;
  using V = Compute<T>;

  // The states of groups first <= e < last at the share's coordinates.
  __device__ static void run(const T* at, int64_t left, int64_t stride, int64_t first, int64_t last,
                             State (&states)[S::coordinates]) {
    for (int64_t e = first; e < last; e += kBatch) {
      State batch[S::coordinates] = {};
      const int n = last - e < kBatch ? int(last - e) : kBatch;
      const T* row = at + e * stride;
#pragma unroll 4
      for (int r = 0; r < n; ++r, row += stride) {
        const S share = S::load(row, left);
#pragma unroll
        for (int c = 0; c < S::coordinates; ++c) batch[c].update(share.at(c), r + 1);
      }
#pragma unroll
      for (int c = 0; c < S::coordinates; ++c) states[c].merge(batch[c], e - first, n);
    }
  }
};

// Blocks of a multiprocessor that registers must allow. A product of mantissas and exponents takes
// more of them.
template <class State>
constexpr int kStreamBlocks = 2;
template <class V>
constexpr int kStreamBlocks<GeometricMean<V>> = 1;

// slices: 1, or kStreamSlices warps that share the groups of a warp's coordinates.
template <class State, class T, int bytes, int slices>
__global__ void __launch_bounds__(kStreamThreads, kStreamBlocks<State>)
    streaming(StackedTask task) {
  using S = Share<T, bytes>;
  using V = Compute<T>;
  constexpr int shares = kStreamThreads / slices;
  const int slice = threadIdx.x / shares, lane = threadIdx.x % shares;
  const int64_t at = (int64_t(blockIdx.x) * shares + lane) * S::coordinates,
                left = task.coordinates - at;
  const int64_t groups = task.parameters.groups, each = (groups + slices - 1) / slices;
  const int64_t first = slice * each, last = first + each < groups ? first + each : groups;
  State states[S::coordinates] = {};
  if (left > 0)
    Streaming<State, T, bytes>::run(static_cast<const T*>(task.grads) + at, left, task.coordinates,
                                    first, last, states);
  if constexpr (slices > 1) {
    __shared__ State theirs[slices - 1][shares][S::coordinates];
#pragma unroll
    for (int c = 0; c < S::coordinates; ++c)
      if (slice > 0) theirs[slice - 1][lane][c] = states[c];
    __syncthreads();
    for (int s = 1; s < slices && slice == 0; ++s) {
      const int64_t begin = s * each, end = begin + each < groups ? begin + each : groups;
#pragma unroll
      for (int c = 0; c < S::coordinates; ++c)
        if (begin < end) states[c].merge(theirs[s - 1][lane][c], begin, end - begin);
    }
  }
  double mask = 0;
  if (slice == 0 && left > 0) {
    V values[S::coordinates];
#pragma unroll
    for (int c = 0; c < S::coordinates; ++c) {
      const Outcome<V> outcome = states[c].finalize(task.parameters);
      values[c] = outcome.value;
      if (c < left) mask += outcome.mask;
    }
    store(static_cast<V*>(task.value) + at, values, left);
  }
  if constexpr (State::masks) {
    const double sum = block_sum<kStreamThreads>(mask);
    if (threadIdx.x == 0) task.mask_sums[blockIdx.x] = sum;
  }
}

// Whether rows can be read `bytes` at a time.
template <class T>
bool aligned(const StackedTask& task, int bytes) {
  return (reinterpret_cast<uintptr_t>(task.grads) | uintptr_t(task.coordinates) * sizeof(T)) %
             bytes ==
         0;
}

template <class T>
constexpr int kElementBytes = int(sizeof(T));

struct StreamingPlan {
  int64_t blocks;
  bool vectors, slices;
};

template <class T>
StreamingPlan streaming_plan(const StackedTask& task) {
  const bool vectors = aligned<T>(task, 16);
  const int64_t each =
      vectors ? Share<T, 16>::coordinates : Share<T, kElementBytes<T>>::coordinates;
  const int64_t shares = blocks_for(task.coordinates, each);
  const bool slices = shares < kFewShares && task.parameters.groups >= 4 * kStreamSlices;
  return {blocks_for(shares, slices ? kStreamThreads / kStreamSlices : kStreamThreads), vectors,
          slices};
}

template <class State, class T>
void launch_streaming(const StackedTask& task, const StreamingPlan& plan, cudaStream_t stream) {
  const auto kernel =
      plan.vectors
          ? (plan.slices ? streaming<State, T, 16, kStreamSlices> : streaming<State, T, 16, 1>)
      : plan.slices ? streaming<State, T, kElementBytes<T>, kStreamSlices>
                    : streaming<State, T, kElementBytes<T>, 1>;
  launch(kernel, plan.blocks, kStreamThreads, 0, stream, task);
}

// ---- what is ranked: contributions, or the means of buckets of them ----

// A mean may be NaN by inf - inf, too.
template <class T>
struct BucketMeans {
  using Task = StackedTask;
  using V = Compute<T>;
  const T* grads;
  int64_t stride;
  int size;
  int64_t shorter, longer;

  __device__ explicit BucketMeans(const StackedTask& task)
      : grads(static_cast<const T*>(task.grads)),
        stride(task.coordinates),
        size(int(task.parameters.count)),
        shorter(task.bucket),
        longer(task.longer) {}

  __device__ static bool decided(int64_t) { return false; }
  __device__ static V scaled(V v) { return v; }

  __device__ V operator()(int i, int64_t at, bool& undefined) const {
    const int64_t groups = shorter + (i < longer);
    const T* row = grads + (i * shorter + (i < longer ? i : longer)) * stride + at;
    V sum{};
    for (int64_t e = 0; e < groups; ++e, row += stride) sum = e == 0 ? load(row) : sum + load(row);
    const V mean = sum / V(groups);
    undefined |= mean != mean;
    return mean;
  }
};

template <class T>
struct Contributions {
  using Task = StackedTask;
  using V = Compute<T>;
  const T* grads;
  int64_t stride;
  int size;

  __device__ explicit Contributions(const StackedTask& task)
      : grads(static_cast<const T*>(task.grads)),
        stride(task.coordinates),
        size(int(task.parameters.groups)) {}

  __device__ static bool decided(int64_t) { return false; }
  __device__ static V scaled(V v) { return v; }

  __device__ V operator()(int i, int64_t at, bool& undefined) const {
    const V v = load(grads + i * stride + at);
    undefined |= v != v;
    return v;
  }
};

// ---- few values: networks ----

constexpr int kNetworkThreads = 128;

// What a thread of a network for n values reads at once: as much as leaves all of them in
// registers.
template <class T, int n>
constexpr int kNetworkBytes = sizeof(T) == 8 ? (n <= 8 ? 16 : 8)
                              : n <= 16      ? 16
                              : n <= 32      ? 8
                                             : 4;

template <class T, int bytes, int n, int least, bool means>
__global__ void __launch_bounds__(kNetworkThreads, 1) by_network(StackedTask task) {
  using S = Share<T, bytes>;
  using V = Compute<T>;
  using Word = typename S::Word;
  const int64_t at = (int64_t(blockIdx.x) * kNetworkThreads + threadIdx.x) * S::coordinates;
  const int64_t left = task.coordinates - at;
  if (left <= 0) return;
  const T* const grads = static_cast<const T*>(task.grads) + at;
  const int present = int(task.parameters.groups);
  S rows[n];
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (i < least || i < present) rows[i] = S::load(grads + i * task.coordinates, left);
  V values[S::coordinates];
#pragma unroll
  for (int w = 0; w < S::words; ++w) {
    Word v[n];
    load_padded<n, least>(v, present, [&](int i) { return rows[i].word[w]; });
    V result[Word::coordinates];
    rank_words<n, means>(v, present, task.statistic, task.parameters, result);
#pragma unroll
    for (int k = 0; k < Word::coordinates; ++k) values[w * Word::coordinates + k] = result[k];
  }
  store(static_cast<V*>(task.value) + at, values, left);
}

template <class T, int n, int least>
__global__ void __launch_bounds__(kNetworkThreads, 1) buckets_by_network(StackedTask task) {
  using V = Compute<T>;
  const int64_t at = int64_t(blockIdx.x) * kNetworkThreads + threadIdx.x;
  if (at >= task.coordinates) return;
  const BucketMeans<T> means(task);
  bool undefined = false;
  Single<V> v[n];
  load_padded<n, least>(v, means.size, [&](int i) { return Single<V>{means(i, at, undefined)}; });
  V result[1];
  rank_words<n, false>(v, means.size, task.statistic, task.parameters, result);
  static_cast<V*>(task.value)[at] = undefined ? V(NAN) : result[0];
}

template <class T, int n, int least>
void launch_network(const StackedTask& task, cudaStream_t stream) {
  const bool means = task.statistic != Statistic::median;
  constexpr int wide = kNetworkBytes<T, n>, narrow = kElementBytes<T>;
  const bool vectors = aligned<T>(task, wide);
  const auto kernel =
      vectors ? (means ? by_network<T, wide, n, least, true> : by_network<T, wide, n, least, false>)
      : means ? by_network<T, narrow, n, least, true>
              : by_network<T, narrow, n, least, false>;
  const int64_t each = vectors ? Share<T, wide>::coordinates : Share<T, narrow>::coordinates;
  launch(kernel, blocks_for(task.coordinates, kNetworkThreads * each), kNetworkThreads, 0, stream,
         task);
}

// ---- by number of values ----

template <class T>
void launch_buckets(const StackedTask& task, cudaStream_t stream) {
  const int buckets = int(task.parameters.count);
  const auto by_network = [&](auto kernel) {
    launch(kernel, blocks_for(task.coordinates, kNetworkThreads), kNetworkThreads, 0, stream, task);
  };
  if (buckets <= 4) by_network(buckets_by_network<T, 4, 1>);
  else if (buckets <= 8) by_network(buckets_by_network<T, 8, 5>);
  else if (buckets <= 16) by_network(buckets_by_network<T, 16, 9>);
  else if (buckets <= 32) by_network(buckets_by_network<T, 32, 17>);
  else launch_counting<BucketMeans<T>>(task, task.coordinates, buckets, stream);
}

template <class T>
void launch_order(const StackedTask& task, cudaStream_t stream) {
  if (task.statistic == Statistic::median_of_means) return launch_buckets<T>(task, stream);
  const int groups = int(task.parameters.groups);
#define HTV_LAUNCH(n, least) \
  if (groups <= n) return launch_network<T, n, least>(task, stream);
  HTV_NETWORKS(HTV_LAUNCH)
#undef HTV_LAUNCH
  launch_counting<Contributions<T>>(task, task.coordinates, groups, stream);
}

}  // namespace

template <class T>
int64_t stacked_mask_parts(const StackedTask& task) {
  return has_mask(task.statistic) ? streaming_plan<T>(task).blocks : 0;
}

template <class T>
void run_stacked(const StackedTask& task, cudaStream_t stream) {
  const bool streams = with_streaming<Compute<T>>(task.statistic, [&](auto state) {
    launch_streaming<decltype(state), T>(task, streaming_plan<T>(task), stream);
  });
  if (!streams) launch_order<T>(task, stream);
}

template int64_t stacked_mask_parts<HTV_ELEMENT>(const StackedTask&);
template void run_stacked<HTV_ELEMENT>(const StackedTask&, cudaStream_t);

}  // namespace htv::cuda
