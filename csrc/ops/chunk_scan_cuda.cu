// The recurrence in chunks of 32 steps. A block takes a (sequence, head) and 32 or 64 columns of V, whose part of the state stays
// in its registers, f32, from the first step to the last. For each chunk:
//   1. over panels of 32 channels of K: scores q·k (and k·k for the delta rule), and what the state says to q (and to k);
//   2. scores get their decays; for the delta rule a unit lower triangular system gives what each step writes;
//   3. out = what the state said + causal scores · writes;
//   4. over the panels again: state = decay · state + keys · writes.
// Every product is made of tiles of 4×4 (or 4×2) per thread from 16-byte loads of shared memory: 4 or more products per loaded
// number. Blocks of the same head are neighbours, so that q and k, and the second reading of k, come from the caches.
//
// Decays are products of exp(d), each of them a factor of the recurrence itself, never differences of sums of d: whatever d is,
// nothing cancels, nothing overflows, and a step that forgets all is a factor of 0. Scores with decays per channel: inside halves
// of 16 steps the factor is multiplied up step by step (2 instructions per pair and channel, no exp); between halves it splits at
// the middle of the chunk into two factors of at most 1.
//
// Not done: when there are few heads, slices of V of 32 columns are what fills the device; two passes over chunks, the states
// between them first, would fill it for any shape. Nothing here has run on a GPU.
#include "core/check.h"
#include "core/cuda/launch.cuh"
#include "ops/chunk_scan.h"
#include "ops/chunk_scan_tile.cuh"

namespace effvlm {
namespace {

using i64 = std::int64_t;

constexpr int kLoad = 8;  // channels that a thread loads: 4 threads per step

// Steps of a head, 16 bytes at a time where `packs`.
struct Steps {
  const void* data;
  i64 stride_t, stride_c, count;  // count: channels
  Dtype dtype;
  bool packs;
};

__device__ __forceinline__ Steps steps_of(const ChunkScanArgs& a, const void* base, const i64* stride, i64 b, i64 h, i64 count,
                                          bool packs) {
  const i64 bytes = a.dtype == Dtype::f32 ? 4 : 2;
  return {static_cast<const char*>(base) + bytes * (b * stride[0] + h * stride[2]), stride[1], stride[3], count, a.dtype, packs};
}

// Up to 8 neighbouring channels of a step; zeros where there are none.
template <class T>
__device__ __forceinline__ void load_as(const Steps& from, i64 t, i64 channel, float (&x)[kLoad]) {
  const T* at = static_cast<const T*>(from.data) + t * from.stride_t + channel * from.stride_c;
  const i64 left = from.count - channel;
  if (from.packs && left >= kLoad) {
#pragma unroll
    for (int i = 0; i < kLoad; i += Pack<T>::size) {
      const Pack<T> pack = load_pack(at + i);
#pragma unroll
      for (int e = 0; e < Pack<T>::size; ++e) x[i + e] = to_float(pack.element[e]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLoad; ++i) x[i] = i < left ? to_float(at[i * from.stride_c]) : 0.0f;
  }
}
__device__ __forceinline__ void load(const Steps& from, i64 t, i64 channel, float (&x)[kLoad]) {
  switch (from.dtype) {
    case Dtype::f16: return load_as<f16>(from, t, channel, x);
    case Dtype::bf16: return load_as<bf16>(from, t, channel, x);
    default: return load_as<float>(from, t, channel, x);
  }
}
__device__ __forceinline__ float load_one(const void* base, i64 at, Dtype dtype) {
  switch (dtype) {
    case Dtype::f16: return to_float(static_cast<const f16*>(base)[at]);
    case Dtype::bf16: return to_float(static_cast<const bf16*>(base)[at]);
    default: return static_cast<const float*>(base)[at];
  }
}
__device__ __forceinline__ void store_one(void* base, i64 at, Dtype dtype, float x) {
  switch (dtype) {
    case Dtype::f16: static_cast<f16*>(base)[at] = from_float<f16>(x); break;
    case Dtype::bf16: static_cast<bf16*>(base)[at] = from_float<bf16>(x); break;
    default: static_cast<float*>(base)[at] = x;
  }
}

// What a block works on: columns v0 … of a head of a sequence, its steps begin … end − 1 of batch entry b.
struct Task {
  i64 s, h, b, v0, begin, end;

  __device__ __forceinline__ Task(const ChunkScanArgs& a, int width) {
    const i64 slices = (a.V + width - 1) / width, head = blockIdx.x / slices;
    v0 = blockIdx.x % slices * width, h = head % a.H, s = head / a.H;
    b = s, begin = 0, end = a.L;
    if (!a.cu_seqlens) return;
    const i64 first = a.cu_seqlens[s], last = a.cu_seqlens[s + 1];  // on a device nobody has checked them
    b = 0, begin = first < 0 ? 0 : first, end = last > a.L ? a.L : last;
  }
};

// The thread's places in a panel of the state that exist, with their offsets from the head's first place in a tensor.
template <int kColumns, class F>
__device__ __forceinline__ void each_of_state(const ChunkScanArgs& a, const Task& task, int panel, i64 stride_k, i64 stride_v,
                                              F&& f) {
  const int channel = panel * kPanel + first_row(), column = static_cast<int>(task.v0) + first_column<kColumns>();
  const int rows = static_cast<int>(a.K) - channel, columns = static_cast<int>(a.V) - column;
  i64 at = channel * stride_k + column * stride_v;
#pragma unroll
  for (int r = 0; r < kRows; ++r, at += stride_k)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      if (r < rows && j < columns) f(r, j, at + j * stride_v);
}

// Decay and strength of each step, by the first warp; steps after the last decay by 1 and write nothing.
template <class Shared>
__device__ __forceinline__ void load_steps(const ChunkScanArgs& a, const Task& task, i64 first, int count, Shared& sh) {
  const int l = threadIdx.x;
  if (l >= kSteps) return;
  const i64 t = first + l;
  const float* strength = a.beta ? a.beta : a.gain;
  const i64* stride = a.beta ? a.beta_stride : a.gain_stride;
  sh.strength[l] = l >= count ? 0.0f : strength ? strength[task.b * stride[0] + t * stride[1] + task.h * stride[2]] : 1.0f;
  if constexpr (!Shared::kChannel) {
    const i64* s = a.decay_stride;
    sh.step[l] = l < count ? expf(a.log_decay[task.b * s[0] + t * s[1] + task.h * s[2]]) : 1.0f;
    __syncwarp();  // all 32 are there
    float since = 1, until = 1;
    for (int i = 0; i < kSteps; ++i) {
      if (i <= l) {
        since *= sh.step[i];
      } else {
        until *= sh.step[i];
      }
    }
    sh.since[l] = since, sh.until[l] = until;
  }
}

// 4 threads per step, 8 channels each, into a row of shared memory, times a factor. Returns the sum of squares.
__device__ __forceinline__ float load_row(const Steps& from, i64 first, int count, int panel, float factor, float (*to)[kPitch]) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * kLoad;
  float x[kLoad] = {}, squares = 0;
  if (row < count) load(from, first + row, panel * kPanel + column, x);
#pragma unroll
  for (int i = 0; i < kLoad; ++i) {
    squares += x[i] * x[i];
    x[i] *= factor;
  }
#pragma unroll
  for (int i = 0; i < kLoad; i += 4) Floats<4>{x[i], x[i + 1], x[i + 2], x[i + 3]}.store(&to[row][column + i]);
  return squares;
}

// exp(d) of a panel; 1 where there is no such step or channel.
template <class Shared>
__device__ __forceinline__ void load_decays(const Steps& from, i64 first, int count, int panel, Shared& sh) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * kLoad;
  float x[kLoad] = {};
  if (row < count) load(from, first + row, panel * kPanel + column, x);
#pragma unroll
  for (int i = 0; i < kLoad; i += 4)
    Floats<4>{expf(x[i]), expf(x[i + 1]), expf(x[i + 2]), expf(x[i + 3])}.store(&sh.decay[row][column + i]);
}

// 1/‖x‖ of a step, from four threads' sums of squares; 1 without l2norm.
__device__ __forceinline__ void put_unit(bool l2norm, float squares, float* unit) {
  squares += shuffle_xor(squares, 1);
  squares += shuffle_xor(squares, 2);
  if (threadIdx.x % 4 == 0) unit[threadIdx.x / 4] = l2norm ? 1 / sqrtf(squares + 1e-6f) : 1.0f;
}

// What each step writes, but for what the delta rule subtracts on account of earlier steps of the chunk.
template <class Shared, class Sum>
__device__ __forceinline__ void put_writes(const ChunkScanArgs& a, const Task& task, i64 first, int count, const Sum& sum,
                                           Shared& sh) {
  constexpr int kColumns = Shared::kV / 16;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int l = first_row() + r;
    const i64 at = task.b * a.v_stride[0] + (first + l) * a.v_stride[1] + task.h * a.v_stride[2];
    Floats<kColumns> write{};
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const i64 column = task.v0 + first_column<kColumns>() + j;
      if (l >= count || column >= a.V) continue;
      float v = load_one(a.v, at + column * a.v_stride[3], a.dtype);
      if constexpr (Shared::kDelta) v -= (Shared::kChannel ? 1.0f : sh.since[l]) * sh.k_unit[l] * sum.old[r][j];
      write.x[j] = sh.strength[l] * v;
    }
    write.store(&sh.write[l][first_column<kColumns>()]);
  }
}

template <class Shared, int kColumns>
__device__ __forceinline__ void store_out(const ChunkScanArgs& a, const Task& task, i64 first, int count, const Shared& sh,
                                          const float (&out)[kRows][kColumns]) {
  const float skip = a.skip ? a.skip[task.h * a.skip_stride] : 0.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int l = first_row() + r;
    const i64 t = first + l;
    if (l >= count) break;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const i64 column = task.v0 + first_column<kColumns>() + j;
      if (column >= a.V) break;
      float x = a.scale * sh.q_unit[l] * out[r][j];
      if (a.skip) {
        const i64 at = task.b * a.v_stride[0] + t * a.v_stride[1] + task.h * a.v_stride[2] + column * a.v_stride[3];
        x += skip * load_one(a.v, at, a.dtype);
      }
      store_one(a.out, ((task.b * a.L + t) * a.H + task.h) * a.V + column, a.dtype, x);
    }
  }
}

template <class Shared, int kColumns>
__device__ __forceinline__ void put_state(const float (&state)[kRows][kColumns], Shared& sh) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    Floats<kColumns> row;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) row.x[j] = state[r][j];
    row.store(&sh.state[first_row() + r][first_column<kColumns>()]);
  }
}

// Block ↔ (sequence, head, kV columns), at most kPanels panels of channels.
template <int kPanels, int kV, bool kChannel, bool kDelta>
__global__ void __launch_bounds__(kThreads, 2) chunk_scan_kernel(ChunkScanArgs a, bool packs) {
  __shared__ ScanShared<kV, kChannel, kDelta> sh;
  constexpr int kColumns = kV / 16;
  const Task task(a, kV);
  const i64 g = task.h / (a.H / a.G);
  const Steps q = steps_of(a, a.q, a.q_stride, task.b, g, a.K, packs), k = steps_of(a, a.k, a.k_stride, task.b, g, a.K, packs);
  const Steps decay{a.log_decay + task.b * a.decay_stride[0] + task.h * a.decay_stride[2],
                    a.decay_stride[1],
                    a.decay_stride[3],
                    a.K,
                    Dtype::f32,
                    false};
  const int K = static_cast<int>(a.K), panels = (K + kPanel - 1) / kPanel;
  float state[kPanels][kRows][kColumns] = {};
  if (a.initial_state) {
    const float* from = a.initial_state + task.s * a.initial_stride[0] + task.h * a.initial_stride[1];
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
      each_of_state<kColumns>(a, task, p, a.initial_stride[2], a.initial_stride[3],
                              [&](int r, int j, i64 at) { state[p][r][j] = from[at]; });
  }
  for (i64 first = task.begin; first < task.end; first += kSteps) {
    const int count = static_cast<int>(task.end - first < kSteps ? task.end - first : kSteps);
    load_steps(a, task, first, count, sh);
    Sums<kColumns, kChannel, kDelta> sum;
    float q_squares = 0, k_squares = 0;
#pragma unroll 1
    for (int panel = 0; panel < panels; ++panel) {
      q_squares += load_row(q, first, count, panel, 1, sh.q);
      k_squares += load_row(k, first, count, panel, 1, sh.k);
      if constexpr (kChannel) load_decays(decay, first, count, panel, sh);
#pragma unroll
      for (int p = 0; p < kPanels; ++p)
        if (p == panel) put_state(state[p], sh);
      const int channels = min(kPanel, K - panel * kPanel);
      __syncthreads();  // the panel is there
      if constexpr (kChannel) {
        add_near_scores(sh, channels, panel == 0);
        __syncthreads();  // everyone has read q and k as they were
        scale_panel(sh);
        __syncthreads();  // they are decayed
      }
      multiply_scores(sh, channels, sum);
      multiply_state(sh, channels, sum);
      __syncthreads();  // everyone is through with the panel
    }
    put_unit(a.l2norm, q_squares, sh.q_unit);
    put_unit(a.l2norm, k_squares, sh.k_unit);
    __syncthreads();  // norms are there
    finish_scores(sh, sum);
    put_writes(a, task, first, count, sum, sh);
    __syncthreads();  // scores are complete, and writes, without the delta rule
    if constexpr (kDelta) {
      solve(sh);
      __syncthreads();  // with it
    }
    if constexpr (!kChannel)
      for (int r = 0; r < kRows; ++r)
        for (int j = 0; j < kColumns; ++j) sum.out[r][j] *= sh.since[first_row() + r];
    multiply_writes(sh, sum.out);
    store_out(a, task, first, count, sh, sum.out);
    const int row = threadIdx.x / 4;
#pragma unroll 1
    for (int panel = 0; panel < panels; ++panel) {
      load_row(k, first, count, panel, kChannel ? sh.k_unit[row] : sh.k_unit[row] * sh.until[row], sh.k);
      if constexpr (kChannel) {
        load_decays(decay, first, count, panel, sh);
        __syncthreads();  // keys and decays are there
        scale_keys(sh);
      }
      __syncthreads();  // keys are decayed
#pragma unroll
      for (int p = 0; p < kPanels; ++p)
        if (p == panel) update_state(sh, count, K - p * kPanel, state[p]);
      __syncthreads();  // everyone is through with them
    }
  }
  float* to = a.final_state + (task.s * a.H + task.h) * a.K * a.V;
#pragma unroll
  for (int p = 0; p < kPanels; ++p)
    each_of_state<kColumns>(a, task, p, a.V, 1, [&](int r, int j, i64 at) { to[at] = state[p][r][j]; });
}

// Whether 16 / size neighbouring channels of every step are 16 aligned bytes.
bool packable(const ChunkScanArgs& a, const void* x, const i64* stride) {
  const i64 many = a.dtype == Dtype::f32 ? 4 : 8;
  return stride[3] == 1 && (stride[0] | stride[1] | stride[2]) % many == 0 && reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
}

template <int kPanels, int kV>
void run(const ChunkScanArgs& a, void* stream) {
  const i64 blocks = a.S * a.H * ((a.V + kV - 1) / kV);
  EFFVLM_CHECK(blocks <= 0x7fffffff, "chunk_scan: expected at most 2^31 − 1 blocks, got %lld", static_cast<long long>(blocks));
  const bool packs = packable(a, a.q, a.q_stride) && packable(a, a.k, a.k_stride);
  const auto kernel =
      a.beta ? (a.per_channel ? chunk_scan_kernel<kPanels, kV, true, true> : chunk_scan_kernel<kPanels, kV, false, true>)
             : (a.per_channel ? chunk_scan_kernel<kPanels, kV, true, false> : chunk_scan_kernel<kPanels, kV, false, false>);
  launch("chunk_scan_kernel", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, a, packs);
}

}  // namespace

std::int64_t chunk_scan_workspace_cuda(const ChunkScanArgs&) { return 0; }

void chunk_scan_cuda(const ChunkScanArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  // Wide slices do less work twice (scores), but there must be enough of them for every multiprocessor.
  const bool wide = a.V > 32 && a.S * a.H * ((a.V + 63) / 64) >= multiprocessors(device);
  if (a.K > 128) {
    run<8, 32>(a, stream);
  } else if (wide) {
    run<4, 64>(a, stream);
  } else {
    run<4, 32>(a, stream);
  }
}

}  // namespace effvlm
