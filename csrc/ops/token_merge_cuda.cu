#include "core/cuda/launch.cuh"
#include "core/dispatch.h"
#include "ops/token_merge.h"

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

__device__ __forceinline__ float weight_of(const TokenMergeArgs& a, i64 b, i64 n) {
  return a.weight ? a.weight[b * a.weight_stride_b + n * a.weight_stride_n] : 1.0f;
}

// Block ↔ one output row (b, m) at a time; thread ↔ every blockDim-th pack of P channels. P = 1 serves any stride and alignment.
template <class T, int P>
__global__ void __launch_bounds__(kThreads) token_merge_rows_kernel(TokenMergeArgs a) {
  const unsigned M = static_cast<unsigned>(a.M);  // fits, since groups are int32; 64-bit divisions would spill
  unsigned m = blockIdx.x % M;
  for (i64 b = blockIdx.x / M; b < a.B; m += gridDim.x % M, b += gridDim.x / M + (m >= M), m -= m >= M ? M : 0) {
    const i64 row = b * M + m;
    const i32 *member = orders(a, b) + starts(a, b)[m], *end = orders(a, b) + starts(a, b)[m + 1];
    const T* x = static_cast<const T*>(a.x) + b * a.x_stride_b;
    T* out = static_cast<T*>(a.out) + row * a.C;
    float total = 0;
    for (const i32* n = member; n < end; ++n) total += weight_of(a, b, *n);
    if (threadIdx.x == 0) a.out_weight[row] = total;
    const bool copy = end - member == 1 && total != 0;  // not w·x/w: bit for bit
    for (i64 c = static_cast<i64>(threadIdx.x) * P; c < a.C; c += static_cast<i64>(blockDim.x) * P) {
      float sum[P] = {};
      T first[P] = {};
      for (const i32* n = member; n < end; ++n) {
        const float w = weight_of(a, b, *n);
        if constexpr (P == 1) {
          first[0] = x[*n * a.x_stride_n + c * a.x_stride_c];
        } else {
          const Pack<T> pack = load_pack(x + *n * a.x_stride_n + c);
          for (int k = 0; k < P; ++k) first[k] = pack.element[k];
        }
        for (int k = 0; k < P; ++k) sum[k] += w * to_float(first[k]);
      }
      Pack<T> mean;
      for (int k = 0; k < P; ++k) mean.element[k] = copy ? first[k] : from_float<T>(total == 0 ? 0.0f : sum[k] / total);
      if constexpr (P == 1) {
        out[c] = mean.element[0];
      } else {
        store_pack(out + c, mean);
      }
    }
  }
}

template <class T>
bool packable(const TokenMergeArgs& a) {
  constexpr int P = Pack<T>::size;
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  return (a.x_stride_c == 1 || a.C == 1) && a.C % P == 0 && a.x_stride_n % P == 0 && a.x_stride_b % P == 0 && aligned(a.x) &&
         aligned(a.out);
}

template <class T>
void merge_rows(const TokenMergeArgs& a, void* stream) {
  const bool packs = packable<T>(a);
  const i64 lanes = packs ? a.C / Pack<T>::size : a.C;
  const unsigned threads = lanes >= kThreads ? kThreads : static_cast<unsigned>((lanes + kWarp - 1) / kWarp * kWarp);
  const dim3 grid(grid_for(a.B * a.M)), block(threads ? threads : kWarp);
  if (packs) {
    launch("token_merge_rows_kernel", token_merge_rows_kernel<T, Pack<T>::size>, grid, block, stream, a);
  } else {
    launch("token_merge_rows_kernel", token_merge_rows_kernel<T, 1>, grid, block, stream, a);
  }
}

}  // namespace

void token_merge_cuda(const TokenMergeArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const i64 blocks = a.B * ((a.N + a.M + 1 + kThreads - 1) / kThreads);
  launch("token_merge_runs_kernel", token_merge_runs_kernel, dim3(grid_for(blocks)), dim3(kThreads), stream, a);
  base::by_float_dtype("token_merge", a.dtype, [&](auto type) { merge_rows<typename decltype(type)::type>(a, stream); });
}

}  // namespace effvlm
