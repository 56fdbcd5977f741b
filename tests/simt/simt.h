// The CUDA execution model on the host, for tests: kernels under csrc/ops compile against this unchanged (EFFVLM_SIMT).
//
// Every thread of a block is a fiber, a block runs on one OS thread, blocks run in random order on several. The kernel sources
// are compiled with -fsanitize=thread, but the functions the compiler then calls at every load and store are ours (simt.cpp):
// they see each access with its address, and check it. What is not modelled: timing, caches, memory ordering weaker than program
// order between barriers, warps in lockstep (lanes run one by one, which CUDA allows), textures, streams (launches run at once).
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local  // one block at a time on an OS thread; simt.cpp finds them as the module's TLS segment

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

// Where the running fiber is.
struct Place {
  dim3 thread, block, block_dim, grid_dim;
};
Place here();  // a copy: reading it is no access of the kernel's

// A kernel with its arguments: `call(arguments)`; the arguments may be read, as any constant.
struct Body {
  const void* arguments;
  std::size_t bytes;
  void (*call)(const void* arguments);
};
void launch(const char* name, dim3 grid, dim3 block, const Body& body);

template <class Closure>
void launch(const char* name, dim3 grid, dim3 block, const Closure& closure) {
  launch(name, grid, block, Body{&closure, sizeof closure, [](const void* c) { (*static_cast<const Closure*>(c))(); }});
}
void sync_block();
void sync_warp(unsigned mask);
[[noreturn]] void fail(const char* format, ...);

// Exchange of one value of up to 8 bytes among the lanes of `mask`; `from` is the lane to read.
std::uint64_t exchange(unsigned mask, std::uint64_t value, int from);
void atomic_access(const void* address, int size);
void check_aligned(const void* address, int size);

template <class T>
T shuffle(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= 8, "shuffles exchange at most 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Tensor cores and asynchronous copies, as csrc/core/cuda/mma.cuh describes them.
void load_matrices(std::uint32_t* out, const void* row);
void multiply_16x8x16(float* d, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1, bool bfloat);
void multiply_16x8x32(int* d, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1);
void copy_async(void* shared, const void* global, int bytes);
void copy_commit();
void copy_wait(int pending);

int lane();
std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t selector);
float half_to_float(std::uint16_t bits);
std::uint16_t float_to_half(float x);
std::uint16_t float_to_bfloat16(float x);

}  // namespace simt

#define threadIdx (::simt::here().thread)
#define blockIdx (::simt::here().block)
#define blockDim (::simt::here().block_dim)
#define gridDim (::simt::here().grid_dim)

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline void __syncthreads() { simt::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return simt::shuffle(mask, value, simt::lane() ^ lanes);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  return simt::shuffle(mask, value, simt::lane() < lanes ? simt::lane() : simt::lane() - lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int lanes) {
  return simt::shuffle(mask, value, simt::lane() + lanes > 31 ? simt::lane() : simt::lane() + lanes);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return simt::shuffle(mask, value, from % 32);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  unsigned votes = 0;
  for (int k = 0; k < 32; ++k)
    if (mask >> k & 1) votes |= static_cast<unsigned>(simt::shuffle(mask, vote ? 1 : 0, k)) << k;
  return votes;
}
// Fibers of a block share an OS thread, and a fiber is only ever put aside at an instrumented access: this is atomic in a block.
template <class T>
__attribute__((no_sanitize("thread"))) T atomicAdd(T* address, T value) {
  simt::atomic_access(address, sizeof(T));
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
