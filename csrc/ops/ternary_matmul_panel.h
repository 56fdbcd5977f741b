// Part of ternary_matmul_cpu.cpp: many tokens in bf16 on machines with tiles. A tile's list is scattered over a panel of dense
// rows that stays in the cache, and the panel is multiplied with packed tokens.
#pragma once
#include <algorithm>

#include "core/cpu/gap_planes_read.h"
#include "ops/moe_ffn_product.h"
#include "ops/ternary_matmul.h"

namespace effvlm::EFFVLM_ISA {
namespace {

// A tile's list, and room to work out where in a panel its entries go.
struct PanelScratch {
  TileList list;
  alignas(64) std::uint8_t row[kTileRows * kTileColumns + 192];
  alignas(64) std::uint16_t place[kTileRows * kTileColumns + 192];
  alignas(64) bf16 value[kTileRows * kTileColumns + 192];
};

// (Local pointers that do not alias, or bytes could be anything and nothing is vectorized.)
inline void convert_values(const std::int8_t* __restrict from, int n, bf16* __restrict to) {
  for (int i = 0; i < n; ++i) to[i].bits = static_cast<std::uint16_t>(f32_to_bits(from[i]) >> 16);  // small whole numbers: exact
}

// Places in a panel, from rows and columns.
inline void places(const std::uint8_t* __restrict row, const std::uint8_t* __restrict column, int n, int pitch,
                   std::uint16_t* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = static_cast<std::uint16_t>(row[i] * kTileColumns + (column[i] & (pitch - 1)));
}

// One entry a cycle, whatever the lengths of rows.
inline void scatter(const std::uint16_t* __restrict place, const bf16* __restrict value, int n, bf16* __restrict panel) {
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    std::uint64_t four;
    std::memcpy(&four, place + i, sizeof four);
    panel[four & 0xffff] = value[i], panel[four >> 16 & 0xffff] = value[i + 1];
    panel[four >> 32 & 0xffff] = value[i + 2], panel[four >> 48] = value[i + 3];
  }
  for (; i < n; ++i) panel[place[i]] = value[i];
}

// panel[r·256 + c] = row r, column c < pitch of a tile.
inline void to_panel(PanelScratch& own, int pitch, bf16* panel) {
  const TileList& list = own.list;
  for (int r = 0; r < kTileRows; ++r)  // whole vectors: the next row overwrites what is too much
    for (int i = list.row[r], end = list.row[r + 1]; i < end; i += 64) std::memset(own.row + i, r, 64);
  std::fill_n(panel, kTileRows * kTileColumns, bf16{});
  convert_values(list.value, list.count, own.value);
  places(own.row, list.column, list.count, pitch, own.place);
  scatter(own.place, own.value, list.count, panel);
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
