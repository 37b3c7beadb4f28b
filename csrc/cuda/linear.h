// The linear op's work where no group has more than one row, as its kernels see it.
#pragma once

#include "../dtype.h"
#include "../statistic.h"
#include "device.h"

namespace htv::cuda {

// ---- signs of a matrix, transposed and padded, as bytes that tensor cores multiply ----

// Columns are padded to a multiple, as the tile of coordinates of a block is so wide.
constexpr int kSignTile = 128;
constexpr int kSignDepth = 128;  // rows, too: as many are multiplied between two barriers

constexpr int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

enum ColumnFlags : uint32_t { kHasNan = 1, kHasInfinity = 2, kHasZero = 4 };

template <class V>
struct Column {
  V least;  // the least magnitude but 0, or infinity
  uint32_t flags;
};

// What the columns alone tell of the products of their elements.
template <class V>
struct Products {
  bool nan;       // one of them is NaN
  bool doubtful;  // one may be: infinity times 0; or one may vanish though neither factor is 0

  HTV_HOST_DEVICE Products(const Column<V>& a, const Column<V>& b)
      : nan(((a.flags | b.flags) & kHasNan) != 0),
        doubtful(((a.flags & kHasInfinity) && (b.flags & kHasZero)) ||
                 ((a.flags & kHasZero) && (b.flags & kHasInfinity)) || a.least * b.least == 0) {}
};

struct SignMatrix {
  int8_t* signs;  // [padded column][padded row]; 0 for NaN and padding
  void* columns;  // Column<V> of each padded column
  int64_t width, depth;

  HTV_HOST_DEVICE int64_t tiles() const { return width / kSignTile; }
};

// In `value`, where an order statistic is not known to be 0 and not known yet.
constexpr int kOpen = 1;

struct LinearTask {
  const void* x;            // (rows, in)
  const void* grad_output;  // (rows, out)
  int64_t rows, in, out;
  Statistic statistic;
  Parameters parameters;
  SignMatrix of_x, of_g;
  void* value;        // (out, in)
  double* mask_sums;  // one per tile

  int64_t coordinates() const { return in * out; }
  int64_t tiles() const { return of_x.tiles() * of_g.tiles(); }
};

template <class T>
void pack_signs(const void* matrix, int64_t rows, int64_t columns, const SignMatrix& to,
                cudaStream_t stream);
// Writes E times the statistic: a mask of the sum of contributions, which `value` holds before, or
// the sum of signs.
template <class T>
void apply_votes(const LinearTask& task, cudaStream_t stream);
// Order statistics. Nothing for 16-bit types, whose factors are converted first.
template <class T>
void rank_products(const LinearTask& task, cudaStream_t stream);

}  // namespace htv::cuda
