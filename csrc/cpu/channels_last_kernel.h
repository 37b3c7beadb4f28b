// Copies of images with their channels last, in the compute type, among the zeros of a padding.
#pragma once

#include "../dtype.h"
#include "isa.h"

namespace htv {

struct ChannelsLastTask {
  // Channel c of position p of a sample is at
  // from + sample * sample_stride + c * channel_stride + p * step,
  const void* from;
  Dtype dtype;
  int64_t sample_stride, channel_stride, step;  // channel_stride or step is 1
  int64_t channels, positions;
  void* to;  // and goes to to + sample * copied_sample + at[p] + c
  const int64_t* at;
  int64_t copied_sample;
  bool padded;  // whether there is more to a copied sample than its positions
};

// Copies samples first <= s < last.
HTV_DECLARE_PER_ISA(void channels_last_kernel(const ChannelsLastTask& task, int64_t first,
                                              int64_t last))

// The same for images without padding whose channels go apart in panels of `width`, the last one
// filled up with zeros: channel c of position p of sample s goes to to + c / width * panel_stride +
// (s * positions + p) * width + c % width. width: a power of two that is at most 8. `at` and
// `copied_sample` are not looked at.
HTV_DECLARE_PER_ISA(void panels_kernel(const ChannelsLastTask& task, int64_t width,
                                       int64_t panel_stride, int64_t first, int64_t last))

}  // namespace htv
