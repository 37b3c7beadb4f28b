// Masks and sign sums of a linear layer's contributions g[o] * x[i] where no group has more than
// one row: compiled once per instruction set. The sum of contributions is a matrix product; the
// sign of one is the product of its factors' signs, so votes are counted on sign planes and no
// contribution is formed. (A product too small for its type still votes.)
#include "votes_kernel.h"

#include "bits.h"
#include "lanes.h"

namespace htv::HTV_ISA {
namespace {

constexpr int kTogether = kRegisters == 32 ? 8 : 4;  // outputs whose votes are counted at once
static_assert(kVotesOut % kTogether == 0);

template <class V, class T>
class VotesTile {
  using R = Real<V>;
  using Int = typename Lane<V>::Int;
  static constexpr int kLanesOf = kLanes<V>;

  const VotesTask& task_;
  const int64_t tile_, out_, in_, height_, width_;

 public:
  VotesTile(const VotesTask& task, int64_t tile)
      : task_(task),
        tile_(tile),
        out_(tile / task.tiles_in() * kVotesOut),
        in_(tile % task.tiles_in() * kVotesIn),
        height_(least(kVotesOut, task.out - out_)),
        width_(least(kVotesIn, task.in - in_)) {}

  void run() {
    int64_t kept = 0;
    for (int64_t column = in_; column < in_ + width_; column += kLanesOf)
      for (int64_t o = out_; o < out_ + height_; o += kTogether) {
        Count<V> net[kTogether];
        count(o, column, net);
        for (int64_t a = 0; a < least(kTogether, out_ + height_ - o); ++a)
          kept += apply(net[a], o + a, column);
      }
    task_.kept[tile_] = kept;
  }

 private:
  // Agreeing less dissenting votes of the rows whose factors are both not 0. Planes are padded
  // beyond the last output.
  void count(int64_t o, int64_t column, Count<V> (&net)[kTogether]) const {
    const SignPlanes &of_g = task_.signs_g, &of_x = task_.signs_x;
    Count<V> cast[kTogether] = {}, dissent[kTogether] = {};
    for (int64_t word = 0; word < of_g.words; ++word) {
      const Int* const nonzero_g = of_g.nonzero_at<Int>(word, o);
      const Int* const negative_g = of_g.negative_at<Int>(word, o);
      const Count<V> nonzero_x = read<Count<V>>(of_x.nonzero_at<Int>(word, column));
      const Count<V> negative_x = read<Count<V>>(of_x.negative_at<Int>(word, column));
#pragma GCC unroll 8
      for (int a = 0; a < kTogether; ++a) {
        const Count<V> both = nonzero_x & nonzero_g[a];
        cast[a] += popcount(both);
        dissent[a] += popcount((negative_x ^ negative_g[a]) & both);
      }
    }
    for (int a = 0; a < kTogether; ++a) net[a] = cast[a] - 2 * dissent[a];
  }

  // Replaces the sums of a register of coordinates; returns how many the mask keeps.
  int64_t apply(Count<V> net, int64_t o, int64_t column) const {
    R* const at = static_cast<R*>(task_.value) + o * task_.in + column;
    const int64_t n = least(in_ + width_ - column, kLanesOf);
    const V sum = load<V>(at, n), one = splat<V>(1);
    Votes<V> votes;
    votes.net = net;
    votes.nan = nan_contributions(sum, o, column, n);
    const Mask<V> agreed = votes.reach(task_.parameters.count);
    Outcome<V> outcome;
    if (task_.statistic == Statistic::and_mask) {
      outcome = votes.poison(agreed ? sum : V{}, agreed ? one : V{});
    } else if (task_.statistic == Statistic::xor_mask) {
      outcome = votes.poison(agreed ? V{} : sum, agreed ? V{} : one);
    } else {
      outcome = votes.poison(Lane<V>::real(net), V{});
    }
    store<V>(at, outcome.value, n);
    int64_t kept = 0;
    for (int64_t lane = 0; lane < n; ++lane) kept += outcome.mask[lane] != 0;
    return kept;
  }

  // Which coordinates had a NaN contribution. A NaN sum may also be inf - inf, which a mask does
  // hide: the few such coordinates are computed again, one by one.
  Mask<V> nan_contributions(V sum, int64_t o, int64_t column, int64_t n) const {
    Mask<V> suspects = sum != sum;
    for (int64_t lane = 0; lane < n; ++lane)
      if (suspects[lane] && !has_nan_contribution(o, column + lane)) suspects[lane] = 0;
    return suspects;
  }

  bool has_nan_contribution(int64_t o, int64_t i) const {
    const T* const g = static_cast<const T*>(task_.grad_output) + o;
    const T* const x = static_cast<const T*>(task_.x) + i;
    for (int64_t r = 0; r < task_.rows; ++r) {
      const R p = load<V>(g + r * task_.out, 1)[0] * load<V>(x + r * task_.in, 1)[0];
      if (p != p) return true;
    }
    return false;
  }
};

}  // namespace

void votes_kernel(const VotesTask& task, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile)
    with_dtype(task.dtype, [&](auto element) {
      using T = decltype(element);
      VotesTile<Register<Compute<T>>, T>(task, tile).run();
    });
}

}  // namespace htv::HTV_ISA
