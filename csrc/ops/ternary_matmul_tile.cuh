// Part of ternary_matmul_cuda.cu: products of half a tile with tokens.
//
// A half tile is 32 rows of 256 bytes. In step n lanes 8i … 8i+7 read row 8i + n, each lane 16 bytes of either 128, which is free
// of bank conflicts.
#pragma once
#include <type_traits>

#include "core/cuda/gap_planes.cuh"

namespace effvlm {
namespace {

// What stands for a weight: itself, or the upper byte of a 16-bit float: 1 and 2 in f16; in bf16 those of 1 and 2, whose lower
// bytes differ, are 0x3f and 0x40, and the first alone is ½.
template <class X>
using CodeOf = std::conditional_t<std::is_same_v<X, f16>, Codes<0x80, 0x3c, 0x80, 0x40>,
                                  std::conditional_t<std::is_same_v<X, bf16>, Codes<0x80, 0x3f, 0x80, 0x40>, SignedBytes>>;
template <class X, bool kFive>
constexpr bool kHalves = std::is_same_v<X, bf16> && !kFive;  // sums are half of what they should be

__device__ __forceinline__ Pack<u32> load_row(const HalfTile& tile, int n, int part) {
  const int lane = threadIdx.x % kWarp;
  return load_pack(reinterpret_cast<const u32*>(tile.value + (8 * (lane / 8) + n) * kTileColumns + 128 * part + 16 * (lane % 8)));
}

// The rows of a narrow strip, `pitch` bytes each, as rows of 256 with zeros behind them: from the last on, so that nothing is
// overwritten before it has been moved.
__device__ __forceinline__ void widen_rows(HalfTile& tile, int pitch) {
  u32* words = reinterpret_cast<u32*>(tile.value);
#pragma unroll 1
  for (int at = 16 * (static_cast<int>(threadIdx.x % kWarp) + (pitch / 16 - 1) * kWarp); at >= 0; at -= 16 * kWarp) {
    Pack<u32> pack = load_pack(words + at / 4);
    const int column = at & (pitch - 1), row = (at - column) * (kTileColumns / pitch);
    __syncwarp();  // these 512 bytes are in registers
#pragma unroll 1
    for (int to = column; to < kTileColumns; to += pitch, pack = Pack<u32>{}) store_pack(words + (row + to) / 4, pack);
    __syncwarp();  // and moved
  }
}

// 16 bytes of a token at a column of a strip; of columns from `width` on, zeros. What is not there is loaded from where columns
// are, and masked: results of vector loads would be copied before each use as an operand of the tensor cores.
template <class X>
__device__ __forceinline__ Pack<u32> load_columns(const X* x, int column, int width) {
  auto pack = load_pack(reinterpret_cast<const u32*>(x + (column < width ? column : 0)));
#pragma unroll
  for (u32& word : pack.element) word &= column < width ? ~0u : 0;
  return pack;
}

// Tensor cores: up to 8 tokens are the rows of A, with the first 64 of 128 columns and again, as rows 8 … 15, with the others;
// weights are B, even columns with the first 64 of these 128, odd ones with the others. So D holds each sum in two parts, on the
// diagonals of its 2 × 2 blocks: three quarters of nothing, but tensor cores have time.
template <class X>
struct Columns {
  static constexpr int kSteps = 2 * sizeof(X);  // of 32 bytes, for 128 columns
  u32 a[2][kSteps][4];

  __device__ __forceinline__ void load(const X* x, int width) {
    constexpr int kSize = 16 / sizeof(X);
#pragma unroll
    for (int part = 0; part < 4; ++part)
#pragma unroll
      for (int i = 0; i < kSteps / 2; ++i) {
        const auto pack = load_columns(x, 64 * part + 16 * (threadIdx.x % 4) + i * kSize, width);
#pragma unroll
        for (int k = 0; k < 4; ++k) a[part / 2][2 * i + k / 2][part % 2 + k % 2 * 2] = pack.element[k];
      }
  }
};
template <class X>
using SumOf = std::conditional_t<sizeof(X) == 1, int, float>;

template <class X, bool kFive>
__device__ __forceinline__ void multiply_step(SumOf<X> (&d)[4], const Columns<X>& x, int part, int k, u32 w0, u32 w1) {
  if constexpr (sizeof(X) == 1) {
    multiply_16x8x32(d, x.a[part][k], w0, w1);
  } else {  // bytes are the upper halves of floats; of bf16, where ±1 and ±2 differ in the lower half too, if kFive
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      u32 pair[2] = {permute_bytes(i ? w1 : w0, 0, 0x1404), permute_bytes(i ? w1 : w0, 0, 0x3424)};
      if (kFive)
        for (u32& b : pair) b |= b >> 1 & 0x00800080;  // 0x3f → 0x3f80
      multiply_16x8x16<X>(d, x.a[part][2 * k + i], pair[0], pair[1]);
    }
  }
}

// Hands over (n, four sums) of lane 4g + p: rows 8p + n … 8p + n + 3 of the half tile, token g.
template <class X, bool kFive, class Use>
__device__ __forceinline__ void multiply_rows(const HalfTile& tile, const X* x, int width, Use&& use) {
  constexpr int kTogether = sizeof(X) == 1 ? 4 : 2;  // products that need not wait for each other
  Columns<X> columns;
  columns.load(x, width);
#pragma unroll 1
  for (int n = 0; n < 8; n += 4) {
    Pack<SumOf<X>> sums;
#pragma unroll
    for (int first = 0; first < 4; first += kTogether) {
      SumOf<X> d[kTogether][4] = {};
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        Pack<u32> w[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) w[i] = load_row(tile, n + first + i, part);
#pragma unroll
        for (int k = 0; k < 2; ++k)
#pragma unroll
          for (int i = 0; i < kTogether; ++i)
            multiply_step<X, kFive>(d[i], columns, part, k, w[i].element[2 * k], w[i].element[2 * k + 1]);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sums.element[first + i] = d[i][0] + d[i][3];
    }
    use(n, sums);
  }
}

// A signed byte of a word whose top bits are turned over.
__device__ __forceinline__ float byte_value(u32 turned, int i) {
  const u32 bits = permute_bytes(turned, 0x4b000000, 0x7440 + i);  // 2^23 + 128 + value
  float value;
  memcpy(&value, &bits, sizeof value);
  return value - 8388736.0f;
}

// The f32 product of one token and row `lane`, by FMA: tensor cores would round x.
__device__ __forceinline__ float row_product(const HalfTile& tile, const float* x, int width) {
  const int lane = threadIdx.x % kWarp;
  float sums[8] = {};
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    Pack<float> columns[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const auto pack = load_columns(x, 128 * part + 16 * (lane % 8) + 4 * k, width);
      memcpy(&columns[k], &pack, sizeof pack);
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const auto w = load_row(tile, n, part);
#pragma unroll
      for (int k = 0; k < 16; ++k) sums[n] += byte_value(w.element[k / 4] ^ 0x80808080u, k % 4) * columns[k / 4].element[k % 4];
    }
  }
#pragma unroll
  for (int n = 4; n; n /= 2)  // of eight lanes, each adds up one row
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const bool upper = lane & n;
      sums[i] = (upper ? sums[i + n] : sums[i]) + shuffle_xor(upper ? sums[i] : sums[i + n], n);
    }
  return sums[0];
}

}  // namespace
}  // namespace effvlm
