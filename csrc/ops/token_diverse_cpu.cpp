#include "core/check.h"
#include "core/cpu/dot.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/token_diverse.h"
#include "ops/token_diverse_greedy.h"

namespace effvlm::EFFVLM_ISA {
namespace {

template <class T>
struct Diverse {
  const TokenDiverseArgs& a;
  TokenDiverseLayout layout{a};

  template <class P>
  P* at(i64 offset, i64 index = 0) const {
    return reinterpret_cast<P*>(static_cast<char*>(a.workspace) + offset) + index;
  }

  const T* token(i64 b, i64 n) const {
    if (a.x_stride_c != 1) return at<T>(layout.packed, (b * a.N + n) * a.C);
    return static_cast<const T*>(a.x) + b * a.x_stride_b + n * a.x_stride_n;
  }

  // Contiguous channels, 8 neighbouring tokens together: when tokens are what is contiguous, lines are read whole.
  void pack_all() const {
    constexpr i64 kGroup = 8;
    const i64 groups = (a.N + kGroup - 1) / kGroup;
    parallel_for(a.B * groups, 1, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 t = begin; t < end; ++t) {
        const i64 b = t / groups, first = t % groups * kGroup, count = a.N - first < kGroup ? a.N - first : kGroup;
        const T* from = static_cast<const T*>(a.x) + b * a.x_stride_b + first * a.x_stride_n;
        T* to = at<T>(layout.packed, (b * a.N + first) * a.C);
        for (i64 c = 0; c < a.C; ++c)
          for (i64 n = 0; n < count; ++n) to[n * a.C + c] = from[n * a.x_stride_n + c * a.x_stride_c];
      }
    });
  }

  void measure_all() const {
    i64* bad = at<i64>(layout.bad);
    for (int t = 0; t < a.threads; ++t) bad[t] = -1;
    parallel_for(a.B * a.N, 1 + 8192 / (a.C + 1), a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 t = begin; t < end; ++t) {
        const T* x = token(t / a.N, t % a.N);
        float square;
        dots<T, 1, 1, 4>(&x, &x, a.C, &square);
        *at<float>(layout.inverse_norm, t) = square > 0 ? 1 / std::sqrt(square) : 0.0f;
        if (!(square <= 3.4028235e38f)) bad[thread] = bad[thread] < 0 || t < bad[thread] ? t : bad[thread];
      }
    });
    i64 first = -1;
    for (int t = 0; t < a.threads; ++t)
      if (bad[t] >= 0 && (first < 0 || bad[t] < first)) first = bad[t];
    if (first >= 0)
      fail("token_diverse: expected finite tokens, got NaN, Inf or a squared norm beyond float32 at batch %lld, token %lld",
           static_cast<long long>(first / a.N), static_cast<long long>(first % a.N));
  }

  void check_relevance() const {
    for (i64 b = 0; a.relevance && b < a.B; ++b)
      for (i64 n = 0; n < a.N; ++n) {
        const float r = a.relevance[b * a.relevance_stride_b + n * a.relevance_stride_n];
        if (!(r >= 0 && r <= 1e18f))
          fail("token_diverse: expected relevance in 0 … 1e18, got %g at batch %lld, token %lld", static_cast<double>(r),
               static_cast<long long>(b), static_cast<long long>(n));
      }
  }

  void pick(i64 b, i64 slot, int threads) const {
    const i64 tokens = slot * a.N;
    Greedy<T> greedy{};
    greedy.N = a.N, greedy.C = a.C, greedy.k = a.k, greedy.pitch = layout.pitch, greedy.dpp = a.dpp, greedy.threads = threads;
    greedy.x = token(b, 0), greedy.stride = a.x_stride_c == 1 ? a.x_stride_n : a.C;
    greedy.inverse_norm = at<float>(layout.inverse_norm, b * a.N), greedy.picks = a.out + b * a.k;
    greedy.value = at<float>(layout.value, tokens), greedy.seen = at<i32>(layout.seen, tokens);
    greedy.list = at<i32>(layout.list, 4 * tokens), greedy.columns = greedy.list + 2 * a.N, greedy.places = greedy.list + 3 * a.N;
    greedy.sort = at<i32>(layout.sort, tokens + 2 * slot);
    greedy.weight = at<float>(layout.weight, tokens), greedy.delta = at<float>(layout.delta, tokens);
    greedy.root = at<float>(layout.root, slot * a.k), greedy.c = at<float>(layout.c, tokens * layout.pitch);
    greedy.relevances = a.relevance ? a.relevance + b * a.relevance_stride_b : nullptr;
    greedy.relevance_stride = a.relevance_stride_n;
    greedy.run();
  }

  void run() const {
    if (a.x_stride_c != 1) pack_all();
    measure_all();
    check_relevance();
    if (a.k == 0) return;
    if (layout.slots > 1) {
      parallel_for(a.B, 1, a.threads, [&](i64 begin, i64 end, int thread) {
        for (i64 b = begin; b < end; ++b) pick(b, thread, 1);
      });
    } else {
      for (i64 b = 0; b < a.B; ++b) pick(b, 0, a.threads);
    }
  }
};

}  // namespace

void token_diverse_cpu(const TokenDiverseArgs& a) {
  if (a.B == 0 || a.N == 0) return;
  by_float_dtype("token_diverse", a.dtype, [&](auto type) { Diverse<typename decltype(type)::type>{a}.run(); });
}

}  // namespace effvlm::EFFVLM_ISA
