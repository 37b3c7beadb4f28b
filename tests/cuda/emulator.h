// Runs CUDA kernels on the CPU, as they stand: what csrc/cuda/device.h offers, for a plain C++
// compiler.
//
// The threads of a block are fibers of one OS thread. One runs until it waits at a barrier or for
// the other lanes of its warp; those of a warp or block go on when all have arrived. A warp goes as
// far as it can before the next one starts, in ascending order, or in descending order in every
// other launch: a missing barrier shows as wrong results. Shared memory is full of NaN when a block
// starts.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <array>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
using cudaStream_t = void*;

namespace htv::emulated {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;

enum class Waits { no, for_warp, for_block, ended };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  ucontext_t start;
  jmp_buf resume;
  Waits waits = Waits::no;
  bool started = false;
  int exchanges = 0;  // of this warp so far
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> shared;
  // Two slots per thread, used in turn: a lane may not yet have read what another already replaces.
  std::vector<std::array<std::array<uint32_t, 16>, 2>> slots;
  jmp_buf scheduler;
  ucontext_t home;
  void (*body)(void*);
  void* argument;
  unsigned current, threads, launches = 0;
  unsigned block_index, blocks;
};

inline Block& block() {
  static Block b;
  return b;
}

inline void suspend(Waits waits) {
  Block& b = block();
  Fiber& fiber = b.fibers[b.current];
  fiber.waits = waits;
  if (_setjmp(fiber.resume) == 0) _longjmp(b.scheduler, 1);
}

inline void entry() {
  Block& b = block();
  b.body(b.argument);
  b.fibers[b.current].waits = Waits::ended;
  _longjmp(b.scheduler, 1);
}

inline void run_until_it_waits(unsigned thread) {
  Block& b = block();
  Fiber& fiber = b.fibers[thread];
  b.current = thread;
  if (_setjmp(b.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, entry, 0);
  setcontext(&fiber.start);
}

// Whether all of threads first <= t < last wait thus or have ended, and some wait.
inline bool all_wait(unsigned first, unsigned last, Waits waits) {
  bool some = false;
  for (unsigned t = first; t < last; ++t) {
    const Waits now = block().fibers[t].waits;
    if (now != waits && now != Waits::ended) return false;
    some |= now == waits;
  }
  return some;
}

inline void run_block() {
  Block& b = block();
  memset(b.shared.data(), 0xff, b.shared.size());
  for (unsigned t = 0; t < b.threads; ++t) {
    b.fibers[t].waits = Waits::no;
    b.fibers[t].started = false;
    b.fibers[t].exchanges = 0;
  }
  const bool descending = b.launches % 2 == 1;
  const auto release = [&](unsigned first, unsigned last, Waits waits) {
    if (!all_wait(first, last, waits)) return false;
    for (unsigned t = first; t < last; ++t)
      if (b.fibers[t].waits == waits) b.fibers[t].waits = Waits::no;
    return true;
  };
  const unsigned warps = (b.threads + kWarp - 1) / kWarp;
  do {
    for (unsigned i = 0; i < warps; ++i) {  // as far as each can go
      const unsigned first = (descending ? warps - 1 - i : i) * kWarp;
      const unsigned last = first + kWarp < b.threads ? first + kWarp : b.threads;
      do {
        for (unsigned k = 0; k < last - first; ++k) {
          const unsigned t = descending ? last - 1 - k : first + k;
          if (b.fibers[t].waits == Waits::no) run_until_it_waits(t);
        }
      } while (release(first, last, Waits::for_warp));
    }
  } while (release(0, b.threads, Waits::for_block));
  for (unsigned t = 0; t < b.threads; ++t)
    if (b.fibers[t].waits != Waits::ended) {
      fprintf(stderr, "emulator: the threads of block %u wait for each other\n", b.block_index);
      abort();
    }
}

// Lets every lane of the warp see what each of them gives; returns a function of the lane.
template <class T>
auto exchange(const T& mine) {
  static_assert(sizeof(T) <= 64);
  Block& b = block();
  const int slot = b.fibers[b.current].exchanges++ % 2;
  memcpy(b.slots[b.current][slot].data(), &mine, sizeof mine);
  suspend(Waits::for_warp);
  const unsigned first = b.current / kWarp * kWarp;
  return [first, slot](int lane) {
    T theirs;
    memcpy(&theirs, block().slots[first + lane][slot].data(), sizeof theirs);
    return theirs;
  };
}

struct Index {
  unsigned Block::* member;
  operator unsigned() const { return block().*member; }
};
struct Indices {
  Index x;
};

}  // namespace htv::emulated

inline constexpr htv::emulated::Indices threadIdx{{&htv::emulated::Block::current}};
inline constexpr htv::emulated::Indices blockIdx{{&htv::emulated::Block::block_index}};
inline constexpr htv::emulated::Indices blockDim{{&htv::emulated::Block::threads}};
inline constexpr htv::emulated::Indices gridDim{{&htv::emulated::Block::blocks}};

inline void __syncthreads() { htv::emulated::suspend(htv::emulated::Waits::for_block); }
inline void __syncwarp() { htv::emulated::suspend(htv::emulated::Waits::for_warp); }

template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return htv::emulated::exchange(v)(threadIdx.x % 32 ^ mask);
}
inline int __reduce_add_sync(unsigned, int v) {
  const auto of = htv::emulated::exchange(v);
  int sum = 0;
  for (int lane = 0; lane < 32; ++lane) sum += of(lane);
  return sum;
}
inline int __reduce_min_sync(unsigned, int v) {
  const auto of = htv::emulated::exchange(v);
  int least = of(0);
  for (int lane = 1; lane < 32; ++lane) least = of(lane) < least ? of(lane) : least;
  return least;
}
inline int __reduce_max_sync(unsigned, int v) { return -1 - __reduce_min_sync(0, -1 - v); }

template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T) != 0) {
    fprintf(stderr, "emulator: misaligned access of %zu bytes\n", sizeof(T));
    abort();
  }
  return *from;
}
inline int atomicAdd(int* to, int v) {
  const int old = *to;
  *to += v;
  return old;
}

namespace htv::cuda {

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(emulated::block().shared.data()) + 127) /
                              128 * 128);
}

inline float min_nan(float a, float b) { return a != a || a < b ? a : b; }
inline float max_nan(float a, float b) { return a != a || a > b ? a : b; }
inline float half_to_float(uint16_t bits) {
  _Float16 h;
  memcpy(&h, &bits, sizeof h);
  return h;
}
inline float bfloat_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float f;
  memcpy(&f, &wide, sizeof f);
  return f;
}

// One of two 16-bit numbers in each half of a word.
template <float (*widen)(uint16_t), bool smaller>
uint32_t choose_halves(uint32_t a, uint32_t b) {
  uint32_t chosen = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t of_a = a >> shift, of_b = b >> shift;
    const float x = widen(of_a), y = widen(of_b);
    const bool first = x != x || (y == y && (smaller ? x < y : x > y));
    chosen |= uint32_t(first ? of_a : of_b) << shift;
  }
  return chosen;
}
inline uint32_t min_nan_f16x2(uint32_t a, uint32_t b) {
  return choose_halves<half_to_float, true>(a, b);
}
inline uint32_t max_nan_f16x2(uint32_t a, uint32_t b) {
  return choose_halves<half_to_float, false>(a, b);
}
inline uint32_t min_nan_bf16x2(uint32_t a, uint32_t b) {
  return choose_halves<bfloat_to_float, true>(a, b);
}
inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  return choose_halves<bfloat_to_float, false>(a, b);
}

// ldmatrix.x4: lane 8 j + r names row r of matrix j; a lane gets word lane % 4 of row lane / 4 of
// each.
inline void load_matrices(uint32_t (&words)[4], const void* row) {
  const auto of = emulated::exchange(row);
  const int lane = threadIdx.x % 32;
  for (int j = 0; j < 4; ++j)
    words[j] = static_cast<const uint32_t*>(of(8 * j + lane / 4))[lane % 4];
}

// mma.m16n8k32.s8: a's and b's words lie as the PTX manual says; sums += a b.
inline void multiply_signs(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Words {
    uint32_t a[4], b[2];
  };
  const auto of = emulated::exchange(Words{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 32; ++k) {
      const int word = k / 4, shift = k % 4 * 8;
      const uint32_t of_a = of(row % 8 * 4 + word % 4).a[row / 8 + 2 * (word / 4)];
      const uint32_t of_b = of(column * 4 + word % 4).b[word / 4];
      sums[i] += int8_t(of_a >> shift) * int8_t(of_b >> shift);
    }
  }
}

// Copies are done at once, but what was not waited for stays poisoned: they land when their group
// is waited for.
struct Copy {
  void* to;
  const void* from;
};
struct Copies {
  std::vector<std::vector<Copy>> groups = {{}};
};
inline std::vector<Copies>& copies() {
  static std::vector<Copies> of_thread(2048);
  return of_thread;
}
inline void copy_async(void* to, const void* from) {
  copies()[threadIdx.x].groups.back().push_back({to, from});
}
inline void commit_copies() { copies()[threadIdx.x].groups.emplace_back(); }
template <int pending>
void wait_copies() {
  auto& groups = copies()[threadIdx.x].groups;
  while (groups.size() > pending + 1) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
            cudaStream_t, const Arguments&... arguments) {
  emulated::Block& b = emulated::block();
  std::tuple<Parameters...> values{arguments...};
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...>* values;
  } call{kernel, &values};
  b.body = [](void* argument) {
    const Call& c = *static_cast<Call*>(argument);
    std::apply(c.kernel, *c.values);
  };
  b.argument = &call;
  b.threads = unsigned(threads);
  b.blocks = unsigned(blocks);
  if (b.fibers.size() < b.threads) {
    b.fibers.resize(b.threads);
    b.slots.resize(b.threads);
  }
  b.shared.resize(shared_bytes + 128);
  ++b.launches;
  for (b.block_index = 0; b.block_index < b.blocks; ++b.block_index) emulated::run_block();
}

// An H200's, unless a test says less.
inline int64_t most_shared_bytes() {
  const char* const said = getenv("HTV_EMULATED_SHARED");
  return said ? atoll(said) : 232448;
}

}  // namespace htv::cuda
