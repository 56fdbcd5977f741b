// Part of moe_ffn_cpu.cpp: dot products of weight rows with tokens, for few tokens and for many.
//
// Weights are read where they are, row-major, in both. Few tokens: rows stream by, each dot product is summed across the lanes
// of its registers at the end. Many: tokens are packed in blocks of 16, one to a lane, and weights are broadcast, so that nothing
// is summed across lanes and the packing, of the smaller operand, is paid once for all rows.
#pragma once
#include <type_traits>

#include "core/cpu/amx.h"
#include "core/cpu/dot.h"
#include "core/cpu/transpose.h"
#include "ops/moe_ffn.h"

namespace effvlm::EFFVLM_ISA {
namespace {

constexpr int kLanes = kMoeBlock;

#if defined(__AVX512F__)
constexpr int kCachedRows = 4, kCachedTokens = 6;  // few tokens: 24 sums at most
constexpr int kManyRows = 12, kBlocks = 2;         // many: 24 sums, 2 blocks, one weight
#else
constexpr int kCachedRows = 4, kCachedTokens = 3;
constexpr int kManyRows = 48 / kLanes * f32v::width / 4, kBlocks = 1;  // 12 sums
#endif

constexpr std::int64_t kCachedBytes = 1 << 17;  // of rows that stay in the second-level cache

static_assert(kManyRows <= kMoeCopiedRows && kMoeTokens % (kBlocks * kLanes) == 0);

// Whether T's products are taken two at a time (a lane is then a pair of elements), or in f32.
template <class T>
constexpr bool kPairs = DotLanes<T>::width == 2 * f32v::width;

// ---- rows that are not contiguous ----

// to[i·to_stride + c] = from[i·stride + c·stride_c] for i < R, c < C. Where it is the rows that are next to each other in memory
// (weights stored transposed), 16 rows at a time as 32-bit words: two channels of 16 bits, or one of 32.
template <class T>
void copy_rows(const T* from, std::int64_t stride, std::int64_t stride_c, std::int64_t R, std::int64_t C, T* to,
               std::int64_t to_stride) {
  constexpr std::int64_t kPer = 4 / sizeof(T), kStep = 16 * kPer;  // channels of a word, and of 16 words
  const std::int64_t whole_r = stride == 1 ? R / 16 * 16 : 0, whole_c = C / kStep * kStep;
  for (std::int64_t c = 0; c < whole_c; c += kStep)
    for (std::int64_t r = 0; r < whole_r; r += 16) {
      alignas(64) std::uint32_t word[16][16];
      const float* row[16];
      for (int d = 0; d < 16; ++d) {
        const T* first = from + r + (c + d * kPer) * stride_c;
        if (c + 2 * kStep <= C)
          for (int k = 0; k < kPer; ++k) __builtin_prefetch(first + (kStep + k) * stride_c);
        if constexpr (kPer == 1) {
          row[d] = first;
        } else {
          const T* second = first + stride_c;
          for (int l = 0; l < 16; ++l) word[d][l] = first[l].bits | static_cast<std::uint32_t>(second[l].bits) << 16;
          row[d] = reinterpret_cast<const float*>(word[d]);
        }
      }
      transpose_16x16(row, reinterpret_cast<float*>(to + r * to_stride + c), to_stride / kPer);
    }
  for (std::int64_t c = 0; c < C; ++c)
    for (std::int64_t r = c < whole_c ? whole_r : 0; r < R; ++r) to[r * to_stride + c] = from[r * stride + c * stride_c];
}

// ---- few tokens ----

// out[j·stride + r] = <rows[r], tokens[j]> + bias[r] for r < R rows and NR tokens, MR rows at a time.
template <class T, int MR, int NR, int Chains>
void product_of(const T* const* rows, std::int64_t R, const T* const* tokens, std::int64_t C, const float* bias, float* out,
                std::int64_t stride) {
  for (std::int64_t r = 0; r < R; r += MR) {
    float sums[MR * NR];
    const T* row[MR];
    for (int i = 0; i < MR; ++i) row[i] = rows[r + i < R ? r + i : R - 1];
    dots<T, MR, NR, Chains>(row, tokens, C, sums);
    for (int j = 0; j < NR; ++j)
      for (int i = 0; i < MR && r + i < R; ++i) out[j * stride + r + i] = sums[j * MR + i] + bias[r + i];
  }
}

// The same for `count` tokens and rows that are in the cache: several together, so that both are loaded less often.
template <class T, int NR = kCachedTokens>
void product_cached(const T* const* rows, std::int64_t R, const T* const* tokens, std::int64_t count, std::int64_t C,
                    const float* bias, float* out, std::int64_t stride) {
  if constexpr (NR > 1)
    if (count < NR) return product_cached<T, NR - 1>(rows, R, tokens, count, C, bias, out, stride);
  if (count == 0) return;
  product_of<T, kCachedRows, NR, (NR == 1 ? 4 : NR <= kCachedTokens / 2 ? 2 : 1)>(rows, R, tokens, C, bias, out, stride);
  product_cached<T>(rows, R, tokens + NR, count - NR, C, bias, out + NR * stride, stride);
}

// The same for rows in memory. They pass by one after the other for the first two tokens: memory delivers one long stream up to
// twice as fast as several short rows at a time, whose starts the processor's prefetchers follow less well; and more tokens would
// hold the stream up. The other tokens find a few rows in the cache.
template <class T>
void product_few(const T* const* rows, std::int64_t R, const T* const* tokens, std::int64_t count, std::int64_t C,
                 const float* bias, float* out, std::int64_t stride) {
  const std::int64_t bytes = C * static_cast<std::int64_t>(sizeof(T)), some = count <= 2 ? R : kCachedBytes / (bytes + 1) + 8;
  for (std::int64_t r = 0; r < R; r += some) {
    const std::int64_t n = R - r < some ? R - r : some;
    if (count == 1) {
      product_of<T, 1, 1, 4>(rows + r, n, tokens, C, bias + r, out + r, stride);
    } else {
      product_of<T, 1, 2, 4>(rows + r, n, tokens, C, bias + r, out + r, stride);
      product_cached<T>(rows + r, n, tokens + 2, count - 2, C, bias + r, out + r + 2 * stride, stride);
    }
  }
}

// ---- many tokens ----

// Words of 32 bits that a block takes: per element of C (f32) or pair of elements, one for each lane.
template <class T>
constexpr std::int64_t block_words(std::int64_t C) {
  return (kPairs<T> ? (C + 1) / 2 : C) * kLanes;
}

// A block: word d of token l at to[d·16 + l], zeros for the lanes past `count`.
template <class T>
void pack_block(const T* const* tokens, std::int64_t count, std::int64_t C, float* to) {
  constexpr bool kWords = kPairs<T> || std::is_same_v<T, float>;   // words are read where they are
  constexpr std::int64_t kStep = kPairs<T> ? 2 * kLanes : kLanes;  // elements that fill 16 words
  alignas(64) float tile[kLanes * kLanes] = {};
  for (std::int64_t c = 0; c < C; c += kStep, to += kLanes * kLanes) {
    const std::int64_t n = C - c < kStep ? C - c : kStep, words = block_words<T>(n) / kLanes;
    const float* row[kLanes];
    for (int l = 0; l < kLanes; ++l) row[l] = tile + l * kLanes;
    for (std::int64_t l = 0; l < count; ++l) {
      float* copy = tile + l * kLanes;
      if constexpr (!kWords) {
        for_lanes(
            n, [&](std::int64_t i) { store(copy + i, load(tokens[l] + c + i)); },
            [&](std::int64_t i, int rest) { store(copy + i, load(tokens[l] + c + i, rest), rest); });
      } else if (n == kStep) {
        row[l] = reinterpret_cast<const float*>(tokens[l] + c);
      } else {
        if (n % 2) copy[n / 2] = 0;  // the other half of an odd last pair
        std::memcpy(copy, tokens[l] + c, n * sizeof(T));
      }
    }
    if (words == kLanes) {
      transpose_16x16(row, to, kLanes);
    } else {
      for (std::int64_t d = 0; d < words; ++d)
        for (int l = 0; l < kLanes; ++l) std::memcpy(to + d * kLanes + l, row[l] + d, sizeof(float));
    }
  }
}

// One weight (or pair) in all lanes, times a vector of tokens.
template <class T>
struct Broadcast {
  static f32v take(const float* row, std::int64_t d) { return set1(row[d]); }
  static f32v mac(f32v sum, f32v weight, f32v tokens) { return fma(weight, tokens, sum); }
};
#if defined(__AVX512BF16__)
template <>
struct Broadcast<bf16> {
  static f32v take(const float* row, std::int64_t d) { return set1(row[d]); }  // the bits of two bf16
  static f32v mac(f32v sum, f32v weight, f32v tokens) {
    return {dot_pairs(sum.v, _mm512_castps_si512(weight.v), _mm512_castps_si512(tokens.v))};
  }
};
#endif

// sums[i][b·16 + l] = bias[i] + Σ_d row_i[d]·block_b[d][l] over `words` words; rows and blocks as words. `next`, where not null,
// are the rows that will be wanted next: memory fetches them while the units are busy with these.
template <class T, int NB>
inline void product_of_blocks(const float* const* rows, const float* const* next, const float* blocks, std::int64_t block_stride,
                              std::int64_t words, const float* bias, float* sums) {
  constexpr int V = kLanes / f32v::width;
  f32v sum[kManyRows][NB * V];
  for (int i = 0; i < kManyRows; ++i)
    for (int v = 0; v < NB * V; ++v) sum[i][v] = set1(bias[i]);
  const auto step = [&](std::int64_t d) {
    f32v tokens[NB * V];
    for (int v = 0; v < NB * V; ++v) tokens[v] = load(blocks + v / V * block_stride + d * kLanes + v % V * f32v::width);
    for (int i = 0; i < kManyRows; ++i) {
      const f32v weight = Broadcast<T>::take(rows[i], d);
      for (int v = 0; v < NB * V; ++v) sum[i][v] = Broadcast<T>::mac(sum[i][v], weight, tokens[v]);
    }
  };
  constexpr std::int64_t kLine = 16;  // words
  std::int64_t d = 0;
  for (; d + kLine <= words; d += kLine) {
    for (int i = 0; next && i < kManyRows; ++i) __builtin_prefetch(next[i] + d, 0, 2);
    for (int k = 0; k < kLine; ++k) step(d + k);
  }
  for (; d < words; ++d) step(d);
  for (int i = 0; i < kManyRows; ++i)
    for (int v = 0; v < NB * V; ++v) store(sums + i * NB * kLanes + v * f32v::width, sum[i][v]);
}

// Rows as words: in place where a word is an element or a pair; else as f32 in `copy`. An odd last element is paired with zero.
template <class T>
struct WordRows {
  const float* row[kManyRows];
  const T* whole[kManyRows];

  WordRows(const T* const* rows, std::int64_t R, std::int64_t C, float* copy) {
    for (int i = 0; i < kManyRows; ++i) {
      whole[i] = rows[i < R ? i : R - 1];
      if constexpr (kPairs<T> || std::is_same_v<T, float>) {
        row[i] = reinterpret_cast<const float*>(whole[i]);
        if (C % 2 == 0 || !kPairs<T>) continue;
        std::memset(copy + (i + 1) * ((C + 1) / 2) - 1, 0, sizeof(float));
        std::memcpy(copy + i * ((C + 1) / 2), whole[i], C * sizeof(T));
        row[i] = copy + i * ((C + 1) / 2);
      } else {
        for_lanes(
            C, [&](std::int64_t c) { store(copy + i * C + c, load(whole[i] + c)); },
            [&](std::int64_t c, int n) { store(copy + i * C + c, load(whole[i] + c, n), n); });
        row[i] = copy + i * C;
      }
    }
  }
};

// out[c·kMoeSums + r] = sums[r·width + c] for kManyRows rows and `width` tokens. May write what is to come, up to r + 16.
inline void turn(const float* sums, std::int64_t width, std::int64_t left, float* out) {
  if constexpr (f32v::width == kLanes) {
    for (std::int64_t c = 0; c < width; c += kLanes) {
      const float* row[kLanes];
      for (int i = 0; i < kLanes; ++i) row[i] = sums + i * width + c;
      transpose_16x16(row, out + c * kMoeSums, kMoeSums);
    }
  } else {
    for (std::int64_t c = 0; c < width; ++c)
      for (std::int64_t i = 0; i < left; ++i) out[c * kMoeSums + i] = sums[i * width + c];
  }
}

#if defined(EFFVLM_HAS_AMX)
// Tiles: a tile of weights is 16 rows × 32 elements as they stand in memory, and 16 words of a packed block are the other
// operand.
constexpr std::int64_t kAmxRows = 16, kAmxWords = 16, kAmxPass = 32;

// Whether the next rows are tiles: so many, at one distance, and whole words.
inline bool are_tiles(const bf16* const* rows, std::int64_t R, std::int64_t words) {
  if (R < kAmxRows || words % kAmxWords) return false;
  for (int i = 2; i < kAmxRows; ++i)
    if (rows[i] - rows[0] != i * (rows[1] - rows[0])) return false;
  return true;
}

// sums[i·32 + l] for two tiles of rows and two blocks of tokens (either pair may be the same twice). Tiles 0-3 sums, 4-5 rows,
// 6-7 blocks.
inline void product_of_tiles(const bf16* const* rows, const bf16* const* more_rows, const float* block, const float* more,
                             std::int64_t words, float* sums) {
  const std::int64_t bytes = 2 * (rows[1] - rows[0]), more_bytes = 2 * (more_rows[1] - more_rows[0]);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t d = 0; d < words; d += kAmxWords) {
    _tile_loadd(4, rows[0] + 2 * d, bytes);
    _tile_loadd(5, more_rows[0] + 2 * d, more_bytes);
    _tile_loadd(6, block + d * kLanes, 64);
    _tile_loadd(7, more + d * kLanes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 16 * 32, 128);
  _tile_stored(3, sums + 16 * 32 + 16, 128);
}

// As many of the next rows as are tiles, two at a time; returns how many rows that were.
inline std::int64_t product_of_tile_rows(const bf16* const* rows, std::int64_t R, const float* blocks, std::int64_t block_stride,
                                         std::int64_t count, std::int64_t words, const float* bias, float* out) {
  if (!are_tiles(rows, R, words)) return 0;
  const bool both = are_tiles(rows + kAmxRows, R - kAmxRows, words);
  [[maybe_unused]] const TileScope tiles;
  alignas(64) float sums[2 * kAmxRows * kAmxPass];
  for (std::int64_t c = 0; c < count; c += kAmxPass) {
    const float* block = blocks + c / kLanes * block_stride;
    product_of_tiles(rows, both ? rows + kAmxRows : rows, block, count - c > kLanes ? block + block_stride : block, words, sums);
    for (std::int64_t i = 0; i < (both ? 2 : 1) * kAmxRows; ++i)
      for (std::int64_t l = 0; l < kAmxPass; l += f32v::width)
        store(sums + i * kAmxPass + l, load(sums + i * kAmxPass + l) + set1(bias[i]));
    turn(sums, kAmxPass, kAmxRows, out + c * kMoeSums);
    if (both) turn(sums + kAmxRows * kAmxPass, kAmxPass, kAmxRows, out + c * kMoeSums + kAmxRows);
  }
  return both ? 2 * kAmxRows : kAmxRows;
}
#endif

// out[c·kMoeSums + r] for `count` tokens in packed blocks. copy: room for kManyRows rows as words.
template <class T>
void product_many(const T* const* rows, std::int64_t R, const float* blocks, std::int64_t block_stride, std::int64_t count,
                  std::int64_t C, const float* bias, float* out, float* copy) {
  constexpr std::int64_t kPass = kBlocks * kLanes;
  const std::int64_t words = block_words<T>(C) / kLanes;
  alignas(64) float sums[16 * kPass] = {};
  for (std::int64_t r = 0; r < R; r += kManyRows) {
#if defined(EFFVLM_HAS_AMX)
    if constexpr (kPairs<T>)
      while (std::int64_t done = product_of_tile_rows(rows + r, R - r, blocks, block_stride, count, words, bias + r, out + r))
        r += done;
    if (r >= R) break;
#endif
    const WordRows<T> word(rows + r, R - r, C, copy);
    float some_bias[kManyRows];
    const float* later[kManyRows];
    for (int i = 0; i < kManyRows; ++i) {
      some_bias[i] = bias[r + i < R ? r + i : R - 1];
      later[i] = reinterpret_cast<const float*>(rows[r + kManyRows + i < R ? r + kManyRows + i : R - 1]);
    }
    for (std::int64_t c = 0; c < count; c += kPass) {
      const float* block = blocks + c / kLanes * block_stride;
      const bool full = count - c > kPass - kLanes;
      const float* const* next = c == 0 && r + kManyRows < R ? later : nullptr;
      if (full) {
        product_of_blocks<T, kBlocks>(word.row, next, block, block_stride, words, some_bias, sums);
      } else {
        product_of_blocks<T, 1>(word.row, next, block, block_stride, words, some_bias, sums);
      }
      turn(sums, full ? kPass : kLanes, R - r < kManyRows ? R - r : kManyRows, out + c * kMoeSums + r);
    }
  }
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
