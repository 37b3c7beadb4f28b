// Streaming statistics of products as kernels hold them in registers: they finish with E times the
// statistic.
#pragma once

#include "lanes.h"

namespace htv::HTV_ISA {

// State of the statistics that know sum and votes only. Votes are small integers, or NaN where a
// contribution is.
template <class V>
struct Tally {
  V sum{}, votes{};

  void update(V v, int64_t) {
    sum += v;
    votes += unit(v);
  }
  Outcome<V> finalize(Statistic statistic, const Parameters& p) const {
    if (statistic == Statistic::mean) return {sum, V{}};
    if (statistic == Statistic::sign_sum) return {votes, V{}};
    const V one = splat<V>(1);
    const Mask<V> agreed = absolute(votes) >= Real<V>(p.count), valid = votes == votes;
    const Mask<V> kept = statistic == Statistic::and_mask ? agreed & valid : ~agreed & valid;
    return {valid ? (kept ? sum : V{}) : votes, kept ? one : V{}};
  }
};

template <class V>
struct OnlySum {
  V sum{};

  void update(V v, int64_t) { sum += v; }
  Outcome<V> finalize(Statistic, const Parameters&) const { return {sum, V{}}; }
};

// A statistic of statistic.h, times E.
template <class V, class S>
struct Scaled : S {
  Outcome<V> finalize(Statistic, const Parameters& p) const {
    const Outcome<V> outcome = S::finalize(p);
    return {outcome.value * Real<V>(p.groups), outcome.mask};
  }
};

// Calls f(State{}) with the state of a streaming statistic.
template <class V, class F>
void with_tally(Statistic statistic, const F& f) {
  switch (statistic) {
    case Statistic::mean: return f(OnlySum<V>{});
    case Statistic::geometric_mean: return f(Scaled<V, GeometricMean<V>>{});
    case Statistic::sand_mask: return f(Scaled<V, SandMask<V>>{});
    default: return f(Tally<V>{});
  }
}

// Sums of masks, one per lane: in double, but for stretches of additions that are exact enough
// without.
template <class V>
class MaskSum {
  static constexpr int kStretch = 256;
  using Doubles = typename RegisterOf<double, 8 * kLanes<V>>::type;
  Doubles sums_{};
  V stretch_{};
  int added_ = 0;

 public:
  void add(V mask, int64_t n) {  // its first n lanes
    for (int64_t lane = n; lane < kLanes<V>; ++lane) mask[lane] = 0;
    stretch_ += mask;
    if (++added_ == kStretch) close();
  }
  double total() {
    close();
    double sum = 0;
    for (int lane = 0; lane < kLanes<V>; ++lane) sum += sums_[lane];
    return sum;
  }

 private:
  void close() {
    sums_ += __builtin_convertvector(stretch_, Doubles);
    stretch_ = V{};
    added_ = 0;
  }
};

}  // namespace htv::HTV_ISA
