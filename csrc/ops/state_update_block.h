// Some rows p of one head: what a step needs of them in f32, and the loops over their state.
#pragma once
#include <algorithm>

#include "core/cpu/exp_short.h"
#include "core/cpu/strided.h"
#include "core/dispatch.h"
#include "ops/state_update.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;

constexpr i64 kRows = 256;  // most rows of a block

// What a and t depend on: n only (or nothing), p for t and both for A, or both.
enum class Decay { per_n, per_p, full };

// to[i] = p[i·stride], and zeros up to a whole vector.
inline void floats(const void* p, Dtype dtype, i64 offset, i64 stride, i64 count, float* to) {
  by_float_dtype("state_update", dtype, [&](auto type) {
    const auto* from = static_cast<const typename decltype(type)::type*>(p) + offset;
    if (stride != 1) return columns(from, stride, 0, count, 1, to, 0);
    for_lanes(count, [&](i64 i) { store(to + i, load(from + i)); }, [&](i64 i, int n) { store(to + i, load(from + i, n)); });
  });
}

struct Block {
  const StateUpdateArgs& args;
  i64 s = -1, g = -1, h, p, count;  // rows p … p+count−1
  alignas(64) float B[kStateMaxN + f32v::width], C[kStateMaxN + f32v::width];
  float a[kStateMaxN + f32v::width], tB[kStateMaxN + f32v::width];  // Decay::per_n
  float x[kRows], t[kRows], out[kRows + 4];                         // t: Decay::per_p
  float beta;

  explicit Block(const StateUpdateArgs& args) : args(args) {}

  // Moves on to other rows. B and C stay while their group does.
  void begin(i64 sequence, i64 head, i64 row, i64 rows, Decay decay) {
    const i64 group = head / (args.H / args.G);
    if (sequence != s || group != g) {
      s = sequence, g = group;
      floats(args.B, args.dtype, s * args.B_stride_s + g * args.B_stride_g, args.B_stride_n, args.N, B);
      floats(args.C, args.dtype, s * args.C_stride_s + g * args.C_stride_g, args.C_stride_n, args.N, C);
      if (args.l2norm) normalize(B), normalize(C);
    }
    h = head, p = row, count = rows;
    floats(args.x, args.dtype, s * args.x_stride_s + h * args.x_stride_h + p * args.x_stride_p, args.x_stride_p, count, x);
    beta = 0;
    if (args.beta) {
      float lanes[f32v::width];
      floats(args.beta, args.beta_dtype, s * args.beta_stride_s + h * args.beta_stride_h, 1, 1, lanes);
      beta = lanes[0];
    }
    if (decay == Decay::per_n) decays();
    if (decay == Decay::per_p && args.N) steps(p, 0, args.dt_stride_p, args.dt_bias_stride_p, count, t);
  }

  void normalize(float* v) const {
    f32v squares = set1(0);
    for (i64 n = 0; n < args.N; n += f32v::width) squares = fma(load(v + n), load(v + n), squares);
    const f32v factor = set1(1 / std::sqrt(reduce_add(squares) + 1e-6f));
    for (i64 n = 0; n < args.N; n += f32v::width) store(v + n, load(v + n) * factor);
  }

  // t of `length` places from (row, n) on; computed once where it is the same for all.
  void steps(i64 row, i64 n, i64 dt_stride, i64 bias_stride, i64 length, float* t) const {
    const bool one = dt_stride == 0 && (!args.dt_bias || bias_stride == 0);
    const i64 distinct = one ? std::min<i64>(1, length) : length;
    floats(args.dt, args.dt_dtype, s * args.dt_stride_s + h * args.dt_stride_h + row * args.dt_stride_p + n * args.dt_stride_n,
           dt_stride, distinct, t);
    float bias[kStateMaxN + f32v::width];
    if (args.dt_bias)
      floats(args.dt_bias, args.dt_bias_dtype,
             h * args.dt_bias_stride_h + row * args.dt_bias_stride_p + n * args.dt_bias_stride_n, bias_stride, distinct, bias);
    for (i64 i = 0; i < distinct; i += f32v::width) {
      f32v y = load(t + i);
      if (args.dt_bias) y = y + load(bias + i);
      store(t + i, args.dt_softplus ? softplus(y) : y);
    }
    if (one) std::fill(t, t + (length + f32v::width - 1) / f32v::width * f32v::width, t[0]);
  }

  // Of one row, or of all if they are the same: a, and t·B.
  void decays_of(i64 row, float* a, float* tB) const {
    float t[kStateMaxN + f32v::width];
    steps(row, 0, args.dt_stride_n, args.dt_bias_stride_n, args.N, t);
    const bool one = args.A_stride_n == 0 && args.dt_stride_n == 0 && (!args.dt_bias || args.dt_bias_stride_n == 0);
    const i64 distinct = one ? std::min<i64>(1, args.N) : args.N;
    floats(args.A, args.A_dtype, h * args.A_stride_h + row * args.A_stride_p, args.A_stride_n, distinct, a);
    for (i64 n = 0; n < args.N; n += f32v::width) {
      if (!one || n == 0) store(a + n, exp_short(load(t + n) * load(a + n)));
      store(tB + n, load(t + n) * load(B + n));
    }
    if (one) std::fill(a, a + (args.N + f32v::width - 1) / f32v::width * f32v::width, a[0]);
  }
  void decays() { decays_of(0, a, tB); }

  template <class State>
  State* state(i64 row) const {
    return static_cast<State*>(args.state) + s * args.state_stride_s + h * args.state_stride_h + (p + row) * args.state_stride_p;
  }

  // The rest of out, from the sums over n.
  void finish() {
    float other[kRows];
    const auto each = [&](auto&& f) {
      for (i64 i = 0; i < count; i += f32v::width) store(out + i, f(load(out + i), i));
    };
    each([&](f32v y, i64) { return y * set1(args.scale); });
    if (args.D) {
      floats(args.D, args.D_dtype, h * args.D_stride_h + p * args.D_stride_p, args.D_stride_p, count, other);
      each([&](f32v y, i64 i) { return fma(load(other + i), load(x + i), y); });
    }
    if (args.z) {
      floats(args.z, args.dtype, s * args.z_stride_s + h * args.z_stride_h + p * args.z_stride_p, args.z_stride_p, count, other);
      each([&](f32v y, i64 i) { return y * silu_short(load(other + i)); });
    }
    by_float_dtype("state_update", args.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      T* to = static_cast<T*>(args.out) + (s * args.H + h) * args.P + p;
      for_lanes(count, [&](i64 i) { store(to + i, load(out + i)); }, [&](i64 i, int n) { store(to + i, load(out + i), n); });
    });
  }
};

// ---- rows: vectors along n ----

template <class State>
[[gnu::always_inline]] inline f32v load_state(const State* p, i64 stride, int n) {
  if (stride == 1) return n == f32v::width ? load(p) : load(p, n);
  return load_strided(p, stride, n);
}

template <class State>
[[gnu::always_inline]] inline void store_state(State* p, i64 stride, f32v x, int n) {
  if (stride == 1) return n == f32v::width ? store_short(p, x) : store_short(p, x, n);
  State lanes[f32v::width];
  store_short(lanes, x);
  for (int i = 0; i < n; ++i) p[i * stride] = lanes[i];
}

// One row: its new state, and out's lanes of Σ state·C.
template <class State, bool kDelta, i64 kStride, class Decays>
[[gnu::always_inline]] inline f32v update_row(const Block& b, i64 row, Decays&& decays) {
  State* state = b.state<State>(row);
  const i64 stride = kStride ? kStride : b.args.state_stride_n;
  const f32v x = set1(b.x[row]);
  const auto each = [&](auto&& f) {
    for_lanes(b.args.N, [&](i64 n) { f(n, f32v::width); }, [&](i64 n, int tail) { f(n, tail); });
  };
  f32v sum = set1(0), change = x;
  if constexpr (kDelta) {
    f32v recalled = set1(0);
    each([&](i64 n, int lanes) {
      recalled = fma(decays(n, lanes).a * load_state(state + n * stride, stride, lanes), load(b.B + n), recalled);
    });
    change = set1(b.beta) * (x - set1(reduce_add(recalled)));
  }
  each([&](i64 n, int lanes) {
    const auto d = decays(n, lanes);
    const f32v before = load_state(state + n * stride, stride, lanes);
    const f32v after = fma(d.a, before, change * (kDelta ? load(b.B + n) : d.tB));
    store_state(state + n * stride, stride, after, lanes);
    sum = fma(after, load(b.C + n), sum);
  });
  return sum;
}

struct Lanes {
  f32v a, tB;
};

// A row of Decay::per_p: one t, and A as it is.
template <class State, bool kDelta, i64 kStride, class T>
[[gnu::always_inline]] inline f32v update_row_per_p(const Block& b, i64 row, const T* A) {
  const f32v t = set1(b.t[row]);
  const T* p = A + b.args.A_stride_h * b.h + b.args.A_stride_p * (b.p + row);
  const i64 stride = kStride ? kStride : b.args.A_stride_n;
  return update_row<State, kDelta, kStride>(b, row, [&](i64 n, int lanes) {
    return Lanes{exp_short(t * load_state(p + n * stride, stride, lanes)), t * load(b.B + n)};
  });
}

template <class State, bool kDelta, i64 kStride>
f32v full_row(const Block& b, i64 row) {
  float a[kStateMaxN + f32v::width], tB[kStateMaxN + f32v::width];
  b.decays_of(b.p + row, a, tB);
  return update_row<State, kDelta, kStride>(b, row, [&](i64 n, int) { return Lanes{load(a + n), load(tB + n)}; });
}

// Four rows at a time, from `row` on; each(row): out's lanes.
template <class Each>
[[gnu::always_inline]] inline void four_by_four(Block& b, Each&& each, i64 row = 0) {
  for (; row < b.count; row += 4) {
    f32v sums[4] = {set1(0), set1(0), set1(0), set1(0)};
    for (i64 i = 0; i < std::min<i64>(4, b.count - row); ++i) sums[i] = each(row + i);
    reduce_add4(sums, b.out + row);
  }
}

// Four rows of Decay::per_n, side by side: what depends on n alone is loaded once for all of them.
template <class State>
void update_four(Block& b, i64 row) {
  State* state[4];
  f32v x[4], sums[4];
  for (int i = 0; i < 4; ++i) state[i] = b.state<State>(row + i), x[i] = set1(b.x[row + i]), sums[i] = set1(0);
  const auto step = [&](i64 n, auto take, auto put) {
    const f32v a = load(b.a + n), tB = load(b.tB + n), C = load(b.C + n);
    for (int i = 0; i < 4; ++i) {
      const f32v after = fma(a, take(state[i] + n), x[i] * tB);
      put(state[i] + n, after);
      sums[i] = fma(after, C, sums[i]);
    }
  };
  for_lanes(
      b.args.N, [&](i64 n) { step(n, [](const State* p) { return load(p); }, [](State* p, f32v y) { store_short(p, y); }); },
      [&](i64 n, int tail) {
        step(n, [=](const State* p) { return load(p, tail); }, [=](State* p, f32v y) { store_short(p, y, tail); });
      });
  reduce_add4(sums, b.out + row);
}

// Decay::per_p with all of n in one vector, side by side (Mamba): what does not depend on the row stays in registers.
template <class State, class T>
void short_rows(Block& b, const T* A) {
  const int N = static_cast<int>(b.args.N);
  const f32v B = load(b.B, N), C = load(b.C, N);
  const T* from = A + b.args.A_stride_h * b.h + b.args.A_stride_p * b.p;
  const auto row = [&](i64 i) {
    State* state = b.state<State>(i);
    const f32v decay = exp2(set1(b.t[i] * 1.44269504f) * load(from + i * b.args.A_stride_p, N));
    const f32v after = fma(decay, load(state, N), set1(b.t[i] * b.x[i]) * B);
    store_short(state, after, N);
    return after * C;
  };
  i64 i = 0;
  for (; i + 4 <= b.count; i += 4) {
    const f32v sums[4] = {row(i), row(i + 1), row(i + 2), row(i + 3)};
    reduce_add4(sums, b.out + i);
  }
  for (; i < b.count; ++i) {
    const f32v sums[4] = {row(i), set1(0), set1(0), set1(0)};
    reduce_add4(sums, b.out + i);
  }
}

// kStride: of the state (and, for Decay::per_p, of A) along n; 0: any.
template <class State, bool kDelta, Decay kDecay, i64 kStride>
void rows(Block& b) {
  if constexpr (kDecay == Decay::per_n) {
    i64 row = 0;
    if constexpr (!kDelta && kStride == 1)
      for (; row + 4 <= b.count; row += 4) update_four<State>(b, row);
    const auto decays = [&](i64 n, int) { return Lanes{load(b.a + n), load(b.tB + n)}; };
    four_by_four(b, [&](i64 i) { return update_row<State, kDelta, kStride>(b, i, decays); }, row);
  } else if constexpr (kDecay == Decay::per_p) {
    by_float_dtype("state_update", b.args.A_dtype, [&](auto type) {
      const auto* A = static_cast<const typename decltype(type)::type*>(b.args.A);
      if (!kDelta && kStride == 1 && b.args.N <= f32v::width) return short_rows<State>(b, A);
      four_by_four(b, [&](i64 row) { return update_row_per_p<State, kDelta, kStride>(b, row, A); });
    });
  } else {
    four_by_four(b, [&](i64 row) { return full_row<State, kDelta, kStride>(b, row); });
  }
}

// ---- side by side: vectors along p, one decay for all of them ----

// kVectors vectors of rows, the last of them with `tail` lanes.
template <class State, bool kDelta, int kVectors>
void update_vectors(Block& b, i64 row, int tail) {
  State* state = b.state<State>(row);
  const i64 stride = b.args.state_stride_n;
  const auto lanes = [&](int v) { return v == kVectors - 1 ? tail : f32v::width; };
  f32v change[kVectors], sum[kVectors];
  for (int v = 0; v < kVectors; ++v) change[v] = load(b.x + row + v * f32v::width), sum[v] = set1(0);
  if constexpr (kDelta) {
    for (i64 n = 0; n < b.args.N; ++n)
      for (int v = 0; v < kVectors; ++v)
        sum[v] = fma(set1(b.a[n] * b.B[n]), load_state(state + n * stride + v * f32v::width, 1, lanes(v)), sum[v]);
    for (int v = 0; v < kVectors; ++v) change[v] = set1(b.beta) * (change[v] - sum[v]), sum[v] = set1(0);
  }
  const float* factor = kDelta ? b.B : b.tB;
  for (i64 n = 0; n < b.args.N; ++n)
    for (int v = 0; v < kVectors; ++v) {
      State* at = state + n * stride + v * f32v::width;
      const f32v after = fma(set1(b.a[n]), load_state(at, 1, lanes(v)), change[v] * set1(factor[n]));
      store_state(at, 1, after, lanes(v));
      sum[v] = fma(after, set1(b.C[n]), sum[v]);
    }
  for (int v = 0; v < kVectors; ++v) store(b.out + row + v * f32v::width, sum[v]);
}

template <class State, bool kDelta>
void along_p(Block& b) {
  constexpr int kVectors = 4;
  i64 row = 0;
  for (; row + kVectors * f32v::width <= b.count; row += kVectors * f32v::width)
    update_vectors<State, kDelta, kVectors>(b, row, f32v::width);
  for (; row < b.count; row += f32v::width)
    update_vectors<State, kDelta, 1>(b, row, static_cast<int>(std::min<i64>(f32v::width, b.count - row)));
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
