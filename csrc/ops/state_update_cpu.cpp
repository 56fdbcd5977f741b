#include <algorithm>

#include "core/cpu/exp_short.h"
#include "core/cpu/parallel.h"
#include "core/cpu/strided.h"
#include "core/dispatch.h"
#include "ops/state_update.h"
#include "ops/state_update_block.h"

namespace effvlm::EFFVLM_ISA {
namespace {

constexpr i64 kWorthAThread = 64 << 10;  // bytes of state below which waking another thread costs more than it saves

template <class State, bool kDelta, i64 kStride>
void update_rows(Block& b, Decay decay) {
  if (decay == Decay::per_n) return rows<State, kDelta, Decay::per_n, kStride>(b);
  if (decay == Decay::per_p) return rows<State, kDelta, Decay::per_p, kStride>(b);
  rows<State, kDelta, Decay::full, kStride>(b);
}

template <class State, bool kDelta>
void update(Block& b, Decay decay) {
  const StateUpdateArgs& a = b.args;
  if (decay == Decay::per_n && a.state_stride_p == 1 && a.state_stride_n != 1) return along_p<State, kDelta>(b);
  if (a.state_stride_n == 1 && (decay != Decay::per_p || a.A_stride_n == 1)) return update_rows<State, kDelta, 1>(b, decay);
  update_rows<State, kDelta, 0>(b, decay);
}

// What a, t and the rest do not depend on.
Decay decay_of(const StateUpdateArgs& a) {
  const bool same_p = a.dt_stride_p == 0 && (!a.dt_bias || a.dt_bias_stride_p == 0);
  const bool same_n = a.dt_stride_n == 0 && (!a.dt_bias || a.dt_bias_stride_n == 0);
  if (a.P == 1 || (same_p && a.A_stride_p == 0)) return Decay::per_n;
  return a.N == 1 || same_n ? Decay::per_p : Decay::full;
}

}  // namespace

void state_update_cpu(const StateUpdateArgs& a) {
  const Decay decay = decay_of(a);
  const i64 element = a.state_dtype == Dtype::f32 ? 4 : 2, total = a.S * a.H * a.P * a.N * element;
  const i64 size = std::clamp<i64>(16384 / std::max<i64>(1, a.N) / 64 * 64, 64, kRows), blocks = (a.P + size - 1) / size;
  by_float_dtype("state_update", a.state_dtype, [&](auto type) {
    using State = typename decltype(type)::type;
    // Equal shares, the same at every step: a thread finds its part of the state where the step before left it, in its cache.
    const i64 tasks = a.S * a.H * blocks, shares = total < kWorthAThread ? 1 : a.threads;
    parallel_for(shares, 1, a.threads, [&](i64 first, i64 last, int) {
      Block b(a);
      for (i64 task = first * tasks / shares; task < last * tasks / shares; ++task) {
        const i64 p = task % blocks * size, head = task / blocks;
        b.begin(head / a.H, head % a.H, p, std::min(size, a.P - p), decay);
        if (a.beta)
          update<State, true>(b, decay);
        else
          update<State, false>(b, decay);
        b.finish();
      }
    });
  });
}

}  // namespace effvlm::EFFVLM_ISA
