// exp of registers, and registers as half precision: what normalised exponentials need beyond
// csrc/cpu/lanes.h.
#pragma once

#include "lanes.h"

namespace htv::HTV_ISA {

// e^v to about one unit in the last place, denormal results too; NaN for NaN.
template <class V>
HTV_INLINE V exponential(V v) {
  using R = Real<V>;
  constexpr bool single = sizeof(R) == 4;
  // Beyond these results are 0 and infinity. Zeros are chosen, not computed: to underflow takes
  // many times as long.
  constexpr R lowest = single ? R(-104) : R(-746), highest = single ? R(89) : R(710);
  const auto vanishes = v < lowest;
  v = vanishes ? V{} : smaller(splat<V>(highest), v);
  // v = n log 2 + rest: added to 1.5 * 2^mantissa, n is what the lowest bits hold.
  constexpr R rounder = single ? R(0x1.8p23) : R(0x1.8p52);
  // Few digits: n times it is exact.
  constexpr R log2_high = single ? R(0x1.62ep-1) : R(0x1.62e42feep-1);
  constexpr R log2_low = R(0x1.62e42fefa39efp-1 - log2_high + (single ? 0 : 0x1.abc9e3b39803fp-56));
  const V rounded = multiply_add(v, splat<V>(R(1.44269504088896340736)), splat<V>(rounder)),
          n = rounded - rounder;
  const V rest = multiply_add(n, splat<V>(-log2_low), multiply_add(n, splat<V>(-log2_high), v));
  // |rest| <= log(2) / 2, where so many terms of the series are enough.
  constexpr int terms = single ? 7 : 13;
  constexpr double factorials[] = {1,        1,         2,          6,          24,
                                   120,      720,       5040.,      40320.,     362880.,
                                   3628800., 39916800., 479001600., 6227020800.};
  V sum = splat<V>(R(1 / factorials[terms]));
#pragma GCC unroll 16
  for (int k = terms - 1; k >= 0; --k)
    sum = multiply_add(sum, rest, splat<V>(R(1 / factorials[k])));
  // 2^n in two factors, none of which leaves the range.
  const Count<V> power = Lane<V>::bits(rounded) - Lane<V>::bits(splat<V>(rounder)),
                 half = power >> 1;
  const auto power_of_two = [](Count<V> p) {
    return Lane<V>::from_bits((p + Lane<V>::kExponentBias) << Lane<V>::kMantissaBits);
  };
  return vanishes ? V{} : sum * power_of_two(half) * power_of_two(power - half);
}

template <class V>
HTV_INLINE Count<V> lane_numbers() {
  Count<V> numbers;
  for (int i = 0; i < kLanes<V>; ++i) numbers[i] = i;
  return numbers;
}

// All lanes by one operation, in one order: the upper half onto the lower one, again and again.
template <class V, class F>
HTV_INLINE Real<V> fold_lanes(V v, const F& f) {
#pragma GCC unroll 8
  for (int n = kLanes<V> / 2; n > 0; n /= 2)
    v = f(v, (V)__builtin_shuffle(v, (lane_numbers<V>() + n) & (kLanes<V> - 1)));
  return v[0];
}

template <class V>
HTV_INLINE Real<V> sum_of_lanes(V v) {
  return fold_lanes(v, [](V a, V b) { return a + b; });
}

template <class V>
HTV_INLINE Real<V> largest_lane(V v) {
  return fold_lanes(v, [](V a, V b) { return larger(a, b); });
}

// The bits of float32 rounded to a half-precision type, ties to even; NaN stays one.
template <class T, class V>
HTV_INLINE auto narrowed(V v) {
  using Words = Register<uint32_t>;
  using Bits = typename RegisterOf<uint16_t, 2 * kLanes<V>>::type;
  const Words bits = (Words)v, size = bits & 0x7fffffffu;
  if constexpr (is_bfloat16<T>) {
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(size > 0x7f800000u ? (bits >> 16) | 0x40u : rounded, Bits);
  } else {
#if defined(__AVX512F__)
    return (Bits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (Bits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
    const Words normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
    // A unit of 0.5 is the smallest denormal.
    const Words denormal = (Words)((V)size + 0.5f) - 0x3f000000u;
    Words half = size < (113u << 23) ? denormal : normal;
    half = size >= 0x477ff000u ? Words{} + 0x7c00u : half;
    half = size > 0x7f800000u ? Words{} + 0x7e00u : half;
    return __builtin_convertvector(half | (bits >> 16 & 0x8000u), Bits);
#endif
  }
}

// The first n lanes, rounded once to T.
template <class T, class V>
HTV_INLINE void store_as(T* to, V v, int64_t n) {
  if constexpr (sizeof(T) == sizeof(Real<V>)) {
    store<V>(to, v, n);
  } else {
    const auto bits = narrowed<T>(v);
    if (n >= kLanes<V>) {
      memcpy(to, &bits, sizeof bits);
    } else {
#if defined(__AVX512BW__)
      _mm256_mask_storeu_epi16(to, __mmask16((uint32_t(1) << n) - 1), (__m256i)bits);
#else
      memcpy(to, &bits, n * sizeof(T));
#endif
    }
  }
}

}  // namespace htv::HTV_ISA
