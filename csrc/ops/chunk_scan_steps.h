// The recurrence one step at a time, all kinds. Part of chunk_scan_cpu.cpp.
#pragma once
#include "core/cpu/math.h"
#include "ops/chunk_scan.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;

// One head of one sequence: where its steps are, and its state (K,V) in f32.
struct Head {
  i64 b, h, first, count;
  float* state;
};

inline float exp1(float x) {
  float lanes[f32v::width];
  store(lanes, exp(set1(x)));
  return lanes[0];
}

template <class T>
inline void load_row(const void* base, const i64* stride, i64 b, i64 t, i64 h, i64 count, float* to) {
  const T* from = static_cast<const T*>(base) + b * stride[0] + t * stride[1] + h * stride[2];
  if (stride[3] == 1) {
    for_lanes(
        count, [&](i64 c) { store(to + c, load(from + c)); },
        [&](i64 c, int left) { store(to + c, load(from + c, left), left); });
    return;
  }
  for (i64 c = 0; c < count; ++c) to[c] = to_f32(from[c * stride[3]]);
}

// Asks for rows that will be wanted soon: heads lie side by side, so that the processor does not foresee a head's next row. Into
// the second cache, as tiles fill the first. Inlined by force: GCC drops calls of functions that do nothing but prefetch.
template <class T, bool kWrite = false>
[[gnu::always_inline]] inline void prefetch_rows(const void* base, const i64* stride, i64 b, i64 t, i64 h, i64 n, i64 count) {
  const T* from = static_cast<const T*>(base) + b * stride[0] + t * stride[1] + h * stride[2];
  if (stride[3] == 1)
    for (i64 l = 0; l < n; ++l, from += stride[1])
      for (i64 c = 0; c < count; c += 64 / static_cast<i64>(sizeof(T))) __builtin_prefetch(from + c, kWrite, 2);
}

inline void normalise(float* x, i64 count) {
  float sum = 1e-6f;
  for (i64 c = 0; c < count; ++c) sum += x[c] * x[c];
  const float inverse = 1 / std::sqrt(sum);
  for (i64 c = 0; c < count; ++c) x[c] *= inverse;
}

// One step of NV vectors of columns; `left` lanes of the last where kTail. x: q, k and the decays of one step, K each.
template <int NV, bool kTail>
inline void step_columns(i64 K, i64 V, const float* x, bool delta, float strength, const float* v, float* S, float* out,
                         int left) {
  constexpr int W = f32v::width;
  const auto take = [&](const float* p, int n) { return kTail && n == NV - 1 ? load(p + n * W, left) : load(p + n * W); };
  const auto put = [&](float* p, f32v y, int n) {
    if (kTail && n == NV - 1)
      store(p + n * W, y, left);
    else
      store(p + n * W, y);
  };
  const float *q = x, *k = x + K, *decay = x + 2 * K;
  f32v write[NV], sum[NV];
  for (int n = 0; n < NV; ++n) write[n] = take(v, n), sum[n] = set1(0);
  if (delta) {
    for (i64 i = 0; i < K; ++i) {
      const f32v c = set1(k[i] * decay[i]);
      for (int n = 0; n < NV; ++n) sum[n] = fma(c, take(S + i * V, n), sum[n]);
    }
    for (int n = 0; n < NV; ++n) write[n] = write[n] - sum[n], sum[n] = set1(0);
  }
  for (int n = 0; n < NV; ++n) write[n] = set1(strength) * write[n];
  for (i64 i = 0; i < K; ++i) {
    const f32v ki = set1(k[i]), qi = set1(q[i]), di = set1(decay[i]);
    for (int n = 0; n < NV; ++n) {
      const f32v s = fma(ki, write[n], di * take(S + i * V, n));
      put(S + i * V, s, n);
      sum[n] = fma(qi, s, sum[n]);
    }
  }
  for (int n = 0; n < NV; ++n) put(out, sum[n], n);
}

inline void decays_of(const ChunkScanArgs& a, const Head& head, i64 t, float* to) {
  const float* d = a.log_decay + head.b * a.decay_stride[0] + t * a.decay_stride[1] + head.h * a.decay_stride[2];
  if (!a.per_channel) {
    const float decay = exp1(*d);
    for (i64 i = 0; i < a.K; ++i) to[i] = decay;
    return;
  }
  for (i64 i = 0; i < a.K; ++i) to[i] = d[i * a.decay_stride[3]];
  for_lanes(
      a.K, [&](i64 i) { store(to + i, exp(load(to + i))); },
      [&](i64 i, int left) { store(to + i, exp(load(to + i, left)), left); });
}

// scratch: 3·K + 2·V floats.
template <class T>
void scan_steps(const ChunkScanArgs& a, const Head& head, float* scratch) {
  constexpr int W = f32v::width;
  float *q = scratch, *k = q + a.K, *v = k + 2 * a.K, *sums = v + a.V;
  const i64 g = head.h / (a.H / a.G);
  const f32v scale = set1(a.scale), skip = set1(a.skip ? a.skip[head.h * a.skip_stride] : 0);
  for (i64 t = head.first; t < head.first + head.count; ++t) {
    load_row<T>(a.q, a.q_stride, head.b, t, g, a.K, q);
    load_row<T>(a.k, a.k_stride, head.b, t, g, a.K, k);
    load_row<T>(a.v, a.v_stride, head.b, t, head.h, a.V, v);
    if (a.l2norm) normalise(q, a.K), normalise(k, a.K);
    decays_of(a, head, t, k + a.K);
    const auto at = [&](const float* x, const i64* s) { return x[head.b * s[0] + t * s[1] + head.h * s[2]]; };
    const float strength = a.beta ? at(a.beta, a.beta_stride) : a.gain ? at(a.gain, a.gain_stride) : 1;
    i64 j = 0;
    for (; j + 4 * W <= a.V; j += 4 * W)
      step_columns<4, false>(a.K, a.V, q, a.beta, strength, v + j, head.state + j, sums + j, 0);
    for_lanes(
        a.V - j,
        [&](i64 c) { step_columns<1, false>(a.K, a.V, q, a.beta, strength, v + j + c, head.state + j + c, sums + j + c, 0); },
        [&](i64 c, int left) {
          step_columns<1, true>(a.K, a.V, q, a.beta, strength, v + j + c, head.state + j + c, sums + j + c, left);
        });
    T* out = static_cast<T*>(a.out) + ((head.b * a.L + t) * a.H + head.h) * a.V;
    for_lanes(
        a.V, [&](i64 c) { store(out + c, fma(skip, load(v + c), scale * load(sums + c))); },
        [&](i64 c, int left) { store(out + c, fma(skip, load(v + c, left), scale * load(sums + c, left)), left); });
  }
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
