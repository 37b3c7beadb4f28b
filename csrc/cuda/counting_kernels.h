// Kernels for order statistics of many values per coordinate, wherever the values come from: those
// of some coordinates wait as keys in shared memory while a warp counts through those of one; where
// they do not fit, a thread for each coordinate reads them again in every pass.
#pragma once

#include "launch.h"
#include "rank_by_counting.h"

namespace htv::cuda {

constexpr int kCountThreads = 256, kWarps = kCountThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class V>
__device__ __forceinline__ V warp_sum(V v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) v += __shfl_xor_sync(kAllLanes, v, distance);
  return v;
}
__device__ __forceinline__ int warp_sum(int v) { return __reduce_add_sync(kAllLanes, v); }

__device__ __forceinline__ int warp_min(int v) { return __reduce_min_sync(kAllLanes, v); }
__device__ __forceinline__ int warp_max(int v) { return __reduce_max_sync(kAllLanes, v); }
__device__ __forceinline__ int64_t warp_min(int64_t v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const int64_t other = __shfl_xor_sync(kAllLanes, v, distance);
    v = other < v ? other : v;
  }
  return v;
}
__device__ __forceinline__ int64_t warp_max(int64_t v) { return -1 - warp_min(-1 - v); }

// The keys of one coordinate, over which its passes go: key(i) for i = first, first + step, ...;
// all(x) joins the results of those who share the passes.
template <class V, class Reader, class Team>
struct Counted {
  using Key = typename Lane<V>::Int;
  static constexpr Key kLargest = kMagnitude<V>;

  int size, first, step;
  Reader key;
  Team team;

  __device__ Survey<Key> survey() const {
    Key least = kLargest, greatest = -kLargest;
    int negative = 0, not_positive = 0;
    for (int i = first; i < size; i += step) {
      const Key k = key(i);
      least = k < least ? k : least;
      greatest = k > greatest ? k : greatest;
      negative += k < 0;
      not_positive += k <= 0;
    }
    return {{team.min(least), team.max(greatest)}, team.sum(negative), team.sum(not_positive)};
  }
  __device__ int below(Key pivot) const {
    int count = 0;
#pragma unroll 4
    for (int i = first; i < size; i += step) count += key(i) < pivot;
    return team.sum(count);
  }
  __device__ Extremes<Key> around(Key low, Key high) const {
    Key least = kLargest, greatest = -kLargest;
#pragma unroll 4
    for (int i = first; i < size; i += step) {
      const Key k = key(i);
      least = k >= low && k < least ? k : least;
      greatest = k < high && k > greatest ? k : greatest;
    }
    return {team.min(least), team.max(greatest)};
  }
  __device__ Inside<V> sum_inside(V low, V high) const {
    V sum{};
    int at_most_low = 0, at_least_high = 0;
    for (int i = first; i < size; i += step) {
      const V v = value_of<V>(key(i));
      at_most_low += v <= low;
      at_least_high += v >= high;
      sum += low < v && v < high ? v : V{};
    }
    return {team.sum(sum), team.sum(at_most_low), team.sum(at_least_high)};
  }
};

struct Warp {
  template <class X>
  __device__ X min(X v) const {
    return warp_min(v);
  }
  template <class X>
  __device__ X max(X v) const {
    return warp_max(v);
  }
  template <class X>
  __device__ X sum(X v) const {
    return warp_sum(v);
  }
};

struct Alone {
  template <class X>
  __device__ X min(X v) const {
    return v;
  }
  template <class X>
  __device__ X max(X v) const {
    return v;
  }
  template <class X>
  __device__ X sum(X v) const {
    return v;
  }
};

// Coordinates of a block, and how far apart the keys of two lie: banks of shared memory that they
// are written to differ.
struct KeyTile {
  int coordinates, stride;

  __host__ __device__ static KeyTile of(int coordinates, int size) {
    return {coordinates, (size + 31) / 32 * 32 + 32 / coordinates};
  }
  template <class Key>
  int64_t bytes() const {
    return int64_t(coordinates) * stride * sizeof(Key);
  }
};

// Source(task): what is ranked at each coordinate:
//
//     size                    how many values
//     (i, at, undefined)      value i of coordinate `at`; `undefined` becomes true where it is NaN
//     decided(at)             whether the result is already there
//     scaled(v)               the result, given the statistic
template <class Source>
__global__ void __launch_bounds__(kCountThreads, 1)
    by_counting(typename Source::Task task, int64_t coordinates, KeyTile tile) {
  using V = typename Source::V;
  using Key = typename Lane<V>::Int;
  __shared__ int undefined[32];
  Key* const keys = dynamic_shared<Key>();
  const Source source(task);
  const int64_t begin = int64_t(blockIdx.x) * tile.coordinates;
  const int width =
      coordinates - begin < tile.coordinates ? int(coordinates - begin) : tile.coordinates;
  if (threadIdx.x < 32) undefined[threadIdx.x] = 0;
  __syncthreads();
  const int column = threadIdx.x % tile.coordinates;
  if (column < width && !source.decided(begin + column)) {
    bool mine = false;
#pragma unroll 8
    for (int i = threadIdx.x / tile.coordinates; i < source.size;
         i += kCountThreads / tile.coordinates)
      keys[column * tile.stride + i] = key_of(source(i, begin + column, mine));
    if (mine) undefined[column] = 1;  // by whichever thread
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int c = warp; c < width; c += kWarps) {
    if (source.decided(begin + c)) continue;
    const Key* const own = keys + c * tile.stride;
    const auto reader = [own](int i) { return own[i]; };
    V value = V(NAN);
    if (undefined[c] == 0) {
      const Counted<V, decltype(reader), Warp> values{source.size, lane, 32, reader, {}};
      value = select_statistic<V>(values, task.statistic, task.parameters);
    }
    if (lane == 0) static_cast<V*>(task.value)[begin + c] = source.scaled(value);
  }
}

template <class Source>
__global__ void __launch_bounds__(kCountThreads, 1)
    by_counting_alone(typename Source::Task task, int64_t coordinates) {
  using V = typename Source::V;
  const int64_t at = int64_t(blockIdx.x) * kCountThreads + threadIdx.x;
  if (at >= coordinates) return;
  const Source source(task);
  if (source.decided(at)) return;
  bool undefined = false;
  for (int i = 0; i < source.size && !undefined; ++i) source(i, at, undefined);
  const auto reader = [&source, at](int i) {
    bool ignored = false;
    return key_of(source(i, at, ignored));
  };
  V value = V(NAN);
  if (!undefined) {
    const Counted<V, decltype(reader), Alone> values{source.size, 0, 1, reader, {}};
    value = select_statistic<V>(values, task.statistic, task.parameters);
  }
  static_cast<V*>(task.value)[at] = source.scaled(value);
}

template <class Source>
void launch_counting(const typename Source::Task& task, int64_t coordinates, int size,
                     cudaStream_t stream) {
  using Key = typename Lane<typename Source::V>::Int;
  const int64_t most = most_shared_bytes() - 1024,
                comfortable = most / 2 < (96 << 10) ? most / 2 : 96 << 10;
  // The fewer, the less of a row is read at once: 32 bytes at least.
  for (const int width : {32, 16, 8}) {
    const KeyTile tile = KeyTile::of(width, size);
    const int64_t bytes = tile.bytes<Key>();
    if (bytes <= comfortable || (width == 8 && bytes <= most)) {
      launch(by_counting<Source>, blocks_for(coordinates, width), kCountThreads, bytes, stream,
             task, coordinates, tile);
      return;
    }
  }
  launch(by_counting_alone<Source>, blocks_for(coordinates, kCountThreads), kCountThreads, 0,
         stream, task, coordinates);
}

}  // namespace htv::cuda
