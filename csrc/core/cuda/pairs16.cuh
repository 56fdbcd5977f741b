// Dot products of 64 rows with 64 others in f16 or bf16 on tensor cores, sums in f32, by a block of 256 threads: warp w has rows
// 16·(w / 2) … + 15 of the one side and 32·(w % 2) … + 31 of the other.
#pragma once
#include <cstdint>

#include "core/cuda/mma.cuh"

namespace effvlm {
namespace {

constexpr int kPairRows = 64, kPairDepth = 32;  // depth: channels staged at a time

template <class T>
struct alignas(16) PairStage {  // of one side, in shared memory, two steps; + 8: rows that are read together, different banks
  T at[2][kPairRows][kPairDepth + 8];
};

// A row of one side: of four threads, that of number threadIdx.x / 4.
template <class T>
struct PairRow {
  const T* x;
  std::int64_t channels, stride;  // no channels: the row is zeros
};

// Whether rows may be copied 16 bytes at a time.
inline bool pair_packs(const void* x, std::int64_t stride_b, std::int64_t stride_n, std::int64_t stride_c) {
  return stride_c == 1 && stride_n % 8 == 0 && stride_b % 8 == 0 && reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
}

// kPairDepth channels of every row into one step of a stage: 4 threads per row, 8 neighbouring channels each.
template <class T>
__device__ __forceinline__ void stage_pair_rows(const PairRow<T>& row, std::int64_t c0, bool packs, T (*stage)[kPairDepth + 8]) {
  const std::int64_t first = c0 + threadIdx.x % 4 * 8, left = first < row.channels ? row.channels - first : 0;
  const T* x = row.x + (left ? first * row.stride : 0);
  T* to = &stage[threadIdx.x / 4][threadIdx.x % 4 * 8];
  if (packs) {
    copy_async(to, x, static_cast<int>(left < 8 ? left : 8) * static_cast<int>(sizeof(T)));
  } else {
    for (int k = 0; k < 8; ++k) to[k] = k < left ? x[k * row.stride] : from_float<T>(0);
  }
}

// This warp's products of a staged step: sum[j] is the tile of the other side's rows 8j … 8j + 7.
template <class T>
__device__ __forceinline__ void multiply_pair_step(float (&sum)[4][4], const T (*rows)[kPairDepth + 8],
                                                   const T (*others)[kPairDepth + 8]) {
  const int lane = threadIdx.x % kWarp;
  for (int c = 0; c < kPairDepth; c += 16) {
    u32 x[4], y[4];
    load_matrices(x, &rows[lane % 16][c + lane / 16 * 8]);
    for (int pair = 0; pair < 4; pair += 2) {
      load_matrices(y, &others[8 * pair + lane / 16 * 8 + lane % 8][c + lane / 8 % 2 * 8]);
      multiply_16x8x16<T>(sum[pair], x, y[0], y[1]);
      multiply_16x8x16<T>(sum[pair + 1], x, y[2], y[3]);
    }
  }
}

// The place of sum[j][k] among the 64 rows of the one side, and of the other.
__device__ __forceinline__ int pair_row(int k) { return threadIdx.x / kWarp / 2 * 16 + threadIdx.x % kWarp / 4 + k / 2 * 8; }
__device__ __forceinline__ int pair_other(int j, int k) {
  return threadIdx.x / kWarp % 2 * 32 + 8 * j + threadIdx.x % kWarp % 4 * 2 + k % 2;
}

// sum += products over all C channels; copies of the next step are under way while one is multiplied. For whole blocks.
template <class T>
__device__ __forceinline__ void multiply_pairs(float (&sum)[4][4], const PairRow<T>& row, const PairRow<T>& other, std::int64_t C,
                                               bool packs, PairStage<T>& rows, PairStage<T>& others) {
  const int steps = static_cast<int>((C + kPairDepth - 1) / kPairDepth), warp = threadIdx.x / kWarp;
  const auto stage = [&](int step) {
    if (step < steps) {
      stage_pair_rows(row, static_cast<std::int64_t>(step) * kPairDepth, packs, rows.at[step % 2]);
      stage_pair_rows(other, static_cast<std::int64_t>(step) * kPairDepth, packs, others.at[step % 2]);
    }
    copy_commit();
  };
  stage(0);
  for (int step = 0; step < steps; ++step) {
    stage(step + 1);
    copy_wait<1>();
    __syncthreads();  // this step is staged
    multiply_pair_step<T>(sum, rows.at[step % 2] + warp / 2 * 16, others.at[step % 2] + warp % 2 * 32);
    __syncthreads();  // everyone is through with it before it is overwritten
  }
}

}  // namespace
}  // namespace effvlm
