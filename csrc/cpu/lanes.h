// SIMD registers as plain types: GCC/Clang vector extensions, as wide as the instruction set this
// file is compiled for.
#pragma once

#include <string.h>

#include <type_traits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../dtype.h"
#include "../statistic.h"

namespace htv::HTV_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32, kRegisters = 16;
#else
constexpr int kRegisterBytes = 16, kRegisters = 16;
#endif

template <class T, int bytes>
struct RegisterOf {
  typedef T type __attribute__((vector_size(bytes)));
};
template <class T>
using Register = typename RegisterOf<T, kRegisterBytes>::type;

template <class V>
constexpr int kLanes = sizeof(V) / sizeof(Real<V>);

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A comparison of registers is an integer register of 0 and -1, which counts and selects alike.
template <class V, class T>
struct RegisterLane {
  using Scalar = Lane<T>;
  using Real = T;
  using Int = typename Scalar::Int;
  using Count = Register<Int>;
  using Mask = Count;
  static constexpr int kMantissaBits = Scalar::kMantissaBits;
  static constexpr Int kExponentBias = Scalar::kExponentBias;

  static Mask none() { return Mask{}; }
  static Count sign(V v) { return (v < 0) - (v > 0); }
  static V real(Count c) { return __builtin_convertvector(c, V); }
  static Count bits(V v) { return (Count)v; }
  static V from_bits(Count bits) { return (V)bits; }
  template <class F>
  static V map(F f, V v) {
    for (int i = 0; i < int(sizeof(V) / sizeof(T)); ++i) v[i] = f(v[i]);
    return v;
  }
};

template <>
struct Lane<Register<float>> : RegisterLane<Register<float>, float> {};
template <>
struct Lane<Register<double>> : RegisterLane<Register<double>, double> {};

// ---- arithmetic that operators do not say ----

// Whether a mask has a lane.
template <class V>
bool any(Mask<V> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  typename Lane<V>::Int found = 0;
  for (int lane = 0; lane < kLanes<V>; ++lane) found |= mask[lane];
  return found != 0;
#endif
}

// a * b + c, rounded once where the instruction set can.
template <class V>
V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Real<V>) == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof(Real<V>) == 8) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (sizeof(Real<V>) == 4) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (sizeof(Real<V>) == 8) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// The sign as a value: -1, 0 or 1; NaN for NaN.
template <class V>
V unit(V v) {
#if defined(__AVX512F__)
  // What each class of numbers becomes, from the lowest digit: NaN twice, 0, 1, -inf, inf,
  // negative, positive.
  constexpr unsigned nan = 1, zero = 8, minus = 9, plus = 10;
  constexpr unsigned table =
      nan | nan << 4 | zero << 8 | plus << 12 | minus << 16 | plus << 20 | minus << 24 | plus << 28;
  if constexpr (sizeof(Real<V>) == 4)
    return (V)_mm512_fixupimm_ps((__m512)v, (__m512)v, _mm512_set1_epi32(int(table)), 0);
  else return (V)_mm512_fixupimm_pd((__m512d)v, (__m512d)v, _mm512_set1_epi64(table), 0);
#else
  // Twice, as even the smallest number must reach 1.
  constexpr Real<V> large = sizeof(Real<V>) == 4 ? 0x1p127 : 0x1p1023;
  return smaller(splat<V>(1), larger(splat<V>(-1), v * large * large));
#endif
}

// ---- loads (with conversion to the compute type) and stores, unaligned ----

template <class W, class T>
W read(const T* from) {
  W w;
  memcpy(&w, from, sizeof w);
  return w;
}

template <class V, class T>
V load(const T* from) {
  constexpr int n = kLanes<V>;
  if constexpr (sizeof(T) == sizeof(Real<V>)) {
    return read<V>(from);
  } else {
    using Bits = typename RegisterOf<uint16_t, 2 * n>::type;
    const Bits bits = read<Bits>(from);
    if constexpr (is_bfloat16<T>) {
      return (V)(__builtin_convertvector(bits, Register<uint32_t>) << 16);
    } else {
#if defined(__AVX512F__)
      return (V)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
      return (V)_mm256_cvtph_ps((__m128i)bits);
#else
      // Exponent and mantissa moved into place are the value times 2^-112; inf and NaN then need
      // the full exponent.
      const Register<uint32_t> wide = __builtin_convertvector(bits, Register<uint32_t>);
      const Register<uint32_t> size = (wide & 0x7fffu) << 13;
      const Register<uint32_t> scaled = (Register<uint32_t>)((V)size * 0x1p112f);
      const Register<uint32_t> special = size | 0x7f800000u;
      return (V)((size >= (0x7c00u << 13) ? special : scaled) | (wide & 0x8000u) << 16);
#endif
    }
  }
}

#if defined(__AVX512BF16__)
// Of two rows of bfloat16 at once: the first in the lower halves of lanes.
template <class V>
V load_pair(const BFloat16* first, const BFloat16* second) {
  using Bits = typename RegisterOf<uint16_t, 2 * kLanes<V>>::type;
  using Words = Register<uint32_t>;
  const Words low = __builtin_convertvector(read<Bits>(first), Words);
  return (V)(low | __builtin_convertvector(read<Bits>(second), Words) << 16);
}

template <class V>
V load_pair(const BFloat16* first, const BFloat16* second, int64_t n) {
  if (n >= kLanes<V>) return load_pair<V>(first, second);
  BFloat16 padded[2][kLanes<V>] = {};
  memcpy(padded[0], first, n * sizeof(BFloat16));
  memcpy(padded[1], second, n * sizeof(BFloat16));
  return load_pair<V>(padded[0], padded[1]);
}

// sum + g's first * x's first + g's second * x's second, with x and g as `load_pair` gives them.
// Denormals count as 0.
template <class V>
V multiply_add_pair(const float* g, V x, V sum) {
  int both;
  memcpy(&both, g, sizeof both);
  return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(both), (__m512bh)x);
}
#endif

// The first n values; the other lanes are 0.
template <class V, class T>
V load(const T* from, int64_t n) {
  if (n >= kLanes<V>) return load<V>(from);
#if defined(__AVX512BW__)
  const auto mask = (uint32_t(1) << n) - 1;
  if constexpr (sizeof(T) == 8) return (V)_mm512_maskz_loadu_pd(__mmask8(mask), from);
  if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_ps(__mmask16(mask), from);
  if constexpr (sizeof(T) == 2) {
    T padded[kLanes<V>];
    const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16(mask), from);
    memcpy(padded, &bits, sizeof bits);
    return load<V>(padded);
  }
#else
  T padded[kLanes<V>] = {};
  memcpy(padded, from, n * sizeof(T));
  return load<V>(padded);
#endif
}

template <class V>
void store(Real<V>* to, V v, int64_t n) {
  if (n >= kLanes<V>) {
    memcpy(to, &v, sizeof v);
    return;
  }
#if defined(__AVX512F__)
  const auto mask = (uint32_t(1) << n) - 1;
  if constexpr (sizeof(Real<V>) == 8) _mm512_mask_storeu_pd(to, __mmask8(mask), (__m512d)v);
  if constexpr (sizeof(Real<V>) == 4) _mm512_mask_storeu_ps(to, __mmask16(mask), (__m512)v);
#else
  memcpy(to, &v, n * sizeof(Real<V>));
#endif
}

}  // namespace htv::HTV_ISA