// Part of moe_ffn_cpu.cpp and grouped_linear_cpu.cpp: products with weights that are stored transposed, multiplied in that order.
//
// What lies next to each other in memory are rows of the weight matrix, for one channel after the other. So a lane is a row here,
// and tokens are broadcast: nothing is transposed, and nothing summed across lanes. Sums of some channels at a time stay in
// registers; between them they are in the caller's scratch, so that memory is read in runs as long as a task is wide.
#pragma once
#include "core/cpu/dot.h"
#include "ops/moe_ffn_product.h"

namespace effvlm::EFFVLM_ISA {
namespace {

constexpr int kTurnedTokens = 12;  // the most tokens that share a load of weights
#if defined(__AVX512F__)
constexpr int kTurnedSums = 24;
#else
constexpr int kTurnedSums = 12;
#endif

// A vector of rows, at one channel (or, where T's products are taken two at a time, at two channels, in pairs).
template <class T>
struct TurnedLanes {
  static constexpr int channels = 1, vectors = 1, rows = f32v::width;
  static void take(const T* at, std::int64_t, bool, f32v* to) { to[0] = load(at); }
  static void take(const T* at, std::int64_t, bool, f32v* to, int n) { to[0] = load(at, n); }
  static f32v mac(f32v sum, f32v weight, f32v token) { return fma(weight, token, sum); }
};
#if defined(__AVX512BF16__)
template <>
struct TurnedLanes<bf16> {
  static constexpr int channels = 2, vectors = 2, rows = 32;
  static void pair(__m512i first, __m512i second, f32v* to) {
    alignas(64) static constexpr std::uint16_t kOrder[64] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                             8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
                                                             16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                             24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    to[0].v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(first, _mm512_load_si512(kOrder), second));
    to[1].v = _mm512_castsi512_ps(_mm512_permutex2var_epi16(first, _mm512_load_si512(kOrder + 32), second));
  }
  // The channel after the last one of an odd number is zeros.
  static void take(const bf16* at, std::int64_t stride, bool both, f32v* to) {
    pair(_mm512_loadu_si512(at), both ? _mm512_loadu_si512(at + stride) : _mm512_setzero_si512(), to);
  }
  static void take(const bf16* at, std::int64_t stride, bool both, f32v* to, int n) {
    const __mmask32 some = n < 32 ? (1u << n) - 1 : ~0u;
    pair(_mm512_maskz_loadu_epi16(some, at), both ? _mm512_maskz_loadu_epi16(some, at + stride) : _mm512_setzero_si512(), to);
  }
  static f32v mac(f32v sum, f32v weight, f32v token) {
    return {dot_pairs(sum.v, _mm512_castps_si512(weight.v), _mm512_castps_si512(token.v))};
  }
};
#endif

// A token as words of 32 bits: pairs where lanes are pairs, the last one filled up with zero; else f32.
template <class T>
void to_words(const T* token, std::int64_t stride, std::int64_t C, float* to) {
  if constexpr (TurnedLanes<T>::channels == 2) {
    T* pairs = reinterpret_cast<T*>(to);
    for (std::int64_t c = 0; c < C; ++c) pairs[c] = token[c * stride];
    if (C % 2) pairs[C] = T{};
  } else {
    for (std::int64_t c = 0; c < C; ++c) to[c] = to_f32(token[c * stride]);
  }
}

// Asks memory for the channels that come next while the units are busy with these, run after run.
template <class T>
struct Fetch {
  const T* at = nullptr;  // null: nothing to fetch
  std::int64_t stride = 0, R = 0, channels = 0, done = 0;

  void line() {
    if (!at) return;
    __builtin_prefetch(at + done, 0, 2);
    done += 64 / sizeof(T);
    if (done < R) return;
    done = 0, at = --channels ? at + stride : nullptr;
  }
};

// sums[t·sums_stride + r] += <channels [c0, c1) of row r, token t> for G groups of rows from `weight` on, at NR tokens. n: rows
// of the one group, where it is not whole.
template <class T, int NR, int G, bool Whole>
void add_turned(const T* weight, std::int64_t stride, std::int64_t c0, std::int64_t c1, const float* const* tokens, float* sums,
                std::int64_t sums_stride, Fetch<T>& fetch, int n) {
  using Lanes = TurnedLanes<T>;
  constexpr int V = Lanes::vectors, kPer = Lanes::channels;
  f32v sum[NR][G * V];
  for (int t = 0; t < NR; ++t)
    for (int v = 0; v < G * V; ++v) sum[t][v] = load(sums + t * sums_stride + v * f32v::width);
  for (std::int64_t c = c0; c < c1; c += kPer) {
    const T* at = weight + c * stride;
    f32v row[G * V];
    for (int g = 0; g < G; ++g) {
      if constexpr (Whole) {
        Lanes::take(at + g * Lanes::rows, stride, c + 1 < c1, row + g * V);
      } else {
        Lanes::take(at, stride, c + 1 < c1, row, n);
      }
      for (int k = 0; k < kPer; ++k) fetch.line();
    }
    for (int t = 0; t < NR; ++t) {
      const f32v token = set1(tokens[t][c / kPer]);
      for (int v = 0; v < G * V; ++v) sum[t][v] = Lanes::mac(sum[t][v], row[v], token);
    }
  }
  for (int t = 0; t < NR; ++t)
    for (int v = 0; v < G * V; ++v) store(sums + t * sums_stride + v * f32v::width, sum[t][v]);
}

// The same for R rows.
template <class T, int NR>
void add_turned_rows(const T* weight, std::int64_t stride, std::int64_t R, std::int64_t c0, std::int64_t c1,
                     const float* const* tokens, float* sums, std::int64_t sums_stride, Fetch<T>& fetch) {
  using Lanes = TurnedLanes<T>;
  constexpr int kMost = kTurnedSums / (NR * Lanes::vectors), G = kMost > 8 ? 8 : kMost < 1 ? 1 : kMost;
  std::int64_t r = 0;
  for (; r + G * Lanes::rows <= R; r += G * Lanes::rows)
    add_turned<T, NR, G, true>(weight + r, stride, c0, c1, tokens, sums + r, sums_stride, fetch, 0);
  for (; r + Lanes::rows <= R; r += Lanes::rows)
    add_turned<T, NR, 1, true>(weight + r, stride, c0, c1, tokens, sums + r, sums_stride, fetch, 0);
  if (r < R)
    add_turned<T, NR, 1, false>(weight + r, stride, c0, c1, tokens, sums + r, sums_stride, fetch, static_cast<int>(R - r));
}

// f(integral_constant<int, count>) for 1 <= count <= kTurnedTokens.
template <int N = kTurnedTokens, class F>
void by_count(std::int64_t count, F&& f) {
  if constexpr (N > 1)
    if (count < N) return by_count<N - 1>(count, f);
  f(std::integral_constant<int, N>{});
}

// sums[t·sums_stride + r] += <row r, token t> for r < R rows whose channel c is at weight[c·stride + r], and `count` tokens as
// words. Sums are read and written up to the next whole vectors.
template <class T>
void product_turned(const T* weight, std::int64_t stride, std::int64_t R, std::int64_t C, const float* const* tokens,
                    std::int64_t count, float* sums, std::int64_t sums_stride) {
  const std::int64_t passes = (count + kTurnedTokens - 1) / kTurnedTokens, together = passes ? (count + passes - 1) / passes : 0;
  const std::int64_t depth = count <= 2 * kTurnedTokens ? 64 : 128;  // channels whose products are summed in registers
  for (std::int64_t c0 = 0; c0 < C; c0 += depth) {
    const std::int64_t c1 = c0 + depth < C ? c0 + depth : C, next = C - c1 < depth ? C - c1 : depth;
    Fetch<T> fetch{next ? weight + c1 * stride : nullptr, stride, R, next};
    for (std::int64_t t = 0; t < count; t += together)
      by_count(count - t < together ? count - t : together, [&](auto some) {
        add_turned_rows<T, decltype(some)::value>(weight, stride, R, c0, c1, tokens + t, sums + t * sums_stride, sums_stride,
                                                  fetch);
      });
  }
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
