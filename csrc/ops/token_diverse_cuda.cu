#include "core/cuda/launch.cuh"
#include "core/cuda/pairs16.cuh"
#include "core/dispatch.h"
#include "ops/token_diverse.h"

namespace effvlm {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr int kTile = kPairRows;  // tokens on both sides of a tile of cosines
constexpr int kDepth = 16;        // channels staged at a time
constexpr int kThreads = 256;     // 16 × 16 threads with 4 × 4 pairs each; in 16-bit types 4 × 2 warps with 16 × 32 pairs
constexpr int kPickThreads = 512;

// Workspace, all f32: 1/‖x‖ (B,N), 0 for zeros and what is not finite; cosines (B,N,N); value (B,N); DPP: δ (B,N), c (B,k,N).
struct Work : Workspace {
  i64 inverse_norm, cosine, value, delta, c;
  __host__ __device__ explicit Work(const TokenDiverseArgs& a) {
    const i64 tokens = 4 * a.B * a.N;
    inverse_norm = take(tokens), cosine = take(tokens * a.N), value = take(tokens);
    delta = take(a.dpp ? tokens : 0), c = take(a.dpp ? tokens * a.k : 0);
  }
};

__device__ __forceinline__ float* part(const TokenDiverseArgs& a, i64 offset) {
  return reinterpret_cast<float*>(static_cast<char*>(a.workspace) + offset);
}

template <class T>
__device__ __forceinline__ const T* token(const TokenDiverseArgs& a, i64 b, i64 n) {
  return static_cast<const T*>(a.x) + b * a.x_stride_b + n * a.x_stride_n;
}

// Warp ↔ token.
template <class T>
__global__ void __launch_bounds__(kThreads) token_diverse_norms_kernel(TokenDiverseArgs a) {
  const int lane = threadIdx.x % kWarp, warps = kThreads / kWarp;
  for (i64 t = static_cast<i64>(blockIdx.x) * warps + threadIdx.x / kWarp; t < a.B * a.N;
       t += static_cast<i64>(gridDim.x) * warps) {
    const T* x = token<T>(a, t / a.N, t % a.N);
    float square = 0;
    for (i64 c = lane; c < a.C; c += kWarp) {
      const float value = to_float(x[c * a.x_stride_c]);
      square += value * value;
    }
    square = warp_sum(square);
    if (lane == 0) part(a, Work(a).inverse_norm)[t] = square > 0 && square <= 3.4028235e38f ? 1 / sqrtf(square) : 0.0f;
  }
}

// Writes the cosine of a pair, and, off the diagonal of tiles, of the pair the other way round.
__device__ __forceinline__ void put(const TokenDiverseArgs& a, i64 b, i64 i, i64 j, float dot, bool mirror) {
  if (i >= a.N || j >= a.N) return;
  const float *inverse = part(a, Work(a).inverse_norm) + b * a.N, p = inverse[i], q = inverse[j];
  const float cosine = p == 0 || q == 0 ? 0.0f : p > q ? dot * p * q : dot * q * p;
  float* to = part(a, Work(a).cosine) + b * a.N * a.N;
  to[i * a.N + j] = cosine;
  if (mirror) to[j * a.N + i] = cosine;
}

// kDepth channels of every token of a tile, transposed: stage[channel][token]. Zeros outside the tensor.
template <class T>
__device__ __forceinline__ void stage_tile(const TokenDiverseArgs& a, i64 b, i64 first, i64 c0, float (*stage)[kTile + 4]) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;  // 4 threads per token, 4 neighbouring channels each
  const i64 index = first + row;
  const T* x = token<T>(a, b, index < a.N ? index : 0);
  for (int k = 0; k < 4; ++k) {
    const i64 c = c0 + column + k;
    stage[column + k][row] = index < a.N && c < a.C ? to_float(x[c * a.x_stride_c]) : 0.0f;
  }
}

// Block (x, y) ↔ the tile of cosines in column x and row y, on or above the diagonal.
template <class T>
__global__ void __launch_bounds__(kThreads) token_diverse_cosines_kernel(TokenDiverseArgs a) {
  __shared__ float left[kDepth][kTile + 4], right[kDepth][kTile + 4];  // + 4: columns of different rows, different banks
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const i64 i0 = static_cast<i64>(blockIdx.y) * kTile, j0 = static_cast<i64>(blockIdx.x) * kTile;
  if (j0 < i0) return;
  for (i64 b = blockIdx.z; b < a.B; b += gridDim.z) {
    float sum[4][4] = {};
    for (i64 c0 = 0; c0 < a.C; c0 += kDepth) {
      stage_tile<T>(a, b, i0, c0, left);
      stage_tile<T>(a, b, j0, c0, right);
      __syncthreads();  // both tiles are staged
      for (int c = 0; c < kDepth; ++c)
        for (int i = 0; i < 4; ++i)
          for (int j = 0; j < 4; ++j) sum[i][j] += left[c][4 * ty + i] * right[c][4 * tx + j];
      __syncthreads();  // everyone is through with them
    }
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) put(a, b, i0 + 4 * ty + i, j0 + 4 * tx + j, sum[i][j], i0 != j0);
  }
}

// ---- 16-bit types: tensor cores ----

template <class T>
__device__ __forceinline__ PairRow<T> pair_row_of(const TokenDiverseArgs& a, i64 b, i64 first) {
  const i64 n = first + threadIdx.x / 4;
  return {token<T>(a, b, n < a.N ? n : 0), n < a.N ? a.C : 0, a.x_stride_c};
}

// Block ↔ the same work as above.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) token_diverse_cosines16_kernel(TokenDiverseArgs a, bool packs) {
  __shared__ PairStage<T> left, right;
  const i64 i0 = static_cast<i64>(blockIdx.y) * kTile, j0 = static_cast<i64>(blockIdx.x) * kTile;
  if (j0 < i0) return;
  for (i64 b = blockIdx.z; b < a.B; b += gridDim.z) {
    float sum[4][4] = {};
    multiply_pairs(sum, pair_row_of<T>(a, b, i0), pair_row_of<T>(a, b, j0), a.C, packs, left, right);
    for (int j = 0; j < 4; ++j)
      for (int k = 0; k < 4; ++k) put(a, b, i0 + pair_row(k), j0 + pair_other(j, k), sum[j][k], i0 != j0);
  }
}

// ---- picking ----

struct Best {
  float value;
  i32 token;  // −1: none
};

// A higher value wins; of equal values, the lower token.
__device__ __forceinline__ Best better(Best x, Best y) {
  if (y.token < 0) return x;
  if (x.token < 0 || y.value > x.value || (y.value == x.value && y.token < x.token)) return y;
  return x;
}

// The best of all threads, to all threads. What they wrote before is visible after it.
__device__ __forceinline__ Best block_best(Best mine, Best* scratch) {
  for (int lanes = kWarp / 2; lanes; lanes /= 2)
    mine = better(mine, Best{shuffle_xor(mine.value, lanes), shuffle_xor(mine.token, lanes)});
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = mine;
  __syncthreads();  // every warp's best is in scratch
  Best best{0, -1};
  for (int warp = 0; warp < kPickThreads / kWarp; ++warp) best = better(best, scratch[warp]);
  __syncthreads();  // everyone has read scratch before it is used again
  return best;
}

// Block ↔ batch entry, thread ↔ every kPickThreads-th token.
__global__ void __launch_bounds__(kPickThreads) token_diverse_max_min_kernel(TokenDiverseArgs a) {
  __shared__ Best scratch[kPickThreads / kWarp];
  for (i64 b = blockIdx.x; b < a.B; b += gridDim.x) {
    const float* cosine = part(a, Work(a).cosine) + b * a.N * a.N;
    float* nearest = part(a, Work(a).value) + b * a.N;  // cosine with the nearest one picked; +inf for those picked
    Best best{0, -1};
    for (i64 i = threadIdx.x; i < a.N; i += kPickThreads) {
      float most = -INFINITY;
      for (i64 j = 0; j < a.N; ++j) {
        const float other = cosine[j * a.N + i];
        if (j != i && other > most) most = other;
      }
      best = better(best, Best{-most, static_cast<i32>(i)});
      nearest[i] = -INFINITY;
    }
    for (i64 t = 0; t < a.k; ++t) {
      const i64 pick = block_best(best, scratch).token;
      if (threadIdx.x == 0) a.out[b * a.k + t] = static_cast<i32>(pick);
      best = Best{0, -1};
      for (i64 i = threadIdx.x; i < a.N; i += kPickThreads) {
        const float last = cosine[pick * a.N + i], near = i == pick ? INFINITY : last > nearest[i] ? last : nearest[i];
        nearest[i] = near;
        if (near < INFINITY) best = better(best, Best{-near, static_cast<i32>(i)});
      }
    }
  }
}

__device__ __forceinline__ float relevance_of(const TokenDiverseArgs& a, i64 b, i64 n) {
  const float r = a.relevance ? a.relevance[b * a.relevance_stride_b + n * a.relevance_stride_n] : 1.0f;
  return r >= 0 && r <= 1e18f ? r : 0.0f;
}

// The same for DPP. `value` of what is picked is −1; once nothing is gained any more, values are the relevance.
__global__ void __launch_bounds__(kPickThreads) token_diverse_dpp_kernel(TokenDiverseArgs a) {
  __shared__ Best scratch[kPickThreads / kWarp];
  for (i64 b = blockIdx.x; b < a.B; b += gridDim.x) {
    const Work work(a);
    const float *cosine = part(a, work.cosine) + b * a.N * a.N, *inverse = part(a, work.inverse_norm) + b * a.N;
    float *value = part(a, work.value) + b * a.N, *delta = part(a, work.delta) + b * a.N, *c = part(a, work.c) + b * a.k * a.N;
    Best best{0, -1};
    for (i64 i = threadIdx.x; i < a.N; i += kPickThreads) {
      const float r = relevance_of(a, b, i);
      delta[i] = inverse[i] > 0 ? 1.0f : 0.0f, value[i] = r * r * delta[i];
      best = better(best, Best{value[i], static_cast<i32>(i)});
    }
    bool spent = false;
    for (i64 t = 0; t < a.k; ++t) {
      Best top = block_best(best, scratch);
      if (!spent && top.value <= 0) {
        spent = true, best = Best{0, -1};
        for (i64 i = threadIdx.x; i < a.N; i += kPickThreads)
          if (value[i] >= 0) value[i] = relevance_of(a, b, i), best = better(best, Best{value[i], static_cast<i32>(i)});
        top = block_best(best, scratch);
      }
      const i64 pick = top.token;
      const float root = spent ? 1.0f : sqrtf(delta[pick]);
      __syncthreads();  // everyone has read δ of the pick
      if (threadIdx.x == 0) a.out[b * a.k + t] = static_cast<i32>(pick);
      best = Best{0, -1};
      for (i64 i = threadIdx.x; i < a.N; i += kPickThreads) {
        if (i == pick) value[i] = -1;
        if (!spent) {
          float sum = 0;
          for (i64 v = 0; v < t; ++v) sum += c[v * a.N + pick] * c[v * a.N + i];
          const float e = (cosine[pick * a.N + i] - sum) / root, r = relevance_of(a, b, i), left = delta[i] - e * e;
          c[t * a.N + i] = e, delta[i] = left;
          if (value[i] >= 0) value[i] = left > kDiverseSpent ? r * r * left : 0.0f;
        }
        if (value[i] >= 0) best = better(best, Best{value[i], static_cast<i32>(i)});
      }
    }
  }
}

}  // namespace

i64 token_diverse_workspace_cuda(const TokenDiverseArgs& a) { return Work(a).bytes; }

void token_diverse_cuda(const TokenDiverseArgs& a, int device, void* stream) {
  if (a.B == 0 || a.N == 0 || a.k == 0) return;
  const DeviceGuard guard(device);
  const i64 tiles = (a.N + kTile - 1) / kTile, warps = kThreads / kWarp;
  base::by_float_dtype("token_diverse", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("token_diverse_norms_kernel", token_diverse_norms_kernel<T>, dim3(grid_for((a.B * a.N + warps - 1) / warps)),
           dim3(kThreads), stream, a);
    const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(tiles), static_cast<unsigned>(a.B < 65535 ? a.B : 65535));
    if constexpr (sizeof(T) == 2) {
      const bool packs = pair_packs(a.x, a.x_stride_b, a.x_stride_n, a.x_stride_c);
      launch("token_diverse_cosines16_kernel", token_diverse_cosines16_kernel<T>, grid, dim3(kThreads), stream, a, packs);
    } else {
      launch("token_diverse_cosines_kernel", token_diverse_cosines_kernel<T>, grid, dim3(kThreads), stream, a);
    }
  });
  if (a.dpp) {
    launch("token_diverse_dpp_kernel", token_diverse_dpp_kernel, dim3(grid_for(a.B)), dim3(kPickThreads), stream, a);
  } else {
    launch("token_diverse_max_min_kernel", token_diverse_max_min_kernel, dim3(grid_for(a.B)), dim3(kPickThreads), stream, a);
  }
}

}  // namespace effvlm
