// e^x for loops that it bounds: on AVX-512, which scales by powers of two and rounds in one instruction each, two thirds of
// exp's.
#pragma once
#include "core/cpu/math.h"

namespace effvlm::EFFVLM_ISA {

#if defined(__AVX512F__)
// e^x = 2^n · 2^r, |r| <= 1/2, 2^r by a polynomial (Cephes, S. Moshier); 0 and ∞ where f32 has nothing else. NaN stays NaN.
inline f32v exp_short(f32v x) {
  x = max(set1(-104), min(set1(89), x));
  const __m512 log2e = _mm512_set1_ps(1.44269504f), log2e_low = _mm512_set1_ps(1.92596303e-8f);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x.v, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const f32v r = {_mm512_fmadd_ps(x.v, log2e_low, _mm512_fmsub_ps(x.v, log2e, n))};
  f32v p = set1(1.535336188319500e-4f);
  for (const float c :
       {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f, 2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f})
    p = fma(p, r, set1(c));
  return {_mm512_scalef_ps(p.v, n)};
}
#else
inline f32v exp_short(f32v x) { return exp(x); }
#endif

inline f32v silu_short(f32v x) { return x / (set1(1) + exp_short(set1(0) - x)); }

// x·σ(x) for a result of type T. What is rounded to bf16 anyway needs no division and a shorter polynomial: it is right to 2^-13.
template <class T>
inline f32v silu_for(f32v x) {
  return silu_short(x);
}
#if defined(__AVX512F__)
template <>
inline f32v silu_for<bf16>(f32v x) {
  const f32v y = max(set1(-150), min(set1(129), x * set1(-1.44269504f)));  // e^−x = 2^y; −150 and 129 are 0 and ∞
  const __m512 n = _mm512_roundscale_ps(y.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const f32v r = {_mm512_sub_ps(y.v, n)};
  f32v p = set1(9.5701e-3f);
  for (const float c : {5.591786e-2f, 2.4024745e-1f, 6.9312181e-1f, 1.0f}) p = fma(p, r, set1(c));  // 2^r to 2^-18, minimax
  return x * f32v{_mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), _mm512_scalef_ps(p.v, n)))};
}
#endif

// store() for loops that the conversion bounds: bf16 in one instruction where there is one. It makes subnormal results 0.
template <class T>
inline void store_short(T* p, f32v x) {
  store(p, x);
}
template <class T>
inline void store_short(T* p, f32v x, int n) {
  store(p, x, n);
}
#if defined(__AVX512BF16__)
template <>
inline void store_short(bf16* p, f32v x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}
template <>
inline void store_short(bf16* p, f32v x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}
#endif

}  // namespace effvlm::EFFVLM_ISA
