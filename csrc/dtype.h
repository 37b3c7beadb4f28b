// Element types as kernels see them, without a torch header.
#pragma once

#include <stdint.h>

namespace htv {

enum class Dtype { float64, float32, bfloat16, float16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
constexpr bool is_bfloat16 = false;
template <>
inline constexpr bool is_bfloat16<BFloat16> = true;

// Half-precision values are computed with in float.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

inline int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 8;
    case Dtype::float32: return 4;
    default: return 2;
  }
}

inline Dtype compute_dtype(Dtype dtype) { return dtype == Dtype::float64 ? dtype : Dtype::float32; }

inline int64_t compute_bytes(Dtype dtype) { return bytes_of(compute_dtype(dtype)); }

// Calls f(T{}) with the element type named at run time.
template <class F>
void with_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::float64: return f(double{});
    case Dtype::float32: return f(float{});
    case Dtype::bfloat16: return f(BFloat16{});
    case Dtype::float16: return f(Float16{});
  }
}

}  // namespace htv
