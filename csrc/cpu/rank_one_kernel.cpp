// Order statistics of a linear layer's contributions g[o] * x[i] where no group has more than one
// row: compiled once per instruction set. Sign planes tell which coordinates are 0 whatever the
// sizes of their contributions: under ReLU most are.
#include "rank_one_kernel.h"

#include <string.h>

#include "bits.h"
#include "lanes.h"
#include "select.h"

namespace htv::HTV_ISA {
namespace {

template <class V, class T>
class RankOneTile {
  using R = Real<V>;
  using Int = typename Lane<V>::Int;
  // A tile has the same columns for any instruction set.
  static constexpr int kWide = kWidestRegister / kRegisterBytes;
  static constexpr int64_t kLanesOf = kLanes<V>, kPanels = kRankOneRegisters * kWide;

  const RankOneTask& task_;
  const int64_t out_, in_, height_, panels_;
  V* const packed_x_;  // [panel][row]
  V* const values_;    // [row][column], one or two
  void* const selection_;
  R* const packed_g_;           // [row][output]
  R* const g_;                  // [row], of one output
  int32_t* const row_;          // [row], the rows that the output's contributions are formed of
  int64_t formed_ = 0;          // how many
  bool finite_x_[kPanels];      // no NaN or infinity in the panel
  bool finite_g_[kRankOneOut];  // nor in the output's column

  static int64_t tiles_in(const RankOneTask& task) {
    const int64_t width = rank_one_width(task.dtype);
    return (task.in + width - 1) / width;
  }

 public:
  RankOneTile(const RankOneTask& task, int64_t tile, void* scratch)
      : task_(task),
        out_(tile / tiles_in(task) * kRankOneOut),
        in_(tile % tiles_in(task) * rank_one_width(task.dtype)),
        height_(least(kRankOneOut, task.out - out_)),
        panels_((least(rank_one_width(task.dtype), task.in - in_) + kLanesOf - 1) / kLanesOf),
        packed_x_(static_cast<V*>(scratch)),
        values_(packed_x_ + kPanels * task.rows),
        selection_(values_ + 2 * kWide * task.ranking->ranked),
        packed_g_(reinterpret_cast<R*>(static_cast<char*>(selection_) +
                                       select_scratch_bytes(*task.ranking))),
        g_(packed_g_ + kRankOneOut * task.rows),
        row_(reinterpret_cast<int32_t*>(g_ + task.rows)) {}

  void run() {
    pack_x();
    pack_g();
    for (int64_t o = out_; o < out_ + height_; ++o) {
      int64_t open[kPanels], count = 0;
      bool finite = finite_g_[o - out_];
      for (int64_t panel = 0; panel < panels_; ++panel) {
        if (finite_g_[o - out_] && finite_x_[panel] && decided_zero(o, in_ + panel * kLanesOf)) {
          write(o, panel, V{});
        } else {
          open[count++] = panel;
          finite &= finite_x_[panel];
        }
      }
      if (count == 0) continue;
      if constexpr (sizeof(R) == 4) {
        if (finite && task_.ranking->ranked > kMostInMemory) {
          gather_voting(o);
          rank_products(o, open, count);
          continue;
        }
      }
      gather_g(o);
      for (int64_t i = 0; i + 1 < count; i += 2) rank<2>(o, open + i);
      if (count % 2 > 0) rank<1>(o, open + count - 1);
    }
  }

 private:
  void pack_x() {
    for (int64_t panel = 0; panel < panels_; ++panel) {
      const int64_t column = in_ + panel * kLanesOf;
      const T* const x = static_cast<const T*>(task_.x) + column;
      Mask<V> undefined = Lane<V>::none();
      for (int64_t r = 0; r < task_.rows; ++r) {
        const V v = load<V>(x + r * task_.in, task_.in - column);
        undefined |= v - v != 0;
        packed_x_[panel * task_.rows + r] = v;
      }
      finite_x_[panel] = !any<V>(undefined);
    }
  }

  void pack_g() {
    for (int64_t o = 0; o < height_; o += kLanesOf) {
      const T* const g = static_cast<const T*>(task_.grad_output) + out_ + o;
      Mask<V> undefined = Lane<V>::none();
      for (int64_t r = 0; r < task_.rows; ++r) {
        const V v = load<V>(g + r * task_.out, height_ - o);
        undefined |= v - v != 0;
        store<V>(packed_g_ + r * kRankOneOut + o, v, kLanesOf);
      }
      for (int lane = 0; lane < kLanesOf; ++lane) finite_g_[o + lane] = undefined[lane] == 0;
    }
  }

  void gather_g(int64_t o) {
    for (int64_t r = 0; r < task_.rows; ++r) g_[r] = packed_g_[r * kRankOneOut + o - out_];
  }

  // Rows of which a finite x makes a contribution that is not 0, and as many others as fill up
  // whole blocks of what is sorted at a time.
  void gather_voting(int64_t o) {
    constexpr int64_t block = 16;
    int64_t n = 0;
    for (int64_t r = 0; r < task_.rows; ++r) {
      const R g = packed_g_[r * kRankOneOut + o - out_];
      g_[n] = g;
      row_[n] = int32_t(r);
      n += g != 0;
    }
    for (formed_ = n; formed_ < task_.rows && formed_ % block != 0; ++formed_)
      g_[formed_] = 0, row_[formed_] = 0;
  }

  void rank_products(int64_t o, const int64_t* panels, int64_t count) {
    const V* x[kPanels];
    V result[kPanels];
    for (int64_t c = 0; c < count; ++c) x[c] = packed_x_ + panels[c] * task_.rows;
    product_statistics(*task_.ranking, {x, g_, row_, formed_}, int(count), selection_, result);
    for (int64_t c = 0; c < count; ++c)
      write(o, panels[c], result[c] * R(task_.ranking->parameters.groups));
  }

  // Whether every rank that is read is 0 in all of a panel's coordinates, by the signs of the
  // factors alone: where those are finite no product is NaN, and one too small for its type only is
  // one more 0.
  bool decided_zero(int64_t o, int64_t column) const {
    Count<V> nonzero{}, negative{};
    for (int64_t word = 0; word < task_.signs_x.words; ++word) {
      const SignPlanes &of_x = task_.signs_x, &of_g = task_.signs_g;
      const Count<V> both =
          read<Count<V>>(of_x.nonzero_at<Int>(word, column)) & *of_g.nonzero_at<Int>(word, o);
      const Count<V> differ =
          read<Count<V>>(of_x.negative_at<Int>(word, column)) ^ *of_g.negative_at<Int>(word, o);
      nonzero += popcount(both);
      negative += popcount(differ & both);
    }
    const Ranking& ranking = *task_.ranking;
    const Int below = Int(ranking.low), above = Int(ranking.ranked - 1 - ranking.high);
    return !any<V>((negative > below) | (nonzero - negative > above));
  }

  template <int columns>
  void rank(int64_t o, const int64_t* panels) {
    for (int64_t r = 0; r < task_.rows; ++r)
      for (int c = 0; c < columns; ++c)
        values_[r * columns + c] = g_[r] * packed_x_[panels[c] * task_.rows + r];
    for (int64_t i = task_.rows * columns; i < task_.ranking->ranked * columns; ++i)
      values_[i] = V{};
    V result[columns];
    order_statistics<V, columns>(*task_.ranking, values_, columns, selection_, result);
    for (int c = 0; c < columns; ++c)
      write(o, panels[c], result[c] * R(task_.ranking->parameters.groups));
  }

  void write(int64_t o, int64_t panel, V v) const {
    const int64_t column = in_ + panel * kLanesOf;
    store<V>(static_cast<R*>(task_.value) + o * task_.in + column, v, task_.in - column);
  }
};

}  // namespace

void rank_one_kernel(const RankOneTask& task, int64_t first, int64_t last, void* scratch) {
  for (int64_t tile = first; tile < last; ++tile)
    with_dtype(task.dtype, [&](auto element) {
      using T = decltype(element);
      RankOneTile<Register<Compute<T>>, T>(task, tile, scratch).run();
    });
}

}  // namespace htv::HTV_ISA
