// What a block holds in shared memory, and the products of a chunk of 32 steps. Part of chunk_scan_cuda.cu.
#pragma once
#include "core/cuda/device.cuh"

namespace effvlm {
namespace {

constexpr int kSteps = 32, kPanel = 32;  // steps of a chunk; channels of K that are staged at a time
constexpr int kThreads = 128;            // 8 × 16 threads with tiles of 4 rows
constexpr int kRows = 4, kHalf = kSteps / 2;
constexpr int kPitch = kPanel + 4;  // + 4: 16 bytes of neighbouring rows, different banks

// N floats, loaded at once.
template <int N>
struct alignas(4 * N) Floats {
  float x[N];
  __device__ __forceinline__ static Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
  __device__ __forceinline__ void store(float* to) const { *reinterpret_cast<Floats*>(to) = *this; }
};

template <int kWidth, bool kPerChannel, bool kDeltaRule>
struct ScanShared {
  static constexpr int kV = kWidth;
  static constexpr bool kChannel = kPerChannel, kDelta = kDeltaRule;

  // Panels (step, channel) of q, k and exp(d); if decays are per channel, `ahead` is k of the first half, decayed to its end.
  alignas(16) float q[kSteps][kPitch];
  alignas(16) float k[kSteps][kPitch];
  alignas(16) float decay[kChannel ? kSteps : 1][kPitch];
  alignas(16) float ahead[kChannel ? kHalf : 1][kPitch];
  alignas(16) float state[kPanel][kV];
  alignas(16) float write[kSteps][kV];                     // what each step adds to the state along its key
  alignas(16) float score[kSteps][kPitch];                 // (step, earlier step or itself): decayed q·k
  alignas(16) float overlap[kDelta ? kSteps : 1][kPitch];  // (step, later step): decayed k·k, times beta of the later one
  float q_unit[kSteps], k_unit[kSteps];                    // 1/‖q‖ and 1/‖k‖, or 1
  float step[kSteps], since[kSteps], until[kSteps];        // exp(d); its product from the chunk's start, and to its end
  float strength[kSteps];                                  // gain or beta
  float middle[kPanel], total[kPanel];                     // per channel: decay over the first half, and over the chunk
};

// Rows 4·row_group … + 3; kV/16 neighbouring columns.
__device__ __forceinline__ int first_row() { return kRows * static_cast<int>(threadIdx.x / 16); }
template <int kColumns>
__device__ __forceinline__ int first_column() {
  return kColumns * static_cast<int>(threadIdx.x % 16);
}

// What a thread adds up over the panels.
template <int kColumns, bool kChannel, bool kDelta>
struct Sums {
  static constexpr int kOthers = 2, kScoreRows = kChannel ? 1 : kRows;                    // see row() and other()
  float out[kRows][kColumns] = {}, old[kDelta ? kRows : 1][kColumns] = {};                // Sᵀq, Sᵀk of the chunk's first S
  float score[kScoreRows][kOthers] = {}, overlap[kDelta ? kScoreRows : 1][kOthers] = {};  // q·k, k·k

  // Scores are of steps row(r) and other(e). Per channel, these are only those of a step in the second half and one in the first.
  __device__ __forceinline__ static int row(int r) {
    return kChannel ? kHalf + static_cast<int>(threadIdx.x / 8) : first_row() + r;
  }
  __device__ __forceinline__ static int other(int e) {
    return kChannel ? static_cast<int>(threadIdx.x % 8) + 8 * e : static_cast<int>(threadIdx.x % 16) + 16 * e;
  }
};

__device__ __forceinline__ float dot(const Floats<4>& a, const Floats<4>& b, float sum) {
#pragma unroll
  for (int c = 0; c < 4; ++c) sum += a.x[c] * b.x[c];
  return sum;
}

// Scalar decay: raw products of a panel. Per channel: q and k are already decayed from the start of their half, by scale_panel.
template <class Shared, class Sum>
__device__ __forceinline__ void multiply_scores(const Shared& sh, int channels, Sum& sum) {
#pragma unroll 1
  for (int i = 0; i < channels; i += 4) {
    Floats<4> other[Sum::kOthers];
#pragma unroll
    for (int e = 0; e < Sum::kOthers; ++e)
      other[e] = Floats<4>::load(Shared::kChannel ? &sh.ahead[Sum::other(e)][i] : &sh.k[Sum::other(e)][i]);
#pragma unroll
    for (int r = 0; r < Sum::kScoreRows; ++r) {
      const auto q = Floats<4>::load(&sh.q[Sum::row(r)][i]);
#pragma unroll
      for (int e = 0; e < Sum::kOthers; ++e) sum.score[r][e] = dot(q, other[e], sum.score[r][e]);
      if constexpr (Shared::kDelta) {
        const auto k = Floats<4>::load(&sh.k[Sum::row(r)][i]);
#pragma unroll
        for (int e = 0; e < Sum::kOthers; ++e) sum.overlap[r][e] = dot(k, other[e], sum.overlap[r][e]);
      }
    }
  }
}

// What the chunk's first state says to q, and to k.
template <class Shared, class Sum>
__device__ __forceinline__ void multiply_state(const Shared& sh, int channels, Sum& sum) {
  constexpr int kColumns = Shared::kV / 16;
  const int row = first_row(), column = first_column<kColumns>();
#pragma unroll 1
  for (int i = 0; i < channels; i += 4) {
    Floats<4> q[kRows], k[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      q[r] = Floats<4>::load(&sh.q[row + r][i]);
      if constexpr (Shared::kDelta) k[r] = Floats<4>::load(&sh.k[row + r][i]);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      auto state = Floats<kColumns>::load(&sh.state[i + c][column]);
      const float decay = Shared::kChannel && row >= kHalf ? sh.middle[i + c] : 1.0f;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if constexpr (Shared::kChannel) state.x[j] *= decay;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          sum.out[r][j] += q[r].x[c] * state.x[j];
          if constexpr (Shared::kDelta) sum.old[r][j] += k[r].x[c] * state.x[j];
        }
      }
    }
  }
}

// Scores within halves, decays per channel: exp(a_l − a_s) cannot be split there without overflow, so it is multiplied up step
// by step. Four threads per key, every fourth channel each.
template <class Shared>
__device__ __forceinline__ void add_near_scores(Shared& sh, int channels, bool first) {
  const int s = threadIdx.x / 4, base = s / kHalf * kHalf, own = s % kHalf;
  float score[kHalf] = {}, overlap[Shared::kDelta ? kHalf : 1] = {};
#pragma unroll 1
  for (int i = threadIdx.x % 4; i < channels; i += 4) {
    float key = sh.k[s][i];
#pragma unroll
    for (int r = 0; r < kHalf; ++r) {
      if (r < own) continue;
      if (r > own) key *= sh.decay[base + r][i];
      score[r] += sh.q[base + r][i] * key;
      if constexpr (Shared::kDelta) overlap[r] += sh.k[base + r][i] * key;
    }
  }
#pragma unroll
  for (int r = 0; r < kHalf; ++r) {
    score[r] += shuffle_xor(score[r], 1);
    score[r] += shuffle_xor(score[r], 2);
    if constexpr (Shared::kDelta) {
      overlap[r] += shuffle_xor(overlap[r], 1);
      overlap[r] += shuffle_xor(overlap[r], 2);
    }
    if (r < own || threadIdx.x % 4) continue;
    sh.score[base + r][s] = (first ? 0.0f : sh.score[base + r][s]) + score[r];
    if constexpr (Shared::kDelta) sh.overlap[s][base + r] = (first ? 0.0f : sh.overlap[s][base + r]) + overlap[r];
  }
}

// Decays q and k from the start of their half, in place, and k of the first half to its end. Warp ↔ q or k of a half, lane ↔
// channel.
template <class Shared>
__device__ __forceinline__ void scale_panel(Shared& sh) {
  const int i = threadIdx.x % kWarp, job = threadIdx.x / kWarp, base = job % 2 * kHalf;
  if (job == 2) {
    float decay = 1;
    for (int r = kHalf - 1; r >= 0; --r) {
      sh.ahead[r][i] = sh.k[r][i] * decay;
      decay *= sh.decay[r][i];
    }
  }
  if (job >= 2 && !Shared::kDelta) return;
  auto& rows = job < 2 ? sh.q : sh.k;
  float decay = 1;
  for (int r = 0; r < kHalf; ++r) {
    decay *= sh.decay[base + r][i];
    rows[base + r][i] *= decay;
  }
  if (job == 0) sh.middle[i] = decay;
}

// Decays k to the end of the chunk, per channel. Warp ↔ 8 steps, lane ↔ channel.
template <class Shared>
__device__ __forceinline__ void scale_keys(Shared& sh) {
  const int i = threadIdx.x % kWarp, first = threadIdx.x / kWarp * 8;
  float decay = 1;
  for (int s = kSteps - 1; s >= first + 8; --s) decay *= sh.decay[s][i];
  for (int s = first + 7; s >= first; --s) {
    sh.k[s][i] *= decay;
    decay *= sh.decay[s][i];
  }
  if (first == 0) sh.total[i] = decay;
}

// Scores get their decays and norms; after this, score and overlap are complete in shared memory, zeros where s is not before l.
template <class Shared, class Sum>
__device__ __forceinline__ void finish_scores(Shared& sh, const Sum& sum) {
  if constexpr (Shared::kChannel) {
    for (int e = 0; e < Sum::kOthers; ++e) {
      sh.score[Sum::row(0)][Sum::other(e)] = sum.score[0][e];
      if constexpr (Shared::kDelta) sh.overlap[Sum::other(e)][Sum::row(0)] = sum.overlap[0][e];
    }
    __syncthreads();  // scores of different halves are beside those within halves
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = first_row(), s = threadIdx.x % 16 + 16 * e;
    float decay = 1;
    if constexpr (!Shared::kChannel)
      for (int t = s + 1; t <= row; ++t) decay *= sh.step[t];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int l = row + r;
      if constexpr (!Shared::kChannel)
        if (r > 0 && l > s) decay *= sh.step[l];
      const float factor = sh.k_unit[s] * decay;
      float score = 0, overlap = 0;
      if constexpr (Shared::kChannel) {
        if (s <= l) score = sh.score[l][s] * factor;
        if constexpr (Shared::kDelta)
          if (s < l) overlap = sh.overlap[s][l] * factor;
      } else {
        if (s <= l) score = sum.score[r][e] * factor;
        if constexpr (Shared::kDelta)
          if (s < l) overlap = sum.overlap[r][e] * factor;
      }
      sh.score[l][s] = score;
      if constexpr (Shared::kDelta) sh.overlap[s][l] = overlap * sh.k_unit[l] * sh.strength[l];
    }
  }
}

// The delta rule: step l writes β_l·(v_l − what the state says to k_l), of which `write` has all but what the chunk's earlier
// steps wrote. Thread ↔ column.
template <class Shared>
__device__ __forceinline__ void solve(Shared& sh) {
  const int j = threadIdx.x;
  if (j >= Shared::kV) return;
  const auto subtract = [&](const float* overlap, float earlier, int after, float (&write)[kHalf]) {
#pragma unroll
    for (int r = after / 4 * 4; r < kHalf; r += 4) {
      const auto part = Floats<4>::load(overlap + r);
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (r + c >= after) write[r + c] -= part.x[c] * earlier;
    }
  };
#pragma unroll 1
  for (int base = 0; base < kSteps; base += kHalf) {
    float write[kHalf];
#pragma unroll
    for (int r = 0; r < kHalf; ++r) write[r] = sh.write[base + r][j];
#pragma unroll 1
    for (int s = 0; s < base; ++s) subtract(&sh.overlap[s][base], sh.write[s][j], 0, write);
#pragma unroll
    for (int s = 0; s < kHalf - 1; ++s) subtract(&sh.overlap[base + s][base], write[s], s + 1, write);
#pragma unroll
    for (int r = 0; r < kHalf; ++r) sh.write[base + r][j] = write[r];
  }
}

// Decays what the state said, where q was not decayed before, and adds what the chunk itself wrote. Later steps must not touch
// earlier ones, not even as 0·NaN.
template <class Shared, int kColumns>
__device__ __forceinline__ void multiply_writes(const Shared& sh, float (&out)[kRows][kColumns]) {
  const int row = first_row(), column = first_column<kColumns>();
  if constexpr (!Shared::kChannel)
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) out[r][j] *= sh.since[row + r];
#pragma unroll 1
  for (int s = 0; s <= row; s += 4) {
    Floats<4> score[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) score[r] = Floats<4>::load(&sh.score[row + r][s]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const auto write = Floats<kColumns>::load(&sh.write[s + c][column]);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          if (s + c <= row + r) out[r][j] += score[r].x[c] * write.x[j];
    }
  }
}

// A panel of the state, 4 channels of a thread: decays over the chunk, then what `count` steps wrote. Channels from `channels` on
// do not exist and stay zero.
template <class Shared, int kColumns>
__device__ __forceinline__ void update_state(const Shared& sh, int count, int channels, float (&state)[kRows][kColumns]) {
  const int row = first_row(), column = first_column<kColumns>();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float decay = Shared::kChannel ? sh.total[row + r] : sh.since[kSteps - 1];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) state[r][j] *= decay;
  }
#pragma unroll 4
  for (int s = 0; s < count; ++s) {
    const auto key = Floats<4>::load(&sh.k[s][row]);
    const auto write = Floats<kColumns>::load(&sh.write[s][column]);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) state[r][j] += key.x[r] * write.x[j];
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
      if (row + r >= channels) state[r][j] = 0;
}

}  // namespace
}  // namespace effvlm
