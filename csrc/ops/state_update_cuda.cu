#include "core/cuda/launch.cuh"
#include "core/dispatch.h"
#include "ops/state_update.h"

namespace effvlm {
namespace {

using i64 = std::int64_t;

constexpr int kThreads = 256, kRows = kThreads / kWarp;

template <class T>
__device__ __forceinline__ float value(const void* p, Dtype dtype, i64 at) {
  return dtype == Dtype::f32 ? static_cast<const float*>(p)[at] : to_float(static_cast<const T*>(p)[at]);
}

// Divides v by its length, in shared memory; every warp for itself adds up all of it.
__device__ __forceinline__ void normalize(float* v, i64 N) {
  float squares = 0;
  for (i64 n = threadIdx.x % kWarp; n < N; n += kWarp) squares += v[n] * v[n];
  const float factor = 1 / sqrtf(warp_sum(squares) + 1e-6f);
  __syncthreads();  // everyone has added before anyone divides
  for (i64 n = threadIdx.x; n < N; n += kThreads) v[n] *= factor;
}

// t of one element: its step.
template <class T>
__device__ __forceinline__ float step(const StateUpdateArgs& a, i64 s, i64 h, i64 p, i64 n) {
  float t = value<T>(a.dt, a.dt_dtype, s * a.dt_stride_s + h * a.dt_stride_h + p * a.dt_stride_p + n * a.dt_stride_n);
  if (a.dt_bias)
    t += value<T>(a.dt_bias, a.dt_bias_dtype, h * a.dt_bias_stride_h + p * a.dt_bias_stride_p + n * a.dt_bias_stride_n);
  return a.dt_softplus && t <= 20 ? log1pf(expf(t)) : t;  // beyond 20 they are the same number
}

// A row of the state by one warp; returns Σ_n state·C to all its lanes.
template <class T, class State>
__device__ __forceinline__ float update_row(const StateUpdateArgs& a, i64 s, i64 h, i64 p, float x, const float* B,
                                            const float* C) {
  State* state = static_cast<State*>(a.state) + s * a.state_stride_s + h * a.state_stride_h + p * a.state_stride_p;
  const auto decayed = [&](i64 n, float t) {
    const float A = !a.A ? 1.0f : value<T>(a.A, a.A_dtype, h * a.A_stride_h + p * a.A_stride_p + n * a.A_stride_n);
    return expf(t * A) * to_float(state[n * a.state_stride_n]);
  };
  const int lane = threadIdx.x % kWarp;
  float change = 0, sum = 0;
  if (a.beta) {
    float recalled = 0;
    for (i64 n = lane; n < a.N; n += kWarp) recalled = fmaf(decayed(n, step<T>(a, s, h, p, n)), B[n], recalled);
    change = value<T>(a.beta, a.beta_dtype, s * a.beta_stride_s + h * a.beta_stride_h) * (x - warp_sum(recalled));
  }
  for (i64 n = lane; n < a.N; n += kWarp) {
    const float t = step<T>(a, s, h, p, n), after = fmaf(a.beta ? change : t * x, B[n], decayed(n, t));
    state[n * a.state_stride_n] = from_float<State>(after);
    sum = fmaf(after, C[n], sum);
  }
  return warp_sum(sum);
}

// Block ↔ eight rows of one head, warp ↔ row.
template <class T, class State>
__global__ void __launch_bounds__(kThreads) state_update_kernel(StateUpdateArgs a) {
  __shared__ float B[kStateMaxN], C[kStateMaxN];
  const i64 slices = (a.P + kRows - 1) / kRows, tasks = a.S * a.H * slices;
  for (i64 task = blockIdx.x; task < tasks; task += gridDim.x) {
    const i64 p = task % slices * kRows + threadIdx.x / kWarp, h = task / slices % a.H, s = task / slices / a.H;
    const i64 g = h / (a.H / a.G);
    const T* b = static_cast<const T*>(a.B) + s * a.B_stride_s + g * a.B_stride_g;
    const T* c = static_cast<const T*>(a.C) + s * a.C_stride_s + g * a.C_stride_g;
    for (i64 n = threadIdx.x; n < a.N; n += kThreads) B[n] = to_float(b[n * a.B_stride_n]), C[n] = to_float(c[n * a.C_stride_n]);
    __syncthreads();  // B and C are complete
    if (a.l2norm) {
      normalize(B, a.N);
      normalize(C, a.N);
      __syncthreads();  // and normalised
    }
    if (p < a.P) {
      const float x = to_float(static_cast<const T*>(a.x)[s * a.x_stride_s + h * a.x_stride_h + p * a.x_stride_p]);
      float y = a.scale * update_row<T, State>(a, s, h, p, x, B, C);
      if (a.D) y = fmaf(value<T>(a.D, a.D_dtype, h * a.D_stride_h + p * a.D_stride_p), x, y);
      if (a.z) {
        const float z = to_float(static_cast<const T*>(a.z)[s * a.z_stride_s + h * a.z_stride_h + p * a.z_stride_p]);
        y *= z / (1 + expf(-z));
      }
      if (threadIdx.x % kWarp == 0) static_cast<T*>(a.out)[(s * a.H + h) * a.P + p] = from_float<T>(y);
    }
    __syncthreads();  // everyone is through with B and C before they are filled again
  }
}

}  // namespace

void state_update_cuda(const StateUpdateArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const dim3 grid(grid_for(a.S * a.H * ((a.P + kRows - 1) / kRows)));
  base::by_float_dtype("state_update", a.dtype, [&](auto type) {
    base::by_float_dtype("state_update", a.state_dtype, [&](auto state_type) {
      using T = typename decltype(type)::type;
      using State = typename decltype(state_type)::type;
      launch("state_update_kernel", state_update_kernel<T, State>, grid, dim3(kThreads), stream, a);
    });
  });
}

}  // namespace effvlm
