#include <type_traits>

#include "core/check.h"
#include "core/cpu/dot.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/token_match.h"
#include "ops/token_match_screen.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

struct Scratch {
  float* inverse_norm;  // (B,N): 1/‖x‖ for cosine, 1 for dot, 0 for a zero token
  i64* bad_token;       // (threads): first token found that is not finite, or -1
  void* packed;         // (B,N,C): x with contiguous channels, where x itself has not
  ScreenScratch screen;
};

// Where screening pays: enough pairs for int8 to outweigh the rounding, and sums that stay inside 32 bits.
bool pick_screened([[maybe_unused]] const TokenMatchArgs& a) {
#if defined(__AVX512VNNI__)
  return a.N >= kMatchScreened && a.C >= 64 && a.C <= kInt8MaxK;
#else
  return false;
#endif
}

Scratch lay_out(const TokenMatchArgs& a, bool screened) {
  char* next = static_cast<char*>(a.workspace);
  const auto take = [&](auto*& p, i64 count) {
    p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(next);
    next += round_up(count * static_cast<i64>(sizeof *p), 64);
  };
  Scratch scratch{};
  take(scratch.inverse_norm, a.B * a.N);
  take(scratch.bad_token, a.threads);
  ScreenScratch& s = scratch.screen;
  s.S = (a.N + 1) / 2, s.D = a.N / 2;
  if (screened) {
    s.Sp = round_up(s.S, kMatchRows), s.Dp = round_up(s.D, kMatchPanel), s.K = round_up(a.C, kMatchChannels);
    take(s.mean, a.B * s.K);
    take(s.mean_square, a.B);
    take(s.source, a.B * s.Sp * s.K);
    take(s.destination, a.B * s.Dp * s.K);
    for (float** field : {&s.row_scale, &s.row_error, &s.row_norm, &s.row_slack, &s.row_offset}) take(*field, a.B * s.Sp);
    for (float** field : {&s.scale, &s.offset, &s.error, &s.norm, &s.reach}) take(*field, a.B * s.Dp);
    take(s.shift, a.B * s.Dp);
    take(s.row, a.threads * s.K);
    take(s.strip, a.threads * kMatchStrip * s.Dp);
  }
  if (a.x_stride_c != 1) {
    char* bytes;
    take(bytes, a.B * a.N * a.C * (a.dtype == Dtype::f32 ? 4 : 2));
    scratch.packed = bytes;
  }
  EFFVLM_CHECK(next <= static_cast<char*>(a.workspace) + a.workspace_bytes, "token_match: workspace of %lld bytes is too small",
               static_cast<long long>(a.workspace_bytes));
  return scratch;
}

template <class T>
struct Matcher {
  const TokenMatchArgs& a;
  Scratch scratch;
  i64 S, D;

  const T* token(i64 b, i64 n) const {
    if (scratch.packed) return static_cast<const T*>(scratch.packed) + (b * a.N + n) * a.C;
    return static_cast<const T*>(a.x) + b * a.x_stride_b + n * a.x_stride_n;
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
  float inverse(i64 b, i64 n) const { return scratch.inverse_norm[b * a.N + n]; }

  float score(i64 b, i64 source, i64 destination, float dot) const {
    return dot * inverse(b, 2 * destination + 1) * inverse(b, 2 * source) + 0.0f;  // + 0: no −0, whose bits sort below +0
  }

  void keep_best(i64 b, i64 source, i64 destination, float dot) const {  // called by ascending destination
    const float value = score(b, source, destination, dot);
    float& best = a.score[b * S + source];
    if (value > best || a.partner[b * S + source] < 0) {
      best = value;
      a.partner[b * S + source] = static_cast<i32>(2 * destination + 1);
    }
  }

  // Every pair in f32, blocks of MR sources × 4 destinations in registers.
  void match_rows(i64 b, i64 first, i64 last) const {
#if defined(__AVX512F__)
    constexpr int MR = 4;
#else
    constexpr int MR = 2;  // 16 registers
#endif
    float dot[MR * 4];
    const T *rows[MR], *columns[4];
    for (i64 j = 0; j < D; j += 4) {
      for (int k = 0; k < 4; ++k) columns[k] = token(b, 2 * (j + k < D ? j + k : D - 1) + 1);
      for (i64 i = first; i < last; i += MR) {
        for (int k = 0; k < MR; ++k) rows[k] = token(b, 2 * (i + k < last ? i + k : last - 1));
        dots<T, MR, 4, 1>(rows, columns, a.C, dot);
        for (int k = 0; k < MR && i + k < last; ++k)
          for (int l = 0; l < 4 && j + l < D; ++l) keep_best(b, i + k, j + l, dot[l * MR + k]);
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

  // inverse_norm of every token, and whatever `then(b, n, ‖x‖², thread)` wants done while the token is in the cache.
  template <class Then>
  void measure_all(Then&& then) const {
    for (int t = 0; t < a.threads; ++t) scratch.bad_token[t] = -1;
    constexpr i64 kAPanel = 2 * kMatchPanel;  // of destinations, with the sources between them: its lines belong to one thread
    parallel_for(a.B * a.N, round_up(1 + 8192 / (a.C + 1), kAPanel), a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 t = begin; t < end; ++t) {
        const float square = squared_norm(token(t / a.N, t % a.N));
        scratch.inverse_norm[t] = inverse_of(square);
        i64& bad = scratch.bad_token[thread];
        if (!(square <= 3.4028235e38f)) bad = bad < 0 || t < bad ? t : bad;
        then(t / a.N, t % a.N, square, thread);
      }
    });
    i64 bad = -1;
    for (int t = 0; t < a.threads; ++t)
      if (scratch.bad_token[t] >= 0 && (bad < 0 || scratch.bad_token[t] < bad)) bad = scratch.bad_token[t];
    if (bad >= 0)
      fail("token_match: expected finite tokens, got NaN, Inf or a squared norm beyond float32 at batch %lld, token %lld",
           static_cast<long long>(bad / a.N), static_cast<long long>(bad % a.N));
  }

  // match_rows(b, first, last, thread) over blocks of `rows` sources.
  template <class MatchRows>
  void match_all(i64 rows, MatchRows&& match_rows) const {
    const i64 blocks = (S + rows - 1) / rows;
    parallel_for(a.B * blocks, 1, a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 t = begin; t < end; ++t) {
        const i64 b = t / blocks, first = t % blocks * rows, last = first + rows < S ? first + rows : S;
        for (i64 i = b * S + first; i < b * S + last; ++i) a.score[i] = 0, a.partner[i] = -1;
        match_rows(b, first, last, thread);
      }
    });
  }

  void match_directly() const {
    constexpr i64 kRows = 32;  // their rows stay in the second-level cache while the destinations stream by
    measure_all([](i64, i64, float, int) {});
    match_all(kRows, [&](i64 b, i64 first, i64 last, int) { match_rows(b, first, last); });
  }

  void match_screened() const {
#if defined(__AVX512VNNI__)
    static_assert(kMatchRows % kStripRows == 0 && kMatchStrip >= kStripRows && kMatchPanel == kPanel,
                  "paddings of the workspace");
    const ScreenScratch& s = scratch.screen;
    const Screen<T, Matcher> screen{*this, s};
    parallel_for(a.B, 1, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 b = begin; b < end; ++b) screen.find_mean(b), screen.pad_destinations(b);
    });
    measure_all([&](i64 b, i64 n, float square, int thread) {
      float* row = s.row + thread * s.K;
      if (n % 2) {
        screen.round_destination(b, n / 2, square, row);
      } else {
        screen.round_source(b, n / 2, square, row);
      }
    });
    match_all(kStripRows, [&](i64 b, i64 first, i64 last, int thread) { screen.match_rows(b, first, last, thread); });
#endif
  }
};

std::uint32_t sort_key(float x) {  // unsigned order of keys = order of floats
  const std::uint32_t bits = f32_to_bits(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The r-th largest key and how many keys equal to it are among the r largest: radix select, a byte at a time.
std::uint32_t kth_key(const float* score, i64 S, i64 r, i64& equal) {
  std::uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    i64 count[256] = {};
    for (i64 i = 0; i < S; ++i) {
      const std::uint32_t key = sort_key(score[i]);
      if (shift == 24 || (key ^ prefix) >> (shift + 8) == 0) ++count[key >> shift & 255];
    }
    int digit = 255;
    for (; r > count[digit]; --digit) r -= count[digit];
    prefix |= static_cast<std::uint32_t>(digit) << shift;
  }
  equal = r;
  return prefix;
}

void make_groups(const TokenMatchArgs& a, i64 b) {
  const i64 S = (a.N + 1) / 2;
  const float* score = a.score + b * S;
  const i32* partner = a.partner + b * S;
  i32* group = a.group + b * a.N;
  i64 equal = 0;
  const std::uint32_t least = a.r ? kth_key(score, S, a.r, equal) : 0xffffffffu;
  constexpr i32 kMerged = -1;
  i32 next = 0;
  for (i64 n = 0; n < a.N; ++n) {
    const std::uint32_t key = n % 2 == 0 && a.r ? sort_key(score[n / 2]) : 0;
    const bool merged = key > least || (key == least && equal-- > 0);
    group[n] = merged ? kMerged : next++;
  }
  for (i64 i = 0; i < S; ++i)
    if (group[2 * i] == kMerged) group[2 * i] = group[partner[i]];
}

}  // namespace

void token_match_cpu(const TokenMatchArgs& a) {
  if (a.B == 0 || a.N == 0) return;
  const bool screened = pick_screened(a);
  by_float_dtype("token_match", a.dtype, [&](auto type) {
    const Matcher<typename decltype(type)::type> matcher{a, lay_out(a, screened), (a.N + 1) / 2, a.N / 2};
    if (a.x_stride_c != 1) matcher.pack_all();
    if (screened) {
      matcher.match_screened();
    } else {
      matcher.match_directly();
    }
  });
  parallel_for(a.B, 1, a.threads, [&](i64 begin, i64 end, int) {
    for (i64 b = begin; b < end; ++b) make_groups(a, b);
  });
}

}  // namespace effvlm::EFFVLM_ISA
