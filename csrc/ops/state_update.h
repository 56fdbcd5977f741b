// state_update — one decode step of a recurrent matrix or diagonal state, in place
//
// Math       t = dt + dt_bias, log(1 + e^t) of it if dt_softplus; a = e^(t·A), each (p,n). l2norm: B and C over √(Σ_n ² + 1e-6).
//            Without beta: state ← a·state + t·x[p]·B[n]. With beta: state ← a·state, r[p] = Σ_n state[p,n]·B[n],
//            state ← state + beta·(x[p] − r[p])·B[n]. Then out[p] = (scale·Σ_n state[p,n]·C[n] + D[p]·x[p])·silu(z[p])
// Shapes     state (S,H,P,N) · x, z (S,H,P) · dt (S,H,P,N) · A, dt_bias (H,P,N) · B, C (S,G,N) · D (H,P) · beta (S,H)
//            → out (S,H,P). H % G = 0, N ≤ 1024; D, z, dt_bias, beta may be absent: no term, no gate; A: 1. Callers may leave h
//            out everywhere, n out of dt and dt_bias, and, with beta, p out of dt: the binding makes strides of 0 of it
// Layout     any strides, 0 in everything but state; out contiguous. Fast: state contiguous along N, or along P with a decay that
//            does not depend on p; what is expanded (one decay per head, per (h,n), one t per p) is computed once
// Types      x, z, B, C, out f32 f16 bf16; state any of these; dt, A, D, dt_bias, beta each f32 or x's type; f32 arithmetic;
//            state rounded once when stored (bf16 below the normal numbers may become 0), out from what was not rounded; e^y of
//            |y| > 87 may be e^±87
// Edges      S, H or P = 0 → no work; N = 0: out = D·x·silu(z); NaN in a row of the state stays in its row and its out
// Order      sums over n in vector lanes, then lanes pairwise; same result every run and for any thread count
// Parallel   CPU: (sequence, head, 64 … 256 rows p) over threads, if the state is worth it.  CUDA: warp per row, block per eight
// Cost       reads and writes the state once (delta: twice from the cache), 5 (delta 7) flops per element: memory-bound
// Why so     Mamba-1 (H = 1, decay per (p,n)), Mamba-2 (decay per head), gated delta rule and KDA (decay per n) differ in
//            strides only, and strides choose the loop
// Not for    many steps at once: a scan reads the state once for all of them
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"

namespace effvlm {

constexpr int kStateMaxN = 1024;

struct StateUpdateArgs {
  std::int64_t S, H, G, P, N;
  bool dt_softplus, l2norm;
  float scale;
  Dtype state_dtype, dtype;  // dtype: of x, z, B, C and out
  void* state;               // (S,H,P,N)
  std::int64_t state_stride_s, state_stride_h, state_stride_p, state_stride_n;
  const void* x;  // (S,H,P)
  std::int64_t x_stride_s, x_stride_h, x_stride_p;
  Dtype dt_dtype;
  const void* dt;  // (S,H,P,N)
  std::int64_t dt_stride_s, dt_stride_h, dt_stride_p, dt_stride_n;
  Dtype A_dtype;
  const void* A;  // (H,P,N); null on CUDA: ones
  std::int64_t A_stride_h, A_stride_p, A_stride_n;
  const void* B;  // (S,G,N)
  std::int64_t B_stride_s, B_stride_g, B_stride_n;
  const void* C;  // (S,G,N)
  std::int64_t C_stride_s, C_stride_g, C_stride_n;
  Dtype D_dtype;
  const void* D;  // (H,P); null: zeros
  std::int64_t D_stride_h, D_stride_p;
  const void* z;  // (S,H,P); null: no gate
  std::int64_t z_stride_s, z_stride_h, z_stride_p;
  Dtype dt_bias_dtype;
  const void* dt_bias;  // (H,P,N); null: zeros
  std::int64_t dt_bias_stride_h, dt_bias_stride_p, dt_bias_stride_n;
  Dtype beta_dtype;
  const void* beta;  // (S,H); null: no delta rule
  std::int64_t beta_stride_s, beta_stride_h;
  void* out;    // (S,H,P)
  int threads;  // CPU only
};

EFFVLM_DECLARE_CPU(state_update, StateUpdateArgs)
void state_update_cuda(const StateUpdateArgs& args, int device, void* stream);

}  // namespace effvlm
