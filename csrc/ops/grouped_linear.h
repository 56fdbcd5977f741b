// grouped_linear — each token through the linear layer that its id names
//
// Math       out[t,:] = weight[e] · x[t,:] + bias[e],  e = ids[t]
// Shapes     x (T,C) · ids (T) i64 · weight (E,O,C) · bias (E,O) or absent → out (T,O)
// Layout     any strides; weights with contiguous C or contiguous O are read in place, others through a copy of a few rows;
//            out contiguous
// Types      x, weight, bias, out all f32, f16 or bf16; sums in f32; one rounding at the store
// Edges      ids −1 and E: the row of out is zeros; other ids outside 0 … E−1: the CPU raises, CUDA writes zeros; C = 0:
//            the bias; T, E or O = 0: no work, or zeros; NaN stays in its token
// Order      sums over C as in moe_ffn's products; same bits for any thread count; no atomics
// Parallel   CPU: (expert, rows of its weight) over threads.  CUDA: a sort when there are over 1,024 tokens, then a warp per
//            (expert, column)
// Cost       reads each needed layer once, O·C·e bytes; 2·T·O·C flops; extra memory 4·T·C bytes or less for packed tokens, and
//            as moe_ffn per thread (CPU); none (CUDA)
// Why so     the products of moe_ffn, whose tokens are already in rows: no gather, no gate, no sum over choices
// Not for    many tokens of one layer (a plain GEMM; few are at the speed of memory here); several weighted choices per token
//            (moe_ffn with act identity); many tokens on CUDA (no tensor cores)
#pragma once
#include "ops/moe_ffn.h"

namespace effvlm {

struct GroupedLinearArgs {
  std::int64_t T, E, C, O;
  Dtype dtype;
  const void* x;  // (T,C)
  std::int64_t x_stride_t, x_stride_c;
  const std::int64_t* ids;  // (T)
  std::int64_t ids_stride;
  const void* weight;  // (E,O,C)
  std::int64_t weight_stride_e, weight_stride_o, weight_stride_c;
  const void* bias;  // (E,O) or null
  std::int64_t bias_stride_e, bias_stride_o;
  void* out;        // (T,O)
  void* workspace;  // GroupedLinearLayout(...).bytes, or grouped_linear_workspace_cuda(args)
  std::int64_t workspace_bytes;
  int threads;  // CPU only
};

namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

// CPU workspace, offsets in bytes: i32 (E+1), i32 (T), i32 (E+1), x with contiguous channels or as words, x as packed blocks; per
// thread: f32 sums, copied rows of weights, rows as words.
struct GroupedLinearLayout : Workspace {
  bool turned;                                      // whether weights are multiplied in transposed order
  std::int64_t words, x_stride, row_stride, block;  // 32-bit words of a token; elements; words
  std::int64_t chunk;                               // tokens that the sums have room for
  std::int64_t out_rows;                            // rows of weight per task
  std::int64_t start, order, used, first_block, x, blocks, sums, rows, copy;

  GroupedLinearLayout(const GroupedLinearArgs& a, bool pairs) {
    const std::int64_t size = a.dtype == Dtype::f32 ? 4 : 2, crowded = a.T / (kMoeFewTokens + 1);
    turned = is_turned(a.weight_stride_o == 1 && a.weight_stride_c != 1, a.T, a.E, a.dtype);
    words = pairs ? (a.C + 1) / 2 : a.C, x_stride = row_stride = (a.C + 63) / 64 * 64, block = kMoeBlock * words;
    out_rows = turned ? turned_rows((a.T < a.E ? a.T : a.E) * a.O, a.T, a.threads) : kMoeDownRows;
    start = take(4 * (a.E + 1)), order = take(4 * a.T), used = take(4 * (a.E + 1)), first_block = take(4 * (a.E + 1));
    const std::int64_t most = turned ? kTurnedChunk : kMoeTokens,
                       padded = (a.T + 2 * kMoeBlock - 1) / (2 * kMoeBlock) * 2 * kMoeBlock;
    chunk = padded < most ? padded : most;
    sums = take(4 * a.threads * chunk * (turned ? kTurnedStride : kMoeSums));
    if (turned) x = take(4 * a.T * words);
    if (turned) return;
    x = take(a.x_stride_c != 1 ? a.T * x_stride * size : 0);
    blocks = take(4 * block * (a.T / kMoeBlock + (crowded < a.E ? crowded : a.E)));
    rows = take(a.weight_stride_c != 1 ? a.threads * kMoeDownRows * row_stride * size : 0);
    copy = take(4 * a.threads * kMoeCopiedRows * row_stride);
  }
};

}  // namespace

std::int64_t grouped_linear_workspace_cuda(const GroupedLinearArgs& args);

EFFVLM_DECLARE_CPU(grouped_linear, GroupedLinearArgs)
void grouped_linear_cuda(const GroupedLinearArgs& args, int device, void* stream);

}  // namespace effvlm
