#include "level.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace htv {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "icelake", "zen4"};

Level best_supported() {
#if defined(HTV_X86_LEVELS)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool icelake = avx512 && __builtin_cpu_supports("avx512vpopcntdq") && __builtin_cpu_supports("avx512vbmi") &&
                       __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bitalg") &&
                       __builtin_cpu_supports("gfni");
  const bool zen4 = icelake && __builtin_cpu_supports("avx512bf16");
  return zen4 ? Level::zen4 : icelake ? Level::icelake : avx512 ? Level::avx512 : avx2 ? Level::avx2 : Level::baseline;
#else
  return Level::baseline;
#endif
}

}  // namespace

const char* name(Level level) { return kNames[static_cast<int>(level)]; }

Level level() {
  static const Level best = best_supported();
  const char* wanted = std::getenv("HTV_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Level level : {Level::baseline, Level::avx2, Level::avx512, Level::icelake, Level::zen4})
    if (std::string(wanted) == name(level)) return std::min(level, best);
  throw std::runtime_error("HTV_CPU_CAPABILITY must be baseline, avx2, avx512, icelake or zen4, got '" +
                           std::string(wanted) + "'");
}

}  // namespace htv
