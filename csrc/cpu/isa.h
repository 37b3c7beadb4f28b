// Which instruction set the CPU kernels use. cpu/*_kernel.cpp are compiled once for each, each time
// into a namespace of its name.
#pragma once

#include <stdint.h>

#include <initializer_list>

// Calls use(isa, ...) for every instruction set, each of which has all that those before it have.
// icelake: AVX-512 as Intel has it since Ice Lake, with VPOPCNTDQ, VBMI and GFNI.
// zen4: the same with products of bfloat16, as AMD has it since Zen 4 and Intel since Sapphire
// Rapids.
// clang-format off
#define HTV_EVERY_ISA(use, ...) \
  use(baseline, __VA_ARGS__)    \
  use(avx2, __VA_ARGS__)        \
  use(avx512, __VA_ARGS__)      \
  use(icelake, __VA_ARGS__)     \
  use(zen4, __VA_ARGS__)
// clang-format on

// The same for those that kernels are compiled for.
#if defined(HTV_X86)
#define HTV_COMPILED_ISAS(use, ...) HTV_EVERY_ISA(use, __VA_ARGS__)
#else
#define HTV_COMPILED_ISAS(use, ...) use(baseline, __VA_ARGS__)
#endif

namespace htv {

enum class Isa {
#define HTV_USE(isa, ...) isa,
  HTV_EVERY_ISA(HTV_USE)
#undef HTV_USE
};

constexpr int64_t kWidestRegister = 64;  // bytes, of any instruction set

// The best one that was compiled for, that this CPU has and that the environment variable
// HTV_CPU_CAPABILITY (one of these names; read at every call) allows. Throws std::runtime_error for
// any other value of it.
Isa current_isa();

const char* name(Isa isa);

// kernels: one for each compiled instruction set, in their order.
template <class Kernel>
Kernel* for_isa(Isa isa, std::initializer_list<Kernel*> kernels) {
  return kernels.begin()[static_cast<int>(isa)];
}

}  // namespace htv

// HTV_DECLARE_PER_ISA(void kernel(int)) declares the kernel for every compiled instruction set;
// HTV_PER_ISA(kernel) is a pointer to the current one's.
#define HTV_DECLARE_IN(isa, ...) \
  namespace isa { __VA_ARGS__; }
#define HTV_DECLARE_PER_ISA(...) HTV_COMPILED_ISAS(HTV_DECLARE_IN, __VA_ARGS__)
#define HTV_POINTER_IN(isa, kernel) isa::kernel,
#define HTV_PER_ISA(kernel) \
  (::htv::for_isa(::htv::current_isa(), {HTV_COMPILED_ISAS(HTV_POINTER_IN, kernel)}))
