// Elementary functions of f32v, to a few units in the last place. NaN stays NaN.
#pragma once
#include <initializer_list>

#include "core/cpu/simd.h"

namespace effvlm::EFFVLM_ISA {

// e^x for |x| <= 87, and its value at ±87 beyond: 2^n · e^r with |r| <= ln 2 / 2 and e^r by a polynomial (Cephes, S. Moshier).
inline f32v exp(f32v x) {
  x = max(set1(-87), min(set1(87), x));
  constexpr float kRound = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  const f32v shifted = fma(x, set1(1.44269504f), set1(kRound)), n = shifted - set1(kRound);
  const f32v r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  f32v p = set1(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = fma(p, r, set1(c));
  return fma(p, r * r, r + set1(1)) * exp2_of_rounded(shifted);
}

// 2^x; 0 from below −127 on, ∞ from above 128 on; 2^0 is 1 exactly, and near 0 the error is relative to x, so that the product of
// many factors close to 1 stays right. 2^n · 2^r with |r| <= 1/2; the polynomial's relative error is 9.2e-8.
inline f32v exp2(f32v x) {
#if defined(__AVX512F__)
  const f32v r{_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}, n = x - r;
#else
  x = max(set1(-127), min(set1(128), x));
  constexpr float kRound = 12582912.0f;
  const f32v shifted = x + set1(kRound), r = x - (shifted - set1(kRound));
#endif
  f32v p = set1(1.3264727313e-3f);
  for (const float c : {9.6715129912e-3f, 5.5507335812e-2f, 2.4022242427e-1f, 6.9314700365e-1f, 1.0f}) p = fma(p, r, set1(c));
#if defined(__AVX512F__)
  return {_mm512_scalef_ps(p.v, n.v)};
#else
  return p * exp2_of_rounded(shifted);
#endif
}

inline f32v sigmoid(f32v x) { return set1(1) / (set1(1) + exp(set1(0) - x)); }

inline f32v silu(f32v x) { return x / (set1(1) + exp(set1(0) - x)); }

// log(1 + e^x) = max(x, 0) + log1p(y), y = e^-|x|; log1p(y)/y on 0 … 1 by a polynomial, relative error 3.3e-8. The tail for x →
// −∞ keeps its relative accuracy (down to e^-87).
inline f32v softplus(f32v x) {
  const f32v y = exp(set1(0) - abs(x));
  f32v p = set1(5.3648250e-3f);
  for (const float c : {-3.0065795407e-2f, 7.9204536974e-2f, -1.3753803074e-1f, 1.9153654575e-1f, -2.4857163429e-1f,
                        3.3321323991e-1f, -4.9999648333e-1f, 1.0f})
    p = fma(p, y, set1(c));
  return fma(p, y, max(set1(0), x));
}

// x·Φ(x), through erfc of |x|/√2 with a relative error of 1.2e-7 (Numerical Recipes, 6.2.2), so that the tail is right as well.
inline f32v gelu(f32v x) {
  const f32v z = abs(x) * set1(0.70710678f), t = set1(1) / fma(z, set1(0.5f), set1(1));
  f32v p = set1(0.17087277f);
  for (const float c :
       {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f, 0.37409196f, 1.00002368f, -1.26551223f})
    p = fma(p, t, set1(c));
  const f32v erfc = t * exp(p - z * z);
  return max(set1(0), x) - set1(0.5f) * abs(x) * erfc;
}

inline f32v gelu_tanh(f32v x) {
  const f32v inner = x * fma(x * x, set1(0.044715f), set1(1));
  return x * sigmoid(set1(1.5957691216f) * inner);  // (1 + tanh y)/2 = σ(2y), 2·√(2/π)
}

}  // namespace effvlm::EFFVLM_ISA
