// chunk_scan — recurrence of a matrix state per head, in chunks: scalar decay (SSD, retention, mLSTM) and the delta rule
//
// Math       S ← diag(exp d_t)·S;  then S ← S + g_t·k_t v_tᵀ  or, with beta (delta rule),  S ← S + β_t·k_t (v_t − Sᵀk_t)ᵀ;
//            out_t = scale·Sᵀq_t + skip·v_t.  With l2norm, q and k are first multiplied by 1/√(Σ x² + 1e-6)
// Shapes     q, k (B,L,G,K) · v (B,L,H,V), H a multiple of G · log_decay d (B,L,H) or (B,L,H,K) · gain g, beta β (B,L,H) ·
//            skip (H) · initial_state (S,H,K,V) · cu_seqlens (S+1) → out (B,L,H,V) · final_state (S,H,K,V)
// Layout     any strides, zero included, for all inputs; outputs contiguous
// Types      q, k, v, out f32 f16 bf16; all else f32; one rounding at the store of out (bf16 below the normal numbers may be 0)
// Edges      cu_seqlens: B = 1, sequence s is steps cu_seqlens[s] … [s+1), with a state of its own; else S = B. An empty sequence
//            hands its initial state on. d = −∞ forgets all (exp is 0). Decays between two steps are products of decays or
//            exponentials of sums in f64, never quotients: extreme ones stay right. NaN stays inside its head and, forwards, its
//            sequence
// Order      sums in a fixed order: same result every run and for any thread count
// Parallel   CPU: (sequence, some heads of a group) over threads.  CUDA: block per (sequence, head, part of V)
// Cost       reads L·(2G·K + H·V)·e, writes L·H·V·e bytes; about H·L·(4K·V + Q·(K + V)) flops with chunks of Q steps, 6K·V
//            for the delta rule
// Why so     inside a chunk the recurrence is a causal product of matrices, so that all of its work is products
// Not for    one step at a time: state_update
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/workspace.h"

namespace effvlm {

struct ChunkScanArgs {
  std::int64_t B, L, G, H, K, V;
  std::int64_t S;  // sequences: B, or what cu_seqlens says
  Dtype dtype;     // of q, k, v and out
  const void* q;   // (B,L,G,K)
  const void* k;   // (B,L,G,K)
  const void* v;   // (B,L,H,V)
  std::int64_t q_stride[4], k_stride[4], v_stride[4];
  const float* log_decay;  // (B,L,H,K), where without per_channel the last stride is 0
  std::int64_t decay_stride[4];
  bool per_channel;
  const float* gain;  // (B,L,H); null: 1
  std::int64_t gain_stride[3];
  const float* beta;  // (B,L,H); null: no delta rule
  std::int64_t beta_stride[3];
  const float* skip;  // (H); null: 0
  std::int64_t skip_stride;
  const float* initial_state;  // (S,H,K,V); null: zeros
  std::int64_t initial_stride[4];
  const std::int32_t* cu_seqlens;  // (S+1), contiguous; null: every batch entry is a sequence of L steps
  float scale;
  bool l2norm;
  void* out;           // (B,L,H,V)
  float* final_state;  // (S,H,K,V)
  void* workspace;
  int threads;  // CPU only
};

EFFVLM_DECLARE_CPU(chunk_scan, ChunkScanArgs)

namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

// What a thread needs on the CPU. One size for every level: the largest that any of them needs.
constexpr int kDecaySteps = 64;
inline std::int64_t chunk_scan_steps_bytes(const ChunkScanArgs& args) { return (3 * args.K + 2 * args.V) * 4; }

// Scalar decay. Tiles of f32 whose rows have K or V elements, rounded up, or kDecaySteps.
struct ChunkScanDecayLayout : Workspace {
  std::int64_t k_row, v_row, steps, sums, q, k, q_words, k_words, k_turned, scores, v, v_words, write, weights, state_words, out,
      factors;

  explicit ChunkScanDecayLayout(const ChunkScanArgs& args) {
    constexpr std::int64_t Q = kDecaySteps;
    k_row = (args.K + 15) / 16 * 16, v_row = (args.V + 15) / 16 * 16;
    steps = take(chunk_scan_steps_bytes(args)), sums = take((Q + 1) * 8), factors = take(7 * Q * 4);
    q = take(Q * k_row * 4), k = take(Q * k_row * 4), q_words = take(Q * k_row * 4), k_words = take(Q * k_row * 4);
    k_turned = take(Q * k_row * 4), scores = take(Q * Q * 4), weights = take(Q * Q * 4);
    v = take(Q * v_row * 4), v_words = take(Q / 2 * v_row * 4), write = take(Q * v_row * 4), out = take(Q * v_row * 4);
    state_words = take((args.K + 1) / 2 * v_row * 4);
  }
};

// The delta rule, and decays per channel: see DeltaTile.
constexpr std::int64_t kDeltaSteps = 16, kDeltaPanel = 32;
inline std::int64_t chunk_scan_delta_state(const ChunkScanArgs& args) {
  return (args.V + kDeltaPanel - 1) / kDeltaPanel * kDeltaPanel * args.K;
}

// Heads of a group that are scanned together, as they share q, k and scores: threads must all get some, and the second cache hold
// the states that the delta rule keeps.
inline std::int64_t chunk_scan_heads(const ChunkScanArgs& args) {
  const std::int64_t group = args.H / (args.G ? args.G : 1), fair = args.S * args.H / (3 * args.threads);
  const std::int64_t fit = args.beta || args.per_channel ? (512 << 10) / (4 * chunk_scan_delta_state(args) + 1) : 8;
  const std::int64_t most = fair < fit ? fair : fit;
  return most < 1 ? 1 : most < group ? most : group;
}

inline std::int64_t chunk_scan_delta_bytes(const ChunkScanArgs& args) {
  const std::int64_t row = (args.K + 15) / 16 * 16, states = chunk_scan_delta_state(args) * chunk_scan_heads(args);
  const std::int64_t rows = 7 * kDeltaSteps + kDeltaPanel / 2 + 1, others = 4 * kDeltaSteps + 3 * kDeltaPanel + 1;
  return (rows * row + others * kDeltaSteps + states) * 4;
}

inline std::int64_t chunk_scan_workspace_cpu(const ChunkScanArgs& args) {
  const bool delta = args.beta || args.per_channel;
  const std::int64_t bytes = delta ? chunk_scan_delta_bytes(args) : ChunkScanDecayLayout(args).bytes;
  return args.threads * ((bytes + 255) / 256 * 256);
}

}  // namespace

void chunk_scan_cuda(const ChunkScanArgs& args, int device, void* stream);
std::int64_t chunk_scan_workspace_cuda(const ChunkScanArgs& args);

}  // namespace effvlm
