// Part of moe_ffn_cuda.cu and grouped_linear_cuda.cu: which choices belong to an expert, and dot products of its rows with
// tokens.
#pragma once
#include "core/cuda/launch.cuh"

namespace effvlm {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kTile = 8;        // tokens that share a load of a weight
constexpr int kScanned = 1024;  // up to so many choices every block finds its expert's by itself: one launch less
constexpr int kMaxExperts = 4096;

// Choice pair = t·K + k of token t.
struct Choices {
  const i64* ids;  // (T,K)
  i64 stride_t, stride_k;
  int E, count;  // count: T·K
  unsigned K;

  // Its expert, −1 if it is to be skipped.
  __device__ __forceinline__ int expert(unsigned pair) const {
    const i64 e = ids[pair / K * stride_t + pair % K * stride_k];
    return e >= 0 && e < E ? static_cast<int>(e) : -1;
  }
};

// One block: counts, offsets, places. Which of an expert's choices comes first depends on the run, and nothing on that.
__global__ void __launch_bounds__(1024) moe_ffn_sort_kernel(Choices a, i32* start, i32* order) {
  __shared__ int next[kMaxExperts];
  __shared__ int sums[kWarp];
  const int E = a.E, choices = a.count;
  for (int e = threadIdx.x; e < E; e += blockDim.x) next[e] = 0;
  __syncthreads();  // counters are zero
  for (int pair = threadIdx.x; pair < choices; pair += blockDim.x) {
    const int e = a.expert(pair);
    if (e >= 0) add_shared(next + e, 1);
  }
  __syncthreads();  // counters are complete
  int before = 0;
  for (int first = 0; first < E; first += blockDim.x) {
    const int e = first + threadIdx.x, count = e < E ? next[e] : 0;
    int total;
    const int offset = before + block_exclusive_sum(count, sums, total);
    if (e < E) next[e] = start[e] = offset;
    before += total;
  }
  if (threadIdx.x == 0) start[E] = before;
  __syncthreads();  // every expert's first place is in next
  for (int pair = threadIdx.x; pair < choices; pair += blockDim.x) {
    const int e = a.expert(pair);
    if (e >= 0) order[add_shared(next + e, 1)] = pair;
  }
}

struct Members {
  const i32* pair;
  int count;
};

// The choices of expert e: from the sorted order, or, when there are few, by looking at all of them.
__device__ __forceinline__ Members members_of(const Choices& a, const i32* start, const i32* order, int e, i32* list, int* sums) {
  if (a.count > kScanned) return {order + start[e], start[e + 1] - start[e]};
  constexpr int kEach = kScanned / kThreads;
  bool mine[kEach];
  int found = 0, total;
  for (int k = 0; k < kEach; ++k) {
    const int pair = threadIdx.x * kEach + k;
    mine[k] = pair < a.count && a.expert(pair) == e;
    found += mine[k];
  }
  int place = block_exclusive_sum(found, sums, total);
  for (int k = 0; k < kEach; ++k)
    if (mine[k]) list[place++] = threadIdx.x * kEach + k;
  __syncthreads();  // the list is complete
  return {list, total};
}

// A pack at once, or element by element (zeros past the `left` last ones), so that both add up in the same order.
template <class T, bool Packs>
__device__ __forceinline__ Pack<T> load_some(const T* from, i64 stride, i64 left) {
  if constexpr (Packs) return load_pack(from);
  Pack<T> pack{};
  for (int k = 0; k < Pack<T>::size; ++k)
    if (k < left) pack.element[k] = from[k * stride];
  return pack;
}

// sum[r][t] = <row r, token t> over C, in every lane, for R rows and up to kTile tokens; strides of single elements.
template <class T, bool Packs, int R>
__device__ __forceinline__ void dots(const T* const* rows, i64 row_stride, const T* const* tokens, i64 token_stride, int count,
                                     i64 C, float (*sum)[kTile]) {
  constexpr int P = Pack<T>::size;
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < kTile; ++t) sum[r][t] = 0;
  for (i64 c = threadIdx.x % kWarp * P; c < C; c += kWarp * P) {
    Pack<T> row[R];
    for (int r = 0; r < R; ++r) row[r] = load_some<T, Packs>(rows[r] + c * row_stride, row_stride, C - c);
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t >= count) continue;  // not break: sums must stay in registers
      const Pack<T> token = load_some<T, Packs>(tokens[t] + c * token_stride, token_stride, C - c);
      for (int r = 0; r < R; ++r)
        for (int k = 0; k < P; ++k) sum[r][t] += to_float(row[r].element[k]) * to_float(token.element[k]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTile; ++t)
    for (int r = 0; r < R; ++r)
      if (t < count) sum[r][t] = warp_sum(sum[r][t]);
}

template <class T>
bool packable(const void* p, i64 C, i64 stride_c, std::initializer_list<i64> strides) {
  bool fits = reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && stride_c == 1 && C % Pack<T>::size == 0;
  for (const i64 stride : strides) fits = fits && stride % Pack<T>::size == 0;
  return fits;
}

// Blocks for so many rows, a warp each.
inline unsigned blocks_of(i64 rows) { return static_cast<unsigned>((rows + kWarps - 1) / kWarps); }

}  // namespace
}  // namespace effvlm
