#include "core/check.h"
#include "core/cpu/dot.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/token_match.h"
#include "ops/token_match_screen.h"
#include "ops/token_select_rank.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

constexpr i32 kNeither = INT32_MIN;  // number of a token: i of source i, ~j of destination j, or this

template <class T>
struct Matcher {
  const TokenMatchArgs& a;
  TokenMatchLayout layout{a};

  template <class P>
  P* at(i64 offset, i64 index = 0) const {
    return reinterpret_cast<P*>(static_cast<char*>(a.workspace) + offset) + index;
  }

  // Sources and destinations of a batch entry, by ascending position.
  i64& sources(i64 b) const { return at<i64>(layout.count)[2 * b]; }
  i64& destinations(i64 b) const { return at<i64>(layout.count)[2 * b + 1]; }
  i32* sources_of(i64 b) const { return at<i32>(layout.sources, b * layout.S); }
  i32* destinations_of(i64 b) const { return at<i32>(layout.destinations, b * layout.D); }

  const T* token(i64 b, i64 n) const {
    if (a.x_stride_c != 1) return at<T>(layout.packed, (b * a.N + n) * a.C);
    return static_cast<const T*>(a.x) + b * a.x_stride_b + n * a.x_stride_n;
  }

  // Where screening pays: enough pairs for int8 to outweigh the rounding, and sums that stay inside 32 bits.
  bool may_screen() const {
#if defined(__AVX512VNNI__)
    return a.N >= 4 * kMatchScreened && a.C >= 64 && a.C <= kInt8MaxK;
#else
    return false;
#endif
  }
  bool screens(i64 b) const {
    const i64 S = sources(b), D = destinations(b);
    return may_screen() && S * D >= kMatchScreened * (S + D);
  }

  MatchRole role(i64 b, i64 n) const {
    if (!a.role) return n % 2 ? kMatchDestination : kMatchSource;
    const std::uint8_t role = a.role[b * a.role_stride_b + n * a.role_stride_n];
    if (role > kMatchDestination)
      fail("token_match: expected role 0, 1 or 2, got %d at batch %lld, token %lld", role, static_cast<long long>(b),
           static_cast<long long>(n));
    return static_cast<MatchRole>(role);
  }

  void list_all() const {
    for (i64 b = 0; b < a.B; ++b) {
      i64 &S = sources(b) = 0, &D = destinations(b) = 0;
      for (i64 n = 0; n < a.N; ++n) {
        const MatchRole is = role(b, n);
        i32& number = at<i32>(layout.number)[b * a.N + n] = kNeither;
        if (is == kMatchSource) number = static_cast<i32>(S), sources_of(b)[S++] = static_cast<i32>(n);
        if (is == kMatchDestination) number = ~static_cast<i32>(D), destinations_of(b)[D++] = static_cast<i32>(n);
      }
      if (a.r > (D ? S : 0))
        fail("token_match: expected r <= the sources that have a destination, %lld at batch %lld, got r = %lld",
             static_cast<long long>(D ? S : 0), static_cast<long long>(b), static_cast<long long>(a.r));
    }
    for (i64 i = 0; i < a.B * layout.width; ++i) a.score[i] = a.role ? -INFINITY : 0, a.partner[i] = -1;
  }

  float squared_norm(const T* x) const {
    constexpr int kChains = 4, W = f32v::width;  // partial sums, to cover the latency of the multiply-add
    f32v sum[kChains] = {set1(0), set1(0), set1(0), set1(0)};
    i64 c = 0;
    for (; c + kChains * W <= a.C; c += kChains * W)
      for (int k = 0; k < kChains; ++k) sum[k] = fma(load(x + c + k * W), load(x + c + k * W), sum[k]);
    for (; c + W <= a.C; c += W) sum[0] = fma(load(x + c), load(x + c), sum[0]);
    const int rest = static_cast<int>(a.C - c);
    if (rest) sum[1] = fma(load(x + c, rest), load(x + c, rest), sum[1]);
    return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  float inverse_of(float square) const { return !a.cosine ? 1.0f : square > 0 ? 1 / std::sqrt(square) : 0.0f; }
  float inverse(i64 b, i64 n) const { return at<float>(layout.inverse_norm)[b * a.N + n]; }

  float score(i64 b, i64 p, i64 q, float dot) const {  // of the source and the destination at these positions
    const float* inverse = at<float>(layout.inverse_norm, b * a.N);
    return dot * inverse[q] * inverse[p] + 0.0f;  // + 0: no −0, whose bits sort below +0
  }

  void keep_best(i64 b, i32 p, i32 q, float dot) const {  // called by ascending q
    const float value = score(b, p, q, dot);
    const i64 at = b * layout.width + (a.role ? p : p / 2);
    if (value > a.score[at] || a.partner[at] < 0) a.score[at] = value, a.partner[at] = q;
  }

  // Every pair in f32, blocks of MR sources × 4 destinations in registers.
  void match_rows(i64 b, i64 first, i64 last) const {
#if defined(__AVX512F__)
    constexpr int MR = 4;
#else
    constexpr int MR = 2;  // 16 registers
#endif
    const i64 D = destinations(b);
    const i32 *source = sources_of(b), *destination = destinations_of(b);
    float dot[MR * 4];
    const T *rows[MR], *columns[4];
    for (i64 j = 0; j < D; j += 4) {
      for (int k = 0; k < 4; ++k) columns[k] = token(b, destination[j + k < D ? j + k : D - 1]);
      for (i64 i = first; i < last; i += MR) {
        for (int k = 0; k < MR; ++k) rows[k] = token(b, source[i + k < last ? i + k : last - 1]);
        dots<T, MR, 4, 1>(rows, columns, a.C, dot);
        for (int k = 0; k < MR && i + k < last; ++k)
          for (int l = 0; l < 4 && j + l < D; ++l) keep_best(b, source[i + k], destination[j + l], dot[l * MR + k]);
      }
    }
  }

  // Contiguous channels, 8 neighbouring tokens together: when tokens are what is contiguous, lines are read whole, and 8 rows
  // a power of two apart still fit the ways of a first-level cache.
  void pack_all() const {
    constexpr i64 kGroup = 8;
    const i64 groups = (a.N + kGroup - 1) / kGroup;
    parallel_for(a.B * groups, 1, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 t = begin; t < end; ++t) {
        const i64 b = t / groups, first = t % groups * kGroup, count = a.N - first < kGroup ? a.N - first : kGroup;
        const T* from = static_cast<const T*>(a.x) + b * a.x_stride_b + first * a.x_stride_n;
        T* to = const_cast<T*>(token(b, first));
        for (i64 c = 0; c < a.C; ++c)
          for (i64 n = 0; n < count; ++n) to[n * a.C + c] = from[n * a.x_stride_n + c * a.x_stride_c];
      }
    });
  }

  // inverse_norm of every source and destination; and those of entries that are screened are rounded while they are in the cache.
  void measure_all(const Screen<T, Matcher>& screen) const {
    i64* bad = at<i64>(layout.bad);
    for (int t = 0; t < a.threads; ++t) bad[t] = -1;
    constexpr i64 kAPanel = 2 * kMatchPanel;  // of destinations, with the sources between them: its lines belong to one thread
    parallel_for(a.B * a.N, round_up(1 + 8192 / (a.C + 1), kAPanel), a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 t = begin; t < end; ++t) {
        const i64 b = t / a.N, n = t % a.N;
        const i32 number = at<i32>(layout.number)[t];
        if (number == kNeither) continue;
        const float square = squared_norm(token(b, n));
        at<float>(layout.inverse_norm)[t] = inverse_of(square);
        if (!(square <= 3.4028235e38f)) bad[thread] = bad[thread] < 0 || t < bad[thread] ? t : bad[thread];
        if (screens(b)) screen.round(b, number, square, thread);
      }
    });
    i64 first = -1;
    for (int t = 0; t < a.threads; ++t)
      if (bad[t] >= 0 && (first < 0 || bad[t] < first)) first = bad[t];
    if (first >= 0)
      fail("token_match: expected finite tokens, got NaN, Inf or a squared norm beyond float32 at batch %lld, token %lld",
           static_cast<long long>(first / a.N), static_cast<long long>(first % a.N));
  }

  void match_all(const Screen<T, Matcher>& screen) const {
    constexpr i64 kRows = 32;  // of what is not screened: they stay in the second-level cache while the destinations stream by
    const i64 rows = may_screen() ? kStripRows : kRows, blocks = (layout.S + rows - 1) / rows;
    parallel_for(a.B * blocks, 1, a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 t = begin; t < end; ++t) {
        const i64 b = t / blocks, first = t % blocks * rows, last = first + rows < sources(b) ? first + rows : sources(b);
        if (first >= last) continue;
        if (screens(b)) {
          screen.match_rows(b, first, last, thread);
        } else {
          match_rows(b, first, last);
        }
      }
    });
  }

  // Place i of scores and partners is position i·step.
  void make_groups(i64 b) const {
    const i64 step = a.role ? 1 : 2, width = layout.width;
    const float* score = a.score + b * width;
    const i32* partner = a.partner + b * width;
    i32* group = a.group + b * a.N;
    const Keys keys{static_cast<i32>(width), at<std::uint32_t>(layout.keys, b * width)};
    for (i64 i = 0; i < width; ++i) keys.keys[i] = partner[i] < 0 ? 0 : key_of(score[i]);
    Cut cut = a.r ? keys.cut_at_rank(static_cast<i32>(a.r)) : Cut{~0u, 0};
    constexpr i32 kMerged = -1;
    i32 next = 0;
    for (i64 n = 0; n < a.N; ++n) {
      const std::uint32_t key = n % step == 0 ? keys.keys[n / step] : 0;
      const bool merged = key > cut.key || (key == cut.key && cut.equal-- > 0);
      group[n] = merged ? kMerged : next++;
    }
    for (i64 i = 0; i < width; ++i)
      if (group[step * i] == kMerged) group[step * i] = group[partner[i]];
  }

  void run() const {
    list_all();
    if (a.x_stride_c != 1) pack_all();
    const Screen<T, Matcher> screen(*this);
    parallel_for(a.B, 1, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 b = begin; b < end; ++b)
        if (screens(b)) screen.find_mean(b), screen.pad_destinations(b);
    });
    measure_all(screen);
    match_all(screen);
    parallel_for(a.B, 1, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 b = begin; b < end; ++b) make_groups(b);
    });
  }
};

}  // namespace

void token_match_cpu(const TokenMatchArgs& a) {
  if (a.B == 0 || a.N == 0) return;
  by_float_dtype("token_match", a.dtype, [&](auto type) { Matcher<typename decltype(type)::type>{a}.run(); });
}

}  // namespace effvlm::EFFVLM_ISA
