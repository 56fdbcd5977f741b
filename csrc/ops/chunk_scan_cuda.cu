// The recurrence in chunks of 32 steps. A block takes a (sequence, head) and 32 or 64 columns of V, whose part of the state stays
// in its registers, f32, from the first step to the last. For each chunk:
//   1. over panels of 32 channels of K: scores q·k (and k·k for the delta rule), and what the state says to q (and to k);
//   2. scores get their decays; for the delta rule a unit lower triangular system gives what each step writes;
//   3. out = what the state said + causal scores · writes;
//   4. over the panels again: state = decay · state + keys · writes.
// Every product is made of tiles of 4×4 (or 4×2) per thread from 16-byte loads of shared memory, 4 or more products per loaded
// number. Panels are fetched into registers one ahead of their use, across the whole scan, since a block waits for nobody else:
// two blocks (256 threads) are what fits into the registers of a multiprocessor. Blocks of the same head are neighbours, so that
// q and k, and the second reading of k, come from the caches. Shared memory is static, less than 48 KB on every architecture.
//
// Decays are products of exp(d), each of them a factor of the recurrence itself, never differences of sums of d: whatever d is,
// nothing cancels, nothing overflows, and a step that forgets all is a factor of 0. Scores with decays per channel: inside halves
// of 16 steps the factor is multiplied up step by step (2 or 3 instructions per pair and channel, no exp); between halves it
// splits at the middle of the chunk into two factors of at most 1. Norms are factors of rows and columns of what is already
// summed.
//
// Not done: tensor cores (scores of 16-bit q and k are exact products; products with the state need its f32 split into parts);
// and, where heads are few, two passes over chunks, the states between them first: so far slices of V of 32 columns are all that
// spreads a head over the device. Nothing here has run on a GPU.
#include "core/check.h"
#include "core/cuda/launch.cuh"
#include "ops/chunk_scan_load.cuh"

namespace effvlm {
namespace {

template <class Shared>
__device__ __forceinline__ void put_steps(const NextSteps& next, Shared& sh) {
  const int l = threadIdx.x;
  if (l >= kSteps) return;
  sh.strength[l] = next.strength;
  if constexpr (!Shared::kChannel) {
    sh.step[l] = expf(next.log_decay);
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

// A step's 8 channels of a thread, times a factor, into a row of shared memory. Returns their sum of squares.
__device__ __forceinline__ float put_row(const Words& from, Dtype dtype, float factor, float (*to)[kPitch]) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * kLoad;
  float x[kLoad], squares = 0;
  to_floats(from, dtype, x);
#pragma unroll
  for (int i = 0; i < kLoad; ++i) {
    squares += x[i] * x[i];
    x[i] *= factor;
  }
#pragma unroll
  for (int i = 0; i < kLoad; i += 4) Floats<4>{x[i], x[i + 1], x[i + 2], x[i + 3]}.store(&to[row][column + i]);
  return squares;
}
template <class Shared>
__device__ __forceinline__ void put_decays(const Words& from, Shared& sh) {
  const int row = threadIdx.x / 4, column = threadIdx.x % 4 * kLoad;
  float x[kLoad];
  to_floats(from, Dtype::f32, x);
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
template <class Shared, class Sum, int kColumns>
__device__ __forceinline__ void put_writes(const float (&v)[kRows][kColumns], const Sum& sum, Shared& sh) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int l = first_row() + r;
    Floats<kColumns> write;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      float rest = v[r][j];
      if constexpr (Shared::kDelta) rest -= (Shared::kChannel ? 1.0f : sh.since[l]) * sh.k_unit[l] * sum.old[r][j];
      write.x[j] = sh.strength[l] * rest;
    }
    write.store(&sh.write[l][first_column<kColumns>()]);
  }
}

template <class Shared, int kColumns>
__device__ __forceinline__ void store_out(const ChunkScanArgs& a, const Task& task, i64 first, int count, const Shared& sh,
                                          const float (&v)[kRows][kColumns], const float (&out)[kRows][kColumns]) {
  const float skip = a.skip ? a.skip[task.h * a.skip_stride] : 0.0f;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int l = first_row() + r;
    if (l >= count) break;
    const i64 column = task.v0 + first_column<kColumns>();
    const i64 at = ((task.b * a.L + first + l) * a.H + task.h) * a.V + column;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      if (column + j >= a.V) break;
      const float x = a.scale * sh.q_unit[l] * out[r][j];
      store_one(a.out, at + j, a.dtype, a.skip ? x + skip * v[r][j] : x);
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
__global__ void __launch_bounds__(kThreads, 2) chunk_scan_kernel(ChunkScanArgs a, bool packs, bool decay_packs) {
  __shared__ ScanShared<kV, kChannel, kDelta> sh;
  constexpr int kColumns = kV / 16;
  const Task task(a, kV);
  float state[kPanels][kRows][kColumns] = {};
  if (a.initial_state) {
    const float* from = a.initial_state + task.s * a.initial_stride[0] + task.h * a.initial_stride[1];
#pragma unroll
    for (int p = 0; p < kPanels; ++p)
      each_of_state<kColumns>(a, task, p, a.initial_stride[2], a.initial_stride[3],
                              [&](int r, int j, i64 at) { state[p][r][j] = from[at]; });
  }
  Stream<kChannel> stream(a, task, packs, decay_packs);
  NextSteps next(a, task, task.begin);
  const int K = static_cast<int>(a.K);
  for (i64 first = task.begin; first < task.end; first += kSteps) {
    const int count = static_cast<int>(task.end - first < kSteps ? task.end - first : kSteps);
    put_steps(next, sh);
    next = NextSteps(a, task, first + kSteps);
    Sums<kColumns, kChannel, kDelta> sum;
    float q_squares = 0, k_squares = 0, v[kRows][kColumns];
#pragma unroll 1
    for (int panel = 0; panel < stream.panels; ++panel) {
      q_squares += put_row(stream.next_q, a.dtype, 1, sh.q);
      k_squares += put_row(stream.next_k, a.dtype, 1, sh.k);
      if constexpr (kChannel) put_decays(stream.next_decay, sh);
      stream.advance();
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
    load_values(a, task, first, count, v);
    put_unit(a.l2norm, q_squares, sh.q_unit);
    put_unit(a.l2norm, k_squares, sh.k_unit);
    __syncthreads();  // norms are there
    finish_scores(sh, sum);
    put_writes(v, sum, sh);
    __syncthreads();  // scores are complete, and writes, without the delta rule
    if constexpr (kDelta) {
      solve(sh);
      __syncthreads();  // with it
    }
    multiply_writes(sh, sum.out);
    store_out(a, task, first, count, sh, v, sum.out);
    const int row = threadIdx.x / 4;
#pragma unroll 1
    for (int panel = 0; panel < stream.panels; ++panel) {
      put_row(stream.next_k, a.dtype, kChannel ? sh.k_unit[row] : sh.k_unit[row] * sh.until[row], sh.k);
      if constexpr (kChannel) put_decays(stream.next_decay, sh);
      stream.advance();
      __syncthreads();  // keys and decays are there
      if constexpr (kChannel) {
        scale_keys(sh);
        __syncthreads();  // keys are decayed
      }
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

// Whether 8 neighbouring channels of every step are 16-byte packs.
bool packable(const void* x, Dtype dtype, const i64* stride) {
  const i64 many = dtype == Dtype::f32 ? 4 : 8;
  return stride[3] == 1 && (stride[0] | stride[1] | stride[2]) % many == 0 && reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
}

template <int kPanels, int kV>
void run(const ChunkScanArgs& a, void* stream) {
  const i64 blocks = a.S * a.H * ((a.V + kV - 1) / kV);
  EFFVLM_CHECK(blocks <= 0x7fffffff, "chunk_scan: expected at most 2^31 − 1 blocks, got %lld", static_cast<long long>(blocks));
  const bool packs = packable(a.q, a.dtype, a.q_stride) && packable(a.k, a.dtype, a.k_stride);
  const bool decay_packs = packable(a.log_decay, Dtype::f32, a.decay_stride);
  const auto kernel =
      a.beta ? (a.per_channel ? chunk_scan_kernel<kPanels, kV, true, true> : chunk_scan_kernel<kPanels, kV, false, true>)
             : (a.per_channel ? chunk_scan_kernel<kPanels, kV, true, false> : chunk_scan_kernel<kPanels, kV, false, false>);
  launch("chunk_scan_kernel", kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), stream, a, packs, decay_packs);
}

}  // namespace

std::int64_t chunk_scan_workspace_cuda(const ChunkScanArgs&) { return 0; }

void chunk_scan_cuda(const ChunkScanArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  // Wide slices make fewer blocks compute the same scores, but there must be enough of them: a multiprocessor holds two.
  const bool wide = a.V > 32 && a.S * a.H * ((a.V + 63) / 64) >= 2 * multiprocessors(device);
  if (a.K > 128) {
    run<8, 32>(a, stream);
  } else if (wide) {
    run<4, 64>(a, stream);
  } else {
    run<4, 32>(a, stream);
  }
}

}  // namespace effvlm
