// Products of packed rows and packed keys, and the exponential that follows them. Part of token_score_cpu.cpp.
#pragma once
#include <type_traits>

#include "core/cpu/dot_in_place.h"
#include "core/cpu/math.h"
#include "core/cpu/transpose.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;

// A tile: kTileRows × kVectors registers of sums, a key per lane. A panel: the keys of a tile.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kVectors = 2;
#else
constexpr int kTileRows = 2, kVectors = 4;
#endif
constexpr int kPanel = kVectors * f32v::width;

// What a 32-bit word of packed rows and keys holds: two neighbouring bf16 where there is an instruction for them, else one f32.
template <class T>
constexpr bool is_paired() {
#if defined(__AVX512BF16__)
  return std::is_same_v<T, bf16>;
#else
  return false;
#endif
}

// One row as words, zeros behind it.
template <class T>
inline void pack_row(const T* from, i64 stride, i64 D, i64 words, float* to) {
  if constexpr (is_paired<T>() || std::is_same_v<T, float>) {
    T* elements = reinterpret_cast<T*>(to);
    if (stride == 1) {
      std::memcpy(static_cast<void*>(elements), from, D * sizeof(T));
    } else {
      for (i64 d = 0; d < D; ++d) elements[d] = from[d * stride];
    }
    std::memset(static_cast<void*>(elements + D), 0, words * 4 - D * sizeof(T));
  } else {
    if (stride == 1) {
      for_lanes(
          D, [&](i64 d) { store(to + d, load(from + d)); }, [&](i64 d, int rest) { store(to + d, load(from + d, rest), rest); });
    } else {
      for (i64 d = 0; d < D; ++d) to[d] = to_f32(from[d * stride]);
    }
    std::memset(to + D, 0, (words - D) * 4);
  }
}

// Keys, at most kPanel of them, as a panel: word d of key l at to[d·kPanel + l], zeros for missing keys. staged: 16 rows.
template <class T>
inline void pack_panel(const T* from, i64 stride_s, i64 stride_d, i64 count, i64 D, i64 words, float* staged, float* to) {
  const float* row[16];
  for (int l = 0; l < 16; ++l) row[l] = staged + l * words;
  for (i64 first = 0; first < kPanel; first += 16) {
    for (i64 l = 0; l < 16; ++l) {
      if (first + l < count) {
        pack_row(from + (first + l) * stride_s, stride_d, D, words, staged + l * words);
      } else {
        std::memset(staged + l * words, 0, words * 4);
      }
    }
    for (i64 d = 0; d < words; d += 16) {
      const float* at[16];
      for (int l = 0; l < 16; ++l) at[l] = row[l] + d;
      transpose_16x16(at, to + d * kPanel + first, kPanel);
    }
  }
}

// sum[r][v] = <row r, keys of vector v> for kTileRows rows, `words` apart, and V vectors of a panel.
template <class T, int V>
inline void multiply(const float* rows, i64 words, const float* panel, i64 depth, f32v (&sum)[kTileRows][V]) {
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = set1(0);
  const float* row[kTileRows];
  for (int r = 0; r < kTileRows; ++r) row[r] = rows + r * words;
  for (i64 d = 0; d < depth; ++d) {
    f32v keys[V];
    for (int v = 0; v < V; ++v) keys[v] = load(panel + d * kPanel + v * f32v::width);
    for (int r = 0; r < kTileRows; ++r) {
      const f32v word = set1(row[r][d]);
      for (int v = 0; v < V; ++v) {
#if defined(__AVX512BF16__)
        if constexpr (is_paired<T>()) {
          sum[r][v].v = dot_pairs(sum[r][v].v, _mm512_castps_si512(word.v), _mm512_castps_si512(keys[v].v));
          continue;
        }
#endif
        sum[r][v] = fma(word, keys[v], sum[r][v]);
      }
    }
  }
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
