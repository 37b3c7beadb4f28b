// Votes by signs alone: compiled once per instruction set. A word of sign planes holds those of as
// many rows as it has bits.
#include "votes_kernel.h"

#include <cmath>
#include <vector>

#include "bits.h"
#include "lanes.h"

namespace htv::HTV_ISA {
namespace {

// (a ^ b) & c
template <class C>
C differing(C a, C b, C c) {
#if defined(__AVX512F__)
  return (C)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x28);
#else
  return (a ^ b) & c;
#endif
}

template <class V>
class VotePass {
  using R = Real<V>;
  using Int = typename Lane<V>::Int;
  // A rectangle of coordinates whose votes are counted together: as many registers as hold the
  // counts of one word's rows after the other.
  static constexpr int kVoteOut = 8, kColumns = kRegisters == 32 ? 2 : 1;
  static constexpr int64_t kWidth = kColumns * kLanes<V>;

  const VotesTask& task_;
  const VotesTile& tile_;
  std::vector<char> dense_;  // whether no factor of a rectangle's columns is 0
  int64_t kept_ = 0;

 public:
  VotePass(const VotesTask& task, const VotesTile& tile) : task_(task), tile_(tile) {
    for (int64_t column = tile.in_begin; column < tile.in_end; column += kWidth)
      dense_.push_back(all_vote(task.signs_x, column, kWidth));
  }

  int64_t run() {
    for (int64_t o = tile_.out_begin; o < tile_.out_end; o += kVoteOut)
      serve(o, least(kVoteOut, tile_.out_end - o));
    return kept_;
  }

 private:
  void serve(int64_t o, int64_t height) {
    const bool dense = all_vote(task_.signs_g, o, kVoteOut);
    for (int64_t column = tile_.in_begin; column < tile_.in_end; column += kWidth) {
      Count<V> net[kVoteOut][kColumns];
      if (dense && dense_[(column - tile_.in_begin) / kWidth]) {
        count_all(column, o, net);
      } else {
        count_nonzero(column, o, net);
      }
      if (task_.votes) {
        each(column, o, height, net, [&](V& sum, Count<V> votes, Mask<V> nan, R* at, int64_t n) {
          const V shown = Lane<V>::real(votes);
          store<V>(static_cast<R*>(task_.votes) + (at - sums()), nan ? undefined() : shown, n);
        });
      } else if (task_.statistic == Statistic::sign_sum) {
        each(column, o, height, net, [&](V& sum, Count<V> votes, Mask<V> nan, R* at, int64_t n) {
          store<V>(at, nan ? undefined() : Lane<V>::real(votes), n);
        });
      } else {
        mask(column, o, height, net);
      }
    }
  }

  static V undefined() { return splat<V>(R(NAN)); }
  R* sums() const { return static_cast<R*>(task_.sums); }

  // Whether none of the factors is 0 in any of the rows, for n columns from the given one on.
  bool all_vote(const SignPlanes& planes, int64_t column, int64_t n) const {
    using Bits = std::make_unsigned_t<Int>;
    constexpr int64_t bits = 8 * sizeof(Bits);
    Bits missing = 0;
    for (int64_t word = 0; word < planes.words; ++word) {
      const Bits all = Bits(-1) >> (bits - least(bits, task_.rows - word * bits));
      const Bits* const nonzero = planes.nonzero_at<Bits>(word, column);
      for (int64_t i = 0; i < n; ++i) missing |= nonzero[i] ^ all;
    }
    return missing == 0;
  }

  // net[a][b]: agreeing less dissenting votes of output o + a with register b of the columns from
  // `column` on. Planes reach beyond the last output and column.
  void count_all(int64_t column, int64_t o, Count<V> (&net)[kVoteOut][kColumns]) const {
    Count<V> dissent[kVoteOut][kColumns] = {};
    for (int64_t word = 0; word < task_.signs_x.words; ++word) {
      const Int* const x = task_.signs_x.negative_at<Int>(word, column);
      const Int* const g = task_.signs_g.negative_at<Int>(word, o);
      Count<V> of_x[kColumns];
      for (int b = 0; b < kColumns; ++b) of_x[b] = read<Count<V>>(x + b * kLanes<V>);
#pragma GCC unroll 8
      for (int a = 0; a < kVoteOut; ++a)
#pragma GCC unroll 2
        for (int b = 0; b < kColumns; ++b) dissent[a][b] += popcount(of_x[b] ^ g[a]);
    }
#pragma GCC unroll 8
    for (int a = 0; a < kVoteOut; ++a)
#pragma GCC unroll 2
      for (int b = 0; b < kColumns; ++b) net[a][b] = Int(task_.rows) - 2 * dissent[a][b];
  }

  // The same of the rows whose factors are both not 0.
  void count_nonzero(int64_t column, int64_t o, Count<V> (&net)[kVoteOut][kColumns]) const {
    for (int b = 0; b < kColumns; ++b) {
      Count<V> cast[kVoteOut] = {}, dissent[kVoteOut] = {};
      for (int64_t word = 0; word < task_.signs_x.words; ++word) {
        const int64_t at = column + b * kLanes<V>;
        const auto nonzero_x = read<Count<V>>(task_.signs_x.nonzero_at<Int>(word, at));
        const auto negative_x = read<Count<V>>(task_.signs_x.negative_at<Int>(word, at));
        const Int* const nonzero_g = task_.signs_g.nonzero_at<Int>(word, o);
        const Int* const negative_g = task_.signs_g.negative_at<Int>(word, o);
#pragma GCC unroll 8
        for (int a = 0; a < kVoteOut; ++a) {
          const Count<V> both = nonzero_x & nonzero_g[a];
          cast[a] += popcount(both);
          dissent[a] += popcount(differing(negative_x, Count<V>{} + negative_g[a], both));
        }
      }
      for (int a = 0; a < kVoteOut; ++a) net[a][b] = cast[a] - 2 * dissent[a];
    }
  }

  // Leaves the sums where the mask by votes keeps them.
  void mask(int64_t column, int64_t o, int64_t height, const Count<V> (&net)[kVoteOut][kColumns]) {
    const Int count = Int(task_.parameters.count);
    const Int flip = task_.statistic == Statistic::xor_mask ? -1 : 0;
    Count<V> total{};
    each(column, o, height, net, [&](V& sum, Count<V> votes, Mask<V> nan, R* at, int64_t n) {
      Mask<V> kept = (absolute(votes) >= count) ^ flip;
      store<V>(at, nan ? undefined() : kept ? sum : V{}, n);
      kept &= ~nan;
      if (n < kLanes<V>)
        for (int lane = int(n); lane < kLanes<V>; ++lane) kept[lane] = 0;
      total -= kept;
    });
    for (int lane = 0; lane < kLanes<V>; ++lane) kept_ += total[lane];
  }

  // Calls f(sum, votes, where a contribution is NaN, place, how many lanes are coordinates).
  template <class F>
  void each(int64_t column, int64_t o, int64_t height, const Count<V> (&net)[kVoteOut][kColumns],
            const F& f) const {
    const auto serve = [&](int a, int b, int64_t n) __attribute__((always_inline)) {
      R* const at = sums() + (o + a) * task_.in + column + b * kLanes<V>;
      V sum = load<V>(at, n);
      Mask<V> nan = sum != sum;
      if (any<V>(nan)) nan = nan_contributions(nan, o + a, column + b * kLanes<V>, n);
      f(sum, net[a][b], nan, at, n);
    };
    if (height == kVoteOut && column + kWidth <= tile_.in_end) {
#pragma GCC unroll 8
      for (int a = 0; a < kVoteOut; ++a)
#pragma GCC unroll 2
        for (int b = 0; b < kColumns; ++b) serve(a, b, kLanes<V>);
      return;
    }
    for (int a = 0; a < height; ++a)
      for (int b = 0; b < kColumns; ++b) {
        const int64_t n = least(kLanes<V>, tile_.in_end - column - b * kLanes<V>);
        if (n > 0) serve(a, b, n);
      }
  }

  // Which of the coordinates whose sums are NaN had a NaN contribution. The sum may also be
  // inf - inf, which a mask does hide: the few such coordinates are computed again, one by one.
  __attribute__((noinline)) Mask<V> nan_contributions(Mask<V> nan, int64_t row, int64_t column,
                                                      int64_t n) const {
    with_dtype(task_.dtype, [&](auto element) {
      using T = decltype(element);
      if constexpr (sizeof(Compute<T>) == sizeof(R)) {
        const T* const g = static_cast<const T*>(task_.grad_output) + row;
        const T* const x = static_cast<const T*>(task_.x) + column;
        const auto found = [&](int64_t lane) {
          for (int64_t r = 0; r < task_.rows; ++r) {
            const R p = load<V>(g + r * task_.out, 1)[0] * load<V>(x + r * task_.in + lane, 1)[0];
            if (p != p) return true;
          }
          return false;
        };
        for (int64_t lane = 0; lane < n; ++lane)
          if (nan[lane] && !found(lane)) nan[lane] = 0;
      }
    });
    for (int64_t lane = n; lane < kLanes<V>; ++lane) nan[lane] = 0;
    return nan;
  }
};

}  // namespace

int64_t votes_kernel(const VotesTask& task, const VotesTile& tile) {
  if (task.dtype == Dtype::float64) return VotePass<Register<double>>(task, tile).run();
  return VotePass<Register<float>>(task, tile).run();
}

}  // namespace htv::HTV_ISA
