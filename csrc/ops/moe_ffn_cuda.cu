#include "core/check.h"
#include "core/dispatch.h"
#include "ops/moe_ffn.h"
#include "ops/moe_ffn_lists.cuh"

namespace effvlm {
namespace {

constexpr int kMaxChoices = 1024;

struct Layout : Workspace {
  i64 start, order, hidden, made;  // i32 (E+1), i32 (T·K), h (T·K,I), weighted second product f32 (T·K,O)

  __host__ __device__ explicit Layout(const MoeFfnArgs& a) {
    const i64 choices = a.T * a.K;
    start = take(4 * (a.E + 1)), order = take(4 * choices), hidden = take(choices * a.I * (a.dtype == Dtype::f32 ? 4 : 2));
    made = take(choices * a.O * 4);
  }
};

template <class P>
__host__ __device__ __forceinline__ P* scratch(const MoeFfnArgs& a, i64 offset) {
  return reinterpret_cast<P*>(static_cast<char*>(a.workspace) + offset);
}

__host__ __device__ Choices choices_of(const MoeFfnArgs& a) {
  return {a.ids, a.ids_stride_t, a.ids_stride_k, static_cast<int>(a.E), static_cast<int>(a.T * a.K), static_cast<unsigned>(a.K)};
}

__device__ __forceinline__ float activate(const MoeFfnArgs& a, float g) {
  switch (a.act) {
    case Act::silu: return g / (1 + expf(-a.alpha * g));
    case Act::gelu: return 0.5f * g * erfcf(-0.70710678f * g);
    case Act::gelu_tanh: return g / (1 + expf(-1.5957691216f * g * (1 + 0.044715f * g * g)));
    case Act::relu: return g > 0 || g != g ? g : 0;
    case Act::relu2: return g > 0 || g != g ? g * g : 0;
    default: return g;
  }
}

__device__ __forceinline__ float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// Block ↔ (kWarps elements of h, an expert), warp ↔ one element: its gate and up rows stay in the first-level cache.
template <class T, bool Packs>
__global__ void __launch_bounds__(kThreads) moe_ffn_up_kernel(MoeFfnArgs a) {
  __shared__ i32 list[kScanned];
  __shared__ int sums[kWarp];
  const Layout at(a);
  const int e = blockIdx.y, lane = threadIdx.x % kWarp;
  const Members members = members_of(choices_of(a), scratch<i32>(a, at.start), scratch<i32>(a, at.order), e, list, sums);
  const i64 i = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (i >= a.I) return;
  const i64 index[2] = {!a.gated ? i : a.interleaved ? 2 * i : i, !a.gated ? i : a.interleaved ? 2 * i + 1 : a.I + i};
  const T* rows[2];
  float bias[2];
  for (int r = 0; r < 2; ++r) {
    rows[r] = static_cast<const T*>(a.up) + e * a.up_stride_e + index[r] * a.up_stride_r;
    const T* value = static_cast<const T*>(a.up_bias) + e * a.up_bias_stride_e + index[r] * a.up_bias_stride_r;
    bias[r] = a.up_bias ? to_float(*value) : 0;
  }
  for (int first = 0; first < members.count; first += kTile) {
    const int count = members.count - first < kTile ? members.count - first : kTile;
    const T* tokens[kTile];
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      const unsigned pair = members.pair[first + (t < count ? t : 0)];
      tokens[t] = static_cast<const T*>(a.x) + pair / static_cast<unsigned>(a.K) * a.x_stride_t;
    }
    float sum[2][kTile];
    if (a.gated) {
      dots<T, Packs, 2>(rows, a.up_stride_h, tokens, a.x_stride_h, count, a.H, sum);
    } else {
      dots<T, Packs, 1>(rows, a.up_stride_h, tokens, a.x_stride_h, count, a.H, sum);
    }
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t >= count || lane != t) continue;
      const float g = sum[0][t] + bias[0], u = a.gated ? clamped(sum[1][t] + bias[1], -a.limit, a.limit) + a.offset : 1;
      const float h = a.gated ? activate(a, g > a.limit ? a.limit : g) * u : activate(a, g);
      scratch<T>(a, at.hidden)[members.pair[first + t] * a.I + i] = from_float<T>(h);
    }
  }
}

// Block ↔ (kWarps columns of out, an expert), warp ↔ one column. Products are weighted here and added by the next kernel.
template <class T, bool Packs>
__global__ void __launch_bounds__(kThreads) moe_ffn_down_kernel(MoeFfnArgs a) {
  __shared__ i32 list[kScanned];
  __shared__ int sums[kWarp];
  const Layout at(a);
  const int e = blockIdx.y, lane = threadIdx.x % kWarp;
  const Members members = members_of(choices_of(a), scratch<i32>(a, at.start), scratch<i32>(a, at.order), e, list, sums);
  const i64 o = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (o >= a.O) return;
  const T* row = static_cast<const T*>(a.down) + e * a.down_stride_e + o * a.down_stride_o;
  const T* value = static_cast<const T*>(a.down_bias) + e * a.down_bias_stride_e + o * a.down_bias_stride_o;
  const float bias = a.down_bias ? to_float(*value) : 0;
  for (int first = 0; first < members.count; first += kTile) {
    const int count = members.count - first < kTile ? members.count - first : kTile;
    const T* tokens[kTile];
#pragma unroll
    for (int t = 0; t < kTile; ++t) tokens[t] = scratch<T>(a, at.hidden) + members.pair[first + (t < count ? t : 0)] * a.I;
    float sum[1][kTile];
    dots<T, Packs, 1>(&row, a.down_stride_i, tokens, 1, count, a.I, sum);
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
      if (t >= count || lane != t) continue;
      const unsigned pair = members.pair[first + t], K = static_cast<unsigned>(a.K);
      const float weight = a.weight[pair / K * a.weight_stride_t + pair % K * a.weight_stride_k];
      scratch<float>(a, at.made)[pair * a.O + o] = weight * (sum[0][t] + bias);
    }
  }
}

// Block ↔ tokens, thread ↔ columns: a token's experts are added by ascending id, then choice.
template <class T>
__global__ void __launch_bounds__(kThreads) moe_ffn_sum_kernel(MoeFfnArgs a) {
  __shared__ int choice[kMaxChoices];
  __shared__ int valid;
  const Layout at(a);
  const Choices choices = choices_of(a);
  const int K = static_cast<int>(a.K);
  for (i64 t = blockIdx.x; t < a.T; t += gridDim.x) {
    if (threadIdx.x == 0) valid = 0;
    __syncthreads();  // the last token's choices are done with, and the count is zero
    for (int k = threadIdx.x; k < K; k += blockDim.x) {
      const int e = choices.expert(static_cast<unsigned>(t * K + k));
      if (e < 0) continue;
      int before = 0;
      for (int other = 0; other < K; ++other) {
        const int its = choices.expert(static_cast<unsigned>(t * K + other));
        before += its >= 0 && (its < e || (its == e && other < k));
      }
      choice[before] = k;
      add_shared(&valid, 1);
    }
    __syncthreads();  // the order is complete
    for (i64 o = threadIdx.x; o < a.O; o += blockDim.x) {
      float sum = 0;
      for (int k = 0; k < valid; ++k) sum += scratch<float>(a, at.made)[(t * K + choice[k]) * a.O + o];
      static_cast<T*>(a.out)[t * a.O + o] = from_float<T>(sum);
    }
    __syncthreads();  // everyone is through with the order
  }
}

template <class T>
void run(const MoeFfnArgs& a, void* stream) {
  const unsigned E = static_cast<unsigned>(a.T * a.K ? a.E : 0);
  const Layout at(a);
  if (a.T * a.K > kScanned)
    launch("moe_ffn_sort_kernel", moe_ffn_sort_kernel, dim3(1), dim3(1024), stream, choices_of(a), scratch<i32>(a, at.start),
           scratch<i32>(a, at.order));
  const bool up_packs = packable<T>(a.x, a.H, a.x_stride_h, {a.x_stride_t}) &&
                        packable<T>(a.up, a.H, a.up_stride_h, {a.up_stride_e, a.up_stride_r});
  const auto up = up_packs ? moe_ffn_up_kernel<T, true> : moe_ffn_up_kernel<T, false>;
  launch("moe_ffn_up_kernel", up, dim3(blocks_of(a.I), E), dim3(kThreads), stream, a);
  const bool down_packs = packable<T>(a.down, a.I, a.down_stride_i, {a.down_stride_e, a.down_stride_o});
  const auto down = down_packs ? moe_ffn_down_kernel<T, true> : moe_ffn_down_kernel<T, false>;
  launch("moe_ffn_down_kernel", down, dim3(blocks_of(a.O), E), dim3(kThreads), stream, a);
  launch("moe_ffn_sum_kernel", moe_ffn_sum_kernel<T>, dim3(grid_for(a.T)), dim3(kThreads), stream, a);
}

}  // namespace

std::int64_t moe_ffn_workspace_cuda(const MoeFfnArgs& args) { return Layout(args).bytes; }

void moe_ffn_cuda(const MoeFfnArgs& a, int device, void* stream) {
  EFFVLM_CHECK(a.E <= kMaxExperts && a.K <= kMaxChoices,
               "moe_ffn: expected at most %d experts and %d choices on CUDA, got %lld and %lld", kMaxExperts, kMaxChoices,
               static_cast<long long>(a.E), static_cast<long long>(a.K));
  if (a.O == 0) return;
  const DeviceGuard guard(device);
  base::by_float_dtype("moe_ffn", a.dtype, [&](auto type) { run<typename decltype(type)::type>(a, stream); });
}

}  // namespace effvlm
