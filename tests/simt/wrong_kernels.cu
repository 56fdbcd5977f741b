// Small kernels with one deliberate mistake each (Wrong) and their right twins: tests/test_simt.py wants the first caught and the
// second to pass. All write out[0 … n), n = 64 threads in a block unless they say otherwise.
#include <string>

#include "core/cuda/launch.cuh"

using namespace effvlm;

namespace {

constexpr int kThreads = 64;

template <bool Wrong>
__global__ void out_of_bounds_global(const float* in, float* out, int n) {
  const int i = threadIdx.x;
  out[i] = in[Wrong ? i + 1 : i];
}

template <bool Wrong>
__global__ void out_of_bounds_shared(const float* in, float* out, int n) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[Wrong ? threadIdx.x + (1 << 16) : threadIdx.x];
}

template <bool Wrong>
__global__ void uninitialised_shared(const float* in, float* out, int n) {
  __shared__ float tile[kThreads];
  if (!Wrong || threadIdx.x % 2) tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

template <bool Wrong>
__global__ void divergent_barrier(const float* in, float* out, int n) {
  if (!Wrong || threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool Wrong>
__global__ void early_exit_before_barrier(const float* in, float* out, int n) {
  out[threadIdx.x] = in[threadIdx.x];
  if (Wrong && threadIdx.x == 3) return;
  __syncthreads();
}

template <bool Wrong>
__global__ void inactive_shuffle(const float* in, float* out, int n) {
  float value = in[threadIdx.x];
  if (!Wrong || threadIdx.x % kWarp < 20) value += shuffle_xor(value, 1);
  out[threadIdx.x] = value;
}

template <bool Wrong>
__global__ void missing_syncthreads(const float* in, float* out, int n) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  if (!Wrong) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

template <bool Wrong>
__global__ void missing_second_syncthreads(const float* in, float* out, int n) {
  __shared__ float tile[kThreads];
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    tile[threadIdx.x] = in[threadIdx.x] + round;
    __syncthreads();
    sum += tile[(threadIdx.x + 33) % kThreads];
    if (!Wrong) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

template <bool Wrong>
__global__ void missing_syncwarp(const float* in, float* out, int n) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = in[threadIdx.x];
  if (!Wrong) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

template <bool Wrong>
__global__ void misaligned_vector(const float* in, float* out, int n) {
  if (threadIdx.x >= 15) {
    for (int i = threadIdx.x; i < n; i += 49)
      if (i >= 60) out[i] = in[i];
    return;
  }
  const Pack<float> pack = load_pack(in + 4 * threadIdx.x + (Wrong ? 1 : 0));
  store_pack(out + 4 * threadIdx.x, pack);
}

template <bool Wrong>
__global__ void race_between_blocks(const float* in, float* out, int n) {  // two blocks
  if (blockIdx.x == 0 || Wrong) out[threadIdx.x] = in[threadIdx.x] + blockIdx.x;
}

template <bool Wrong>
__global__ void atomic_or_not(const float* in, float* out, int n) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (Wrong) {
    count += 1;
  } else {
    add_shared(&count, 1);
  }
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(count);
}

template <bool Wrong>
__global__ void read_before_written(const float* in, float* out, int n) {
  if (Wrong) out[threadIdx.x] += in[threadIdx.x];
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool Wrong>
__global__ void write_to_input(const float* in, float* out, int n) {
  if (Wrong) const_cast<float*>(in)[threadIdx.x] = 0;
  out[threadIdx.x] = 1;
}

template <bool Wrong>
__global__ void left_unwritten(const float* in, float* out, int n) {
  if (!Wrong || threadIdx.x != 17) out[threadIdx.x] = in[threadIdx.x];
}

// in holds 2^31 + 64 floats, of which the last 64 are asked for.
template <bool Wrong>
__global__ void far_offset(const float* in, float* out, int n) {
  const std::int64_t far = (std::int64_t{1} << 31) + threadIdx.x;
  out[threadIdx.x] = in[Wrong ? static_cast<int>(far) : far];
}

template <bool Wrong>
__global__ void grid_limit(const float* in, float* out, int n) {
  if (blockIdx.y == 0) out[threadIdx.x] = in[threadIdx.x];
}

using Kernel = void (*)(const float*, float*, int);

}  // namespace

void run_wrong(const std::string& name, bool wrong, std::uintptr_t in, std::uintptr_t out) {
  dim3 grid(1);
  Kernel kernel = nullptr;
#define EFFVLM_TWINS(k) \
  if (name == #k) kernel = wrong ? k<true> : k<false>;
  EFFVLM_TWINS(out_of_bounds_global)
  EFFVLM_TWINS(out_of_bounds_shared)
  EFFVLM_TWINS(uninitialised_shared)
  EFFVLM_TWINS(divergent_barrier)
  EFFVLM_TWINS(early_exit_before_barrier)
  EFFVLM_TWINS(inactive_shuffle)
  EFFVLM_TWINS(missing_syncthreads)
  EFFVLM_TWINS(missing_second_syncthreads)
  EFFVLM_TWINS(missing_syncwarp)
  EFFVLM_TWINS(misaligned_vector)
  EFFVLM_TWINS(race_between_blocks)
  EFFVLM_TWINS(atomic_or_not)
  EFFVLM_TWINS(read_before_written)
  EFFVLM_TWINS(write_to_input)
  EFFVLM_TWINS(left_unwritten)
  EFFVLM_TWINS(far_offset)
  EFFVLM_TWINS(grid_limit)
#undef EFFVLM_TWINS
  if (!kernel) throw std::invalid_argument("no kernel called " + name);
  if (name == "race_between_blocks") grid = dim3(2);
  if (name == "grid_limit") grid = wrong ? dim3(1, 70000) : dim3(1, 2);
  launch(name.c_str(), kernel, grid, dim3(kThreads), nullptr, reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out),
         kThreads);
}
