#include "core/check.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/token_merge.h"
#include "ops/token_merge_rows.h"

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
struct Group {
  T* out;
  i64 count;
  float divisor;  // the weight of the group
  bool copy;
  const i32* members;
  const T* x;  // of this batch entry, as the weights
  i64 stride_n;
  const float* weights;
  i64 weight_stride;

  const T* token(i64 k) const { return x + members[k] * stride_n; }
  float weight(i64 k) const { return weights ? weights[members[k] * weight_stride] : 1.0f; }
};

template <class T>
Group<T> group_at(const TokenMergeArgs& a, i64 row) {
  const i64 b = row / a.M, m = row % a.M;
  const Runs runs = runs_of(a, b);
  const i32* members = runs.order + runs.start[m];
  const i64 count = runs.start[m + 1] - runs.start[m];
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride_b;
  const float* weights = a.weight ? a.weight + b * a.weight_stride_b : nullptr;
  Group<T> group{static_cast<T*>(a.out) + row * a.C, count, 0, count == 1, members, x, a.x_stride_n, weights, a.weight_stride_n};
  for (i64 k = 0; k < count; ++k) group.divisor += group.weight(k);
  a.out_weight[row] = group.divisor;
  return group;
}

}  // namespace

void token_merge_cpu(const TokenMergeArgs& a) {
  parallel_for(a.B, 1, a.threads, [&](i64 begin, i64 end, int) {
    for (i64 b = begin; b < end; ++b) find_runs(a, b);
  });
  by_float_dtype("token_merge", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    write_rows<T>(a.B * a.M, a.C, a.x_stride_c, a.threads, [&](i64 row) { return group_at<T>(a, row); });
  });
}

}  // namespace effvlm::EFFVLM_ISA
