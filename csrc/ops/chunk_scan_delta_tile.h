// What a chunk's steps are to all columns of the state: rows with their decays, and scores of pairs of steps. Part of
// chunk_scan_delta.h.
#pragma once
#include "core/cpu/dot.h"
#include "core/cpu/tile_product.h"
#include "ops/chunk_scan_steps.h"

namespace effvlm::EFFVLM_ISA {
namespace {

constexpr int kPanel = kTileVectors * f32v::width;  // columns of the state that go through a chunk together
static_assert(kPanel <= kDeltaPanel && kDeltaPanel % kPanel == 0);

// Parts of a thread's scratch. Rows of `row` floats, zeros past K; panels of kPanel columns, zeros past V.
struct DeltaTile {
  i64 K, row;
  float *q, *k, *decay;          // as they come, but for l2norm; decay is a row of factors per step, or one factor
  float *q_in, *k_in, *k_out;    // rows that read the state, q with the scale, k negated and with β; rows that write to it
  float *q_words, *state_words;  // q_in and a panel as pairs of bf16
  float *total, *strength;       // the chunk's decay per channel; β or gain per step
  float *of_q, *of_k;            // products of q and k with k
  float *M, *P;                  // scores of k, negated and with β, strictly lower; scores of q, with the scale, lower
  float *v, *D, *out, *states;   // states: of heads, one after the other

  DeltaTile(const ChunkScanArgs& a, float* scratch) : K(a.K), row((a.K + 15) / 16 * 16) {
    const auto take = [&](i64 count) { return scratch += count, scratch - count; };
    for (float** tile : {&q, &k, &decay, &q_in, &k_in, &k_out}) *tile = take(kDeltaSteps * row);
    q_words = take(kDeltaSteps * row / 2), state_words = take((K + 1) / 2 * kPanel);
    total = take(row), strength = take(kDeltaSteps);
    for (float** tile : {&of_q, &of_k, &M, &P}) *tile = take(kDeltaSteps * kDeltaSteps);
    for (float** tile : {&v, &D, &out}) *tile = take(kDeltaSteps * kPanel);
    std::memset(q, 0, static_cast<std::size_t>(scratch - q) * sizeof(float));
    states = scratch;
  }

  // Between (K,V) and panels (K,kPanel).
  template <bool kIn>
  void move_state(i64 V, float* outside, float* state) const {
    for (i64 j = 0; j < V; j += kPanel)
      for (i64 i = 0; i < K; ++i) {
        float *panel = state + j * K + i * kPanel, *there = outside + i * V + j;
        const i64 columns = V - j < kPanel ? V - j : kPanel;
        if (kIn) std::memset(panel, 0, kPanel * sizeof(float));
        std::memcpy(kIn ? panel : there, kIn ? there : panel, columns * sizeof(float));
      }
  }
};

// to[l][c] = base[b][t + l][h][first + c] for l < n, c < count; zeros up to the next vector.
template <class T>
void load_rows(const void* base, const i64* stride, i64 b, i64 t, i64 h, i64 first, int n, i64 count, float* to, i64 to_stride) {
  const T* from = static_cast<const T*>(base) + b * stride[0] + t * stride[1] + h * stride[2] + first * stride[3];
  for (int l = 0; l < n; ++l, from += stride[1], to += to_stride) {
    if (stride[3] == 1) {
      for_lanes(
          count, [&](i64 c) { store(to + c, load(from + c)); }, [&](i64 c, int rest) { store(to + c, load(from + c, rest)); });
    } else {
      for (i64 c = 0; c < count; ++c) to[c] = to_f32(from[c * stride[3]]);
    }
  }
}

// Steps t + from … t + to, as far as there are such; `rows`: of q and k too.
template <class T, bool kPerChannel>
[[gnu::always_inline]] inline void prefetch_chunk(const ChunkScanArgs& a, const Head& head, i64 t, i64 from, i64 to, bool rows) {
  const i64 left = head.first + head.count - t, n = (to < left ? to : left) - from, g = head.h / (a.H / a.G);
  if (rows) {
    prefetch_rows<T>(a.q, a.q_stride, head.b, t + from, g, n, a.K);
    prefetch_rows<T>(a.k, a.k_stride, head.b, t + from, g, n, a.K);
  }
  prefetch_rows<T>(a.v, a.v_stride, head.b, t + from, head.h, n, a.V);
  if (kPerChannel) prefetch_rows<float>(a.log_decay, a.decay_stride, head.b, t + from, head.h, n, a.K);
}

inline void normalise_rows(int n, i64 count, float* x) {
  for (int l = 0; l < n; ++l, x += count) {
    f32v sum = set1(0);
    for (i64 c = 0; c < count; c += f32v::width) sum = fma(load(x + c), load(x + c), sum);
    const f32v inverse = set1(1 / std::sqrt(reduce_add(sum) + 1e-6f));
    for (i64 c = 0; c < count; c += f32v::width) store(x + c, load(x + c) * inverse);
  }
}

// What all heads of a group share.
template <class T>
void load_shared(const ChunkScanArgs& a, const Head& head, i64 t, int n, const DeltaTile& tile) {
  const i64 g = head.h / (a.H / a.G);
  load_rows<T>(a.q, a.q_stride, head.b, t, g, 0, n, a.K, tile.q, tile.row);
  load_rows<T>(a.k, a.k_stride, head.b, t, g, 0, n, a.K, tile.k, tile.row);
  if (a.l2norm) normalise_rows(n, tile.row, tile.q), normalise_rows(n, tile.row, tile.k);
}

template <class T, bool kPerChannel>
void load_factors(const ChunkScanArgs& a, const Head& head, i64 t, int n, const DeltaTile& tile) {
  const i64 count = kPerChannel ? n * tile.row : kDeltaSteps;
  if (kPerChannel) {
    load_rows<float>(a.log_decay, a.decay_stride, head.b, t, head.h, 0, n, a.K, tile.decay, tile.row);
  } else {
    const float* d = a.log_decay + head.b * a.decay_stride[0] + t * a.decay_stride[1] + head.h * a.decay_stride[2];
    for (int l = 0; l < n; ++l) tile.decay[l] = d[l * a.decay_stride[1]];
  }
  for (i64 c = 0; c < count; c += f32v::width) store(tile.decay + c, exp(load(tile.decay + c)));
  const float* strength = a.beta ? a.beta : a.gain;
  const i64* stride = a.beta ? a.beta_stride : a.gain_stride;
  for (int l = 0; l < n; ++l)
    tile.strength[l] = strength ? strength[head.b * stride[0] + (t + l) * stride[1] + head.h * stride[2]] : 1;
}

// q_in, k_in, k_out and total.
template <class T, bool kPerChannel>
void decay_rows(const DeltaTile& tile, int n, float scale) {
  for (i64 c = 0; c < tile.row; c += f32v::width) {
    const auto factor = [&](int l) { return kPerChannel ? load(tile.decay + l * tile.row + c) : set1(tile.decay[l]); };
    f32v before = set1(1), after = set1(1);
    for (int l = 0; l < n; ++l) {
      before = before * factor(l);
      store(tile.q_in + l * tile.row + c, load(tile.q + l * tile.row + c) * before * set1(scale));
      store(tile.k_in + l * tile.row + c, load(tile.k + l * tile.row + c) * before * set1(-tile.strength[l]));
    }
    for (int l = n - 1; l >= 0; --l) {
      store(tile.k_out + l * tile.row + c, load(tile.k + l * tile.row + c) * after);
      after = after * factor(l);
    }
    store(tile.total + c, after);
  }
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>)
    pair_columns(n, static_cast<int>(tile.row), tile.q_in, tile.row, tile.q_words, tile.row / 2);
#endif
}

// of_q and of_k: products of rows, for one factor per step.
inline void multiply_steps(const DeltaTile& tile, int n) {
  for (int l = 0; l < n; l += 4)
    for (int s = 0; s <= l; s += 4) {
      const float *q[4], *k[4], *before[4];
      float sums[2][16];
      for (int i = 0; i < 4; ++i) {
        q[i] = tile.q + (l + i) * tile.row, k[i] = tile.k + (l + i) * tile.row, before[i] = tile.k + (s + i) * tile.row;
      }
      dots<float, 4, 4, 1>(before, q, tile.row, sums[0]);
      dots<float, 4, 4, 1>(before, k, tile.row, sums[1]);
      for (int i = 0; i < 4; ++i) {
        std::memcpy(tile.of_q + (l + i) * kDeltaSteps + s, sums[0] + 4 * i, 4 * sizeof(float));
        std::memcpy(tile.of_k + (l + i) * kDeltaSteps + s, sums[1] + 4 * i, 4 * sizeof(float));
      }
    }
}

// M and P: those times the decays between their steps.
inline void score_steps(const DeltaTile& tile, int n, float scale) {
  alignas(64) float gamma[kDeltaSteps] = {};
  for (int l = 0; l < n; ++l) {
    const float *of_q = tile.of_q + l * kDeltaSteps, *of_k = tile.of_k + l * kDeltaSteps;
    float *M = tile.M + l * kDeltaSteps, *P = tile.P + l * kDeltaSteps;
    for (int s = 0; s < kDeltaSteps; ++s) gamma[s] *= tile.decay[l];
    gamma[l] = 1;
    for (int s = 0; s < kDeltaSteps; ++s) {
      P[s] = s <= l ? scale * (of_q[s] * gamma[s]) : 0;
      M[s] = -tile.strength[l] * (of_k[s] * gamma[s]);  // from the diagonal on nobody reads it
    }
  }
}

// NV vectors of channels' part of M and P: k_s, decayed step by step, times q and k of each step.
template <int NV>
void add_scores(const DeltaTile& tile, int n, i64 c) {
  constexpr int W = f32v::width;
  for (int s = 0; s < n; ++s) {
    f32v x[NV];
    for (int i = 0; i < NV; ++i) x[i] = load(tile.k + s * tile.row + c + i * W);
    for (int l = s; l < n; l += 2) {
      f32v sum[4] = {set1(0), set1(0), set1(0), set1(0)};
      const int count = l + 1 < n ? 2 : 1;
      for (int h = 0; h < count; ++h) {
        const float *q = tile.q + (l + h) * tile.row + c, *k = tile.k + (l + h) * tile.row + c;
        const float* decay = tile.decay + (l + h) * tile.row + c;
        for (int i = 0; i < NV; ++i) {
          if (l + h > s) x[i] = x[i] * load(decay + i * W);
          sum[2 * h] = fma(load(q + i * W), x[i], sum[2 * h]);
          sum[2 * h + 1] = fma(load(k + i * W), x[i], sum[2 * h + 1]);
        }
      }
      float total[4];
      reduce_add4(sum, total);
      for (int h = 0; h < count; ++h) {
        tile.P[(l + h) * kDeltaSteps + s] += total[2 * h];
        tile.M[(l + h) * kDeltaSteps + s] += total[2 * h + 1];
      }
    }
  }
}

template <int NV = 8>
void add_scores_from(const DeltaTile& tile, int n, i64 c) {
  for (; c + NV * f32v::width <= tile.row; c += NV * f32v::width) add_scores<NV>(tile, n, c);
  if constexpr (NV > 1) add_scores_from<NV / 2>(tile, n, c);
}

// M and P of factors per channel. Above the diagonal they stay zero.
inline void score_channels(const DeltaTile& tile, int n, float scale) {
  for (int i = 0; i < kDeltaSteps * kDeltaSteps; ++i) tile.M[i] = tile.P[i] = 0;
  add_scores_from(tile, n, 0);
  for (int l = 0; l < n; ++l)
    for (int s = 0; s < kDeltaSteps; ++s) tile.P[l * kDeltaSteps + s] *= scale, tile.M[l * kDeltaSteps + s] *= -tile.strength[l];
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
