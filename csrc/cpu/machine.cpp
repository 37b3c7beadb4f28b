#include "machine.h"

#include <string.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace htv {
namespace {

bool is_amd() {
#if defined(HTV_X86)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace

bool Trait::is_first() const {
  const char* wanted = std::getenv(variable);
  if (wanted == nullptr || *wanted == '\0') return usually_first;
  if (strcmp(wanted, first) == 0) return true;
  if (strcmp(wanted, second) == 0) return false;
  throw std::runtime_error(std::string(variable) + " must be " + first + " or " + second +
                           ", got '" + wanted + "'");
}

const Trait& product_trait() {
  static const Trait trait{"product", "HTV_CPU_PRODUCT", "torch", "own", !is_amd()};
  return trait;
}

const Trait& order_trait() {
  static const Trait trait{"order", "HTV_CPU_ORDER", "floats", "integers", !is_amd()};
  return trait;
}

Isa ranking_isa() {
  const Isa isa = current_isa();
  return isa == Isa::zen4 && order_trait().is_first() ? Isa::icelake : isa;
}

}  // namespace htv
