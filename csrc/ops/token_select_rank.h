// The key of a rank among keys of floats, on the CPU.
#pragma once
#include "core/cpu/simd.h"
#include "ops/token_select_cut.h"

namespace effvlm::EFFVLM_ISA {
namespace {

struct Keys {
  using i32 = std::int32_t;
  using u32 = std::uint32_t;
  i32 n;
  u32* keys;

  i32 count_from(u32 key) const {
    i32 count = 0, i = 0;
#if defined(__AVX512F__)  // masks are counted in one instruction; of comparisons GCC makes vectors to add
    const __m512i least = _mm512_set1_epi32(static_cast<int>(key));
    for (; i + 64 <= n; i += 64) {
      std::uint64_t at_or_above = 0;
      for (int k = 0; k < 4; ++k)
        at_or_above |= std::uint64_t{_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + i + 16 * k), least)} << 16 * k;
      count += __builtin_popcountll(at_or_above);
    }
#endif
    for (; i < n; ++i) count += keys[i] >= key;
    return count;
  }
  u32 least_from(u32 key) const {
    u32 least = ~0u;
    for (i32 i = 0; i < n; ++i) {
      const u32 candidate = keys[i] >= key ? keys[i] : ~0u;
      least = candidate < least ? candidate : least;
    }
    return least;
  }
  // Keys are built from the highest bit down, as the highest with enough at or above it.
  Cut cut_at_rank(i32 rank) const {  // 1: the highest
    u32 key = 0;
    for (u32 bit = 1u << 31; bit; bit >>= 1) {
      const i32 count = count_from(key | bit);
      if (count == rank) return {(key | bit) - 1, 0};
      if (count > rank) key |= bit;
    }
    return {key, rank - count_from(key + 1)};
  }
};

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
