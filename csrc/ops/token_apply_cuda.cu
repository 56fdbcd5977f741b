#include "core/dispatch.h"
#include "ops/token_apply.h"
#include "ops/token_merge_rows.cuh"

namespace effvlm {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

template <class T>
struct Row {
  i32 count;
  float divisor;
  bool copy;
  const T* x;
  i64 N, stride_n;
  const i32* sources;
  i64 source_stride;
  const float* weights;
  i64 weight_stride;

  __device__ __forceinline__ const T* token(i32 k) const {
    const i64 n = sources[k * source_stride];
    return n >= 0 && n < N ? x + n * stride_n : nullptr;
  }
  __device__ __forceinline__ float weight(i32 k) const { return weights ? weights[k * weight_stride] : 1.0f; }
};

__device__ __forceinline__ i64 start_of(const TokenApplyArgs& a, i64 m) {
  const i64 at = a.start[m * a.start_stride];
  return at < 0 ? 0 : at < a.E ? at : a.E;
}

// Block ↔ one output row at a time.
template <class T, int P>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) token_apply_rows_kernel(TokenApplyArgs a) {
  for (i64 m = blockIdx.x; m < a.M; m += gridDim.x) {
    const i64 first = start_of(a, m);
    Row<T> row{static_cast<i32>(start_of(a, m + 1) - first),
               a.mean ? 0.0f : 1.0f,
               false,
               static_cast<const T*>(a.x),
               a.N,
               a.x_stride_n,
               a.source + first * a.source_stride,
               a.source_stride,
               a.weight ? a.weight + first * a.weight_stride : nullptr,
               a.weight_stride};
    if (a.mean)
      for (i32 k = 0; k < row.count; ++k) row.divisor += row.token(k) ? row.weight(k) : 0.0f;
    row.copy = row.count == 1 && row.token(0) && (a.mean ? row.divisor != 0 : row.weight(0) == 1);
    write_row<P>(row, a.C, a.x_stride_c, static_cast<T*>(a.out) + m * a.C);
  }
}

}  // namespace

void token_apply_cuda(const TokenApplyArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  base::by_float_dtype("token_apply", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    by_pack<T>(a.C, a.x, 0, a.x_stride_n, a.x_stride_c, a.out, [&](auto pack, unsigned threads) {
      launch("token_apply_rows_kernel", token_apply_rows_kernel<T, decltype(pack)::value>, dim3(grid_for(a.M)), dim3(threads),
             stream, a);
    });
  });
}

}  // namespace effvlm
