#include "core/check.h"
#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "core/dispatch.h"
#include "ops/token_merge.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

// One batch entry's groups as runs: the members of group m are order[start[m] … start[m+1]), by ascending position.
struct Runs {
  i32* start;  // (M+1)
  i32* order;  // (N)
};

Runs runs_of(const TokenMergeArgs& a, i64 b) {
  i32* starts = static_cast<i32*>(a.workspace);
  return {starts + b * (a.M + 1), starts + a.B * (a.M + 1) + b * a.N};
}

// Counting sort. `start` is filled one place ahead, so that after the scatter start[m] has advanced to its own final value.
void find_runs(const TokenMergeArgs& a, i64 b) {
  const Runs runs = runs_of(a, b);
  const i32* group = a.group + b * a.group_stride_b;
  for (i64 m = 0; m <= a.M; ++m) runs.start[m] = 0;
  for (i64 n = 0; n < a.N; ++n) {
    const i32 m = group[n * a.group_stride_n];
    if (m < -1 || m >= a.M)
      fail("token_merge: expected group ids in -1 … %lld, got %d at batch %lld, token %lld", static_cast<long long>(a.M - 1), m,
           static_cast<long long>(b), static_cast<long long>(n));
    if (m >= 0) ++runs.start[m];
  }
  i32 sum = 0;
  for (i64 m = 0; m <= a.M; ++m) {
    const i32 size = runs.start[m];
    runs.start[m] = sum;
    sum += size;
  }
  for (i64 n = 0; n < a.N; ++n) {
    const i32 m = group[n * a.group_stride_n];
    if (m >= 0) runs.order[runs.start[m]++] = static_cast<i32>(n);
  }
  for (i64 m = a.M; m > 0; --m) runs.start[m] = runs.start[m - 1];
  runs.start[0] = 0;
}

template <class T>
struct Merger {
  const TokenMergeArgs& a;

  float weight(i64 b, i32 n) const { return a.weight ? a.weight[b * a.weight_stride_b + n * a.weight_stride_n] : 1.0f; }
  const T* token(i64 b, i32 n) const { return static_cast<const T*>(a.x) + b * a.x_stride_b + n * a.x_stride_n; }
  T* out(i64 row) const { return static_cast<T*>(a.out) + row * a.C; }

  struct Members {
    const i32 *begin, *end;
    float total;  // of the weights
  };

  Members members(i64 b, i64 m) const {
    const Runs runs = runs_of(a, b);
    Members group{runs.order + runs.start[m], runs.order + runs.start[m + 1], 0};
    for (const i32* n = group.begin; n < group.end; ++n) group.total += weight(b, *n);
    return group;
  }

  // Rows with contiguous channels: a vector of channels at a time, over all members.
  void merge_row(i64 b, i64 m) const {
    const Members group = members(b, m);
    T* to = out(b * a.M + m);
    a.out_weight[b * a.M + m] = group.total;
    if (group.total == 0) {
      std::memset(static_cast<void*>(to), 0, a.C * sizeof(T));
    } else if (group.end - group.begin == 1) {  // a copy, not w·x/w: bit for bit
      std::memcpy(static_cast<void*>(to), token(b, *group.begin), a.C * sizeof(T));
    } else {
      const auto mean = [&](i64 c, auto load_lanes) {
        f32v sum = set1(0);
        for (const i32* n = group.begin; n < group.end; ++n) sum = fma(set1(weight(b, *n)), load_lanes(token(b, *n) + c), sum);
        return sum / set1(group.total);
      };
      for_lanes(
          a.C, [&](i64 c) { store(to + c, mean(c, [](const T* p) { return load(p); })); },
          [&](i64 c, int rest) { store(to + c, mean(c, [rest](const T* p) { return load(p, rest); }), rest); });
    }
  }

  // Any stride of channels: channels outside, rows inside, so that where tokens are contiguous their lines are shared.
  void merge_rows_strided(i64 b, i64 first, i64 count) const {
    Members group[kRows];
    for (i64 k = 0; k < count; ++k) {
      group[k] = members(b, first + k);
      a.out_weight[b * a.M + first + k] = group[k].total;
    }
    for (i64 c = 0; c < a.C; ++c)
      for (i64 k = 0; k < count; ++k) {
        T& to = out(b * a.M + first + k)[c];
        if (group[k].total == 0) {
          to = T{};
        } else if (group[k].end - group[k].begin == 1) {
          to = token(b, *group[k].begin)[c * a.x_stride_c];
        } else {
          float sum = 0;
          for (const i32* n = group[k].begin; n < group[k].end; ++n)
            sum += weight(b, *n) * to_f32(token(b, *n)[c * a.x_stride_c]);
          from_f32(sum / group[k].total, to);
        }
      }
  }

  static constexpr i64 kRows = 8;  // output rows a task takes; so many streams of writes fit the ways of a first-level cache

  void merge_all() const {
    const i64 tasks = (a.M + kRows - 1) / kRows, grain = 1 + 32768 / (kRows * (a.C + 16) * 8);  // 32 KiB are worth a thread
    parallel_for(a.B * tasks, grain, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 t = begin; t < end; ++t) {
        const i64 b = t / tasks, first = t % tasks * kRows, count = a.M - first < kRows ? a.M - first : kRows;
        if (a.x_stride_c != 1) {
          merge_rows_strided(b, first, count);
        } else {
          for (i64 m = first; m < first + count; ++m) merge_row(b, m);
        }
      }
    });
  }
};

}  // namespace

void token_merge_cpu(const TokenMergeArgs& a) {
  parallel_for(a.B, 1, a.threads, [&](i64 begin, i64 end, int) {
    for (i64 b = begin; b < end; ++b) find_runs(a, b);
  });
  by_float_dtype("token_merge", a.dtype, [&](auto type) { Merger<typename decltype(type)::type>{a}.merge_all(); });
}

}  // namespace effvlm::EFFVLM_ISA
