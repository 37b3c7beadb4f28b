// Integers that compare as floating-point values do, but for NaN.
#pragma once

#include "statistic.h"

namespace htv::HTV_ISA {

template <class V>
constexpr int kBits = 8 * sizeof(Real<V>);
template <class V>
constexpr typename Lane<V>::Int kMagnitude = ~(typename Lane<V>::Int(1) << (kBits<V> - 1));

// Both zeros share the key 0.
template <class V>
HTV_INLINE Count<V> key_of(V v) {
  const Count<V> bits = Lane<V>::bits(v), sign = bits >> (kBits<V> - 1);
  return ((bits & kMagnitude<V>)^sign) - sign;
}

template <class V>
HTV_INLINE V value_of(Count<V> key) {
  const Count<V> sign = key >> (kBits<V> - 1);
  return Lane<V>::from_bits(((key ^ sign) - sign) | (sign & ~kMagnitude<V>));
}

}  // namespace htv::HTV_ISA
