#include "core/cuda/launch.cuh"
#include "core/dispatch.h"
#include "ops/token_score.h"
#include "ops/token_score_tile.cuh"

namespace effvlm {
namespace {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

struct alignas(8) Span {  // of keys that a row sees; empty for rows that do not count
  std::int32_t first, last;
};

__device__ __forceinline__ std::int32_t clamped(i64 x, i64 most) {
  return static_cast<std::int32_t>(x < 0 ? 0 : x < most ? x : most);
}

__device__ __forceinline__ float weight_of(const TokenScoreArgs& a, i64 b, i64 row) {
  return a.weight ? a.weight[b * a.weight_stride_b + row * a.weight_stride_l] : 1.0f;
}

__device__ __forceinline__ Span span_of(const TokenScoreArgs& a, i64 b, i64 row) {
  if (row >= a.L || weight_of(a, b, row) == 0) return {0, 0};
  Span span{0, static_cast<std::int32_t>(a.S)};
  if (a.start) {
    i64 t = 0, end = a.T;
    while (end - t > 1) {  // the last segment that starts here or before
      const i64 middle = t + (end - t) / 2;
      if (a.start[middle * a.start_stride] <= row) {
        t = middle;
      } else {
        end = middle;
      }
    }
    if (end <= t) return {0, 0};
    span = {clamped(a.start[t * a.start_stride], a.S), clamped(a.start[(t + 1) * a.start_stride], a.S)};
  }
  if (a.causal) span.last = clamped(row + 1 + a.S - a.L, span.last);
  return span.first < span.last ? span : Span{0, 0};
}

__device__ __forceinline__ ScoreStat* stats_of(const TokenScoreArgs& a, i64 bh) {
  return reinterpret_cast<ScoreStat*>(static_cast<char*>(a.workspace) + TokenScoreLayout(a).stats) + bh * a.L;
}
__device__ __forceinline__ float* sums_of(const TokenScoreArgs& a, i64 bh) {
  float* sums = reinterpret_cast<float*>(static_cast<char*>(a.workspace) + TokenScoreLayout(a).sums);
  return (a.heads == ScoreHeads::none ? a.out : sums) + bh * a.S;
}

// The rounding of lse·log2 e is made up for in the factor.
__device__ __forceinline__ ScoreStat stat_of(const TokenScoreArgs& a, i64 b, i64 h, i64 row) {
  ScoreStat stat{0, 1};
  if (a.lse) {
    const double exact = a.lse[b * a.lse_stride_b + h * a.lse_stride_h + row * a.lse_stride_l] * kLog2E;
    stat.shift = static_cast<float>(exact);
    if (stat.shift - stat.shift == 0) stat.factor = static_cast<float>(1 + (stat.shift - exact) * kLn2);
  } else {
    stat = stats_of(a, b * a.H + h)[row];
  }
  stat.factor *= weight_of(a, b, row);
  return stat;
}

template <class T>
__device__ __forceinline__ Tokens<T> rows_of(const TokenScoreArgs& a, i64 b, i64 h) {
  return {static_cast<const T*>(a.query) + b * a.query_stride_b + h * a.query_stride_h, a.L, a.query_stride_l, a.query_stride_d};
}
template <class T>
__device__ __forceinline__ Tokens<T> keys_of(const TokenScoreArgs& a, i64 b, i64 h) {
  const i64 g = h / (a.H / a.G);
  return {static_cast<const T*>(a.key) + b * a.key_stride_b + g * a.key_stride_g, a.S, a.key_stride_s, a.key_stride_d};
}

// Whether any row of a tile sees any key of one; for the whole block, which has passed a barrier since `spans` were written.
__device__ __forceinline__ bool any_sees(const Span* spans, i64 first_key, unsigned* votes) {
  if (threadIdx.x < kTile) {
    const Span span = spans[threadIdx.x];
    const unsigned vote = ballot(span.first < first_key + kTile && span.last > first_key);
    if (threadIdx.x % kWarp == 0) votes[threadIdx.x / kWarp] = vote;
  }
  __syncthreads();  // votes are cast
  const bool any = (votes[0] | votes[1]) != 0;
  __syncthreads();  // and read, before the next ones
  return any;
}

// Block ↔ 64 rows of a head: the largest exponent of each, and the sum of exponentials. Every thread keeps both for its own keys.
template <class Tile>
__global__ void __launch_bounds__(kThreads) token_score_rows_kernel(TokenScoreArgs a, float scale, bool packs) {
  __shared__ typename Tile::Stage staged;
  __shared__ Span spans[kTile];
  __shared__ unsigned votes[2];
  __shared__ ScoreStat partial[kTile][Tile::kKeyGroups];
  const i64 tiles = (a.L + kTile - 1) / kTile;
  for (i64 task = blockIdx.x; task < a.B * a.H * tiles; task += gridDim.x) {
    const i64 first_row = task % tiles * kTile, bh = task / tiles, b = bh / a.H, h = bh % a.H;
    if (threadIdx.x < kTile) spans[threadIdx.x] = span_of(a, b, first_row + threadIdx.x);
    __syncthreads();  // spans are there
    float top[Tile::kRows], sum[Tile::kRows];
    for (int i = 0; i < Tile::kRows; ++i) top[i] = -3e38f, sum[i] = 0;
    for (i64 first_key = 0; first_key < a.S; first_key += kTile) {
      if (!any_sees(spans, first_key, votes)) continue;
      float product[Tile::kRows][Tile::kKeys];
      Tile::multiply(rows_of<typename Tile::T>(a, b, h), first_row, keys_of<typename Tile::T>(a, b, h), first_key, a.D, packs,
                     staged, product);
      for (int i = 0; i < Tile::kRows; ++i) {
        const Span span = spans[Tile::row(i)];
        const auto sees = [&](int j) { return first_key + Tile::key(j) >= span.first && first_key + Tile::key(j) < span.last; };
        float higher = top[i];
        for (int j = 0; j < Tile::kKeys; ++j) higher = sees(j) ? fmaxf(higher, product[i][j] * scale) : higher;
        sum[i] *= exp2f(top[i] - higher);
        for (int j = 0; j < Tile::kKeys; ++j) sum[i] += sees(j) ? exp2f(fmaf(product[i][j], scale, -higher)) : 0.0f;
        top[i] = higher;
      }
    }
    for (int i = 0; i < Tile::kRows; ++i) partial[Tile::row(i)][Tile::key_group()] = ScoreStat{top[i], sum[i]};
    __syncthreads();  // every thread's share is there
    if (threadIdx.x < kTile && spans[threadIdx.x].first < spans[threadIdx.x].last) {
      const ScoreStat* mine = partial[threadIdx.x];
      float highest = mine[0].shift, total = 0;
      for (int g = 1; g < Tile::kKeyGroups; ++g) highest = fmaxf(highest, mine[g].shift);
      for (int g = 0; g < Tile::kKeyGroups; ++g) total += mine[g].factor * exp2f(mine[g].shift - highest);
      stats_of(a, bh)[first_row + threadIdx.x] = {highest, 1 / total};
    }
    __syncthreads();  // and read, before the next task writes its own
  }
}

// Block ↔ 64 keys of a head, all rows in turn. Every thread adds up its own rows; the threads of a key are added in order.
template <class Tile>
__global__ void __launch_bounds__(kThreads) token_score_keys_kernel(TokenScoreArgs a, float scale, bool packs) {
  __shared__ typename Tile::Stage staged;
  __shared__ Span spans[kTile];
  __shared__ ScoreStat stats[kTile];
  __shared__ unsigned votes[2];
  __shared__ float partial[Tile::kRowGroups][kTile];
  const i64 tiles = (a.S + kTile - 1) / kTile;
  for (i64 task = blockIdx.x; task < a.B * a.H * tiles; task += gridDim.x) {
    const i64 first_key = task % tiles * kTile, bh = task / tiles, b = bh / a.H, h = bh % a.H;
    float sum[Tile::kKeys] = {};
    for (i64 first_row = 0; first_row < a.L; first_row += kTile) {
      __syncthreads();  // everyone is through with the rows before
      if (threadIdx.x < kTile) {
        const Span span = span_of(a, b, first_row + threadIdx.x);
        spans[threadIdx.x] = span;
        stats[threadIdx.x] = span.first < span.last ? stat_of(a, b, h, first_row + threadIdx.x) : ScoreStat{0, 0};
      }
      __syncthreads();  // spans and statistics are there
      if (!any_sees(spans, first_key, votes)) continue;
      float product[Tile::kRows][Tile::kKeys];
      Tile::multiply(rows_of<typename Tile::T>(a, b, h), first_row, keys_of<typename Tile::T>(a, b, h), first_key, a.D, packs,
                     staged, product);
      for (int i = 0; i < Tile::kRows; ++i) {
        const Span span = spans[Tile::row(i)];
        const ScoreStat stat = stats[Tile::row(i)];
        for (int j = 0; j < Tile::kKeys; ++j) {
          const i64 key = first_key + Tile::key(j);
          if (key >= span.first && key < span.last) sum[j] += exp2f(fmaf(product[i][j], scale, -stat.shift)) * stat.factor;
        }
      }
    }
    for (int j = 0; j < Tile::kKeys; ++j) partial[Tile::row_group()][Tile::key(j)] = sum[j];
    __syncthreads();  // every thread's share is there
    if (threadIdx.x < kTile && first_key + threadIdx.x < a.S) {
      float total = 0;
      for (int g = 0; g < Tile::kRowGroups; ++g) total += partial[g][threadIdx.x];
      sums_of(a, bh)[first_key + threadIdx.x] = total;
    }
    __syncthreads();  // and read, before the next task writes its own
  }
}

// Thread ↔ key: heads in order.
__global__ void __launch_bounds__(kThreads) token_score_heads_kernel(TokenScoreArgs a) {
  for (i64 t = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; t < a.B * a.S;
       t += static_cast<i64>(gridDim.x) * kThreads) {
    const float* c = sums_of(a, t / a.S * a.H) + t % a.S;
    float result = c[0];
    for (i64 h = 1; h < a.H; ++h) {
      const float next = c[h * a.S];
      if (a.heads == ScoreHeads::max) {
        result = next > result || next != next ? next : result;
      } else {
        result += next;
      }
    }
    a.out[t] = a.heads == ScoreHeads::mean ? result / static_cast<float>(a.H) : result;
  }
}

// Whether eight neighbouring channels of every token are 16 aligned bytes.
bool packable(const TokenScoreArgs& a) {
  const auto aligned = [](const void* p, i64 b, i64 h, i64 n, i64 d) {
    return d == 1 && (b | h | n) % 8 == 0 && reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
  };
  return aligned(a.query, a.query_stride_b, a.query_stride_h, a.query_stride_l, a.query_stride_d) &&
         aligned(a.key, a.key_stride_b, a.key_stride_g, a.key_stride_s, a.key_stride_d);
}

}  // namespace

void token_score_cuda(const TokenScoreArgs& a, int device, void* stream) {
  if (a.B == 0 || a.S == 0) return;
  const DeviceGuard guard(device);
  const float scale = static_cast<float>(a.scale * kLog2E);
  const bool packs = packable(a);
  const i64 row_tiles = (a.L + kTile - 1) / kTile, key_tiles = (a.S + kTile - 1) / kTile;
  base::by_float_dtype("token_score", a.dtype, [&](auto type) {
    using Tile = typename TileOf<typename decltype(type)::type>::type;
    if (!a.lse)
      launch("token_score_rows_kernel", token_score_rows_kernel<Tile>, dim3(grid_for(a.B * a.H * row_tiles)), dim3(kThreads),
             stream, a, scale, packs);
    launch("token_score_keys_kernel", token_score_keys_kernel<Tile>, dim3(grid_for(a.B * a.H * key_tiles)), dim3(kThreads),
           stream, a, scale, packs);
  });
  if (a.heads != ScoreHeads::none)
    launch("token_score_heads_kernel", token_score_heads_kernel, dim3(grid_for((a.B * a.S + kThreads - 1) / kThreads)),
           dim3(kThreads), stream, a);
}

}  // namespace effvlm
