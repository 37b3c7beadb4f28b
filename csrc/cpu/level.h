// Which instruction set the CPU kernels use. Hot files are compiled once per level, each into its own namespace.
#pragma once

namespace htv {

enum class Level { baseline, avx2, avx512 };

// The best level that was compiled, that this CPU has and that the environment variable HTV_CPU_CAPABILITY
// (baseline, avx2 or avx512; read at every call) allows. Throws std::runtime_error for any other value of it.
Level level();

const char* name(Level level);

}  // namespace htv

// HTV_DECLARE_PER_LEVEL(void kernel(int)) declares the kernel for every level;
// HTV_PER_LEVEL(kernel) is a pointer to the one in force.
#if defined(HTV_X86_LEVELS)
#define HTV_DECLARE_PER_LEVEL(...)   \
  namespace baseline { __VA_ARGS__; } \
  namespace avx2 { __VA_ARGS__; }     \
  namespace avx512 { __VA_ARGS__; }
#define HTV_PER_LEVEL(kernel)                             \
  (::htv::level() == ::htv::Level::avx512 ? avx512::kernel \
   : ::htv::level() == ::htv::Level::avx2 ? avx2::kernel   \
                                          : baseline::kernel)
#else
#define HTV_DECLARE_PER_LEVEL(...) \
  namespace baseline { __VA_ARGS__; }
#define HTV_PER_LEVEL(kernel) (::htv::level(), baseline::kernel)
#endif
