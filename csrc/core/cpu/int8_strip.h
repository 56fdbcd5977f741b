// int8 × int8 dot products of a few rows with many: sums are exact integers. VNNI, or AMX tiles where the level has them.
//
// Layout: a rows are bytes shifted by 128 to unsigned, row-major, K bytes each. b comes in panels of 16 rows, element (k, lane)
// of a panel at [k/4][lane][k%4]; both are padded with zeros (of b) to K % 64 = 0.
#pragma once
#include <cstdint>

#include "core/cpu/amx.h"
#include "core/cpu/dot_in_place.h"
#include "core/cpu/simd.h"

#if defined(__AVX512VNNI__)
namespace effvlm::EFFVLM_ISA {

constexpr int kPanel = 16;                   // rows of b in a panel, one per lane
constexpr std::int64_t kInt8MaxK = 1 << 15;  // 255·127·K stays below 2^31

#if defined(EFFVLM_HAS_AMX)
constexpr int kStripRows = 64, kBlockRows = 32, kBlockPanels = 2;

// sums[row][panel*16 + lane] for kBlockRows rows of a and `panels` (1 or 2) panels of b. Tiles 0-3 sums, 4-5 a, 6-7 b.
inline void int8_block(const std::uint8_t* a, std::int64_t K, const std::int8_t* b, std::int64_t panels, std::int32_t* sums) {
  const std::int8_t* b1 = panels > 1 ? b + kPanel * K : b;  // a lone panel is multiplied twice, the copy ignored
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t k = 0; k < K; k += 64) {
    _tile_loadd(4, a + k, K);
    _tile_loadd(5, a + 16 * K + k, K);
    _tile_loadd(6, b + k * kPanel, 64);
    _tile_loadd(7, b1 + k * kPanel, 64);
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 16 * 32, 128);
  _tile_stored(3, sums + 16 * 32 + 16, 128);
}

#else
constexpr int kStripRows = 48, kBlockRows = 12, kBlockPanels = 2;  // 24 sums + 2 panels + broadcasts fill the 32 registers
struct TileScope {};

inline void int8_block(const std::uint8_t* a, std::int64_t K, const std::int8_t* b, std::int64_t panels, std::int32_t* sums) {
  const std::int8_t* b1 = panels > 1 ? b + kPanel * K : b;
  __m512i sum[kBlockRows][2];
  for (auto& row : sum) row[0] = row[1] = _mm512_setzero_si512();
  for (std::int64_t k = 0; k < K; k += 4) {
    const __m512i vb0 = _mm512_load_si512(b + k * kPanel), vb1 = _mm512_load_si512(b1 + k * kPanel);
    for (int i = 0; i < kBlockRows; ++i) {
      std::int32_t four;
      std::memcpy(&four, a + i * K + k, 4);
      const __m512i va = _mm512_set1_epi32(four);
      sum[i][0] = dot_bytes(sum[i][0], va, vb0);
      sum[i][1] = dot_bytes(sum[i][1], va, vb1);
    }
  }
  for (int i = 0; i < kBlockRows; ++i) {
    _mm512_store_si512(sums + i * 32, sum[i][0]);
    _mm512_store_si512(sums + i * 32 + 16, sum[i][1]);
  }
}
#endif

}  // namespace effvlm::EFFVLM_ISA
#endif
