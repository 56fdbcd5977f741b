// Vectors of elements that do not lie side by side, for instance the columns of row-major (D, few) matrices.
#pragma once
#include <algorithm>

#include "core/cpu/simd.h"

namespace effvlm::EFFVLM_ISA {

#if defined(__AVX512BW__)
inline __mmask32 first_words(std::int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1; }

// p[0], p[stride] … p[15·stride] for strides up to 4: whole blocks are read and permuted, nothing after the last element is read.
template <class T>
inline f32v load_strided(const T* p, int stride) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i at = _mm512_mullo_epi32(lane, _mm512_set1_epi32(stride));
  const int span = 15 * stride + 1;
  if constexpr (sizeof(T) == 2) {
    const __m512i low = _mm512_maskz_loadu_epi16(first_words(span), p);
    const __m512i high = _mm512_maskz_loadu_epi16(first_words(span - 32), p + 32);
    const __m512i words = _mm512_permutex2var_epi16(low, _mm512_castsi256_si512(_mm512_cvtepi32_epi16(at)), high);
    return widen(_mm512_castsi512_si256(words), T{});
  } else {
    __m512 part[4];
    for (int i = 0; i < 4; ++i)
      part[i] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_words(std::min(16, span - 16 * i))), p + 16 * i);
    const __m512 low = _mm512_permutex2var_ps(part[0], at, part[1]), high = _mm512_permutex2var_ps(part[2], at, part[3]);
    return {_mm512_mask_mov_ps(low, _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(32)), high)};
  }
}
#endif

// The n elements p[0], p[stride], … and zeros up to a whole vector.
template <class T>
inline f32v load_strided(const T* p, std::int64_t stride, int n) {
  if (stride == 1 && n == f32v::width) return load(p);
#if defined(__AVX512BW__)
  if (stride > 1 && stride <= 4 && n == f32v::width) return load_strided(p, static_cast<int>(stride));
#endif
  float lanes[f32v::width] = {};
  for (int i = 0; i < n; ++i) lanes[i] = to_f32(p[i * stride]);
  return load(lanes);
}

// to[j·to_stride + d] = from[d·stride_d + j·stride_j] for d < rows, j < columns; to_stride: rows rounded up to whole vectors.
template <class T>
inline void columns(const T* from, std::int64_t stride_d, std::int64_t stride_j, std::int64_t rows, std::int64_t count, float* to,
                    std::int64_t to_stride) {
  for (std::int64_t d = 0; d < rows; d += f32v::width) {
    const int n = static_cast<int>(std::min<std::int64_t>(f32v::width, rows - d));
    for (std::int64_t j = 0; j < count; ++j)
      store(to + j * to_stride + d, load_strided(from + d * stride_d + j * stride_j, stride_d, n));
  }
}

}  // namespace effvlm::EFFVLM_ISA
