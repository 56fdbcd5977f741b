#include "core/check.h"
#include "core/cuda/launch.cuh"
#include "core/dispatch.h"
#include "ops/moe_route.h"

namespace effvlm {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;
using u32 = std::uint32_t;
using u64 = unsigned long long;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

struct Layout : Workspace {
  i64 stats, limits, chosen;  // per token f32 most, sum · per expert u32 least, i32 last · i32 (T,K) before capacity

  __host__ __device__ explicit Layout(const MoeRouteArgs& a) {
    const bool limited = a.capacity >= 0 && !a.by_expert;
    stats = take(a.by_expert ? 8 * a.T : 0), limits = take(a.by_expert ? 8 * a.E : 0), chosen = take(limited ? 4 * a.T * a.K : 0);
  }
};

template <class P>
__device__ __forceinline__ P* scratch(const MoeRouteArgs& a, i64 offset) {
  return reinterpret_cast<P*>(static_cast<char*>(a.workspace) + offset);
}

// Unsigned integers in the order of the floats: −Inf first, then numbers, then Inf, then NaN; −0 equals 0.
__device__ __forceinline__ u32 ordered(float x) {
  if (x != x) return 0xffffffffu;
  const float plus = x + 0.0f;
  u32 bits;
  memcpy(&bits, &plus, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A larger key is a better choice, and of equal values the one of lower index is better. 0: no choice.
__device__ __forceinline__ u64 key_of(float x, int index) {
  return static_cast<u64>(ordered(x)) << 32 | (0x7fffffffu - static_cast<u32>(index));
}
__device__ __forceinline__ int index_of(u64 key) { return static_cast<int>(0x7fffffffu - static_cast<u32>(key)); }

__device__ __forceinline__ u64 warp_max(u64 x) {
  for (int lanes = kWarp / 2; lanes; lanes /= 2) {
    const u64 other = shuffle_xor(x, lanes);
    if (other > x) x = other;
  }
  return x;
}

__device__ __forceinline__ bool is_routed(const MoeRouteArgs& a, i64 t) { return !a.mask || a.mask[t * a.mask_stride]; }

// One token's logits and what its scores need of all of them.
template <class T>
struct Token {
  const MoeRouteArgs& a;
  i64 t;
  float most = 0, sum = 1;

  __device__ __forceinline__ float logit(int e) const {
    return to_float(static_cast<const T*>(a.logits)[t * a.logits_stride_t + e * a.logits_stride_e]);
  }
  __device__ __forceinline__ float score(int e) const {
    if (a.score == Score::softmax) return expf(logit(e) - most) / sum;
    return a.score == Score::sigmoid ? 1 / (1 + expf(-logit(e))) : logit(e);
  }
  // Its order is that of the scores where there is no bias.
  __device__ __forceinline__ float choice(int e) const { return a.bias ? score(e) + a.bias[e * a.bias_stride] : logit(e); }

  // By a whole warp.
  __device__ __forceinline__ void look() {
    if (a.score != Score::softmax) return;
    const int E = static_cast<int>(a.E), lane = threadIdx.x % kWarp;
    u64 best = 0;
    for (int e = lane; e < E; e += kWarp) {
      const u64 key = key_of(logit(e), e);
      if (key > best) best = key;
    }
    best = warp_max(best);
    most = E ? logit(index_of(best)) : 0;
    sum = 0;
    for (int e = lane; e < E; e += kWarp) sum += expf(logit(e) - most);
    sum = warp_sum(sum);
  }

  // Which groups of experts may be chosen from, as bits. Lane ↔ group.
  __device__ __forceinline__ u32 open_groups() const {
    const int groups = static_cast<int>(a.groups), size = static_cast<int>(a.E) / groups, lane = threadIdx.x % kWarp;
    u64 first = 0, second = 0, last = ~0ull;
    for (int e = lane * size; lane < groups && e < (lane + 1) * size; ++e) {
      const u64 key = key_of(choice(e), e);
      if (key > first)
        second = first, first = key;
      else if (key > second)
        second = key;
    }
    u64 mine = 0;
    if (first) mine = key_of(choice(index_of(first)) + (a.bias && second ? choice(index_of(second)) : 0), lane);
    u32 open = 0;
    for (int k = 0; k < a.top_groups; ++k) {
      last = warp_max(mine < last ? mine : 0);
      open |= 1u << index_of(last);
    }
    return open;
  }
};

// Writes the choices of a token, best first; candidate(e): its key, or 0. By a whole warp; lane k % 32 writes choice k.
template <class T, class F>
__device__ __forceinline__ void write_best(const MoeRouteArgs& a, const Token<T>& token, bool routed, i32* chosen, F candidate) {
  const int E = static_cast<int>(a.E), K = static_cast<int>(a.K), lane = threadIdx.x % kWarp;
  const i64 row = token.t * a.K;
  u64 last = routed ? ~0ull : 0;
  float sum = 1e-20f;
  for (int k = 0; k < K; ++k) {
    u64 best = 0;
    for (int e = lane; e < E && last; e += kWarp) {
      const u64 key = candidate(e);
      if (key < last && key > best) best = key;
    }
    last = warp_max(best);
    const float score = last ? token.score(index_of(last)) : 0;
    sum += score;
    if (k % kWarp != lane) continue;
    a.weight[row + k] = score;
    a.ids[row + k] = last ? index_of(last) : -1;
    if (chosen) chosen[row + k] = last ? index_of(last) : -1;
  }
  for (int k = lane; k < K; k += kWarp) {
    const float score = a.weight[row + k];
    a.weight[row + k] = a.ids[row + k] < 0 ? 0 : a.scale * (a.renormalize ? score / sum : score);
  }
}

// Warp ↔ token. By token: the choices. By expert: only what the scores need, for the next kernels.
template <class T>
__global__ void __launch_bounds__(kThreads) moe_route_tokens_kernel(MoeRouteArgs a) {
  const Layout at(a);
  const i64 t = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (t >= a.T) return;
  Token<T> token{a, t};
  token.look();
  if (a.by_expert) {
    if (threadIdx.x % kWarp == 0) {
      scratch<float>(a, at.stats)[2 * t] = token.most;
      scratch<float>(a, at.stats)[2 * t + 1] = token.sum;
    }
    return;
  }
  const u32 open = a.top_groups < a.groups ? token.open_groups() : ~0u;
  const int size = static_cast<int>(a.E / a.groups);
  i32* chosen = a.capacity >= 0 ? scratch<i32>(a, at.chosen) : nullptr;
  write_best(a, token, is_routed(a, t), chosen,
             [&](int e) { return open == ~0u || open >> (e / size) & 1 ? key_of(token.choice(e), e) : 0ull; });
}

// Block ↔ expert: its choices in order, first ones of all tokens, then second ones; those past the capacity are taken back.
__global__ void __launch_bounds__(kThreads) moe_route_limit_kernel(MoeRouteArgs a) {
  __shared__ int sums[kWarp];
  const Layout at(a);
  const i32* chosen = scratch<i32>(a, at.chosen);
  i64 taken = 0;
  for (i64 first = 0; first < a.T * a.K; first += kThreads) {
    const i64 i = first + threadIdx.x, at_choice = i < a.T * a.K ? i % a.T * a.K + i / a.T : 0;
    const bool mine = i < a.T * a.K && chosen[at_choice] == static_cast<int>(blockIdx.x);
    int total;
    const i64 place = taken + block_exclusive_sum(mine, sums, total);
    if (mine && place >= a.capacity) a.ids[at_choice] = -1, a.weight[at_choice] = 0;
    taken += total;
  }
}

// Block ↔ expert: what it asks of a token it takes, a key above `least`, or equal to it and a place up to `last`.
template <class T>
__global__ void __launch_bounds__(kThreads) moe_route_experts_kernel(MoeRouteArgs a) {
  __shared__ int sums[kWarp];
  const Layout at(a);
  const int e = static_cast<int>(blockIdx.x);
  const float* stats = scratch<float>(a, at.stats);
  const auto key = [&](i64 t) { return is_routed(a, t) ? ordered(Token<T>{a, t, stats[2 * t], stats[2 * t + 1]}.score(e)) : 0u; };
  const auto reach = [&](u32 least) {
    int count = 0, total;
    for (i64 t = threadIdx.x; t < a.T; t += kThreads) count += key(t) >= least;
    block_exclusive_sum(count, sums, total);
    return total;
  };
  u32 least = 0;
  for (u32 bit = 0x80000000u; bit; bit /= 2)
    if (reach(least | bit) >= a.capacity) least |= bit;
  const i64 ties = a.capacity - (least < 0xffffffffu ? reach(least + 1) : 0);
  int found = 0;
  if (threadIdx.x == 0) scratch<u32>(a, at.limits)[2 * e] = least, scratch<i32>(a, at.limits)[2 * e + 1] = -1;
  __syncthreads();  // the tie that is last may be written
  for (i64 first = 0; first < a.T && found < ties; first += kThreads) {
    const i64 t = first + threadIdx.x;
    const bool tie = t < a.T && key(t) == least;
    int total;
    const int place = found + block_exclusive_sum(tie, sums, total);
    if (tie && (place == ties - 1 || (place < ties && place == found + total - 1)))
      scratch<i32>(a, at.limits)[2 * e + 1] = static_cast<i32>(t);
    found += total;
    __syncthreads();  // a later chunk's last tie is written after this one's
  }
}

// Warp ↔ token: the best of the experts that took it.
template <class T>
__global__ void __launch_bounds__(kThreads) moe_route_takers_kernel(MoeRouteArgs a) {
  const Layout at(a);
  const i64 t = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (t >= a.T) return;
  const float* stats = scratch<float>(a, at.stats);
  const Token<T> token{a, t, stats[2 * t], stats[2 * t + 1]};
  write_best(a, token, is_routed(a, t), nullptr, [&](int e) {
    const float score = token.score(e);
    const u32 mine = ordered(score), least = scratch<u32>(a, at.limits)[2 * e];
    return mine > least || (mine == least && t <= scratch<i32>(a, at.limits)[2 * e + 1]) ? key_of(score, e) : 0ull;
  });
}

template <class T>
void run(const MoeRouteArgs& a, void* stream) {
  const dim3 tokens(static_cast<unsigned>((a.T + kWarps - 1) / kWarps)), block(kThreads);
  const dim3 experts(static_cast<unsigned>(a.T ? a.E : 0));
  launch("moe_route_tokens_kernel", moe_route_tokens_kernel<T>, tokens, block, stream, a);
  if (a.by_expert) {
    launch("moe_route_experts_kernel", moe_route_experts_kernel<T>, experts, block, stream, a);
    launch("moe_route_takers_kernel", moe_route_takers_kernel<T>, tokens, block, stream, a);
  } else if (a.capacity >= 0) {
    launch("moe_route_limit_kernel", moe_route_limit_kernel, experts, block, stream, a);
  }
}

}  // namespace

std::int64_t moe_route_workspace_cuda(const MoeRouteArgs& args) { return Layout(args).bytes; }

void moe_route_cuda(const MoeRouteArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  base::by_float_dtype("moe_route", a.dtype, [&](auto type) { run<typename decltype(type)::type>(a, stream); });
}

}  // namespace effvlm
