// Order statistics of registers of coordinates, whose values lie in L1 or L2: compiled once per
// instruction set.
//
// Few values are sorted by a network in registers. Of more, ranks are found in a few sorted runs,
// and means trimmed by a small `count` keep the count + 1 smallest and largest while values stream
// by. From some number on any rank is found bit by bit: the order-preserving integer keys of 32
// (64) values are transposed, so that plane b holds bit b of all of them as one integer per
// coordinate, and population counts of the planes tell which values remain candidates.
#include "select.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "sort_registers.h"

namespace htv::HTV_ISA {
namespace {

// ---- where each way of selecting ends ----

constexpr int kMostRuns = kMostInMemory;  // values in sorted runs: two, or from half on four
constexpr int kMostExtremes = 16;  // trimmed and winsorized means by keeping extremes: count + 1
constexpr int kFewExtremes = 2;    // up to which that beats two runs,
constexpr int kManyExtremes = 8;   // and four

// A coordinate's values may be fewer than are ranked: the others are 0.
template <class Values>
struct Sample {
  static constexpr bool may_be_nan = Values::may_be_nan;

  Values values;
  int64_t given, zeros;
};

// The value of rank r of two sorted lists.
template <class W>
W rank_of_two(const W* a, int64_t size_a, const W* b, int64_t size_b, int64_t r) {
  // max(a[i - 1], b[r - i]) where i of the r + 1 smallest are a's, with lists bounded by what
  // changes nothing
  const int64_t first = r + 1 > size_b ? r + 1 - size_b : 0, last = r + 1 < size_a ? r + 1 : size_a;
  const auto at = [&](int64_t i) {
    return i == 0 ? b[r] : i == r + 1 ? a[r] : larger(a[i - 1], b[r - i]);
  };
  W best = at(first);
  for (int64_t i = first + 1; i <= last; ++i) best = smaller(best, at(i));
  return best;
}

// The values of ranks n - 1 and n of two sorted lists of n.
template <class W>
void middle_of_two(const W* a, const W* b, int64_t n, W& low, W& high) {
  low = smaller(a[0], b[n - 1]);
  high = larger(a[0], b[n - 1]);
  for (int64_t i = 1; i < n; ++i) {
    const W x = a[i], y = b[n - 1 - i];
    low = larger(low, smaller(x, y));
    high = smaller(high, larger(x, y));
  }
}

// The first `present` values and `padding` in place of those missing to n.
template <class V, int n>
Strided<V> padded(const Strided<V>& values, int64_t present, V padding, V* buffer) {
  if (present >= n) return values;
  for (int64_t k = 0; k < n; ++k) buffer[k] = k < present ? values(k) : padding;
  return {buffer, 1};
}

template <class V, int n>
__attribute__((noinline)) void sort_run(const Strided<V>& values, int64_t present, NanSeen<V>& nan,
                                        typename Order<V>::Key* sorted, int64_t stride) {
  V buffer[n];
  typename Order<V>::Key v[n];
  NanSeen<V> seen = nan;
  sorted_keys<V, n>(padded<V, n>(values, present, splat<V>(Real<V>(INFINITY)), buffer), seen, v);
  nan = seen;
#pragma GCC unroll 16
  for (int k = 0; k < n; ++k) sorted[k * stride] = v[k];
}

template <int n, class W>
__attribute__((noinline)) void merge_runs(W* interleaved) {
  W v[n];
#pragma GCC unroll 32
  for (int k = 0; k < n; ++k) v[k] = interleaved[k];
  merge_interleaved(v);
#pragma GCC unroll 32
  for (int k = 0; k < n; ++k) interleaved[k] = v[k];
}

// ---- trimmed and winsorized means ----

template <class V>
struct Ends {
  V low, high;
};

// The sum of term(k) over 0 <= k < n, by sums of short stretches: one long sum would round more.
template <class V, class Term>
HTV_INLINE V sum_of(int64_t n, const Term& term) {
  constexpr int64_t ways = 4, stretch = 8 * ways;
  V total{};
  for (int64_t begin = 0; begin < n; begin += stretch) {
    const int64_t end = begin + stretch < n ? begin + stretch : n;
    V sums[ways] = {};
    int64_t k = begin;
    for (; k + ways <= end; k += ways)
#pragma GCC unroll 4
      for (int64_t w = 0; w < ways; ++w) sums[w] += term(k + w);
    for (; k < end; ++k) sums[0] += term(k);
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return total;
}

// All values, those beyond the ends replaced by them.
template <class V, class Values>
V clamped_mean(const Sample<Values>& sample, const Ranking& ranking, Ends<V> ends) {
  const auto clamped = [&](V v) { return smaller(larger(v, ends.low), ends.high); };
  V sum = sum_of<V>(sample.given, [&](int64_t k) { return clamped(sample.values(k)); });
  if (sample.zeros > 0) sum += Real<V>(sample.zeros) * clamped(V{});
  return sum / Real<V>(ranking.ranked);
}

// What lies strictly between the ends, and the copies of them that were not trimmed.
template <class V, class Values>
V inner_mean(const Sample<Values>& sample, const Ranking& ranking, Ends<V> ends) {
  using Int = typename Lane<V>::Int;
  const Int zeros = Int(sample.zeros);
  Count<V> below = (0 <= ends.low) & zeros, above = (0 >= ends.high) & zeros;  // or equal
  const V sum = sum_of<V>(sample.given, [&](int64_t k) {
    const V v = sample.values(k);
    const Mask<V> is_below = v <= ends.low, is_above = v >= ends.high;
    below -= is_below;
    above -= is_above;
    return is_below | is_above ? V{} : v;
  });
  const Int trimmed = Int(ranking.parameters.count);
  const Count<V> lows = below - trimmed, highs = above - trimmed;
  const V low = lows > 0 ? Lane<V>::real(lows) * ends.low : V{};  // an end may be infinite
  const V high = highs > 0 ? Lane<V>::real(highs) * ends.high : V{};
  const V mean = (sum + (low + high)) / Real<V>(ranking.ranked - 2 * ranking.parameters.count);
  return ends.low == ends.high ? ends.low : mean;
}

template <class V, class Values>
V mean_between(const Sample<Values>& sample, const Ranking& ranking, Ends<V> ends) {
  return ranking.statistic == Statistic::trimmed_mean ? inner_mean<V>(sample, ranking, ends)
                                                      : clamped_mean<V>(sample, ranking, ends);
}

// Of n values in two lists of `run` (n is 2 * run or one less), or in four (4 * run or up to 3
// less), merged to two.
template <class V, int run>
V statistic_of_runs(const Strided<V>& values, const Ranking& ranking, bool four) {
  using O = Order<V>;
  using Key = typename O::Key;
  const int parts = four ? 2 : 1, size = parts * run;
  NanSeen<V> nan;
  Key lists[2][2 * run];
  for (int part = 0; part < 2 * parts; ++part)
    sort_run<V, run>(values.from(part * run), ranking.ranked - part * run, nan,
                     lists[part / parts] + part % parts, parts);
  if (four)
    for (Key* list : lists) merge_runs<2 * run>(list);
  Key low, high;
  if (ranking.high == size && ranking.low == size - 1) {
    middle_of_two(lists[0], lists[1], size, low, high);
  } else {
    low = high = rank_of_two(lists[0], size, lists[1], size, ranking.low);
    if (ranking.high != ranking.low)
      high = rank_of_two(lists[0], size, lists[1], size, ranking.high);
  }
  const Ends<V> ends = {O::value(low), O::value(high)};
  if (is_ranked_mean(ranking.statistic)) {
    const Sample<Strided<V>> sample{values, ranking.ranked, 0};
    return nan.poison(mean_between<V>(sample, ranking, ends));
  }
  return nan.poison(ranking.low == ranking.high ? ends.low : midpoint(ends.low, ends.high));
}

// The smallest and the largest `kept` of more values.
template <class V, int kept>
class Extremes {
  using O = Order<V>;
  using Key = typename O::Key;

  Key low_[kept], high_[kept];  // falling, and rising: what leaves first comes first

 public:
  // Of values of which so many are 0.
  HTV_INLINE explicit Extremes(int64_t zeros) {
    const Key infinite = O::key(splat<V>(Real<V>(INFINITY)));
    const Key minus_infinite = O::key(-splat<V>(Real<V>(INFINITY))), zero = O::key(V{});
    for (int i = 0; i < kept; ++i) {
      const bool is_zero = kept - 1 - i < zeros;
      low_[i] = is_zero ? zero : infinite;
      high_[i] = is_zero ? zero : minus_infinite;
    }
  }

  // Each takes n sorted values in.
  template <int n>
  HTV_INLINE void lower(const Key (&sorted)[n]) {
#pragma GCC unroll 16
    for (int i = 0; i < least(kept, n); ++i) low_[i] = smaller(low_[i], sorted[i]);
    sort_bitonic<false, kept>(low_);
  }
  template <int n>
  HTV_INLINE void raise(const Key (&sorted)[n]) {
#pragma GCC unroll 16
    for (int i = 0; i < least(kept, n); ++i) high_[i] = larger(high_[i], sorted[n - 1 - i]);
    sort_bitonic<true, kept>(high_);
  }

  Ends<V> beyond(int64_t count) const {
    Key low[kept], high[kept];
    memcpy(low, low_, sizeof low);
    memcpy(high, high_, sizeof high);
    return {O::value(low[kept - 1 - count]), O::value(high[kept - 1 - count])};
  }
};

// The mean between the ends where both are among the `kept` smallest and largest.
template <class V, int kept, class Values>
__attribute__((noinline)) V mean_by_extremes(const Sample<Values>& sample, const Ranking& ranking) {
  constexpr int block = kept > 4 ? 16 : 8;
  typename Order<V>::Key sorted[block];
  NanSeen<V> nan;
  Extremes<V, kept> extremes(sample.zeros);
  const Values& values = sample.values;
  int64_t k = 0;
  for (; k + block <= sample.given; k += block) {
    sorted_keys<V, block>(values.from(k), nan, sorted);
    extremes.lower(sorted);
    extremes.raise(sorted);
  }
  if (k < sample.given) {
    V last[block];
    const auto padded_by = [&](V padding) {
      for (int64_t i = 0; i < block; ++i) last[i] = k + i < sample.given ? values(k + i) : padding;
      sorted_keys<V, block>(Strided<V>{last, 1}, nan, sorted);
    };
    padded_by(splat<V>(Real<V>(INFINITY)));
    extremes.lower(sorted);
    padded_by(-splat<V>(Real<V>(INFINITY)));
    extremes.raise(sorted);
  }
  const Ends<V> ends = extremes.beyond(ranking.parameters.count);
  return nan.poison(mean_between<V>(sample, ranking, ends));
}

// ---- any rank of many values: bit by bit, from the top ----

// bits a where the mask is set, else b
template <class B>
HTV_INLINE B choose(B a, B b, B mask) {
  return b ^ ((a ^ b) & mask);
}

// Steps of transposing bits: registers d apart exchange the bits j apart, for d = count / 2, ..., 1
// and j = top, ...
template <int count, class B, class Word>
HTV_INLINE void exchange_bits(B (&x)[count], Word top) {
  Word j = top;
#pragma GCC unroll 8
  for (int d = count / 2; d > 0; d /= 2, j /= 2) {
    const B lower_half = B{} + Word(~Word(0)) / Word((Word(1) << j) + 1);
#pragma GCC unroll 64
    for (int r = 0; r < count; ++r)
      if ((r & d) == 0) {
        const B a = x[r], b = x[r + d];
        x[r] = choose(b >> j, a, lower_half);
        x[r + d] = choose(b, a << j, lower_half);
      }
  }
}

// The key as an unsigned integer of the same order; the least one for values that are not there.
template <class V, class Values>
HTV_INLINE Bits<V> ordered_bits(const Values& values, int64_t k, int64_t present, int64_t begin,
                                NanSeen<V>& nan) {
  if (k >= present) return Bits<V>{};
  const V v = values(begin + k);
  if constexpr (Values::may_be_nan) nan.add(v);
  return (Bits<V>)key_of(v) ^ std::make_unsigned_t<typename Lane<V>::Int>(~kMagnitude<V>);
}

// planes[w - 1 - b]: bit b of the keys of values begin <= k < begin + w, where w is the bits of a
// key. Which bit of the plane is which value's is not defined, but the same for all planes. Values
// that are not there have the least key.
template <class V, class Values>
__attribute__((noinline)) void make_planes(const Values& values, int64_t begin, int64_t present,
                                           NanSeen<V>& nan, Bits<V>* planes) {
  using B = Bits<V>;
  using Word = std::make_unsigned_t<typename Lane<V>::Int>;
  constexpr int w = kBits<V>, high = 8, low = w / high;
  for (int i = 0; i < low; ++i) {
    B x[high];
#pragma GCC unroll 8
    for (int r = 0; r < high; ++r) x[r] = ordered_bits(values, i + r * low, present, begin, nan);
    exchange_bits(x, Word(w / 2));
#pragma GCC unroll 8
    for (int r = 0; r < high; ++r) planes[i + r * low] = x[r];
  }
  for (int i = 0; i < w; i += low) {
    B x[low];
#pragma GCC unroll 8
    for (int r = 0; r < low; ++r) x[r] = planes[i + r];
    exchange_bits(x, Word(low / 2));
#pragma GCC unroll 8
    for (int r = 0; r < low; ++r) planes[i + r] = x[r];
  }
}

#if defined(__GFNI__) && defined(__AVX512BW__)
// a and b become the bytes of both, taken in turn, of the lower and the upper half of every 16
// bytes. Of the four bits that number a byte in 16, the uppermost goes to the register's number,
// whose bit becomes the lowest.
template <class B>
HTV_INLINE void interleave_bytes(B& a, B& b) {
  const __m512i x = (__m512i)a, y = (__m512i)b;
  a = (B)_mm512_unpacklo_epi8(x, y);
  b = (B)_mm512_unpackhi_epi8(x, y);
}

// Transposes the 8 x 8 bits of every 8 bytes.
template <class B>
HTV_INLINE B transpose_bits(B bytes) {
  return (B)_mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64(0x8040201008040201), (__m512i)bytes, 0);
}

// The same for keys of 32 bits. Registers are numbered by value, e4 e3 e2 e1 e0; within 16 bytes of
// one are coordinate and byte of the key, d1 d0 j1 j0, within a byte the bit of the key, i2 i1 i0.
// Seven interleavings, of the registers whose numbers differ in one bit, and a transposition of
// bits in between leave the coordinates where they were, the values within (e3 e4 and e0 to e2),
// and the key's bits in the registers' numbers: i0 i1 j1 i2 j0.
template <class Values>
__attribute__((noinline)) void make_planes(const Values& values, int64_t begin, int64_t present,
                                           NanSeen<Register<float>>& nan,
                                           Bits<Register<float>>* planes) {
  using V = Register<float>;
  using B = Bits<V>;
  B part[32];
  NanSeen<V> seen = nan;
#pragma GCC unroll 1
  for (int base = 0; base < 32; base += 8) {
    B x[8];
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) x[r] = ordered_bits(values, base + r, present, begin, seen);
#pragma GCC unroll 3
    for (int d = 1; d < 8; d *= 2)
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r)
        if ((r & d) == 0) interleave_bytes(x[r], x[r + d]);
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) x[r] = transpose_bits(x[r]);
#pragma GCC unroll 2
    for (int d = 1; d < 4; d *= 2)
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r)
        if ((r & d) == 0) interleave_bytes(x[r], x[r + d]);
#pragma GCC unroll 8
    for (int r = 0; r < 8; ++r) part[base + r] = x[r];
  }
  nan = seen;
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) {
    B x[4];
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) x[h] = part[r + 8 * h];
    interleave_bytes(x[0], x[1]);
    interleave_bytes(x[2], x[3]);
    interleave_bytes(x[0], x[2]);
    interleave_bytes(x[1], x[3]);
#pragma GCC unroll 4
    for (int h = 0; h < 4; ++h) {
      const int bit =
          16 * (r >> 2 & 1) + 8 * (r & 1) + 4 * (r >> 1 & 1) + 2 * (h & 1) + (h >> 1 & 1);
      planes[31 - bit] = x[h];
    }
  }
}
#endif

// Adds up the bits set in each lane's words.
template <class B>
class BitCount {
#if defined(__AVX512VPOPCNTDQ__)
  B total_{};

 public:
  HTV_INLINE void add(B word) {
    total_ += sizeof(word[0]) == 4 ? (B)_mm512_popcnt_epi32((__m512i)word)
                                   : (B)_mm512_popcnt_epi64((__m512i)word);
  }
  HTV_INLINE B total() const { return total_; }
#else
  B total_{}, bytes_{};
  int added_ = 0;

  static HTV_INLINE B count_bytes(B word) {
#if defined(__AVX512BW__)
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i nibble = _mm512_set1_epi8(15), x = (__m512i)word;
    return (B)_mm512_add_epi8(
        _mm512_shuffle_epi8(table, _mm512_and_si512(x, nibble)),
        _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble)));
#elif defined(__AVX2__)
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i nibble = _mm256_set1_epi8(15), x = (__m256i)word;
    return (B)_mm256_add_epi8(
        _mm256_shuffle_epi8(table, _mm256_and_si256(x, nibble)),
        _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble)));
#else
    using Word = std::remove_reference_t<decltype(word[0])>;
    constexpr Word all = ~Word(0), pairs = all / 3, nibbles = all / 5, bytes = all / 17;
    word -= (word >> 1) & pairs;
    word = (word & nibbles) + ((word >> 2) & nibbles);
    return (word + (word >> 4)) & bytes;
#endif
  }
  HTV_INLINE void flush() {
    using Word = std::remove_reference_t<decltype(bytes_[0])>;
    constexpr Word all = ~Word(0);
    B sums = (bytes_ & (all / 257)) + ((bytes_ >> 8) & (all / 257));
    sums = (sums & (all / 65537)) + ((sums >> 16) & (all / 65537));
    if constexpr (sizeof(Word) == 8) sums = (sums & 0xffffffffu) + (sums >> 32);
    total_ += sums;
    bytes_ = B{};
    added_ = 0;
  }

 public:
  HTV_INLINE void add(B word) {
    bytes_ += count_bytes(word);
    if (++added_ == 31) flush();  // before a byte overflows
  }
  HTV_INLINE B total() {
    flush();
    return total_;
  }
#endif
};

// The values of `ranks` ranks, counted from the largest, of `columns` registers of coordinates.
// planes[c * words + k][w], of all values but some zeros; candidates: room for columns * ranks *
// words.
template <class V, int columns, int ranks>
__attribute__((noinline)) void descend(const Bits<V>* planes, int64_t words, int64_t zeros,
                                       Bits<V>* candidates, const int64_t* from_top,
                                       V (*found)[columns]) {
  using B = Bits<V>;
  using Int = typename Lane<V>::Int;
  constexpr int w = kBits<V>;
  Count<V> rank[ranks][columns], key[ranks][columns], rejected[ranks][columns];
  for (int r = 0; r < ranks; ++r)
    for (int c = 0; c < columns; ++c) {
      rank[r][c] = Count<V>{} + Int(from_top[r]);
      key[r][c] = rejected[r][c] = Count<V>{};
      for (int64_t k = 0; k < words; ++k) candidates[(k * columns + c) * ranks + r] = ~B{};
    }
  for (int b = 0; b < w; ++b) {
    BitCount<B> ones[ranks][columns];
    const B* const plane = planes + b;
    const B* const previous = b == 0 ? plane : plane - 1;
    B flip[ranks][columns];
    for (int r = 0; r < ranks; ++r)
      for (int c = 0; c < columns; ++c) flip[r][c] = (B)rejected[r][c];
    if (b == 0) {
      for (int64_t k = 0; k < words; ++k)
        for (int c = 0; c < columns; ++c)
          for (int r = 0; r < ranks; ++r) ones[r][c].add(plane[(c * words + k) * w]);
    } else {
      for (int64_t k = 0; k < words; ++k)
#pragma GCC unroll 2
        for (int c = 0; c < columns; ++c)
#pragma GCC unroll 2
          for (int r = 0; r < ranks; ++r) {
            B& candidate = candidates[(k * columns + c) * ranks + r];
            candidate &= previous[(c * words + k) * w] ^ flip[r][c];
            ones[r][c].add(candidate & plane[(c * words + k) * w]);
          }
    }
    for (int r = 0; r < ranks; ++r)
      for (int c = 0; c < columns; ++c) {
        Count<V> set = (Count<V>)ones[r][c].total();
        if (b == 0) set += Int(zeros);  // the key of 0 has no other bit
        const Mask<V> taken = set > rank[r][c];
        rank[r][c] = taken ? rank[r][c] : rank[r][c] - set;
        rejected[r][c] = ~taken;
        key[r][c] |= taken & Int(Int(1) << (w - 1 - b));
      }
  }
  for (int r = 0; r < ranks; ++r)
    for (int c = 0; c < columns; ++c) found[r][c] = value_of<V>(key[r][c] ^ ~kMagnitude<V>);
}

template <class V, int columns, class Values>
void select_by_bits(const Ranking& ranking, const Sample<Values>* samples, void* scratch,
                    V* result) {
  using B = Bits<V>;
  constexpr int w = kBits<V>;
  const int64_t n = ranking.ranked, given = samples[0].given, words = (given + w - 1) / w;
  B* const planes = static_cast<B*>(scratch);
  B* const candidates = planes + columns * words * w;
  NanSeen<V> nan[columns];
  for (int c = 0; c < columns; ++c)
    for (int64_t k = 0; k < words; ++k)
      make_planes(samples[c].values, k * w, given - k * w, nan[c], planes + (c * words + k) * w);
  const int64_t from_top[2] = {n - 1 - ranking.low, n - 1 - ranking.high};
  const int64_t zeros = samples[0].zeros;
  V found[2][columns];
  if (ranking.low == ranking.high) {
    descend<V, columns, 1>(planes, words, zeros, candidates, from_top, found);
    for (int c = 0; c < columns; ++c) found[1][c] = found[0][c];
  } else {
    descend<V, columns, 2>(planes, words, zeros, candidates, from_top, found);
  }
  for (int c = 0; c < columns; ++c) {
    const Ends<V> ends = {found[0][c], found[1][c]};
    result[c] = nan[c].poison(is_ranked_mean(ranking.statistic)
                                  ? mean_between<V>(samples[c], ranking, ends)
                                  : midpoint(ends.low, ends.high));
  }
}

// sample(c): the values of register 0 <= c < columns of coordinates, of which all have as many zeros.
template <class V, class Source>
void statistics_of_many(const Ranking& ranking, const Source& sample, int columns, void* scratch,
                        V* result) {
  using Of = decltype(sample(0));
  const int64_t count = ranking.parameters.count;
  const bool trims = is_ranked_mean(ranking.statistic);
  const auto each = [&](const auto& statistic) {
    for (int c = 0; c < columns; ++c) result[c] = statistic(sample(c));
  };
  const auto by_extremes = [&](auto kept) {
    each([&](const Of& values) { return mean_by_extremes<V, kept()>(values, ranking); });
  };
  if (trims && count == 0) {
    const Ends<V> all = {-splat<V>(Real<V>(INFINITY)), splat<V>(Real<V>(INFINITY))};
    each([&](const Of& values) {
      NanSeen<V> nan;
      if constexpr (Of::may_be_nan)
        for (int64_t k = 0; k < values.given; ++k) nan.add(values.values(k));
      return nan.poison(clamped_mean<V>(values, ranking, all));
    });
  } else if (trims && count < kMostExtremes) {
    if (count < 2) by_extremes(std::integral_constant<int, 2>{});
    else if (count < 3) by_extremes(std::integral_constant<int, 3>{});
    else if (count < 5) by_extremes(std::integral_constant<int, 5>{});
    else if (count < 9) by_extremes(std::integral_constant<int, 9>{});
    else by_extremes(std::integral_constant<int, 16>{});
  } else {
    int c = 0;
    for (; c + 2 <= columns; c += 2) {
      const Of two[] = {sample(c), sample(c + 1)};
      select_by_bits<V, 2>(ranking, two, scratch, result + c);
    }
    if (c < columns) {
      const Of one[] = {sample(c)};
      select_by_bits<V, 1>(ranking, one, scratch, result + c);
    }
  }
}

}  // namespace

template <class V>
void order_statistics(const Ranking& ranking, const V* values, int64_t stride, int columns,
                      void* scratch, V* result) {
  const int64_t n = ranking.ranked, count = ranking.parameters.count;
  const bool trims = is_ranked_mean(ranking.statistic), four = n > kMostRuns / 2;
  const auto column = [&](int64_t c) { return Strided<V>{values + c, stride}; };
  if (n <= kMostSorted) {
    few_statistics<V, kMostSorted>(ranking, columns, column,
                                   [&](int64_t c, V v) { result[c] = v; });
  } else if (n <= kMostRuns && (!trims || count >= (four ? kManyExtremes : kFewExtremes))) {
    with_constant<kMostSorted / 2 + 1, kMostSorted>(
        four ? (n + 3) / 4 : (n + 1) / 2, [&](auto run) {
          for (int c = 0; c < columns; ++c)
            result[c] = statistic_of_runs<V, run()>(column(c), ranking, four);
        });
  } else {
    const auto sample = [&](int c) { return Sample<Strided<V>>{column(c), n, 0}; };
    statistics_of_many<V>(ranking, sample, columns, scratch, result);
  }
}

void product_statistics(const Ranking& ranking, const Factors& factors, int columns, void* scratch,
                        Register<float>* result) {
  using V = Register<float>;
  const auto sample = [&](int c) {
    const Products<V> products{factors.x[c], factors.g, factors.row};
    return Sample<Products<V>>{products, factors.given, ranking.ranked - factors.given};
  };
  statistics_of_many<V>(ranking, sample, columns, scratch, result);
}

template void order_statistics(const Ranking&, const Register<float>*, int64_t, int, void*,
                               Register<float>*);
template void order_statistics(const Ranking&, const Register<double>*, int64_t, int, void*,
                               Register<double>*);

}  // namespace htv::HTV_ISA
