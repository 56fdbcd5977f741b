// selective_scan — the scan of Mamba-1 (S6) with a diagonal state, along any number of paths over the same tokens
//
// Math       per path k, sequence s, channel d:  dt = delta + bias, softplus'd if asked
//            h[n] ← exp(dt·A[n])·h[n] + dt·u·B[n];   y_k = Σ_n C[n]·h[n] + skip·u;   out = Σ_k y_k, times silu(z) if there is one
// Shapes     u, z, out (B,D,L) · delta (B,K,D,L) · A (K,D,N) · B, C (B,K,N,L) · skip, bias (K,D) f32 or absent
//            initial (S,K,D,N) f32 or absent (zeros) → final (S,K,D,N) f32. S = B; or, with starts (S+1) i32, the number of
//            sequences packed into L (then B = K = 1), each with a state of its own
//            path k: step t is at place offset + t / inner·outer_stride + t % inner·inner_stride of the axis L, in every tensor
// Layout     any strides, zero included; nothing is copied to other strides in memory
// Types      u, delta, B, C, z: f32 f16 bf16, each its own; out as u; all else and all arithmetic f32; one rounding at the store
//            (bf16 below the normal numbers may be stored as 0)
// Edges      L = 0 or an empty path: final = initial; places on no path are zeros; B or D = 0 → nothing; N is 1 … 256; exp
//            underflows to 0; NaN stays in its channel and sequence, from its step on. A path comes to a place at most once.
//            starts that do not ascend from 0 to L: the CPU raises, CUDA stays inside the tensors
// Order      steps in the order of the path, states by ascending n in groups, paths by ascending k; the same result every run and
//            for any number of threads; no atomics
// Parallel   CPU: blocks of one vector of channels over threads, a channel per lane.  CUDA: block per 8 to 32 channels, which
//            share tiles of B and C, some of a channel's states to a lane; L is sequential, also where blocks are few
// Cost       B·K·D·L·N updates of 12 vector operations (CPU) or one exp2 and 4 fma (CUDA); bytes: u, delta, z, B, C, out, once
//            each. Extra memory on the CPU, per thread: 17 to 180 KB; with paths 192·L bytes more (0.6 MB for 56×56 tokens).
//            CUDA: 4·B·D·L bytes, with paths only
// Why so     channels are lanes, so that a state never leaves its register within a tile, and B and C are broadcast from memory;
//            paths are arithmetic on places, so that cross-scan, scans, merge and gate are one pass without permuted copies
// Not for    complex A; B or C that do not depend on the token; decay per head (Mamba-2), which has a matrix form
#pragma once
#include <cstdint>

#include "core/cpu/isa.h"
#include "core/dtype.h"
#include "core/workspace.h"

namespace effvlm {

// A tensor with axes among batch or sequence (b), path (k), channel (c) and place or state (l); the strides of the others are 0.
struct ScanTensor {
  void* data;  // null: absent
  Dtype dtype;
  std::int64_t stride_b, stride_k, stride_c, stride_l;
};

struct ScanPath {
  std::int64_t outer, inner, offset, outer_stride, inner_stride;
};

constexpr int kScanPaths = 8;
constexpr std::int64_t kScanStates = 256;

struct SelectiveScanArgs {
  std::int64_t B, D, L, N, K, S;
  ScanTensor u, delta, a, b, c, skip, z, bias, initial, out, final;  // of b and c, stride_c is that of N
  const std::int32_t* starts;                                        // (S+1) or null
  std::int64_t starts_stride;
  bool softplus, in_order;     // in_order: one path, place t at step t
  ScanPath paths[kScanPaths];  // unless in_order
  void* workspace;
  int threads;  // CPU only
};

constexpr std::int64_t kScanLanes = 16;   // of the widest vector
constexpr std::int64_t kScanTile = 64;    // steps
constexpr std::int64_t kScanBlocks = 16;  // vectors of channels that share a tile of B and C, at most

namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

// The CPU's workspace: one part per thread, in floats.
struct SelectiveScanLayout : Workspace {
  std::int64_t rows, blocks, pitch;  // pitch: floats of a token's B, rounded up so that vectors may be stored
  std::int64_t u, dt, y, scratch, states, decays, skips, biases, b, c, thread;

  explicit SelectiveScanLayout(const SelectiveScanArgs& a)
      : rows(a.in_order ? kScanTile : a.L),
        blocks(a.in_order && a.N <= 64 ? kScanBlocks : 1),
        pitch(a.N == 1 ? 1 : (a.N + kScanLanes - 1) / kScanLanes * kScanLanes) {
    u = floats(rows * kScanLanes), dt = floats(rows * kScanLanes), y = floats(rows * kScanLanes);
    scratch = floats(kScanTile * kScanLanes);
    states = floats(blocks * a.N * kScanLanes), decays = floats(blocks * a.N * kScanLanes);
    skips = floats(blocks * kScanLanes), biases = floats(blocks * kScanLanes);
    b = floats(kScanTile * pitch), c = floats(kScanTile * pitch);
    thread = bytes / 4;
    bytes *= a.threads;
  }
  std::int64_t floats(std::int64_t count) { return take(4 * count) / 4; }
};

}  // namespace

inline std::int64_t selective_scan_workspace_cuda(const SelectiveScanArgs& a) { return a.in_order ? 0 : 4 * a.B * a.D * a.L; }

EFFVLM_DECLARE_CPU(selective_scan, SelectiveScanArgs)
void selective_scan_cuda(const SelectiveScanArgs& args, int device, void* stream);

}  // namespace effvlm
