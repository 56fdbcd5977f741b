// Part of ternary_matmul_cpu.cpp: many tokens. A tile's entries each add one line of a table to their row's sums: 64 bytes, one
// column of a block of tokens. Only non-zeros are multiplied, by ±1: no dense form of the weights exists.
#pragma once
#include "core/cpu/gap_planes_read.h"
#include "core/cpu/transpose.h"
#include "ops/ternary_matmul.h"

namespace effvlm::EFFVLM_ISA {
namespace {

constexpr int kLine = 64, kVector = 4 * f32v::width, kVectors = kLine / kVector;  // bytes; a line takes so many registers
constexpr int kNothing = 4 * kTileColumns;  // the line of zeros, behind those of what entries can be (see find_places)
constexpr int kUnrolled = 8;                // rows are filled up to so many entries, so that few branches are mistaken

template <class E>
using Vector __attribute__((vector_size(kVector), may_alias)) = E;

// Where in the table a tile's entries are, in eighths of a line, row r from row[r] on.
struct Places {
  std::uint16_t row[kTileRows + 1];
  alignas(64) std::uint16_t at[kTileRows * (kTileColumns + kUnrolled) + 64];
};

// A column's line: 32 tokens' q as i16, or 16 tokens' x as f32.
struct SumScratch {
  TileList list;
  alignas(64) std::uint16_t flat[kTileRows * kTileColumns + 192];
  Places places[kTernaryRows / kTileRows];
  alignas(64) char table[(kNothing + 1) * kLine];
};

inline void place_rows(const TileList& list, std::uint16_t* flat, Places& to) {
  constexpr std::uint64_t nothing = std::uint64_t{0x0001000100010001} * (kNothing * kPlaceUnit);
  find_places(list, flat);
  int at = 0, begin = list.row[0];
  for (int r = 0; r < kTileRows; ++r) {
    const int end = list.row[r + 1], n = end - begin;
    to.row[r] = static_cast<std::uint16_t>(at);
    for (int i = 0; i == 0 || __builtin_expect(i < n, 0); i += 32) std::memcpy(to.at + at + i, flat + begin + i, 64);
    for (int i = 0; i < kUnrolled; i += 4) std::memcpy(to.at + at + n + i, &nothing, sizeof nothing);
    at += (n + kUnrolled - 1) / kUnrolled * kUnrolled, begin = end;
  }
  to.row[kTileRows] = static_cast<std::uint16_t>(at);
}

// The lines of what an entry in each of 256 columns can add: them, less them, and twice that (five levels) or nothing.
template <class E>
void make_table(const char* lines, int levels, char* table) {
  constexpr int kPlane = kTileColumns * kLine;
  for (int i = 0; i < kPlane; i += kVector) {
    const auto line = *reinterpret_cast<const Vector<E>*>(lines + i);
    *reinterpret_cast<Vector<E>*>(table + i) = line;
    *reinterpret_cast<Vector<E>*>(table + kPlane + i) = -line;
    if (levels != 5) continue;
    *reinterpret_cast<Vector<E>*>(table + 2 * kPlane + i) = line + line;
    *reinterpret_cast<Vector<E>*>(table + 3 * kPlane + i) = -line - line;
  }
}

// The sum of a row's lines, in four chains (two for whole numbers, whose additions have no latency to hide).
template <class E>
inline void sum_row(const std::uint16_t* place, int n, const char* table, Vector<E> (&sum)[kVectors]) {
  constexpr int kChains = std::is_same_v<E, float> ? 4 : 2;
  Vector<E> chain[kChains][kVectors] = {};
  for (int i = 0; i < n; i += kUnrolled)
    for (int j = 0; j < kUnrolled; j += 4) {
      std::uint64_t four;
      std::memcpy(&four, place + i + j, sizeof four);
      for (int k = 0; k < 4; ++k) {
        const char* line = table + (four >> 16 * k & 0xffff) * (kLine / kPlaceUnit);
        for (int v = 0; v < kVectors; ++v) chain[k % kChains][v] += reinterpret_cast<const Vector<E>*>(line)[v];
      }
    }
  for (int v = 0; v < kVectors; ++v) {
    if constexpr (kChains == 4) chain[0][v] = (chain[0][v] + chain[1][v]) + (chain[2][v] + chain[3][v]);
    if constexpr (kChains == 2) chain[0][v] += chain[1][v];
    sum[v] = chain[0][v];
  }
}

// total[r·stride + l] += Σ x of row r for 16 tokens l.
inline void add_tile(const Places& places, const char* table, const std::int32_t*, float* total, std::int64_t stride) {
  for (int r = 0; r < kTileRows; ++r, total += stride) {
    Vector<float> sum[kVectors];
    sum_row<float>(places.at + places.row[r], places.row[r + 1] - places.row[r], table, sum);
    for (int v = 0; v < kVectors; ++v) reinterpret_cast<Vector<float>*>(total)[v] += sum[v];
  }
}

// total[r·stride + l] += m[l] · Σ q of row r for 32 tokens l; tokens l and 16 + l are the halves of a word (see pack_pairs).
inline void add_tile(const Places& places, const char* table, const std::int32_t* m, std::int32_t* total, std::int64_t stride) {
  using Words = Vector<std::int32_t>;
  for (int r = 0; r < kTileRows; ++r, total += stride) {
    Vector<std::int16_t> sum[kVectors];
    sum_row<std::int16_t>(places.at + places.row[r], places.row[r + 1] - places.row[r], table, sum);
    for (int v = 0; v < kVectors; ++v) {
      const Words both = reinterpret_cast<Words>(sum[v]), low = reinterpret_cast<Words>(both << 16) >> 16, high = both >> 16;
      reinterpret_cast<Words*>(total)[v] += reinterpret_cast<const Words*>(m)[v] * low;
      reinterpret_cast<Words*>(total + 16)[v] += reinterpret_cast<const Words*>(m + 16)[v] * high;
    }
  }
}

// ---- tokens as lines ----

// 16 rows of words, `words` a multiple of 16: word d of row l at to[d·16 + l]; zeros for rows that are null.
inline void pack_words(const float* const* rows, std::int64_t words, float* to) {
  alignas(64) static const float zeros[16] = {};
  for (std::int64_t d = 0; d < words; d += 16, to += 16 * 16) {
    const float* row[16];
    for (int l = 0; l < 16; ++l) row[l] = rows[l] ? rows[l] + d : zeros;
    transpose_16x16(row, to, 16);
  }
}

// 32 rows of bytes, `width` a multiple of 32: column c of rows l and 16 + l as the halves of word to[c·16 + l].
inline void pack_pairs(const std::int8_t* const* rows, std::int64_t width, std::uint32_t* to) {
  alignas(64) std::int16_t wide[32][32] = {};
  alignas(64) std::uint32_t pair[2][16][16];  // of columns, 16 rows each
  for (std::int64_t c = 0; c < width; c += 32, to += 32 * 16) {
    for (int l = 0; l < 32; ++l)
      for (int i = 0; rows[l] && i < 32; ++i) wide[l][i] = rows[l][c + i];
    for (int h = 0; h < 2; ++h) {
      const float* row[16];
      for (int l = 0; l < 16; ++l) row[l] = reinterpret_cast<const float*>(wide[16 * h + l]);
      transpose_16x16(row, reinterpret_cast<float*>(pair[h]), 16);
    }
    for (int d = 0; d < 16; ++d)
      for (int l = 0; l < 16; ++l) {
        to[2 * d * 16 + l] = (pair[0][d][l] & 0xffff) | pair[1][d][l] << 16;
        to[(2 * d + 1) * 16 + l] = pair[0][d][l] >> 16 | (pair[1][d][l] & 0xffff0000);
      }
  }
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
