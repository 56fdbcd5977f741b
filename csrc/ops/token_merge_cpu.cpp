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
void merge_row(const TokenMergeArgs& a, i64 b, i64 m) {
  const Runs runs = runs_of(a, b);
  const i32 *member = runs.order + runs.start[m], *end = runs.order + runs.start[m + 1];
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride_b;
  T* out = static_cast<T*>(a.out) + (b * a.M + m) * a.C;
  const auto weight = [&](i32 n) { return a.weight ? a.weight[b * a.weight_stride_b + n * a.weight_stride_n] : 1.0f; };

  float total = 0;
  for (const i32* n = member; n < end; ++n) total += weight(*n);
  a.out_weight[b * a.M + m] = total;
  if (total == 0) {
    std::memset(static_cast<void*>(out), 0, a.C * sizeof(T));
  } else if (a.x_stride_c != 1) {
    for (i64 c = 0; c < a.C; ++c) {
      float sum = 0;
      for (const i32* n = member; n < end; ++n) sum += weight(*n) * to_f32(x[*n * a.x_stride_n + c * a.x_stride_c]);
      if (end - member == 1) {
        out[c] = x[*member * a.x_stride_n + c * a.x_stride_c];
      } else {
        from_f32(sum / total, out[c]);
      }
    }
  } else if (end - member == 1) {  // a copy, not w·x/w: bit for bit
    std::memcpy(static_cast<void*>(out), x + *member * a.x_stride_n, a.C * sizeof(T));
  } else {
    const auto sum = [&](i64 c, auto load_lanes) {
      f32v s = set1(0);
      for (const i32* n = member; n < end; ++n) s = fma(set1(weight(*n)), load_lanes(x + *n * a.x_stride_n + c), s);
      return s / set1(total);
    };
    for_lanes(
        a.C, [&](i64 c) { store(out + c, sum(c, [](const T* p) { return load(p); })); },
        [&](i64 c, int rest) { store(out + c, sum(c, [rest](const T* p) { return load(p, rest); }), rest); });
  }
}

}  // namespace

void token_merge_cpu(const TokenMergeArgs& a) {
  parallel_for(a.B, 1, a.threads, [&](i64 begin, i64 end, int) {
    for (i64 b = begin; b < end; ++b) find_runs(a, b);
  });
  const i64 row_bytes = a.C * 8, grain = 1 + 32768 / (row_bytes + 64);  // some 32 KiB of rows are worth a thread
  by_float_dtype("token_merge", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_for(a.B * a.M, grain, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 row = begin; row < end; ++row) merge_row<T>(a, row / a.M, row % a.M);
    });
  });
}

}  // namespace effvlm::EFFVLM_ISA
