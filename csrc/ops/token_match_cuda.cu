#include "core/cuda/launch.cuh"
#include "core/cuda/pairs16.cuh"
#include "core/dispatch.h"
#include "ops/token_match.h"
#include "ops/token_select_cut.h"
#include "ops/token_select_radix.cuh"

namespace effvlm {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr int kTile = kPairRows;  // sources and destinations of a tile
constexpr int kDepth = 16;        // channels staged at a time
constexpr int kThreads = 256;     // 16 × 16 threads with 4 × 4 pairs each; in 16-bit types 4 × 2 warps with 16 × 32 pairs
constexpr int kSelectThreads = 512;
constexpr int kMaxSplits = 32;

struct Best {  // of one source among some destinations
  float score;
  i32 destination;
};

// Workspace: inverse norms (B,N); the best of every part of the destinations (splits,B,W); with roles the positions of an entry's
// sources, ascending, (B,N), of its destinations, (B,N), and how many of each there are, (B,2).
struct Work : Workspace {
  i64 width, inverse_norm, best, sources, destinations, count;
  __host__ __device__ explicit Work(const TokenMatchArgs& a) : width(a.role ? a.N : (a.N + 1) / 2) {
    const i64 tokens = 4 * a.B * a.N, listed = a.role ? tokens : 0;
    inverse_norm = take(tokens), best = take(static_cast<i64>(sizeof(Best)) * kMaxSplits * a.B * width);
    sources = take(listed), destinations = take(listed), count = take(a.role ? 8 * a.B : 0);
  }
};

template <class P>
__device__ __forceinline__ P* part(const TokenMatchArgs& a, i64 offset) {
  return reinterpret_cast<P*>(static_cast<char*>(a.workspace) + offset);
}

// Sources (parity 0) or destinations (1) of a batch entry, in ascending order.
struct Side {
  i64 count, parity;
  const i32* list;  // null: positions 2·index + parity

  __device__ __forceinline__ Side(const TokenMatchArgs& a, i64 b, int parity)
      : count((a.N + 1 - parity) / 2), parity(parity), list(nullptr) {
    if (!a.role) return;
    const Work work(a);
    count = part<i32>(a, work.count)[2 * b + parity];
    list = part<i32>(a, parity ? work.destinations : work.sources) + b * a.N;
  }
  __device__ __forceinline__ i64 position(i64 index) const { return list ? list[index] : 2 * index + parity; }
};

template <class T>
__device__ __forceinline__ const T* token(const TokenMatchArgs& a, i64 b, i64 n) {
  return static_cast<const T*>(a.x) + b * a.x_stride_b + n * a.x_stride_n;
}

// A higher score wins; of equal scores, the lower destination. −1 stands for none, and loses.
__device__ __forceinline__ Best better(Best x, Best y) {
  if (y.destination < 0) return x;
  if (x.destination < 0 || y.score > x.score || (y.score == x.score && y.destination < x.destination)) return y;
  return x;
}

__device__ __forceinline__ Best offer(Best best, float dot, const float* inverse_norm, i64 source, i64 destination) {
  float score = dot * inverse_norm[destination] * inverse_norm[source] + 0.0f;  // + 0: no −0
  if (!(score == score)) score = -INFINITY;
  return better(best, Best{score, static_cast<i32>(destination)});
}

// Of the source at a position: at its place among scores and partners.
__device__ __forceinline__ void put_best(const TokenMatchArgs& a, i64 split, i64 b, i64 position, Best best) {
  const Work work(a);
  part<Best>(a, work.best)[(split * a.B + b) * work.width + (a.role ? position : position / 2)] = best;
}

// Warp ↔ token.
template <class T>
__global__ void __launch_bounds__(kThreads) token_match_norms_kernel(TokenMatchArgs a) {
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
    if (lane == 0) part<float>(a, Work(a).inverse_norm)[t] = !a.cosine ? 1.0f : square > 0 ? 1 / sqrtf(square) : 0.0f;
  }
}

// One row of kDepth channels of every token of a tile, transposed: stage[channel][token]. Zeros outside the tensor.
template <class T>
__device__ __forceinline__ void stage_tile(const TokenMatchArgs& a, i64 b, const Side& side, i64 first, i64 c0,
                                           float (*stage)[kTile + 4]) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;  // 4 threads per token, 4 neighbouring channels each
  const i64 index = first + row;
  const T* x = token<T>(a, b, side.position(index < side.count ? index : 0));
  for (int k = 0; k < 4; ++k) {
    const i64 c = c0 + column + k;
    stage[column + k][row] = index < side.count && c < a.C ? to_float(x[c * a.x_stride_c]) : 0.0f;
  }
}

// Block ↔ 64 sources × one part of the destinations, 64 at a time; thread (ty, tx) ↔ sources 4·ty …, destinations 4·tx …; each
// keeps the best of its four sources in registers, and the 16 threads of a row settle it by shuffles at the end.
template <class T>
__global__ void __launch_bounds__(kThreads) token_match_scores_kernel(TokenMatchArgs a, i64 source_tiles, int splits) {
  __shared__ float sources[kDepth][kTile + 4],
      destinations[kDepth][kTile + 4];  // + 4: columns of different rows, different banks
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  for (i64 task = blockIdx.x; task < a.B * source_tiles * splits; task += gridDim.x) {
    const i64 split = task % splits, b = task / splits / source_tiles, i0 = task / splits % source_tiles * kTile;
    const Side source(a, b, 0), destination(a, b, 1);
    if (i0 >= source.count) continue;  // fewer sources than there could be
    const i64 tiles = (destination.count + kTile - 1) / kTile;
    const float* inverse = part<float>(a, Work(a).inverse_norm) + b * a.N;
    Best best[4] = {{0, -1}, {0, -1}, {0, -1}, {0, -1}};
    for (i64 tile = tiles * split / splits; tile < tiles * (split + 1) / splits; ++tile) {
      const i64 j0 = tile * kTile;
      float sum[4][4] = {};
      for (i64 c0 = 0; c0 < a.C; c0 += kDepth) {
        stage_tile<T>(a, b, source, i0, c0, sources);
        stage_tile<T>(a, b, destination, j0, c0, destinations);
        __syncthreads();  // both tiles are staged
        for (int c = 0; c < kDepth; ++c)
          for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) sum[i][j] += sources[c][4 * ty + i] * destinations[c][4 * tx + j];
        __syncthreads();  // everyone is through with them
      }
#pragma unroll  // or the sums would leave their registers to be indexed
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const i64 p = i0 + 4 * ty + i, q = j0 + 4 * tx + j;
          if (p < source.count && q < destination.count)
            best[i] = offer(best[i], sum[i][j], inverse, source.position(p), destination.position(q));
        }
    }
    for (int i = 0; i < 4; ++i) {
      for (int lanes = 8; lanes; lanes /= 2)
        best[i] = better(best[i], Best{shuffle_xor(best[i].score, lanes), shuffle_xor(best[i].destination, lanes)});
      const i64 p = i0 + 4 * ty + i;
      if (tx == 0 && p < source.count) put_best(a, split, b, source.position(p), best[i]);
    }
  }
}

// ---- 16-bit types: tensor cores ----

template <class T>
__device__ __forceinline__ PairRow<T> pair_row_of(const TokenMatchArgs& a, i64 b, const Side& side, i64 first) {
  const i64 index = first + threadIdx.x / 4;
  const bool there = index < side.count;
  return {token<T>(a, b, there ? side.position(index) : 0), there ? a.C : 0, a.x_stride_c};
}

// Block ↔ the same work as above.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    token_match_scores16_kernel(TokenMatchArgs a, i64 source_tiles, int splits, bool packs) {
  __shared__ PairStage<T> sources, destinations;
  __shared__ Best partial[kTile][2];
  for (i64 task = blockIdx.x; task < a.B * source_tiles * splits; task += gridDim.x) {
    const i64 split = task % splits, b = task / splits / source_tiles, i0 = task / splits % source_tiles * kTile;
    const Side source(a, b, 0), destination(a, b, 1);
    if (i0 >= source.count) continue;  // fewer sources than there could be
    const i64 tiles = (destination.count + kTile - 1) / kTile;
    const float* inverse = part<float>(a, Work(a).inverse_norm) + b * a.N;
    const PairRow<T> row = pair_row_of<T>(a, b, source, i0);
    Best best[2] = {{0, -1}, {0, -1}};
    for (i64 tile = tiles * split / splits; tile < tiles * (split + 1) / splits; ++tile) {
      const i64 j0 = tile * kTile;
      float sum[4][4] = {};
      multiply_pairs(sum, row, pair_row_of<T>(a, b, destination, j0), a.C, packs, sources, destinations);
      for (int j = 0; j < 4; ++j)
        for (int k = 0; k < 4; ++k) {
          const i64 p = i0 + pair_row(k), q = j0 + pair_other(j, k);
          if (p < source.count && q < destination.count)
            best[k / 2] = offer(best[k / 2], sum[j][k], inverse, source.position(p), destination.position(q));
        }
    }
    for (int k = 0; k < 2; ++k) {
      for (int lanes = 2; lanes; lanes /= 2)
        best[k] = better(best[k], Best{shuffle_xor(best[k].score, lanes), shuffle_xor(best[k].destination, lanes)});
      if (threadIdx.x % 4 == 0) partial[pair_row(2 * k)][threadIdx.x / kWarp % 2] = best[k];
    }
    __syncthreads();  // both halves of the destinations are settled
    if (threadIdx.x < kTile && i0 + threadIdx.x < source.count)
      put_best(a, split, b, source.position(i0 + threadIdx.x), better(partial[threadIdx.x][0], partial[threadIdx.x][1]));
    __syncthreads();  // and read, before the next task settles its own
  }
}

// Block ↔ batch entry: list its sources and destinations. Each thread owns a contiguous run of positions.
__global__ void __launch_bounds__(kSelectThreads) token_match_roles_kernel(TokenMatchArgs a) {
  __shared__ i32 scratch[kWarp];
  const Work work(a);
  const i64 run = (a.N + kSelectThreads - 1) / kSelectThreads, first = min(a.N, threadIdx.x * run), last = min(a.N, first + run);
  for (i64 b = blockIdx.x; b < a.B; b += gridDim.x) {
    const std::uint8_t* role = a.role + b * a.role_stride_b;
    for (int into = 0; into < 2; ++into) {
      const MatchRole is = into ? kMatchDestination : kMatchSource;
      i32 mine = 0, total;
      for (i64 n = first; n < last; ++n) mine += role[n * a.role_stride_n] == is;
      i32* next = part<i32>(a, into ? work.destinations : work.sources) + b * a.N + block_exclusive_sum(mine, scratch, total);
      for (i64 n = first; n < last; ++n)
        if (role[n * a.role_stride_n] == is) *next++ = static_cast<i32>(n);
      if (threadIdx.x == 0) part<i32>(a, work.count)[2 * b + into] = total;
    }
  }
}

// Block ↔ batch entry: settle the splits, find the r best sources, number the groups. Each thread owns a contiguous run of
// places, so that prefix sums over threads are in order of places. Place i of scores and partners is position i·step.
template <bool kRoles>
__global__ void __launch_bounds__(kSelectThreads) token_match_select_kernel(TokenMatchArgs a, int splits) {
  __shared__ RadixScratch<i32> radix;
  i32* scratch = radix.warp_sum;
  constexpr i32 step = kRoles ? 1 : 2;
  const i32 W = static_cast<i32>(kRoles ? a.N : (a.N + 1) / 2);  // positions are int32: the host has checked N
  for (i64 b = blockIdx.x; b < a.B; b += gridDim.x) {
    float* score = a.score + b * W;
    i32 *partner = a.partner + b * W, *group = a.group + b * a.N;
    const Best* parts = part<Best>(a, Work(a).best) + b * W;
    const bool any = kRoles ? Side(a, b, 1).count > 0 : a.N > 1;  // destinations
    for (i32 i = threadIdx.x; i < W; i += blockDim.x) {
      Best best{kRoles ? -INFINITY : 0, -1};
      if (any && (!kRoles || a.role[b * a.role_stride_b + i * a.role_stride_n] == kMatchSource))
        for (int split = 0; split < splits; ++split) best = better(best, parts[split * a.B * W + i]);
      score[i] = best.score, partner[i] = best.destination;
    }
    const i32 r = static_cast<i32>(kRoles ? min(a.r, any ? Side(a, b, 0).count : 0) : a.r);
    __syncthreads();  // scores of the whole entry are written (and visible to its block)
    i32 equal = 0;
    const auto key_at = [&](i32 i) { return kRoles && partner[i] < 0 ? 0 : key_of(score[i]); };
    const auto one = [](std::uint32_t) { return 1; };
    const std::uint32_t least = r ? select_key(W, key_at, one, r, radix, equal) : 0;
    const i32 per_thread = (W + kSelectThreads - 1) / kSelectThreads, first = min(W, static_cast<i32>(threadIdx.x) * per_thread);
    const i32 last = min(W, first + per_thread);
    const auto pairs = [&](i32 i) { return !kRoles && 2 * i + 1 < a.N; };  // with the destination behind it
    int ties = 0, total;
    for (i32 i = first; i < last; ++i) ties += r && key_at(i) == least;
    i32 tie = block_exclusive_sum(ties, scratch, total);
    int anchors = 0;
    for (i32 i = first; i < last; ++i) {
      const std::uint32_t key = key_at(i);
      const bool merged = r && (key > least || (key == least && tie++ < equal));
      group[step * i] = merged ? -1 : 0;
      anchors += !merged + pairs(i);
    }
    int next = block_exclusive_sum(anchors, scratch, total);
    for (i32 i = first; i < last; ++i) {
      if (group[step * i] == 0) group[step * i] = next++;
      if (pairs(i)) group[2 * i + 1] = next++;
    }
    __syncthreads();  // destinations are numbered
    for (i32 i = first; i < last; ++i)
      if (group[step * i] < 0) group[step * i] = group[partner[i]];
  }
}

// Parts that the destinations are split into, so that small problems fill the device: about two blocks per multiprocessor.
int pick_splits(i64 B, i64 S, i64 D, int multiprocessors) {
  const i64 tiles = (D + kTile - 1) / kTile, blocks = B * ((S + kTile - 1) / kTile);
  const i64 wanted = blocks ? (2 * multiprocessors + blocks - 1) / blocks : 1;
  const i64 most = tiles < kMaxSplits ? tiles : kMaxSplits;
  return static_cast<int>(wanted < 1 ? 1 : wanted > most ? (most ? most : 1) : wanted);
}

}  // namespace

i64 token_match_workspace_cuda(const TokenMatchArgs& a) { return Work(a).bytes; }

void token_match_cuda(const TokenMatchArgs& a, int device, void* stream) {
  if (a.B == 0 || a.N == 0) return;
  const DeviceGuard guard(device);
  const i64 S = Work(a).width, D = a.role ? a.N : a.N / 2, source_tiles = (S + kTile - 1) / kTile, warps = kThreads / kWarp;
  const int splits = pick_splits(a.B, S, D, multiprocessors(device));
  if (a.role) launch("token_match_roles_kernel", token_match_roles_kernel, dim3(grid_for(a.B)), dim3(kSelectThreads), stream, a);
  base::by_float_dtype("token_match", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("token_match_norms_kernel", token_match_norms_kernel<T>, dim3(grid_for((a.B * a.N + warps - 1) / warps)),
           dim3(kThreads), stream, a);
    const dim3 grid(grid_for(a.B * source_tiles * splits));
    if constexpr (sizeof(T) == 2) {
      const bool packs = pair_packs(a.x, a.x_stride_b, a.x_stride_n, a.x_stride_c);
      launch("token_match_scores16_kernel", token_match_scores16_kernel<T>, grid, dim3(kThreads), stream, a, source_tiles, splits,
             packs);
    } else {
      launch("token_match_scores_kernel", token_match_scores_kernel<T>, grid, dim3(kThreads), stream, a, source_tiles, splits);
    }
  });
  launch("token_match_select_kernel", a.role ? token_match_select_kernel<true> : token_match_select_kernel<false>,
         dim3(grid_for(a.B)), dim3(kSelectThreads), stream, a, splits);
}

}  // namespace effvlm
