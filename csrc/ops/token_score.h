// token_score — how much attention each key receives: column sums of attention that is never stored
//
// Math       p[b,h,i,j] = exp(scale·<query[b,h,i], key[b,g,j]> − lse[b,h,i]), g = h / (H/G), for the keys j that row i sees,
//            else 0;   c[b,h,j] = Σ_i weight[b,i]·p[b,h,i,j];   out = mean, sum or maximum of c over heads, or c itself
// Shapes     query (B,H,L,D) · key (B,G,S,D), H a multiple of G · lse (B,H,L) f32 or absent (of the visible keys, by a
//            pass of its own: rows are softmax) · weight (B,L) f32 or absent (1) · start (T+1) i32 or absent
//            → out (B,S) or (B,H,S) f32
//            start: packed sequences, L = S; rows start[t] … start[t+1]−1 see the keys of these places
//            causal: row i sees the keys up to i + S − L
// Layout     any strides of inputs; out contiguous
// Types      query, key f32 f16 bf16; products exact, sums and exponentials f32
// Edges      rows of weight 0 and rows that see no key are left out, whatever they hold; L = 0 → zeros; B or S = 0 → nothing; NaN
//            in a visible key stays with the rows that see it. start that does not ascend from 0 to L: the CPU raises, CUDA stays
//            inside the tensors (EFFVLM_DEBUG=1 raises). Exponents below −126 or over 126 (of 2) may count as these
// Order      rows by ascending position in blocks, then heads by ascending index; fixed by shapes, start and the zeros of weight:
//            same result every run and for any thread count; no atomics
// Parallel   CPU: blocks of keys of each head over threads, a key per lane, all rows in turn.  CUDA: block per 64 keys of a head
// Cost       2·B·H·L·S·D flops (half where causal; twice without lse). Extra memory: 4·B·H·S bytes unless heads = none, 8·B·H·L
//            without lse, 12·B·L on CPU; CPU per thread 432·4·D bytes, 656·4·D without lse; O(tokens), the L×S matrix is never
//            stored
// Why so     keys are lanes, so column sums need no reduction across lanes or threads, and what flash attention already knows of
//            its rows (lse) replaces the softmax
// Not for    attention whose matrix is at hand
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/workspace.h"

namespace effvlm {

enum class ScoreHeads : int { none = 0, mean, sum, max };

struct TokenScoreArgs {
  std::int64_t B, H, G, L, S, D, T;
  Dtype dtype;        // of query and key
  const void* query;  // (B,H,L,D)
  std::int64_t query_stride_b, query_stride_h, query_stride_l, query_stride_d;
  const void* key;  // (B,G,S,D)
  std::int64_t key_stride_b, key_stride_g, key_stride_s, key_stride_d;
  const float* lse;  // (B,H,L) or null
  std::int64_t lse_stride_b, lse_stride_h, lse_stride_l;
  const float* weight;  // (B,L) or null
  std::int64_t weight_stride_b, weight_stride_l;
  const std::int32_t* start;  // (T+1) or null: one sequence
  std::int64_t start_stride;
  bool causal;
  float scale;
  ScoreHeads heads;
  float* out;       // (B,S), or (B,H,S) where heads is none
  void* workspace;  // TokenScoreLayout(args).bytes
  int threads;      // CPU only
};

constexpr std::int64_t kScoreKeys = 384;      // keys of a task, CPU
constexpr std::int64_t kScoreRows = 32;       // rows that are packed at a time
constexpr std::int64_t kScoreStatRows = 256;  // rows of a task that finds their sums

struct ScoreRow {  // a row that counts, and the keys [first, last) that it sees
  std::int32_t row, first, last;
};
struct alignas(8) ScoreStat {  // p = 2^(scale·log2 e·<q,k> − shift)·factor, but for the weight
  float shift, factor;
};

namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

struct TokenScoreLayout : Workspace {
  std::int64_t words;  // 32-bit words of a packed row: D, and room for whole transpositions
  // Offsets. f32 (B,H,S); ScoreStat (B,H,L); ScoreRow (B,L), i64 (B); per thread: words (kScoreKeys), (rows), (16)
  std::int64_t sums, stats, rows, counts, packed_keys, packed_rows, staged;

  EFFVLM_HOST_DEVICE explicit TokenScoreLayout(const TokenScoreArgs& a) {
    words = (a.D + 15) / 16 * 16;
    sums = take(a.heads == ScoreHeads::none ? 0 : 4 * a.B * a.H * a.S);
    stats = take(a.lse ? 0 : static_cast<std::int64_t>(sizeof(ScoreStat)) * a.B * a.H * a.L);
    rows = take(a.threads ? static_cast<std::int64_t>(sizeof(ScoreRow)) * a.B * a.L : 0), counts = take(a.threads ? 8 * a.B : 0);
    packed_keys = take(4 * a.threads * kScoreKeys * words);
    packed_rows = take(4 * a.threads * (a.lse ? kScoreRows : kScoreStatRows) * words);
    staged = take(4 * a.threads * 16 * words);
  }
};

}  // namespace

EFFVLM_DECLARE_CPU(token_score, TokenScoreArgs)
void token_score_cuda(const TokenScoreArgs& args, int device, void* stream);

}  // namespace effvlm
