// Radix select by a block: the key at which a running sum over keys, from the highest down, reaches a target.
#pragma once
#include "core/cuda/device.cuh"

namespace effvlm {
namespace {

template <class Sum>
struct RadixScratch {  // in shared memory
  Sum digit_sum[256], warp_sum[kWarp], before;
  int digit;
};

// Sums weigh(key) of key_at(0) … key_at(n−1); `target`, 1 or more, is reached. Returns the key, and in `left` what is still
// wanted when it is that key's turn. Sums are of integers, so their order does not matter. For blocks of at least 256 threads.
template <class Sum, class KeyAt, class Weigh>
__device__ __forceinline__ std::uint32_t select_key(std::int32_t n, KeyAt&& key_at, Weigh&& weigh, Sum target,
                                                    RadixScratch<Sum>& scratch, Sum& left) {
  const int mine = 255 - static_cast<int>(threadIdx.x);  // the digit of a thread, from the highest down
  std::uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (mine >= 0) scratch.digit_sum[mine] = 0;
    __syncthreads();  // sums are zero
    for (std::int32_t i = threadIdx.x; i < n; i += blockDim.x) {
      const std::uint32_t key = key_at(i);
      if (shift == 24 || (key ^ prefix) >> (shift + 8) == 0) add_shared(&scratch.digit_sum[key >> shift & 255], weigh(key));
    }
    __syncthreads();  // sums are complete
    const Sum sum = mine >= 0 ? scratch.digit_sum[mine] : 0;
    Sum total;
    const Sum before = block_exclusive_sum(sum, scratch.warp_sum, total);
    if (before < target && target <= before + sum) scratch.digit = mine, scratch.before = before;
    __syncthreads();  // the digit is chosen
    prefix |= static_cast<std::uint32_t>(scratch.digit) << shift;
    target -= scratch.before;
  }
  left = target;
  return prefix;
}

}  // namespace
}  // namespace effvlm
