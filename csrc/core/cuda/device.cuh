// What device code may use of CUDA: types, conversions, 16-byte packs, warp operations. Kernels under csrc/ops call these and no
// intrinsic of CUDA's own, so that the same kernel source also compiles for the host (tests/simt), where EFFVLM_SIMT is defined.
#pragma once
#include <cstdint>

#include "core/dtype.h"

#if defined(EFFVLM_SIMT)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace effvlm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- conversions, one rounding to nearest even ----
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
#if defined(EFFVLM_SIMT)
inline float to_float(f16 x) { return simt::half_to_float(x.bits); }
inline std::uint16_t f16_bits(float x) { return simt::float_to_half(x); }
inline std::uint16_t bf16_bits(float x) { return simt::float_to_bfloat16(x); }
#else
__device__ __forceinline__ float to_float(f16 x) { return __half2float(__half(__half_raw{x.bits})); }
__device__ __forceinline__ std::uint16_t f16_bits(float x) { return static_cast<__half_raw>(__float2half_rn(x)).x; }
__device__ __forceinline__ std::uint16_t bf16_bits(float x) { return static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x; }
#endif

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return f16{f16_bits(x)};
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return bf16{bf16_bits(x)};
}

// ---- packs: 16 bytes, one memory transaction per thread; the address must be a multiple of 16 ----
template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T element[size];
};
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
#if defined(EFFVLM_SIMT)
  simt::check_aligned(p, 16);
#endif
  return *reinterpret_cast<const Pack<T>*>(p);
}
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& x) {
#if defined(EFFVLM_SIMT)
  simt::check_aligned(p, 16);
#endif
  *reinterpret_cast<Pack<T>*>(p) = x;
}

// ---- warp operations; all 32 lanes must take part ----
template <class T>
__device__ __forceinline__ T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(kAllLanes, x, lanes);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T x, int lanes) {
  return __shfl_up_sync(kAllLanes, x, lanes);
}
template <class T>
__device__ __forceinline__ T shuffle(T x, int lane) {
  return __shfl_sync(kAllLanes, x, lane);
}
// Bit l: what lane l says.
__device__ __forceinline__ unsigned ballot(bool vote) { return __ballot_sync(kAllLanes, vote); }
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int lanes = kWarp / 2; lanes; lanes /= 2) x += shuffle_xor(x, lanes);
  return x;
}
// Sum of x over the lanes up to this one, itself included.
__device__ __forceinline__ int warp_inclusive_sum(int x) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
#if defined(EFFVLM_SIMT)
    const int before = shuffle_up(x, lanes);
    if (static_cast<int>(threadIdx.x % kWarp) >= lanes) x += before;
#else  // the shuffle itself says whether there is such a lane: two instructions instead of four
    asm volatile("{.reg .pred p; .reg .s32 r; shfl.sync.up.b32 r|p, %0, %1, 0, 0xffffffff; @p add.s32 %0, %0, r;}"
                 : "+r"(x)
                 : "r"(lanes));
#endif
  }
  return x;
}
__device__ __forceinline__ std::int64_t warp_inclusive_sum(std::int64_t x) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const std::int64_t before = shuffle_up(x, lanes);
    if (static_cast<int>(threadIdx.x % kWarp) >= lanes) x += before;
  }
  return x;
}

// a·b rounded by itself, not fused with an addition.
__device__ __forceinline__ double rounded_product(double a, double b) {
#if defined(EFFVLM_SIMT)
  return a * b;
#else
  return __dmul_rn(a, b);
#endif
}

// ---- bits and bytes of a word ----
__device__ __forceinline__ int popcount(std::uint32_t x) {
#if defined(EFFVLM_SIMT)
  return __builtin_popcount(x);
#else
  return __popc(x);
#endif
}
// Byte i is the one that nibble i of `selector` names: 0 … 3 of a, 4 … 7 of b, and from 8 on the top bit of these, eight times.
__device__ __forceinline__ std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
  std::uint32_t result;
#if defined(EFFVLM_SIMT)
  result = simt::permute_bytes(a, b, selector);
#else
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));  // __byte_perm knows no top bits
#endif
  return result;
}
// The low word of (high:low) >> bits, 0 … 31.
__device__ __forceinline__ std::uint32_t shift_right(std::uint32_t low, std::uint32_t high, int bits) {
#if defined(EFFVLM_SIMT)
  return static_cast<std::uint32_t>((std::uint64_t{high} << 32 | low) >> bits);
#else
  return __funnelshift_r(low, high, bits);
#endif
}
// sum + byte i of the word, in one instruction.
__device__ __forceinline__ int add_byte(std::uint32_t word, int i, int sum) {
#if defined(EFFVLM_SIMT)
  return sum + static_cast<int>(word >> 8 * i & 0xff);
#else
  return static_cast<int>(__dp4a(word, 1u << 8 * i, static_cast<std::uint32_t>(sum)));
#endif
}

// Sum of x over the threads before this one, in order of threadIdx.x, and the sum of all in `total`. For 1-D blocks of whole
// warps, at most 32 of them; scratch: 32 numbers in shared memory, free again on return. T: int or int64.
template <class T, class X>
__device__ __forceinline__ T block_exclusive_sum(X x, T* scratch, T& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const T sum = warp_inclusive_sum(static_cast<T>(x));
  if (lane == kWarp - 1) scratch[warp] = sum;
  __syncthreads();  // every warp's sum is in scratch
  T offset = 0;
  total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) offset += scratch[w];
    total += scratch[w];
  }
  __syncthreads();  // everyone has read scratch before it is used again
  return offset + sum - static_cast<T>(x);
}

// Returns what was there before.
__device__ __forceinline__ int add_shared(int* counter, int value) { return atomicAdd(counter, value); }
__device__ __forceinline__ void add_shared(std::int64_t* counter, std::int64_t value) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(value));
}

}  // namespace effvlm
