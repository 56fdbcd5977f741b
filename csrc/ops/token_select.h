// token_select — which tokens of each segment to keep, by score
//
// Math       within each segment s, of n tokens, with t = limit[s]:
//            top    the ⌊t⌋ highest scores (ties: lowest index)
//            above  score ≥ t
//            iqr    score > Q3 + t·(Q3 − Q1), quartiles by linear interpolation over the segment's finite scores
//            top_p  the highest scores (ties: lowest index) until their running sum first reaches t·total, t in 0 … 1; at least
//                   one token if any score is positive
//            in every rule −inf is never kept and +inf always: it counts among the ⌊t⌋, but not in quartiles, sums and total
// Shapes     score (N,) f32 · start (S+1,) i32, ascending from 0 to N · limit (S,) f32 → kept (N,) bool · count (S,) i32
// Layout     any strides for the inputs; outputs contiguous
// Types      scores are compared as they are, −0 equal to 0; iqr in f64; top_p sums whole multiples of 2^(⌈log2 n⌉−62) of the
//            power of two above the segment's largest score, each score rounded down to one
// Edges      empty segments keep nothing; ⌊t⌋ < 0 keeps as 0 does, ⌊t⌋ > n as n; top_p wants scores ≥ 0 or −inf. NaN in score or
//            limit, a negative score in top_p, start that is no partition: the CPU raises; CUDA takes NaN scores for −inf,
//            negative ones for 0 and a NaN limit for one that nothing finite reaches, and reads and writes nothing outside; what
//            it keeps by a start that is no partition means nothing (EFFVLM_DEBUG=1 raises on all of these)
// Order      all sums are of integers, so the same bits for any number of threads, at every level and on every device
// Parallel   CPU: segments over threads, SIMD over tokens.  CUDA: block per segment
// Cost       top and top_p: CPU up to 32 passes over n keys in the cache, CUDA 4; iqr twice to four times that; extra memory on
//            the CPU 4·N bytes, 12·N for top_p
// Why so     each rule comes down to one key (the bits of a float, in its order) and how many of those equal to it are kept,
//            found by a radix select that counts tokens or adds up their scores: no sort anywhere
// Not for    one segment of millions on CUDA: a single block reads it
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/workspace.h"

namespace effvlm {

enum class SelectRule : int { top, above, iqr, top_p };

struct TokenSelectArgs {
  std::int64_t N, S;
  SelectRule rule;
  const float* score;  // (N,)
  std::int64_t score_stride;
  const std::int32_t* start;  // (S+1,), ascending, 0 … N
  std::int64_t start_stride;
  const float* limit;  // (S,)
  std::int64_t limit_stride;
  bool* kept;           // (N,)
  std::int32_t* count;  // (S,)
  void* workspace;      // SelectLayout(N, rule).bytes, CPU only
  int threads;          // CPU only
};

namespace {
struct SelectLayout : Workspace {
  std::int64_t keys, units;
  SelectLayout(std::int64_t N, SelectRule rule) : keys(take(4 * N)), units(take(rule == SelectRule::top_p ? 8 * N : 0)) {}
};
}  // namespace

EFFVLM_DECLARE_CPU(token_select, TokenSelectArgs)
void token_select_cuda(const TokenSelectArgs& args, int device, void* stream);

}  // namespace effvlm
