#include "core/check.h"
#include "core/cpu/parallel.h"
#include "ops/token_select.h"
#include "ops/token_select_rank.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;
using u32 = std::uint32_t;

void check_start(const TokenSelectArgs& a) {
  i32 before = 0;
  for (i64 s = 0; s <= a.S; ++s) {
    const i32 at = a.start[s * a.start_stride];
    if (at < before || at > a.N || (s == 0 && at != 0) || (s == a.S && at != a.N))
      fail("token_select: expected start to ascend from 0 to N = %lld, got %d at segment %lld after %d",
           static_cast<long long>(a.N), at, static_cast<long long>(s), before);
    before = at;
  }
}

bool is_bad(const TokenSelectArgs& a, float score) {
  return !(score == score) || (a.rule == SelectRule::top_p && score < 0 && score >= -3.4028235e38f);
}

void check_values(const TokenSelectArgs& a) {
  const char* expected = a.rule == SelectRule::top_p ? "scores >= 0 (or -inf)" : "scores without NaN";
  for (i64 s = 0; s < a.S; ++s) {
    const i32 first = a.start[s * a.start_stride], end = a.start[(s + 1) * a.start_stride];
    bool bad = false;
    for (i64 n = first; n < end; ++n) bad |= is_bad(a, a.score[n * a.score_stride]);
    for (i64 n = first; bad && n < end; ++n)
      if (is_bad(a, a.score[n * a.score_stride]))
        fail("token_select: expected %s, got %g at segment %lld, token %lld", expected, a.score[n * a.score_stride],
             static_cast<long long>(s), static_cast<long long>(n - first));
    if (!(a.limit[s * a.limit_stride] == a.limit[s * a.limit_stride]))
      fail("token_select: expected limit to be numbers, got nan at segment %lld", static_cast<long long>(s));
  }
}

struct Segment : Keys {
  i64* units;  // of top_p
  bool* kept;

  i64 units_from(u32 key) const {
    i64 sum = 0;
    for (i32 i = 0; i < n; ++i) sum += keys[i] >= key ? units[i] : 0;
    return sum;
  }
  float score_of_rank(i32 rank) const {
    const Cut cut = cut_at_rank(rank);
    return float_of(cut.equal ? cut.key : least_from(cut.key + 1));
  }
  u32 key_of_share(i64 target) const {
    u32 key = 0;
    for (u32 bit = 1u << 31; bit; bit >>= 1)
      if (units_from(key | bit) >= target) key |= bit;
    return key;
  }

  Cut top(i32 r) const {
    if (r == 0) return keep_infinite();
    if (r == n) return keep_all();
    return bounded(cut_at_rank(r));
  }

  Cut iqr(float limit) const {
    const i32 infinite = count_from(kInfiniteKey), finite = count_from(kLowestKey + 1) - infinite;
    if (finite == 0) return keep_infinite();
    const auto quartile = [&](int q) {
      const Quartile place = quartile_of(q, finite);
      const i32 rank = infinite + finite - place.below;
      const double low = score_of_rank(rank), high = place.quarters ? score_of_rank(rank - 1) : low;
      return low + (high - low) * (0.25 * place.quarters);
    };
    const double q1 = quartile(1), q3 = quartile(3);
    return cut_above(q3 + limit * (q3 - q1));
  }

  Cut top_p(float limit) const {
    u32 largest = 0;
    for (i32 i = 0; i < n; ++i) largest = keys[i] < kInfiniteKey && keys[i] > largest ? keys[i] : largest;
    if (largest <= key_of(0)) return keep_infinite();
    const double per_score = units_per_score(largest, n);
    for (i32 i = 0; i < n; ++i) units[i] = units_of(keys[i], per_score);
    const i64 target = share(limit, units_from(0));
    const u32 key = key_of_share(target);
    const i64 left = target - units_from(key + 1), each = units_of(key, per_score);
    return {key, static_cast<i32>((left + each - 1) / each)};
  }

  Cut cut(SelectRule rule, float limit) const {
    switch (rule) {
      case SelectRule::top: return top(whole(limit, n));
      case SelectRule::above: return cut_from(limit);
      case SelectRule::iqr: return iqr(limit);
      default: return top_p(limit);
    }
  }

  i32 mark(Cut cut) const {  // returns how many are kept
    i32 count = 0;
    for (i32 i = 0; i < n; ++i) {
      const bool above = keys[i] > cut.key;
      kept[i] = above;
      count += above;
    }
    for (i32 i = 0; i < n && cut.equal > 0; ++i)
      if (keys[i] == cut.key) kept[i] = true, ++count, --cut.equal;
    return count;
  }
};

void select(const TokenSelectArgs& a, i64 s) {
  const SelectLayout layout(a.N, a.rule);
  char* workspace = static_cast<char*>(a.workspace);
  const i64 first = a.start[s * a.start_stride];
  const Segment segment{
      {static_cast<i32>(a.start[(s + 1) * a.start_stride] - first), reinterpret_cast<u32*>(workspace + layout.keys) + first},
      reinterpret_cast<i64*>(workspace + layout.units) + first,
      a.kept + first};
  const float* score = a.score + first * a.score_stride;
  for (i32 i = 0; i < segment.n; ++i) segment.keys[i] = key_of(score[i * a.score_stride]);
  a.count[s] = segment.mark(segment.cut(a.rule, a.limit[s * a.limit_stride]));
}

}  // namespace

void token_select_cpu(const TokenSelectArgs& a) {
  check_start(a);
  check_values(a);
  const i64 grain = a.S ? 1 + 4096 / (a.N / a.S + 1) : 1;
  parallel_for(a.S, grain, a.threads, [&](i64 begin, i64 end, int) {
    for (i64 s = begin; s < end; ++s) select(a, s);
  });
}

}  // namespace effvlm::EFFVLM_ISA
