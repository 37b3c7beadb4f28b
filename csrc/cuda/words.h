// What a thread holds of a row: 4 or 8 bytes with one coordinate or, of 16-bit types, two. Several
// words are read at once.
#pragma once

#include "../dtype.h"
#include "../statistic.h"
#include "device.h"

namespace htv::cuda {

using namespace htv::generic;

// ---- a word, its order and its values ----

// min_nan and max_nan of doubles have no instruction.
__device__ __forceinline__ double min_nan(double a, double b) { return a != a || a < b ? a : b; }
__device__ __forceinline__ double max_nan(double a, double b) { return a != a || a > b ? a : b; }

template <class R>
struct Single {
  static constexpr int coordinates = 1;
  R value;

  __device__ static Single infinity(bool negative) {
    return {negative ? R(-INFINITY) : R(INFINITY)};
  }
  __device__ R at(int) const { return value; }
};
template <class R>
__device__ __forceinline__ Single<R> smaller(Single<R> a, Single<R> b) {
  return {min_nan(a.value, b.value)};
}
template <class R>
__device__ __forceinline__ Single<R> larger(Single<R> a, Single<R> b) {
  return {max_nan(a.value, b.value)};
}

__device__ __forceinline__ float widen(BFloat16 v) { return bfloat_to_float(v.bits); }
__device__ __forceinline__ float widen(Float16 v) { return half_to_float(v.bits); }
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }

// Two coordinates of a 16-bit type, compared as they are.
template <class T>
struct Pair {
  static constexpr int coordinates = 2;
  uint32_t bits;

  __device__ static Pair infinity(bool negative) {
    return {((is_bfloat16<T> ? 0x7f80u : 0x7c00u) | (negative ? 0x8000u : 0u)) * 0x10001u};
  }
  __device__ float at(int k) const { return widen(T{uint16_t(bits >> (16 * k))}); }
};
template <class T>
__device__ __forceinline__ Pair<T> smaller(Pair<T> a, Pair<T> b) {
  return {is_bfloat16<T> ? min_nan_bf16x2(a.bits, b.bits) : min_nan_f16x2(a.bits, b.bits)};
}
template <class T>
__device__ __forceinline__ Pair<T> larger(Pair<T> a, Pair<T> b) {
  return {is_bfloat16<T> ? max_nan_bf16x2(a.bits, b.bits) : max_nan_f16x2(a.bits, b.bits)};
}

template <class T>
struct WordOf {
  using type = Pair<T>;
};
template <>
struct WordOf<float> {
  using type = Single<float>;
};
template <>
struct WordOf<double> {
  using type = Single<double>;
};

// ---- elements ----

__device__ __forceinline__ double read(const double* from) { return __ldg(from); }
__device__ __forceinline__ float read(const float* from) { return __ldg(from); }
__device__ __forceinline__ BFloat16 read(const BFloat16* from) { return {__ldg(&from->bits)}; }
__device__ __forceinline__ Float16 read(const Float16* from) { return {__ldg(&from->bits)}; }

// The element in the type that is computed with.
template <class T>
__device__ __forceinline__ Compute<T> load(const T* from) {
  return widen(read(from));
}

// ---- some words at once ----

template <int bytes>
struct RawOf;
template <>
struct RawOf<16> {
  using type = uint4;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<4> {
  using type = uint32_t;
};

// A thread's share of a row, read `bytes` at a time, to which rows must be aligned. The least
// serves any row: 2 bytes are half a word, which takes two reads.
template <class T, int bytes>
struct Share {
  using Word = typename WordOf<T>::type;
  static constexpr int words = bytes > int(sizeof(Word)) ? bytes / int(sizeof(Word)) : 1;
  static constexpr int coordinates = words * Word::coordinates;

  Word word[words];

  // at: the share's first element; left: elements of the row from there on
  __device__ static Share load(const T* at, int64_t left) {
    Share share;
    if constexpr (bytes < int(sizeof(Word))) {
      const uint32_t first = read(at).bits, second = left > 1 ? read(at + 1).bits : 0;
      share.word[0] = {first | second << 16};
    } else {
      using Raw = typename RawOf<bytes>::type;
      const Raw raw = __ldg(reinterpret_cast<const Raw*>(at));
      static_assert(sizeof raw == sizeof share);
      memcpy(&share, &raw, sizeof share);
    }
    return share;
  }
  __device__ Compute<T> at(int coordinate) const {
    return word[coordinate / Word::coordinates].at(coordinate % Word::coordinates);
  }
};

// Stores a thread's results; those beyond the row's end are dropped.
template <int n, class R>
__device__ __forceinline__ void store(R* to, const R (&values)[n], int64_t left) {
  constexpr int bytes = n * int(sizeof(R)) < 16 ? n * int(sizeof(R)) : 16,
                step = bytes / int(sizeof(R));
  if (left >= n && reinterpret_cast<uintptr_t>(to) % bytes == 0) {
    using Raw = typename RawOf<bytes>::type;
#pragma unroll
    for (int i = 0; i < n; i += step) {
      Raw raw;
      memcpy(&raw, values + i, sizeof raw);
      *reinterpret_cast<Raw*>(to + i) = raw;
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (i < left) to[i] = values[i];
  }
}

}  // namespace htv::cuda
