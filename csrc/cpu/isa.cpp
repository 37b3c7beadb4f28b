#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace htv {
namespace {

constexpr const char* kNames[] = {
#define HTV_USE(isa, ...) #isa,
    HTV_EVERY_ISA(HTV_USE)
#undef HTV_USE
};

#if defined(HTV_X86)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_icelake() {
  return __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bitalg") &&
         __builtin_cpu_supports("gfni");
}
#endif

Isa best_supported() {
#if defined(HTV_X86)
  __builtin_cpu_init();
  if (!has_avx2()) return Isa::baseline;
  if (!has_avx512()) return Isa::avx2;
  if (!has_icelake()) return Isa::avx512;
  return __builtin_cpu_supports("avx512bf16") ? Isa::zen4 : Isa::icelake;
#else
  return Isa::baseline;
#endif
}

// All names as a sentence lists them.
std::string listed_names() {
  std::string list;
  const int last = std::size(kNames) - 1;
  for (int i = 0; i < last; ++i) list += (i > 0 ? ", " : "") + std::string(kNames[i]);
  return list + " or " + kNames[last];
}

}  // namespace

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa current_isa() {
  static const Isa best = best_supported();
  const char* wanted = std::getenv("HTV_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  const auto* const found = std::find(std::begin(kNames), std::end(kNames), std::string(wanted));
  if (found == std::end(kNames))
    throw std::runtime_error("HTV_CPU_CAPABILITY must be " + listed_names() + ", got '" + wanted +
                             "'");
  return std::min(static_cast<Isa>(found - std::begin(kNames)), best);
}

}  // namespace htv
