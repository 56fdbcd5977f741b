#include "core/check.h"
#include "core/cpu/math.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/moe_route.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;

// Unsigned integers in the order of the floats: −Inf first, then numbers, then Inf, then NaN; −0 equals 0.
inline u32 ordered(float x) {
  if (x != x) return 0xffffffffu;
  const u32 bits = f32_to_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Keys of what is chosen among: a larger key is a better choice, and of equal values the one of lower index is better.
inline u64 key_of(float x, i64 index) { return static_cast<u64>(ordered(x)) << 32 | (0x7fffffffu - static_cast<u32>(index)); }
inline i64 index_of(u64 key) { return 0x7fffffffu - static_cast<u32>(key); }

// The `wanted` largest keys, largest first, of those given to add().
struct Best {
  u64* key;
  i64 wanted, found = 0;

  void add(u64 candidate) {
    if (found == wanted && candidate <= key[found - 1]) return;
    i64 place = found < wanted ? found++ : found - 1;
    for (; place > 0 && key[place - 1] < candidate; --place) key[place] = key[place - 1];
    key[place] = candidate;
  }
};

constexpr float kInfinity = __builtin_inff();

inline bool is_finite(float x) { return x - x == 0; }

// Of numbers; of NaN what is left without them.
inline float most_of(const float* x, i64 n) {
  f32v most = set1(-kInfinity);
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
  u64* keys(int thread) const { return scratch<u64>(at.keys) + thread * a.K; }

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

  // The K best choices of a token into `best`; `choice` is used up.
  void choose(float* choice, Best& best) const {
    const i64 size = a.E / a.groups;
    const bool plain = is_finite(sum_of(choice, a.E));  // neither NaN nor infinities, whose order is not that of comparisons
    if (a.top_groups < a.groups) {
      float value[kMaxGroups];
      bool open[kMaxGroups] = {};
      u64 keys[kMaxGroups] = {};
      Best group{keys, a.top_groups};
      for (i64 g = 0; g < a.groups; ++g) {
        value[g] = plain ? two_best(choice + g * size, size) : two_best_of_any(choice + g * size, size);
        group.add(key_of(value[g], g));
      }
      for (i64 k = 0; k < group.found; ++k) open[index_of(keys[k])] = true;
      for (i64 g = 0; g < a.groups; ++g)
        for (i64 e = g * size; e < (g + 1) * size; ++e) {
          if (!plain && open[g]) best.add(key_of(choice[e], e));
          if (!open[g]) choice[e] = -kInfinity;
        }
    } else if (!plain) {
      for (i64 e = 0; e < a.E; ++e) best.add(key_of(choice[e], e));
    }
    if (plain) pick(choice, best);
  }

  // Takes the largest K times, by the largest of each run of 16.
  void pick(float* choice, Best& best) const {
    constexpr i64 kRun = 16;
    float* most = choice + 2 * padded_experts(a.E);
    const auto look = [&](i64 run) {
      const i64 left = a.E - run * kRun;
      most[run] = most_of(choice + run * kRun, left < kRun ? left : kRun);
    };
    const i64 runs = (a.E + kRun - 1) / kRun;
    for (i64 run = 0; run < runs; ++run) look(run);
    for (; best.found < a.K; ++best.found) {
      i64 run = 0;
      for (i64 other = 1; other < runs; ++other) run = most[other] > most[run] ? other : run;
      i64 e = run * kRun;
      while (choice[e] != most[run]) ++e;
      best.key[best.found] = key_of(choice[e], e);
      choice[e] = -kInfinity;
      look(run);
    }
  }

  // What a group of experts counts: its best choice, with a bias plus its second best.
  float two_best(const float* choice, i64 size) const {
    f32v first = set1(-kInfinity), second = first;
    const auto take = [&](f32v x) { second = max(second, min(first, x)), first = max(first, x); };
    i64 e = 0;
    for (; e + f32v::width <= size; e += f32v::width) take(load(choice + e));
    float lanes[2 * f32v::width], most = -kInfinity, next = -kInfinity;
    store(lanes, first), store(lanes + f32v::width, second);
    const auto take_one = [&](float x) { next = x > most ? most : x > next ? x : next, most = x > most ? x : most; };
    for (const float x : lanes) take_one(x);
    for (; e < size; ++e) take_one(choice[e]);
    return a.bias && size > 1 ? most + next : most;
  }
  float two_best_of_any(const float* choice, i64 size) const {
    u64 keys[2] = {};
    Best best{keys, a.bias && size > 1 ? 2 : 1};
    for (i64 e = 0; e < size; ++e) best.add(key_of(choice[e], e));
    return choice[index_of(keys[0])] + (best.found == 2 ? choice[index_of(keys[1])] : 0);
  }

  // Ids and weights of a token from its best choices and all its scores.
  void write(i64 t, const Best& best, const float* scores) const {
    float sum = 1e-20f;
    for (i64 k = 0; k < best.found; ++k) sum += scores[index_of(best.key[k])];
    for (i64 k = 0; k < a.K; ++k) {
      const bool is = k < best.found;
      const i64 e = is ? index_of(best.key[k]) : -1;
      a.ids[t * a.K + k] = e;
      a.weight[t * a.K + k] = !is ? 0 : a.scale * (a.renormalize ? scores[e] / sum : scores[e]);
    }
  }

  void by_token(i64 t, int thread) const {
    float *logits = scratch<float>(at.values) + thread * 3 * padded_experts(a.E), *scores = logits + padded_experts(a.E);
    Best best{keys(thread), a.K};
    if (is_routed(t) && a.K) {
      logits_of(t, logits);
      scores_of(logits, scores);
      for (i64 e = 0; a.bias && e < a.E; ++e) logits[e] = scores[e] + a.bias[e * a.bias_stride];
      choose(logits, best);
    }
    write(t, best, scores);
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
    Best best{keys(thread), a.K};
    for (i64 e = 0; e < a.E && is_routed(t) && a.K; ++e) {
      const u32 mine = ordered(scores[e]), least = scratch<u32>(at.least)[e];
      if (mine > least || (mine == least && t <= scratch<i64>(at.last)[e])) best.add(key_of(scores[e], e));
    }
    write(t, best, scores);
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
      float* logits = scratch<float>(at.values) + thread * 3 * padded_experts(a.E);
      if (a.E) logits_of(t, logits), scores_of(logits, scratch<float>(at.scores) + t * a.E);
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
