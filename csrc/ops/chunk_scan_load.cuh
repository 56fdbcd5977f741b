// What a block reads from global memory, panel by panel, one panel ahead of its use. Part of chunk_scan_cuda.cu.
#pragma once
#include "ops/chunk_scan.h"
#include "ops/chunk_scan_tile.cuh"

namespace effvlm {
namespace {

using i64 = std::int64_t;
using u32 = std::uint32_t;

constexpr int kLoad = 8;  // channels that a thread loads: 4 threads per step

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

// Steps of a head: (step, channel), 16 bytes at a time where `packs`.
struct Steps {
  const char* data;
  i64 stride_t, stride_c;
  int channels;
  Dtype dtype;
  bool packs;
};

__device__ __forceinline__ Steps steps_of(const void* base, Dtype dtype, const i64* stride, i64 b, i64 h, i64 channels,
                                          bool packs) {
  const i64 bytes = dtype == Dtype::f32 ? 4 : 2;
  return {static_cast<const char*>(base) + bytes * (b * stride[0] + h * stride[2]),
          stride[1],
          stride[3],
          static_cast<int>(channels),
          dtype,
          packs};
}

// 8 elements as they are in memory, in the first 4 words if of 16 bits.
struct Words {
  u32 word[kLoad];
};

template <class Element>
__device__ __forceinline__ Words load_as(const Steps& from, i64 t, int channel) {
  constexpr int kEach = 4 / sizeof(Element);  // in a word
  const Element* at = reinterpret_cast<const Element*>(from.data) + t * from.stride_t + channel * from.stride_c;
  const int left = from.channels - channel;
  Words x{};
  if (from.packs && left >= kLoad) {
#pragma unroll
    for (int i = 0; i < kLoad / kEach; i += 4) {
      const Pack<u32> pack = load_pack(reinterpret_cast<const u32*>(at) + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) x.word[i + e] = pack.element[e];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLoad; ++i)
      if (i < left) x.word[i / kEach] |= u32{at[i * from.stride_c]} << i % kEach * 16;
  }
  return x;
}
__device__ __forceinline__ Words load_words(const Steps& from, i64 t, int channel) {
  return from.dtype == Dtype::f32 ? load_as<u32>(from, t, channel) : load_as<std::uint16_t>(from, t, channel);
}

__device__ __forceinline__ void to_floats(const Words& from, Dtype dtype, float (&x)[kLoad]) {
#pragma unroll
  for (int i = 0; i < kLoad; ++i) {
    const auto half = static_cast<std::uint16_t>(from.word[i / 2] >> i % 2 * 16);
    if (dtype == Dtype::f32) {
      memcpy(&x[i], &from.word[i], 4);
    } else {
      x[i] = dtype == Dtype::f16 ? to_float(f16{half}) : to_float(bf16{half});
    }
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

// Panels in the order of their use: all of a chunk, then all once more, without q.
template <bool kChannel>
struct Stream {
  Steps q, k, decay;
  i64 first, end;
  int panel, panels;
  bool again;
  Words next_q, next_k, next_decay;

  __device__ __forceinline__ Stream(const ChunkScanArgs& a, const Task& task, bool packs, bool decay_packs)
      : q(steps_of(a.q, a.dtype, a.q_stride, task.b, task.h / (a.H / a.G), a.K, packs)),
        k(steps_of(a.k, a.dtype, a.k_stride, task.b, task.h / (a.H / a.G), a.K, packs)),
        decay(steps_of(a.log_decay, Dtype::f32, a.decay_stride, task.b, task.h, a.K, decay_packs)),
        first(task.begin),
        end(task.end),
        panel(0),
        panels(static_cast<int>((a.K + kPanel - 1) / kPanel)),
        again(false) {
    fetch();
  }

  __device__ __forceinline__ void fetch() {
    const i64 t = first + threadIdx.x / 4;
    const int channel = panel * kPanel + threadIdx.x % 4 * kLoad;
    next_k = Words{};
    if (!again) next_q = Words{};
    if constexpr (kChannel) next_decay = Words{};
    if (t >= end) return;
    next_k = load_words(k, t, channel);
    if (!again) next_q = load_words(q, t, channel);
    if constexpr (kChannel) next_decay = load_as<u32>(decay, t, channel);
  }

  // To be called when next_… have been put into shared memory; they are on their way while the panel is worked on.
  __device__ __forceinline__ void advance() {
    if (++panel == panels) {
      panel = 0;
      if (again) first += kSteps;
      again = !again;
    }
    fetch();
  }
};

// Decay and strength of the first warp's steps. Steps after the last decay by 1 and write nothing.
struct NextSteps {
  float log_decay, strength;

  __device__ __forceinline__ NextSteps(const ChunkScanArgs& a, const Task& task, i64 first) : log_decay(0), strength(0) {
    const i64 t = first + threadIdx.x;
    if (threadIdx.x >= kSteps || t >= task.end) return;
    const float* from = a.beta ? a.beta : a.gain;
    const i64 *s = a.beta ? a.beta_stride : a.gain_stride, *d = a.decay_stride;
    strength = from ? from[task.b * s[0] + t * s[1] + task.h * s[2]] : 1.0f;
    if (!a.per_channel) log_decay = a.log_decay[task.b * d[0] + t * d[1] + task.h * d[2]];
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

// The thread's values of a chunk; zeros where there are none.
template <int kColumns>
__device__ __forceinline__ void load_values(const ChunkScanArgs& a, const Task& task, i64 first, int count,
                                            float (&v)[kRows][kColumns]) {
  const i64 *s = a.v_stride, head = task.b * s[0] + task.h * s[2];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const int l = first_row() + r;
      const i64 column = task.v0 + first_column<kColumns>() + j;
      v[r][j] = l < count && column < a.V ? load_one(a.v, head + (first + l) * s[1] + column * s[3], a.dtype) : 0.0f;
    }
}

}  // namespace
}  // namespace effvlm
