// Sums of every sample for the scale and shift of a normalisation: hot loops, compiled once per CPU level.
#include "norm_kernel.h"

#include "lanes.h"

namespace htv::HTV_LEVEL {
namespace {

// A sum of sums of this many rows rounds less than one long sum, and the memory of as many rows is read at a time.
constexpr int64_t kBatchRows = 16;

// Some features of one sample.
template <class T>
struct Features {
  const T *grad, *x;  // of the first row
  const Compute<T>*mean, *rstd;
  Compute<T>*scale, *shift;
};

// Adds the rows [begin, end) of some registers of features to the sums; of the last, n lanes.
template <class V, int columns, class T>
void add_rows(const Features<T>& f, int64_t stride, int64_t begin, int64_t end, int64_t at, int64_t n) {
  constexpr int lanes = kLanes<V>;
  const auto within = [n](int c) { return c == columns - 1 ? n : lanes; };
  V scale[columns] = {}, shift[columns] = {};
  for (int64_t r = begin; r < end; ++r)
    for (int c = 0; c < columns; ++c) {
      const int64_t here = r * stride + at + c * lanes;
      const V grad = load<V>(f.grad + here, within(c)), x = load<V>(f.x + here, within(c));
      scale[c] += grad * ((x - f.mean[r]) * f.rstd[r]);
      shift[c] += grad;
    }
  for (int c = 0; c < columns; ++c) {
    const int64_t here = at + c * lanes;
    store<V>(f.scale + here, load<V>(f.scale + here, within(c)) + scale[c], within(c));
    store<V>(f.shift + here, load<V>(f.shift + here, within(c)) + shift[c], within(c));
  }
}

template <class T>
void chunk_of(const NormTask& task, int64_t chunk) {
  using R = Compute<T>;
  using V = Register<R>;
  constexpr int lanes = kLanes<V>;
  const int64_t stride = task.features, chunks = norm_chunks(stride), sample = chunk / chunks;
  const int64_t begin = chunk % chunks * kNormChunk, rest = stride - begin;
  const int64_t width = rest < kNormChunk ? rest : kNormChunk, first = sample * task.rows;
  const Features<T> features{static_cast<const T*>(task.grad) + first * stride + begin,
                             static_cast<const T*>(task.x) + first * stride + begin,
                             static_cast<const R*>(task.mean) + first,
                             static_cast<const R*>(task.rstd) + first,
                             static_cast<R*>(task.scale) + sample * stride + begin,
                             static_cast<R*>(task.shift) + sample * stride + begin};
  for (int64_t i = 0; i < width; ++i) features.scale[i] = features.shift[i] = 0;
  for (int64_t r = 0; r < task.rows; r += kBatchRows) {
    const int64_t end = r + kBatchRows < task.rows ? r + kBatchRows : task.rows;
    int64_t at = 0;
    for (; at + 4 * lanes <= width; at += 4 * lanes) add_rows<V, 4>(features, stride, r, end, at, lanes);
    for (; at < width; at += lanes) {
      const int64_t n = width - at;
      add_rows<V, 1>(features, stride, r, end, at, n < lanes ? n : lanes);
    }
  }
}

}  // namespace

void norm_kernel(const NormTask& task, int64_t first, int64_t last) {
  for (int64_t chunk = first; chunk < last; ++chunk)
    with_dtype(task.dtype, [&](auto element) { chunk_of<decltype(element)>(task, chunk); });
}

}  // namespace htv::HTV_LEVEL
