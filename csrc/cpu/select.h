// Order statistics of registers of coordinates, whose values lie in L1 or L2, registers side by
// side.
#pragma once

#include "../ranking.h"
#include "lanes.h"

namespace htv::HTV_ISA {

// values[k * stride + c]: value 0 <= k < ranking.ranked of register 0 <= c < columns of
// coordinates. result[c]: the statistic, NaN where a value is NaN. scratch:
// select_scratch_bytes(ranking), aligned to 64 bytes.
template <class V>
void order_statistics(const Ranking& ranking, const V* values, int64_t stride, int columns,
                      void* scratch, V* result);

template <class V, int columns>
void order_statistics(const Ranking& ranking, const V* values, int64_t stride, void* scratch,
                      V* result) {
  order_statistics<V>(ranking, values, stride, columns, scratch, result);
}

// Values up to which order_statistics is the way, however they come.
constexpr int kMostInMemory = 64;

// Contributions g[k] * x[c][row[k]] of 0 <= k < given groups, of finite factors, for some registers
// of coordinates c; those of the other groups are 0.
struct Factors {
  const Register<float>* const* x;
  const float* g;
  const int32_t* row;
  int64_t given;
};

// The same of more than kMostInMemory contributions that lie nowhere.
void product_statistics(const Ranking& ranking, const Factors& factors, int columns, void* scratch,
                        Register<float>* result);

extern template void order_statistics(const Ranking&, const Register<float>*, int64_t, int, void*,
                                      Register<float>*);
extern template void order_statistics(const Ranking&, const Register<double>*, int64_t, int, void*,
                                      Register<double>*);

}  // namespace htv::HTV_ISA
