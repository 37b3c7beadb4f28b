// Bits of registers of integers: one lane per coordinate, one bit per row.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace htv::HTV_ISA {

// How many bits of each lane are set. C: a register of int32_t or int64_t.
template <class C>
C popcount(C bits) {
#if defined(__AVX512VPOPCNTDQ__)
  if constexpr (sizeof(bits[0]) == 8) return (C)_mm512_popcnt_epi64((__m512i)bits);
  return (C)_mm512_popcnt_epi32((__m512i)bits);
#else
  constexpr bool wide = sizeof(bits[0]) == 8;
  using Unsigned = Register<std::conditional_t<wide, uint64_t, uint32_t>>;
  const Unsigned ones = Unsigned{} + 1, bytes = ones * (wide ? 0x0101010101010101u : 0x01010101u);
  Unsigned v = (Unsigned)bits;
#if defined(__AVX2__)  // both halves of every byte by a table of 16
  const __m128i table = _mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const Unsigned low = v & bytes * 15, high = v >> 4 & bytes * 15;
#if defined(__AVX512BW__)
  const __m512i tables = _mm512_broadcast_i32x4(table);
  v = (Unsigned)_mm512_shuffle_epi8(tables, (__m512i)low) +
      (Unsigned)_mm512_shuffle_epi8(tables, (__m512i)high);
#else
  const __m256i tables = _mm256_broadcastsi128_si256(table);
  v = (Unsigned)_mm256_shuffle_epi8(tables, (__m256i)low) +
      (Unsigned)_mm256_shuffle_epi8(tables, (__m256i)high);
#endif
#else
  v -= v >> 1 & bytes * 0x55;
  v = (v & bytes * 0x33) + (v >> 2 & bytes * 0x33);
  v = (v + (v >> 4)) & bytes * 15;
#endif
  v += v >> 8;  // no byte's count exceeds 64
  v += v >> 16;
  if constexpr (wide) v += v >> 32;
  return (C)(v & ones * 127);
#endif
}

}  // namespace htv::HTV_ISA
