// 16 × 16 transposition of 32-bit words; bits are moved, not looked at.
#pragma once
#include "core/cpu/simd.h"

namespace effvlm::EFFVLM_ISA {

// to[j·to_stride + i] = from[i][j] for i, j < 16; the stride in words.
inline void transpose_16x16(const float* const* from, float* to, std::int64_t to_stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(from[i]);
  for (int i = 0; i < 16; i += 2) {  // pairs of rows: 2 × 2 within each 128 bits
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)  // 4 × 4
    for (int h = 0; h < 2; ++h) {
      const __m512d x = _mm512_castps_pd(b[i + h]), y = _mm512_castps_pd(b[i + h + 2]);
      a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  for (int i = 0; i < 4; ++i)  // now a[4·g + i] holds, per 128 bits q, column 4·q + i of rows 4·g … 4·g + 3
    for (int g = 0; g < 2; ++g) {
      b[8 * g + i] = _mm512_shuffle_f32x4(a[8 * g + i], a[8 * g + 4 + i], 0x88);
      b[8 * g + 4 + i] = _mm512_shuffle_f32x4(a[8 * g + i], a[8 * g + 4 + i], 0xdd);
    }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(to + i * to_stride, _mm512_shuffle_f32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_ps(to + (8 + i) * to_stride, _mm512_shuffle_f32x4(b[i], b[8 + i], 0xdd));
    _mm512_storeu_ps(to + (4 + i) * to_stride, _mm512_shuffle_f32x4(b[4 + i], b[12 + i], 0x88));
    _mm512_storeu_ps(to + (12 + i) * to_stride, _mm512_shuffle_f32x4(b[4 + i], b[12 + i], 0xdd));
  }
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) std::memcpy(to + j * to_stride + i, from[i] + j, sizeof(float));
#endif
}

}  // namespace effvlm::EFFVLM_ISA
