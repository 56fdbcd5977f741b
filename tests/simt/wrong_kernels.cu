// Small kernels with one deliberate mistake each (Wrong) and their right twins: tests/test_simt.py wants the first caught and the
// second to pass. All write out[0 … n), n = 64 threads in a block unless they say otherwise.
#include <string>

#include "core/cuda/launch.cuh"
#include "core/cuda/mma.cuh"

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

// One copy per thread of 16 bytes, read by the neighbouring thread. Wrong: a barrier, but nobody waited for the copies.
template <bool Wrong>
__global__ void copy_not_waited_for(const float* in, float* out, int n) {
  __shared__ Pack<float> tile[kThreads / 4];
  if (threadIdx.x < n / 4) copy_async(&tile[threadIdx.x], in + 4 * threadIdx.x);
  copy_commit();
  if (!Wrong) copy_wait<0>();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x / 4].element[threadIdx.x % 4];
}

// Two groups under way, the second one overwrites what the first one brought. Wrong: while others may still be reading that.
template <bool Wrong>
__global__ void copy_over_readers(const float* in, float* out, int n) {
  __shared__ Pack<float> tile[kThreads / 4];
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x < n / 4) copy_async(&tile[threadIdx.x], in + 4 * threadIdx.x, 16 - 8 * round);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    sum += tile[threadIdx.x / 4].element[threadIdx.x % 4];
    if (!Wrong) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

using Kernel = void (*)(const float*, float*, int);

// ---- fragments: whole products of one warp, (16, K) · (8, K)ᵀ, operands in shared memory as kernels have them ----

template <class T>
__global__ void product_16bit(const T* a, const T* b, float* d) {
  __shared__ Pack<T> x[16][2], y[8][2];  // 16 channels in a row
  const int lane = threadIdx.x;
  x[lane / 2][lane % 2] = load_pack(a + 8 * lane);
  if (lane < 16) y[lane / 2][lane % 2] = load_pack(b + 8 * lane);
  __syncwarp();
  u32 left[4], right[4];
  load_matrices(left, &x[lane % 16][lane / 16]);
  load_matrices(right, &y[lane % 8][lane / 8 % 2]);
  float sum[4] = {};
  multiply_16x8x16<T>(sum, left, right[0], right[1]);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

__global__ void product_int8(const std::uint32_t* a, const std::uint32_t* b, int* d) {
  const int lane = threadIdx.x, g = lane / 4, p = lane % 4;  // 8 words of 4 channels in a row
  const u32 left[4] = {a[g * 8 + p], a[(g + 8) * 8 + p], a[g * 8 + p + 4], a[(g + 8) * 8 + p + 4]};
  int sum[4] = {};
  multiply_16x8x32(sum, left, b[g * 8 + p], b[g * 8 + p + 4]);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + p * 2 + i % 2] = sum[i];
}

}  // namespace

void run_product(const std::string& type, std::uintptr_t a, std::uintptr_t b, std::uintptr_t d) {
  const dim3 one(1), warp(kWarp);
  if (type == "int8") {
    launch("product_int8", product_int8, one, warp, nullptr, reinterpret_cast<const std::uint32_t*>(a),
           reinterpret_cast<const std::uint32_t*>(b), reinterpret_cast<int*>(d));
  } else if (type == "float16") {
    launch("product_16bit", product_16bit<f16>, one, warp, nullptr, reinterpret_cast<const f16*>(a),
           reinterpret_cast<const f16*>(b), reinterpret_cast<float*>(d));
  } else {
    launch("product_16bit", product_16bit<bf16>, one, warp, nullptr, reinterpret_cast<const bf16*>(a),
           reinterpret_cast<const bf16*>(b), reinterpret_cast<float*>(d));
  }
}

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
  EFFVLM_TWINS(copy_not_waited_for)
  EFFVLM_TWINS(copy_over_readers)
#undef EFFVLM_TWINS
  if (!kernel) throw std::invalid_argument("no kernel called " + name);
  if (name == "race_between_blocks") grid = dim3(2);
  if (name == "grid_limit") grid = wrong ? dim3(1, 70000) : dim3(1, 2);
  launch(name.c_str(), kernel, grid, dim3(kThreads), nullptr, reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out),
         kThreads);
}
