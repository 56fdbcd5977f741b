#include "core/check.h"
#include "core/cuda/gap_planes.cuh"
#include "core/dispatch.h"
#include "ops/moe_ffn_lists.cuh"
#include "ops/ternary_matmul.h"
#include "ops/ternary_matmul_tile.cuh"

namespace effvlm {
namespace {

constexpr int kProductWarps = 4;
constexpr int kMembers = kWarp;  // choices that share the decoding of a tile
// Blocks on a multiprocessor, of 37 KB of shared memory each: where there is room for six, sm_90 has registers for most of them
// too.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
template <class X>
constexpr int kResident = sizeof(X) == 2 ? 5 : 6;
#else
template <class X>
constexpr int kResident = 5;
#endif
constexpr i64 kPartialBytes = 16 << 20;  // of partial sums, which should stay in the second-level cache

// Workspace. Every strip is a slot of its own as long as the partial sums of all slots are few, because most calls have fewer
// half tiles than the device has warps. The number depends on sizes alone, and so do the sums' order and bits.
struct Layout : Workspace {
  i64 slots, rows, width;  // rows: padded; width: of q or of the copy, in elements
  bool copied;
  i64 start, order, tokens, step, unit, partial;

  Layout(const TernaryMatmulArgs& a, bool packs) {
    const i64 choices = a.T * a.K, strips = strips_of(a.weight.C);
    rows = blocks_of(a.weight) * kTileRows;
    const i64 most = kPartialBytes / (4 * choices * rows + 1);
    slots = strips < most ? strips : strips && !most ? 1 : most;
    copied = !a.int8 && !packs, width = a.int8 ? strips * kTileColumns : (a.weight.C + kStripUnit - 1) / kStripUnit * kStripUnit;
    start = take(4 * (a.weight.E + 1)), order = take(4 * choices);
    tokens = take(a.int8 ? a.T * width : copied ? a.T * width * (a.dtype == Dtype::f32 ? 4 : 2) : 0);
    step = take(a.int8 ? a.T * strips : 0), unit = take(a.int8 ? 4 * a.T : 0), partial = take(4 * slots * choices * rows);
  }
};

Layout layout_of(const TernaryMatmulArgs& a) {
  bool packs = false;
  base::by_float_dtype("ternary_matmul", a.dtype, [&](auto type) {
    packs = packable<typename decltype(type)::type>(a.x, a.weight.C, a.x_stride_c, {a.x_stride_t});
  });
  return Layout(a, packs);
}

template <class P>
__device__ __forceinline__ P* scratch(const TernaryMatmulArgs& a, i64 offset) {
  return reinterpret_cast<P*>(static_cast<char*>(a.workspace) + offset);
}

__host__ __device__ Choices choices_of(const TernaryMatmulArgs& a) {
  return {a.ids,
          a.ids_stride_t,
          a.ids_stride_k,
          static_cast<int>(a.weight.E),
          static_cast<int>(a.T * a.K),
          static_cast<unsigned>(a.K)};
}

// ---- tokens ----

// |x|, or infinity if x is not finite.
__device__ __forceinline__ float magnitude(float x) { return fabsf(x) < INFINITY ? fabsf(x) : INFINITY; }
__device__ __forceinline__ float warp_largest(float x) {
  for (int lanes = kWarp / 2; lanes; lanes /= 2) x = fmaxf(x, shuffle_xor(x, lanes));
  return x;
}

// Block ↔ token, warp ↔ strips: first their magnitudes, then q. Every f32 operation is the CPU's; no product meets a sum, so that
// there is nothing to contract.
template <class T>
__global__ void __launch_bounds__(kThreads) ternary_matmul_quantize_kernel(TernaryMatmulArgs a, Layout at) {
  __shared__ float largest[kTernaryMaxInt8 / kTileColumns + 3];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, strips = static_cast<int>(strips_of(a.weight.C));
  const float limit = a.weight.levels == 3 ? 127.0f : 63.0f, top = 255;
  for (i64 t = blockIdx.x; t < a.T; t += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + t * a.x_stride_t;
    const auto value = [&](const Strip& strip, int c) {
      const i64 column = strip.column + c;
      return c < strip.pitch && column < a.weight.C ? to_float(x[column * a.x_stride_c]) : 0.0f;
    };
    for (int s = warp; s < strips; s += kWarps) {
      const Strip strip = strip_at(a.weight.C, s);
      float most = 0;
#pragma unroll
      for (int c = lane; c < kTileColumns; c += kWarp) most = fmaxf(most, magnitude(value(strip, c)));
      most = warp_largest(most);
      if (lane == 0) largest[s] = most;
    }
    __syncthreads();  // every strip's largest value is known
    float most = 0;
    for (int s = lane; s < strips; s += kWarp) most = fmaxf(most, largest[s]);
    most = warp_largest(most);
    const bool plain = most >= 1e-33f && most < INFINITY;
    const float unit = plain ? most / (limit * top) : most < 1e-33f ? 0.0f : NAN, inverse = plain ? top / most : 0;
    if (threadIdx.x == 0) scratch<float>(a, at.unit)[t] = unit;
    for (int s = warp; s < strips; s += kWarps) {
      const float steps = plain ? ceilf(largest[s] * inverse) : 1, m = steps < 1 ? 1 : steps > top ? top : steps;
      const float scale = plain ? 1 / (m * unit) : 0;
      const Strip strip = strip_at(a.weight.C, s);
      if (lane == 0) scratch<std::uint8_t>(a, at.step)[t * strips + s] = static_cast<std::uint8_t>(m);
      std::int8_t* q = scratch<std::int8_t>(a, at.tokens) + t * at.width + s * kTileColumns;
#pragma unroll
      for (int c = lane; c < kTileColumns; c += kWarp) {
        const float rounded = plain ? rintf(value(strip, c) * scale) : 0;
        q[c] = static_cast<std::int8_t>(rounded < -limit ? -limit : rounded > limit ? limit : rounded);
      }
    }
    __syncthreads();  // everyone is through with the largest values
  }
}

// Tokens whose strides or alignment do not allow whole packs.
template <class T>
__global__ void __launch_bounds__(kThreads) ternary_matmul_copy_kernel(TernaryMatmulArgs a, Layout at) {
  for (i64 t = blockIdx.x; t < a.T; t += gridDim.x)
    for (i64 c = threadIdx.x; c < at.width; c += blockDim.x) {
      const T* x = static_cast<const T*>(a.x) + t * a.x_stride_t;
      scratch<T>(a, at.tokens)[t * at.width + c] = c < a.weight.C ? x[c * a.x_stride_c] : from_float<T>(0);
    }
}

// Tokens as the products read them: rows of whole packs.
template <class X>
struct Tokens {
  const X* x;
  i64 stride, columns;
  bool padded;  // every strip to 256 columns: q

  __device__ __forceinline__ const X* strip(i64 t, i64 s, const Strip& at) const {
    return x + t * stride + (padded ? s * kTileColumns : at.column);
  }
  // Columns of a strip that are there.
  __device__ __forceinline__ int width(const Strip& at) const {
    const i64 left = columns - at.column;
    return padded || left > at.pitch ? at.pitch : static_cast<int>(left);
  }
};

// ---- products ----

// Choices first … first + kMembers − 1 of expert e into `pairs`; returns how many it has. Every warp looks for itself.
__device__ __forceinline__ int find_members(const Choices& a, const i32* start, const i32* order, int e, int first, i32* pairs) {
  const int lane = threadIdx.x % kWarp;
  int total = 0;
  if (a.count > kScanned) {
    total = start[e + 1] - start[e];
    if (first + lane < total) pairs[lane] = order[start[e] + first + lane];
  }
  for (int begin = 0; begin < a.count && a.count <= kScanned; begin += kWarp) {
    const bool mine = begin + lane < a.count && a.expert(begin + lane) == e;
    const u32 votes = ballot(mine);
    const int place = total + popcount(low_bits(votes, lane)) - first;
    if (mine && place >= 0 && place < kMembers) pairs[place] = begin + lane;
    total += popcount(votes);
  }
  __syncwarp();  // pairs are written
  return total;
}

// One strip of half a row block, with `count` tokens. `to`: the sums of this slot, from the half's first row; `more`: they are
// there already. Memory that is all the warp's own costs less than registers that would be kept while the next tile is decoded.
template <class X, bool kFive>
__device__ __forceinline__ void multiply_half(const TernaryMatmulArgs& a, const Layout& at, const Tokens<X>& tokens,
                                              const HalfTile& tile, const Strip& strip, int s, const i32* pairs, int count,
                                              SumOf<X>* to, bool more) {
  const int lane = threadIdx.x % kWarp, width = tokens.width(strip);
  const unsigned K = static_cast<unsigned>(a.K);
  if constexpr (sizeof(X) == 4) {
    for (int c = 0; c < count; ++c) {
      const float sum = row_product(tile, tokens.strip(static_cast<unsigned>(pairs[c]) / K, s, strip), width);
      float* row = to + pairs[c] * at.rows + lane;
      *row = more ? *row + sum : sum;
    }
  } else {
#pragma unroll 1
    for (int c = lane / 4; c - lane / 4 < count; c += 8) {
      const i64 t = c < count ? static_cast<unsigned>(pairs[c]) / K : 0;
      SumOf<X> factor = kHalves<X, kFive> ? 2 : 1;
      if constexpr (sizeof(X) == 1) factor = scratch<std::uint8_t>(a, at.step)[t * strips_of(a.weight.C) + s];
      SumOf<X>* rows = to + (c < count ? pairs[c] : 0) * at.rows + 8 * (lane % 4);
      multiply_rows<X, kFive>(tile, tokens.strip(t, s, strip), c < count ? width : 0, [&](int n, Pack<SumOf<X>> sums) {
        if (c >= count) return;
        const auto before = more ? load_pack(rows + n) : Pack<SumOf<X>>{};
        for (int i = 0; i < 4; ++i) sums.element[i] = before.element[i] + factor * sums.element[i];
        store_pack(rows + n, sums);
      });
    }
  }
}

// Warp ↔ (expert, half a block of rows, a slot: every at.slots-th strip), independent of all others. blockIdx.y ↔ experts, or, if
// there are fewer choices, choices: the first one of each expert. Besides decoding, a half tile costs some 350 instructions, and
// 250 (int8) to 400 (16 bits) per 8 tokens, or 1,000 per token in f32.
template <class X, bool kFive>
__global__ void __launch_bounds__(kProductWarps* kWarp, kResident<X>)
    ternary_matmul_product_kernel(TernaryMatmulArgs a, Layout at, Tokens<X> tokens, bool by_choice) {
  __shared__ HalfTile halves[kProductWarps];
  __shared__ i32 members[kProductWarps][kMembers];
  const unsigned warp = shuffle(threadIdx.x / kWarp, 0), task = blockIdx.x * kProductWarps + warp;
  const unsigned slots = static_cast<unsigned>(at.slots), block = task / 2 / slots, half = task % 2, slot = task / 2 % slots;
  const Choices choices = choices_of(a);
  const int e = by_choice ? choices.expert(blockIdx.y) : static_cast<int>(blockIdx.y);
  if (e < 0 || i64{kTileRows} * block + kHalfRows * half >= a.weight.R) return;
  i32* pairs = members[warp];
  for (int first = 0, total = 1; first < total; first += kMembers) {
    total = find_members(choices, scratch<i32>(a, at.start), scratch<i32>(a, at.order), e, first, pairs);
    if (total == 0 || (by_choice && first == 0 && pairs[0] != static_cast<i32>(blockIdx.y))) return;
    const unsigned strips = static_cast<unsigned>(strips_of(a.weight.C));
    for (unsigned s = slot; s < strips; s += slots) {
      const Strip strip = strip_at(a.weight.C, s);
      const GapTile tile = tile_at(a.weight, e * blocks_of(a.weight) + block, s, strips, groups_of(a.weight), strip.pitch);
      read_half<CodeOf<X>>(a.weight, tile, strip.pitch, static_cast<int>(half), halves[warp]);
      __syncwarp();  // the half is decoded
      if (strip.pitch < kTileColumns) {
        widen_rows(halves[warp], strip.pitch);
        __syncwarp();  // its rows are where they belong
      }
      SumOf<X>* to = scratch<SumOf<X>>(a, at.partial) + slot * a.T * a.K * at.rows + i64{kTileRows} * block + kHalfRows * half;
      multiply_half<X, kFive>(a, at, tokens, halves[warp], strip, s, pairs, min(kMembers, total - first), to, s != slot);
      __syncwarp();  // and read, before the next one is zeroed, or other pairs are written
    }
  }
}

// Block ↔ (a choice, 256 rows), thread ↔ one: adds up slots in their order. Zeros for choices that are skipped.
template <class T>
__global__ void __launch_bounds__(kThreads) ternary_matmul_finish_kernel(TernaryMatmulArgs a, Layout at) {
  const i64 R = a.weight.R, parts = (R + kThreads - 1) / kThreads, choices = a.T * a.K;
  for (i64 task = blockIdx.x; task < choices * parts; task += gridDim.x) {
    const i64 pair = task / parts, r = task % parts * kThreads + threadIdx.x;
    if (r >= R) continue;
    const int e = choices_of(a).expert(static_cast<unsigned>(pair));
    float total = 0, unit = 1;
    if (e >= 0 && a.int8) {
      i32 sum = 0;
#pragma unroll 8
      for (i64 slot = 0; slot < at.slots; ++slot) sum += scratch<i32>(a, at.partial)[(slot * choices + pair) * at.rows + r];
      total = static_cast<float>(sum), unit = scratch<float>(a, at.unit)[pair / a.K];
    } else if (e >= 0) {
#pragma unroll 8
      for (i64 slot = 0; slot < at.slots; ++slot) total += scratch<float>(a, at.partial)[(slot * choices + pair) * at.rows + r];
    }
    const float made = e < 0 ? 0 : total * (unit * to_float(a.scale[e * a.scale_stride_e + r * a.scale_stride_r]));
    static_cast<T*>(a.out)[pair * R + r] = from_float<T>(made);
  }
}

template <class X, bool kFive = false>
void run_products(const TernaryMatmulArgs& a, const Layout& at, const void* x, i64 stride, bool padded, void* stream) {
  const i64 choices = a.T * a.K, tasks = 2 * blocks_of(a.weight) * at.slots;
  const bool by_choice = choices < a.weight.E && choices <= kScanned;
  const i64 takers = by_choice ? choices : choices ? a.weight.E : 0;
  const dim3 grid(static_cast<unsigned>((tasks + kProductWarps - 1) / kProductWarps), static_cast<unsigned>(takers));
  const Tokens<X> tokens{static_cast<const X*>(x), stride, padded ? stride : a.weight.C, padded};
  launch("ternary_matmul_product_kernel", ternary_matmul_product_kernel<X, kFive>, grid, dim3(kProductWarps * kWarp), stream, a,
         at, tokens, by_choice);
}

template <class T>
void run(const TernaryMatmulArgs& a, const Layout& at, void* stream) {
  char* workspace = static_cast<char*>(a.workspace);
  if (a.T * a.K > kScanned)
    launch("moe_ffn_sort_kernel", moe_ffn_sort_kernel, dim3(1), dim3(1024), stream, choices_of(a),
           reinterpret_cast<i32*>(workspace + at.start), reinterpret_cast<i32*>(workspace + at.order));
  const void* x = a.int8 || at.copied ? workspace + at.tokens : static_cast<const char*>(a.x);
  const i64 stride = a.int8 || at.copied ? at.width : a.x_stride_t;
  if (a.int8) {
    launch("ternary_matmul_quantize_kernel", ternary_matmul_quantize_kernel<T>, dim3(grid_for(a.T)), dim3(kThreads), stream, a,
           at);
    run_products<std::int8_t>(a, at, x, stride, true, stream);
  } else {
    if (at.copied)
      launch("ternary_matmul_copy_kernel", ternary_matmul_copy_kernel<T>, dim3(grid_for(a.T)), dim3(kThreads), stream, a, at);
    if constexpr (std::is_same_v<T, bf16>) {
      (a.weight.levels == 5 ? run_products<T, true> : run_products<T, false>)(a, at, x, stride, false, stream);
    } else {
      run_products<T>(a, at, x, stride, false, stream);
    }
  }
  const i64 tasks = a.T * a.K * ((a.weight.R + kThreads - 1) / kThreads);
  launch("ternary_matmul_finish_kernel", ternary_matmul_finish_kernel<T>, dim3(grid_for(tasks)), dim3(kThreads), stream, a, at);
}

}  // namespace

std::int64_t ternary_matmul_workspace_cuda(const TernaryMatmulArgs& a) { return layout_of(a).bytes; }

void ternary_matmul_cuda(const TernaryMatmulArgs& a, int device, void* stream) {
  EFFVLM_CHECK(a.weight.E <= kMaxExperts, "ternary_matmul: expected at most %d matrices on CUDA, got %lld", kMaxExperts,
               static_cast<long long>(a.weight.E));
  const Layout at = layout_of(a);
  EFFVLM_CHECK(at.bytes <= a.workspace_bytes, "ternary_matmul: workspace of %lld bytes is too small",
               static_cast<long long>(a.workspace_bytes));
  const DeviceGuard guard(device);
  base::by_float_dtype("ternary_matmul", a.dtype, [&](auto type) { run<typename decltype(type)::type>(a, at, stream); });
}

}  // namespace effvlm
