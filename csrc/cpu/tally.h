// Streaming statistics of products as kernels hold them in registers: they finish with E times the
// statistic. Summaries finish with the state itself, to be joined with those of other batches.
#pragma once

#include "lanes.h"
#include "summary.h"

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

// ---- summaries ----
//
// fields: how many values a state finishes with.
// field(i): sum, votes (as a Tally's), and the sum of squared deviations or of logarithms.

template <class V>
struct TallySummary {
  static constexpr int fields = 2;
  Tally<V> tally;

  void update(V v, int64_t nth, const Parameters&) { tally.update(v, nth); }
  void merge(const TallySummary& other, int64_t, int64_t) {
    tally.sum += other.tally.sum;
    tally.votes += other.tally.votes;
  }
  V field(int i) const { return i == 0 ? tally.sum : tally.votes; }
};

template <class V>
struct SpreadSummary : TallySummary<V> {
  static constexpr int fields = 3;
  Spread<V> spread;

  void update(V v, int64_t nth, const Parameters& p) {
    TallySummary<V>::update(v, nth, p);
    spread.update(v, nth);
  }
  void merge(const SpreadSummary& other, int64_t n, int64_t m) {
    TallySummary<V>::merge(other, n, m);
    spread.merge(other.spread, n, m);
  }
  V field(int i) const { return i == 2 ? spread.squares : TallySummary<V>::field(i); }
};

template <class V>
struct LogsSummary : TallySummary<V> {
  static constexpr int fields = 3;
  Product<V> product;

  void update(V v, int64_t nth, const Parameters& p) {
    TallySummary<V>::update(v, nth, p);
    product.update(absolute(v) + Real<V>(p.log_offset));
  }
  void merge(const LogsSummary& other, int64_t n, int64_t m) {
    TallySummary<V>::merge(other, n, m);
    product.merge(other.product);
  }
  V field(int i) const {
    constexpr double ln2 = 0.693147180559945309417;
    return i == 2 ? product.binary_logarithm() * Real<V>(ln2) : TallySummary<V>::field(i);
  }
};

// Calls f(State{}) with the state of a streaming statistic's summary.
template <class V, class F>
void with_summary(Statistic statistic, const F& f) {
  if (keeps_spread(statistic)) return f(SpreadSummary<V>{});
  if (keeps_logs(statistic)) return f(LogsSummary<V>{});
  f(TallySummary<V>{});
}

template <class State>
constexpr bool is_summary = requires { State::fields; };

// A state takes in the contribution of the nth group.
template <class State, class V>
HTV_INLINE void absorb(State& state, V v, int64_t nth, const Parameters& p) {
  if constexpr (is_summary<State>) state.update(v, nth, p);
  else state.update(v, nth);
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
