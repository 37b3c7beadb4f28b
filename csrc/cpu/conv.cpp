// htv::conv on the CPU: every position of the output is a row whose columns are the window of x
// seen from there. Windows are never stored: tiles read them in a copy of x that has its channels
// last and its padding around it. Where groups of the convolution have few channels, those of all
// groups lie side by side in registers instead.
#include <algorithm>
#include <optional>
#include <torch/csrc/stable/library.h>
#include <tuple>
#include <vector>

#include "../op_checks.h"
#include "asked.h"
#include "channels_last_kernel.h"
#include "depthwise_kernel.h"
#include "machine.h"
#include "parallel.h"
#include "tile.h"

namespace htv::cpu {
namespace {

using Sizes = std::vector<int64_t>;

// What a copy of x or grad_output may take; more for few channels only.
constexpr int64_t kCopyBytes = 8 << 20;
constexpr int64_t kLeastChannels = 16;  // of a copy

// Columns multiplied per column there is, where windows are read in place.
constexpr int64_t kMostHoles = 2;

// Channels side by side:
// Inputs x outputs per group up to which that is faster than tiles (measured).
constexpr int64_t kFewWeights = 64;
constexpr int64_t kStripBytes = 128 << 10;  // what x and grad_output of a strip may take in L2
constexpr int64_t kMostRuns = 14;           // of a unit of work

int64_t product(const Checked& checked, const Sizes& sizes) {
  int64_t total = 1;
  for (const int64_t size : sizes) total = checked.product(total, size);
  return total;
}

// Images (samples, channels, *space) that lie dense, channels first or last.
struct Images {
  const char* data;
  Dtype dtype;
  int64_t samples, channels, positions, channel_stride, step;
  Sizes space;

  Images(const std::string& op, const char* argument, const Tensor& tensor)
      : data(static_cast<const char*>(tensor.const_data_ptr())),
        dtype(dtype_of(op, argument, tensor)),
        samples(tensor.size(0)),
        channels(tensor.size(1)) {
    check_memory(op, argument, tensor);
    for (int64_t d = 2; d < tensor.dim(); ++d) space.push_back(tensor.size(d));
    const Checked checked(op);
    positions = product(checked, space);
    checked.product(samples, channels, positions, int64_t(8));
    const bool first = tensor.is_contiguous();
    bool last = tensor.stride(1) == 1 && (tensor.stride(0) == channels * positions || samples == 1);
    int64_t stride = channels;
    for (int64_t d = tensor.dim() - 1; d >= 2; stride *= tensor.size(d--))
      last &= tensor.stride(d) == stride || tensor.size(d) == 1;
    STD_TORCH_CHECK(first || last || tensor.numel() == 0, op, ": ", argument,
                    " must be dense, with its channels in dim 1 or behind the others");
    channel_stride = first ? positions : 1;
    step = first ? 1 : channels;
    if (positions == 1) channel_stride = 1, step = channels;
  }
};

// Where the positions of images lie in padded ones.
Sizes padded_places(const Sizes& space, const Sizes& padding) {
  Sizes at{0};
  for (size_t d = 0; d < padding.size(); ++d) {
    Sizes inner;
    for (const int64_t outer : at)
      for (int64_t i = 0; i < space[d]; ++i)
        inner.push_back(outer * (space[d] + 2 * padding[d]) + i + padding[d]);
    at = inner;
  }
  return at;
}

// Some channels of images with the channels last, in the compute type; a copy unless they lie like
// that.
struct Rows {
  std::optional<Scratch> memory;
  const char *data, *end;
  int64_t stride;  // elements from one position to the next of the padded images
};

// Whether `rows_of` copies.
bool copied(const Images& images, const Sizes& padding) {
  const bool padded = std::any_of(padding.begin(), padding.end(), [](int64_t p) { return p > 0; });
  return images.channel_stride != 1 || padded || bytes_of(images.dtype) < 4;
}

// Elements from position to position of a copy. spread: where positions take lines of a cache each,
// they lie an odd number of them apart, so that the same channels of many positions do not compete
// for places in it.
int64_t stride_of(int64_t channels, int64_t line, bool spread) {
  return spread && channels >= line ? ((channels + line - 1) / line | 1) * line : channels;
}

Rows rows_of(const Images& images, const Sizes& padding, int64_t first, int64_t channels,
             bool spread) {
  const int64_t element = bytes_of(images.dtype), compute = compute_bytes(images.dtype);
  Rows rows;
  if (!copied(images, padding)) {
    rows.data = images.data + first * element;
    rows.end = images.data + images.samples * images.positions * images.channels * element;
    rows.stride = images.channels;
    return rows;
  }
  int64_t area = 1;
  for (size_t d = 0; d < padding.size(); ++d) area *= images.space[d] + 2 * padding[d];
  const int64_t stride = stride_of(channels, kRunStep / compute, spread);
  Sizes at = padded_places(images.space, padding);
  for (int64_t& place : at) place *= stride;
  const int64_t bytes = images.samples * area * stride * compute;
  constexpr int64_t slack = kRunStep;
  rows.memory.emplace(bytes + slack);
  rows.data = static_cast<const char*>(rows.memory->get());
  rows.end = rows.data + bytes + slack;
  rows.stride = stride;
  const ChannelsLastTask task{images.data + first * images.channel_stride * element,
                              images.dtype,
                              images.channels * images.positions,
                              images.channel_stride,
                              images.step,
                              channels,
                              images.positions,
                              rows.memory->get(),
                              at.data(),
                              area * stride,
                              area != images.positions};
  const auto kernel = HTV_PER_ISA(channels_last_kernel);
  parallel_chunks(images.samples, images.positions * channels, 0,
                  [&](int64_t begin, int64_t last, void*) { kernel(task, begin, last); });
  return rows;
}

// Some channels in panels, for each of `parts` groups of the convolution: as tiles read them in
// place.
struct Panels {
  Scratch memory;
  int64_t stride, part;  // elements from one panel, and from one group, to the next

  Panels(const Images& images, int64_t first, int64_t channels, int64_t parts)
      : memory(parts * panels(channels) * panel(images) * compute_bytes(images.dtype)),
        stride(panel(images)),
        part(panels(channels) * stride) {
    const int64_t element = bytes_of(images.dtype);
    const auto kernel = HTV_PER_ISA(panels_kernel);
    parallel_chunks(
        parts * images.samples, images.positions * channels, 0,
        [&](int64_t begin, int64_t end, void*) {
          for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t group = unit / images.samples, sample = unit % images.samples;
            const ChannelsLastTask task{
                images.data + (first + group * channels) * images.channel_stride * element,
                images.dtype,
                images.channels * images.positions,
                images.channel_stride,
                images.step,
                channels,
                images.positions,
                static_cast<char*>(memory.get()) + group * part * compute_bytes(images.dtype),
                nullptr,
                0,
                false};
            kernel(task, kTileOutStep, stride, sample, sample + 1);
          }
        });
  }

 private:
  static int64_t panels(int64_t channels) { return (channels + kTileOutStep - 1) / kTileOutStep; }
  static int64_t panel(const Images& images) {
    return (images.samples * images.positions + kPanelGap) * kTileOutStep;
  }
};

// The most channels whose copy is small enough, of `channels`; whole multiples of `step` if not
// all.
int64_t fitting(int64_t channels, int64_t bytes_each, int64_t step) {
  const int64_t fit = std::max(kCopyBytes / std::max<int64_t>(1, bytes_each), kLeastChannels);
  return fit >= channels ? channels : fit >= step ? fit / step * step : kLeastChannels;
}

// Which columns rows have, in the order (block of channels, tap, channel), so that a tile holds all
// taps of some channels.
struct Columns {
  std::vector<Run> runs;
  Sizes place;  // where a column goes in the value of an output channel; -1 for those between runs

  int64_t count() const { return place.size(); }
};

// taps: in positions, `stride` elements apart; every run begins at a multiple of `step` columns.
Columns columns_of(int64_t channels, int64_t block, const Sizes& taps, int64_t stride,
                   int64_t step) {
  Columns columns;
  for (int64_t from = 0; from < channels; from += block) {
    const int64_t length = std::min(block, channels - from);
    for (size_t tap = 0; tap < taps.size(); ++tap) {
      const int64_t offset = taps[tap] * stride + from;
      if (!columns.runs.empty() &&
          columns.runs.back().offset + columns.runs.back().length == offset) {
        columns.runs.back().length += length;
      } else {
        columns.place.resize((columns.count() + step - 1) / step * step, -1);
        columns.runs.push_back({columns.count(), offset, length});
      }
      for (int64_t c = from; c < from + length; ++c) columns.place.push_back(c * taps.size() + tap);
    }
  }
  return columns;
}

// Everything but the images, in positions of padded images of `area` positions.
struct Geometry {
  Sizes kernel, stride, padding, dilation;
  Sizes windows, taps;  // where windows start, and taps lie in them
  int64_t area;
};

ImageView view_of(const Images& images) {
  const int64_t sample = images.channels * images.positions;
  return {images.data,           images.data + images.samples * sample * bytes_of(images.dtype),
          images.channels,       sample,
          images.channel_stride, images.step};
}

// Cuts the output along its first dim, so that what a strip sees stays in L2.
std::vector<Strip> strips_of(const Images& images, const Images& grads, const Geometry& geometry,
                             const Sizes& at) {
  constexpr int64_t budget = kStripBytes / 64;  // positions, a register each
  std::vector<Strip> strips;
  if (grads.positions == 0) return strips;
  const int64_t height = grads.space[0], below = grads.positions / height;
  const int64_t size = images.space[0] + 2 * geometry.padding[0], plane = geometry.area / size;
  const int64_t step = geometry.stride[0],
                reach = (geometry.kernel[0] - 1) * geometry.dilation[0] + 1;
  const int64_t fit = (budget - (reach - step) * plane) / (step * plane + below);
  const int64_t count = (height + std::max<int64_t>(fit, 1) - 1) / std::max<int64_t>(fit, 1);
  const int64_t x_plane = images.positions / std::max<int64_t>(1, images.space[0]);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = height * i / count, last = height * (i + 1) / count;
    const int64_t top = first * step, bottom = (last - 1) * step + reach;
    const auto in_image = [&](int64_t row) {
      return std::clamp<int64_t>(row - geometry.padding[0], 0, images.space[0]);
    };
    Strip strip{first * below,
                last * below,
                top * plane,
                (bottom - top) * plane,
                in_image(top) * x_plane,
                in_image(bottom) * x_plane,
                0,
                0};
    if (strip.seen_first < strip.seen_last) {
      strip.inner_first = at[strip.seen_first] - strip.origin;
      strip.inner_last = at[strip.seen_last - 1] + 1 - strip.origin;
    }
    strips.push_back(strip);
  }
  return strips;
}

// Output channels of all groups side by side. Returns the sum of the mask.
double depthwise(const Images& images, const Images& grads, const Geometry& geometry,
                 int64_t conv_groups, const int64_t* offsets, const Asked& asked,
                 const Parameters& parameters, const Fields& values) {
  check_countable(images.dtype, parameters.groups);
  const Sizes at = padded_places(images.space, geometry.padding);
  const std::vector<Strip> strips = strips_of(images, grads, geometry, at);
  const Statistic statistic = asked.statistic;
  std::optional<Ranking> ranking;
  if (is_order(statistic)) ranking = ranking_of(statistic, parameters);
  DepthwiseTask task{};
  task.x = view_of(images);
  task.grad_output = view_of(grads);
  task.dtype = images.dtype;
  task.width = images.channels / conv_groups;
  task.height = grads.channels / conv_groups;
  task.strips = strips.data();
  task.strips_end = task.strips + strips.size();
  task.at = at.data();
  task.windows = geometry.windows.data();
  task.taps = geometry.taps.data();
  task.tap_count = geometry.taps.size();
  task.offsets = offsets;
  task.statistic = statistic;
  task.summary = asked.summary;
  task.parameters = parameters;
  task.ranking = ranking ? &*ranking : nullptr;
  task.values = values;
  const int64_t most = ranking ? kRankedBytes / (64 * parameters.groups * kMostTaps) : kMostRuns;
  task.chunk = std::min(task.runs(), std::clamp<int64_t>(most, 1, kMostRuns));
  // Smaller ones where threads would else have none; a sum of masks that are no integers must not
  // depend on that.
  const int64_t threads = statistic == Statistic::sand_mask ? 8 : torch::stable::get_num_threads();
  while (task.units() < threads && task.chunk > 1) task.chunk = (task.chunk + 1) / 2;
  std::vector<double> mask_sums(task.units());
  task.mask_sums = mask_sums.data();
  const auto kernel = is_order(statistic) ? HTV_PER_RANKING_ISA(depthwise_kernel)
                                                 : HTV_PER_ISA(depthwise_kernel);
  const int64_t columns = task.chunk * kMostTaps;
  const int64_t work =
      images.samples * (images.positions + grads.positions * columns) + parameters.groups * columns;
  parallel_chunks(
      task.units(), work, DepthwiseScratch(task).bytes(task),
      [&](int64_t first, int64_t last, void* scratch) { kernel(task, first, last, scratch); });
  double mask_sum = 0;
  for (const double sum : mask_sums) mask_sum += sum;
  return mask_sum;
}

Answer answer(const std::string& op, const Tensor& x, const Tensor& grad_output,
              const Tensor& offsets, const Sizes& kernel, Sizes stride, const Sizes& padding,
              Sizes dilation, int64_t conv_groups, const Asked& asked) {
  const size_t dims = kernel.size();
  STD_TORCH_CHECK(
      dims >= 1 && stride.size() == dims && padding.size() == dims && dilation.size() == dims, op,
      ": kernel, stride, padding and dilation must have one entry per spatial dim");
  STD_TORCH_CHECK(x.dim() == int64_t(dims) + 2 && grad_output.dim() == x.dim(), op,
                  ": x and grad_output must be (samples, channels, *space) with ", dims,
                  " spatial dims");
  STD_TORCH_CHECK(grad_output.is_cpu(), op, ": grad_output must be on the CPU, as x is");
  const Images images(op, "x", x), grads(op, "grad_output", grad_output);
  STD_TORCH_CHECK(images.dtype == grads.dtype, op, ": x and grad_output must have one dtype");
  STD_TORCH_CHECK(images.samples == grads.samples, op, ": x has ", images.samples,
                  " samples, grad_output ", grads.samples);
  STD_TORCH_CHECK(
      conv_groups >= 1 && images.channels % conv_groups == 0 && grads.channels % conv_groups == 0,
      op, ": channels must be divisible by the groups of the convolution, ", conv_groups);
  const Checked checked(op);
  int64_t area = 1;
  for (size_t d = 0; d < dims; ++d) {
    STD_TORCH_CHECK(kernel[d] >= 1 && stride[d] >= 1 && padding[d] >= 0 && dilation[d] >= 1, op,
                    ": kernel, stride and dilation must be positive, padding at least 0");
    const int64_t padded = checked.sum(images.space[d], checked.product(2, padding[d]));
    area = checked.product(area, padded);
    // Of one tap, or one window, it does not matter how far the next would be; nor of taps that
    // nothing sees.
    if (kernel[d] == 1 || grads.positions == 0) dilation[d] = 1;
    if (grads.space[d] <= 1) stride[d] = 1;
    if (grads.space[d] == 0) continue;
    const int64_t reach = checked.sum(checked.product(kernel[d] - 1, dilation[d]), 1);
    const int64_t seen = checked.sum(checked.product(grads.space[d] - 1, stride[d]), reach);
    STD_TORCH_CHECK(seen <= padded, op, ": grad_output sees ", seen, " positions of spatial dim ",
                    d, ", x has ", images.space[d], " and padding ", padding[d]);
  }
  // What copies and scratch may take, with room for their gaps.
  const int64_t columns_at_most = checked.sum(images.channels, 64);
  checked.product(checked.sum(images.samples, 1), checked.sum(area, 64), columns_at_most,
                  int64_t(64));
  longest_group(op, offsets, images.samples);
  const int64_t* const bounds = static_cast<const int64_t*>(offsets.const_data_ptr());
  const Parameters parameters = asked.of(op, offsets.size(0) - 1);

  const int64_t taps = product(checked, kernel);
  const int64_t width = images.channels / conv_groups, height = grads.channels / conv_groups;
  checked.product(checked.sum(grads.channels, 1), columns_at_most, taps, int64_t(64));
  Sizes shape{grads.channels, width};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  Answer found(asked, shape, images.dtype);
  const Dtype compute = compute_dtype(images.dtype);
  const int64_t element = bytes_of(compute);
  if (found.empty()) return found;

  // Strides of the padded images, in positions; where each window starts and each tap lies.
  Sizes steps(dims, 1);
  for (size_t d = dims - 1; d > 0; --d)
    steps[d - 1] = steps[d] * (images.space[d] + 2 * padding[d]);
  const auto places = [&](const Sizes& sizes, const Sizes& factor) {
    Sizes at{0};
    for (size_t d = 0; d < dims; ++d) {
      Sizes inner;
      for (const int64_t outer : at)
        for (int64_t i = 0; i < sizes[d]; ++i)
          inner.push_back(checked.sum(outer, checked.product(i, factor[d], steps[d])));
      at = inner;
    }
    return at;
  };
  const Geometry geometry{
      kernel, stride, padding, dilation, places(grads.space, stride), places(kernel, dilation),
      area};
  if (conv_groups > 1 && width * height <= kFewWeights) {
    found.mask_sum =
        depthwise(images, grads, geometry, conv_groups, bounds, asked, parameters, found.fields());
    return found;
  }

  // All groups of the convolution at once, or each by itself and some of its channels at a time.
  const int64_t image_bytes = images.samples * area * element,
                grad_bytes = grads.samples * grads.positions * element;
  // Channels side by side.
  const int64_t block = std::max<int64_t>(kMostTileIn / taps / kTileInStep, 1) * kTileInStep;
  const bool at_once = images.channels <= fitting(images.channels, image_bytes, 1) &&
                       grads.channels <= fitting(grads.channels, grad_bytes, 1);
  const int64_t parts = at_once ? conv_groups : 1;
  const int64_t columns = at_once ? width : fitting(width, image_bytes, block);
  const int64_t outputs = at_once ? height : fitting(height, grad_bytes, kMostTileOut);

  // Windows are read where they lie, if their pieces fill registers well enough.
  const int64_t line = kRunStep / element;
  const Columns spaced =
      columns_of(columns, block, geometry.taps, stride_of(parts * columns, line, true), line);
  const bool in_place = copied(images, padding) && spaced.count() <= kMostHoles * columns * taps;
  const int64_t step = in_place ? line : 1;
  TileProblem problem = tile_problem(asked.statistic, asked.summary, parameters, compute);
  problem.parts = parts;
  const TileBlocks blocks(problem, bounds, grads.positions,
                          in_place ? RowsLie::in_place : RowsLie::packed_by_tile);
  const int64_t widest_in = taps * block <= kMostTileIn ? taps * block : 256;
  TileBuffers buffers{};
  buffers.value_stride = width * taps;
  buffers.value_part = height * width * taps;
  buffers.tap_channels = block;
  const Sizes no_padding(dims, 0);
  const Fields whole = found.fields();
  for (int64_t group = 0; group < conv_groups; group += parts)
    for (int64_t top = 0; top < height; top += outputs) {
      problem.out = std::min(outputs, height - top);
      const int64_t first_out = group * height + top;
      std::optional<Panels> panels;
      std::optional<Rows> rows;
      if (in_place) {
        panels.emplace(grads, first_out, problem.out, parts);
        problem.grad_output = {.data = panels->memory.get(),
                               .end = nullptr,
                               .stride = panels->stride,
                               .part = panels->part};
      } else {
        rows.emplace(rows_of(grads, no_padding, first_out, parts * problem.out, false));
        problem.grad_output = {
            .data = rows->data, .end = rows->end, .stride = rows->stride, .part = height};
      }
      for (int64_t left = 0; left < width; left += columns) {
        const int64_t channels = std::min(columns, width - left);
        const Rows seen =
            rows_of(images, padding, group * width + left, parts * channels, in_place);
        const Columns seen_columns = columns_of(channels, block, geometry.taps, seen.stride, step);
        const std::vector<Run>& runs = seen_columns.runs;
        Sizes at(geometry.windows);
        for (int64_t& window : at) window *= seen.stride;
        problem.in = seen_columns.count();
        problem.x = {.data = seen.data,
                     .end = seen.end,
                     .at = at.data(),
                     .positions = std::max<int64_t>(1, grads.positions),
                     .sample = area * seen.stride,
                     .part = width,
                     .runs = runs.data(),
                     .runs_end = runs.data() + runs.size()};
        for (size_t f = 0; f < found.tensors.size(); ++f)
          buffers.values.at[f] =
              static_cast<char*>(whole.at[f]) + (first_out * width + left) * taps * element;
        buffers.place = taps == 1 ? nullptr : seen_columns.place.data();
        buffers.taps = problem.in == channels * taps ? taps : 0;
        found.mask_sum += run_tiles(problem, blocks.plan, buffers, widest_in);
      }
    }
  return found;
}

}  // namespace

std::tuple<Tensor, Tensor> conv(Tensor x, Tensor grad_output, Tensor offsets, Sizes kernel,
                                Sizes stride, Sizes padding, Sizes dilation, int64_t conv_groups,
                                int64_t code, int64_t count, double votes, double k) {
  const std::string op = "htv::conv";
  const Asked asked = Asked::value(op, code, count, votes, k);
  check_factored(op, asked.statistic);
  return answer(op, x, grad_output, offsets, kernel, stride, padding, dilation, conv_groups, asked)
      .value();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_summary(Tensor x, Tensor grad_output,
                                                        Tensor offsets, Sizes kernel, Sizes stride,
                                                        Sizes padding, Sizes dilation,
                                                        int64_t conv_groups, int64_t code,
                                                        double log_offset) {
  const std::string op = "htv::conv_summary";
  const Asked asked = Asked::of_summary(op, code, log_offset);
  return answer(op, x, grad_output, offsets, kernel, stride, padding, dilation, conv_groups, asked)
      .summary(asked);
}

}  // namespace htv::cpu

STABLE_TORCH_LIBRARY_IMPL(htv, CPU, m) {
  m.impl("conv", TORCH_BOX(&htv::cpu::conv));
  m.impl("conv_summary", TORCH_BOX(&htv::cpu::conv_summary));
}
