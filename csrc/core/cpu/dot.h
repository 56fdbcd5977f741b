// Dot products of rows in f32, several rows at a time. The order of additions of one pair depends on C alone, not on which
// rows share the call, so equal rows get equal results wherever they stand.
#pragma once
#include "core/cpu/dot_in_place.h"

namespace effvlm::EFFVLM_ISA {

// Partial sums of one pair, and how T's lanes are multiplied into them.
template <class T>
struct DotLanes {
  using Vector = f32v;
  static constexpr int width = f32v::width;
  static Vector take(const T* p) { return load(p); }
  static Vector take(const T* p, int n) { return load(p, n); }
  static f32v mac(f32v sum, Vector a, Vector b) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct DotLanes<bf16> {  // two products a lane: exact products, f32 sums, subnormals flushed
  using Vector = __m512i;
  static constexpr int width = 32;
  static Vector take(const bf16* p) { return _mm512_loadu_si512(p); }
  static Vector take(const bf16* p, int n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((std::uint64_t{1} << n) - 1), p);
  }
  static f32v mac(f32v sum, Vector a, Vector b) { return {dot_pairs(sum.v, a, b)}; }
};
#endif

// out[j*MR + i] = <a[i], b[j]> over C contiguous elements, for MR × NR pairs held in registers (and NR of b, one of a). Chains
// interleaves that many partial sums per pair, to cover the latency of the multiply-add where MR·NR alone does not.
template <class T, int MR, int NR, int Chains>
inline void dots(const T* const* a, const T* const* b, std::int64_t C, float* out) {
  using Lanes = DotLanes<T>;
  constexpr int W = Lanes::width;
  f32v sum[MR][NR][Chains];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NR; ++j)
      for (int k = 0; k < Chains; ++k) sum[i][j][k] = set1(0);
  const auto step = [&](int chain, auto take) {
    typename Lanes::Vector vb[NR];
    for (int j = 0; j < NR; ++j) vb[j] = take(b[j]);
    for (int i = 0; i < MR; ++i) {
      const typename Lanes::Vector va = take(a[i]);
      for (int j = 0; j < NR; ++j) sum[i][j][chain] = Lanes::mac(sum[i][j][chain], va, vb[j]);
    }
  };
  std::int64_t c = 0;
  for (; c + Chains * W <= C; c += Chains * W)
    for (int k = 0; k < Chains; ++k) step(k, [&](const T* p) { return Lanes::take(p + c + k * W); });
  for (; c + W <= C; c += W) step(0, [&](const T* p) { return Lanes::take(p + c); });
  if (c < C) step(0, [&](const T* p) { return Lanes::take(p + c, static_cast<int>(C - c)); });
#pragma GCC unroll 32  // or the sums would have to leave their registers to be indexed
  for (int j = 0; j < NR; ++j)
#pragma GCC unroll 32
    for (int i = 0; i < MR; i += 4) {
      f32v four[4];
      for (int l = 0; l < 4; ++l) {
        const int row = i + l < MR ? i + l : MR - 1;
        four[l] = sum[row][j][0];
        for (int k = 1; k < Chains; ++k) four[l] = four[l] + sum[row][j][k];
      }
      float total[4];
      reduce_add4(four, total);
      for (int l = 0; l < 4 && i + l < MR; ++l) out[j * MR + i + l] = total[l];
    }
}

}  // namespace effvlm::EFFVLM_ISA
