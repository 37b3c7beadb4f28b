// htv::linear on the CPU: checks, and which kernel serves.
#include <algorithm>
#include <array>
#include <atomic>
#include <torch/csrc/stable/library.h>
#include <tuple>
#include <vector>

#include "../op_checks.h"
#include "asked.h"
#include "machine.h"
#include "parallel.h"
#include "rank_one_kernel.h"
#include "tile.h"
#include "votes_kernel.h"

namespace htv::cpu {
namespace {

// Products of so many multiplications are worth a call of torch's.
constexpr int64_t kManyProducts = 1 << 22;

// The sign planes of a matrix, and the memory they lie in.
struct Signs {
  Scratch memory;
  SignPlanes planes;

  Signs(const Tensor& matrix, Dtype dtype)
      : memory(planes_bytes(dtype, matrix.size(0), matrix.size(1))),
        planes(planes_in(memory.get(), dtype, matrix.size(0), matrix.size(1))) {
    const auto kernel = HTV_PER_ISA(sign_planes_kernel);
    parallel_chunks(planes.words, 32 * matrix.size(1), 0, [&](int64_t first, int64_t last, void*) {
      kernel(matrix.const_data_ptr(), dtype, matrix.size(0), matrix.size(1), planes, first, last);
    });
  }
};

// The least exponent, as stored, of values of bfloat16 that are not 0; 0 where there is no
// arithmetic for them.
int64_t least_exponent(const Tensor& matrix) {
  constexpr int64_t chunk = 1 << 16;
  const int64_t n = matrix.numel(), chunks = (n + chunk - 1) / chunk;
  const uint16_t* const values = static_cast<const uint16_t*>(matrix.const_data_ptr());
  std::vector<uint16_t> least(chunks + 1, 0x7fff);
  const auto kernel = HTV_PER_ISA(least_magnitude);
  parallel_chunks(chunks, chunk / 16, 0, [&](int64_t first, int64_t last, void*) {
    for (int64_t c = first; c < last; ++c)
      least[c] = kernel(values + c * chunk, std::min(chunk, n - c * chunk));
  });
  return *std::min_element(least.begin(), least.end()) >> 7;
}

// Whether products of bfloat16 may be added up by the instruction that takes them in pairs: it
// takes denormals for 0, so neither factors nor sums may be any. Products are multiples of 2^(sum
// of exponents - 14), and so are their sums.
bool may_pair(const Tensor& x, const Tensor& grad_output) {
  constexpr int64_t bias = 127, least_normal = -126;
  const int64_t a = least_exponent(x), b = a > 0 ? least_exponent(grad_output) : 0;
  return a > 0 && b > 0 && a + b - 2 * bias - 14 >= least_normal;
}

// Groups of any number of rows: their products tile by tile. Returns the sum of the mask.
double by_tiles(const Tensor& x, const Tensor& grad_output, const int64_t* offsets, Dtype dtype,
                const Asked& asked, const Parameters& parameters, const Fields& values) {
  const int64_t rows = x.size(0), in = x.size(1), out = grad_output.size(1), start = 0;
  const int64_t element = bytes_of(dtype);
  const auto end = [&](const void* data, int64_t columns) {
    return static_cast<const char*>(data) + rows * columns * element;
  };
  const void *const of_x = x.const_data_ptr(), *const of_grad = grad_output.const_data_ptr();
  const Run whole{0, 0, in};
  TileProblem problem = tile_problem(asked.statistic, asked.summary, parameters, dtype);
  problem.out = out;
  problem.in = in;
  problem.x = {.data = of_x,
               .end = end(of_x, in),
               .at = &start,
               .positions = 1,
               .sample = in,
               .part = 0,
               .runs = &whole,
               .runs_end = &whole + 1};
  problem.grad_output = {.data = of_grad, .end = end(of_grad, out), .stride = out, .part = 0};
  const auto is_even = [](int64_t row) { return row % 2 == 0; };
  const bool even = problem.sums() ? is_even(rows)
                                   : std::all_of(offsets, offsets + parameters.groups + 1, is_even);
  const bool paired = dtype == Dtype::bfloat16 && even && may_pair(x, grad_output);
  TileBuffers buffers{};
  buffers.values = values;
  buffers.value_stride = in;
  return run_matrices(problem, offsets, paired, buffers);
}

// Whether torch multiplies faster than the tiles here, and rounds no more.
bool is_for_torch(const Tensor& x, const Tensor& grad_output, Dtype dtype) {
  const int64_t in = x.size(1), out = grad_output.size(1);
  const bool exact = dtype == Dtype::float32 || dtype == Dtype::float64;
  return exact && votes_tiles(out, in) > 1 && x.size(0) * in * out >= kManyProducts &&
         torch_multiplies();
}

// Puts the sums of a tile's products in their places. Threads take tiles, of which none is shared:
// the same bits whatever their number.
void multiply(const VotesTask& task, const VotesTile& tile, const Tensor& like) {
  const int64_t element = bytes_of(task.dtype), height = tile.out_end - tile.out_begin,
                width = tile.in_end - tile.in_begin;
  const auto view = [&](const void* data, int64_t offset, int64_t rows, int64_t columns,
                        int64_t down, int64_t across) {
    char* const at = const_cast<char*>(static_cast<const char*>(data)) + offset * element;
    return torch::stable::from_blob(at, {rows, columns}, {down, across}, like.device(),
                                    like.scalar_type());
  };
  const Tensor g = view(task.grad_output, tile.out_begin, height, task.rows, 1, task.out);
  const Tensor x = view(task.x, tile.in_begin, task.rows, width, task.in, 1);
  const Tensor sums =
      view(task.sums, tile.out_begin * task.in + tile.in_begin, height, width, task.in, 1);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(g), torch::stable::detail::from(x),
                                    torch::stable::detail::from(sums)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // `sums` once more
}

// Masks, sign sums, and sum and votes, of groups of at most one row. Returns the sum of the mask.
double by_signs(const Tensor& x, const Tensor& grad_output, const int64_t* offsets, Dtype dtype,
                const Asked& asked, const Parameters& parameters, const Fields& fields) {
  const bool torch = is_for_torch(x, grad_output, dtype);
  if (!torch) {
    const Asked sum{Statistic::mean, false, parameters};
    by_tiles(x, grad_output, offsets, dtype, sum, parameters, {{fields.at[0]}});
  }
  const Signs signs_x(x, dtype), signs_g(grad_output, dtype);
  const VotesTask task{x.const_data_ptr(),
                       grad_output.const_data_ptr(),
                       dtype,
                       x.size(0),
                       x.size(1),
                       grad_output.size(1),
                       signs_x.planes,
                       signs_g.planes,
                       asked.statistic,
                       parameters,
                       fields.at[0],
                       asked.summary ? fields.at[1] : nullptr};
  const auto kernel = HTV_PER_ISA(votes_kernel);
  const int64_t per_coordinate = signs_x.planes.words + (torch ? task.rows / 16 : 1);
  std::atomic<int64_t> kept = 0;
  parallel_chunks(votes_tiles(task.out, task.in),
                  kVotesTileOut * kVotesTileIn / 16 * per_coordinate, 0,
                  [&](int64_t first, int64_t last, void*) {
                    for (int64_t tile = first; tile < last; ++tile) {
                      if (torch) multiply(task, votes_tile(task, tile), x);
                      kept += kernel(task, votes_tile(task, tile));
                    }
                  });
  return double(kept);
}

// Order statistics of groups of at most one row.
void rank_rows(const Tensor& x, const Tensor& grad_output, Dtype dtype, const Ranking& ranking,
               void* value) {
  const Signs signs_x(x, dtype), signs_g(grad_output, dtype);
  const RankOneTask task{x.const_data_ptr(),
                         grad_output.const_data_ptr(),
                         dtype,
                         x.size(0),
                         x.size(1),
                         grad_output.size(1),
                         &ranking,
                         signs_x.planes,
                         signs_g.planes,
                         value};
  const auto kernel = HTV_PER_RANKING_ISA(rank_one_kernel);
  const int64_t work =
      kRankOneOut * rank_one_width(dtype) / 16 * ranking.ranked * select_work(ranking);
  parallel_chunks(
      rank_one_tiles(task), work, rank_one_scratch_bytes(task),
      [&](int64_t first, int64_t last, void* scratch) { kernel(task, first, last, scratch); });
}

}  // namespace

Answer linear_answer(const std::string& op, const Tensor& x, const Tensor& grad_output,
                     const Tensor& offsets, const Asked& asked) {
  check_matrix(op, "x", x);
  check_matrix(op, "grad_output", grad_output);
  STD_TORCH_CHECK(grad_output.is_cpu(), op, ": grad_output must be on the CPU, as x is");
  const Statistic statistic = asked.statistic;
  const Dtype dtype = dtype_of(op, "x", x);
  STD_TORCH_CHECK(dtype_of(op, "grad_output", grad_output) == dtype, op,
                  ": x and grad_output must have one dtype");
  const int64_t rows = x.size(0), in = x.size(1), out = grad_output.size(1);
  STD_TORCH_CHECK(grad_output.size(0) == rows, op, ": x has ", rows, " rows, grad_output ",
                  grad_output.size(0));
  const int64_t longest = longest_group(op, offsets, rows), groups = offsets.size(0) - 1;
  const Parameters parameters = asked.of(op, groups);

  Answer found(asked, {out, in}, dtype);
  if (found.empty()) return found;
  const bool counted = statistic == Statistic::and_mask || statistic == Statistic::xor_mask ||
                       statistic == Statistic::sign_sum;
  const bool votes_alone = asked.summary ? fields_of(statistic, true) == 2 : counted;
  const int64_t* const bounds = static_cast<const int64_t*>(offsets.const_data_ptr());
  if (longest <= 1 && votes_alone) {
    found.mask_sum = by_signs(x, grad_output, bounds, dtype, asked, parameters, found.fields());
  } else if (longest <= 1 && is_order(statistic)) {
    rank_rows(x, grad_output, dtype, ranking_of(statistic, parameters), found.fields().at[0]);
  } else {
    found.mask_sum = by_tiles(x, grad_output, bounds, dtype, asked, parameters, found.fields());
  }
  return found;
}

std::tuple<Tensor, Tensor> linear(Tensor x, Tensor grad_output, Tensor offsets, int64_t code,
                                  int64_t count, double votes, double k) {
  const std::string op = "htv::linear";
  const Asked asked = Asked::value(op, code, count, votes, k);
  check_factored(op, asked.statistic);
  return linear_answer(op, x, grad_output, offsets, asked).value();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_summary(Tensor x, Tensor grad_output,
                                                          Tensor offsets, int64_t code,
                                                          double log_offset) {
  const std::string op = "htv::linear_summary";
  const Asked asked = Asked::of_summary(op, code, log_offset);
  return linear_answer(op, x, grad_output, offsets, asked).summary(asked);
}

}  // namespace htv::cpu

STABLE_TORCH_LIBRARY_IMPL(htv, CPU, m) {
  m.impl("linear", TORCH_BOX(&htv::cpu::linear));
  m.impl("linear_summary", TORCH_BOX(&htv::cpu::linear_summary));
}
