#include "core/cuda/launch.cuh"
#include "core/dispatch.h"
#include "ops/selective_scan.h"

namespace effvlm {
namespace {

using i64 = std::int64_t;

__device__ __forceinline__ i64 offset_of(const ScanTensor& x, i64 b, i64 k, i64 c, i64 l) {
  return b * x.stride_b + k * x.stride_k + c * x.stride_c + l * x.stride_l;
}

// The type is asked at every element: it is the same for all threads, and spares 81 instances of the kernel.
__device__ __forceinline__ float read(const ScanTensor& x, i64 offset) {
  if (x.dtype == Dtype::bf16) return to_float(static_cast<const bf16*>(x.data)[offset]);
  if (x.dtype == Dtype::f16) return to_float(static_cast<const f16*>(x.data)[offset]);
  return static_cast<const float*>(x.data)[offset];
}
__device__ __forceinline__ float read(const ScanTensor& x, i64 b, i64 k, i64 c, i64 l) {
  return read(x, offset_of(x, b, k, c, l));
}

__device__ __forceinline__ void write(const ScanTensor& x, i64 offset, float value) {
  if (x.dtype == Dtype::bf16)
    static_cast<bf16*>(x.data)[offset] = from_float<bf16>(value);
  else if (x.dtype == Dtype::f16)
    static_cast<f16*>(x.data)[offset] = from_float<f16>(value);
  else
    static_cast<float*>(x.data)[offset] = value;
}

__device__ __forceinline__ float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }
__device__ __forceinline__ float gated(const SelectiveScanArgs& a, float y, i64 b, i64 c, i64 l) {
  if (!a.z.data) return y;
  const float z = read(a.z, b, 0, c, l);
  return y * z / (1 + expf(-z));
}

// A run of a path: step i is at place + i·every.
struct Steps {
  i64 place, every;
  int count;
};

// P lanes of a channel, with Q of its states each.
template <int Q, int P>
struct Tile {
  static constexpr int kStates = Q * P, kChannels = P <= 4 ? 32 : P == 8 ? 16 : 8, kThreads = kChannels * P;
  static constexpr int kSteps = kStates <= 64 ? 32 : 2048 / kStates;
  static constexpr int kRow = kChannels + 1;  // odd: neither rows nor columns share a bank

  float u[kSteps][kRow], dt[kSteps][kRow], y[kSteps][kRow];
  float b[kSteps][kStates], c[kSteps][kStates];

  // f(step, channel) for all, by the threads in the order in which the tensor lies in memory.
  template <class F>
  __device__ static __forceinline__ void for_all(const ScanTensor& x, int steps, F&& f) {
    for (int e = threadIdx.x; e < kSteps * kChannels; e += kThreads) {
      const int step = x.stride_c == 1 ? e / kChannels : e % kSteps, c = x.stride_c == 1 ? e % kChannels : e / kSteps;
      if (step < steps) f(step, c);
    }
  }

  __device__ void load(const SelectiveScanArgs& a, i64 s, i64 k, i64 channel, Steps steps) {
    for_all(a.u, steps.count, [&](int i, int j) {
      u[i][j] = channel + j < a.D ? read(a.u, s, 0, channel + j, steps.place + i * steps.every) : 0.0f;
    });
    for_all(a.delta, steps.count, [&](int i, int j) {
      float x = 0;
      if (channel + j < a.D) {
        x = read(a.delta, s, k, channel + j, steps.place + i * steps.every);
        if (a.bias.data) x += read(a.bias, 0, k, channel + j, 0);
        if (a.softplus) x = softplus(x);
      }
      dt[i][j] = x;
    });
    for (int e = threadIdx.x; e < kSteps * kStates; e += kThreads) {
      const bool by_token = a.b.stride_c == 1;
      const int i = by_token ? e / kStates : e % kSteps, n = by_token ? e % kStates : e / kSteps;
      if (i >= steps.count) continue;
      b[i][n] = n < a.N ? read(a.b, s, k, n, steps.place + i * steps.every) : 0.0f;
      c[i][n] = n < a.N ? read(a.c, s, k, n, steps.place + i * steps.every) : 0.0f;
    }
  }

  // This lane's states q·P + lane through the steps.
  __device__ __forceinline__ void scan(int steps, const float* decay, float skip, float* h) {
    const int channel = threadIdx.x / P, lane = threadIdx.x % P;
    for (int i = 0; i < steps; ++i) {
      const float t = dt[i][channel], x = u[i][channel], in = t * x;
      float sum = 0;
#pragma unroll
      for (int q = 0; q < Q; ++q) {
        h[q] = fmaf(in, b[i][q * P + lane], exp2f(t * decay[q]) * h[q]);
        sum = fmaf(h[q], c[i][q * P + lane], sum);
      }
#pragma unroll
      for (int lanes = P / 2; lanes; lanes /= 2) sum += shuffle_xor(sum, lanes);
      if (lane == 0) y[i][channel] = skip != 0 ? fmaf(skip, x, sum) : sum;
    }
  }

  // Gated to out, or, where several paths meet, added to what the paths before have left in f32.
  __device__ void store(const SelectiveScanArgs& a, i64 s, i64 channel, Steps steps) {
    float* sums = static_cast<float*>(a.workspace);
    for_all(a.out, steps.count, [&](int i, int j) {
      if (channel + j >= a.D) return;
      const i64 c = channel + j, l = steps.place + i * steps.every;
      if (a.in_order)
        write(a.out, offset_of(a.out, s, 0, c, l), gated(a, y[i][j], s, c, l));
      else
        sums[(s * a.L + l) * a.D + c] += y[i][j];
    });
  }
};

// One path of one sequence, or, in order, the sequence.
template <int Q, int P>
__device__ void scan_path(const SelectiveScanArgs& a, Tile<Q, P>& tile, i64 s, i64 b, i64 k, i64 channel, const ScanPath& path) {
  const i64 mine = channel + threadIdx.x / P;
  float decay[Q], h[Q];
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const i64 n = q * P + threadIdx.x % P;
    const bool there = mine < a.D && n < a.N;
    decay[q] = there ? read(a.a, 0, k, mine, n) * 1.44269504f : 0.0f;
    h[q] = there && a.initial.data ? read(a.initial, s, k, mine, n) : 0.0f;
  }
  const float skip = mine < a.D && a.skip.data ? read(a.skip, 0, k, mine, 0) : 0.0f;
  for (i64 o = 0; o < path.outer; ++o)
    for (i64 i = 0; i < path.inner; i += Tile<Q, P>::kSteps) {
      const i64 left = path.inner - i;
      const Steps steps{path.offset + o * path.outer_stride + i * path.inner_stride, path.inner_stride,
                        left < Tile<Q, P>::kSteps ? static_cast<int>(left) : Tile<Q, P>::kSteps};
      tile.load(a, b, k, channel, steps);
      __syncthreads();  // the tile is complete
      tile.scan(steps.count, decay, skip, h);
      __syncthreads();  // y is complete, and the rest may be filled again
      tile.store(a, b, channel, steps);
    }
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const i64 n = q * P + threadIdx.x % P;
    if (mine < a.D && n < a.N) write(a.final, offset_of(a.final, s, k, mine, n), h[q]);
  }
}

// Block ↔ some channels of one sequence at a time.
template <int Q, int P>
__global__ void __launch_bounds__(Tile<Q, P>::kThreads, 512 / Tile<Q, P>::kThreads) selective_scan_kernel(SelectiveScanArgs a) {
  constexpr int kChannels = Tile<Q, P>::kChannels, kThreads = Tile<Q, P>::kThreads;
  __shared__ Tile<Q, P> tile;
  const i64 groups = (a.D + kChannels - 1) / kChannels;
  for (i64 task = blockIdx.x; task < a.S * groups; task += gridDim.x) {
    const i64 s = task / groups, channel = task % groups * kChannels;
    if (a.in_order) {
      i64 first = 0, last = a.L;
      if (a.starts) {
        first = a.starts[s * a.starts_stride], last = a.starts[(s + 1) * a.starts_stride];
        first = first < 0 ? 0 : first > a.L ? a.L : first, last = last < first ? first : last > a.L ? a.L : last;
      }
      scan_path(a, tile, s, a.starts ? 0 : s, 0, channel, ScanPath{1, last - first, first, 0, 1});
      __syncthreads();  // y is stored
      continue;
    }
    float* sums = static_cast<float*>(a.workspace) + s * a.L * a.D;
    const i64 count = a.D - channel < kChannels ? a.D - channel : kChannels;
    for (i64 e = threadIdx.x; e < a.L * count; e += kThreads) sums[e / count * a.D + channel + e % count] = 0;
    for (i64 k = 0; k < a.K; ++k) {
      __syncthreads();  // what is added to is there, y is stored
      scan_path(a, tile, s, s, k, channel, a.paths[k]);
    }
    __syncthreads();  // all paths' sums are there
    for (i64 e = threadIdx.x; e < a.L * count; e += kThreads) {
      const i64 l = e / count, c = channel + e % count;
      write(a.out, offset_of(a.out, s, 0, c, l), gated(a, sums[l * a.D + c], s, c, l));
    }
    __syncthreads();  // the sums are read before the next task's are cleared
  }
}

template <int Q, int P>
void scan_with(const SelectiveScanArgs& a, void* stream) {
  using T = Tile<Q, P>;
  const i64 tasks = a.S * ((a.D + T::kChannels - 1) / T::kChannels);
  launch("selective_scan_kernel", selective_scan_kernel<Q, P>, dim3(grid_for(tasks)), dim3(T::kThreads), stream, a);
}

}  // namespace

void selective_scan_cuda(const SelectiveScanArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  if (a.N == 1) return scan_with<1, 1>(a, stream);
  if (a.N <= 4) return scan_with<4, 1>(a, stream);
  if (a.N <= 16) return scan_with<4, 4>(a, stream);
  if (a.N <= 64) return scan_with<8, 8>(a, stream);
  scan_with<8, 32>(a, stream);
}

}  // namespace effvlm
