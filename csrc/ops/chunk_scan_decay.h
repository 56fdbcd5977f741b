// One decay per head and step, no delta rule, in chunks. Part of chunk_scan_cpu.cpp.
//
// With a_l the sum of the log decays of a chunk through step l, and S the state before the chunk:
//   out_l = scale·exp(a_l)·Sᵀq_l + Σ_{s ≤ l} M_ls·v_s + skip·v_l,   M_ls = scale·(q_l·k_s)·exp(a_l − a_s)·gain_s
//   S     ← exp(a_end)·S + Σ_s k_s·(gain_s·exp(a_end − a_s)·v_s)ᵀ
// The scores q_l·k_s are taken once for all heads of an item. M goes by blocks of 16 steps: below the diagonal the decay of a
// pair is that of its row since the block began times that of its column until then, so that both are at most 1; on the diagonal
// each pair has its own. bf16 at the levels with its instruction: scores are exact products; M and, where it is read, the state
// are rounded to bf16; what is written to the state is f32.
#pragma once
#include "core/cpu/exp_short.h"
#include "core/cpu/tile_product.h"
#include "core/cpu/transpose.h"
#include "ops/chunk_scan_steps.h"

namespace effvlm::EFFVLM_ISA {
namespace {

constexpr int kDecayBlock = 16;
constexpr i64 kFewSteps = 8;  // up to here it is faster one by one

#if defined(__AVX512BF16__)
template <class T>
constexpr bool kPairsOf = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool kPairsOf = false;
#endif

// The parts of a thread's workspace, see the layout.
struct DecayTiles {
  i64 k_row, v_row;
  double* sums;  // sums[l + 1] is a_l
  float *steps, *q, *k, *q_words, *k_words, *k_turned, *scores, *v, *v_words, *write, *weights, *state_words, *out;
  float *q_scale, *k_scale, *gain, *until, *since;  // until: of columns, for three blocks of rows

  DecayTiles(const ChunkScanArgs& a, char* base) {
    const ChunkScanDecayLayout at(a);
    const auto part = [&](i64 offset) { return reinterpret_cast<float*>(base + offset); };
    k_row = at.k_row, v_row = at.v_row, sums = reinterpret_cast<double*>(base + at.sums), steps = part(at.steps);
    q = part(at.q), k = part(at.k), q_words = part(at.q_words), k_words = part(at.k_words), k_turned = part(at.k_turned);
    scores = part(at.scores), v = part(at.v), v_words = part(at.v_words), write = part(at.write), weights = part(at.weights);
    state_words = part(at.state_words), out = part(at.out), q_scale = part(at.factors), k_scale = q_scale + kDecaySteps;
    gain = k_scale + kDecaySteps, since = gain + kDecaySteps, until = since + kDecaySteps;
  }
};

// ---- what the heads of a group share ----

template <class T>
void load_tile(const void* base, const i64* stride, const Head& head, i64 h, i64 count, float* to, i64 to_row) {
  for (i64 l = 0; l < head.count; ++l) load_row<T>(base, stride, head.b, head.first + l, h, count, to + l * to_row);
}

inline float inverse_norm(const float* x, i64 count) {
  f32v sum = set1(0);
  for_lanes(
      count, [&](i64 c) { sum = fma(load(x + c), load(x + c), sum); },
      [&](i64 c, int left) { sum = fma(load(x + c, left), load(x + c, left), sum); });
  return 1 / std::sqrt(reduce_add(sum) + 1e-6f);
}

// scores[l][s] = scale·<q_l, k_s>, of normalised q and k where that is asked for, s up to the end of l's block.
template <class Mac>
void score_chunk(const ChunkScanArgs& a, int n, int words, const float* q, const DecayTiles& w) {
  for (int l = 0; l < n; l += kDecayBlock) {
    const int rows = n - l < kDecayBlock ? n - l : kDecayBlock;
    tile_product_of<Mac, false>(FromZeros{}, rows, l + kDecayBlock, words, q + l * w.k_row, w.k_row, 1, w.k_turned, kDecaySteps,
                                w.scores + l * kDecaySteps, kDecaySteps);
  }
  for (int l = 0; l < n; ++l) {
    w.q_scale[l] = a.scale * (a.l2norm ? inverse_norm(w.q + l * w.k_row, a.K) : 1);
    w.k_scale[l] = a.l2norm ? inverse_norm(w.k + l * w.k_row, a.K) : 1;
  }
  for (int l = 0; l < n; ++l)
    for (int s = 0; s <= l; s += f32v::width) {
      float* score = w.scores + l * kDecaySteps + s;
      store(score, load(score) * (set1(w.q_scale[l]) * load(w.k_scale + s)));
    }
}

template <class T>
void share_chunk(const ChunkScanArgs& a, const Head& chunk, i64 g, const DecayTiles& w) {
  const int n = static_cast<int>(chunk.count), K = static_cast<int>(a.K);
  load_tile<T>(a.q, a.q_stride, chunk, g, K, w.q, w.k_row);
  load_tile<T>(a.k, a.k_stride, chunk, g, K, w.k, w.k_row);
  const float *q = w.q, *k = w.k;
  int words = K;
#if defined(__AVX512BF16__)
  if constexpr (kPairsOf<T>) {
    pair_columns(n, K, w.q, w.k_row, w.q_words, w.k_row);
    pair_columns(n, K, w.k, w.k_row, w.k_words, w.k_row);
    q = w.q_words, k = w.k_words, words = (K + 1) / 2;
  }
#endif
  for (int s = 0; s < n; s += 16)
    for (int c = 0; c < words; c += 16) {
      const float* row[16];
      for (int i = 0; i < 16; ++i) row[i] = k + (s + i) * w.k_row + c;
      transpose_16x16(row, w.k_turned + c * kDecaySteps + s, kDecaySteps);
    }
#if defined(__AVX512BF16__)
  if constexpr (kPairsOf<T>) return score_chunk<MacPairs>(a, n, words, q, w);
#endif
  score_chunk<MacF32>(a, n, words, q, w);
}

// ---- one head ----

// to[i] = exp(sign·(x[i] − base)), in whole vectors.
inline void exp_differences(const double* x, double base, double sign, int count, float* to) {
  count = (count + kDecayBlock - 1) / kDecayBlock * kDecayBlock;
  for (int i = 0; i < count; ++i) to[i] = static_cast<float>(sign * (x[i] - base));
  for (int i = 0; i < count; i += f32v::width) store(to + i, exp(load(to + i)));
}

// Sums of the log decays, gains, and the decays since the block of a row began and of columns until then.
inline void decays_of_chunk(const ChunkScanArgs& a, const Head& chunk, const DecayTiles& w) {
  const int n = static_cast<int>(chunk.count);
  const float* d = a.log_decay + chunk.b * a.decay_stride[0] + chunk.first * a.decay_stride[1] + chunk.h * a.decay_stride[2];
  const float* gain =
      a.gain ? a.gain + chunk.b * a.gain_stride[0] + chunk.first * a.gain_stride[1] + chunk.h * a.gain_stride[2] : nullptr;
  double total = w.sums[0] = 0;
  for (int l = 0; l < n; ++l) {
    const float step = d[l * a.decay_stride[1]];
    w.sums[l + 1] = total += step < -1e4f ? -1e4f : step;  // NaN stays
    w.gain[l] = gain ? gain[l * a.gain_stride[1]] : 1;
  }
  for (int l = n; l < kDecaySteps; ++l) w.sums[l + 1] = total, w.gain[l] = 0;
  for (int l = 0; l < n; l += kDecayBlock) exp_differences(w.sums + l + 1, w.sums[l], 1, kDecayBlock, w.since + l);
  for (int l = kDecayBlock; l < n; l += kDecayBlock) {
    float* until = w.until + (l / kDecayBlock - 1) * kDecaySteps;
    exp_differences(w.sums + 1, w.sums[l], -1, l, until);
    for (int s = 0; s < l; s += f32v::width) store(until + s, load(until + s) * load(w.gain + s));
  }
}

template <class T>
inline void put_weight(float* row, int s, f32v x) {
#if defined(__AVX512BF16__)
  if constexpr (kPairsOf<T>) return store_rounded(reinterpret_cast<bf16*>(row) + s, x);
#endif
  store(row + s, x);
}

// weights[l][s] = scores[l][s]·exp(a_l − a_s)·gain_s for s <= l, and zeros to the end of the next block.
template <class T>
void weigh_scores(int n, const DecayTiles& w) {
  constexpr int W = f32v::width;
  for (int l = 0; l < n; ++l) {
    const int begin = l / kDecayBlock * kDecayBlock, end = begin + kDecayBlock;
    const float *score = w.scores + l * kDecaySteps, *until = w.until + (begin / kDecayBlock - 1) * kDecaySteps;
    float* to = w.weights + l * kDecaySteps / (kPairsOf<T> ? 2 : 1);
    const f32v since = set1(w.since[l]);
    for (int s = 0; s < begin; s += W) put_weight<T>(to, s, load(score + s) * (since * load(until + s)));
    float apart[kDecayBlock];
    for (int s = 0; s < kDecayBlock; ++s) apart[s] = static_cast<float>(w.sums[l + 1] - w.sums[begin + s + 1]);
    for (int s = begin; s < end; s += W) {
      const int left = l + 1 - s;  // what lies beyond the diagonal may be NaN
      if (left >= W) {
        put_weight<T>(to, s, load(score + s) * (exp(load(apart + s - begin)) * load(w.gain + s)));
      } else if (left > 0) {
        put_weight<T>(to, s, load(score + s, left) * (exp(load(apart + s - begin, left)) * load(w.gain + s, left)));
      } else {
        put_weight<T>(to, s, set1(0));
      }
    }
    for (int s = end; s < end + kDecayBlock && s < kDecaySteps; s += W) put_weight<T>(to, s, set1(0));
  }
}

// v and write[s] = gain_s·exp(a_end − a_s)·v_s. Returns whether all v are finite.
template <class T>
bool load_values(const ChunkScanArgs& a, const Head& chunk, const DecayTiles& w) {
  const int n = static_cast<int>(chunk.count);
  const bool side_by_side = a.v_stride[3] == 1;
  if (!side_by_side) load_tile<T>(a.v, a.v_stride, chunk, chunk.h, a.V, w.v, w.v_row);
  float strength[kDecaySteps];
  exp_differences(w.sums + 1, w.sums[n], -1, n, strength);
  const T* from = static_cast<const T*>(a.v) + chunk.b * a.v_stride[0] + chunk.first * a.v_stride[1] + chunk.h * a.v_stride[2];
  f32v nothing = set1(0);
  for (int s = 0; s < n; ++s, from += a.v_stride[1]) {
    const f32v c = set1(strength[s] * w.gain[s] * w.k_scale[s]);
    float *v = w.v + s * w.v_row, *write = w.write + s * w.v_row;
    const auto put = [&](i64 j, f32v x) { store(v + j, x), store(write + j, c * x), nothing = fma(set1(0), x, nothing); };
    for_lanes(
        a.V, [&](i64 j) { put(j, side_by_side ? load(from + j) : load(v + j)); },
        [&](i64 j, int left) { put(j, side_by_side ? load(from + j, left) : load(v + j, left)); });
  }
  return reduce_add(nothing) == 0;
}

// out = diag(scale·exp a)·Q·S + M·V
template <class T>
void chunk_out(const ChunkScanArgs& a, int n, const float* S, const DecayTiles& w) {
  const int K = static_cast<int>(a.K), V = static_cast<int>(a.V);
  float since_start[kDecaySteps];
  exp_differences(w.sums + 1, 0, 1, n, since_start);
  for (int l = 0; l < n; ++l) since_start[l] *= w.q_scale[l];
#if defined(__AVX512BF16__)
  if constexpr (kPairsOf<T>) {
    pair_rows(K, V, S, V, w.state_words, w.v_row);
    tile_pairs(FromZeros{}, n, V, (K + 1) / 2, w.q_words, w.k_row, 1, w.state_words, w.v_row, w.out, w.v_row);
    pair_rows(n, V, w.v, w.v_row, w.v_words, w.v_row);
    return tile_pairs_causal(FromScaled{since_start}, n, V, (n + 1) / 2, w.weights, kDecaySteps / 2, 1, w.v_words, w.v_row, w.out,
                             w.v_row);
  }
#endif
  tile_product(FromZeros{}, n, V, K, w.q, w.k_row, 1, S, V, w.out, w.v_row);
  tile_product_causal(FromScaled{since_start}, n, V, n, w.weights, kDecaySteps, 1, w.v, w.v_row, w.out, w.v_row);
}

template <class T>
void scan_chunk(const ChunkScanArgs& a, const Head& chunk, const DecayTiles& w) {
  const int n = static_cast<int>(chunk.count), K = static_cast<int>(a.K), V = static_cast<int>(a.V);
  decays_of_chunk(a, chunk, w);
  if (!load_values<T>(a, chunk, w)) return scan_steps<T>(a, chunk, w.steps);  // 0·NaN would carry it to steps before
  weigh_scores<T>(n, w);
  chunk_out<T>(a, n, chunk.state, w);
  const f32v skip = set1(a.skip ? a.skip[chunk.h * a.skip_stride] : 0);
  for (int l = 0; l < n; ++l) {
    T* out = static_cast<T*>(a.out) + ((chunk.b * a.L + chunk.first + l) * a.H + chunk.h) * V;
    const float *v = w.v + l * w.v_row, *sum = w.out + l * w.v_row;
    for_lanes(
        V, [&](i64 j) { store_short(out + j, fma(skip, load(v + j), load(sum + j))); },
        [&](i64 j, int left) { store_short(out + j, fma(skip, load(v + j, left), load(sum + j, left)), left); });
  }
  const FromAllScaled decayed{exp1(static_cast<float>(w.sums[n]))};
  tile_product(decayed, K, V, n, w.k, 1, w.k_row, w.write, w.v_row, chunk.state, V);
}

// Asks for the rows of out of one head, and for the values of the next.
template <class T>
[[gnu::always_inline]] inline void prefetch_head(const ChunkScanArgs& a, const Head& one, const Head& next) {
  const i64 stride[4] = {a.L * a.H * a.V, a.H * a.V, a.V, 1};
  prefetch_rows<T>(a.v, a.v_stride, next.b, next.first, next.h, next.count, a.V);
  prefetch_rows<T, true>(a.out, stride, one.b, one.first, one.h, one.count, a.V);
}

// `heads` heads of one group, one sequence: the first is given, the states of the others follow.
template <class T>
void scan_decay(const ChunkScanArgs& a, const Head& head, i64 heads, char* scratch) {
  const DecayTiles w(a, scratch);
  Head chunk = head;
  for (i64 left = head.count; left > 0; left -= chunk.count, chunk.first += chunk.count) {
    chunk.count = left < kDecaySteps ? left : kDecaySteps;
    if (chunk.count > kFewSteps) share_chunk<T>(a, chunk, head.h / (a.H / a.G), w);
    for (i64 i = 0; i < heads; ++i) {
      const Head one{chunk.b, head.h + i, chunk.first, chunk.count, head.state + i * a.K * a.V};
      if (chunk.count > kFewSteps) {
        Head next{one.b, one.h + 1, one.first, one.count, nullptr};
        if (i + 1 == heads) {
          const i64 rest = left - chunk.count;
          next = {one.b, head.h, one.first + one.count, rest < kDecaySteps ? rest : kDecaySteps, nullptr};
        }
        prefetch_head<T>(a, one, next);
        scan_chunk<T>(a, one, w);
      } else {
        scan_steps<T>(a, one, w.steps);
      }
    }
  }
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
