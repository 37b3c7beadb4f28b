// Threads, their scratch, and sums that do not depend on them.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../contract.h"

namespace htv::cpu {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<void, Free>;

inline Scratch allocate_scratch(int64_t bytes) {
  constexpr int64_t alignment = 64;
  if (bytes == 0) return nullptr;
  void* const memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return Scratch(memory);
}

// f(first, last, scratch) over 0 <= chunk < chunks, on torch's threads; small work stays on one.
template <class F>
void parallel_chunks(int64_t chunks, int64_t work_per_chunk, int64_t scratch_bytes, const F& f) {
  constexpr int64_t worth_a_thread = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, work_per_chunk));
  if (chunks == 0) return;
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    const Scratch scratch = allocate_scratch(scratch_bytes);
    f(first, last, scratch.get());
  });
}

// A float64 scalar tensor beside `like`.
inline Tensor sum_in_order(const Tensor& like, const std::vector<double>& parts) {
  Tensor total = torch::stable::new_empty(like, {}, torch::headeronly::ScalarType::Double);
  double sum = 0;
  for (const double part : parts) sum += part;
  *static_cast<double*>(total.mutable_data_ptr()) = sum;
  return total;
}

}  // namespace htv::cpu
