// causal_conv1d — depthwise causal convolution with history, for whole sequences and single steps
//
// Math       out[b,d,t] = act(bias[d] + Σ_w weight[d,w]·x[b,d,t−W+1+w]), act the identity or y/(1 + e^−y). Before the first input
//            come the last W−1 columns of state, or zeros; afterwards state holds the last M columns of [state, x]
// Shapes     x (B,D,L) · weight (D,W) · bias (D,) or absent · state (S,D,M) or absent, M ≥ W−1 · cu_seqlens (S+1,) i32 or absent
//            → out (B,D,L). 2 ≤ W ≤ 16. S = B; with cu_seqlens B = 1 and sequence s is x[0,:,cu_seqlens[s] … cu_seqlens[s+1]−1]
// Layout     any strides; out is dense, D-contiguous where x is, else L-contiguous; vectors along whichever is contiguous
// Types      x, out f32 f16 bf16; weight, bias, state each of x's type or f32; f32 arithmetic, one rounding at the store
//            (bf16: SiLU may be off by 2^-13 before it, and what is below the normal numbers may be stored as 0)
// Edges      a sequence of no inputs leaves its state alone; D, B or L = 0 → no work; NaN reaches the W outputs that it is an
//            input of; cu_seqlens that do not ascend from 0 to L: the CPU raises, CUDA stays inside x (EFFVLM_DEBUG=1 raises)
// Order      bias, then w = 0 … W−1, one fused multiply-add each; same result for any layout, split of L and thread count
// Parallel   CPU: (sequence, channels) over threads, each from its first input to its state.  CUDA: thread per output, tiles of L
//            in shared memory (L-contiguous) or channels side by side (D-contiguous); then thread per row of state
// Cost       reads B·D·L·e, writes B·D·L·e bytes and each state once, 2·B·D·L·W flops and B·D·L exps: memory-bound
// Why so     inputs are converted once into a tile with their history in front, so the first outputs are like all others;
//            the state of a channel is written by whoever read it, after its last output
// Not for    dilation, two-sided padding, channels mixed with one another
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"

namespace effvlm {

constexpr int kConvMaxWidth = 16;

struct CausalConv1dArgs {
  std::int64_t B, D, L, W, S, M;
  bool silu;
  Dtype dtype;    // of x and out
  const void* x;  // (B,D,L)
  std::int64_t x_stride_b, x_stride_d, x_stride_l;
  Dtype weight_dtype;
  const void* weight;  // (D,W)
  std::int64_t weight_stride_d, weight_stride_w;
  Dtype bias_dtype;
  const void* bias;  // (D,); null: zeros
  std::int64_t bias_stride;
  Dtype state_dtype;
  void* state;  // (S,D,M); null: zeros before, kept nowhere after
  std::int64_t state_stride_s, state_stride_d, state_stride_m;
  const std::int32_t* cu_seqlens;  // (S+1,); null: every batch entry is a sequence
  std::int64_t cu_seqlens_stride;
  void* out;  // (B,D,L)
  std::int64_t out_stride_b, out_stride_d, out_stride_l;
  int threads;  // CPU only
};

EFFVLM_DECLARE_CPU(causal_conv1d, CausalConv1dArgs)
void causal_conv1d_cuda(const CausalConv1dArgs& args, int device, void* stream);

}  // namespace effvlm
