// token_similarity — cosine similarity of pairs of rows, for instance of every patch with itself one frame earlier
//
// Math       out[n] = <a[n], b[n]> / (‖a[n]‖·‖b[n]‖), clamped to −1 … 1; 0 where a norm is 0
// Shapes     a, b (N,C) → out (N,) f32
// Layout     any strides, and a and b may be views of one storage (x[P:] and x[:−P] of frames of P patches); out contiguous; rows
//            with contiguous channels are read in place, others 256 channels of 8 rows at a time
// Types      a, b f32 f16 bf16, the same; products and sums in f32 (bf16 by dot instructions, which flush subnormals, if any);
//            their quotient in f64, so that equal rows give 1 exactly
// Edges      C = 0 → 0; N = 0 → no work; NaN or Inf in a row, or a squared norm beyond f32 → NaN for that row alone;
//            squares below the least f32 count as 0
// Order      of additions: fixed by C alone: same result for any strides and thread count; levels and devices agree within
//            `reduction`
// Parallel   CPU: blocks of rows over threads, SIMD over C.  CUDA: warp per row, lane per 16-byte pack of channels
// Cost       6·N·C flops; reads 2·N·C·e bytes, or (N + P)·C·e from memory where b is a shifted by P rows: memory-bound
// Why so     a shift by P rows is seen in the addresses, and a thread then takes 128 KiB of neighbouring rows down the frames, n,
//            n + P, n + 2·P …: what was the later row of a pair is the earlier one of the next while it is in the second-level
//            cache. By ascending n it would come again only after a whole frame. (On CUDA a frame fits the second-level cache.)
// Not for    all pairs: that is a matmul; N below some tens on CUDA: a warp has one row
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"

namespace effvlm {

struct TokenSimilarityArgs {
  std::int64_t N, C;
  Dtype dtype;    // of a and b
  const void* a;  // (N,C)
  std::int64_t a_stride_n, a_stride_c;
  const void* b;  // (N,C)
  std::int64_t b_stride_n, b_stride_c;
  float* out;   // (N,)
  int threads;  // CPU only
};

EFFVLM_DECLARE_CPU(token_similarity, TokenSimilarityArgs)
void token_similarity_cuda(const TokenSimilarityArgs& args, int device, void* stream);

}  // namespace effvlm
