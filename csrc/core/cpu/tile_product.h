// Products of small matrices that sit in the caches: tiles of a chunk, a state. Sums in the order of p, whatever the sizes.
//
// c[i][j] = start + Σ_p a[i·a_row + p·a_col]·b[p·b_row + j], where a sum starts from zero, from what is in c, or from a multiple
// of it. Elements of a are broadcast, so that its strides are free and a transposed a costs nothing; rows of b and c are
// contiguous.
#pragma once
#include <type_traits>
#include <utility>

#include "core/cpu/dot_in_place.h"

namespace effvlm::EFFVLM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 2;  // 16 sums: two chains of multiply-adds of latency 4 and more, and no tails at 64
#else
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 sums of 16 registers
#endif

struct MacF32 {
  static f32v mac(f32v sum, f32v a, f32v b) { return fma(a, b, sum); }
};
#if defined(__AVX512BF16__)
// Words of two bf16, p even in the low half: k counts pairs, and all strides of a and b count words.
struct MacPairs {
  static f32v mac(f32v sum, f32v a, f32v b) { return {dot_pairs(sum.v, _mm512_castps_si512(a.v), _mm512_castps_si512(b.v))}; }
};
#endif

// Where the sums of a row start, given what is in c.
struct FromZeros {
  FromZeros from(int) const { return {}; }
  template <class Sum>
  f32v operator()(int, Sum&&) const {
    return set1(0);
  }
};
struct FromSums {
  FromSums from(int) const { return {}; }
  template <class Sum>
  f32v operator()(int, Sum&& sum) const {
    return sum();
  }
};
struct FromAllScaled {
  float factor;
  FromAllScaled from(int) const { return *this; }
  template <class Sum>
  f32v operator()(int, Sum&& sum) const {
    return set1(factor) * sum();
  }
};
struct FromScaled {
  const float* factor;  // of each row
  FromScaled from(int row) const { return {factor + row}; }
  template <class Sum>
  f32v operator()(int row, Sum&& sum) const {
    return set1(factor[row]) * sum();
  }
};

// f(0), f(1) … f(N − 1), the index a constant. Loops are unrolled so late that GCC 12 leaves an array of sums in memory too, and
// writes it at the start of every block.
template <class F, int... I>
[[gnu::always_inline]] inline void unrolled(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
[[gnu::always_inline]] inline void unrolled(F&& f) {
  unrolled(std::make_integer_sequence<int, N>{}, f);
}

template <class Mac, int MR, int NV, bool kTail, class Start>
inline void tile_block(Start start, int tail, int k, const float* a, std::int64_t a_row, std::int64_t a_col, const float* b,
                       std::int64_t b_row, float* c, std::int64_t c_row) {
  constexpr int W = f32v::width;
  const auto take = [&](const float* p, int v) { return kTail && v == NV - 1 ? load(p + v * W, tail) : load(p + v * W); };
  f32v sum[MR * NV];
  unrolled<MR * NV>([&](auto s) {
    constexpr int i = s / NV, v = s % NV;
    sum[s] = start(i, [&] { return take(c + i * c_row, v); });
  });
  for (int p = 0; p < k; ++p, a += a_col, b += b_row) {
    f32v row[NV];
    unrolled<NV>([&](auto v) { row[v] = take(b, v); });
    unrolled<MR>([&](auto i) {
      const f32v x = set1(a[i * a_row]);
      unrolled<NV>([&](auto v) { sum[i * NV + v] = Mac::mac(sum[i * NV + v], x, row[v]); });
    });
  }
#if defined(__GNUC__)
  asm("" : "+r"(c_row));  // the rows' addresses are not kept from above: there are no registers for them
#endif
  unrolled<MR * NV>([&](auto s) {
    constexpr int i = s / NV, v = s % NV;
    float* to = c + i * c_row + v * W;
    if (kTail && v == NV - 1)
      store(to, sum[s], tail);
    else
      store(to, sum[s]);
  });
}

// All rows of one strip of columns. kCausal: row i has no terms p > i; up to the end of its block of rows they must be zeros.
template <class Mac, bool kCausal, int NV, bool kTail, int MR = kTileRows, class Start>
void tile_strip(Start start, int tail, int m, int k, const float* a, std::int64_t a_row, std::int64_t a_col, const float* b,
                std::int64_t b_row, float* c, std::int64_t c_row, int done = 0) {
  constexpr int kPer = std::is_same_v<Mac, MacF32> ? 1 : 2;
  for (; done + MR <= m; done += MR) {
    const int end = (done + MR + kPer - 1) / kPer;
    tile_block<Mac, MR, NV, kTail>(start.from(done), tail, kCausal && end < k ? end : k, a + done * a_row, a_row, a_col, b, b_row,
                                   c + done * c_row, c_row);
  }
  if constexpr (MR > 1)
    if (done < m) tile_strip<Mac, kCausal, NV, kTail, MR / 2>(start, tail, m, k, a, a_row, a_col, b, b_row, c, c_row, done);
}

template <class Mac, bool kCausal, class Start>
void tile_product_of(Start start, int m, int n, int k, const float* a, std::int64_t a_row, std::int64_t a_col, const float* b,
                     std::int64_t b_row, float* c, std::int64_t c_row) {
  constexpr int W = f32v::width;
  int j = 0;
  for (; j + kTileVectors * W <= n; j += kTileVectors * W)
    tile_strip<Mac, kCausal, kTileVectors, false>(start, 0, m, k, a, a_row, a_col, b + j, b_row, c + j, c_row);
  for (; j < n; j += W) {
    if (n - j >= W) {
      tile_strip<Mac, kCausal, 1, false>(start, 0, m, k, a, a_row, a_col, b + j, b_row, c + j, c_row);
    } else {
      tile_strip<Mac, kCausal, 1, true>(start, n - j, m, k, a, a_row, a_col, b + j, b_row, c + j, c_row);
    }
  }
}

template <class Start>
void tile_product(Start start, int m, int n, int k, const float* a, std::int64_t a_row, std::int64_t a_col, const float* b,
                  std::int64_t b_row, float* c, std::int64_t c_row) {
  tile_product_of<MacF32, false>(start, m, n, k, a, a_row, a_col, b, b_row, c, c_row);
}

// a lower triangular: of row i only p <= i is summed. The rest of its block of kTileRows rows must be zeros.
template <class Start>
void tile_product_causal(Start start, int m, int n, int k, const float* a, std::int64_t a_row, std::int64_t a_col, const float* b,
                         std::int64_t b_row, float* c, std::int64_t c_row) {
  tile_product_of<MacF32, true>(start, m, n, k, a, a_row, a_col, b, b_row, c, c_row);
}

#if defined(__AVX512BF16__)
template <class Start>
void tile_pairs(Start start, int m, int n, int pairs, const float* a, std::int64_t a_row, std::int64_t a_col, const float* b,
                std::int64_t b_row, float* c, std::int64_t c_row) {
  tile_product_of<MacPairs, false>(start, m, n, pairs, a, a_row, a_col, b, b_row, c, c_row);
}

template <class Start>
void tile_pairs_causal(Start start, int m, int n, int pairs, const float* a, std::int64_t a_row, std::int64_t a_col,
                       const float* b, std::int64_t b_row, float* c, std::int64_t c_row) {
  tile_product_of<MacPairs, true>(start, m, n, pairs, a, a_row, a_col, b, b_row, c, c_row);
}

// ---- packing words of two bf16 ----

inline void store_rounded(bf16* p, f32v x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v));
}
inline void store_rounded(bf16* p, f32v x, int n) { _mm256_mask_storeu_epi16(p, first(n), (__m256i)_mm512_cvtneps_pbh(x.v)); }

// Words (low[l], high[l]), rounded to nearest even.
inline f32v words_of(f32v low, f32v high) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
  const __m512i order =
      _mm512_or_si512(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                      _mm512_slli_epi32(_mm512_setr_epi32(16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31), 16));
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both))};
}

// A b operand: word j of row p is (from[2p][j], from[2p + 1][j]), rows of f32 or bf16; an odd last row is paired with zeros.
template <class T>
void pair_rows(int rows, int n, const T* from, std::int64_t stride, float* to, std::int64_t to_stride) {
  for (int p = 0; p < rows; p += 2, from += 2 * stride, to += to_stride) {
    const bool whole = p + 1 < rows;
    for_lanes(
        n, [&](std::int64_t j) { store(to + j, words_of(load(from + j), whole ? load(from + stride + j) : set1(0))); },
        [&](std::int64_t j, int left) {
          store(to + j, words_of(load(from + j, left), whole ? load(from + stride + j, left) : set1(0)), left);
        });
  }
}

// An a operand: word p of row i is (from[i][2p], from[i][2p + 1]); an odd last column is paired with zero.
template <class T>
void pair_columns(int rows, int n, const T* from, std::int64_t stride, float* to, std::int64_t to_stride) {
  for (int i = 0; i < rows; ++i, from += stride, to += to_stride) {
    bf16* row = reinterpret_cast<bf16*>(to);
    if (n % 2) row[n].bits = 0;
    for_lanes(
        n, [&](std::int64_t j) { store_rounded(row + j, load(from + j)); },
        [&](std::int64_t j, int left) { store_rounded(row + j, load(from + j, left), left); });
  }
}
#endif

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
