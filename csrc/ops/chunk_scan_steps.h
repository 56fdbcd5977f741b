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
  for (i64 c = 0; c < count; ++c) to[c] = to_f32(from[c * stride[3]]);
}

inline void normalise(float* x, i64 count) {
  float sum = 1e-6f;
  for (i64 c = 0; c < count; ++c) sum += x[c] * x[c];
  const float inverse = 1 / std::sqrt(sum);
  for (i64 c = 0; c < count; ++c) x[c] *= inverse;
}

template <class T>
void scan_steps(const ChunkScanArgs& a, const Head& head, float* scratch) {
  float *q = scratch, *k = q + a.K, *v = k + a.K, *S = head.state;
  const i64 g = head.h / (a.H / a.G);
  for (i64 t = head.first; t < head.first + head.count; ++t) {
    load_row<T>(a.q, a.q_stride, head.b, t, g, a.K, q);
    load_row<T>(a.k, a.k_stride, head.b, t, g, a.K, k);
    load_row<T>(a.v, a.v_stride, head.b, t, head.h, a.V, v);
    if (a.l2norm) normalise(q, a.K), normalise(k, a.K);
    const float* d = a.log_decay + head.b * a.decay_stride[0] + t * a.decay_stride[1] + head.h * a.decay_stride[2];
    for (i64 i = 0; i < a.K; ++i) {
      const float decay = exp1(d[i * a.decay_stride[3]]);
      for (i64 j = 0; j < a.V; ++j) S[i * a.V + j] *= decay;
    }
    const float skip = a.skip ? a.skip[head.h * a.skip_stride] : 0;
    const auto at = [&](const float* x, const i64* s) { return x[head.b * s[0] + t * s[1] + head.h * s[2]]; };
    T* out = static_cast<T*>(a.out) + ((head.b * a.L + t) * a.H + head.h) * a.V;
    for (i64 j = 0; j < a.V; ++j) {
      float old = 0, sum = 0;
      if (a.beta)
        for (i64 i = 0; i < a.K; ++i) old += S[i * a.V + j] * k[i];
      const float write = a.beta ? at(a.beta, a.beta_stride) * (v[j] - old) : a.gain ? at(a.gain, a.gain_stride) * v[j] : v[j];
      for (i64 i = 0; i < a.K; ++i) {
        S[i * a.V + j] += k[i] * write;
        sum += S[i * a.V + j] * q[i];
      }
      from_f32(a.scale * sum + skip * v[j], out[j]);
    }
  }
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
