#include "core/check.h"
#include "core/cpu/math.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/moe_route.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using u32 = std::uint32_t;

// Unsigned integers in the order of the floats: −Inf first, then numbers, then Inf, then NaN; −0 equals 0.
inline u32 ordered(float x) {
  if (x != x) return 0xffffffffu;
  const u32 bits = f32_to_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// And back, for all but NaN's payload.
inline float unordered(u32 key) { return bits_to_f32(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

constexpr u32 kClosed = 0;  // below every float, −Inf included

inline u32 largest(const u32* key, i64 n) {
  u32 most = 0;
  for (i64 i = 0; i < n; ++i) most = key[i] > most ? key[i] : most;
  return most;
}

// Of numbers; of NaN what is left without them.
inline float most_of(const float* x, i64 n) {
  f32v most = set1(-__builtin_inff());
  i64 i = 0;
  for (; i + f32v::width <= n; i += f32v::width) most = max(load(x + i), most);
  float all = reduce_max(most);
  for (; i < n; ++i) all = x[i] > all ? x[i] : all;
  return all;
}

inline float sum_of(const float* x, i64 n) {
  f32v sum = set1(0);
  i64 i = 0;
  for (; i + f32v::width <= n; i += f32v::width) sum = sum + load(x + i);
  float all = reduce_add(sum);
  for (; i < n; ++i) all += x[i];
  return all;
}

template <class T>
struct Router {
  const MoeRouteArgs& a;
  const MoeRouteLayout at;

  template <class P>
  P* scratch(i64 offset) const {
    return reinterpret_cast<P*>(static_cast<char*>(a.workspace) + offset);
  }
  bool is_routed(i64 t) const { return !a.mask || a.mask[t * a.mask_stride]; }
  // Per thread: values of all experts (which a token's choices may use up), a second set, and keys of them and of their runs.
  float* values(int thread) const { return scratch<float>(at.values) + thread * 4 * padded_experts(a.E); }
  u32* keys(int thread) const { return reinterpret_cast<u32*>(values(thread) + 2 * padded_experts(a.E)); }
  i64* chosen(int thread) const { return scratch<i64>(at.chosen) + thread * a.K; }

  void logits_of(i64 t, float* to) const {
    const T* from = static_cast<const T*>(a.logits) + t * a.logits_stride_t;
    if (a.logits_stride_e == 1) {
      for_lanes(
          a.E, [&](i64 e) { store(to + e, load(from + e)); },
          [&](i64 e, int rest) { store(to + e, load(from + e, rest), rest); });
    } else {
      for (i64 e = 0; e < a.E; ++e) to[e] = to_f32(from[e * a.logits_stride_e]);
    }
  }

  void scores_of(const float* logits, float* to) const {
    if (a.score == Score::none) {
      std::memcpy(to, logits, a.E * sizeof(float));
      return;
    }
    const float most = a.score == Score::softmax ? most_of(logits, a.E) : 0;
    const auto value = [&](f32v x) { return a.score == Score::softmax ? exp(x - set1(most)) : sigmoid(x); };
    for_lanes(
        a.E, [&](i64 e) { store(to + e, value(load(logits + e))); },
        [&](i64 e, int rest) { store(to + e, value(load(logits + e, rest)), rest); });
    if (a.score != Score::softmax) return;
    const float sum = sum_of(to, a.E);
    for (i64 e = 0; e < a.E; ++e) to[e] /= sum;
  }

  // Closes the experts of all groups but the top_groups best ones.
  void close_groups(u32* key) const {
    const i64 size = a.E / a.groups;
    u32 value[kMaxGroups];
    for (i64 g = 0; g < a.groups; ++g) value[g] = ordered(worth(key + g * size, size));
    for (i64 left = a.groups - a.top_groups; left > 0; --left) {
      i64 worst = -1;  // of equal ones the last
      for (i64 g = 0; g < a.groups; ++g)
        if (value[g] != kClosed && (worst < 0 || value[g] <= value[worst])) worst = g;
      value[worst] = kClosed;
      for (i64 e = worst * size; e < (worst + 1) * size; ++e) key[e] = kClosed;
    }
  }

  // What a group of experts counts: its best choice, with a bias plus its second best.
  float worth(const u32* key, i64 size) const {
    u32 most = 0, next = 0;
    for (i64 i = 0; i < size; ++i)
      next = key[i] > most ? most : key[i] > next ? key[i] : next, most = key[i] > most ? key[i] : most;
    return unordered(most) + (a.bias && size > 1 ? unordered(next) : 0);
  }

  // Takes the largest key K times, or until all are closed, by the largest of each run of 16. Returns how many; of equal ones the
  // first.
  i64 pick(u32* key, i64* expert) const {
    constexpr i64 kRun = 16;
    u32* most = key + padded_experts(a.E);
    const i64 runs = (a.E + kRun - 1) / kRun;
    const auto look = [&](i64 run) {
      const i64 left = a.E - run * kRun;
      most[run] = largest(key + run * kRun, left < kRun ? left : kRun);
    };
    for (i64 run = 0; run < runs; ++run) look(run);
    for (i64 k = 0; k < a.K; ++k) {
      i64 run = 0;
      for (i64 other = 1; other < runs; ++other) run = most[other] > most[run] ? other : run;
      if (most[run] == kClosed) return k;
      i64 e = run * kRun;
      while (key[e] != most[run]) ++e;
      expert[k] = e, key[e] = kClosed;
      look(run);
    }
    return a.K;
  }

  // Ids and weights of a token from the experts it has got and all its scores.
  void write(i64 t, const i64* expert, i64 found, const float* scores) const {
    float sum = 1e-20f;
    for (i64 k = 0; k < found; ++k) sum += scores[expert[k]];
    for (i64 k = 0; k < a.K; ++k) {
      a.ids[t * a.K + k] = k < found ? expert[k] : -1;
      a.weight[t * a.K + k] = k < found ? a.scale * (a.renormalize ? scores[expert[k]] / sum : scores[expert[k]]) : 0;
    }
  }

  void by_token(i64 t, int thread) const {
    float *choice = values(thread), *scores = choice + padded_experts(a.E);
    i64 found = 0;
    if (is_routed(t) && a.K) {
      logits_of(t, choice);
      scores_of(choice, scores);
      for (i64 e = 0; a.bias && e < a.E; ++e) choice[e] = scores[e] + a.bias[e * a.bias_stride];
      for (i64 e = 0; e < a.E; ++e) keys(thread)[e] = ordered(choice[e]);
      if (a.top_groups < a.groups) close_groups(keys(thread));
      found = pick(keys(thread), chosen(thread));
    }
    write(t, chosen(thread), found, scores);
  }

  // First choices of all tokens before second ones; an expert that is full takes no more.
  void limit() const {
    i64* taken = scratch<i64>(at.taken);
    for (i64 e = 0; e < a.E; ++e) taken[e] = 0;
    for (i64 k = 0; k < a.K; ++k)
      for (i64 t = 0; t < a.T; ++t) {
        i64& e = a.ids[t * a.K + k];
        if (e < 0 || taken[e]++ < a.capacity) continue;
        e = -1, a.weight[t * a.K + k] = 0;
      }
  }

  // What expert e asks of a token it takes: a key above `least`, or equal to it and a place up to `last`. The key is found bit by
  // bit, from the highest, as the largest that `capacity` tokens reach.
  void limits_of(i64 e, int thread) const {
    u32* column = scratch<u32>(at.column) + thread * a.T;
    for (i64 t = 0; t < a.T; ++t) column[t] = is_routed(t) ? ordered(scratch<float>(at.scores)[t * a.E + e]) : 0;
    const auto reach = [&](u32 key) {
      i64 count = 0;
      for (i64 t = 0; t < a.T; ++t) count += column[t] >= key;
      return count;
    };
    u32 least = 0;
    for (u32 bit = 0x80000000u; bit; bit /= 2)
      if (reach(least | bit) >= a.capacity) least |= bit;
    i64 ties = a.capacity - (least < 0xffffffffu ? reach(least + 1) : 0), last = -1;
    for (i64 t = 0; t < a.T && ties > 0; ++t)
      if (column[t] == least) last = t, --ties;
    scratch<u32>(at.least)[e] = least;
    scratch<i64>(at.last)[e] = last;
  }

  void of_takers(i64 t, int thread) const {
    const float* scores = scratch<float>(at.scores) + t * a.E;
    u32* key = keys(thread);
    for (i64 e = 0; e < a.E; ++e) {
      const u32 mine = ordered(scores[e]), least = scratch<u32>(at.least)[e];
      key[e] = is_routed(t) && (mine > least || (mine == least && t <= scratch<i64>(at.last)[e])) ? mine : kClosed;
    }
    write(t, chosen(thread), a.K ? pick(key, chosen(thread)) : 0, scores);
  }

  template <class F>
  void parallel(i64 count, i64 grain, F&& each) const {
    parallel_for(count, grain, a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 i = begin; i < end; ++i) each(i, thread);
    });
  }

  void run() const {
    const i64 grain = 1 + 16384 / (a.E + 1);
    if (!a.by_expert) {
      parallel(a.T, grain, [&](i64 t, int thread) { by_token(t, thread); });
      if (a.capacity >= 0) limit();
      return;
    }
    parallel(a.T, grain, [&](i64 t, int thread) {
      if (a.E) logits_of(t, values(thread)), scores_of(values(thread), scratch<float>(at.scores) + t * a.E);
    });
    parallel(a.E, 1, [&](i64 e, int thread) { limits_of(e, thread); });
    parallel(a.T, grain, [&](i64 t, int thread) { of_takers(t, thread); });
  }
};

}  // namespace

void moe_route_cpu(const MoeRouteArgs& a) {
  by_float_dtype("moe_route", a.dtype, [&](auto type) { Router<typename decltype(type)::type>{a, MoeRouteLayout(a)}.run(); });
}

}  // namespace effvlm::EFFVLM_ISA
