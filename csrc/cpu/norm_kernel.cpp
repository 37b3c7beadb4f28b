// What every sample contributes to the scale and shift of a normalisation, and the gradient of a
// group normalisation's input: hot loops, compiled once per instruction set.
#include "norm_kernel.h"

#include "lanes.h"

namespace htv::HTV_ISA {
namespace {

// A sum of sums of this many rows rounds less than one long sum, and the memory of as many rows is
// read at a time.
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
void add_rows(const Features<T>& f, int64_t stride, int64_t begin, int64_t end, int64_t at,
              int64_t n) {
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
    for (; at + 4 * lanes <= width; at += 4 * lanes)
      add_rows<V, 4>(features, stride, r, end, at, lanes);
    for (; at < width; at += lanes) {
      const int64_t n = width - at;
      add_rows<V, 1>(features, stride, r, end, at, n < lanes ? n : lanes);
    }
  }
}

// One group of one sample's channels.
template <class T>
struct ChannelGroup {
  using R = Compute<T>;
  using V = Register<R>;
  static constexpr int lanes = kLanes<V>;

  const T *grad, *x;
  int64_t channels, space;
  const R* weight;
  R mean, rstd;

  V normalised(int64_t at, int64_t n) const { return (load<V>(x + at, n) - mean) * rstd; }

  // Sums over space of grad * x_hat and of grad. Many positions: registers along each channel's.
  void sums_along_space(R* scale, R* shift) const {
    for (int64_t c = 0; c < channels; ++c) {
      V scales[2] = {}, shifts[2] = {};
      for (int64_t p = 0, i = 0; p < space; p += lanes, i ^= 1) {
        const int64_t at = c * space + p;
        const V g = load<V>(grad + at, space - p);
        scales[i] += g * normalised(at, space - p);
        shifts[i] += g;
      }
      scale[c] = sum(scales[0] + scales[1]);
      shift[c] = sum(shifts[0] + shifts[1]);
    }
  }

  // Few positions: registers across channels, then sums of a few neighbours.
  void sums_across_channels(R* scale, R* shift, R* scratch) const {
    const int64_t values = channels * space;
    R* const products = scratch;
    R* const grads = scratch + values;
    for (int64_t at = 0; at < values; at += lanes) {
      const V g = load<V>(grad + at, values - at);
      store<V>(products + at, g * normalised(at, values - at), values - at);
      store<V>(grads + at, g, values - at);
    }
    for (int64_t c = 0; c < channels; ++c) {
      R product = 0, g = 0;
      for (int64_t p = c * space; p < (c + 1) * space; ++p) {
        product += products[p];
        g += grads[p];
      }
      scale[c] = product;
      shift[c] = g;
    }
  }

  // grad_x of n values, which have these weights.
  V input_gradient(int64_t at, int64_t n, V weights, R along, R constant) const {
    return (weights * load<V>(grad + at, n) - (normalised(at, n) * along + constant)) * rstd;
  }

  // The gradient loses what would change the group's mean (its part that is constant) and variance
  // (along x_hat).
  void grad_x(const R* scale, const R* shift, R* to, R* scratch) const {
    R along = 0, constant = 0;
    for (int64_t c = 0; c < channels; ++c) {
      along += weight[c] * scale[c];
      constant += weight[c] * shift[c];
    }
    const int64_t values = channels * space;
    along /= values;
    constant /= values;
    if (space >= lanes) {
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t p = 0; p < space; p += lanes) {
          const int64_t at = c * space + p, n = space - p;
          store<V>(to + at, input_gradient(at, n, splat<V>(weight[c]), along, constant), n);
        }
      return;
    }
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = c * space; p < (c + 1) * space; ++p) scratch[p] = weight[c];
    for (int64_t at = 0; at < values; at += lanes) {
      const int64_t n = values - at;
      store<V>(to + at, input_gradient(at, n, load<V>(scratch + at, n), along, constant), n);
    }
  }

  static R sum(V v) {
    R total = 0;
    for (int i = 0; i < lanes; ++i) total += v[i];
    return total;
  }
};

template <class T>
void group_of(const GroupNormTask& task, int64_t unit, void* scratch_memory) {
  using R = Compute<T>;
  R* const scratch = static_cast<R*>(scratch_memory);
  const int64_t group = unit % task.groups, values = task.channels * task.space;
  const ChannelGroup<T> of{static_cast<const T*>(task.grad) + unit * values,
                           static_cast<const T*>(task.x) + unit * values,
                           task.channels,
                           task.space,
                           static_cast<const R*>(task.weight) + group * task.channels,
                           static_cast<const R*>(task.mean)[unit],
                           static_cast<const R*>(task.rstd)[unit]};
  R* const scale = static_cast<R*>(task.scale) + unit * task.channels;
  R* const shift = static_cast<R*>(task.shift) + unit * task.channels;
  if (task.space >= of.lanes) of.sums_along_space(scale, shift);
  else of.sums_across_channels(scale, shift, scratch);
  if (task.grad_x != nullptr)
    of.grad_x(scale, shift, static_cast<R*>(task.grad_x) + unit * values, scratch);
}

}  // namespace

void group_norm_kernel(const GroupNormTask& task, int64_t first, int64_t last, void* scratch) {
  for (int64_t unit = first; unit < last; ++unit)
    with_dtype(task.dtype, [&](auto element) { group_of<decltype(element)>(task, unit, scratch); });
}

void norm_kernel(const NormTask& task, int64_t first, int64_t last) {
  for (int64_t chunk = first; chunk < last; ++chunk)
    with_dtype(task.dtype, [&](auto element) { chunk_of<decltype(element)>(task, chunk); });
}

}  // namespace htv::HTV_ISA
