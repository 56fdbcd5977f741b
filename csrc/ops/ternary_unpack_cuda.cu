#include "core/check.h"
#include "core/cuda/gap_planes.cuh"
#include "core/cuda/launch.cuh"
#include "ops/ternary_unpack.h"

namespace effvlm {
namespace {

using i64 = std::int64_t;

constexpr int kWarps = 4;  // 37 KB of shared memory a block: 24 warps on a multiprocessor of sm_90, 8 of sm_86

// Rows of a half tile, `width` of `pitch` columns, to rows of `stride` bytes.
__device__ __forceinline__ void store_rows(const std::uint8_t* from, int rows, int width, int pitch, std::int8_t* to, i64 stride,
                                           bool packs) {
  const int lane = threadIdx.x % kWarp, shift = popcount(pitch - 1), step = packs ? 16 : 1;
  for (int i = step * lane; i < rows * pitch; i += step * kWarp) {
    const int row = i >> shift, column = i & (pitch - 1);
    if (column >= width) continue;
    if (packs) {
      store_pack(reinterpret_cast<std::uint8_t*>(to) + row * stride + column, load_pack(from + i));
    } else {
      to[row * stride + column] = static_cast<std::int8_t>(from[i]);
    }
  }
}

// Warp ↔ half a tile: decoded over zeros in shared memory, written row by row. At 88.5 % zeros that is 0.7 KB to read, about
// 1,400 instructions, and 8 KB to write.
__global__ void __launch_bounds__(kWarps* kWarp) ternary_unpack_kernel(TernaryUnpackArgs a, unsigned strips, bool packs) {
  __shared__ HalfTile halves[kWarps];
  const GapPlanes& w = a.weight;
  const unsigned warp = shuffle(threadIdx.x / kWarp, 0), task = blockIdx.x * kWarps + warp, s = task / 2;
  if (s >= strips) return;
  const i64 blocks = blocks_of(w), groups = groups_of(w);
  const int half = static_cast<int>(task % 2);
  const Strip strip = strip_at(w.C, s);
  const i64 width = w.C - strip.column < strip.pitch ? w.C - strip.column : strip.pitch;
  for (unsigned block = blockIdx.y; block < w.E * blocks; block += gridDim.y) {
    const unsigned e = block / static_cast<unsigned>(blocks);
    const i64 row = (block - e * blocks) * kTileRows + half * kHalfRows;
    const int rows = static_cast<int>(w.R - row < kHalfRows ? w.R - row : kHalfRows);
    if (rows <= 0) continue;
    read_half<SignedBytes>(w, tile_at(w, block, s, strips, groups, strip.pitch), strip.pitch, half, halves[warp]);
    __syncwarp();  // the half is decoded
    store_rows(halves[warp].value, rows, static_cast<int>(width), strip.pitch, a.out + (e * w.R + row) * w.C + strip.column, w.C,
               packs);
    __syncwarp();  // and stored, before the next one is zeroed
  }
}

}  // namespace

void ternary_unpack_cuda(const TernaryUnpackArgs& a, int device, void* stream) {
  const i64 strips = strips_of(a.weight.C), blocks = a.weight.E * blocks_of(a.weight);
  EFFVLM_CHECK(blocks < i64{1} << 31 && strips < 1 << 30, "ternary_unpack: expected fewer than 2^31 blocks of 64 rows on CUDA");
  const DeviceGuard guard(device);
  const bool packs = a.weight.C % 16 == 0 && reinterpret_cast<std::uintptr_t>(a.out) % 16 == 0;
  const dim3 grid(static_cast<unsigned>((2 * strips + kWarps - 1) / kWarps),
                  static_cast<unsigned>(blocks < 65535 ? blocks : 65535));
  launch("ternary_unpack_kernel", ternary_unpack_kernel, grid, dim3(kWarps * kWarp), stream, a, static_cast<unsigned>(strips),
         packs);
}

}  // namespace effvlm
