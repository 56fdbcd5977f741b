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
    for (int i = list.row[r], end = list.row[r + 1]; i < end; i += 64) std::memset(own.row + i, r, 64);
  std::fill_n(panel, kTileRows * kTileColumns, nothing);
  convert_values(list.value, n, levels, value);
  places(own.row, list.column, n, pitch, own.place);
  scatter(own.place, value, n, panel);
}

#if defined(__AVX512F__)
constexpr int kPanelSums = 16, kPanelBlocks = 2;  // with 24 sums, GCC 12 keeps copies of them in memory
#elif defined(__AVX2__)
constexpr int kPanelSums = 8, kPanelBlocks = 1;
#else
constexpr int kPanelSums = 8, kPanelBlocks = 1;
#endif
// Registers of sums per row, and rows together, for NB blocks of tokens.
template <int NB>
constexpr int kRowSums = NB * static_cast<int>(kTernaryBlock) / i32v::width;
template <int NB>
constexpr int kPanelRows = kPanelSums / kRowSums<NB>;
static_assert(kTileRows % kPanelRows<1> == 0 && kTernaryBlock % i32v::width == 0);

// part[i][b·16 + l] = Σ_k panel[i][k]·q[k] of kPanelRows<NB> rows and NB blocks of 16 tokens, whose words of four bytes are
// `block` apart. Not inlined, flat, and the registers of a row spelled out: else GCC keeps the sums in memory.
template <int NB>
__attribute__((noinline)) void multiply_block(const std::uint8_t* panel, int pitch, const std::int8_t* q, std::int64_t block,
                                              std::int32_t* part) {
  constexpr int W = kRowSums<NB>, V = kRowSums<1>, R = kPanelRows<NB>;
  static_assert(W == 1 || W == 2 || W == 4);
  i32v sum[R][W];
  for (auto& row : sum) {
    row[0] = set1_i32(0);
    if constexpr (W > 1) row[1] = set1_i32(0);
    if constexpr (W > 2) row[2] = row[3] = set1_i32(0);
  }
  for (int k = 0; k < pitch; k += 4) {
    i32v tokens[W];
    for (int v = 0; v < W; ++v) tokens[v] = load_bytes(q + v / V * block + k * kTernaryBlock + v % V * 4 * i32v::width);
    for (int i = 0; i < R; ++i) {
      std::int32_t four;
      std::memcpy(&four, panel + i * kTileColumns + k, 4);
      const i32v weights = set1_i32(four);
      sum[i][0] = dot4(sum[i][0], weights, tokens[0]);
      if constexpr (W > 1) sum[i][1] = dot4(sum[i][1], weights, tokens[1]);
      if constexpr (W > 2) sum[i][2] = dot4(sum[i][2], weights, tokens[2]), sum[i][3] = dot4(sum[i][3], weights, tokens[3]);
    }
  }
  for (int i = 0; i < R; ++i, part += W * i32v::width) {
    store_i32(part, sum[i][0]);
    if constexpr (W > 1) store_i32(part + i32v::width, sum[i][1]);
    if constexpr (W > 2) store_i32(part + 2 * i32v::width, sum[i][2]), store_i32(part + 3 * i32v::width, sum[i][3]);
  }
}

// total[i·stride + l] += m[l]·(part − shift[l]), the tokens' steps and z·Σq, for NB blocks of 16 tokens.
template <int NB>
inline void multiply_panel(const std::uint8_t* panel, int pitch, const std::int8_t* q, std::int64_t block, const std::int32_t* m,
                           const std::int32_t* shift, std::int32_t* total, std::int64_t stride) {
  alignas(64) std::int32_t part[kPanelRows<NB>][NB * kTernaryBlock];
  multiply_block<NB>(panel, pitch, q, block, part[0]);
  for (int i = 0; i < kPanelRows<NB>; ++i)
    for (int l = 0; l < NB * kTernaryBlock; l += i32v::width) {
      std::int32_t* to = total + i * stride + l;
      store_i32(to, load_i32(to) + load_i32(m + l) * (load_i32(part[i] + l) - load_i32(shift + l)));
    }
}

template <int NB>
void multiply_rows(const std::uint8_t* panel, std::int64_t rows, int pitch, const std::int8_t* q, std::int64_t block,
                   const std::int32_t* m, const std::int32_t* shift, std::int32_t* total, std::int64_t stride) {
  for (std::int64_t r = 0; r < rows; r += kPanelRows<NB>)
    multiply_panel<NB>(panel + r * kTileColumns, pitch, q, block, m, shift, total + r * stride, stride);
}

// All rows of a panel, some tiles, with `count` tokens in blocks.
inline void multiply_panels(const std::uint8_t* panel, std::int64_t rows, int pitch, const std::int8_t* q, std::int64_t block,
                            std::int64_t count, const std::int32_t* m, const std::int32_t* shift, std::int32_t* total,
                            std::int64_t stride) {
  constexpr std::int64_t kPass = kPanelBlocks * kTernaryBlock;
  for (std::int64_t c = 0; c < count; c += kPass) {
    const std::int8_t* tokens = q + c / kTernaryBlock * block;
    count - c > kPass - kTernaryBlock
        ? multiply_rows<kPanelBlocks>(panel, rows, pitch, tokens, block, m + c, shift + c, total + c, stride)
        : multiply_rows<1>(panel, rows, pitch, tokens, block, m + c, shift + c, total + c, stride);
  }
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
