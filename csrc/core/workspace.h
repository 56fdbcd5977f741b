// How an op divides its workspace: an op's Layout inherits this and takes one part after the other.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define EFFVLM_HOST_DEVICE __host__ __device__
#else
#define EFFVLM_HOST_DEVICE
#endif

namespace effvlm {
namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

struct Workspace {
  std::int64_t bytes = 0;

  // The offset of the next `count` bytes; parts start on multiples of 256, as much as CUDA and caches ask for.
  EFFVLM_HOST_DEVICE std::int64_t take(std::int64_t count) {
    const std::int64_t offset = bytes;
    bytes += (count + 255) / 256 * 256;
    return offset;
  }
};

}  // namespace
}  // namespace effvlm
