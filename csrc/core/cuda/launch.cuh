// Checked launches: nothing is left to cudaGetLastError somewhere later, and no launch happens on the wrong device.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/cuda/device.cuh"

namespace effvlm {

#if defined(EFFVLM_SIMT)
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline int multiprocessors(int) { return 2; }
#else
inline void cuda_check(cudaError_t error, const char* what, const char* file, int line) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ") at " +
                           file + ":" + std::to_string(line));
}
#define EFFVLM_CUDA_CHECK(call) ::effvlm::cuda_check((call), #call, __FILE__, __LINE__)

// Makes `device` current, and the one before it again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    EFFVLM_CUDA_CHECK(cudaGetDevice(&before_));
    if (before_ != device) EFFVLM_CUDA_CHECK(cudaSetDevice(device));
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

inline int multiprocessors(int device) {
  int count = 0;
  EFFVLM_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

#endif

// kernel<<<grid, block, 0, stream>>>(args…), checked. An empty grid is no launch; sizes over CUDA's limits throw.
template <class... Parameters, class... Args>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream, Args... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || block.x * block.y * block.z > 1024)
    throw std::runtime_error(std::string(name) + ": launch of " + std::to_string(grid.x) + "×" + std::to_string(grid.y) + "×" +
                             std::to_string(grid.z) + " blocks is over the limits of CUDA");
#if defined(EFFVLM_SIMT)
  (void)stream;
  simt::launch(name, grid, block, [=] { kernel(static_cast<Parameters>(args)...); });
#else
  // clang-format off
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(args)...);
  // clang-format on
  cuda_check(cudaGetLastError(), name, __FILE__, __LINE__);
#endif
}

// Blocks for `count` tasks of a kernel that strides over its grid: enough to fill any device, never over the limit.
inline unsigned grid_for(std::int64_t count) { return static_cast<unsigned>(count < (1 << 20) ? count : (1 << 20)); }

}  // namespace effvlm
