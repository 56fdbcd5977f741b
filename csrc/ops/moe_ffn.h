// moe_ffn — the feed-forward experts of a sparse mixture, for tokens that are already routed
//
// Math       out[t,:] = Σ_k weight[t,k] · (down[e] · h + down_bias[e]),  e = ids[t,k],  h = gate(up[e] · x[t,:] + up_bias[e])
//            gated:     h[i] = act(min(g, limit)) · (clamp(u, −limit, limit) + offset), g and u = rows i and I+i of the first
//                       product (interleaved: rows 2i and 2i+1);   not gated: h[i] = act(row i)
//            act:       silu g·σ(alpha·g), gelu (erf), gelu_tanh, relu, relu2 = relu², identity
// Shapes     x (T,H) · ids (T,K) i64 · weight (T,K) f32 · up (E,R,H), R = 2I gated, I not · up_bias (E,R) or absent ·
//            down (E,O,I) · down_bias (E,O) or absent → out (T,O)
// Layout     any strides; weights with contiguous H (of up) and I (of down), or both transposed (R and O contiguous), are read in
//            place, others through a packed copy of a few rows; out contiguous
// Types      x, up, down, biases, out all f32, f16 or bf16; sums and gates in f32; h is rounded to the type once
// Edges      ids −1 and E: the choice is skipped; other ids outside 0 … E−1: the CPU raises, CUDA skips; a token without choices
//            → zeros; a repeated id counts twice; T, K, E, O or I = 0 → zeros; NaN stays in its token
// Order      a token's experts are added by ascending id, then by ascending k; same bits for any thread count; no atomics
// Parallel   CPU: first (expert, rows of up), then rows of down, each thread owning its columns of out.
//            CUDA: a sort when there are over 1,024 choices; a warp per (expert, element of h), then (expert, column), then
//            a block per token for the sum
// Cost       reads each needed expert once, (R·H + O·I)·e bytes; 2·T·K·(R·H + O·I) flops; extra memory T·K·I·e bytes for h, as
//            rows or as blocks, 4·(96·T + 48·H + 10752) per thread (CPU; transposed 4·(512·T + 104448)), T·K·(I·e + 4·O) (CUDA)
// Why so     Hugging Face stores the summed dimension contiguous. So weights are never packed: few tokens are dot products with
//            streamed rows; many are packed themselves, 16 to a block, and weights broadcast. Of transposed weights the lanes are
//            rows, and tokens are broadcast. Gathering tokens is a table of addresses; owning columns makes the weighted sum part
//            of the second product
// Not for    gates outside the list above, weights of less than 16 bits, many tokens on CUDA (no tensor cores; grouped GEMMs win)
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/workspace.h"

namespace effvlm {

enum class Act : int { silu = 0, gelu, gelu_tanh, relu, relu2, identity };

struct MoeFfnArgs {
  std::int64_t T, K, E, H, I, O;
  Dtype dtype;
  const void* x;  // (T,H)
  std::int64_t x_stride_t, x_stride_h;
  const std::int64_t* ids;  // (T,K)
  std::int64_t ids_stride_t, ids_stride_k;
  const float* weight;  // (T,K)
  std::int64_t weight_stride_t, weight_stride_k;
  const void* up;  // (E,R,H)
  std::int64_t up_stride_e, up_stride_r, up_stride_h;
  const void* up_bias;  // (E,R) or null
  std::int64_t up_bias_stride_e, up_bias_stride_r;
  const void* down;  // (E,O,I)
  std::int64_t down_stride_e, down_stride_o, down_stride_i;
  const void* down_bias;  // (E,O) or null
  std::int64_t down_bias_stride_e, down_bias_stride_o;
  Act act;
  bool gated, interleaved;
  float alpha, limit, offset;  // limit: infinity for none
  void* out;                   // (T,O)
  void* workspace;             // moe_ffn_workspace_cpu(...) or moe_ffn_workspace_cuda(...) bytes
  std::int64_t workspace_bytes;
  int threads;  // CPU only
};

// ---- CPU: how the workspace is divided; offsets in bytes ----

constexpr std::int64_t kMoeUpRows = 48;      // rows of h that a task of the first product makes: 96 rows of up when gated
constexpr std::int64_t kMoeDownRows = 96;    // the most columns of out that a task of the second product owns
constexpr std::int64_t kMoeTokens = 96;      // packed tokens of an expert that are taken together
constexpr std::int64_t kMoeBlock = 16;       // tokens of a block, a lane each
constexpr std::int64_t kMoeFewTokens = 8;    // at most so many tokens of an expert are multiplied row by row, instead of a block
constexpr std::int64_t kMoeCopiedRows = 12;  // rows that are copied at a time where their type or an odd length asks for it

// Weights stored transposed (rows next to each other) are multiplied in that order, unless many tokens can go to AMX tiles.
constexpr std::int64_t kTurnedRows = 512;    // the most rows of weights that a task takes: memory is read in runs of so many
constexpr std::int64_t kTurnedChunk = 192;   // tokens that are taken together
constexpr std::int64_t kTurnedStride = 544;  // floats between the sums of two tokens: kTurnedRows, and room to write past them

constexpr std::int64_t kMoeSums = 112;  // floats between the sums of two tokens: kMoeDownRows, and room to write past them

namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

// Whether the level in use multiplies pairs of elements of the type.
inline bool multiplies_pairs(Dtype dtype) { return dtype == Dtype::bf16 && isa() >= Isa::avx512_bf16; }

// Whether the weights are to be multiplied in transposed order.
inline bool is_turned(bool rows_adjoin, std::int64_t choices, std::int64_t E, Dtype dtype) {
  return rows_adjoin && !(isa() == Isa::amx && dtype == Dtype::bf16 && choices > kMoeFewTokens * E);
}
// How many of `rows` rows (of all experts) a task takes, so that every thread has some.
inline std::int64_t turned_rows(std::int64_t rows, std::int64_t T, int threads) {
  const std::int64_t most = T > 256 ? kTurnedRows / 2 : kTurnedRows, share = (rows / threads + 127) / 128 * 128;
  return share < 128 ? 128 : share < most ? share : most;
}
inline bool moe_ffn_is_turned(const MoeFfnArgs& a) {
  const bool up = a.up_stride_r == 1 && a.up_stride_h != 1, down = a.down_stride_o == 1 && a.down_stride_i != 1;
  return is_turned(up && down, a.T * a.K, a.E, a.dtype);
}

struct MoeFfnLayout : Workspace {
  bool turned;
  std::int64_t words_h, words_i;     // 32-bit words of a token and of h, where they are broadcast
  std::int64_t chunk, turned_chunk;  // tokens that scratch has room for: fewer than the constants where there are fewer
  std::int64_t up_rows;              // rows of up per task, in transposed order
  std::int64_t down_rows;            // columns of out per task: more when hidden rows are many to reread
  std::int64_t hidden_stride, x_stride, row_stride;  // elements; rows start on cache lines
  std::int64_t x_block, hidden_block;                // 32-bit words of a packed block
  // Offsets. i32 (E+1), i32 (T·K), i32 (E+1); x with contiguous channels; h, as rows (T·K,I) or as blocks
  std::int64_t start, order, used, first_block, x, hidden, hidden_blocks;
  // Offsets, per thread. i64: what is packed; x as blocks; f32 sums of both products; copied rows of weights.
  std::int64_t packed, x_blocks, sums, total, rows, copy;
  // Offsets, weights in transposed order: x as words (T), h as words (T·K); per thread: f32 sums.
  std::int64_t x_words, hidden_words, turned_sums;

  // pairs: whether a packed word is two 16-bit elements, or one f32.
  MoeFfnLayout(const MoeFfnArgs& a, bool pairs) {
    const std::int64_t size = a.dtype == Dtype::f32 ? 4 : 2, choices = a.T * a.K, widest = a.H > a.I ? a.H : a.I;
    const auto padded = [](std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; };
    const std::int64_t crowded = choices / (kMoeFewTokens + 1), blocks = choices / kMoeBlock + (crowded < a.E ? crowded : a.E);
    const bool strided = a.up_stride_h != 1 || a.down_stride_i != 1;
    turned = moe_ffn_is_turned(a), words_h = pairs ? (a.H + 1) / 2 : a.H, words_i = pairs ? (a.I + 1) / 2 : a.I;
    up_rows = turned_rows((choices < a.E ? choices : a.E) * (a.gated ? 2 : 1) * a.I, a.T, a.threads);
    down_rows = turned ? turned_rows(a.O, a.T, a.threads) : a.T <= 64 ? kMoeDownRows / 2 : kMoeDownRows;
    chunk = choices < kMoeTokens ? padded(choices, 2 * kMoeBlock) : kMoeTokens;
    turned_chunk = choices < kTurnedChunk ? choices : kTurnedChunk;
    hidden_stride = padded(a.I, 64), x_stride = padded(a.H, 64), row_stride = padded(widest, 64);
    x_block = kMoeBlock * words_h, hidden_block = kMoeBlock * words_i;
    start = take(4 * (a.E + 1)), order = take(4 * choices), used = take(4 * (a.E + 1)), first_block = take(4 * (a.E + 1));
    total = take(4 * a.threads * a.T * down_rows);
    x_words = take(turned ? 4 * a.T * words_h : 0), hidden_words = take(turned ? 4 * choices * words_i : 0);
    turned_sums = take(turned ? 4 * a.threads * turned_chunk * kTurnedStride : 0);
    if (turned) return;
    x = take(a.x_stride_h != 1 ? a.T * x_stride * size : 0);
    hidden = take(choices * hidden_stride * size);
    hidden_blocks = take(4 * blocks * hidden_block);
    packed = take(8 * a.threads);
    x_blocks = take(4 * a.threads * chunk / kMoeBlock * x_block);
    sums = take(4 * a.threads * chunk * kMoeSums);
    rows = take(strided ? a.threads * kMoeDownRows * row_stride * size : 0);
    copy = take(4 * a.threads * kMoeCopiedRows * row_stride);
  }
};

}  // namespace

std::int64_t moe_ffn_workspace_cuda(const MoeFfnArgs& args);

EFFVLM_DECLARE_CPU(moe_ffn, MoeFfnArgs)
void moe_ffn_cuda(const MoeFfnArgs& args, int device, void* stream);

}  // namespace effvlm
