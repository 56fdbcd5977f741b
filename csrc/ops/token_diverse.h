// token_diverse — greedy choice of k tokens that differ from one another
//
// Math       cos(i,j) = <x_i, x_j> / (‖x_i‖·‖x_j‖), 0 where a norm is 0.
//            max-min (DivPrune, arXiv 2503.02175): first argmin_i max_{j≠i} cos(i,j), then always argmin over the tokens not
//            picked of max_{j picked} cos(i,j), which is the largest smallest distance 1 − cos. DPP (CDPruner, arXiv 2506.10967;
//            Chen, Zhang & Zhou, NeurIPS 2018), kernel r_i·cos(i,j)·r_j: δ_i = 1 (0 for a zero token) and c_i = () at first; pick
//            j = argmax r_i²·δ_i, then e_i = (cos(i,j) − <c_j,c_i>)/√δ_j joins c_i, and δ_i −= e_i². (r_i²·δ_i and r_i·c_i are
//            the d² and c of the paper.) δ ≤ 1e-5 counts as 0; when the largest r²·δ is 0, the tokens left follow by descending
//            r. Ties everywhere: the lowest position
// Shapes     x (B,N,C) · relevance r (B,N) f32 or absent (all 1; DPP only) → out (B,k) i32 in the order of picking;  0 ≤ k ≤ N
// Layout     any strides for x and relevance; out contiguous
// Types      x f32 f16 bf16; products, sums, c and δ in f32 (bf16 by bf16 dot instructions, 16-bit types by tensor cores, if any)
// Edges      B, N or k = 0 → nothing; C = 0: all tokens are zeros; NaN, Inf or a squared norm beyond f32 in x: the CPU raises,
// CUDA
//            takes the token for zeros; relevance outside 0 … 1e18: the CPU raises, CUDA takes it for 0 (EFFVLM_DEBUG=1 raises)
// Order      fixed by the shapes alone: same result for any thread count, and that of the plain greedy rule with the same f32
//            products; levels and devices pick alike wherever two candidates are further apart than `reduction`
// Parallel   CPU: batch entries over threads; of fewer entries than threads, the tokens to bring up to date.
//            CUDA: tiles of cosines; then a block per batch entry, all picks in one kernel
// Cost       plain: N·(N + k)·C·2 flops max-min, N·k·(2·C + k) DPP. CPU: a fraction of it, since a token is compared only until
// it
//            is out of the question; memory O(N·C) to read again, extra 4·N·k bytes for DPP. CUDA: extra memory 4·N² bytes per
//            batch entry for the cosines, and 4·N·k for DPP
// Why so     a candidate's value only falls as picks are taken into account, so an old value bounds the new one, and only those
//            candidates whose bound is near the top are brought up to date: lazy greedy, whose picks are those of the plain one
// Not for    CUDA with N in the ten thousands (memory)
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/workspace.h"

namespace effvlm {

struct TokenDiverseArgs {
  std::int64_t B, N, C, k;
  bool dpp;
  Dtype dtype;    // of x
  const void* x;  // (B,N,C)
  std::int64_t x_stride_b, x_stride_n, x_stride_c;
  const float* relevance;  // (B,N); null: all ones
  std::int64_t relevance_stride_b, relevance_stride_n;
  std::int32_t* out;  // (B,k)
  void* workspace;
  int threads;  // CPU only
};

constexpr float kDiverseSpent = 1e-5f;  // δ up to this is 0

namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

// CPU workspace. Slots: batch entries that are under way at a time.
struct TokenDiverseLayout : Workspace {
  std::int64_t slots, pitch;             // floats of a token's c, whole cache lines
  std::int64_t inverse_norm, bad;        // f32 (B,N); i64 (threads): first token found that is not finite, or −1
  std::int64_t packed;                   // (B,N,C): x with contiguous channels, where x itself has not
  std::int64_t value, seen, list, sort;  // per slot: f32 (N), i32 (N), i32 (4,N), i32 (N+2)
  std::int64_t weight, delta, root, c;   // per slot, DPP: f32 (N), (N), (k), (N,pitch)

  explicit TokenDiverseLayout(const TokenDiverseArgs& a) {
    slots = a.B < a.threads ? 1 : a.threads, pitch = (a.k + 15) / 16 * 16;
    const std::int64_t tokens = slots * a.N * 4, dpp = a.dpp ? 1 : 0;
    inverse_norm = take(a.B * a.N * 4), bad = take(a.threads * 8);
    packed = take(a.x_stride_c == 1 ? 0 : a.B * a.N * a.C * (a.dtype == Dtype::f32 ? 4 : 2));
    value = take(tokens), seen = take(tokens), list = take(4 * tokens), sort = take(tokens + slots * 8);
    weight = take(dpp * tokens), delta = take(dpp * tokens), root = take(dpp * slots * a.k * 4), c = take(dpp * tokens * pitch);
  }
};

}  // namespace

std::int64_t token_diverse_workspace_cuda(const TokenDiverseArgs& args);

EFFVLM_DECLARE_CPU(token_diverse, TokenDiverseArgs)
void token_diverse_cuda(const TokenDiverseArgs& args, int device, void* stream);

}  // namespace effvlm
