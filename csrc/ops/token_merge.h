// token_merge — weighted mean of groups of tokens, and the weight of each group
//
// Math       out[b,m,:] = Σ w[b,n]·x[b,n,:] / Σ w[b,n]   over n with group[b,n] = m;   out_weight[b,m] = Σ w[b,n]
// Shapes     x (B,N,C) · group (B,N) i32 · weight (B,N) f32 or absent (all 1) → out (B,M,C) · out_weight (B,M) f32
// Layout     any strides for x, group, weight; outputs contiguous; rows with stride_c = 1 take the vector path
// Types      x, out f32 f16 bf16; weights and sums in f32; one rounding at the store
// Edges      group −1 drops the token; a group nobody is in, or of weight 0 → zeros and weight 0; a group of one copies its
//            token bit for bit (weight ≠ 0); B, M or C = 0 → no work; NaN stays inside its group; group ids outside −1 … M−1:
//            the CPU raises, CUDA drops the token (EFFVLM_DEBUG=1 raises)
// Order      members are added by ascending position; same result every run and for any thread count; no atomics
// Parallel   CPU: output rows over threads, SIMD over C.  CUDA: block per output row, thread per 16-byte pack of channels
// Cost       reads N·C·e, writes M·C·e bytes, 2·N·C flops per batch: memory-bound
// Why so     runs of a counting sort instead of scatter-add: deterministic, no zero-fill, each output row written once
// Not for    C below 8: the bookkeeping costs more than the sums
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"

namespace effvlm {

struct TokenMergeArgs {
  std::int64_t B, N, M, C;
  Dtype dtype;    // of x and out
  const void* x;  // (B,N,C)
  std::int64_t x_stride_b, x_stride_n, x_stride_c;
  const std::int32_t* group;  // (B,N), −1 … M−1
  std::int64_t group_stride_b, group_stride_n;
  const float* weight;  // (B,N); null: all ones
  std::int64_t weight_stride_b, weight_stride_n;
  void* out;          // (B,M,C)
  float* out_weight;  // (B,M)
  void* workspace;    // token_merge_workspace(...) bytes: i32 start (B,M+1), then i32 order (B,N)
  int threads;        // CPU only
};

inline std::int64_t token_merge_workspace(std::int64_t B, std::int64_t N, std::int64_t M) { return 4 * B * (M + 1 + N); }

EFFVLM_DECLARE_CPU(token_merge, TokenMergeArgs)
void token_merge_cuda(const TokenMergeArgs& args, int device, void* stream);

}  // namespace effvlm
