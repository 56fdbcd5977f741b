// Tensor cores and asynchronous copies (sm_80 and later), for whole warps. Layouts are those of the PTX manual: with lane t of a
// warp, g = t / 4 and p = t % 4,
//   A (16×16, 16-bit)  a[0] row g, columns 2p,2p+1 · a[1] row g+8 · a[2] row g, columns 2p+8,2p+9 · a[3] row g+8, those columns
//   B (16×8, 16-bit)   b[0] rows 2p,2p+1 of column g · b[1] rows 2p+8,2p+9
//   C, D (16×8, f32)   d[0], d[1] row g, columns 2p,2p+1 · d[2], d[3] row g+8
// and for int8 (A 16×32, B 32×8) with four neighbouring values instead of two in a register, 4p … 4p+3 and 16 more.
#pragma once
#include <cstdint>

#include "core/cuda/device.cuh"

namespace effvlm {

using u32 = std::uint32_t;

#if !defined(EFFVLM_SIMT)
__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
#endif

// Four 8×8 matrices of 16-bit values from shared memory: lane t gives the address of row t % 8 of matrix t / 8 (16 bytes,
// aligned) and receives, of each matrix, columns 2p,2p+1 of row g.
__device__ __forceinline__ void load_matrices(u32 (&out)[4], const void* row) {
#if defined(EFFVLM_SIMT)
  simt::load_matrices(out, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// d += A·B. T: f16 or bf16 with sums in f32.
template <class T>
__device__ __forceinline__ void multiply_16x8x16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);

#if defined(EFFVLM_SIMT)
template <>
__device__ __forceinline__ void multiply_16x8x16<f16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  simt::multiply_16x8x16(d, a, b0, b1, false);
}
template <>
__device__ __forceinline__ void multiply_16x8x16<bf16>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  simt::multiply_16x8x16(d, a, b0, b1, true);
}
#else
#define EFFVLM_MMA_16X8X16(T, type)                                                                                         \
  template <>                                                                                                               \
  __device__ __forceinline__ void multiply_16x8x16<T>(float (&d)[4], const u32(&a)[4], u32 b0, u32 b1) {                    \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                    \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                                    \
  }
EFFVLM_MMA_16X8X16(f16, "f16")
EFFVLM_MMA_16X8X16(bf16, "bf16")
#undef EFFVLM_MMA_16X8X16
#endif

// d += A·B in int8 with int32 sums, exact.
__device__ __forceinline__ void multiply_16x8x32(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if defined(EFFVLM_SIMT)
  simt::multiply_16x8x32(d, a, b0, b1);
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// ---- asynchronous copies into shared memory, past the registers ----

// 16 bytes, both addresses multiples of 16; of the source only the first `bytes` (0 … 16) are read, the rest is zeros.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes = 16) {
#if defined(EFFVLM_SIMT)
  simt::copy_async(shared, global, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
#endif
}
// Closes the group of this thread's copies since the last one.
__device__ __forceinline__ void copy_commit() {
#if defined(EFFVLM_SIMT)
  simt::copy_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most the `Pending` newest groups of this thread are under way. Other threads see its copies after a barrier.
template <int Pending>
__device__ __forceinline__ void copy_wait() {
#if defined(EFFVLM_SIMT)
  simt::copy_wait(Pending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

}  // namespace effvlm
