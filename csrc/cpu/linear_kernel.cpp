// Statistics of a linear layer's contributions, formed tile by tile in registers: compiled once per CPU level.
//
// With rows of several per group, each group's product is added to the tile's sum and its signs to the votes.
// With one row per group the contribution is g[o] * x[i], whose sign is sign(g[o]) * sign(x[i]): the sum is then one
// matrix product over all groups, votes are counted on the sign planes of its factors, and no contribution is ever
// formed. (A product too small for its type still votes there.)
#include "linear_kernel.h"

#include "bits.h"
#include "lanes.h"

namespace htv::HTV_LEVEL {
namespace {

// The register tile: kRows x kColumns accumulators, one row of x, one broadcast.
constexpr int kColumns = 3;
constexpr int kRows = kRegisters == 32 ? 8 : 4;
constexpr int kCells = kRows * kColumns;

template <class V>
using Cells = V[kRows][kColumns];

// cells = sum over rows of g[row][i] * x[row][j]
template <class V>
void product(const Real<V>* g, const V* x, int64_t rows, Cells<V>& cells) {
  Cells<V> sum = {};
  for (int64_t r = 0; r < rows; ++r, g += kRows, x += kColumns)
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < kColumns; ++j) sum[i][j] += g[i] * x[j];
  memcpy(cells, sum, sizeof sum);
}

template <class V, class T>
class Tile {
  using R = Real<V>;
  using Int = typename Lane<V>::Int;
  static constexpr int kWidth = kColumns * kLanes<V>;
  static constexpr int kPanelsIn = kTileIn / kWidth, kPanelsOut = kTileOut / kRows;
  static_assert(kPanelsIn * kWidth == kTileIn && kPanelsOut * kRows == kTileOut);

  const LinearTask& task_;
  const T* x_;
  const T* g_;
  const int64_t out_, in_;                   // first coordinate
  const int64_t height_, width_;             // coordinates in the tile
  const int64_t panels_out_, panels_in_;     // register tiles needed for them
  V* const packed_x_;                        // [panel][row][kColumns]
  R* const packed_g_;                        // [panel][row][kRows]
  V* const sum_;                             // [panel out][panel in][kRows][kColumns], as are the next two
  V* const unfinished_;
  Count<V>* const votes_;

  static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

  Cells<V>& cells(V* base, int64_t o, int64_t i) const {
    return *reinterpret_cast<Cells<V>*>(base + (o * kPanelsIn + i) * kCells);
  }
  Cells<Count<V>>& votes(int64_t o, int64_t i) const {
    return *reinterpret_cast<Cells<Count<V>>*>(votes_ + (o * kPanelsIn + i) * kCells);
  }
  const V* panel_x(int64_t panel, int64_t row) const { return packed_x_ + (panel * kBlockRows + row) * kColumns; }
  const R* panel_g(int64_t panel, int64_t row) const { return packed_g_ + (panel * kBlockRows + row) * kRows; }

 public:
  Tile(const LinearTask& task, int64_t tile, void* scratch)
      : task_(task),
        x_(static_cast<const T*>(task.x)),
        g_(static_cast<const T*>(task.grad_output)),
        out_(tile / tiles_in(task.in) * task.tile_out),
        in_(tile % tiles_in(task.in) * kTileIn),
        height_(least(task.tile_out, task.out - out_)),
        width_(least(kTileIn, task.in - in_)),
        panels_out_((height_ + kRows - 1) / kRows),
        panels_in_((width_ + kWidth - 1) / kWidth),
        packed_x_(static_cast<V*>(scratch)),
        packed_g_(reinterpret_cast<R*>(packed_x_ + kBlockRows * kPanelsIn * kColumns)),
        sum_(reinterpret_cast<V*>(packed_g_ + kBlockRows * kTileOut)),
        unfinished_(sum_ + kPanelsOut * kPanelsIn * kCells),
        votes_(reinterpret_cast<Count<V>*>(unfinished_ + kPanelsOut * kPanelsIn * kCells)) {
    memset(static_cast<void*>(sum_), 0, 3 * kPanelsOut * kPanelsIn * kCells * sizeof(V));
  }

  void run(int64_t tile) {
    const bool separable = task_.statistic == Statistic::mean || task_.single_rows;
    int64_t group = 0;
    for (int64_t begin = 0; begin < task_.rows; begin += kBlockRows) {
      const int64_t end = least(begin + kBlockRows, task_.rows);
      pack(begin, end);
      if (separable) {
        each_panel([&](int64_t o, int64_t i) { add_product(o, i, end - begin); });
      } else {
        while (task_.offsets[group + 1] <= begin) ++group;
        each_panel([&](int64_t o, int64_t i) { add_groups(o, i, group, begin, end); });
      }
    }
    task_.mask_sums[tile] = 0;
    each_panel([&](int64_t o, int64_t i) { task_.mask_sums[tile] += finalize(o, i); });
  }

 private:
  template <class F>
  void each_panel(const F& f) const {
    for (int64_t i = 0; i < panels_in_; ++i)
      for (int64_t o = 0; o < panels_out_; ++o) f(o, i);
  }

  // Rows begin <= r < end, converted to the compute type and padded with zeros to whole panels.
  void pack(int64_t begin, int64_t end) {
    constexpr int lanes = kLanes<V>;
    for (int64_t r = 0; r < end - begin; ++r) {
      const T* const x = x_ + (begin + r) * task_.in + in_;
      for (int64_t at = 0; at < panels_in_ * kWidth; at += lanes)
        packed_x_[(at / kWidth * kBlockRows + r) * kColumns + at % kWidth / lanes] =
            at < width_ ? load<V>(x + at, width_ - at) : V{};
      const T* const g = g_ + (begin + r) * task_.out + out_;
      R row[kTileOut] = {};
      for (int64_t at = 0; at < height_; at += lanes) store<V>(row + at, load<V>(g + at, height_ - at), lanes);
      for (int64_t o = 0; o < panels_out_; ++o)
        memcpy(packed_g_ + (o * kBlockRows + r) * kRows, row + o * kRows, kRows * sizeof(R));
    }
  }

  void add_product(int64_t o, int64_t i, int64_t rows) {
    Cells<V> p, &sum = cells(sum_, o, i);
    product<V>(panel_g(o, 0), panel_x(i, 0), rows, p);
    for (int a = 0; a < kRows; ++a)
      for (int b = 0; b < kColumns; ++b) sum[a][b] += p[a][b];
  }

  // The votes of groups of one row each: agreeing less dissenting ones of those whose factors are both not 0.
  void count_votes(int64_t o, int64_t i) {
    const SignPlanes &of_g = task_.signs_g, &of_x = task_.signs_x;
    Cells<Count<V>>& net = votes(o, i);
    for (int b = 0; b < kColumns; ++b) {
      const int64_t column = in_ + i * kWidth + b * kLanes<V>;
      if (column >= task_.in) break;
      Count<V> cast[kRows] = {}, dissent[kRows] = {};
      for (int64_t word = 0; word < of_g.words; ++word) {
        const Int* const nonzero_g = of_g.nonzero_at<Int>(word, out_ + o * kRows);
        const Int* const negative_g = of_g.negative_at<Int>(word, out_ + o * kRows);
        const Count<V> nonzero_x = read<Count<V>>(of_x.nonzero_at<Int>(word, column));
        const Count<V> negative_x = read<Count<V>>(of_x.negative_at<Int>(word, column));
#pragma GCC unroll 8
        for (int a = 0; a < kRows; ++a) {
          const Count<V> both = nonzero_x & nonzero_g[a];
          cast[a] += popcount(both);
          dissent[a] += popcount((negative_x ^ negative_g[a]) & both);
        }
      }
      for (int a = 0; a < kRows; ++a) net[a][b] = cast[a] - 2 * dissent[a];
    }
  }

  // Adds the groups that end in the packed rows; a group that goes on leaves its product unfinished.
  void add_groups(int64_t o, int64_t i, int64_t group, int64_t begin, int64_t end) {
    const int64_t* const offsets = task_.offsets;
    Cells<V> p, &sum = cells(sum_, o, i), &unfinished = cells(unfinished_, o, i);
    Cells<Count<V>>& net = votes(o, i);
    for (; group < task_.parameters.groups && offsets[group] < end; ++group) {
      const int64_t first = offsets[group] < begin ? begin : offsets[group], last = least(offsets[group + 1], end);
      product<V>(panel_g(o, first - begin), panel_x(i, first - begin), last - first, p);
      if (offsets[group] < begin)
        for (int a = 0; a < kRows; ++a)
          for (int b = 0; b < kColumns; ++b) p[a][b] += unfinished[a][b];
      if (offsets[group + 1] > end) {
        memcpy(unfinished, p, sizeof p);
        return;
      }
      for (int a = 0; a < kRows; ++a)
        for (int b = 0; b < kColumns; ++b) {
          sum[a][b] += p[a][b];
          net[a][b] += Lane<V>::sign(p[a][b]);
        }
    }
  }

  // Writes E * statistic; returns how many coordinates the mask keeps.
  int64_t finalize(int64_t o, int64_t i) {
    if (task_.single_rows && task_.statistic != Statistic::mean) count_votes(o, i);
    const Cells<V>& sum = cells(sum_, o, i);
    const Cells<Count<V>>& net = votes(o, i);
    int64_t kept = 0;
    for (int a = 0; a < kRows && o * kRows + a < height_; ++a)
      for (int b = 0; b < kColumns; ++b) {
        const int64_t out = out_ + o * kRows + a, column = i * kWidth + b * kLanes<V>, n = width_ - column;
        if (n <= 0) break;
        const Outcome<V> outcome = statistic(sum[a][b], net[a][b], out, in_ + column, n);
        store<V>(static_cast<R*>(task_.value) + out * task_.in + in_ + column, outcome.value, n);
        R total = 0;
        for (int64_t lane = 0; lane < least(n, kLanes<V>); ++lane) total += outcome.mask[lane];
        kept += int64_t(total);
      }
    return kept;
  }

  Outcome<V> statistic(V sum, Count<V> net, int64_t out, int64_t in, int64_t n) const {
    if (task_.statistic == Statistic::mean) return {sum, V{}};
    Votes<V> votes;
    votes.net = net;
    votes.nan = nan_contributions(sum, out, in, n);
    const Mask<V> agreed = votes.reach(task_.parameters.count);
    switch (task_.statistic) {
      case Statistic::and_mask: return votes.poison(agreed ? sum : V{}, agreed ? splat<V>(1) : V{});
      case Statistic::xor_mask: return votes.poison(agreed ? V{} : sum, agreed ? V{} : splat<V>(1));
      default: return votes.poison(Lane<V>::real(net), V{});
    }
  }

  // Which coordinates had a NaN contribution. A NaN sum may also be inf - inf, which a mask does hide:
  // the few such coordinates are computed again, one by one.
  Mask<V> nan_contributions(V sum, int64_t out, int64_t in, int64_t n) const {
    Mask<V> suspects = sum != sum;
    for (int64_t lane = 0; lane < least(n, kLanes<V>); ++lane)
      if (suspects[lane] && !has_nan_contribution(out, in + lane)) suspects[lane] = 0;
    return suspects;
  }

  bool has_nan_contribution(int64_t out, int64_t in) const {
    for (int64_t e = 0; e < task_.parameters.groups; ++e) {
      R p = 0;
      for (int64_t r = task_.offsets[e]; r < task_.offsets[e + 1]; ++r)
        p += load<V>(g_ + r * task_.out + out, 1)[0] * load<V>(x_ + r * task_.in + in, 1)[0];
      if (p != p) return true;
    }
    return false;
  }
};

}  // namespace

void linear_kernel(const LinearTask& task, int64_t first, int64_t last, void* scratch) {
  for (int64_t tile = first; tile < last; ++tile)
    with_dtype(task.dtype, [&](auto element) {
      using T = decltype(element);
      Tile<Register<Compute<T>>, T>(task, tile, scratch).run(tile);
    });
}

}  // namespace htv::HTV_LEVEL
