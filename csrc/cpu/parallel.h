// Threads, their scratch, and sums that do not depend on them.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../contract.h"

namespace htv::cpu {

// Memory aligned to 64 bytes, from malloc: glibc before 2.38 seldom reuses what aligned_alloc gave, so that a scratch per
// call would make the heap grow with every call.
class Scratch {
  std::unique_ptr<void, decltype(&std::free)> memory_{nullptr, &std::free};
  void* aligned_ = nullptr;

 public:
  explicit Scratch(int64_t bytes) {
    constexpr size_t alignment = 64;
    if (bytes == 0) return;
    size_t space = size_t(bytes) + alignment;
    memory_.reset(std::malloc(space));
    if (memory_ == nullptr) throw std::bad_alloc();
    aligned_ = memory_.get();
    std::align(alignment, size_t(bytes), aligned_, space);
  }
  void* get() const { return aligned_; }
};

// f(first, last, scratch) over 0 <= chunk < chunks, on torch's threads; small work stays on one.
template <class F>
void parallel_chunks(int64_t chunks, int64_t work_per_chunk, int64_t scratch_bytes, const F& f) {
  constexpr int64_t worth_a_thread = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, work_per_chunk));
  if (chunks == 0) return;
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t last) {
    const Scratch scratch(scratch_bytes);
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
