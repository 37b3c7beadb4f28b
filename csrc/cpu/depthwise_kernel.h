// What the conv op hands to the kernel of convolutions whose groups have few channels: depthwise
// ones above all.
#pragma once

#include "../dtype.h"
#include "../statistic.h"
#include "isa.h"
#include "select_cost.h"
#include "summary.h"

namespace htv {

// Dense images: channel c of position p of sample s is at data + s * sample + c * channel + p *
// step, in elements.
struct ImageView {
  const void *data, *end;
  int64_t channels, sample, channel, step;  // channel or step is 1
};

// Some positions of the output, and the piece of the padded image that they see.
struct Strip {
  int64_t first, last;            // positions of the output
  int64_t origin, size;           // of the piece, in positions of the padded image
  int64_t seen_first, seen_last;  // positions of x that lie in it
  // Where they do, from the piece's first position: the rest is padding.
  int64_t inner_first, inner_last;
};

// Output channels lie side by side in registers. A column is an input channel of their group and a
// tap of the kernel: one product of x there with grad_output. A run is some taps of one input
// channel, whose products are in registers at once. A unit of work is as many output channels as
// the widest register holds by a chunk of runs.
constexpr int64_t kMostTaps = 9;  // of a run: as many as there are addresses for

struct DepthwiseTask {
  ImageView x, grad_output;
  Dtype dtype;
  int64_t width, height;  // input and output channels of a group of the convolution
  const Strip *strips, *strips_end;
  const int64_t* at;  // where each position of x lies in the padded image
  // Positions of the padded image: where windows start, and taps lie in them.
  const int64_t *windows, *taps;
  int64_t tap_count;
  const int64_t* offsets;  // group e owns samples offsets[e] <= s < offsets[e + 1]
  Statistic statistic;
  bool summary;  // in the place of the statistic
  Parameters parameters;
  const Ranking* ranking;  // of order statistics
  int64_t chunk;           // runs
  Fields values;           // (output channel, column) each
  double* mask_sums;       // one per unit

  int64_t columns() const { return width * tap_count; }
  // Runs follow from the kernel alone, for the order of a sum depends on how many taps there are to
  // its run.
  int64_t runs_of_input() const { return (tap_count + kMostTaps - 1) / kMostTaps; }
  int64_t runs() const { return width * runs_of_input(); }
  int64_t column(int64_t run) const {
    return run / runs_of_input() * tap_count + run % runs_of_input() * tap_count / runs_of_input();
  }
  int64_t chunks() const { return (runs() + chunk - 1) / chunk; }
  int64_t unit_channels() const { return kWidestRegister / compute_bytes(dtype); }
  int64_t units() const {
    return (grad_output.channels + unit_channels() - 1) / unit_channels() * chunks();
  }
};

// Registers of scratch, by what is kept in them; a thread needs the widest for each, and what
// selection needs.
struct DepthwiseScratch {
  int64_t seen = 0, positions = 0, products, kept;

  explicit DepthwiseScratch(const DepthwiseTask& task) {
    constexpr int64_t most_states = 5;
    for (const Strip* strip = task.strips; strip != task.strips_end; ++strip) {
      seen = strip->size > seen ? strip->size : seen;
      positions = strip->last - strip->first > positions ? strip->last - strip->first : positions;
    }
    products = task.chunk * kMostTaps;
    kept = products * (task.ranking ? task.parameters.groups : most_states);
  }
  int64_t bytes(const DepthwiseTask& task) const {
    return kWidestRegister * (seen + positions + products + kept) +
           (task.ranking ? select_scratch_bytes(*task.ranking) : 0);
  }
};

// Computes units first <= u < last; scratch is aligned to 64 bytes.
HTV_DECLARE_PER_ISA(void depthwise_kernel(const DepthwiseTask& task, int64_t first, int64_t last,
                                          void* scratch))

}  // namespace htv
