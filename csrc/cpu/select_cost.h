// What order statistics cost on the CPU, for whoever provides scratch and threads; select.h
// computes them.
#pragma once

#include <stdint.h>

#include "../ranking.h"
#include "isa.h"

namespace htv {

// Memory order_statistics (select.h) needs beside the values, in bytes: the bit planes of two
// registers of coordinates and the candidates for two ranks.
inline int64_t select_scratch_bytes(const Ranking& ranking) {
  constexpr int64_t columns = 2, ranks = 2;
  const int64_t values = (ranking.ranked + 63) / 64 * 64, words = values / 32;
  return kWidestRegister * columns * (values + ranks * words);
}

// Operations per value, roughly, for dividing work among threads.
inline int64_t select_work(const Ranking& ranking) { return ranking.ranked < 16 ? 4 : 16; }

}  // namespace htv
