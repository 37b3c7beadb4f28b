// The statistic of stacked contributions over groups: hot loops, compiled once per instruction set.
#include "stacked_kernel.h"

#include "select.h"
#include "sort_registers.h"
#include "tally.h"

namespace htv::HTV_ISA {
namespace {

// One value per coordinate, summed in double in an order that is the same for every instruction
// set.
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

// Rows are taken in a batch at a time: states travel less, and a sum of batch sums rounds less than
// one long sum.
constexpr int64_t kBatchRows = 16;

template <class State, class V, class T>
void merge_rows(const Parameters& parameters, State* states, const T* grads, int64_t stride,
                int64_t width, int64_t before, int64_t rows) {
  constexpr int lanes = kLanes<V>;
  const int64_t full = width / lanes, rest = width % lanes;
  for (int64_t j = 0; j < full; ++j) {
    State batch{};
    for (int64_t r = 0; r < rows; ++r)
      absorb(batch, load<V>(grads + r * stride + j * lanes), r + 1, parameters);
    states[j].merge(batch, before, rows);
  }
  if (rest > 0) {
    State batch{};
    for (int64_t r = 0; r < rows; ++r)
      absorb(batch, load<V>(grads + r * stride + full * lanes, rest), r + 1, parameters);
    states[full].merge(batch, before, rows);
  }
}

template <class State, class V, class T>
void streaming_chunk(const StackedTask& task, int64_t chunk) {
  using R = Real<V>;
  constexpr int lanes = kLanes<V>;
  const int64_t begin = chunk * kStackedChunk, stride = task.coordinates,
                groups = task.parameters.groups;
  const int64_t width = least(kStackedChunk, stride - begin);
  const T* const grads = static_cast<const T*>(task.grads) + begin;
  const auto field = [&](int f) { return static_cast<R*>(task.values.at[f]) + begin; };

  State states[kStackedChunk / lanes] = {};
  for (int64_t e = 0; e < groups; e += kBatchRows)
    merge_rows<State, V>(task.parameters, states, grads + e * stride, stride, width, e,
                         least(kBatchRows, groups - e));

  if constexpr (is_summary<State>) {
    for (int64_t j = 0; j * lanes < width; ++j)
      for (int f = 0; f < State::fields; ++f)
        store<V>(field(f) + j * lanes, states[j].field(f), width - j * lanes);
  } else {
    alignas(kRegisterBytes) R mask[kStackedChunk];
    for (int64_t j = 0; j * lanes < width; ++j) {
      const Outcome<V> outcome = states[j].finalize(task.parameters);
      store<V>(field(0) + j * lanes, outcome.value, width - j * lanes);
      if constexpr (State::masks) store<V>(mask + j * lanes, outcome.mask, lanes);
    }
    task.mask_sums[chunk] = State::masks ? sum_in_double(mask, width) : 0;
  }
}

// ---- order: the values of as many coordinates as fit L2 are gathered row by row, then ranked ----

// Few rows are ranked as they are read.
constexpr int kMostDirect = 8;

template <class V, class T>
struct Rows {
  static constexpr bool may_be_nan = true;

  const T* first;
  int64_t stride;
  V operator()(int64_t k) const { return load<V>(first + k * stride); }
};

// Calls f(j, register j of width coordinates from `begin` on, of row k).
template <class V, class T, class F>
void each_register(const StackedTask& task, int64_t k, int64_t begin, int64_t width, const F& f) {
  constexpr int lanes = kLanes<V>;
  const T* const row = static_cast<const T*>(task.grads) + k * task.coordinates + begin;
  const int64_t full = width / lanes;
  for (int64_t j = 0; j < full; ++j) f(j, load<V>(row + j * lanes));
  if (full * lanes < width) f(full, load<V>(row + full * lanes, width - full * lanes));
}

// values[k * stride + j]: contribution k of register j of coordinates. Some rows are read side by
// side, for what a row read alone waits for, its page and its first lines, several rows wait for
// together.
template <class V, class T>
void gather(const StackedTask& task, int64_t begin, int64_t width, V* values, int64_t stride) {
  constexpr int together = 8, lanes = kLanes<V>;
  const int64_t groups = task.parameters.groups, full = width / lanes;
  int64_t k = 0;
  for (; k + together <= groups; k += together) {
    const T* const rows = static_cast<const T*>(task.grads) + k * task.coordinates + begin;
    for (int64_t j = 0; j < full; ++j)
#pragma GCC unroll 8
      for (int r = 0; r < together; ++r)
        values[(k + r) * stride + j] = load<V>(rows + r * task.coordinates + j * lanes);
    if (full * lanes < width)
      for (int r = 0; r < together; ++r)
        values[(k + r) * stride + full] =
            load<V>(rows + r * task.coordinates + full * lanes, width - full * lanes);
  }
  for (; k < groups; ++k)
    each_register<V, T>(task, k, begin, width, [&](int64_t j, V v) { values[k * stride + j] = v; });
}

// values[k * stride + j]: the mean of bucket k, which may be NaN by inf - inf, too.
template <class V, class T>
void gather_buckets(const StackedTask& task, int64_t begin, int64_t width, V* values,
                    int64_t stride) {
  const int64_t groups = task.parameters.groups, ranked = task.ranking->ranked;
  const int64_t registers = (width + kLanes<V> - 1) / kLanes<V>;
  for (int64_t k = 0, e = 0; k < ranked; ++k, values += stride) {
    const int64_t size = groups / ranked + (k < groups % ranked);
    for (int64_t i = 0; i < size; ++i, ++e)
      each_register<V, T>(task, e, begin, width,
                          [&](int64_t j, V v) { values[j] = i == 0 ? v : values[j] + v; });
    for (int64_t j = 0; j < registers; ++j) values[j] /= Real<V>(size);
  }
}

template <class V, class T>
void order_chunk(const StackedTask& task, int64_t chunk, void* scratch) {
  constexpr int lanes = kLanes<V>;
  constexpr int64_t most_registers = kStackedChunk / lanes;
  const Ranking& ranking = *task.ranking;
  const int64_t begin = chunk * kStackedChunk, end = least(begin + kStackedChunk, task.coordinates);
  const int64_t ranked = ranking.ranked, values_bytes = stacked_values_bytes(ranked);
  const bool buckets = ranked != task.parameters.groups;
  Real<V>* const value = static_cast<Real<V>*>(task.values.at[0]);
  task.mask_sums[chunk] = 0;

  int64_t direct = 0;  // whole registers
  if (!buckets && ranked <= kMostDirect) {
    direct = (end - begin) / lanes * lanes;
    const T* const grads = static_cast<const T*>(task.grads) + begin;
    few_statistics<V, kMostDirect>(
        ranking, direct / lanes,
        [&](int64_t j) { return Rows<V, T>{grads + j * lanes, task.coordinates}; },
        [&](int64_t j, V v) { store<V>(value + begin + j * lanes, v, lanes); });
  }
  V* const values = static_cast<V*>(scratch);
  const int64_t registers = least(values_bytes / (ranked * kRegisterBytes) - 1, most_registers);
  V result[most_registers];
  for (int64_t at = begin + direct; at < end; at += registers * lanes) {
    const int64_t width = least(registers * lanes, end - at), count = (width + lanes - 1) / lanes;
    const int64_t stride = count + 1;
    if (buckets) gather_buckets<V, T>(task, at, width, values, stride);
    else gather<V, T>(task, at, width, values, stride);
    order_statistics<V>(ranking, values, stride, count, static_cast<char*>(scratch) + values_bytes,
                        result);
    for (int64_t j = 0; j < count; ++j)
      store<V>(value + at + j * lanes, result[j], width - j * lanes);
  }
}

template <class T>
void chunk_of(const StackedTask& task, int64_t chunk, void* scratch) {
  using V = Register<Compute<T>>;
  const auto stream = [&](auto state) { streaming_chunk<decltype(state), V, T>(task, chunk); };
  if (task.summary) return with_summary<V>(task.statistic, stream);
  if (!with_streaming<V>(task.statistic, stream)) order_chunk<V, T>(task, chunk, scratch);
}

}  // namespace

void stacked_kernel(const StackedTask& task, int64_t first, int64_t last, void* scratch) {
  for (int64_t chunk = first; chunk < last; ++chunk)
    with_dtype(task.dtype,
               [&](auto element) { chunk_of<decltype(element)>(task, chunk, scratch); });
}

}  // namespace htv::HTV_ISA
