// Part of moe_ffn_cpu.cpp and grouped_linear_cpu.cpp: which choices belong to an expert, and its rows of weights.
#pragma once
#include "core/check.h"
#include "ops/moe_ffn_product.h"

namespace effvlm::EFFVLM_ISA {
namespace {

// The choices of expert e, by ascending place: order[start[e] … start[e+1]).
struct ExpertLists {
  std::int64_t E;
  std::int32_t* start;  // (E+1)
  std::int32_t* order;  // (T·K)
  std::int32_t* used;   // (E+1) the experts that have choices, in order; behind them −1

  // Work is split among the experts that have any: with parts of all of them, few used ones might share a thread.
  std::int64_t count_used() const {
    std::int64_t n = 0;
    while (used[n] >= 0) ++n;
    return n;
  }

  std::int64_t tokens_of(std::int64_t e) const { return start[e + 1] - start[e]; }

  // How many of an expert's tokens are taken as blocks. Those left over are few; they would leave most lanes of one empty.
  std::int64_t blocked(std::int64_t e) const {
    const std::int64_t all = tokens_of(e), rest = all % kMoeBlock;
    return rest <= kMoeFewTokens ? all - rest : all;
  }

  // Counting sort of (T,K) ids; pair t·K + k is choice k of token t. Skipped choices (−1 and E) are in no list.
  void sort(const char* op, std::int64_t T, std::int64_t K, const std::int64_t* ids, std::int64_t stride_t,
            std::int64_t stride_k) const {
    for (std::int64_t e = 0; e <= E; ++e) start[e] = 0;
    const auto each = [&](auto&& f) {
      for (std::int64_t t = 0; t < T; ++t)
        for (std::int64_t k = 0; k < K; ++k) f(t * K + k, ids[t * stride_t + k * stride_k]);
    };
    each([&](std::int64_t pair, std::int64_t e) {
      if (e < -1 || e > E)
        fail("%s: expected expert ids in 0 … %lld, or -1 or %lld to skip, got %lld at token %lld, choice %lld", op,
             static_cast<long long>(E - 1), static_cast<long long>(E), static_cast<long long>(e),
             static_cast<long long>(pair / K), static_cast<long long>(pair % K));
      if (e >= 0 && e < E) ++start[e];
    });
    std::int32_t sum = 0;
    for (std::int64_t e = 0; e <= E; ++e) {
      const std::int32_t size = start[e];
      start[e] = sum;
      sum += size;
    }
    each([&](std::int64_t pair, std::int64_t e) {
      if (e >= 0 && e < E) order[start[e]++] = static_cast<std::int32_t>(pair);
    });
    for (std::int64_t e = E; e > 0; --e) start[e] = start[e - 1];
    start[0] = 0;
    std::int32_t* next = used;
    for (std::int64_t e = 0; e < E; ++e)
      if (tokens_of(e)) *next++ = static_cast<std::int32_t>(e);
    *next = -1;
  }

  // f(count, pairs) for an expert's tokens, `most` at a time.
  template <class F>
  void each_run(std::int64_t e, std::int64_t most, F&& f) const {
    for (std::int64_t c = start[e]; c < start[e + 1]; c += most) f(start[e + 1] - c < most ? start[e + 1] - c : most, order + c);
  }

  // first[e]: the number of blocks of the experts before e.
  void count_blocks(std::int32_t* first) const {
    first[0] = 0;
    for (std::int64_t e = 0; e < E; ++e)
      first[e + 1] = first[e] + static_cast<std::int32_t>((blocked(e) + kMoeBlock - 1) / kMoeBlock);
  }

  // Of an expert's tokens [from, to): many(c0, count, pairs) for the blocks, some at a time, then few(count, pairs) for what is
  // left.
  template <class Many, class Few>
  void each_chunk(std::int64_t e, std::int64_t from, std::int64_t to, Many&& many, Few&& few) const {
    const std::int32_t* pair = order + start[e];
    const std::int64_t in_blocks = blocked(e), last = in_blocks < to ? in_blocks : to;
    for (std::int64_t c0 = from; c0 < last; c0 += kMoeTokens)
      many(c0, last - c0 < kMoeTokens ? last - c0 : kMoeTokens, pair + c0);
    if (from <= in_blocks && in_blocks < to) few(to - in_blocks, pair + in_blocks);
  }
};

// Rows [first, first + count) of a weight matrix as pointers to contiguous elements: in place, or copied to `copy`.
template <class T>
void take_rows(const T* weight, std::int64_t stride, std::int64_t stride_c, std::int64_t first, std::int64_t count,
               std::int64_t C, T* copy, std::int64_t copy_stride, const T** rows) {
  const bool in_place = stride_c == 1;
  if (!in_place) copy_rows(weight + first * stride, stride, stride_c, count, C, copy, copy_stride);
  for (std::int64_t i = 0; i < count; ++i) rows[i] = in_place ? weight + (first + i) * stride : copy + i * copy_stride;
}

// `count` elements of a bias as f32; zeros where there is none.
template <class T>
void take_bias(const void* bias, std::int64_t offset, std::int64_t stride, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = bias ? to_f32(static_cast<const T*>(bias)[offset + i * stride]) : 0;
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
