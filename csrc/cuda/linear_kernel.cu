// The linear op's kernels for one element type, HTV_ELEMENT, where no group has more than one row:
// this file is compiled once for each.
//
// A contribution is g[o] x[i], its sign the product of theirs: net votes are the product of two
// matrices of signs, which tensor cores do exactly in int8 at twice the rate of bf16. Nothing is
// formed and nothing is rounded. Where the product of floats would say something else (it vanishes,
// or is inf * 0), what is known of the columns tells, and the few such coordinates are counted
// again.
//
// Order statistics: the same product, and one of magnitudes, count negative and positive
// contributions, which under ReLU decides most coordinates: they are 0. The others are ranked like
// stacked values, which are recomputed as read.
#include "linear.h"

#include <string.h>

#include <type_traits>

#include "../ranking.h"
#include "counting_kernels.h"
#include "launch.h"
#include "rank_by_network.h"

namespace htv::cuda {
namespace {

// ---- packing ----

constexpr int kPackThreads = 256, kPackColumns = 32, kPackRows = 16;

template <class T>
__global__ void __launch_bounds__(kPackThreads, 1)
    pack(const T* matrix, int64_t rows, int64_t columns, SignMatrix to) {
  using V = Compute<T>;
  constexpr int warps = kPackThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * kPackColumns + lane;
  Column<V> found{V(INFINITY), 0};
  for (int64_t begin = warp * kPackRows; begin < to.depth; begin += warps * kPackRows) {
    uint32_t words[kPackRows / 4] = {};
#pragma unroll
    for (int r = 0; r < kPackRows; ++r) {
      if (begin + r >= rows || column >= columns) continue;
      const V v = load(matrix + (begin + r) * columns + column), size = absolute(v);
      words[r / 4] |= uint32_t(uint8_t(Lane<V>::sign(v))) << (r % 4 * 8);
      if (size > 0) found.least = generic::smaller(size, found.least);
      found.flags |= (v != v ? kHasNan : 0u) | (size == V(INFINITY) ? kHasInfinity : 0u) |
                     (v == 0 ? kHasZero : 0u);
    }
    *reinterpret_cast<uint4*>(to.signs + column * to.depth + begin) = {words[0], words[1], words[2],
                                                                       words[3]};
  }
  __shared__ Column<V> all[warps][kPackColumns];
  all[warp][lane] = found;
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < warps; ++w) {
    found.least = generic::smaller(found.least, all[w][lane].least);
    found.flags |= all[w][lane].flags;
  }
  static_cast<Column<V>*>(to.columns)[column] = found;
}

// ---- the product of signs ----

constexpr int kVoteThreads = 256;
constexpr int kStages = 3;                        // of copies under way
constexpr int kWarpRows = 64, kWarpColumns = 32;  // of a warp's part of the tile: 2 x 4 warps
constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;
constexpr int kSideBytes = kSignTile * kSignDepth, kStageBytes = 2 * kSideBytes;
constexpr int64_t kVoteBytes = int64_t(kStages) * kStageBytes;

using Sums = int32_t[kRowTiles][kColumnTiles][4];

// Where 16 bytes lie within a side of a stage: rows of 8 x 16 bytes, in an order that differs from
// row to row, so that 8 rows' pieces of the same columns are in different banks.
__device__ __forceinline__ int piece(int row, int place) {
  return row * kSignDepth + ((place ^ (row & 7)) * 16);
}

__device__ __forceinline__ void copy_stage(const LinearTask& task, int64_t tile_o, int64_t tile_i,
                                           int64_t begin, int8_t* stage) {
  constexpr int pieces = kSignDepth / 16;
#pragma unroll
  for (int n = 0; n < kSignTile * pieces / kVoteThreads; ++n) {
    const int at = n * kVoteThreads + threadIdx.x, row = at / pieces, place = at % pieces;
    const int64_t from = begin + place * 16;
    copy_async(stage + piece(row, place),
               task.of_g.signs + (tile_o * kSignTile + row) * task.of_g.depth + from);
    copy_async(stage + kSideBytes + piece(row, place),
               task.of_x.signs + (tile_i * kSignTile + row) * task.of_x.depth + from);
  }
}

// A tile's net votes and, if asked for, how many contributions are not 0.
template <bool counts_nonzero>
__device__ __forceinline__ void multiply_tile(const LinearTask& task, int64_t tile_o,
                                              int64_t tile_i, Sums& net, Sums& nonzero) {
  int8_t* const stages = dynamic_shared<int8_t>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 4 * kWarpRows, warp_column = warp % 4 * kWarpColumns;
  const int64_t steps = task.of_x.depth / kSignDepth;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps)
      copy_stage(task, tile_o, tile_i, int64_t(s) * kSignDepth, stages + s * kStageBytes);
    commit_copies();
  }
  int current = 0, next = kStages - 1;
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps)
      copy_stage(task, tile_o, tile_i, (step + kStages - 1) * kSignDepth,
                 stages + next * kStageBytes);
    commit_copies();
    const int8_t* const of_g = stages + current * kStageBytes;
    const int8_t* const of_x = of_g + kSideBytes;
#pragma unroll
    for (int part = 0; part < kSignDepth / 32; ++part) {
      uint32_t a[kRowTiles][4], b[kColumnTiles][2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
        load_matrices(a[m], of_g + piece(warp_row + m * 16 + lane % 16, 2 * part + lane / 16));
#pragma unroll
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t words[4];
        load_matrices(words, of_x + piece(warp_column + n * 8 + lane / 16 * 8 + lane % 8,
                                          2 * part + lane / 8 % 2));
        b[n][0] = words[0], b[n][1] = words[1];
        b[n + 1][0] = words[2], b[n + 1][1] = words[3];
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) multiply_signs(net[m][n], a[m], b[n]);
      if constexpr (counts_nonzero) {
        constexpr uint32_t magnitude = 0x01010101;  // of signs
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int w = 0; w < 4; ++w) a[m][w] &= magnitude;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) b[n][0] &= magnitude, b[n][1] &= magnitude;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n) multiply_signs(nonzero[m][n], a[m], b[n]);
      }
    }
    current = current + 1 == kStages ? 0 : current + 1;
    next = next + 1 == kStages ? 0 : next + 1;
  }
}

// Which output and which column of a tile a thread's sum [m][n][i] is of, i being 2 half + k:
// columns k = 0, 1 are neighbours.
__device__ __forceinline__ int row_of(int m, int half) {
  return threadIdx.x / 32 / 4 * kWarpRows + m * 16 + threadIdx.x % 32 / 4 + 8 * half;
}
__device__ __forceinline__ int column_of(int n, int k) {
  return threadIdx.x / 32 % 4 * kWarpColumns + n * 8 + threadIdx.x % 4 * 2 + k;
}

// What is known of the columns of x that a thread's sums are of.
template <class V>
struct ColumnsOfX {
  Column<V> at[kColumnTiles][2];

  __device__ ColumnsOfX(const LinearTask& task, int64_t tile_i) {
    const Column<V>* const of_x =
        static_cast<const Column<V>*>(task.of_x.columns) + tile_i * kSignTile;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
      for (int k = 0; k < 2; ++k) at[n][k] = of_x[column_of(n, k)];
  }
};

// A thread's coordinates in one row of a tile of `value`: kColumnTiles pairs of neighbours, read
// together and written together.
template <class V>
struct RowOfTile {
  V at[kColumnTiles][2];
  V* const to;
  const int64_t left;  // columns from `to` on
  const bool pairs;    // neighbours can be accessed at once

  __device__ RowOfTile(const LinearTask& task, int64_t o, int64_t tile_i)
      : to(static_cast<V*>(task.value) + o * task.in + tile_i * kSignTile),
        left(task.in - tile_i * kSignTile),
        pairs(task.in % 2 == 0) {}

  __device__ bool has(int n, int k) const { return column_of(n, k) < left; }

  __device__ void read() {
    using Raw = typename RawOf<2 * sizeof(V)>::type;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      at[n][0] = at[n][1] = V{};
      if (pairs && has(n, 1)) {
        const Raw raw = *reinterpret_cast<const Raw*>(to + column_of(n, 0));
        memcpy(at[n], &raw, sizeof raw);
      } else {
        if (has(n, 0)) at[n][0] = to[column_of(n, 0)];
        if (has(n, 1)) at[n][1] = to[column_of(n, 1)];
      }
    }
  }
  __device__ void write() const {
    using Raw = typename RawOf<2 * sizeof(V)>::type;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      if (pairs && has(n, 1)) {
        Raw raw;
        memcpy(&raw, at[n], sizeof raw);
        *reinterpret_cast<Raw*>(to + column_of(n, 0)) = raw;
      } else {
        if (has(n, 0)) to[column_of(n, 0)] = at[n][0];
        if (has(n, 1)) to[column_of(n, 1)] = at[n][1];
      }
    }
  }
};

// ---- masks and the sum of signs ----

// E times the statistic, of which one group with all votes and the whole sum is the mean.
template <class V, bool keep>
__device__ __forceinline__ Outcome<V> finish(Masked<V, keep> state, V sum, const Votes<V>& votes,
                                             Parameters p) {
  state.total.sum = sum;
  state.votes = votes;
  p.groups = 1;
  return state.finalize(p);
}
template <class V>
__device__ __forceinline__ Outcome<V> finish(SignSum<V> state, V, const Votes<V>& votes,
                                             Parameters p) {
  static_cast<Votes<V>&>(state) = votes;
  p.groups = 1;
  return state.finalize(p);
}

// Two blocks share a multiprocessor: one multiplies while the other reads and writes sums. (Of
// doubles, one.)
template <class State, class T>
__global__ void __launch_bounds__(kVoteThreads, sizeof(Compute<T>) == 8 ? 1 : 2)
    vote(LinearTask task) {
  using V = Compute<T>;
  const int64_t tile_o = blockIdx.x / task.of_x.tiles(), tile_i = blockIdx.x % task.of_x.tiles();
  Sums net = {}, unused;
  multiply_tile<false>(task, tile_o, tile_i, net, unused);

  const Column<V>* const of_g = static_cast<const Column<V>*>(task.of_g.columns);
  const ColumnsOfX<V> of_x(task, tile_i);
  int kept = 0;
  uint64_t doubtful = 0;  // bit [m][half][n][k]
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t o = tile_o * kSignTile + row_of(m, half);
      if (o >= task.out) continue;
      const Column<V> column_of_g = of_g[o];
      RowOfTile<V> row(task, o, tile_i);
      if constexpr (!std::is_same_v<State, SignSum<V>>) row.read();
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const Products<V> products(column_of_g, of_x.at[n][k]);
          Votes<V> votes;
          votes.net = net[m][n][2 * half + k];
          votes.nan = products.nan;
          const V sum = std::is_same_v<State, SignSum<V>> ? V{} : row.at[n][k];
          const Outcome<V> outcome = finish(State{}, sum, votes, task.parameters);
          const bool doubt = products.doubtful && row.has(n, k);
          if (doubt) doubtful |= uint64_t(1) << (((m * 2 + half) * kColumnTiles + n) * 2 + k);
          else row.at[n][k] = outcome.value;
          kept += !doubt && row.has(n, k) && outcome.mask != 0;
        }
      row.write();
    }
  for (int which = 0; which < 64 && doubtful >> which != 0; ++which) {
    if ((doubtful >> which & 1) == 0) continue;
    const int m = which / 4 / kColumnTiles, half = which / 2 / kColumnTiles % 2,
              n = which / 2 % kColumnTiles;
    const int64_t o = tile_o * kSignTile + row_of(m, half),
                  column = tile_i * kSignTile + column_of(n, which % 2);
    const T* const g = static_cast<const T*>(task.grad_output) + o;
    const T* const x = static_cast<const T*>(task.x) + column;
    Votes<V> votes;
    for (int64_t r = 0; r < task.rows; ++r)
      votes.update(load(g + r * task.out) * load(x + r * task.in), r + 1);
    V* const at = static_cast<V*>(task.value) + o * task.in + column;
    const V sum = std::is_same_v<State, SignSum<V>> ? V{} : *at;
    const Outcome<V> outcome = finish(State{}, sum, votes, task.parameters);
    *at = outcome.value;
    kept += outcome.mask != 0;
  }
  if constexpr (State::masks) {
    const double sum = block_sum<kVoteThreads>(kept);
    if (threadIdx.x == 0) task.mask_sums[blockIdx.x] = sum;
  }
}

// ---- order statistics ----

// Writes 0 where signs decide that every rank the statistic reads is 0: no product of finite
// factors is NaN, and one that vanishes is only one more 0. Elsewhere kOpen.
template <class V>
__global__ void __launch_bounds__(kVoteThreads, 1) decide(LinearTask task, int low, int high) {
  const int64_t tile_o = blockIdx.x / task.of_x.tiles(), tile_i = blockIdx.x % task.of_x.tiles();
  Sums net = {}, nonzero = {};
  multiply_tile<true>(task, tile_o, tile_i, net, nonzero);
  const Column<V>* const of_g = static_cast<const Column<V>*>(task.of_g.columns);
  const ColumnsOfX<V> of_x(task, tile_i);
  const int above = int(task.parameters.groups) - 1 - high;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t o = tile_o * kSignTile + row_of(m, half);
      if (o >= task.out) continue;
      RowOfTile<V> row(task, o, tile_i);
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int any = nonzero[m][n][2 * half + k],
                    negative = (any - net[m][n][2 * half + k]) / 2;
          const bool finite =
              ((of_g[o].flags | of_x.at[n][k].flags) & (kHasNan | kHasInfinity)) == 0;
          row.at[n][k] = finite && negative <= low && any - negative <= above ? 0 : kOpen;
        }
      row.write();
    }
}

// The contributions to a coordinate; groups without a row contribute 0.
template <class V_>
struct RankOne {
  using Task = LinearTask;
  using V = V_;
  const Task& task;
  int size, rows;

  __device__ explicit RankOne(const Task& t)
      : task(t), size(int(t.parameters.groups)), rows(int(t.rows)) {}

  __device__ bool decided(int64_t at) const { return static_cast<const V*>(task.value)[at] == 0; }
  __device__ V scaled(V v) const { return v * V(size); }
  __device__ V operator()(int i, int64_t at, bool& undefined) const {
    if (i >= rows) return V{};
    const int64_t o = at / task.in;
    const V v = contribution(i, o, at - o * task.in);
    undefined |= v != v;
    return v;
  }
  __device__ V contribution(int r, int64_t o, int64_t column) const {
    return load(static_cast<const V*>(task.grad_output) + r * task.out + o) *
           load(static_cast<const V*>(task.x) + r * task.in + column);
  }
};

constexpr int kRankThreads = 128;

template <class V, int n, int least, bool means>
__global__ void __launch_bounds__(kRankThreads, sizeof(V) == 8 ? 1 : 3)
    rank_by_network(LinearTask task) {
  const int64_t blocks = blocks_for(task.in, kRankThreads), o = blockIdx.x / blocks;
  const int64_t column = blockIdx.x % blocks * kRankThreads + threadIdx.x;
  if (column >= task.in) return;
  const RankOne<V> products(task);
  V* const value = static_cast<V*>(task.value) + o * task.in + column;
  if (products.decided(o * task.in + column)) return;
  Single<V> v[n];
  load_padded<n, least>(v, products.size, [&](int r) {
    return Single<V>{r < products.rows ? products.contribution(r, o, column) : V{}};
  });
  V result[1];
  rank_words<n, means>(v, products.size, task.statistic, task.parameters, result);
  *value = products.scaled(result[0]);
}

template <class V, int n, int least>
void launch_network(const LinearTask& task, cudaStream_t stream) {
  const auto kernel = task.statistic == Statistic::median ? rank_by_network<V, n, least, false>
                                                          : rank_by_network<V, n, least, true>;
  launch(kernel, task.out * blocks_for(task.in, kRankThreads), kRankThreads, 0, stream, task);
}

}  // namespace

template <class T>
void pack_signs(const void* matrix, int64_t rows, int64_t columns, const SignMatrix& to,
                cudaStream_t stream) {
  launch(pack<T>, to.width / kPackColumns, kPackThreads, 0, stream, static_cast<const T*>(matrix),
         rows, columns, to);
}

template <class T>
void apply_votes(const LinearTask& task, cudaStream_t stream) {
  using V = Compute<T>;
  const auto kernel = task.statistic == Statistic::and_mask   ? vote<AndMask<V>, T>
                      : task.statistic == Statistic::xor_mask ? vote<XorMask<V>, T>
                                                              : vote<SignSum<V>, T>;
  launch(kernel, task.tiles(), kVoteThreads, kVoteBytes, stream, task);
}

template <class T>
void rank_products(const LinearTask& task, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, Compute<T>>) {
    const Ranking ranking = ranking_of(task.statistic, task.parameters);
    launch(decide<T>, task.tiles(), kVoteThreads, kVoteBytes, stream, task, int(ranking.low),
           int(ranking.high));
    const int groups = int(task.parameters.groups);
#define HTV_LAUNCH(n, least) \
  if (groups <= n) return launch_network<T, n, least>(task, stream);
    HTV_NETWORKS(HTV_LAUNCH)
#undef HTV_LAUNCH
    launch_counting<RankOne<T>>(task, task.coordinates(), groups, stream);
  }
}

template void pack_signs<HTV_ELEMENT>(const void*, int64_t, int64_t, const SignMatrix&,
                                      cudaStream_t);
template void apply_votes<HTV_ELEMENT>(const LinearTask&, cudaStream_t);
template void rank_products<HTV_ELEMENT>(const LinearTask&, cudaStream_t);

}  // namespace htv::cuda
