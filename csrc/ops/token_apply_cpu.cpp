#include "core/check.h"
#include "core/dispatch.h"
#include "ops/token_apply.h"
#include "ops/token_merge_rows.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

void check_plan(const TokenApplyArgs& a) {
  i32 before = 0;
  for (i64 m = 0; m <= a.M; ++m) {
    const i32 at = a.start[m * a.start_stride];
    if (at < before || at > a.E || (m == 0 && at != 0) || (m == a.M && at != a.E))
      fail("token_apply: expected start to ascend from 0 to E = %lld, got %d at row %lld after %d", static_cast<long long>(a.E),
           at, static_cast<long long>(m), before);
    before = at;
  }
  for (i64 e = 0; e < a.E; ++e) {
    const i32 n = a.source[e * a.source_stride];
    if (n < 0 || n >= a.N)
      fail("token_apply: expected sources in 0 … %lld, got %d at entry %lld", static_cast<long long>(a.N - 1), n,
           static_cast<long long>(e));
  }
}

template <class T>
struct Row {
  T* out;
  i64 count;
  float divisor;
  bool copy;
  const T* x;
  i64 stride_n;
  const i32* sources;
  i64 source_stride;
  const float* weights;
  i64 weight_stride;

  const T* token(i64 k) const { return x + sources[k * source_stride] * stride_n; }
  float weight(i64 k) const { return weights ? weights[k * weight_stride] : 1.0f; }
};

template <class T>
Row<T> row_at(const TokenApplyArgs& a, i64 m) {
  const i64 first = a.start[m * a.start_stride], count = a.start[(m + 1) * a.start_stride] - first;
  Row<T> row{static_cast<T*>(a.out) + m * a.C,
             count,
             a.mean ? 0.0f : 1.0f,
             false,
             static_cast<const T*>(a.x),
             a.x_stride_n,
             a.source + first * a.source_stride,
             a.source_stride,
             a.weight ? a.weight + first * a.weight_stride : nullptr,
             a.weight_stride};
  row.copy = count == 1 && (a.mean || row.weight(0) == 1);
  if (a.mean)
    for (i64 k = 0; k < count; ++k) row.divisor += row.weight(k);
  return row;
}

}  // namespace

void token_apply_cpu(const TokenApplyArgs& a) {
  check_plan(a);
  by_float_dtype("token_apply", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    write_rows<T>(a.M, a.C, a.x_stride_c, a.threads, [&](i64 m) { return row_at<T>(a, m); });
  });
}

}  // namespace effvlm::EFFVLM_ISA
