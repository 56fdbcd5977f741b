// f32v: one vector register of f32, with one meaning at every ISA level; loads and stores convert from and to f16 and bf16.
// Only <op>_cpu.cpp files include this. Everything sits in the namespace of the level (see dispatch.h).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/dtype.h"

#ifndef EFFVLM_ISA
#error "simd.h is for files compiled once per ISA level"
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace effvlm::EFFVLM_ISA {

// ---- scalar conversions; to_f16 and to_bf16 round to nearest even and keep NaN a NaN ----

inline float bits_to_f32(std::uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline std::uint32_t f32_to_bits(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}
inline float to_f32(float x) { return x; }
inline float to_f32(bf16 x) { return bits_to_f32(static_cast<std::uint32_t>(x.bits) << 16); }
inline float to_f32(f16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_f32(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // Inf, NaN
  // Read as f32 the exponent is 112 too small; the product also normalises subnormals.
  return bits_to_f32(sign | f32_to_bits(bits_to_f32(magnitude << 13) * 0x1p112f));
}
inline void from_f32(float x, float& out) { out = x; }
inline void from_f32(float x, bf16& out) {
  const std::uint32_t bits = f32_to_bits(x);
  out.bits = static_cast<std::uint16_t>(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_f32(float x, f16& out) {
  const std::uint32_t bits = f32_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  std::uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // rounds to Inf
  } else if (magnitude < 0x38800000) {
    half = f32_to_bits(bits_to_f32(magnitude) + 0.5f) - 0x3f000000;  // subnormal: the addition aligns and rounds
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = static_cast<std::uint16_t>(sign | half);
}

// ---- vectors; max and min of a number and NaN are their second argument ----

#if defined(__AVX512F__)

struct f32v {
  static constexpr int width = 16;
  __m512 v;
};
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline f32v set1(float x) { return {_mm512_set1_ps(x)}; }
inline f32v load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline f32v load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline f32v widen(__m256i x, f16) { return {_mm512_cvtph_ps(x)}; }
inline f32v widen(__m256i x, bf16) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
template <class T>
inline f32v load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <class T>
inline f32v load(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
}
inline void store(float* p, f32v x) { _mm512_storeu_ps(p, x.v); }
inline void store(float* p, f32v x, int n) { _mm512_mask_storeu_ps(p, first(n), x.v); }
inline __m256i narrow(f32v x, f16) { return _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m256i narrow(f32v x, bf16) {
  const __m512i bits = _mm512_castps_si512(x.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
template <class T>
inline void store(T* p, f32v x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T{}));
}
template <class T>
inline void store(T* p, f32v x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(x, T{}));
}
inline f32v operator+(f32v a, f32v b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f32v operator-(f32v a, f32v b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f32v operator*(f32v a, f32v b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f32v operator/(f32v a, f32v b) { return {_mm512_div_ps(a.v, b.v)}; }
inline f32v fma(f32v a, f32v b, f32v c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline f32v max(f32v a, f32v b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f32v min(f32v a, f32v b) { return {_mm512_min_ps(a.v, b.v)}; }
inline f32v abs(f32v a) { return {_mm512_abs_ps(a.v)}; }
// 2^n for the float 1.5·2^23 + n with |n| < 127: what rounding by that addition leaves. 0 for n = −127, ∞ for n = 128.
inline f32v exp2_of_rounded(f32v x) {
  const __m512i n = _mm512_add_epi32(_mm512_castps_si512(x.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(n, 23))};
}
inline float reduce_add(f32v a) { return _mm512_reduce_add_ps(a.v); }
// Four sums at once, each in the same order wherever it stands.
inline void reduce_add4(const f32v* a, float* out) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 lanes = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
inline float reduce_max(f32v a) { return _mm512_reduce_max_ps(a.v); }

#else

#if defined(__AVX2__)
struct f32v {
  static constexpr int width = 8;
  __m256 v;
};
inline f32v set1(float x) { return {_mm256_set1_ps(x)}; }
inline f32v load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline f32v load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline f32v load(const bf16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
inline void store(float* p, f32v x) { _mm256_storeu_ps(p, x.v); }
inline f32v operator+(f32v a, f32v b) { return {_mm256_add_ps(a.v, b.v)}; }
inline f32v operator-(f32v a, f32v b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline f32v operator*(f32v a, f32v b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline f32v operator/(f32v a, f32v b) { return {_mm256_div_ps(a.v, b.v)}; }
inline f32v fma(f32v a, f32v b, f32v c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline f32v max(f32v a, f32v b) { return {_mm256_max_ps(a.v, b.v)}; }
inline f32v min(f32v a, f32v b) { return {_mm256_min_ps(a.v, b.v)}; }
inline f32v abs(f32v a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline f32v exp2_of_rounded(f32v x) {
  const __m256i n = _mm256_add_epi32(_mm256_castps_si256(x.v), _mm256_set1_epi32(127));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(n, 23))};
}
inline void reduce_add4(const f32v* a, float* out) {
  const __m256 lanes = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
}
#else
// The floor of the ABI (SSE2, NEON): four lanes through the compiler's vector extension.
typedef float f32x4 __attribute__((vector_size(16)));
struct f32v {
  static constexpr int width = 4;
  f32x4 v;
};
inline f32v set1(float x) { return {f32x4{x, x, x, x}}; }
inline f32v load(const float* p) {
  f32v r;
  std::memcpy(&r, p, sizeof r);
  return r;
}
template <class T>
inline f32v load(const T* p) {
  return {f32x4{to_f32(p[0]), to_f32(p[1]), to_f32(p[2]), to_f32(p[3])}};
}
inline void store(float* p, f32v x) { std::memcpy(p, &x, sizeof x); }
inline f32v operator+(f32v a, f32v b) { return {a.v + b.v}; }
inline f32v operator-(f32v a, f32v b) { return {a.v - b.v}; }
inline f32v operator*(f32v a, f32v b) { return {a.v * b.v}; }
inline f32v operator/(f32v a, f32v b) { return {a.v / b.v}; }
inline f32v fma(f32v a, f32v b, f32v c) { return {a.v * b.v + c.v}; }
inline f32v max(f32v a, f32v b) { return {a.v > b.v ? a.v : b.v}; }
inline f32v min(f32v a, f32v b) { return {a.v < b.v ? a.v : b.v}; }
inline f32v abs(f32v a) { return {a.v < 0 ? -a.v : a.v}; }
inline f32v exp2_of_rounded(f32v x) {
  typedef std::uint32_t u32x4 __attribute__((vector_size(16)));
  u32x4 n;
  std::memcpy(&n, &x.v, sizeof n);
  n = (n + 127) << 23;
  std::memcpy(&x.v, &n, sizeof n);
  return x;
}
inline void reduce_add4(const f32v* a, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = (a[i].v[0] + a[i].v[2]) + (a[i].v[1] + a[i].v[3]);
}
#endif

// Without mask registers, tails and 16-bit stores go through a small array.
template <class T>
inline f32v load(const T* p, int n) {
  float tail[f32v::width] = {};
  for (int i = 0; i < n; ++i) tail[i] = to_f32(p[i]);
  return load(tail);
}
template <class T>
inline void store(T* p, f32v x, int n) {
  float all[f32v::width];
  store(all, x);
  for (int i = 0; i < n; ++i) from_f32(all[i], p[i]);
}
template <class T>
inline void store(T* p, f32v x) {
  store(p, x, f32v::width);
}
inline float reduce_add(f32v a) {
  float x[f32v::width];
  store(x, a);
  for (int step = f32v::width / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) x[i] += x[i + step];
  return x[0];
}
inline float reduce_max(f32v a) {
  float x[f32v::width];
  store(x, a);
  for (int i = 1; i < f32v::width; ++i) x[0] = x[i] > x[0] ? x[i] : x[0];
  return x[0];
}

#endif

// The lanes of a row: full(c) at every whole vector, then tail(c, n) once for the n < width that are left.
template <class Full, class Tail>
inline void for_lanes(std::int64_t C, Full&& full, Tail&& tail) {
  std::int64_t c = 0;
  for (; c + f32v::width <= C; c += f32v::width) full(c);
  if (c < C) tail(c, static_cast<int>(C - c));
}

}  // namespace effvlm::EFFVLM_ISA
