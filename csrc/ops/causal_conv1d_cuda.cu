#include "core/cuda/launch.cuh"
#include "core/dispatch.h"
#include "ops/causal_conv1d.h"

namespace effvlm {
namespace {

using i64 = std::int64_t;

constexpr int kThreads = 256;
constexpr int kPiece = 1024;  // outputs of one channel that a block makes from one tile, where L is contiguous
constexpr int kSteps = 32;    // outputs of one channel that a thread makes one after the other, where D is

struct Sequence {
  i64 s, begin, end;
};

__device__ __forceinline__ i64 bound(const CausalConv1dArgs& a, i64 s) {
  const i64 at = a.cu_seqlens[s * a.cu_seqlens_stride];
  return at < 0 ? 0 : at > a.L ? a.L : at;
}

__device__ __forceinline__ Sequence sequence(const CausalConv1dArgs& a, i64 s) {
  if (!a.cu_seqlens) return {s, 0, a.L};
  return {s, bound(a, s), bound(a, s + 1)};
}

// The sequence that input t of batch entry b belongs to: the last one that begins at or before t.
__device__ __forceinline__ Sequence sequence_at(const CausalConv1dArgs& a, i64 b, i64 t) {
  if (!a.cu_seqlens) return {b, 0, a.L};
  i64 low = 0, high = a.S;
  while (high - low > 1) {
    const i64 middle = (low + high) / 2;
    if (bound(a, middle) <= t)
      low = middle;
    else
      high = middle;
  }
  return sequence(a, low);
}

template <class T>
__device__ __forceinline__ float value(const void* p, Dtype dtype, i64 at) {
  return dtype == Dtype::f32 ? static_cast<const float*>(p)[at] : to_float(static_cast<const T*>(p)[at]);
}

// Output t of channel d; read(p): input p of this channel.
template <class T, class Read>
__device__ __forceinline__ T output(const CausalConv1dArgs& a, const Sequence& in, i64 d, i64 t, Read&& read) {
  float y = a.bias ? value<T>(a.bias, a.bias_dtype, d * a.bias_stride) : 0;
  for (i64 w = 0; w < a.W; ++w) {
    const i64 p = t - a.W + 1 + w;
    float x = 0;
    if (p >= in.begin)
      x = read(p);
    else if (a.state)
      x = value<T>(a.state, a.state_dtype,
                   in.s * a.state_stride_s + d * a.state_stride_d + (a.M + p - in.begin) * a.state_stride_m);
    y = fmaf(value<T>(a.weight, a.weight_dtype, d * a.weight_stride_d + w * a.weight_stride_w), x, y);
  }
  return from_float<T>(a.silu ? y / (1 + expf(-y)) : y);
}

// Block ↔ a piece of one channel, which is read once, with the W−1 inputs before it.
template <class T>
__global__ void __launch_bounds__(kThreads) causal_conv1d_inputs_kernel(CausalConv1dArgs a) {
  __shared__ float tile[kConvMaxWidth + kPiece];
  const i64 pieces = (a.L + kPiece - 1) / kPiece, tasks = a.B * a.D * pieces;
  for (i64 task = blockIdx.x; task < tasks; task += gridDim.x) {
    const i64 first = task % pieces * kPiece, d = task / pieces % a.D, b = task / pieces / a.D;
    const i64 last = first + kPiece < a.L ? first + kPiece : a.L, start = first - a.W + 1;
    const T* x = static_cast<const T*>(a.x) + b * a.x_stride_b + d * a.x_stride_d;
    T* out = static_cast<T*>(a.out) + b * a.out_stride_b + d * a.out_stride_d;
    for (i64 p = start + threadIdx.x; p < last; p += kThreads)
      if (p >= 0) tile[p - start] = to_float(x[p * a.x_stride_l]);
    __syncthreads();  // the tile is complete
    for (i64 t = first + threadIdx.x; t < last; t += kThreads)
      out[t * a.out_stride_l] = output<T>(a, sequence_at(a, b, t), d, t, [&](i64 p) { return tile[p - start]; });
    __syncthreads();  // everyone is through with the tile before it is filled again
  }
}

// Thread ↔ one channel, some steps: threads side by side read inputs side by side, and the last W of them from the cache.
template <class T>
__global__ void __launch_bounds__(kThreads) causal_conv1d_channels_kernel(CausalConv1dArgs a) {
  const i64 pieces = (a.L + kSteps - 1) / kSteps, blocks = (a.D + kThreads - 1) / kThreads, tasks = a.B * blocks * pieces;
  for (i64 task = blockIdx.x; task < tasks; task += gridDim.x) {
    const i64 d = task % blocks * kThreads + threadIdx.x, first = task / blocks % pieces * kSteps, b = task / blocks / pieces;
    if (d >= a.D) continue;
    const i64 last = first + kSteps < a.L ? first + kSteps : a.L;
    const T* x = static_cast<const T*>(a.x) + b * a.x_stride_b + d * a.x_stride_d;
    T* out = static_cast<T*>(a.out) + b * a.out_stride_b + d * a.out_stride_d;
    for (i64 t = first; t < last; ++t)
      out[t * a.out_stride_l] = output<T>(a, sequence_at(a, b, t), d, t, [&](i64 p) { return to_float(x[p * a.x_stride_l]); });
  }
}

// Thread ↔ one row of the state, from its first column to its last: what moves forward is read before it is written over.
template <class T, class State>
__global__ void __launch_bounds__(kThreads) causal_conv1d_state_kernel(CausalConv1dArgs a) {
  const i64 rows = a.S * a.D, step = static_cast<i64>(gridDim.x) * kThreads;
  for (i64 row = static_cast<i64>(blockIdx.x) * kThreads + threadIdx.x; row < rows; row += step) {
    const i64 d = row % a.D;
    const Sequence in = sequence(a, row / a.D);
    const i64 length = in.end - in.begin, b = a.cu_seqlens ? 0 : in.s;
    State* state = static_cast<State*>(a.state) + in.s * a.state_stride_s + d * a.state_stride_d;
    const T* x = static_cast<const T*>(a.x) + b * a.x_stride_b + d * a.x_stride_d;
    for (i64 j = 0; j < a.M && length > 0; ++j) {
      const i64 from = j + length;
      state[j * a.state_stride_m] =
          from < a.M ? state[from * a.state_stride_m] : from_float<State>(to_float(x[(in.begin + from - a.M) * a.x_stride_l]));
    }
  }
}

template <class T>
void convolve(const CausalConv1dArgs& a, void* stream) {
  const i64 rows = a.B * a.D, channel_blocks = (a.D + kThreads - 1) / kThreads;
  if (a.x_stride_d == 1 && a.out_stride_d == 1)
    launch("causal_conv1d_channels_kernel", causal_conv1d_channels_kernel<T>,
           dim3(grid_for(a.B * channel_blocks * ((a.L + kSteps - 1) / kSteps))), dim3(kThreads), stream, a);
  else
    launch("causal_conv1d_inputs_kernel", causal_conv1d_inputs_kernel<T>, dim3(grid_for(rows * ((a.L + kPiece - 1) / kPiece))),
           dim3(kThreads), stream, a);
  if (!a.state) return;
  const dim3 grid(grid_for((a.S * a.D + kThreads - 1) / kThreads));
  if (a.state_dtype == Dtype::f32)
    launch("causal_conv1d_state_kernel", causal_conv1d_state_kernel<T, float>, grid, dim3(kThreads), stream, a);
  else
    launch("causal_conv1d_state_kernel", causal_conv1d_state_kernel<T, T>, grid, dim3(kThreads), stream, a);
}

}  // namespace

void causal_conv1d_cuda(const CausalConv1dArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  base::by_float_dtype("causal_conv1d", a.dtype, [&](auto type) { convolve<typename decltype(type)::type>(a, stream); });
}

}  // namespace effvlm
