// Rows of weighted means and sums of tokens in CUDA: what token_merge and token_apply have in common.
#pragma once
#include <type_traits>

#include "core/cuda/launch.cuh"

namespace effvlm {
namespace {

constexpr int kRowThreads = 256, kRowBlocks = 3;  // of a multiprocessor: leaves registers enough that nothing spills

// One output row by the whole block; thread ↔ every blockDim-th pack of P channels. P = 1 serves any stride and alignment.
// The row says of itself what its twin in token_merge_rows.h says; token(k) may be null for a member that is dropped.
template <int P, class T, class Row>
__device__ __forceinline__ void write_row(const Row& row, std::int64_t C, std::int64_t stride_c, T* out) {
  for (std::int64_t c = static_cast<std::int64_t>(threadIdx.x) * P; c < C; c += static_cast<std::int64_t>(blockDim.x) * P) {
    float sum[P] = {};
    T first[P] = {};
    for (std::int32_t k = 0; k < row.count; ++k) {
      const T* token = row.token(k);
      if (!token) continue;
      const float w = row.weight(k);
      if constexpr (P == 1) {
        first[0] = token[c * stride_c];
      } else {
        const Pack<T> pack = load_pack(token + c);
        for (int i = 0; i < P; ++i) first[i] = pack.element[i];
      }
      for (int i = 0; i < P; ++i) sum[i] += w * to_float(first[i]);
    }
    Pack<T> mean;
    for (int i = 0; i < P; ++i)  // a copy is not w·x/w: that rounds
      mean.element[i] = row.copy ? first[i] : from_float<T>(row.divisor == 0 ? 0.0f : sum[i] / row.divisor);
    if constexpr (P == 1) {
      out[c] = mean.element[0];
    } else {
      store_pack(out + c, mean);
    }
  }
}

// Calls launch_rows(std::integral_constant<int, P>, threads of a block) with the widest P that these addresses allow.
template <class T, class Launch>
void by_pack(std::int64_t C, const void* x, std::int64_t stride_b, std::int64_t stride_n, std::int64_t stride_c, const void* out,
             Launch&& launch_rows) {
  constexpr int P = Pack<T>::size;
  const auto aligned = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; };
  const bool packs =
      (stride_c == 1 || C == 1) && C % P == 0 && stride_n % P == 0 && stride_b % P == 0 && aligned(x) && aligned(out);
  const std::int64_t lanes = packs ? C / P : C, whole = (lanes + kWarp - 1) / kWarp * kWarp;
  const unsigned threads = whole >= kRowThreads ? kRowThreads : whole ? static_cast<unsigned>(whole) : kWarp;
  if (packs) {
    launch_rows(std::integral_constant<int, P>{}, threads);
  } else {
    launch_rows(std::integral_constant<int, 1>{}, threads);
  }
}

}  // namespace
}  // namespace effvlm
