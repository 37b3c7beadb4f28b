// Cross-entropies of shifted logits, row by row: hot loops, compiled once per instruction set.
#include "cross_entropy_kernel.h"

#include "exponential.h"

namespace htv::HTV_ISA {
namespace {

// Shifted logits at a time: they stay in the first-level cache between max and exp.
constexpr int64_t kChunk = 512;

// One row of the task: T are the logits, S the shift.
template <class T, class S>
struct Row {
  using R = Compute<T>;
  using V = Register<R>;
  static constexpr int64_t lanes = kLanes<V>;

  const T* logits;
  const S* shift;
  const R* weight;
  R scale, kept, smoothing, weights;  // kept: by the class itself; smoothing: of every class
  int64_t classes, target;

  Row(const CrossEntropyTask& task, int64_t row)
      : logits(static_cast<const T*>(task.logits) + row * task.stride),
        shift(static_cast<const S*>(task.shift) + row * task.shift_stride),
        weight(static_cast<const R*>(task.weight)),
        scale(R(task.scale)),
        kept(R(1 - task.smoothing)),
        smoothing(R(task.smoothing / double(task.classes))),
        weights(R(task.weights)),
        classes(task.classes),
        target(task.targets[row]) {}

  int64_t within(int64_t at) const { return classes - at < lanes ? classes - at : lanes; }
  R target_weight() const { return weight == nullptr ? R(1) : weight[target]; }

  // n lanes from class `at` on; the others are 0.
  V shifted(int64_t at, int64_t n) const {
    return load<V>(logits + at, n) + load<V>(shift + at, n) * scale;
  }
  V weights_at(int64_t at, int64_t n) const {
    return weight == nullptr ? splat<V>(R(1)) : load<V>(weight + at, n);
  }
  // v where there are classes, counted from `at` on, and `other` behind the last.
  V only(int64_t at, V v, R other) const {
    return lane_numbers<V>() < typename Lane<V>::Int(within(at)) ? v : splat<V>(other);
  }
};

// The largest shifted logit, and the sum of exponentials relative to it.
template <class T, class S>
struct Partition {
  using R = Compute<T>;
  using V = Register<R>;
  R peak = -R(INFINITY), sum = 0;

  explicit Partition(const Row<T, S>& row) {
    for (int64_t begin = 0; begin < row.classes; begin += kChunk) add(row, begin);
  }

  // What exponentials are relative to: the peak, unless there is nothing but -inf so far.
  R base() const { return peak == -R(INFINITY) ? R(0) : peak; }

  void add(const Row<T, S>& row, int64_t begin) {
    constexpr int64_t lanes = kLanes<V>;
    V z[kChunk / lanes];
    const int64_t end = begin + kChunk < row.classes ? begin + kChunk : row.classes;
    V top = splat<V>(peak);
    int64_t registers = 0, at = begin;
    for (; at + lanes <= end; at += lanes) {
      z[registers] = row.shifted(at, lanes);
      top = larger(z[registers++], top);
    }
    if (at < end) {
      const V last = row.only(at, row.shifted(at, end - at), -R(INFINITY));
      top = larger(last, top);
      z[registers++] = last;
    }
    const R higher = largest_lane(top);
    if (higher > peak) {
      if (begin > 0) sum *= exponential(splat<V>(peak - higher))[0];
      peak = higher;
    }
    V parts{};
    for (int64_t i = 0; i < registers; ++i) parts += exponential(z[i] - base());
    sum += sum_of_lanes(parts);
  }
};

template <class T, class S>
void loss_of(const Row<T, S>& row, Compute<T>* loss, Compute<T>* peak, Compute<T>* log_sum) {
  using R = Compute<T>;
  using V = Register<R>;
  constexpr int64_t lanes = kLanes<V>;
  const Partition<T, S> found(row);
  *peak = found.peak;
  if constexpr (sizeof(R) == 4) *log_sum = ::logf(found.sum);
  if constexpr (sizeof(R) == 8) *log_sum = ::log(found.sum);
  const auto surprise = [&](int64_t at, int64_t n) {
    return (*peak - row.shifted(at, n)) + *log_sum;
  };
  *loss = row.target_weight() * surprise(row.target, 1)[0];
  if (row.smoothing == 0) return;
  double everywhere = 0;
  for (int64_t begin = 0; begin < row.classes; begin += kChunk) {
    V parts{};
    for (int64_t at = begin; at < begin + kChunk && at < row.classes; at += lanes) {
      const int64_t n = row.within(at);
      parts += row.only(at, surprise(at, n) * row.weights_at(at, n), 0);
    }
    everywhere += sum_of_lanes(parts);
  }
  *loss = row.kept * *loss + row.smoothing * R(everywhere);
}

template <class T, class S>
void gradient_of(const Row<T, S>& row, Compute<T> grad, Compute<T> peak, Compute<T> log_sum,
                 T* to) {
  using R = Compute<T>;
  using V = Register<R>;
  constexpr int64_t lanes = kLanes<V>;
  const R own = row.kept * row.target_weight();
  const R total = own + row.smoothing * row.weights;
  const auto softmax = [&](int64_t at, int64_t n) {
    return exponential((row.shifted(at, n) - peak) - log_sum) * total;
  };
  if (row.smoothing == 0) {
    for (int64_t at = 0; at < row.classes; at += lanes) {
      const int64_t n = row.within(at);
      store_as(to + at, softmax(at, n) * grad, n);
    }
  } else {
    for (int64_t at = 0; at < row.classes; at += lanes) {
      const int64_t n = row.within(at);
      store_as(to + at, (softmax(at, n) - row.smoothing * row.weights_at(at, n)) * grad, n);
    }
  }
  const int64_t y = row.target;
  const V target = splat<V>(own + row.smoothing * row.target_weight());
  store_as(to + y, (softmax(y, 1) - target) * grad, 1);
}

// Calls f(T{}, S{}) with the types of logits and shift.
template <class F>
void with_types(const CrossEntropyTask& task, const F& f) {
  if (task.dtype == Dtype::float64) return f(double{}, double{});
  with_dtype(task.dtype, [&](auto logit) {
    with_dtype(task.shift_dtype, [&](auto shift) {
      if constexpr (sizeof(logit) < 8 && sizeof(shift) < 8) f(logit, shift);
    });
  });
}

}  // namespace

void cross_entropy_kernel(const CrossEntropyTask& task, const CrossEntropyRows& rows, int64_t first,
                          int64_t last) {
  with_types(task, [&](auto logit, auto shift) {
    using T = decltype(logit);
    using R = Compute<T>;
    R *const loss = static_cast<R*>(rows.loss), *const peak = static_cast<R*>(rows.peak),
             *const log_sum = static_cast<R*>(rows.log_sum);
    for (int64_t r = first; r < last; ++r) {
      if (task.targets[r] == task.ignored) {
        loss[r] = peak[r] = log_sum[r] = 0;
      } else {
        loss_of(Row<T, decltype(shift)>(task, r), loss + r, peak + r, log_sum + r);
      }
    }
  });
}

void cross_entropy_grad_kernel(const CrossEntropyTask& task, const CrossEntropyGrad& grad,
                               int64_t first, int64_t last) {
  with_types(task, [&](auto logit, auto shift) {
    using T = decltype(logit);
    using R = Compute<T>;
    const R* const of_loss = static_cast<const R*>(grad.grad);
    const R *const peak = static_cast<const R*>(grad.peak), *const log_sum =
                                                                static_cast<const R*>(grad.log_sum);
    for (int64_t r = first; r < last; ++r) {
      T* const to = static_cast<T*>(grad.grad_logits) + r * task.classes;
      if (task.targets[r] == task.ignored) {
        memset(to, 0, task.classes * sizeof(T));
      } else {
        gradient_of(Row<T, decltype(shift)>(task, r), of_loss[r * grad.grad_stride], peak[r],
                    log_sum[r], to);
      }
    }
  });
}

}  // namespace htv::HTV_ISA
