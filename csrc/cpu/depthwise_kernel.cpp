// Statistics of contributions to convolutions with few channels per group, output channels side by
// side in registers: compiled once per instruction set.
#include "depthwise_kernel.h"

#include <optional>

#include "select.h"
#include "tally.h"
#include "transpose.h"

namespace htv::HTV_ISA {
namespace {

template <class V>
class Depthwise {
  using R = Real<V>;
  static constexpr int kWide = kLanes<V>;

  const DepthwiseTask& task_;
  const int64_t channel_, lanes_;  // the first output channel, and how many
  const int64_t run_, runs_end_;   // runs of columns
  const int64_t first_, count_;    // columns
  V* const x_;                     // [position of the piece]
  V* const g_;                     // [position]
  V* const products_;              // [column]
  V* const kept_;                  // states [column], or values to rank [group][column]
  void* const select_scratch_;
  MaskSum<V> mask_sum_;

 public:
  Depthwise(const DepthwiseTask& task, const DepthwiseScratch& sizes, int64_t channel, int64_t run,
            void* scratch)
      : task_(task),
        channel_(channel),
        lanes_(least(task.grad_output.channels - channel, kWide)),
        run_(run),
        runs_end_(least(run + task.chunk, task.runs())),
        first_(task.column(run)),
        count_(task.column(runs_end_) - first_),
        x_(static_cast<V*>(scratch)),
        g_(x_ + sizes.seen),
        products_(g_ + sizes.positions),
        kept_(products_ + sizes.products),
        select_scratch_(kept_ + sizes.kept) {
    for (int64_t i = 0; i < sizes.seen; ++i) x_[i] = V{};
  }

  // Returns the sum of the mask.
  double run() {
    if (task_.ranking) {
      rank();
    } else if (task_.summary) {
      with_summary<V>(task_.statistic, [&](auto state) { stream(state); });
    } else {
      with_tally<V>(task_.statistic, [&](auto state) { stream(state); });
    }
    return mask_sum_.total();
  }

 private:
  template <class State>
  void stream(State) {
    State* const states = reinterpret_cast<State*>(kept_);
    for (int64_t i = 0; i < count_; ++i) states[i] = State{};
    each_group([&](int64_t e) {
      for (int64_t i = 0; i < count_; ++i) absorb(states[i], products_[i], e + 1, task_.parameters);
    });
    for (int64_t i = 0; i < count_; ++i) {
      if constexpr (is_summary<State>) {
        for (int f = 0; f < State::fields; ++f) write(i, states[i].field(f), f);
      } else {
        const Outcome<V> outcome = states[i].finalize(task_.statistic, task_.parameters);
        write(i, outcome.value);
        if (has_mask(task_.statistic)) mask_sum_.add(outcome.mask, lanes_);
      }
    }
  }

  void rank() {
    const int64_t groups = task_.parameters.groups;
    each_group([&](int64_t e) {
      memcpy(static_cast<void*>(kept_ + e * count_), products_, count_ * sizeof(V));
    });
    order_statistics<V>(*task_.ranking, kept_, count_, int(count_), select_scratch_, products_);
    for (int64_t i = 0; i < count_; ++i) write(i, products_[i] * R(groups));
  }

  void write(int64_t column, V value, int field = 0) const {
    R* const to =
        static_cast<R*>(task_.values.at[field]) + channel_ * task_.columns() + first_ + column;
    for (int64_t lane = 0; lane < lanes_; ++lane) to[lane * task_.columns()] = value[lane];
  }

  // f(group) with its products formed.
  template <class F>
  void each_group(const F& f) {
    for (int64_t e = 0; e < task_.parameters.groups; ++e) {
      for (int64_t i = 0; i < count_; ++i) products_[i] = V{};
      for (int64_t sample = task_.offsets[e]; sample < task_.offsets[e + 1]; ++sample)
        for (const Strip* strip = task_.strips; strip != task_.strips_end; ++strip)
          add_products(sample, *strip);
      f(e);
    }
  }

  // Brings what the next strip packs nearer while this one is multiplied: memory comes far too late
  // on demand.
  class Ahead {
    struct Rows {
      const char* data;
      int64_t count, bytes, stride, done = 0;

      Rows(const ImageView& image, int64_t element, int64_t sample, int64_t channel,
           int64_t channels, int64_t first, int64_t last)
          : data(static_cast<const char*>(image.data) +
                 (sample * image.sample + channel * image.channel + first * image.step) * element),
            count(image.step == 1 ? channels : last - first),
            bytes((image.step == 1 ? last - first : channels) * element),
            stride((image.step == 1 ? image.channel : image.step) * element) {}
      void fetch(int64_t until) {
        if (bytes == 0) return;
        for (; done < until; ++done) {
          const char* const row = data + done * stride;
          for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
          __builtin_prefetch(row + bytes - 1, 0, 2);
        }
      }
    };

    const int64_t columns_;
    std::optional<Rows> x_, g_;

   public:
    Ahead(const Depthwise& unit, int64_t sample, const Strip& strip) : columns_(unit.count_) {
      const DepthwiseTask& task = unit.task_;
      const bool wraps = &strip + 1 == task.strips_end;
      if (wraps && sample + 1 == task.offsets[task.parameters.groups]) return;
      const Strip& next = wraps ? *task.strips : *(&strip + 1);
      const int64_t groups =
          (unit.channel_ + unit.lanes_ - 1) / task.height - unit.channel_ / task.height + 1;
      const int64_t element = bytes_of(task.dtype);
      g_.emplace(task.grad_output, element, sample + wraps, unit.channel_, unit.lanes_, next.first,
                 next.last);
      x_.emplace(task.x, element, sample + wraps, unit.channel_ / task.height * task.width,
                 groups * task.width, next.seen_first, next.seen_last);
    }
    // The share of as many columns.
    void fetch(int64_t columns) {
      if (!g_) return;
      g_->fetch(g_->count * columns / columns_);
      x_->fetch(x_->count * columns / columns_);
    }
  };

  void add_products(int64_t sample, const Strip& strip) {
    with_dtype(task_.dtype, [&](auto element) {
      using T = decltype(element);
      if constexpr (sizeof(Compute<T>) == sizeof(R)) pack_g<T>(sample, strip);
    });
    Ahead ahead(*this, sample, strip);
    for (int64_t run = run_; run < runs_end_; ++run) {
      const int64_t column = task_.column(run), input = column / task_.tap_count,
                    tap = column % task_.tap_count;
      if (run == run_ || tap == 0)
        with_dtype(task_.dtype, [&](auto element) {
          using T = decltype(element);
          if constexpr (sizeof(Compute<T>) == sizeof(R)) pack_x<T>(sample, input, strip);
        });
      const int64_t next = task_.column(run + 1);
      ahead.fetch(next - first_);
      add_taps(next - column, strip, task_.taps + tap, products_ + column - first_);
    }
  }

  template <class T>
  void pack_g(int64_t sample, const Strip& strip) const {
    pack<T>(
        task_.grad_output, sample, strip.first, strip.last, channel_, [](int64_t o) { return o; },
        [&](int64_t p) { return g_ + p - strip.first; });
  }

  // x as input channel `input` of every output channel's group, among zeros where it is padded.
  template <class T>
  void pack_x(int64_t sample, int64_t input, const Strip& strip) const {
    if (task_.strips_end - task_.strips > 1) {  // one strip's padding is another's image
      for (int64_t i = 0; i < strip.inner_first; ++i) x_[i] = V{};
      for (int64_t i = strip.inner_last; i < strip.size; ++i) x_[i] = V{};
    }
    const auto to = [&](int64_t p) { return x_ + task_.at[p] - strip.origin; };
    const auto packed = [&](int64_t channel, const auto& of) {
      pack<T>(task_.x, sample, strip.seen_first, strip.seen_last, channel, of, to);
    };
    if (task_.width == 1 && task_.height == 1) {
      packed(channel_, [](int64_t o) { return o; });
    } else {
      packed(-1, [&](int64_t o) { return o / task_.height * task_.width + input; });
    }
  }

  // *to(position) = channels of(channel_), of(channel_ + 1) ... ; those of an image with its
  // channels last lie side by side from `adjacent` on, unless that is negative. Lanes beyond the
  // last channel repeat it.
  template <class T, class Of, class To>
  void pack(const ImageView& image, int64_t sample, int64_t first, int64_t last, int64_t adjacent,
            const Of& of, const To& to) const {
    const T* const from = static_cast<const T*>(image.data) + sample * image.sample;
    const T* const end = static_cast<const T*>(image.end);
    const auto inside = [&](const T* at, int64_t n) {
      return end - at >= kWide ? load<V>(at) : load<V>(at, n);
    };
    if (image.channel == 1 && adjacent >= 0) {
      for (int64_t p = first; p < last; ++p)
        *to(p) = inside(from + p * image.step + adjacent, lanes_);
      return;
    }
    const T* channels[kWide];
    for (int64_t lane = 0; lane < kWide; ++lane)
      channels[lane] = from + of(channel_ + least(lane, lanes_ - 1)) * image.channel;
    if (image.step != 1) {
      for (int64_t p = first; p < last; ++p) {
        T values[kWide];
        for (int64_t lane = 0; lane < kWide; ++lane) values[lane] = channels[lane][p * image.step];
        *to(p) = load<V>(values);
      }
      return;
    }
    for (int64_t p = first; p < last; p += kWide) {
      V block[kWide];
      const int64_t n = least(kWide, last - p);
      if (end - channels[kWide - 1] - p >= kWide) {
#pragma GCC unroll 16
        for (int lane = 0; lane < kWide; ++lane) block[lane] = load<V>(channels[lane] + p);
      } else {
#pragma GCC unroll 16
        for (int lane = 0; lane < kWide; ++lane) block[lane] = load<V>(channels[lane] + p, n);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kWide; ++i)
        if (i < n) *to(p + i) = block[i];
    }
  }

  void add_taps(int64_t count, const Strip& strip, const int64_t* taps, V* products) const {
    switch (count) {
      case 1: return add_taps<1, 8>(strip, taps, products);
      case 2: return add_taps<2, 4>(strip, taps, products);
      case 3: return add_taps<3, 3>(strip, taps, products);
      case 4: return add_taps<4, 2>(strip, taps, products);
      case 5: return add_taps<5, 2>(strip, taps, products);
      case 6: return add_taps<6, 1>(strip, taps, products);
      case 7: return add_taps<7, 1>(strip, taps, products);
      case 8: return add_taps<8, 1>(strip, taps, products);
      default: return add_taps<kMostTaps, 1>(strip, taps, products);
    }
  }

  // K taps, P positions at a time: enough sums that none waits for its last addition.
  template <int K, int P>
  void add_taps(const Strip& strip, const int64_t* taps, V* products) const {
    const V* at[K];
    for (int k = 0; k < K; ++k) at[k] = x_ + taps[k] - strip.origin;
    V sums[P][K] = {};
    const int64_t* const windows = task_.windows + strip.first;
    const int64_t positions = strip.last - strip.first;
    int64_t p = 0;
    for (; p + P <= positions; p += P)
#pragma GCC unroll 8
      for (int q = 0; q < P; ++q) add_position(at, g_[p + q], windows[p + q], sums[q]);
    for (; p < positions; ++p) add_position(at, g_[p], windows[p], sums[0]);
#pragma GCC unroll 9
    for (int k = 0; k < K; ++k) {
#pragma GCC unroll 8
      for (int q = 1; q < P; ++q) sums[0][k] += sums[q][k];
      products[k] += sums[0][k];
    }
  }

  template <int K>
  static inline __attribute__((always_inline)) void add_position(const V* const (&at)[K], V g,
                                                                 int64_t window, V (&sums)[K]) {
#pragma GCC unroll 9
    for (int k = 0; k < K; ++k) sums[k] = multiply_add(g, at[k][window], sums[k]);
  }
};

template <class V>
double unit_of(const DepthwiseTask& task, const DepthwiseScratch& sizes, int64_t unit,
               void* scratch) {
  double mask_sum = 0;
  const int64_t begin = unit / task.chunks() * task.unit_channels(),
                run = unit % task.chunks() * task.chunk;
  const int64_t end = least(begin + task.unit_channels(), task.grad_output.channels);
  for (int64_t channel = begin; channel < end; channel += kLanes<V>)
    mask_sum += Depthwise<V>(task, sizes, channel, run, scratch).run();
  return mask_sum;
}

}  // namespace

void depthwise_kernel(const DepthwiseTask& task, int64_t first, int64_t last, void* scratch) {
  const DepthwiseScratch sizes(task);
  for (int64_t unit = first; unit < last; ++unit)
    task.mask_sums[unit] = task.dtype == Dtype::float64
                               ? unit_of<Register<double>>(task, sizes, unit, scratch)
                               : unit_of<Register<float>>(task, sizes, unit, scratch);
}

}  // namespace htv::HTV_ISA
