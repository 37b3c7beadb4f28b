// Threads, their scratch, and sums that do not depend on them.
#pragma once

#include <array>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "../op_checks.h"

namespace htv::cpu {

// Blocks of memory a thread keeps for its next call: fresh ones cost a page fault every 4 KB, which
// took as long as what was done in them. From malloc, and aligned by hand: glibc before 2.38 seldom
// reuses what aligned_alloc gave.
class KeptBlocks {
 public:
  struct Block {
    std::unique_ptr<void, decltype(&std::free)> memory{nullptr, &std::free};
    size_t bytes = 0;
  };

  static Block take(size_t bytes) {
    Block* best = nullptr;
    for (Block& block : kept())
      if (block.bytes >= bytes && (best == nullptr || block.bytes < best->bytes)) best = &block;
    if (best != nullptr) return std::exchange(*best, Block{});
    Block fresh;
    fresh.memory.reset(std::malloc(bytes));
    STD_TORCH_CHECK(fresh.memory != nullptr, "htv: no memory for ", bytes, " bytes of scratch");
    fresh.bytes = bytes;
    return fresh;
  }

  // Keeps the largest blocks that are not too large to be kept.
  static void give_back(Block block) {
    if (block.bytes > kMostBytes) return;
    for (Block& other : kept())
      if (other.bytes < block.bytes) std::swap(other, block);
  }

 private:
  // The copies convolutions make of their operands.
  static constexpr size_t kMostBytes = (8 << 20) + 4096;
  static std::array<Block, 4>& kept() {
    thread_local std::array<Block, 4> blocks;
    return blocks;
  }
};

// Memory aligned to 64 bytes.
class Scratch {
  KeptBlocks::Block block_;
  void* aligned_ = nullptr;

 public:
  explicit Scratch(int64_t bytes) {
    STD_TORCH_CHECK(bytes >= 0, "htv: ", bytes, " bytes of scratch");
    constexpr size_t alignment = 64;
    if (bytes == 0) return;
    size_t space = size_t(bytes) + alignment;
    block_ = KeptBlocks::take(space);
    aligned_ = block_.memory.get();
    std::align(alignment, size_t(bytes), aligned_, space);
  }
  Scratch(Scratch&&) = default;
  ~Scratch() {
    if (block_.memory != nullptr) KeptBlocks::give_back(std::move(block_));
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

// A dense tensor without values. torch::stable::new_empty goes by more of torch's operators, which
// calls on small layers feel.
inline Tensor new_tensor(const std::vector<int64_t>& shape, torch::headeronly::ScalarType type) {
  static const std::string caller = "htv";
  const Checked checked(caller);
  std::vector<int64_t> strides(shape.size(), 1);
  for (int64_t d = int64_t(shape.size()) - 2; d >= 0; --d)
    strides[d] = checked.product(strides[d + 1], std::max<int64_t>(shape[d + 1], 1));
  const int32_t number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(),
                                                  strides.data(), number,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// A float64 scalar tensor.
inline Tensor sum_in_order(const std::vector<double>& parts) {
  Tensor total = new_tensor({}, torch::headeronly::ScalarType::Double);
  double sum = 0;
  for (const double part : parts) sum += part;
  *static_cast<double*>(total.mutable_data_ptr()) = sum;
  return total;
}

}  // namespace htv::cpu
