// htv::linear on the CPU: checks, scratch, threads. The loops are in linear_kernel.cpp.
#include <optional>
#include <tuple>
#include <vector>

#include "../contract.h"
#include "linear_kernel.h"
#include "parallel.h"
#include "rank_one.h"
#include "tile.h"

namespace htv::cpu {
namespace {

// The sign planes of a matrix, and the memory they lie in.
struct Signs {
  Scratch memory;
  SignPlanes planes;

  Signs(const Tensor& matrix, Dtype dtype)
      : memory(planes_bytes(dtype, matrix.size(0), matrix.size(1))),
        planes(planes_in(memory.get(), dtype, matrix.size(0), matrix.size(1))) {
    const auto kernel = HTV_PER_LEVEL(sign_planes_kernel);
    parallel_chunks(planes.words, 32 * matrix.size(1), 0, [&](int64_t first, int64_t last, void*) {
      kernel(matrix.const_data_ptr(), dtype, matrix.size(0), matrix.size(1), planes, first, last);
    });
  }
};

// Order statistics of groups of at most one row.
void rank_one(const Tensor& x, const Tensor& grad_output, Dtype dtype, const Ranking& ranking, const SignPlanes& signs_x,
              const SignPlanes& signs_g, Tensor& value) {
  const RankOneTask task{x.const_data_ptr(), grad_output.const_data_ptr(), dtype,   x.size(0), x.size(1),
                         grad_output.size(1), &ranking,                    signs_x, signs_g,   value.mutable_data_ptr()};
  const auto kernel = HTV_PER_LEVEL(rank_one_kernel);
  const int64_t work = kRankOneOut * rank_one_width(dtype) / 16 * ranking.ranked * select_work(ranking);
  parallel_chunks(rank_one_tiles(task), work, rank_one_scratch_bytes(task),
                  [&](int64_t first, int64_t last, void* scratch) { kernel(task, first, last, scratch); });
}

// Groups of any number of rows: their products tile by tile.
std::tuple<Tensor, Tensor> by_tiles(const Tensor& x, const Tensor& grad_output, const int64_t* offsets, Dtype dtype,
                                    Statistic statistic, const Parameters& parameters, Tensor value) {
  const int64_t rows = x.size(0), in = x.size(1), out = grad_output.size(1), start = 0;
  const int64_t element = bytes_of(dtype);
  const Run whole{0, 0, in};
  TilePlan plan(statistic, parameters, dtype, offsets, 1);
  TileTask& task = plan.task;
  task.x = x.const_data_ptr();
  task.x_end = static_cast<const char*>(task.x) + rows * in * element;
  task.at = &start;
  task.positions = 1;
  task.sample = in;
  task.runs = &whole;
  task.runs_end = task.runs + 1;
  task.grad_output = grad_output.const_data_ptr();
  task.grad_end = static_cast<const char*>(task.grad_output) + rows * out * element;
  task.grad_stride = out;
  task.out = out;
  task.in = in;
  task.value = value.mutable_data_ptr();
  task.value_stride = in;
  const double mask_sum = plan.run();
  return {value, sum_in_order(x, {mask_sum})};
}

}  // namespace

std::tuple<Tensor, Tensor> linear(Tensor x, Tensor grad_output, Tensor offsets, int64_t code, int64_t count,
                                  double votes, double k) {
  const std::string op = "htv::linear";
  check_matrix(op, "x", x);
  check_matrix(op, "grad_output", grad_output);
  STD_TORCH_CHECK(grad_output.is_cpu(), op, ": grad_output must be on the CPU, as x is");
  const Statistic statistic = statistic_of(op, code);
  check_factored(op, statistic);
  const Dtype dtype = dtype_of(op, "x", x);
  STD_TORCH_CHECK(dtype_of(op, "grad_output", grad_output) == dtype, op, ": x and grad_output must have one dtype");
  const int64_t rows = x.size(0), in = x.size(1), out = grad_output.size(1);
  STD_TORCH_CHECK(grad_output.size(0) == rows, op, ": x has ", rows, " rows, grad_output ", grad_output.size(0));
  const int64_t longest = longest_group(op, offsets, rows), groups = offsets.size(0) - 1;
  const Parameters parameters = parameters_for(op, statistic, groups, count, votes, k);

  Tensor value = torch::stable::new_empty(x, {out, in}, compute_type(dtype));
  const bool counted = statistic == Statistic::mean || statistic == Statistic::and_mask ||
                       statistic == Statistic::xor_mask || statistic == Statistic::sign_sum;
  const bool single_rows = longest <= 1;
  if (!single_rows || !(counted || is_order(statistic)))
    return by_tiles(x, grad_output, static_cast<const int64_t*>(offsets.const_data_ptr()), dtype, statistic, parameters,
                    value);
  std::optional<Signs> signs_x, signs_g;
  if (statistic != Statistic::mean) {
    signs_x.emplace(x, dtype);
    signs_g.emplace(grad_output, dtype);
  }
  if (is_order(statistic)) {
    rank_one(x, grad_output, dtype, ranking_of(statistic, parameters), signs_x->planes, signs_g->planes, value);
    return {value, sum_in_order(x, {})};
  }
  const int64_t tile_out = linear_tile_out(out, in, torch::stable::get_num_threads());
  const int64_t tiles = linear_tiles(out, in, tile_out);
  std::vector<int64_t> kept(tiles);
  const LinearTask task{x.const_data_ptr(),
                        grad_output.const_data_ptr(),
                        dtype,
                        rows,
                        in,
                        out,
                        static_cast<const int64_t*>(offsets.const_data_ptr()),
                        statistic,
                        parameters,
                        single_rows,
                        signs_x ? signs_x->planes : SignPlanes{},
                        signs_g ? signs_g->planes : SignPlanes{},
                        tile_out,
                        value.mutable_data_ptr(),
                        kept.data()};
  const auto kernel = HTV_PER_LEVEL(linear_kernel);
  parallel_chunks(tiles, (rows + 1) * tile_out * kTileIn / 16, linear_scratch_bytes(dtype),
                  [&](int64_t first, int64_t last, void* scratch) { kernel(task, first, last, scratch); });
  return {value, sum_in_order(x, {kept.begin(), kept.end()})};
}

}  // namespace htv::cpu
