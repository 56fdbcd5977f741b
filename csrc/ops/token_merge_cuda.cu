#include "core/dispatch.h"
#include "ops/token_merge.h"
#include "ops/token_merge_rows.cuh"

namespace effvlm {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr int kThreads = 256;

__device__ __forceinline__ i32* starts(const TokenMergeArgs& a, i64 b) { return static_cast<i32*>(a.workspace) + b * (a.M + 1); }
__device__ __forceinline__ i32* orders(const TokenMergeArgs& a, i64 b) {
  return static_cast<i32*>(a.workspace) + a.B * (a.M + 1) + b * a.N;
}

// Counting sort without atomics or scans: each thread counts, over all tokens of its batch entry, those that come before its own
// token (threads 0 … N−1: smaller group, or the same group and an earlier place) or before its group (threads N … N+M). N·(N+M)
// comparisons of ids in shared memory are some microseconds up to several thousand tokens, and the order is that of places.
__global__ void __launch_bounds__(kThreads) token_merge_runs_kernel(TokenMergeArgs a) {
  __shared__ i32 tile[kThreads];
  const i64 tasks = a.N + a.M + 1, blocks_per_entry = (tasks + kThreads - 1) / kThreads;
  for (i64 block = blockIdx.x; block < a.B * blocks_per_entry; block += gridDim.x) {
    const i64 b = block / blocks_per_entry, task = block % blocks_per_entry * kThreads + threadIdx.x;
    const i32* group = a.group + b * a.group_stride_b;
    const bool is_token = task < a.N;
    const i64 mine = is_token ? group[task * a.group_stride_n] : task - a.N;
    i32 before = 0;
    for (i64 first = 0; first < a.N; first += kThreads) {
      const int count = static_cast<int>(a.N - first < kThreads ? a.N - first : kThreads);
      if (threadIdx.x < count) tile[threadIdx.x] = group[(first + threadIdx.x) * a.group_stride_n];
      __syncthreads();  // the tile is complete
      for (int k = 0; k < count; ++k) {
        const i32 other = tile[k];
        before += other >= 0 && (other < mine || (is_token && other == mine && first + k < task));
      }
      __syncthreads();  // everyone is through with the tile before it is filled again
    }
    if (!is_token && mine <= a.M) starts(a, b)[mine] = before;
    if (is_token && mine >= 0 && mine < a.M) orders(a, b)[before] = static_cast<i32>(task);
  }
}

template <class T>
struct Group {
  std::int32_t count;
  float divisor;
  bool copy;
  const i32* members;
  const T* x;
  i64 stride_n;
  const float* weights;
  i64 weight_stride;

  __device__ __forceinline__ const T* token(i32 k) const { return x + members[k] * stride_n; }
  __device__ __forceinline__ float weight(i32 k) const { return weights ? weights[members[k] * weight_stride] : 1.0f; }
};

// Block ↔ one output row (b, m) at a time.
template <class T, int P>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) token_merge_rows_kernel(TokenMergeArgs a) {
  const unsigned M = static_cast<unsigned>(a.M);  // fits, since groups are int32; 64-bit divisions would spill
  unsigned m = blockIdx.x % M;
  for (i64 b = blockIdx.x / M; b < a.B; m += gridDim.x % M, b += gridDim.x / M + (m >= M), m -= m >= M ? M : 0) {
    const i64 row = b * M + m;
    const i32 *start = starts(a, b) + m, *members = orders(a, b) + start[0];
    Group<T> group{start[1] - start[0],
                   0,
                   false,
                   members,
                   static_cast<const T*>(a.x) + b * a.x_stride_b,
                   a.x_stride_n,
                   a.weight ? a.weight + b * a.weight_stride_b : nullptr,
                   a.weight_stride_n};
    for (i32 k = 0; k < group.count; ++k) group.divisor += group.weight(k);
    group.copy = group.count == 1 && group.divisor != 0;
    if (threadIdx.x == 0) a.out_weight[row] = group.divisor;
    write_row<P>(group, a.C, a.x_stride_c, static_cast<T*>(a.out) + row * a.C);
  }
}

template <class T>
void merge_rows(const TokenMergeArgs& a, void* stream) {
  by_pack<T>(a.C, a.x, a.x_stride_b, a.x_stride_n, a.x_stride_c, a.out, [&](auto pack, unsigned threads) {
    launch("token_merge_rows_kernel", token_merge_rows_kernel<T, decltype(pack)::value>, dim3(grid_for(a.B * a.M)), dim3(threads),
           stream, a);
  });
}

}  // namespace

void token_merge_cuda(const TokenMergeArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const i64 blocks = a.B * ((a.N + a.M + 1 + kThreads - 1) / kThreads);
  launch("token_merge_runs_kernel", token_merge_runs_kernel, dim3(grid_for(blocks)), dim3(kThreads), stream, a);
  base::by_float_dtype("token_merge", a.dtype, [&](auto type) { merge_rows<typename decltype(type)::type>(a, stream); });
}

}  // namespace effvlm
