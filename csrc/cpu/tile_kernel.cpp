// Statistics of grouped products, tile by tile: compiled once per instruction set.
//
// Blocks of rows are packed into panels, those of x unless they can be read where they lie. For
// each register tile
// ("cell") of coordinates the rows of one group after the other are multiplied; a streaming
// statistic takes in the product while it is in registers, an order statistic stores it and ranks
// the cell's values in cache when all groups have passed.
#include "tile_kernel.h"

#include <vector>

#include "lanes.h"
#include "select.h"
#include "tally.h"
#include "transpose.h"

namespace htv::HTV_ISA {
namespace {

// The cell: kRows x kColumns registers. Some of its rows are multiplied at a time, of two cells side
// by side where there are the registers: that takes the fewest loads. Where groups have few rows,
// of one cell, so that the states find room as well.
constexpr int kColumns = 2;
constexpr int kRows = kTileOutStep;
constexpr int kSomeRows = 4;
constexpr int kCells = kRegisters == 32 ? 2 : 1;
constexpr int kCell = kRows * kColumns;
constexpr int kRanked = 4;  // registers that are ranked at a time
constexpr int64_t kRowsAhead = 8;  // brought nearer while rows are packed
constexpr int64_t kPackedTogether = 8;  // registers of columns, or panels of outputs
static_assert(kRows % kSomeRows == 0 && kTileInStep % (kColumns * kLanes<Register<float>>) == 0);
static_assert(kCells <= kMostCells);

// The columns of a cell, row by row: packed, or where they lie.
template <class V>
struct Packed {
  const V* x;
  int64_t panel;  // registers from one to the next

  Packed from(int64_t row) const { return {x + row * kColumns, panel}; }
  V operator()(int64_t row, int j) const {
    return x[j / kColumns * panel + row * kColumns + j % kColumns];
  }
};

template <class V>
struct InPlace {
  const Real<V>* x[kCells * kColumns];
  const int64_t* at;

  InPlace from(int64_t row) const {
    InPlace rest = *this;
    rest.at += row;
    return rest;
  }
  V operator()(int64_t row, int j) const { return load<V>(x[j] + at[row]); }
};

// sum = sum over rows of g[row][i] * x[row][j]; or over pairs of rows, packed into one.
template <class V, int K, bool paired, int columns, class X>
inline __attribute__((always_inline)) void product(const Real<V>* g, const X& x, int64_t rows,
                                                   V (&sum)[K][columns]) {
#pragma GCC unroll 8
  for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) sum[i][j] = V{};
  const auto add_row = [&](const Real<V>* g, int64_t r) __attribute__((always_inline)) {
    V row[columns];
#pragma GCC unroll 4
    for (int j = 0; j < columns; ++j) row[j] = x(r, j);
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < columns; ++j) {
#if defined(__AVX512BF16__)
        if constexpr (paired) sum[i][j] = multiply_add_pair(g + i, row[j], sum[i][j]);
        else
#endif
          sum[i][j] = multiply_add(splat<V>(g[i]), row[j], sum[i][j]);
      }
  };
  constexpr int usual = 4;  // rows of a group of few
  if (columns == kColumns && rows == usual) {
#pragma GCC unroll 4
    for (int r = 0; r < usual; ++r) add_row(g + r * kRows, r);
  } else {
    for (int64_t r = 0; r < rows; ++r, g += kRows) add_row(g, r);
  }
}

// paired: rows are bfloat16, and two of them are packed and multiplied as one.
template <class V, bool paired>
class Tile {
  using R = Real<V>;
  static constexpr int64_t kTogether = paired ? 2 : 1;  // rows
  static constexpr int kWidth = kColumns * kLanes<V>;

  const TileProblem& problem_;
  const TilePlan& plan_;
  const TileBuffers& buffers_;
  const int64_t part_, out_, in_;         // first coordinate
  const int64_t height_, width_;          // coordinates in the tile
  const int64_t panels_out_, panels_in_;  // cells needed for them
  const int64_t panel_rows_;
  // Where the rows of the block lie, if they are read there, in the place of packed ones.
  int64_t* const at_;
  V* const packed_x_;  // [panel][row][kColumns]
  R* const packed_g_;  // [panel][row][kRows]
  const int64_t joined_width_;
  R* const joined_;  // some rows of x whose runs are no whole registers
  R* const staged_;  // [field][row][column], values whose places are not side by side
  // Of each cell, between blocks: states, and products of unfinished groups; or, in kept_ alone,
  // the values to rank: [kCell / kRanked][group][kRanked].
  V* const kept_;
  V* const unfinished_;
  void* const select_scratch_;
  MaskSum<V> mask_sum_;
  std::vector<Run> runs_;  // of the tile's columns
  // Of its registers of columns: where they lie in a row that is read in place, and how many
  // coordinates they hold.
  std::vector<int64_t> offsets_, valid_;
  int64_t reach_ = 0;  // elements from a row's start to the end of its last register
  bool whole_registers_ = true;

 public:
  Tile(const TileProblem& problem, const TilePlan& plan, const TileBuffers& buffers, int64_t tile)
      : problem_(problem),
        plan_(plan),
        buffers_(buffers),
        part_(tile / (plan.tiles_out(problem) * plan.tiles_in(problem))),
        out_(tile / plan.tiles_in(problem) % plan.tiles_out(problem) * plan.tile_out),
        in_(tile % plan.tiles_in(problem) * plan.tile_in),
        height_(least(plan.tile_out, problem.out - out_)),
        width_(least(plan.tile_in, problem.in - in_)),
        panels_out_((height_ + kRows - 1) / kRows),
        panels_in_((width_ + kWidth - 1) / kWidth),
        panel_rows_(plan.panel_rows()),
        at_(static_cast<int64_t*>(buffers.scratch)),
        packed_x_(plan.packed_once() ? packed_x(plan) : static_cast<V*>(buffers.scratch)),
        packed_g_(plan.packed_once() ? packed_g(plan)
                                     : reinterpret_cast<R*>(panel_x(panels_in_))),
        joined_width_(plan.in_place || plan.packed_once() ? 0 : width_ + kLanes<V>),
        joined_(behind_rows(plan)),
        staged_(joined_ + kJoinedRows * joined_width_),
        kept_(aligned(staged_ + (buffers.place ? problem.fields() * area() : 0))),
        unfinished_(kept_ + (plan.one_block() ? kCells : panels_out_ * panels_in_) * kCell *
                                kept_per_coordinate()),
        select_scratch_(unfinished_),
        offsets_(panels_in_ * kColumns),
        valid_(panels_in_ * kColumns) {
    for (int64_t i = 0; i < width_ && !plan.in_place; i += kLanes<V>)
      valid_[i / kLanes<V>] = least(kLanes<V>, width_ - i);
    for (const Run* run = problem.x.runs; run != problem.x.runs_end; ++run) {
      const int64_t begin = run->column < in_ ? in_ : run->column;
      const int64_t end = least(run->column + run->length, in_ + width_);
      if (begin >= end) continue;
      const Run mine{begin - in_, run->offset + begin - run->column, end - begin};
      runs_.push_back(mine);
      whole_registers_ &= mine.column % kLanes<V> == 0;
      const int64_t reach = mine.offset + (mine.length + kLanes<V> - 1) / kLanes<V> * kLanes<V>;
      reach_ = reach > reach_ ? reach : reach_;
      if (!plan.in_place) continue;
      for (int64_t i = 0; i < mine.length; i += kLanes<V>) {
        offsets_[(mine.column + i) / kLanes<V>] = mine.offset + i;
        valid_[(mine.column + i) / kLanes<V>] = least(kLanes<V>, mine.length - i);
      }
    }
  }

  // Packs rows of matrices, of a tile that is the whole of a problem: some panels at a time, so that
  // what is read lies side by side and what is written stays in few pages.
  void pack_matrix_x(const RowBlock& rows) {
    with_element([&](auto element) {
      const auto read = rows_of(x<decltype(element)>(), problem_.x.end, problem_.x.sample);
      const auto place = [&](int64_t at) { return panel_x(rows, at / kColumns) + at % kColumns; };
      const int64_t registers = panels_in_ * kColumns;
      for (int64_t from = 0; from < registers; from += kPackedTogether)
        for (int64_t r = 0; r < count(rows); ++r)
          for (int64_t at = from; at < least(from + kPackedTogether, registers); ++at)
            place(at)[r * kColumns] =
                read(rows.begin + r * kTogether, at * kLanes<V>, width_ - at * kLanes<V>);
    });
  }

  void pack_matrix_g(const RowBlock& rows) {
    constexpr int step = kLanes<V> < kRows ? kLanes<V> : kRows;  // of outputs
    with_element([&](auto element) {
      const TileGrad& grad_output = problem_.grad_output;
      const auto read = rows_of(grad<decltype(element)>(), grad_output.end, grad_output.stride);
      const auto place = [&](int64_t o) { return packed_panel_g(rows, o / kRows) + o % kRows; };
      const int64_t outputs = panels_out_ * kRows, together = kPackedTogether * kRows;
      for (int64_t from = 0; from < outputs; from += together)
        for (int64_t r = 0; r < count(rows); ++r)
          for (int64_t o = from; o < least(from + together, outputs); o += step)
            store<V>(place(o) + r * kRows, read(rows.begin + r * kTogether, o, height_ - o), step);
    });
  }

  void run(int64_t tile) {
    if (is_order(problem_.statistic)) {
      each_cell([&](const RowBlock& block, int64_t o, int64_t i, auto cells, auto x) {
        rank_cells<cells()>(block, o, i, x);
      });
    } else if (problem_.sums()) {
      each_cell([&](const RowBlock& block, int64_t o, int64_t i, auto cells, auto x) {
        for (int top = 0; top < kRows; top += kSomeRows)
          sum_cells<kSomeRows, cells()>(block, o, i, top, x);
      });
    } else {
      with_state([&](auto state) {
        each_cell([&](const RowBlock& block, int64_t o, int64_t i, auto cells, auto x) {
          for (int top = 0; top < kRows; top += kSomeRows)
            stream_cells<decltype(state), kSomeRows, cells()>(block, o, i, top, x);
        });
      });
    }
    if (buffers_.place)
      for (int field = 0; field < problem_.fields(); ++field) scatter(field);
    buffers_.mask_sums[tile] = mask_sum_.total();
  }

 private:
  // Packs rows of the block for the tile alone.
  void pack(const RowBlock& block) {
    with_element([&](auto element) {
      pack_x<decltype(element)>(block);
      pack_g<decltype(element)>(block);
    });
  }

  // Calls f with a value of the rows' type.
  template <class F>
  void with_element(const F& f) const {
    if constexpr (paired) {
      f(BFloat16{});
    } else {
      with_dtype(problem_.dtype, [&](auto element) {
        if constexpr (sizeof(Compute<decltype(element)>) == sizeof(R)) f(element);
      });
    }
  }

  static int64_t count(const RowBlock& block) { return (block.end - block.begin) / kTogether; }

  // (row, column, n) -> the first n values of a matrix from there on, or of this row and the next.
  template <class T>
  static auto rows_of(const T* first, const void* memory_end, int64_t stride) {
    const T* const end = static_cast<const T*>(memory_end);
    return [=](int64_t row, int64_t column, int64_t n) __attribute__((always_inline)) {
      if (n <= 0) return V{};
      const T* const from = first + row * stride + column;
      const T* const next = from + (kTogether - 1) * stride;
      __builtin_prefetch(from + kRowsAhead * stride);
      return values_at(from, next, end - next >= kLanes<V> ? kLanes<V> : n);
    };
  }

  int64_t area() const { return plan_.tile_out * plan_.tile_in; }  // of a full tile

  // Calls f with a state of what streams.
  template <class F>
  void with_state(const F& f) const {
    if (problem_.summary) return with_summary<V>(problem_.statistic, f);
    with_tally<V>(problem_.statistic, f);
  }

  // The tile's panels among those of the whole problem.
  V* packed_x(const TilePlan& plan) const {
    return static_cast<V*>(plan.packed_x) + in_ / kWidth * panel_rows_ * kColumns;
  }
  R* packed_g(const TilePlan& plan) const {
    return static_cast<R*>(plan.packed_grad) + out_ * panel_rows_;
  }
  // What follows the tile's own table or panels of rows.
  R* behind_rows(const TilePlan& plan) const {
    if (plan.packed_once()) return static_cast<R*>(buffers_.scratch);
    if (!plan.in_place) return panel_g(panels_out_);
    return reinterpret_cast<R*>(reinterpret_cast<char*>(at_) + row_table_bytes(plan.block_rows));
  }
  static V* aligned(R* p) {
    constexpr uintptr_t step = kWidestRegister;
    return reinterpret_cast<V*>((reinterpret_cast<uintptr_t>(p) + step - 1) / step * step);
  }
  int64_t kept_per_coordinate() const {
    if (is_order(problem_.statistic)) return problem_.parameters.groups;
    int64_t registers = 0;
    if (problem_.sums()) return 1;
    with_state([&](auto state) { registers = sizeof state / sizeof(V); });
    return registers;
  }

  // The first rows of the tile's part.
  template <class T>
  const T* x() const {
    return static_cast<const T*>(problem_.x.data) + part_ * problem_.x.part;
  }
  template <class T>
  const T* grad() const {
    return static_cast<const T*>(problem_.grad_output.data) + part_ * problem_.grad_output.part;
  }

  V* panel_x(int64_t panel) const { return packed_x_ + panel * panel_rows_ * kColumns; }
  R* panel_g(int64_t panel) const { return packed_g_ + panel * panel_rows_ * kRows; }
  // Rows of panels, maybe pairs, before those of the block.
  int64_t rows_before(const RowBlock& block) const {
    return plan_.packed_once() ? (block.begin - plan_.blocks->begin) / kTogether : 0;
  }
  V* panel_x(const RowBlock& block, int64_t panel) const {
    return panel_x(panel) + rows_before(block) * kColumns;
  }
  R* packed_panel_g(const RowBlock& block, int64_t panel) const {
    return panel_g(panel) + rows_before(block) * kRows;
  }
  const R* panel_g(const RowBlock& block, int64_t panel) const {
    if (!plan_.in_place) return panel_g(panel) + rows_before(block) * kRows;
    return grad<R>() + (out_ / kRows + panel) * problem_.grad_output.stride + block.begin * kRows;
  }
  // Where a cell is in memory that is kept from block to block; with one block all cells share the
  // place of those that are multiplied together.
  int64_t cell(int64_t o, int64_t i) const {
    return plan_.one_block() ? i % kCells : i * panels_out_ + o;
  }

  // f(block, first panel, how many panels side by side, the panel's columns), with the block packed,
  // for all panels of columns.
  template <class F>
  void each_panel(const F& f) {
    const auto serve = [&](const RowBlock& block, const auto& x) {
      int64_t i = 0;
      if (!plan_.few_rows)
        for (; i + kCells <= panels_in_; i += kCells)
          f(block, i, std::integral_constant<int, kCells>{}, x(i));
      for (; i < panels_in_; ++i) f(block, i, std::integral_constant<int, 1>{}, x(i));
    };
    for (const RowBlock* block = plan_.blocks; block != plan_.blocks_end; ++block) {
      if (plan_.in_place) {
        find_rows(*block);
        const R* const rows = x<R>();
        serve(*block, [&](int64_t panel) {
          InPlace<V> columns{{}, at_};
          const int64_t first = panel * kColumns;
          for (int j = 0; j < kCells * kColumns && first + j < panels_in_ * kColumns; ++j)
            columns.x[j] = rows + offsets_[first + j];
          return columns;
        });
        continue;
      }
      if (!plan_.packed_once()) pack(*block);
      serve(*block, [&](int64_t panel) {
        return Packed<V>{panel_x(*block, panel), panel_rows_ * kColumns};
      });
    }
  }

  void find_rows(const RowBlock& block) {
    const TileInput& input = problem_.x;
    int64_t sample = block.begin / input.positions, position = block.begin % input.positions;
    for (int64_t r = 0; r < block.end - block.begin; ++r) {
      at_[r] = sample * input.sample + input.at[position];
      if (++position == input.positions) ++sample, position = 0;
    }
  }

  // While the cells of a panel of columns are multiplied, each brings a share of what comes next
  // nearer: of the rows that the next block packs,
  void prefetch(const RowBlock& block, int64_t o, int64_t i, int c, const Packed<V>&) const {
    const int64_t share = (i + c) * panels_out_ + o;
    const RowBlock& next = *(&block + 1);
    if (plan_.packed_once() || &next == plan_.blocks_end) return;
    const TileInput& input = problem_.x;
    const TileGrad& grad = problem_.grad_output;
    const int64_t rows = next.end - next.begin, shares = panels_in_ * panels_out_;
    const int64_t element = bytes_of(problem_.dtype);
    const char* const x = static_cast<const char*>(input.data) + part_ * input.part * element;
    const char* const g =
        static_cast<const char*>(grad.data) + (part_ * grad.part + out_) * element;
    const auto touch = [](const char* from, int64_t bytes) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
    };
    for (int64_t r = next.begin + rows * share / shares;
         r < next.begin + rows * (share + 1) / shares; ++r) {
      const char* const row =
          x + (r / input.positions * input.sample + input.at[r % input.positions]) * element;
      for (const Run& run : runs_) touch(row + run.offset * element, run.length * element);
      touch(g + r * grad.stride * element, height_ * element);
    }
  }

  // or of the next panel of columns.
  void prefetch(const RowBlock& block, int64_t o, int64_t i, int c,
                const InPlace<V>& columns) const {
    if (i + c + 1 == panels_in_) return;
    const int64_t rows = block.end - block.begin;
    for (int j = c * kColumns; j < (c + 1) * kColumns; ++j) {
      const R* const next =
          columns.x[j] + offsets_[(i + 1) * kColumns + j] - offsets_[i * kColumns + j];
      for (int64_t r = rows * o / panels_out_; r < rows * (o + 1) / panels_out_; ++r)
        __builtin_prefetch(next + at_[r], 0, 3);
    }
  }

  // The first n values of a row, or of it and the next one.
  template <class T>
  static V values_at(const T* row, const T* next, int64_t n) {
#if defined(__AVX512BF16__)
    if constexpr (paired) return load_pair<V>(row, next, n);
#endif
    return load<V>(row, n);
  }

  template <class T>
  void pack_x(const RowBlock& block) {
    constexpr int lanes = kLanes<V>;
    const TileInput& input = problem_.x;
    const T* const x = this->x<T>();
    const T* const end = static_cast<const T*>(input.end);
    const int64_t filled = (width_ + lanes - 1) / lanes * lanes;
    int64_t sample = block.begin / input.positions, position = block.begin % input.positions;
    const auto next_row = [&] {
      const T* const row = x + sample * input.sample + input.at[position];
      if (++position == input.positions) ++sample, position = 0;
      return row;
    };
    const int64_t rows = count(block);
    V* const first = panel_x(block, 0);
    const auto place = [&](int64_t column, int64_t r) {
      const uint64_t at = uint64_t(column) / lanes;  // a register of the row
      return first + (at / kColumns * panel_rows_ + r) * kColumns + at % kColumns;
    };
    for (int64_t r = 0; r < rows; ++r) {
      const T *const row = next_row(), *const other = paired ? next_row() : row;
      // what registers hold beyond a run is overwritten or not stored
      const bool inside = end - row >= reach_ && end - other >= reach_;
      for (const Run& run : runs_)
        for (int64_t i = 0; i < run.length; i += lanes) {
          const int64_t at = run.offset + i;
          const V v = values_at(row + at, other + at, inside ? lanes : run.length - i);
          if (whole_registers_) {
            *place(run.column + i, r) = v;
          } else {
            store<V>(joined_ + r % kJoinedRows * joined_width_ + run.column + i, v, lanes);
          }
        }
      if (!whole_registers_ && (r % kJoinedRows == kJoinedRows - 1 || r + 1 == rows))
        for (int64_t j = r / kJoinedRows * kJoinedRows; j <= r; ++j)
          for (int64_t i = 0; i < filled; i += lanes)
            *place(i, j) = load<V>(joined_ + j % kJoinedRows * joined_width_ + i);
      if (filled < panels_in_ * kWidth) *place(filled, r) = V{};
    }
  }

  template <class T>
  void pack_g(const RowBlock& block) {
    constexpr int64_t together = kLanes<V> < kRows ? kLanes<V> : kRows;
    const T* const g = grad<T>() + out_;
    const T* const end = static_cast<const T*>(problem_.grad_output.end);
    R* const first = panel_g(0) + rows_before(block) * kRows;
    for (int64_t r = 0; r < (block.end - block.begin) / kTogether; ++r) {
      const T* const row = g + (block.begin + r * kTogether) * problem_.grad_output.stride;
      const T* const other = row + (kTogether - 1) * problem_.grad_output.stride;
      R* to = first + r * kRows;
      for (int64_t o = 0; o < panels_out_; ++o, to += panel_rows_ * kRows)
        for (int64_t i = 0; i < kRows; i += together) {
          const int64_t at = o * kRows + i;
          const bool inside = end - other >= at + kLanes<V>;
          const int64_t n = inside ? kLanes<V> : height_ - at;
          store<V>(to + i, n > 0 ? values_at(row + at, other + at, n) : V{}, together);
        }
    }
  }

  // f(block, panel of outputs, first panel of columns, how many side by side, their columns)
  template <class F>
  void each_cell(const F& f) {
    each_panel([&](const RowBlock& block, int64_t i, auto cells, const auto& x) {
      for (int64_t o = 0; o < panels_out_; ++o) {
        for (int c = 0; c < cells(); ++c) prefetch(block, o, i, c, x);
        f(block, o, i, cells, x);
      }
    });
  }

  // K rows of some cells side by side.
  template <int K, int cells, class X>
  void sum_cells(const RowBlock& block, int64_t o, int64_t i, int top, const X& x) {
    const auto kept = [&](int a, int b) -> V& {
      return kept_[cell(o, i + b / kColumns) * kCell + (top + a) * kColumns + b % kColumns];
    };
    const R* const g = panel_g(block, o) + top;
    V sums[K][cells * kColumns] = {};
    for (const Piece* piece = block.pieces; piece != block.pieces_end; ++piece) {
      const int64_t first = piece->first / kTogether, rows = piece->last / kTogether - first;
      product<V, K, paired>(g + first * kRows, x.from(first), rows, sums);
      if (!piece->begins) {
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < cells * kColumns; ++b) sums[a][b] += kept(a, b);
      }
      if (!piece->ends) {
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < cells * kColumns; ++b) kept(a, b) = sums[a][b];
      }
    }
    if (!(block.pieces_end - 1)->ends) return;
    const int64_t row = o * kRows + top, column = i * kWidth;
    const auto each = [&](const auto& f) {
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a)
#pragma GCC unroll 4
        for (int b = 0; b < cells * kColumns; ++b)
          if (row + a < height_) f(row + a, column + b * kLanes<V>, sums[a][b]);
    };
    bool whole = row + K <= height_ && !buffers_.place;
    for (int b = 0; b < cells * kColumns; ++b) whole &= valid_[column / kLanes<V> + b] == kLanes<V>;
    if (!whole) return each([&](int64_t row, int64_t column, V sum) { write(row, column, sum); });
#pragma GCC unroll 8
    for (int a = 0; a < K; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < cells * kColumns; ++b)
        store<V>(value_row(row + a) + in_ + column + b * kLanes<V>, sums[a][b], kLanes<V>);
  }

  // The same for a streaming statistic.
  template <class State, int K, int cells, class X>
  void stream_cells(const RowBlock& block, int64_t o, int64_t i, int top, const X& x) {
    constexpr int columns = cells * kColumns, n = K * columns;
    constexpr int state_registers = sizeof(State) / sizeof(V);
    const bool first = &block == plan_.blocks, last = &block + 1 == plan_.blocks_end;
    const auto place = [&](int a, int b) {
      return cell(o, i + b / kColumns) * kCell + (top + a) * kColumns + b % kColumns;
    };
    State* const kept = reinterpret_cast<State*>(kept_);
    const R* const g = panel_g(block, o) + top;
    if constexpr (n * (1 + state_registers) + columns + 1 <= kRegisters) {
      State states[n];  // in registers: never at an index unknown to the compiler
#pragma GCC unroll 16
      for (int c = 0; c < n; ++c) {
        if (first) states[c] = State{};
        else states[c] = kept[place(c / columns, c % columns)];
      }
      take_in<State, K, columns>(
          block, g, x, place,
          [&](int a, int b) __attribute__((always_inline)) -> State& {
            return states[a * columns + b];
          });
#pragma GCC unroll 16
      for (int c = 0; c < n; ++c) kept[place(c / columns, c % columns)] = states[c];
    } else {
      State* states[cells];
      for (int c = 0; c < cells; ++c) states[c] = kept + place(0, c * kColumns);
      const auto state = [&](int a, int b) __attribute__((always_inline)) -> State& {
        return states[b / kColumns][a * kColumns + b % kColumns];
      };
      if (first)
        for (int a = 0; a < K; ++a)
          for (int b = 0; b < columns; ++b) state(a, b) = State{};
      take_in<State, K, columns>(block, g, x, place, state);
    }
    if (!last) return;
    for (int a = 0; a < K; ++a)
      for (int b = 0; b < columns; ++b)
        finish(kept[place(a, b)], o * kRows + top + a, i * kWidth + b * kLanes<V>);
  }

  template <class State, int K, int columns, class X, class Place, class States>
  inline __attribute__((always_inline)) void take_in(const RowBlock& block, const R* g, const X& x,
                                                     const Place& place,
                                                     const States& state) const {
    for (const Piece* piece = block.pieces; piece != block.pieces_end; ++piece) {
      V p[K][columns];
      const int64_t first = piece->first / kTogether, rows = piece->last / kTogether - first;
      product<V, K, paired>(g + first * kRows, x.from(first), rows, p);
      if (!piece->begins) {
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < columns; ++b) p[a][b] += unfinished_[place(a, b)];
      }
      if (!piece->ends) {
#pragma GCC unroll 8
        for (int a = 0; a < K; ++a)
#pragma GCC unroll 4
          for (int b = 0; b < columns; ++b) unfinished_[place(a, b)] = p[a][b];
        continue;
      }
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a)
#pragma GCC unroll 4
        for (int b = 0; b < columns; ++b)
          absorb(state(a, b), p[a][b], piece->group + 1, problem_.parameters);
    }
  }

  template <class State>
  void finish(const State& state, int64_t row, int64_t column) {
    if constexpr (is_summary<State>) {
      for (int f = 0; f < State::fields; ++f) write(row, column, state.field(f), f);
    } else {
      const Outcome<V> outcome = state.finalize(problem_.statistic, problem_.parameters);
      write(row, column, outcome.value);
      if (has_mask(problem_.statistic) && row < height_)
        mask_sum_.add(outcome.mask, valid_[column / kLanes<V>]);
    }
  }

  // Stores what is found for a register of coordinates of the tile, as far as there are such.
  void write(int64_t row, int64_t column, V value, int field = 0) const {
    if (row >= height_) return;
    R* const to = buffers_.place ? staged_row(row, field) : value_row(row, field) + in_;
    store<V>(to + column, value, valid_[column / kLanes<V>]);
  }

  R* value_row(int64_t row, int field = 0) const {
    return static_cast<R*>(buffers_.values.at[field]) + part_ * buffers_.value_part +
           (out_ + row) * buffers_.value_stride;
  }
  R* staged_row(int64_t row, int field) const {
    return staged_ + field * area() + row * plan_.tile_in;
  }

  // Puts the tile's values in their places, a row at a time, so that every line of memory is
  // touched once.
  void scatter(int field) const {
    const int64_t* const place = buffers_.place + in_;
    const int64_t whole = buffers_.taps * buffers_.tap_channels;
    const bool tap_by_tap = buffers_.taps > 0 && plan_.tile_in == whole;
    for (int64_t row = 0; row < height_; ++row) {
      R* const to = value_row(row, field);
      const R* const from = staged_row(row, field);
      if (tap_by_tap) {
        channel_by_channel(from, to + place[0]);
      } else {
        for (int64_t i = 0; i < width_; ++i)
          if (place[i] >= 0) to[place[i]] = from[i];
      }
    }
  }

  // to (channels, taps) = from (taps, channels), four by four.
  void channel_by_channel(const R* from, R* to) const {
    using Four = typename RegisterOf<R, 4 * sizeof(R)>::type;
    const int64_t taps = buffers_.taps, channels = width_ / taps;
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4, to += 4 * taps) {
      int64_t t = 0;
      for (; t + 4 <= taps; t += 4) {
        Four square[4];
        for (int i = 0; i < 4; ++i) memcpy(&square[i], from + (t + i) * channels + c, sizeof(Four));
        transpose(square);
        for (int i = 0; i < 4; ++i) memcpy(to + i * taps + t, &square[i], sizeof(Four));
      }
      for (; t < taps; ++t)
        for (int i = 0; i < 4; ++i) to[i * taps + t] = from[t * channels + c + i];
    }
    for (; c < channels; ++c, to += taps)
      for (int64_t t = 0; t < taps; ++t) to[t] = from[t * channels + c];
  }

  // Some cells side by side, of an order statistic.
  template <int cells, class X>
  void rank_cells(const RowBlock& block, int64_t o, int64_t i, const X& x) {
    const int64_t groups = problem_.parameters.groups;
    V* values[cells];
    for (int c = 0; c < cells; ++c) values[c] = kept_ + cell(o, i + c) * kCell * groups;
    for (int top = 0; top < kRows; top += kSomeRows)
      collect<kSomeRows, cells>(block, panel_g(block, o) + top, x, top, values);
    if (&block + 1 != plan_.blocks_end) return;
    for (int c = 0; c < cells; ++c)
      for (int at = 0; at < kCell; at += kRanked) {
        V result[kRanked];
        order_statistics<V, kRanked>(problem_.ranking, values[c] + at * groups, kRanked,
                                     select_scratch_, result);
        for (int j = 0; j < kRanked; ++j) {
          const int n = at + j;
          write(o * kRows + n / kColumns, (i + c) * kWidth + n % kColumns * kLanes<V>,
                result[j] * R(groups));
        }
      }
  }

  template <int K, int cells, class X>
  void collect(const RowBlock& block, const R* g, const X& x, int top,
               V* const (&values)[cells]) const {
    constexpr int columns = cells * kColumns;
    const int64_t groups = problem_.parameters.groups;
    for (const Piece* piece = block.pieces; piece != block.pieces_end; ++piece) {
      V p[K][columns];
      const int64_t first = piece->first / kTogether, rows = piece->last / kTogether - first;
      product<V, K, paired>(g + first * kRows, x.from(first), rows, p);
#pragma GCC unroll 8
      for (int a = 0; a < K; ++a)
#pragma GCC unroll 4
        for (int b = 0; b < columns; ++b) {
          const int n = (top + a) * kColumns + b % kColumns;
          V& value = values[b / kColumns][n / kRanked * kRanked * groups + piece->group * kRanked +
                                          n % kRanked];
          value = piece->begins ? p[a][b] : value + p[a][b];
        }
    }
  }
};

// Calls f(V{}, paired) for the registers and the packing that tiles of the problem take.
template <class F>
void with_tile(const TileProblem& problem, const TilePlan& plan, const F& f) {
#if defined(__AVX512BF16__)
  if (plan.paired) return f(Register<float>{}, std::true_type{});
#endif
  if (problem.dtype == Dtype::float64) return f(Register<double>{}, std::false_type{});
  f(Register<float>{}, std::false_type{});
}

}  // namespace

namespace {

// Calls f with a tile that is the whole of a problem, and rows of it.
template <class F>
void with_rows(const TileProblem& problem, const TilePlan& plan, int64_t first, int64_t last,
               const F& f) {
  TilePlan whole = plan;
  whole.tile_out = round_up(problem.out, kTileOutStep);
  whole.tile_in = round_up(problem.in, kTileInStep);
  with_tile(problem, plan, [&](auto lane, auto paired) {
    Tile<decltype(lane), paired()> tile(problem, whole, TileBuffers{}, 0);
    f(tile, RowBlock{first, last, nullptr, nullptr});
  });
}

}  // namespace

void pack_x_kernel(const TileProblem& problem, const TilePlan& plan, int64_t first, int64_t last) {
  with_rows(problem, plan, first, last, [](auto& tile, const RowBlock& rows) {
    tile.pack_matrix_x(rows);
  });
}

void pack_grad_kernel(const TileProblem& problem, const TilePlan& plan, int64_t first,
                      int64_t last) {
  with_rows(problem, plan, first, last, [](auto& tile, const RowBlock& rows) {
    tile.pack_matrix_g(rows);
  });
}

void tile_kernel(const TileProblem& problem, const TilePlan& plan, const TileBuffers& buffers,
                 int64_t first, int64_t last) {
  with_tile(problem, plan, [&](auto lane, auto paired) {
    for (int64_t tile = first; tile < last; ++tile)
      Tile<decltype(lane), paired()>(problem, plan, buffers, tile).run(tile);
  });
}

uint16_t least_magnitude(const void* values, int64_t n) {
#if defined(__AVX512BF16__)
  const uint16_t* const bits = static_cast<const uint16_t*>(values);
  uint16_t least = 0xffff;  // less 1, so that zeros come last
  for (int64_t i = 0; i < n; ++i) {
    const uint16_t magnitude = uint16_t((bits[i] & 0x7fff) - 1);
    least = magnitude < least ? magnitude : least;
  }
  return least == 0xffff ? 0x7fff : uint16_t(least + 1);
#else
  return 0;
#endif
}

}  // namespace htv::HTV_ISA
