// token_apply — a sparse plan applied to packed tokens: drop, gather, merge, pool and weighted sums, all at once
//
// Math       out[m,:] = Σ w[e]·x[source[e],:] over e in start[m] … start[m+1]−1, divided by Σ w[e] when mean
// Shapes     x (N,C) · start (M+1,) i32, ascending from 0 to E · source (E,) i32 in 0 … N−1 · weight (E,) f32 or absent (all 1)
//            → out (M,C)
// Layout     any strides for the inputs; out contiguous; rows with stride_c = 1 take the vector path
// Types      x, out f32 f16 bf16; weights and sums in f32; one rounding at the store
// Edges      a row of one source copies it bit for bit if its weight is 1, or not 0 and mean; an empty row, or of weight 0 when
//            mean → zeros; a source may serve any number of rows; N, M, C or E = 0 are ordinary; NaN stays in the rows that take
//            it; start or source that are no plan: the CPU raises, CUDA clamps start into 0 … E and drops sources outside
//            0 … N−1 (EFFVLM_DEBUG=1 raises)
// Order      sources are added by ascending e; same result every run and for any thread count; no atomics
// Parallel   CPU: output rows over threads, SIMD over C.  CUDA: block per output row, thread per 16-byte pack of channels
// Cost       reads E·C·e, writes M·C·e bytes, 2·E·C flops: memory-bound
// Why so     one plan for every reduction method: what is decided per token (score, match, cluster, frame) stays outside, and
//            the tokens themselves move once
// Not for    C below 8: the bookkeeping costs more than the sums; dense mixing of all tokens into all rows: that is a matmul
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"

namespace effvlm {

struct TokenApplyArgs {
  std::int64_t N, M, C, E;
  bool mean;      // divide by the sum of the weights
  Dtype dtype;    // of x and out
  const void* x;  // (N,C)
  std::int64_t x_stride_n, x_stride_c;
  const std::int32_t* start;  // (M+1,), ascending, 0 … E
  std::int64_t start_stride;
  const std::int32_t* source;  // (E,), 0 … N−1
  std::int64_t source_stride;
  const float* weight;  // (E,); null: all ones
  std::int64_t weight_stride;
  void* out;    // (M,C)
  int threads;  // CPU only
};

EFFVLM_DECLARE_CPU(token_apply, TokenApplyArgs)
void token_apply_cuda(const TokenApplyArgs& args, int device, void* stream);

}  // namespace effvlm
