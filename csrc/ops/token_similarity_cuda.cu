#include "core/cuda/launch.cuh"
#include "core/dispatch.h"
#include "ops/token_similarity.h"

namespace effvlm {
namespace {

using i64 = std::int64_t;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// Warp ↔ row; lane ↔ every 32nd pack of channels, loaded at once or, for any stride and alignment, one by one: the same sums.
template <class T, bool kPacks>
__global__ void __launch_bounds__(kThreads, 4) token_similarity_kernel(TokenSimilarityArgs args) {
  constexpr int P = Pack<T>::size, kAhead = kPacks ? 4 : 1;
  const int lane = threadIdx.x % kWarp;
  for (i64 n = static_cast<i64>(blockIdx.x) * kWarps + threadIdx.x / kWarp; n < args.N;
       n += static_cast<i64>(gridDim.x) * kWarps) {
    const T* a = static_cast<const T*>(args.a) + n * args.a_stride_n;
    const T* b = static_cast<const T*>(args.b) + n * args.b_stride_n;
    float dot = 0, a_square = 0, b_square = 0;
    const auto add = [&](T x, T y) {
      const float u = to_float(x), v = to_float(y);
      dot += u * v, a_square += u * u, b_square += v * v;
    };
#pragma unroll(kAhead)
    for (i64 c = static_cast<i64>(lane) * P; c < args.C; c += kWarp * P) {
      if constexpr (kPacks) {
        const Pack<T> x = load_pack(a + c), y = load_pack(b + c);
        for (int i = 0; i < P; ++i) add(x.element[i], y.element[i]);
      } else {
#pragma unroll 1  // eight strided addresses at a time would spill
        for (int i = 0; i < P; ++i)
          if (c + i < args.C) add(a[(c + i) * args.a_stride_c], b[(c + i) * args.b_stride_c]);
      }
    }
    dot = warp_sum(dot), a_square = warp_sum(a_square), b_square = warp_sum(b_square);
    if (lane == 0) {
      const double squares = static_cast<double>(a_square) * b_square;  // exact
      const float cosine = squares == 0 ? 0.0f : static_cast<float>(dot / sqrt(squares));
      args.out[n] = !(squares < INFINITY) ? NAN : cosine > 1 ? 1.0f : cosine < -1 ? -1.0f : cosine;
    }
  }
}

template <class T>
bool packable(const TokenSimilarityArgs& a) {
  constexpr int P = Pack<T>::size;
  const auto rows = [&](const void* p, i64 stride_n, i64 stride_c) {
    return stride_c == 1 && stride_n % P == 0 && reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
  };
  return a.C % P == 0 && rows(a.a, a.a_stride_n, a.a_stride_c) && rows(a.b, a.b_stride_n, a.b_stride_c);
}

}  // namespace

void token_similarity_cuda(const TokenSimilarityArgs& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const dim3 grid(grid_for((a.N + kWarps - 1) / kWarps)), block(kThreads);
  base::by_float_dtype("token_similarity", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (packable<T>(a)) {
      launch("token_similarity_kernel", token_similarity_kernel<T, true>, grid, block, stream, a);
    } else {
      launch("token_similarity_kernel", token_similarity_kernel<T, false>, grid, block, stream, a);
    }
  });
}

}  // namespace effvlm
