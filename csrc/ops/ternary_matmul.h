// ternary_matmul — tokens times the compressed matrices that their ids name
//
// Math       out[t,k,r] = scale[e,r] · Σ_c w[e,r,c] · x[t,c],  e = ids[t,k],  w in gap planes;
//            int8: x[t,c] → S[t] · m[t,s] · q[t,c], s the strip of c, q = round(x / (S·m)) in −L … L, L = 127 (63 with levels 5),
//            m the least whole number in 1 … 255 for which max|x| over the strip fits, S[t] = max|x[t]| / (L·255); then
//            out = (S[t] · scale[e,r]) · Σ_s m · Σ_c w·q, whose sum is a whole number
// Shapes     x (T,C) · ids (T,K) i64 · data, tiles, base u32 of (E,R,C) · scale (E,R) bf16 → out (T,K,R)
// Layout     x, ids, scale of any strides; weights contiguous (docs/gap_planes.md); out contiguous
// Types      x, out f32, f16 or bf16; sums f32 (exact), or i32 (int8); one rounding at the store
// Edges      ids −1 and E: zeros; other ids outside 0 … E−1 and corrupt weights: the CPU raises, CUDA writes zeros, or values
//            that mean nothing; E, R, C or T = 0: zeros or nothing; a token with NaN or infinity: NaN in int8, else NaN or
//            infinity in its own rows; C ≤ 65,536 in int8, so that sums fit
// Order      int8: exact sums, the same bits at every level and on CUDA. Exact: f32 sums of a fixed order per level; same bits
//            for any thread count; no atomics
// Parallel   CPU: (expert, 64 or 192 rows) over threads.  CUDA: warp ↔ (expert, 32 rows, some strips), then
//            partial sums in order
// Cost       reads the packed bytes of each needed expert once, 0.3–1.6 bits a weight; 2·T·K·R·C flops, of which few tokens do
//            only those of non-zeros; extra memory 5.3 (int8) or 8 bytes per element of x, for many tokens as much again per
//            choice, and at most 0.7 MB per thread; CUDA: partial sums, at most 16 MB or 4·T·K·R bytes
// Why so     gaps of 64 non-zeros become columns in some 50 instructions (a prefix sum of bytes modulo 256), and a look-up in 256
//            activations that sit in registers gives what to add; many tokens: each entry adds
//            its column of a block of tokens, so that only non-zeros cost, and dense bf16 tiles are made for AMX alone
// Not for    weights with few zeros (dense 2-bit reads more bytes, but decodes nothing); training
#pragma once
#include "core/cpu/isa.h"
#include "core/gap_planes.h"
#include "core/workspace.h"
#include "ops/moe_ffn.h"

namespace effvlm {

struct TernaryMatmulArgs {
  std::int64_t T, K;
  Dtype dtype;
  bool int8;
  const void* x;  // (T,C)
  std::int64_t x_stride_t, x_stride_c;
  const std::int64_t* ids;  // (T,K)
  std::int64_t ids_stride_t, ids_stride_k;
  GapPlanes weight;
  const bf16* scale;  // (E,R)
  std::int64_t scale_stride_e, scale_stride_r;
  void* out;        // (T,K,R)
  void* workspace;  // TernaryMatmulLayout(...).bytes, or ternary_matmul_workspace_cuda(args)
  std::int64_t workspace_bytes;
  int threads;  // CPU only
};

namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

constexpr std::int64_t kTernaryFew = 3;            // at most so many tokens of an expert look up what they add, entry by entry
constexpr std::int64_t kTernaryRows = 192;         // rows of a task with panels: three tiles
constexpr std::int64_t kTernaryChunk = 256;        // tokens whose sums a task holds
constexpr std::int64_t kTernaryMaxInt8 = 1 << 16;  // columns

// CPU workspace, offsets in bytes. x in strips of 256, the columns of a narrow one repeated to fill them: f32, or q as i8 with m
// (u8) per strip and S (f32) per token. Tokens packed in blocks, expert by expert: a line of 64 bytes per column. Per thread:
// sums; for tiles, a panel of weights.
struct TernaryMatmulLayout : Workspace {
  std::int64_t strips, width;  // of x, in elements
  std::int64_t chunk, block_bytes;
  std::int64_t start, order, used, x, planar, q, step, unit, first_block, packed, panel, sums, part, copy;

  explicit TernaryMatmulLayout(const TernaryMatmulArgs& a) {
    const std::int64_t choices = a.T * a.K, size = a.dtype == Dtype::f32 ? 4 : 2;
    const auto padded = [](std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; };
    strips = strips_of(a.weight.C), width = strips * kTileColumns;
    chunk = choices < kTernaryChunk ? padded(choices, 32) : kTernaryChunk;
    block_bytes = 64 * width;  // of 32 tokens in i16, or 16 in f32 or (pairs) bf16
    start = take(4 * (a.weight.E + 1)), order = take(4 * choices), used = take(4 * (a.weight.E + 1));
    x = take(4 * a.T * width), planar = take(a.int8 ? 0 : 4 * a.T * width);
    q = take(a.int8 ? a.T * width : a.x_stride_c != 1 ? a.T * a.weight.C * size : 0), step = take(a.int8 ? a.T * strips : 0);
    unit = take(a.int8 ? 4 * a.T : 0);
    const std::int64_t crowded = choices / (kTernaryFew + 1), E = a.weight.E;
    first_block = take(4 * (E + 1));
    packed = take((choices / (a.int8 ? 32 : 16) + (crowded < E ? crowded : E)) * block_bytes);
    panel = take(a.int8 ? 0 : 2 * a.threads * kTernaryRows * kTileColumns);
    sums = take(4 * a.threads * chunk * kTernaryRows);
    part = take(a.int8 ? 0 : 4 * a.threads * chunk * kMoeSums);
    copy = take(a.int8 ? 0 : 4 * a.threads * kMoeCopiedRows * kTileColumns);
  }
};

}  // namespace

std::int64_t ternary_matmul_workspace_cuda(const TernaryMatmulArgs& args);

EFFVLM_DECLARE_CPU(ternary_matmul, TernaryMatmulArgs)
void ternary_matmul_cuda(const TernaryMatmulArgs& args, int device, void* stream);

}  // namespace effvlm
