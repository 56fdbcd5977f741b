#include "core/check.h"
#include "core/dispatch.h"
#include "ops/grouped_linear.h"
#include "ops/moe_ffn_lists.cuh"

namespace effvlm {
namespace {

struct Layout : Workspace {
  i64 start, order;  // i32 (E+1), i32 (T)
  explicit Layout(const GroupedLinearArgs& a) : start(take(4 * (a.E + 1))), order(take(4 * a.T)) {}
};

__host__ __device__ Choices choices_of(const GroupedLinearArgs& a) {
  return {a.ids, a.ids_stride, 0, static_cast<int>(a.E), static_cast<int>(a.T), 1};
}

// Block ↔ (kWarps columns of out, a layer), warp ↔ one column: its row of weights stays in the first-level cache.
template <class T, bool Packs>
__global__ void __launch_bounds__(kThreads) grouped_linear_kernel(GroupedLinearArgs a, const i32* start, const i32* order) {
  __shared__ i32 list[kScanned];
  __shared__ int sums[kWarp];
  const int e = blockIdx.y, lane = threadIdx.x % kWarp;
  const Members members = members_of(choices_of(a), start, order, e, list, sums);
  const i64 o = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (o >= a.O) return;
  const T* row = static_cast<const T*>(a.weight) + e * a.weight_stride_e + o * a.weight_stride_o;
  const float bias = a.bias ? to_float(static_cast<const T*>(a.bias)[e * a.bias_stride_e + o * a.bias_stride_o]) : 0;
  for (int first = 0; first < members.count; first += kTile) {
    const int count = members.count - first < kTile ? members.count - first : kTile;
    const T* tokens[kTile];
#pragma unroll
    for (int t = 0; t < kTile; ++t)
      tokens[t] = static_cast<const T*>(a.x) + members.pair[first + (t < count ? t : 0)] * a.x_stride_t;
    float sum[1][kTile];
    dots<T, Packs, 1>(&row, a.weight_stride_c, tokens, a.x_stride_c, count, a.C, sum);
#pragma unroll
    for (int t = 0; t < kTile; ++t)
      if (t < count && lane == t) static_cast<T*>(a.out)[members.pair[first + t] * a.O + o] = from_float<T>(sum[0][t] + bias);
  }
}

// Rows of tokens that go to no layer.
template <class T>
__global__ void __launch_bounds__(kThreads) grouped_linear_skip_kernel(GroupedLinearArgs a) {
  const Choices choices = choices_of(a);
  for (i64 t = blockIdx.x; t < a.T; t += gridDim.x)
    for (i64 o = threadIdx.x; o < a.O && choices.expert(static_cast<unsigned>(t)) < 0; o += blockDim.x)
      static_cast<T*>(a.out)[t * a.O + o] = from_float<T>(0);
}

template <class T>
void run(const GroupedLinearArgs& a, void* stream) {
  const Layout at(a);
  char* workspace = static_cast<char*>(a.workspace);
  i32 *start = reinterpret_cast<i32*>(workspace + at.start), *order = reinterpret_cast<i32*>(workspace + at.order);
  launch("grouped_linear_skip_kernel", grouped_linear_skip_kernel<T>, dim3(grid_for(a.O ? a.T : 0)), dim3(kThreads), stream, a);
  if (a.T > kScanned)
    launch("moe_ffn_sort_kernel", moe_ffn_sort_kernel, dim3(1), dim3(1024), stream, choices_of(a), start, order);
  const bool packs = packable<T>(a.x, a.C, a.x_stride_c, {a.x_stride_t}) &&
                     packable<T>(a.weight, a.C, a.weight_stride_c, {a.weight_stride_e, a.weight_stride_o});
  const auto kernel = packs ? grouped_linear_kernel<T, true> : grouped_linear_kernel<T, false>;
  const dim3 grid(blocks_of(a.O), static_cast<unsigned>(a.T ? a.E : 0));
  launch("grouped_linear_kernel", kernel, grid, dim3(kThreads), stream, a, start, order);
}

}  // namespace

std::int64_t grouped_linear_workspace_cuda(const GroupedLinearArgs& args) { return Layout(args).bytes; }

void grouped_linear_cuda(const GroupedLinearArgs& a, int device, void* stream) {
  EFFVLM_CHECK(a.E <= kMaxExperts, "grouped_linear: expected at most %d layers on CUDA, got %lld", kMaxExperts,
               static_cast<long long>(a.E));
  const DeviceGuard guard(device);
  base::by_float_dtype("grouped_linear", a.dtype, [&](auto type) { run<typename decltype(type)::type>(a, stream); });
}

}  // namespace effvlm
