// Products of a tile of rows and a tile of keys by a block of threads. Part of token_score_cuda.cu.
#pragma once
#include "core/cuda/mma.cuh"

namespace effvlm {
namespace {

using i64 = std::int64_t;

constexpr int kTile = 64;      // rows and keys of a tile
constexpr int kDepth = 16;     // channels staged at a time
constexpr int kDepth16 = 32;   // the same for 16-bit types
constexpr int kThreads = 256;  // 16 × 16 threads with 4 × 4 pairs each; in 16-bit types 4 × 2 warps with 16 × 32 pairs

template <class T>
struct Tokens {  // rows or keys of a head
  const T* data;
  i64 count, stride, stride_d;
};

// Which pairs of a tile a thread holds: sum[i][j] is row(i) and key(j). Threads with the same group hold the same rows, or keys.
struct PlainTile {
  using T = float;
  static constexpr int kRows = 4, kKeys = 4, kRowGroups = 16, kKeyGroups = 16;
  __device__ __forceinline__ static int row_group() { return threadIdx.x / 16; }
  __device__ __forceinline__ static int key_group() { return threadIdx.x % 16; }
  __device__ __forceinline__ static int row(int i) { return 4 * row_group() + i; }
  __device__ __forceinline__ static int key(int j) { return 4 * key_group() + j; }

  struct Stage {  // transposed; + 4: rows that are written together, different banks
    float rows[kDepth][kTile + 4], keys[kDepth][kTile + 4];
  };

  // 4 threads per token, 4 neighbouring channels each. Zeros outside the tensor.
  __device__ __forceinline__ static void stage(const Tokens<T>& x, i64 first, i64 c0, i64 D, float (*to)[kTile + 4]) {
    const int token = threadIdx.x / 4, column = threadIdx.x % 4 * 4;
    const bool exists = first + token < x.count;
    const T* from = x.data + (exists ? first + token : 0) * x.stride;
    for (int k = 0; k < 4; ++k) {
      const i64 c = c0 + column + k;
      to[column + k][token] = exists && c < D ? from[c * x.stride_d] : 0.0f;
    }
  }

  __device__ __forceinline__ static void multiply(const Tokens<T>& rows, i64 first_row, const Tokens<T>& keys, i64 first_key,
                                                  i64 D, bool, Stage& staged, float (&sum)[kRows][kKeys]) {
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kKeys; ++j) sum[i][j] = 0;
    for (i64 c0 = 0; c0 < D; c0 += kDepth) {
      stage(rows, first_row, c0, D, staged.rows);
      stage(keys, first_key, c0, D, staged.keys);
      __syncthreads();  // both tiles are staged
      for (int c = 0; c < kDepth; ++c)
        for (int i = 0; i < kRows; ++i)
          for (int j = 0; j < kKeys; ++j) sum[i][j] += staged.rows[c][row(i)] * staged.keys[c][key(j)];
      __syncthreads();  // everyone is through with them
    }
  }
};

template <class Element>
struct TensorTile {
  using T = Element;
  static constexpr int kRows = 2, kKeys = 8, kRowGroups = 32, kKeyGroups = 8;
  __device__ __forceinline__ static int lane() { return threadIdx.x % kWarp; }
  __device__ __forceinline__ static int upper() { return threadIdx.x / kWarp / 2 * 16; }  // the warp's first row
  __device__ __forceinline__ static int left() { return threadIdx.x / kWarp % 2 * 32; }   // and key
  __device__ __forceinline__ static int row_group() { return upper() / 2 + lane() / 4; }
  __device__ __forceinline__ static int key_group() { return left() / 8 + lane() % 4; }
  __device__ __forceinline__ static int row(int i) { return upper() + lane() / 4 + 8 * i; }
  __device__ __forceinline__ static int key(int j) { return left() + j / 2 * 8 + lane() % 4 * 2 + j % 2; }

  struct alignas(16) Stage {  // two steps at a time; + 8: rows that are read together, different banks
    T rows[2][kTile][kDepth16 + 8], keys[2][kTile][kDepth16 + 8];
  };

  // 4 threads per token, 8 neighbouring channels each.
  __device__ __forceinline__ static void stage(const Tokens<T>& x, i64 first, i64 c0, i64 D, bool packs, T (*to)[kDepth16 + 8]) {
    const int token = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    const i64 left = first + token < x.count && c0 + column < D ? D - c0 - column : 0;
    const T* from = left ? x.data + (first + token) * x.stride + (c0 + column) * x.stride_d : x.data;
    if (packs) {
      copy_async(&to[token][column], from, static_cast<int>(left < 8 ? left : 8) * static_cast<int>(sizeof(T)));
    } else {
      for (int k = 0; k < 8; ++k) to[token][column + k] = k < left ? from[k * x.stride_d] : from_float<T>(0);
    }
  }

  // 16 rows and 32 keys of a staged step, by one warp: sum[j] is the tile of keys 8j … 8j + 7.
  __device__ __forceinline__ static void multiply_step(const T (*rows)[kDepth16 + 8], const T (*keys)[kDepth16 + 8],
                                                       float (&sum)[4][4]) {
    for (int c = 0; c < kDepth16; c += 16) {
      u32 x[4], y[4];
      load_matrices(x, &rows[lane() % 16][c + lane() / 16 * 8]);
      for (int pair = 0; pair < 4; pair += 2) {
        load_matrices(y, &keys[8 * pair + lane() / 16 * 8 + lane() % 8][c + lane() / 8 % 2 * 8]);
        multiply_16x8x16<T>(sum[pair], x, y[0], y[1]);
        multiply_16x8x16<T>(sum[pair + 1], x, y[2], y[3]);
      }
    }
  }

  // Copies of the next step are under way while one is multiplied.
  __device__ __forceinline__ static void multiply(const Tokens<T>& rows, i64 first_row, const Tokens<T>& keys, i64 first_key,
                                                  i64 D, bool packs, Stage& staged, float (&out)[kRows][kKeys]) {
    float sum[4][4] = {};
    const i64 steps = (D + kDepth16 - 1) / kDepth16;
    const auto begin = [&](i64 step) {
      if (step < steps) {
        stage(rows, first_row, step * kDepth16, D, packs, staged.rows[step % 2]);
        stage(keys, first_key, step * kDepth16, D, packs, staged.keys[step % 2]);
      }
      copy_commit();
    };
    begin(0);
    for (i64 step = 0; step < steps; ++step) {
      begin(step + 1);
      copy_wait<1>();
      __syncthreads();  // this step is staged
      multiply_step(staged.rows[step % 2] + upper(), staged.keys[step % 2] + left(), sum);
      __syncthreads();  // everyone is through with it before it is overwritten
    }
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kKeys; ++j) out[i][j] = sum[j / 2][2 * i + j % 2];
  }
};

template <class T>
struct TileOf {
  using type = TensorTile<T>;
};
template <>
struct TileOf<float> {
  using type = PlainTile;
};

}  // namespace
}  // namespace effvlm
