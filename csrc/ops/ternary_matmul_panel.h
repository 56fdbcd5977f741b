// Part of ternary_matmul_cpu.cpp: many tokens. A tile's list is scattered over a panel of dense rows that stays in the cache, and
// the panel is multiplied with packed tokens.
#pragma once
#include <algorithm>

#include "core/cpu/dot4.h"
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
  alignas(64) std::uint32_t value[kTileRows * kTileColumns + 192];
};

// What a panel holds instead of −2 … 2. (Local pointers that do not alias, or bytes could be anything and nothing is vectorized.)
inline void convert_values(const std::int8_t* __restrict from, int n, int levels, std::uint8_t* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = static_cast<std::uint8_t>(from[i] + levels / 2);
}
inline void convert_values(const std::int8_t* __restrict from, int n, int, float* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = from[i];
}
inline void convert_values(const std::int8_t* __restrict from, int n, int, bf16* __restrict to) {
  for (int i = 0; i < n; ++i) to[i].bits = static_cast<std::uint16_t>(f32_to_bits(from[i]) >> 16);  // small whole numbers: exact
}

// Places in a panel, from rows and columns.
inline void places(const std::uint8_t* __restrict row, const std::uint8_t* __restrict column, int n, int pitch,
                   std::uint16_t* __restrict to) {
  for (int i = 0; i < n; ++i) to[i] = static_cast<std::uint16_t>(row[i] * kTileColumns + (column[i] & (pitch - 1)));
}

// One entry a cycle, whatever the lengths of rows.
template <class P>
void scatter(const std::uint16_t* __restrict place, const P* __restrict value, int n, P* __restrict panel) {
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    std::uint64_t four;
    std::memcpy(&four, place + i, sizeof four);
    panel[four & 0xffff] = value[i], panel[four >> 16 & 0xffff] = value[i + 1];
    panel[four >> 32 & 0xffff] = value[i + 2], panel[four >> 48] = value[i + 3];
  }
  for (; i < n; ++i) panel[place[i]] = value[i];
}

// panel[r·256 + c] = row r, column c < pitch of a tile, every value as P. Weights as bytes are shifted up by `levels / 2`, since
// dot4's first factor is unsigned; what that adds, levels/2 · Σq, is taken off again.
template <class P>
void to_panel(PanelScratch& own, int pitch, int levels, P* panel) {
  const TileList& list = own.list;
  const int n = list.count;
  P nothing{}, *value = reinterpret_cast<P*>(own.value);
  if constexpr (std::is_same_v<P, std::uint8_t>) nothing = static_cast<P>(levels / 2);
  for (int r = 0; r < kTileRows; ++r)  // whole vectors: the next row overwrites what is too much
    for (int i = list.row[r], end = list.row[r + 1]; i < end; i += 32) std::memset(own.row + i, r, 32);
  std::fill_n(panel, kTileRows * kTileColumns, nothing);
  convert_values(list.value, n, levels, value);
  places(own.row, list.column, n, pitch, own.place);
  scatter(own.place, value, n, panel);
}

#if defined(__AVX512F__)
constexpr int kPanelRows = 12, kPanelBlocks = 2;
#elif defined(__AVX2__)
constexpr int kPanelRows = 6, kPanelBlocks = 1;
#else
constexpr int kPanelRows = 2, kPanelBlocks = 1;
#endif
static_assert(kTernaryRows % kPanelRows == 0 && kTernaryBlock % i32v::width == 0);

// total[i·stride + b·16 + l] += m·(Σ_k panel[i][k]·q[k] − z·Σq) of kPanelRows rows and NB blocks of 16 tokens, whose words of
// four bytes are `block` apart; m and z·Σq per token.
template <int NB>
inline void multiply_panel(const std::uint8_t* panel, int pitch, const std::int8_t* q, std::int64_t block, const std::int32_t* m,
                           const std::int32_t* shift, std::int32_t* total, std::int64_t stride) {
  constexpr int V = static_cast<int>(kTernaryBlock) / i32v::width;
  i32v sum[kPanelRows][NB * V];
  for (auto& row : sum)
    for (auto& s : row) s = set1_i32(0);
  for (int k = 0; k < pitch; k += 4) {
    i32v tokens[NB * V];
    for (int v = 0; v < NB * V; ++v) tokens[v] = load_bytes(q + v / V * block + k * kTernaryBlock + v % V * 4 * i32v::width);
    for (int i = 0; i < kPanelRows; ++i) {
      std::int32_t four;
      std::memcpy(&four, panel + i * kTileColumns + k, 4);
      const i32v weights = set1_i32(four);
      for (int v = 0; v < NB * V; ++v) sum[i][v] = dot4(sum[i][v], weights, tokens[v]);
    }
  }
  for (int v = 0; v < NB * V; ++v) {
    const i32v steps = load_i32(m + v * i32v::width), off = load_i32(shift + v * i32v::width);
    for (int i = 0; i < kPanelRows; ++i) {
      std::int32_t* to = total + i * stride + v * i32v::width;
      store_i32(to, load_i32(to) + steps * (sum[i][v] - off));
    }
  }
}

// All rows of a panel (a multiple of kPanelRows) with `count` tokens in blocks.
inline void multiply_panels(const std::uint8_t* panel, std::int64_t rows, int pitch, const std::int8_t* q, std::int64_t block,
                            std::int64_t count, const std::int32_t* m, const std::int32_t* shift, std::int32_t* total,
                            std::int64_t stride) {
  constexpr std::int64_t kPass = kPanelBlocks * kTernaryBlock;
  for (std::int64_t c = 0; c < count; c += kPass)
    for (std::int64_t r = 0; r < rows; r += kPanelRows) {
      const std::uint8_t* from = panel + r * kTileColumns;
      const std::int8_t* tokens = q + c / kTernaryBlock * block;
      if (count - c > kPass - kTernaryBlock) {
        multiply_panel<kPanelBlocks>(from, pitch, tokens, block, m + c, shift + c, total + r * stride + c, stride);
      } else {
        multiply_panel<1>(from, pitch, tokens, block, m + c, shift + c, total + r * stride + c, stride);
      }
    }
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
