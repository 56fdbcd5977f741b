// The delta rule, and decays per channel, in chunks of 16 steps. Part of chunk_scan_cpu.cpp.
//
// With A_l the product of a chunk's decays up to step l, and Γ_ls that of the steps after s up to l, what the steps write is
// D_l = β_l·(v_l − Sᵀ(A_l∘k_l) − Σ_{s<l} (k_l·Γ_ls∘k_s)·D_s), a triangular system in D, then out_l = scale·(Sᵀ(A_l∘q_l) +
// Σ_{s≤l} (q_l·Γ_ls∘k_s)·D_s) and S ← A_end∘S + Σ_s (Γ_end,s∘k_s)·D_sᵀ. Columns of S do not meet: a panel of them goes through
// all of this while it is in the first cache. Chunks are this short because the work on S does not depend on their length, and
// all else grows with it. Decays are only ever multiplied, never divided: no exponent can overflow, however extreme they are.
#pragma once
#include "core/cpu/exp_short.h"
#include "ops/chunk_scan_delta_tile.h"

namespace effvlm::EFFVLM_ISA {
namespace {

// Solves for D in place, the right-hand side given: M (negated, strictly lower) times the rows before.
inline void solve_panel(int n, const float* M, float* D) {
  constexpr int W = f32v::width;
  for (int first = 0; first < n; first += 4) {
    const int end = first + 4 < n ? first + 4 : n;
    tile_product(FromSums{}, end - first, kPanel, first, M + first * kDeltaSteps, kDeltaSteps, 1, D, kPanel, D + first * kPanel,
                 kPanel);
    for (int l = first + 1; l < end; ++l)
      for (int c = 0; c < kPanel; c += W) {
        f32v sum = load(D + l * kPanel + c);
        for (int s = first; s < l; ++s) sum = fma(set1(M[l * kDeltaSteps + s]), load(D + s * kPanel + c), sum);
        store(D + l * kPanel + c, sum);
      }
  }
}

inline bool all_finite(const float* x, int count) {
  f32v sum = set1(0);
  for (int c = 0; c < count; c += f32v::width) sum = fma(load(x + c), set1(0), sum);
  return reduce_add(sum) == 0;
}

// Step by step, where a value that is not finite must not reach the steps before it by a product with zero.
template <bool kPerChannel, bool kDelta>
void steps_of_panel(const DeltaTile& tile, int n, float scale, float* S) {
  for (int l = 0; l < n; ++l)
    for (int j = 0; j < kPanel; ++j) {
      float old = 0, sum = 0;
      for (i64 i = 0; i < tile.K; ++i) {
        S[i * kPanel + j] *= tile.decay[kPerChannel ? l * tile.row + i : l];
        old += S[i * kPanel + j] * tile.k[l * tile.row + i];
      }
      const float v = tile.v[l * kPanel + j], write = tile.strength[l] * (kDelta ? v - old : v);
      for (i64 i = 0; i < tile.K; ++i) {
        S[i * kPanel + j] += tile.k[l * tile.row + i] * write;
        sum += S[i * kPanel + j] * tile.q[l * tile.row + i];
      }
      tile.out[l * kPanel + j] = scale * sum;
    }
}

// out = q_in·S, for bf16 inputs, whose output is rounded to bf16, in pairs where there are such products; what enters the state
// stays in f32.
template <class T>
void read_state(const DeltaTile& tile, int n, const float* S) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>) {
    pair_rows(static_cast<int>(tile.K), kPanel, S, kPanel, tile.state_words, kPanel);
    return tile_pairs(FromZeros{}, n, kPanel, static_cast<int>(tile.K + 1) / 2, tile.q_words, tile.row / 2, 1, tile.state_words,
                      kPanel, tile.out, kPanel);
  }
#endif
  tile_product(FromZeros{}, n, kPanel, static_cast<int>(tile.K), tile.q_in, tile.row, 1, S, kPanel, tile.out, kPanel);
}

// One panel of the state through one chunk: tile.v to tile.out.
template <class T, bool kPerChannel, bool kDelta>
void chunk_of_panel(const DeltaTile& tile, int n, float scale, float* S) {
  constexpr int W = f32v::width;
  const int K = static_cast<int>(tile.K);
  for (int l = 0; l < n; ++l)
    for (int c = l * kPanel; c < (l + 1) * kPanel; c += W) store(tile.D + c, set1(tile.strength[l]) * load(tile.v + c));
  if (kDelta) {
    tile_product(FromSums{}, n, kPanel, K, tile.k_in, tile.row, 1, S, kPanel, tile.D, kPanel);
    solve_panel(n, tile.M, tile.D);
  }
  if (!all_finite(tile.D, n * kPanel)) return steps_of_panel<kPerChannel, kDelta>(tile, n, scale, S);
  read_state<T>(tile, n, S);
  tile_product_causal(FromSums{}, n, kPanel, n, tile.P, kDeltaSteps, 1, tile.D, kPanel, tile.out, kPanel);
  tile_product(FromScaled{tile.total}, K, kPanel, n, tile.k_out, 1, tile.row, tile.D, kPanel, S, kPanel);
}

// n steps from t on of one head, whose state is given; `first`: of those that share their q and k.
template <class T, bool kPerChannel, bool kDelta>
void chunk_of_head(const ChunkScanArgs& a, const Head& head, i64 t, int n, const DeltaTile& tile, float* state, bool first) {
  const float skip = a.skip ? a.skip[head.h * a.skip_stride] : 0;
  load_factors<T, kPerChannel>(a, head, t, n, tile);
  decay_rows<T, kPerChannel>(tile, n, a.scale);
  if (kPerChannel) {
    score_channels(tile, n, a.scale);
  } else {
    score_steps(tile, n, a.scale);
  }
  T* out = static_cast<T*>(a.out) + ((head.b * a.L + t) * a.H + head.h) * a.V;
  for (i64 j = 0; j < a.V; j += kPanel) {
    const i64 columns = a.V - j < kPanel ? a.V - j : kPanel;
    prefetch_chunk<T, kPerChannel>(a, head, t + kDeltaSteps, kDeltaSteps * j / a.V, kDeltaSteps * (j + columns) / a.V, first);
    load_rows<T>(a.v, a.v_stride, head.b, t, head.h, j, n, columns, tile.v, kPanel);
    chunk_of_panel<T, kPerChannel, kDelta>(tile, n, a.scale, state + j * a.K);
    for (int l = 0; l < n; ++l) {
      const float *o = tile.out + l * kPanel, *v = tile.v + l * kPanel;
      T* to = out + l * a.H * a.V + j;
      const auto value = [&](i64 c) { return skip != 0 ? fma(set1(skip), load(v + c), load(o + c)) : load(o + c); };
      for_lanes(
          columns, [&](i64 c) { store_short(to + c, value(c)); }, [&](i64 c, int rest) { store_short(to + c, value(c), rest); });
    }
  }
}

// `heads` heads of one group, one sequence: the first is given, the states of the others follow.
template <class T, bool kPerChannel, bool kDelta>
void scan_panels(const ChunkScanArgs& a, const Head& head, i64 heads, float* scratch) {
  const DeltaTile tile(a, scratch);
  const i64 inside = chunk_scan_delta_state(a), outside = a.K * a.V;
  for (i64 i = 0; i < heads; ++i) tile.move_state<true>(a.V, head.state + i * outside, tile.states + i * inside);
  for (i64 t = head.first; t < head.first + head.count; t += kDeltaSteps) {
    const i64 left = head.first + head.count - t;
    const int n = static_cast<int>(left < kDeltaSteps ? left : kDeltaSteps);
    load_shared<T>(a, head, t, n, tile);
    if (!kPerChannel) multiply_steps(tile, n);
    for (i64 i = 0; i < heads; ++i) {
      const Head one{head.b, head.h + i, head.first, head.count, nullptr};
      chunk_of_head<T, kPerChannel, kDelta>(a, one, t, n, tile, tile.states + i * inside, i == 0);
    }
  }
  for (i64 i = 0; i < heads; ++i) tile.move_state<false>(a.V, head.state + i * outside, tile.states + i * inside);
}

template <class T>
void scan_delta(const ChunkScanArgs& a, const Head& head, i64 heads, float* scratch) {
  if (a.per_channel) {
    a.beta ? scan_panels<T, true, true>(a, head, heads, scratch) : scan_panels<T, true, false>(a, head, heads, scratch);
  } else {
    scan_panels<T, false, true>(a, head, heads, scratch);
  }
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
