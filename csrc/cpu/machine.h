// What is faster on this machine's processor, of ways that give the same values.
#pragma once

#include "isa.h"

namespace htv {

// One trait: its name, its choices, the environment variable that names one of them (read at every
// call), and whether it is the first one on this machine by itself.
struct Trait {
  const char* name;
  const char* variable;
  const char *first, *second;
  bool usually_first;

  // The choice in force. Throws std::runtime_error where the variable names neither.
  bool is_first() const;
  const char* choice() const { return is_first() ? first : second; }
};

// Whose matrix product takes plain sums of products, of which votes need no more than the value:
// torch's library is faster than the tiles here on processors that it was written for; AMD's are
// not among them.
const Trait& product_trait();
// As what order statistics compare values, where registers have 512 bits: Intel's processors take
// the smaller and the larger of integers at half the rate of floats, AMD's at twice.
const Trait& order_trait();

inline bool torch_multiplies() { return product_trait().is_first(); }

// The instruction set of kernels that rank values: the current one, or that before it which
// compares floats.
Isa ranking_isa();

}  // namespace htv

// HTV_PER_RANKING_ISA(kernel) is a pointer to the kernel of ranking_isa().
#define HTV_PER_RANKING_ISA(kernel) \
  (::htv::for_isa(::htv::ranking_isa(), {HTV_COMPILED_ISAS(HTV_POINTER_IN, kernel)}))
