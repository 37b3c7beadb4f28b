// Transposes blocks of channels and positions in registers: compiled once per instruction set.
#include "channels_last_kernel.h"

#include "transpose.h"

namespace htv::HTV_ISA {
namespace {

template <class V, class T>
void copy_sample(const ChannelsLastTask& task, const T* from, Real<V>* to) {
  constexpr int lanes = kLanes<V>;
  if (task.padded) memset(to, 0, task.copied_sample * sizeof(Real<V>));
  if (task.channel_stride == 1) {
    for (int64_t p = 0; p < task.positions; ++p)
      for (int64_t c = 0; c < task.channels; c += lanes)
        store<V>(to + task.at[p] + c, load<V>(from + p * task.step + c, task.channels - c),
                 task.channels - c);
    return;
  }
  // A register of channels at a time is as many streams of memory. Lanes without a channel are 0:
  // where all channels are in one register they may be stored over what follows in the sample,
  // padding or a position to come.
  for (int64_t c = 0; c < task.channels; c += lanes)
    for (int64_t p = 0; p < task.positions; p += lanes) {
      V block[lanes] = {};
      const int64_t channels = least(lanes, task.channels - c);
      for (int64_t i = 0; i < channels; ++i)
        block[i] = load<V>(from + (c + i) * task.channel_stride + p, task.positions - p);
      transpose(block);
      for (int64_t i = 0; i < least(lanes, task.positions - p); ++i) {
        const int64_t at = task.at[p + i];
        const bool over = task.channels <= lanes && at + lanes <= task.copied_sample;
        store<V>(to + at + c, block[i], over ? lanes : channels);
      }
    }
}

// Into panels; `to` is where the sample's first position goes in the first.
template <class V, class T>
void copy_panels(const ChannelsLastTask& task, int64_t width, int64_t panel_stride, const T* from,
                 Real<V>* to) {
  constexpr int lanes = kLanes<V>;
  const int64_t piece = least(width, lanes), filled = (task.channels + width - 1) / width * width;
  for (int64_t c = 0; c < filled; c += lanes)
    for (int64_t p = 0; p < task.positions; p += lanes) {
      V block[lanes] = {};
      const int64_t positions = least(lanes, task.positions - p);
      if (task.channel_stride == 1) {
        for (int64_t i = 0; i < positions && c < task.channels; ++i)
          block[i] = load<V>(from + (p + i) * task.step + c, task.channels - c);
      } else {
        for (int64_t i = 0; i < least(lanes, task.channels - c); ++i)
          block[i] = load<V>(from + (c + i) * task.channel_stride + p, positions);
        transpose(block);
      }
      for (int64_t k = c; k < least(c + lanes, filled); k += piece) {
        Real<V>* const panel = to + k / width * panel_stride + p * width + k % width;
        for (int64_t i = 0; i < positions; ++i)
          memcpy(panel + i * width, reinterpret_cast<const Real<V>*>(&block[i]) + (k - c),
                 piece * sizeof(Real<V>));
      }
    }
}

}  // namespace

void panels_kernel(const ChannelsLastTask& task, int64_t width, int64_t panel_stride, int64_t first,
                   int64_t last) {
  with_dtype(task.dtype, [&](auto element) {
    using T = decltype(element);
    using R = Compute<T>;
    for (int64_t s = first; s < last; ++s)
      copy_panels<Register<R>>(task, width, panel_stride,
                               static_cast<const T*>(task.from) + s * task.sample_stride,
                               static_cast<R*>(task.to) + s * task.positions * width);
  });
}

void channels_last_kernel(const ChannelsLastTask& task, int64_t first, int64_t last) {
  with_dtype(task.dtype, [&](auto element) {
    using T = decltype(element);
    using R = Compute<T>;
    for (int64_t s = first; s < last; ++s)
      copy_sample<Register<R>>(task, static_cast<const T*>(task.from) + s * task.sample_stride,
                               static_cast<R*>(task.to) + s * task.copied_sample);
  });
}

}  // namespace htv::HTV_ISA
