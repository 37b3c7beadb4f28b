// The statistic of stacked contributions over groups: hot loops, compiled once per CPU level.
#include "stacked_kernel.h"

#include "select.h"

namespace htv::HTV_LEVEL {
namespace {

template <class T>
T least(T a, T b) {
  return a < b ? a : b;
}

// One value per coordinate, summed in double in an order that is the same at every level.
template <class T>
double sum_in_double(const T* values, int64_t n) {
  constexpr int ways = 8;
  double sums[ways] = {};
  int64_t i = 0;
  for (; i + ways <= n; i += ways)
    for (int w = 0; w < ways; ++w) sums[w] += values[i + w];
  for (; i < n; ++i) sums[i % ways] += values[i];
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// ---- streaming: the states of a chunk stay in L1 while its rows pass by ----

// Rows are taken in a batch at a time: states travel less, and a sum of batch sums rounds less than one long sum.
constexpr int64_t kBatchRows = 16;

template <class State, class V, class T>
void merge_rows(State* states, const T* grads, int64_t stride, int64_t width, int64_t before, int64_t rows) {
  constexpr int lanes = kLanes<V>;
  const int64_t full = width / lanes, rest = width % lanes;
  for (int64_t j = 0; j < full; ++j) {
    State batch{};
    for (int64_t r = 0; r < rows; ++r) batch.update(load<V>(grads + r * stride + j * lanes), r + 1);
    states[j].merge(batch, before, rows);
  }
  if (rest > 0) {
    State batch{};
    for (int64_t r = 0; r < rows; ++r) batch.update(load<V>(grads + r * stride + full * lanes, rest), r + 1);
    states[full].merge(batch, before, rows);
  }
}

template <class State, class V, class T>
void streaming_chunk(const StackedTask& task, int64_t chunk) {
  using R = Real<V>;
  constexpr int lanes = kLanes<V>;
  const int64_t begin = chunk * kStackedChunk, stride = task.coordinates, groups = task.parameters.groups;
  const int64_t width = least(kStackedChunk, stride - begin);
  const T* const grads = static_cast<const T*>(task.grads) + begin;
  R* const value = static_cast<R*>(task.value) + begin;

  State states[kStackedChunk / lanes] = {};
  for (int64_t e = 0; e < groups; e += kBatchRows)
    merge_rows<State, V>(states, grads + e * stride, stride, width, e, least(kBatchRows, groups - e));

  alignas(kRegisterBytes) R mask[kStackedChunk];
  for (int64_t j = 0; j * lanes < width; ++j) {
    const Outcome<V> outcome = states[j].finalize(task.parameters);
    store<V>(value + j * lanes, outcome.value, width - j * lanes);
    if constexpr (State::masks) store<V>(mask + j * lanes, outcome.mask, lanes);
  }
  task.mask_sums[chunk] = State::masks ? sum_in_double(mask, width) : 0;
}

// ---- order: the values of a batch of coordinates are gathered row by row, then ranked block by block ----

// Block of `columns` registers of coordinates: values[rank * columns + c].
template <class V, int columns>
struct Block {
  V* values;
  Mask<V> nan[columns];         // a contribution is NaN
  Count<V> undefined[columns];  // minus the number of buckets whose mean is NaN, by inf - inf too
};

// Fills the values to rank of `count` blocks of coordinates from `begin` on, row by row: contributions or bucket means.
template <class V, class T, int columns>
void fill(const StackedTask& task, int64_t begin, int64_t width, Block<V, columns>* blocks, int64_t count) {
  constexpr int lanes = kLanes<V>;
  const T* const grads = static_cast<const T*>(task.grads) + begin;
  const int64_t groups = task.parameters.groups, ranked = task.ranking->ranked;
  const bool buckets = ranked != groups;
  for (int64_t b = 0; b < count; ++b)
    for (int c = 0; c < columns; ++c) {
      blocks[b].nan[c] = Lane<V>::none();
      blocks[b].undefined[c] = Count<V>{};
    }
  int64_t e = 0;
  for (int64_t k = 0; k < ranked; ++k) {
    const int64_t size = groups / ranked + (k < groups % ranked);  // 1 unless these are buckets
    for (int64_t i = 0; i < size; ++i, ++e) {
      const T* const row = grads + e * task.coordinates;
      for (int64_t b = 0; b < count; ++b)
        for (int c = 0; c < columns; ++c) {
          const int64_t at = (b * columns + c) * lanes;
          const V v = at + lanes <= width ? load<V>(row + at) : at < width ? load<V>(row + at, width - at) : V{};
          V& place = blocks[b].values[k * columns + c];
          blocks[b].nan[c] |= v != v;
          place = i == 0 ? v : place + v;
        }
    }
    if (!buckets) continue;
    for (int64_t b = 0; b < count; ++b)
      for (int c = 0; c < columns; ++c) {
        V& place = blocks[b].values[k * columns + c];
        const V mean = place / Real<V>(size);
        place = mean != mean ? splat<V>(Real<V>(INFINITY)) : mean;  // undefined means rank last
        blocks[b].undefined[c] += mean != mean;
      }
  }
}

template <class V, class T, int columns>
void order_chunk(const StackedTask& task, int64_t chunk, void* scratch) {
  using R = Real<V>;
  using Int = typename Lane<V>::Int;
  constexpr int lanes = kLanes<V>, block_width = lanes * columns;
  constexpr int64_t most_blocks = kStackedChunk / block_width;
  const Ranking& ranking = *task.ranking;
  const int64_t ranked = ranking.ranked, block_bytes = ranked * columns * kRegisterBytes;
  const int64_t values_bytes = stacked_values_bytes(ranked);
  const int64_t fit = values_bytes / block_bytes, batch = least(fit < 1 ? 1 : fit, most_blocks);
  const int64_t end = least((chunk + 1) * kStackedChunk, task.coordinates);
  task.mask_sums[chunk] = 0;

  Block<V, columns> blocks[most_blocks];
  for (int64_t b = 0; b < batch; ++b) blocks[b].values = static_cast<V*>(scratch) + b * ranked * columns;
  for (int64_t begin = chunk * kStackedChunk; begin < end; begin += batch * block_width) {
    const int64_t width = least(batch * block_width, end - begin), count = (width + block_width - 1) / block_width;
    fill<V, T, columns>(task, begin, width, blocks, count);
    for (int64_t b = 0; b < count; ++b) {
      const Block<V, columns>& block = blocks[b];
      V result[columns];
      order_statistics<V, columns>(ranking, block.values, columns, static_cast<char*>(scratch) + values_bytes, result);
      for (int c = 0; c < columns; ++c) {
        const int64_t at = (b * columns + c) * lanes;
        if (at >= width) break;
        const Mask<V> nan = block.nan[c] | (Int(ranked - ranked / 2) + block.undefined[c] <= 0);
        store<V>(static_cast<R*>(task.value) + begin + at, nan ? splat<V>(R(NAN)) : result[c], width - at);
      }
    }
  }
}

template <class T>
void chunk_of(const StackedTask& task, int64_t chunk, void* scratch) {
  using V = Register<Compute<T>>;
  const bool streaming = with_streaming<V>(
      task.statistic, [&](auto state) { streaming_chunk<decltype(state), V, T>(task, chunk); });
  if (streaming) return;
  order_chunk<V, T, kStackedColumns>(task, chunk, scratch);
}

}  // namespace

void stacked_kernel(const StackedTask& task, int64_t first, int64_t last, void* scratch) {
  for (int64_t chunk = first; chunk < last; ++chunk)
    with_dtype(task.dtype, [&](auto element) { chunk_of<decltype(element)>(task, chunk, scratch); });
}

}  // namespace htv::HTV_LEVEL
