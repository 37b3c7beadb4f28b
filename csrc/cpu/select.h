// Order statistics of registers of coordinates: the values of a block of coordinates lie in L1 or L2, registers side by side.
#pragma once

#include "lanes.h"
#include "ranking.h"

namespace htv::HTV_LEVEL {

// values[k * stride + c]: value 0 <= k < ranking.ranked of register 0 <= c < columns of coordinates; overwritten.
// result[c]: the statistic, NaN where a value is NaN. scratch: select_scratch_bytes(ranking), aligned to 64 bytes.
template <class V, int columns>
void order_statistics(const Ranking& ranking, V* values, int64_t stride, [[maybe_unused]] void* scratch, V* result) {
  Mask<V> nan[columns];
  for (int c = 0; c < columns; ++c) nan[c] = Lane<V>::none();
  for (int64_t k = 0; k < ranking.ranked; ++k)
    for (int c = 0; c < columns; ++c) nan[c] |= values[k * stride + c] != values[k * stride + c];
  for (const CompareExchange& step : ranking.network) {
    V* const low = values + int64_t(step.low) * stride;
    V* const high = values + int64_t(step.high) * stride;
    for (int c = 0; c < columns; ++c) {
      const V a = low[c], b = high[c];
      low[c] = smaller(a, b);
      high[c] = larger(a, b);
    }
  }
  for (int c = 0; c < columns; ++c) {
    const auto rank = [&](int64_t r) { return values[r * stride + c]; };
    const V v = order_statistic<V>(ranking.statistic, rank, ranking.parameters);
    result[c] = nan[c] ? splat<V>(Real<V>(NAN)) : v;
  }
}

}  // namespace htv::HTV_LEVEL
