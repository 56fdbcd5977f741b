#include "core/cuda/launch.cuh"
#include "ops/token_select.h"
#include "ops/token_select_cut.h"
#include "ops/token_select_radix.cuh"

namespace effvlm {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;
using u32 = std::uint32_t;

constexpr int kThreads = 512;

struct Scratch {
  RadixScratch<i32> count;
  RadixScratch<i64> units;
  u32 largest[kWarp];
};

// One segment, by the whole block.
struct Segment {
  const float* score;
  i64 stride;
  i32 n;
  Scratch& scratch;

  __device__ __forceinline__ u32 key(i32 i) const {
    const float x = score[i * stride];
    return x == x ? key_of(x) : kLowestKey;
  }

  // The key of this rank, 1 the highest, and how many of those equal to it are of this rank or a higher one.
  __device__ __forceinline__ Cut at_rank(i32 rank) const {
    Cut cut;
    cut.key = select_key(n, [&](i32 i) { return key(i); }, [](u32) { return 1; }, rank, scratch.count, cut.equal);
    return cut;
  }

  __device__ __forceinline__ i32 count_from(u32 least) const {
    i32 count = 0, total;
    for (i32 i = threadIdx.x; i < n; i += blockDim.x) count += key(i) >= least;
    block_exclusive_sum(count, scratch.count.warp_sum, total);
    return total;
  }

  __device__ __forceinline__ double quartile(int q, i32 finite, i32 infinite) const {
    const Quartile place = quartile_of(q, finite);
    const i32 rank = infinite + finite - place.below;
    const double low = float_of(at_rank(rank).key), high = place.quarters ? float_of(at_rank(rank - 1).key) : low;
    return low + rounded_product(high - low, 0.25 * place.quarters);
  }

  __device__ __forceinline__ Cut iqr(float limit) const {
    const i32 infinite = count_from(kInfiniteKey), finite = count_from(kLowestKey + 1) - infinite;
    if (finite == 0) return keep_infinite();
    double q1 = 0, q3 = 0;
#pragma unroll 1
    for (int q = 1; q <= 3; q += 2) q1 = q3, q3 = quartile(q, finite, infinite);
    return cut_above(q3 + rounded_product(limit, q3 - q1));
  }

  __device__ __forceinline__ u32 largest_finite() const {
    u32 largest = 0;
    for (i32 i = threadIdx.x; i < n; i += blockDim.x) {
      const u32 k = key(i);
      if (k < kInfiniteKey && k > largest) largest = k;
    }
    for (int lanes = kWarp / 2; lanes; lanes /= 2) {
      const u32 other = shuffle_xor(largest, lanes);
      largest = other > largest ? other : largest;
    }
    if (threadIdx.x % kWarp == 0) scratch.largest[threadIdx.x / kWarp] = largest;
    __syncthreads();  // every warp's is there
    for (int w = 0; w < kThreads / kWarp; ++w) largest = scratch.largest[w] > largest ? scratch.largest[w] : largest;
    __syncthreads();  // everyone has read them
    return largest;
  }

  __device__ __forceinline__ Cut top_p(float limit) const {
    const u32 largest = largest_finite();
    if (largest <= key_of(0)) return keep_infinite();
    const double per_score = units_per_score(largest, n);
    i64 sum = 0, total, left;
    for (i32 i = threadIdx.x; i < n; i += blockDim.x) sum += units_of(key(i), per_score);
    block_exclusive_sum(sum, scratch.units.warp_sum, total);
    const u32 cut = select_key(
        n, [&](i32 i) { return key(i); }, [&](u32 k) { return units_of(k, per_score); }, share(limit, total), scratch.units,
        left);
    const i64 each = units_of(cut, per_score);
    return {cut, static_cast<i32>((left + each - 1) / each)};
  }

  __device__ __forceinline__ Cut cut(SelectRule rule, float limit) const {
    if (rule == SelectRule::above || limit != limit) return cut_from(limit);
    if (rule == SelectRule::iqr) return iqr(limit);
    if (rule == SelectRule::top_p) return top_p(limit);
    const i32 r = whole(limit, n);
    return r == 0 ? keep_infinite() : r == n ? keep_all() : bounded(at_rank(r));
  }

  // Each thread owns a contiguous run of tokens, so that ties are counted in their order. Returns how many are kept.
  __device__ __forceinline__ i32 mark(Cut cut, bool* kept) const {
    const i32 per_thread = (n + kThreads - 1) / kThreads, first = min(n, static_cast<i32>(threadIdx.x) * per_thread);
    const i32 end = min(n, first + per_thread);
    i32 ties = 0, count = 0, total;
    for (i32 i = first; cut.equal && i < end; ++i) ties += key(i) == cut.key;
    i32 tie = block_exclusive_sum(ties, scratch.count.warp_sum, total);
    for (i32 i = first; i < end; ++i) {
      const u32 k = key(i);
      const bool keep = k > cut.key || (k == cut.key && tie++ < cut.equal);
      kept[i] = keep;
      count += keep;
    }
    block_exclusive_sum(count, scratch.count.warp_sum, total);
    return total;
  }
};

__device__ __forceinline__ i64 start_of(const TokenSelectArgs& a, i64 s) {
  const i64 at = a.start[s * a.start_stride];
  return at < 0 ? 0 : at < a.N ? at : a.N;
}

// Block ↔ segment.
__global__ void __launch_bounds__(kThreads) token_select_kernel(TokenSelectArgs a) {
  __shared__ Scratch scratch;
  for (i64 s = blockIdx.x; s < a.S; s += gridDim.x) {
    const i64 first = start_of(a, s), end = start_of(a, s + 1);
    const Segment segment{a.score + first * a.score_stride, a.score_stride, end > first ? static_cast<i32>(end - first) : 0,
                          scratch};
    const i32 count = segment.mark(segment.cut(a.rule, a.limit[s * a.limit_stride]), a.kept + first);
    if (threadIdx.x == 0) a.count[s] = count;
  }
}

}  // namespace

void token_select_cuda(const TokenSelectArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  launch("token_select_kernel", token_select_kernel, dim3(grid_for(a.S)), dim3(kThreads), stream, a);
}

}  // namespace effvlm
