// token_match — for each source token its most similar destination token, and the grouping that merges the r best pairs
//
// Math       without roles the even positions are sources, the odd ones destinations (ToMe, arXiv 2210.09461, §3); with roles
//            role[b,n] says what a token is: 0 neither, 1 a source, 2 a destination. For a source at position p
//            s[p,q] = <x[p], x[q]>, divided by both norms when cosine (0 where a norm is 0), q the destinations' positions;
//            score = max_q s[p,q];   partner = lowest q with that maximum;
//            the r sources with the highest score (ties: lowest position) join the group of their partner;
//            group[b,n] numbers the N−r groups 0,1,… in the order of their anchors (all tokens but the r sources)
// Shapes     x (B,N,C) · role (B,N) u8 or absent → score (B,W) f32 · partner (B,W) i32 · group (B,N) i32. Without roles
//            W = ⌈N/2⌉ (of source 2i at i), 0 ≤ r ≤ ⌊N/2⌋; with roles W = N, and r no more than an entry's sources
// Layout     any strides for x and role; outputs contiguous
// Types      x f32 f16 bf16; products and sums in f32 (16-bit types by bf16 dot instructions, tensor cores, if any)
// Edges      B or N = 0 → nothing; N = 1 or C = 0 → score 0 for want of a destination or a channel, partner −1 or 1;
//            with roles: score −inf and partner −1 of what is no source, and of all in an entry without destinations;
//            NaN or Inf in a source or destination: the CPU raises; CUDA treats every similarity that is NaN as −inf; other roles
//            or an r beyond the sources that have a partner: the CPU raises, CUDA takes such roles for 0 and merges what there
//            is, so that groups are more than N−r (EFFVLM_DEBUG=1 raises)
// Order      fixed by N and C alone: same result for any thread count; levels and devices agree within `reduction`,
//            and wherever two destinations are further apart than that, in the index as well
// Parallel   CPU: blocks of sources over threads.  CUDA: block of sources × all destinations, running maximum in registers
// Cost       2·S·D·C flops for S sources and D destinations; reads N·C·e bytes a few times from cache; extra memory O(N·C), the
//            S×D matrix is never stored: a thread holds one strip of kMatchStrip × D approximate scores
// Why so     int8 levels screen: int8 dot products with a rigorous error bound decide which destinations can be the best, and
//            only those are computed in f32, so the answer is exact at a quarter of the multiplications (DECISIONS 6)
// Not for    N·C below some thousand: the call costs more than the work
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/workspace.h"

namespace effvlm {

struct TokenMatchArgs {
  std::int64_t B, N, C;
  std::int64_t r;  // pairs to merge per batch entry, 0 … N/2
  bool cosine;     // cosine similarity; else the plain dot product
  Dtype dtype;     // of x
  const void* x;   // (B,N,C)
  std::int64_t x_stride_b, x_stride_n, x_stride_c;
  const std::uint8_t* role;  // (B,N), a MatchRole each; null: even positions are sources, odd ones destinations
  std::int64_t role_stride_b, role_stride_n;
  float* score;           // (B,W)
  std::int32_t* partner;  // (B,W), position in 0 … N−1, −1 when there is no destination
  std::int32_t* group;    // (B,N), in 0 … N−r−1
  void* workspace;
  int threads;  // CPU only
};

enum MatchRole : std::uint8_t { kMatchNeither, kMatchSource, kMatchDestination };

// Paddings that serve every ISA level, so that the size of the workspace does not depend on the level in use.
constexpr std::int64_t kMatchPanel = 16, kMatchChannels = 64, kMatchRows = 192, kMatchStrip = 64;
// Screened are S·D ≥ 56·(S + D) pairs, without roles 224 tokens: of fewer, rounding takes longer than it saves (196 tokens of
// 3584 channels: 10.4 instead of 6.7 ms a batch entry).
constexpr std::int64_t kMatchScreened = 56;

namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

// CPU workspace. S, D: the most sources and destinations that an entry can have; Sp, Dp, K: padded, with channels.
struct TokenMatchLayout : Workspace {
  std::int64_t width, S, D, Sp, Dp, K;        // width: of score and partner
  std::int64_t sources, destinations, count;  // i32 (B,S), (B,D): positions; i64 (B,2): how many of each there are
  std::int64_t number, keys;                  // i32 (B,N): see token_match_cpu.cpp; u32 (B,W): scores to sort by
  std::int64_t inverse_norm, bad, packed;     // f32 (B,N); i64 (threads): first token not finite or −1; (B,N,C): x, turned
  std::int64_t mean, mean_square, source, destination;  // see token_match_screen.h
  std::int64_t row_fields, fields, shift, row, strip;

  explicit TokenMatchLayout(const TokenMatchArgs& a) {
    const auto padded = [](std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; };
    const std::int64_t tokens = 4 * a.B * a.N;
    width = S = a.role ? a.N : (a.N + 1) / 2, D = a.role ? a.N : a.N / 2;
    Sp = padded(S, kMatchRows), Dp = padded(D, kMatchPanel), K = padded(a.C, kMatchChannels);
    sources = take(4 * a.B * S), destinations = take(4 * a.B * D), count = take(16 * a.B), number = take(tokens),
    keys = take(4 * a.B * width);
    inverse_norm = take(tokens), bad = take(8 * a.threads);
    packed = take(a.x_stride_c == 1 ? 0 : tokens * a.C / (a.dtype == Dtype::f32 ? 1 : 2));
    const std::int64_t screens = a.N >= 4 * kMatchScreened ? 1 : 0;
    mean = take(screens * a.B * K * 4), mean_square = take(screens * a.B * 4);
    source = take(screens * a.B * Sp * K), destination = take(screens * a.B * Dp * K);
    row_fields = take(screens * 5 * a.B * Sp * 4), fields = take(screens * 5 * a.B * Dp * 4),
    shift = take(screens * a.B * Dp * 4);
    row = take(screens * a.threads * K * 4), strip = take(screens * a.threads * kMatchStrip * Dp * 4);
  }
};

}  // namespace

std::int64_t token_match_workspace_cuda(const TokenMatchArgs& args);

EFFVLM_DECLARE_CPU(token_match, TokenMatchArgs)
void token_match_cuda(const TokenMatchArgs& args, int device, void* stream);

}  // namespace effvlm
