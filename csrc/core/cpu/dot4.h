// i32v: one vector register of i32, and sums of products of four bytes, u8 × s8, exact for u8 up to 4.
#pragma once
#include "core/cpu/simd.h"

namespace effvlm::EFFVLM_ISA {

#if defined(__AVX512F__)
struct i32v {
  static constexpr int width = 16;
  __m512i v;
};
inline i32v set1_i32(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
inline i32v load_i32(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_i32(std::int32_t* p, i32v x) { _mm512_storeu_si512(p, x.v); }
inline i32v load_bytes(const std::int8_t* p) { return {_mm512_loadu_si512(p)}; }
inline i32v operator+(i32v a, i32v b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline i32v operator*(i32v a, i32v b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
// Lane l: sum + Σ_j u[j]·s[4·l + j], with the four bytes u of every lane.
inline i32v dot4(i32v sum, i32v u, i32v s) {
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(_mm512_maddubs_epi16(u.v, s.v), _mm512_set1_epi16(1)))};
}
#elif defined(__AVX2__)
struct i32v {
  static constexpr int width = 8;
  __m256i v;
};
inline i32v set1_i32(std::int32_t x) { return {_mm256_set1_epi32(x)}; }
inline i32v load_i32(const std::int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline void store_i32(std::int32_t* p, i32v x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.v); }
inline i32v load_bytes(const std::int8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline i32v operator+(i32v a, i32v b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline i32v operator*(i32v a, i32v b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
inline i32v dot4(i32v sum, i32v u, i32v s) {
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(_mm256_maddubs_epi16(u.v, s.v), _mm256_set1_epi16(1)))};
}
#else
struct i32v {
  static constexpr int width = 4;
  typedef std::int32_t Lanes __attribute__((vector_size(16)));
  Lanes v;
};
inline i32v set1_i32(std::int32_t x) { return {i32v::Lanes{x, x, x, x}}; }
inline i32v load_i32(const std::int32_t* p) {
  i32v x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store_i32(std::int32_t* p, i32v x) { std::memcpy(p, &x, sizeof x); }
inline i32v load_bytes(const std::int8_t* p) {
  i32v x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline i32v operator+(i32v a, i32v b) { return {a.v + b.v}; }
inline i32v operator*(i32v a, i32v b) { return {a.v * b.v}; }
inline i32v dot4(i32v sum, i32v u, i32v s) {
  std::uint8_t a[16];
  std::int8_t b[16];
  std::memcpy(a, &u, sizeof a);
  std::memcpy(b, &s, sizeof b);
  for (int l = 0; l < 4; ++l)
    for (int j = 0; j < 4; ++j) sum.v[l] += a[4 * l + j] * b[4 * l + j];
  return sum;
}
#endif

}  // namespace effvlm::EFFVLM_ISA
