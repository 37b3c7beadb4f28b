// The maths of every rule, shared by host and device code.
//
// `V` is what a kernel holds per coordinate: a scalar on a GPU thread, a SIMD register of
// coordinates on a CPU. `Lane<V>` says how to do on either what operators cannot. A streaming
// statistic is a small state with
//
//     update(v, nth)        take in the nth (1-based) group's contribution
//     merge(other, n, m)    join the states of n groups here and m others there
//     finalize(parameters)  the value, without the factor E, and the mask if there is one (`masks`)
//
// An order statistic is a function of the ranked values of a coordinate.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define HTV_HOST_DEVICE __host__ __device__ __forceinline__
#define HTV_INLINE HTV_HOST_DEVICE
#else
#define HTV_HOST_DEVICE inline
#define HTV_INLINE inline __attribute__((always_inline))
#endif

// Code compiled once per instruction set lives in a namespace of that name, so that the linker
// never merges them.
#if !defined(HTV_ISA)
#define HTV_ISA generic
#endif

namespace htv {

// Every statistic: its name, its number, its kind and whether it has a mask. From this table come
// the enumeration, what is known of its values and what the library exports (`htv_statistics` in
// library.cpp). Python speaks in these numbers, so one that is given stays; a new statistic takes a
// new one, in any row.
// clang-format off
#define HTV_STATISTICS(use)                \
  use(mean, 0, streaming, false)           \
  use(and_mask, 1, streaming, true)        \
  use(xor_mask, 2, streaming, true)        \
  use(geometric_mean, 3, streaming, true)  \
  use(sand_mask, 4, streaming, true)       \
  use(sign_sum, 5, streaming, false)       \
  use(sign_agreement, 6, streaming, false) \
  use(median, 7, order, false)             \
  use(trimmed_mean, 8, order, false)       \
  use(winsorized_mean, 9, order, false)    \
  use(median_of_means, 10, order, false)
// clang-format on

// Streaming ones take one pass over the contributions and little state; order statistics rank them.
enum class StatisticKind { streaming, order };

enum class Statistic {
#define HTV_USE(name, number, kind, masks) name = number,
  HTV_STATISTICS(HTV_USE)
#undef HTV_USE
};

// Whether a number is a statistic's.
constexpr bool is_statistic(int64_t number) {
  switch (number) {
#define HTV_USE(name, number, kind, masks) \
  case number: return true;
    HTV_STATISTICS(HTV_USE)
#undef HTV_USE
    default: return false;
  }
}

constexpr bool is_order(Statistic statistic) {
#define HTV_USE(name, number, kind, masks) \
  || (StatisticKind::kind == StatisticKind::order && statistic == Statistic::name)
  return false HTV_STATISTICS(HTV_USE);
#undef HTV_USE
}

constexpr bool has_mask(Statistic statistic) {
#define HTV_USE(name, number, kind, masks) || (masks && statistic == Statistic::name)
  return false HTV_STATISTICS(HTV_USE);
#undef HTV_USE
}

// What is kept of contributions beside their sum and votes: the sum of squared deviations from the
// mean, or of logarithms of magnitudes.
constexpr bool keeps_spread(Statistic statistic) { return statistic == Statistic::sand_mask; }
constexpr bool keeps_logs(Statistic statistic) { return statistic == Statistic::geometric_mean; }

// Whether it is a mean of the ranked values whose tails are cut or replaced.
constexpr bool is_ranked_mean(Statistic statistic) {
  return statistic == Statistic::trimmed_mean || statistic == Statistic::winsorized_mean;
}

struct Parameters {
  int64_t groups;  // E
  int64_t count;
  double votes;
  double k;
  double log_offset = 0;  // of summaries: added to magnitudes before their logarithm is taken
};

namespace HTV_ISA {

// The soft mask where variance and excess agreement are both 0.
constexpr double kSandUndefined = 1e-17;
constexpr double kLogOffset = 1e-10;  // keeps the logarithm of the geometric mean finite

template <class V>
struct Lane;

template <class T, class I, int mantissa_bits, I exponent_bias>
struct ScalarLane {
  using Real = T;
  using Int = I;
  using Count = I;
  using Mask = bool;
  static constexpr int kMantissaBits = mantissa_bits;
  static constexpr I kExponentBias = exponent_bias;

  HTV_HOST_DEVICE static Mask none() { return false; }
  HTV_HOST_DEVICE static Count sign(T v) { return I(v > 0) - I(v < 0); }
  HTV_HOST_DEVICE static T real(Count c) { return T(c); }
  template <class F>
  HTV_HOST_DEVICE static T map(F f, T v) {
    return f(v);
  }
  HTV_HOST_DEVICE static I bits(T v) {
    I bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    return bits;
  }
  HTV_HOST_DEVICE static T from_bits(I bits) {
    T v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
  }
};

template <>
struct Lane<float> : ScalarLane<float, int32_t, 23, 127> {};
template <>
struct Lane<double> : ScalarLane<double, int64_t, 52, 1023> {};

template <class V>
using Real = typename Lane<V>::Real;
template <class V>
using Count = typename Lane<V>::Count;
template <class V>
using Mask = typename Lane<V>::Mask;

template <class V>
HTV_HOST_DEVICE V splat(Real<V> value) {
  return value - V{};  // 0 + value would be an addition to compilers, for it changes -0
}

template <class V>
HTV_HOST_DEVICE V absolute(V v) {
  return v < 0 ? -v : v;
}

template <class V>
HTV_HOST_DEVICE V smaller(V a, V b) {
  return a < b ? a : b;
}

template <class V>
HTV_HOST_DEVICE V larger(V a, V b) {
  return a > b ? a : b;
}

template <class V>
struct Outcome {
  V value;
  V mask;
};

// ---- streaming statistics ----

template <class V>
struct Mean {
  static constexpr bool masks = false;
  V sum{};

  HTV_HOST_DEVICE void update(V v, int64_t) { sum += v; }
  HTV_HOST_DEVICE void merge(const Mean& other, int64_t, int64_t) { sum += other.sum; }
  HTV_HOST_DEVICE V mean(const Parameters& p) const { return sum / Real<V>(p.groups); }
  HTV_HOST_DEVICE Outcome<V> finalize(const Parameters& p) const { return {mean(p), V{}}; }
};

// Net votes for a positive sign. A NaN is remembered apart: no mask may hide it.
template <class V>
struct Votes {
  Count<V> net{};
  Mask<V> nan = Lane<V>::none();

  HTV_HOST_DEVICE void update(V v, int64_t) {
    net += Lane<V>::sign(v);
    nan |= v != v;
  }
  HTV_HOST_DEVICE void merge(const Votes& other, int64_t, int64_t) {
    net += other.net;
    nan |= other.nan;
  }
  HTV_HOST_DEVICE Count<V> size() const { return absolute(net); }
  HTV_HOST_DEVICE Mask<V> reach(int64_t count) const {
    return size() >= typename Lane<V>::Int(count);
  }
  HTV_HOST_DEVICE Outcome<V> poison(V value, V mask) const {
    return {nan ? splat<V>(Real<V>(NAN)) : value, nan ? V{} : mask};
  }
};

template <class V>
struct SignSum : Votes<V> {
  static constexpr bool masks = false;
  HTV_HOST_DEVICE Outcome<V> finalize(const Parameters& p) const {
    return this->poison(Lane<V>::real(this->net) / Real<V>(p.groups), V{});
  }
};

template <class V>
struct SignAgreement : Votes<V> {
  static constexpr bool masks = false;
  HTV_HOST_DEVICE Outcome<V> finalize(const Parameters& p) const {
    return this->poison(Lane<V>::real(this->size()) / Real<V>(p.groups), V{});
  }
};

// AND: keep the mean where the votes reach the threshold. XOR: where they do not.
template <class V, bool keep_agreement>
struct Masked {
  static constexpr bool masks = true;
  Mean<V> total;
  Votes<V> votes;

  HTV_HOST_DEVICE void update(V v, int64_t nth) {
    total.update(v, nth);
    votes.update(v, nth);
  }
  HTV_HOST_DEVICE void merge(const Masked& other, int64_t n, int64_t m) {
    total.merge(other.total, n, m);
    votes.merge(other.votes, n, m);
  }
  HTV_HOST_DEVICE Outcome<V> finalize(const Parameters& p) const {
    const Mask<V> agreed = votes.reach(p.count);
    const V one = splat<V>(1), mean = total.mean(p);
    if constexpr (keep_agreement) return votes.poison(agreed ? mean : V{}, agreed ? one : V{});
    return votes.poison(agreed ? V{} : mean, agreed ? V{} : one);
  }
};
template <class V>
using AndMask = Masked<V, true>;
template <class V>
using XorMask = Masked<V, false>;

// The product of positive values, as mantissa * 2^exponent: one logarithm per coordinate instead of
// one per value.
template <class V>
struct Product {
  V mantissa = splat<V>(1);
  Count<V> exponent{};

  HTV_HOST_DEVICE void update(V v) {
    multiply(v);
    normalise();
  }
  HTV_HOST_DEVICE void merge(const Product& other) {
    exponent += other.exponent;
    mantissa *= other.mantissa;
    normalise();
  }
  HTV_HOST_DEVICE V binary_logarithm() const {
    return Lane<V>::map([](Real<V> x) { return log2(x); }, mantissa) + Lane<V>::real(exponent);
  }
  HTV_HOST_DEVICE V root(int64_t n) const {
    using R = Real<V>;
    return Lane<V>::map([](R x) { return exp2(x); }, binary_logarithm() / R(n));
  }

 private:
  HTV_HOST_DEVICE void multiply(V v) {
    using L = Lane<V>;
    using Int = typename L::Int;
    constexpr Int one = Int(L::kExponentBias) << L::kMantissaBits,
                  field = (Int(1) << L::kMantissaBits) - 1;
    const auto finite =
        v <= Real<V>(sizeof(Int) == 4 ? 3.4028234663852886e38 : 1.7976931348623157e308);
    const Count<V> bits = L::bits(v);
    exponent += finite ? (bits >> L::kMantissaBits) - L::kExponentBias : Count<V>{};
    mantissa *= finite ? L::from_bits((bits & field) | one) : v;  // inf and NaN go through
  }
  HTV_HOST_DEVICE void normalise() {
    const V product = mantissa;
    mantissa = splat<V>(1);
    multiply(product);
  }
};

template <class V>
struct GeometricMean {
  static constexpr bool masks = true;
  AndMask<V> kept;
  Product<V> product;

  HTV_HOST_DEVICE void update(V v, int64_t nth) {
    kept.update(v, nth);
    product.update(absolute(v) + Real<V>(kLogOffset));
  }
  HTV_HOST_DEVICE void merge(const GeometricMean& other, int64_t n, int64_t m) {
    kept.merge(other.kept, n, m);
    product.merge(other.product);
  }
  HTV_HOST_DEVICE Outcome<V> finalize(const Parameters& p) const {
    const V sum = kept.total.sum;
    const V sign = sum != sum ? sum : Lane<V>::real(Lane<V>::sign(sum));
    const Mask<V> agreed = kept.votes.reach(p.count);
    return kept.votes.poison(agreed ? sign * product.root(p.groups) : V{},
                             agreed ? splat<V>(1) : V{});
  }
};

// Sum of squared deviations from the running mean (Welford), merged exactly (Chan, Golub, LeVeque).
template <class V>
struct Spread {
  V centre{}, squares{};

  HTV_HOST_DEVICE void update(V v, int64_t nth) {
    const V step = v - centre;
    centre += step / Real<V>(nth);
    squares += step * (v - centre);
  }
  HTV_HOST_DEVICE void merge(const Spread& other, int64_t n, int64_t m) {
    const V step = other.centre - centre;
    const Real<V> share = Real<V>(m) / Real<V>(n + m);
    centre += step * share;
    squares += other.squares + step * (step * (Real<V>(n) * share));
  }
};

template <class V>
struct SandMask {
  static constexpr bool masks = true;
  Mean<V> total;
  Votes<V> votes;
  Spread<V> spread;

  HTV_HOST_DEVICE void update(V v, int64_t nth) {
    total.update(v, nth);
    votes.update(v, nth);
    spread.update(v, nth);
  }
  HTV_HOST_DEVICE void merge(const SandMask& other, int64_t n, int64_t m) {
    total.merge(other.total, n, m);
    votes.merge(other.votes, n, m);
    spread.merge(other.spread, n, m);
  }
  HTV_HOST_DEVICE Outcome<V> finalize(const Parameters& p) const {
    using R = Real<V>;
    const R groups = R(p.groups);
    const V excess = (Lane<V>::real(votes.size()) - R(p.votes)) / groups;
    const V variance = spread.squares / (groups - 1);
    const V soft = Lane<V>::map([](R x) { return tanh(x); }, R(1) / variance * R(p.k) * excess);
    const V mask = soft != soft ? splat<V>(R(kSandUndefined)) : larger(soft, V{});
    const V value = mask > 0 ? mask * total.mean(p) : V{};
    const auto lost = variance != variance;  // by inf - inf
    return votes.poison(lost ? variance : value, lost ? V{} : mask);
  }
};

// ---- order statistics: `ranked(r)` is the value of rank r, counted from 0 ----

// (a + b) / 2 that neither overflows nor rounds when both are equal
template <class V>
HTV_HOST_DEVICE V midpoint(V a, V b) {
  const Real<V> half = 0.5;
  return a == b ? a : half * a + half * b;
}

// Of the median of contributions or of buckets' means: 0 the midpoint, less than 0 the lower
// middle, else the higher.
HTV_HOST_DEVICE int64_t interpolation_of(Statistic statistic, const Parameters& p) {
  return statistic == Statistic::median ? p.count : 0;
}

template <class V, class Ranked>
HTV_HOST_DEVICE V median(const Ranked& ranked, int64_t n, int64_t interpolation) {
  const V lower = ranked((n - 1) / 2), higher = ranked(n / 2);
  return interpolation == 0 ? midpoint(lower, higher) : interpolation < 0 ? lower : higher;
}

// Ranks count to n - 1 - count, summed from both ends inwards: opposite tails cancel before they
// can round.
template <class V, class Ranked>
HTV_HOST_DEVICE V inner_sum(const Ranked& ranked, int64_t n, int64_t count) {
  V sum{};
  int64_t low = count, high = n - 1 - count;
  for (; low < high; ++low, --high) sum += ranked(low) + ranked(high);
  return low == high ? sum + ranked(low) : sum;
}

template <class V>
HTV_HOST_DEVICE V trimmed_mean(V inner, int64_t n, int64_t count) {
  return inner / Real<V>(n - 2 * count);
}

// low and high: the values of ranks count and n - 1 - count
template <class V>
HTV_HOST_DEVICE V winsorized_mean(V inner, V low, V high, int64_t n, int64_t count) {
  return (count > 0 ? inner + Real<V>(count) * (low + high) : inner) / Real<V>(n);
}

template <class V, class Ranked>
HTV_HOST_DEVICE V order_statistic(Statistic statistic, const Ranked& ranked, const Parameters& p) {
  const int64_t n = p.groups, count = p.count;
  switch (statistic) {
    case Statistic::trimmed_mean: return trimmed_mean(inner_sum<V>(ranked, n, count), n, count);
    case Statistic::winsorized_mean:
      return winsorized_mean<V>(inner_sum<V>(ranked, n, count), ranked(count),
                                ranked(n - 1 - count), n, count);
    case Statistic::median_of_means: return median<V>(ranked, count, 0);
    default: return median<V>(ranked, n, count);
  }
}

// Calls f(State<V>{}) with the streaming statistic named at run time; false if it is an order
// statistic.
template <class V, class F>
HTV_HOST_DEVICE bool with_streaming(Statistic statistic, const F& f) {
  switch (statistic) {
    case Statistic::mean: return f(Mean<V>{}), true;
    case Statistic::and_mask: return f(AndMask<V>{}), true;
    case Statistic::xor_mask: return f(XorMask<V>{}), true;
    case Statistic::geometric_mean: return f(GeometricMean<V>{}), true;
    case Statistic::sand_mask: return f(SandMask<V>{}), true;
    case Statistic::sign_sum: return f(SignSum<V>{}), true;
    case Statistic::sign_agreement: return f(SignAgreement<V>{}), true;
    default: return false;
  }
}

}  // namespace HTV_ISA
}  // namespace htv
