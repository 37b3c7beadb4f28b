// Which instruction set the CPU kernels use. Hot files are compiled once per level, each into its own namespace.
#pragma once

namespace htv {

// icelake: AVX-512 as Intel has it since Ice Lake, with VPOPCNTDQ, VBMI and GFNI.
// zen4: the same with products of bfloat16, as AMD has it since Zen 4 and Intel since Sapphire Rapids.
enum class Level { baseline, avx2, avx512, icelake, zen4 };

// The best level that was compiled, that this CPU has and that the environment variable HTV_CPU_CAPABILITY
// (one of these names; read at every call) allows. Throws std::runtime_error for any other value of it.
Level level();

const char* name(Level level);

template <class Kernel>
Kernel* in_force(Level level, Kernel* baseline, Kernel* avx2, Kernel* avx512, Kernel* icelake, Kernel* zen4) {
  Kernel* const kernels[] = {baseline, avx2, avx512, icelake, zen4};
  return kernels[static_cast<int>(level)];
}

}  // namespace htv

// HTV_DECLARE_PER_LEVEL(void kernel(int)) declares the kernel for every level;
// HTV_PER_LEVEL(kernel) is a pointer to the one in force.
#if defined(HTV_X86_LEVELS)
#define HTV_DECLARE_PER_LEVEL(...)   \
  namespace baseline { __VA_ARGS__; } \
  namespace avx2 { __VA_ARGS__; }     \
  namespace avx512 { __VA_ARGS__; }   \
  namespace icelake { __VA_ARGS__; }  \
  namespace zen4 { __VA_ARGS__; }
#define HTV_PER_LEVEL(kernel) \
  (::htv::in_force(::htv::level(), baseline::kernel, avx2::kernel, avx512::kernel, icelake::kernel, zen4::kernel))
#else
#define HTV_DECLARE_PER_LEVEL(...) \
  namespace baseline { __VA_ARGS__; }
#define HTV_PER_LEVEL(kernel) (::htv::level(), baseline::kernel)
#endif
