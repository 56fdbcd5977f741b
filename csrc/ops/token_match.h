// token_match — for each source token its most similar destination token, and the grouping that merges the r best pairs
//
// Math       sources are the even positions, destinations the odd ones (ToMe, arXiv 2210.09461, §3).
//            s[i,j] = <x[2i], x[2j+1]>, divided by both norms when cosine (0 where a norm is 0);
//            score[b,i] = max_j s[i,j];   partner[b,i] = 2·(lowest j with that maximum) + 1;
//            the r sources with the highest score (ties: lowest position) join the group of their partner;
//            group[b,n] numbers the N−r groups 0,1,… in the order of their anchors (destinations and unmerged sources)
// Shapes     x (B,N,C) → score (B,⌈N/2⌉) f32 · partner (B,⌈N/2⌉) i32 · group (B,N) i32;  0 ≤ r ≤ ⌊N/2⌋
// Layout     any strides for x; outputs contiguous
// Types      x f32 f16 bf16; products and sums in f32 (16-bit types by bf16 dot instructions, tensor cores, if any)
// Edges      B or N = 0 → nothing; N = 1 or C = 0 → score 0 for want of a destination or a channel, partner −1 or 1;
//            NaN or Inf in x: the CPU raises; CUDA treats every similarity that is NaN as −inf (EFFVLM_DEBUG=1 raises)
// Order      fixed by N and C alone: same result for any thread count; levels and devices agree within `reduction`,
//            and wherever two destinations are further apart than that, in the index as well
// Parallel   CPU: blocks of sources over threads.  CUDA: block of sources × all destinations, running maximum in registers
// Cost       2·(N/2)²·C flops per batch; reads N·C·e bytes a few times from cache; extra memory O(N·C), the N×N matrix is
//            never stored: a thread holds one strip of kRows × N/2 approximate scores
// Why so     int8 levels screen: int8 dot products with a rigorous error bound decide which destinations can be the best, and
//            only those are computed in f32, so the answer is exact at a quarter of the multiplications (DECISIONS 6)
// Not for    N·C below some thousand: the call costs more than the work
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"

namespace effvlm {

struct TokenMatchArgs {
  std::int64_t B, N, C;
  std::int64_t r;  // pairs to merge per batch entry, 0 … N/2
  bool cosine;     // cosine similarity; else the plain dot product
  Dtype dtype;     // of x
  const void* x;   // (B,N,C)
  std::int64_t x_stride_b, x_stride_n, x_stride_c;
  float* score;           // (B,S) with S = (N+1)/2
  std::int32_t* partner;  // (B,S), position in 0 … N−1, −1 when there is no destination
  std::int32_t* group;    // (B,N), in 0 … N−r−1
  void* workspace;        // token_match_workspace_<device>(...) bytes, 64-byte aligned on CPU, 256 on CUDA
  std::int64_t workspace_bytes;
  int threads;  // CPU only
};

// Paddings that serve every ISA level, so that the size of the workspace does not depend on the level in use.
constexpr std::int64_t kMatchPanel = 16, kMatchChannels = 64, kMatchRows = 192, kMatchStrip = 64;
// Fewer tokens are not screened: rounding them takes longer than it saves (196 of 3584 channels: 10.4 instead of 6.7 ms a batch).
constexpr std::int64_t kMatchScreened = 224;

inline std::int64_t token_match_workspace_cpu(std::int64_t B, std::int64_t N, std::int64_t C, Dtype dtype, bool strided,
                                              int threads) {
  const auto padded = [](std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; };
  const std::int64_t copy = strided ? B * N * C * (dtype == Dtype::f32 ? 4 : 2) : 0,
                     always = 4 * B * N + 8 * threads + copy + 64 * 32;
  if (N < kMatchScreened) return always;
  const std::int64_t S = padded((N + 1) / 2, kMatchRows), D = padded(N / 2, kMatchPanel), K = padded(C, kMatchChannels);
  return always + B * ((K + 20) * S + (K + 24) * D + 4 * K) + threads * 4 * (K + kMatchStrip * D);
}
std::int64_t token_match_workspace_cuda(std::int64_t B, std::int64_t N, std::int64_t C, Dtype dtype);

EFFVLM_DECLARE_CPU(token_match, TokenMatchArgs)
void token_match_cuda(const TokenMatchArgs& args, int device, void* stream);

}  // namespace effvlm
