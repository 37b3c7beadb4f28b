// Statistics of what groups contribute to the rows of a table: compiled once per instruction set.
#include "embedding_kernel.h"

#include "tally.h"

namespace htv::HTV_ISA {
namespace {

constexpr int kTogether = 4;  // registers of features, so that a row's lines are read in one go

template <class T, class State>
class Chunk {
  using R = Compute<T>;
  using V = Register<R>;
  static constexpr int kWidth = kLanes<V>;

  const EmbeddingTask& task_;
  MaskSum<V> mask_sum_;

 public:
  explicit Chunk(const EmbeddingTask& task) : task_(task) {}

  double run(int64_t chunk) {
    const int64_t along = task_.chunks_along(), first = chunk / along * kEmbeddingTokens;
    const int64_t begin = chunk % along * kEmbeddingFeatures;
    const int64_t end = least(begin + kEmbeddingFeatures, task_.features);
    for (int64_t token = first; token < least(first + kEmbeddingTokens, task_.tokens); ++token) {
      int64_t at = begin;
      for (; at + kTogether * kWidth <= end; at += kTogether * kWidth)
        features<kTogether>(token, at, kWidth);
      for (; at < end; at += kWidth) features<1>(token, at, least(kWidth, end - at));
    }
    return mask_sum_.total();
  }

 private:
  // K registers of features; n: lanes of the last. Groups without the token contribute zeros, which
  // change no state.
  template <int K>
  void features(int64_t token, int64_t at, int64_t n) {
    const T* const grad = static_cast<const T*>(task_.grad_output) + at;
    State states[K] = {};
    V sums[K] = {};
    const int64_t *row = task_.rows + task_.starts[token], *const end =
                                                               task_.rows + task_.starts[token + 1];
    for (; row != end; ++row) {
      for (int k = 0; k < K; ++k) {
        const T* const from = grad + *row * task_.features + k * kWidth;
        sums[k] += k + 1 < K ? load<V>(from) : load<V>(from, n);
      }
      if (row + 1 != end && task_.voter[row[0]] == task_.voter[row[1]]) continue;
      for (int k = 0; k < K; ++k) {
        states[k].update(sums[k], 0);
        sums[k] = V{};
      }
    }
    R* const to = static_cast<R*>(task_.value) + token * task_.features + at;
    for (int k = 0; k < K; ++k) {
      const int64_t lanes = k + 1 < K ? kWidth : n;
      const Outcome<V> outcome = states[k].finalize(task_.statistic, task_.parameters);
      store<V>(to + k * kWidth, outcome.value, lanes);
      if (has_mask(task_.statistic)) mask_sum_.add(outcome.mask, lanes);
    }
  }
};

}  // namespace

void embedding_kernel(const EmbeddingTask& task, int64_t first, int64_t last) {
  with_dtype(task.dtype, [&](auto element) {
    using T = decltype(element);
    using V = Register<Compute<T>>;
    for (int64_t chunk = first; chunk < last; ++chunk)
      task.mask_sums[chunk] = task.statistic == Statistic::mean
                                  ? Chunk<T, OnlySum<V>>(task).run(chunk)
                                  : Chunk<T, Tally<V>>(task).run(chunk);
  });
}

}  // namespace htv::HTV_ISA
