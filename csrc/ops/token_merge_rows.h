// Rows of weighted means and sums of tokens on the CPU: what token_merge and token_apply have in common.
//
// A row says of itself: `out`, where it goes; `count`, how many members it has; token(k) and weight(k), the k-th of them;
// `divisor`, what the weighted sum is divided by (0: the row is zeros); `copy`, whether it is its only member, bit for bit.
#pragma once
#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"

namespace effvlm::EFFVLM_ISA {

// What fma does to each lane.
inline float fma_lane(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Contiguous channels: some vectors of channels at a time, over all members.
template <class T, class Row>
void write_row(const Row& row, std::int64_t C) {
  if (row.divisor == 0) {
    std::memset(static_cast<void*>(row.out), 0, C * sizeof(T));
    return;
  }
  if (row.copy) {  // not w·x/w: that rounds
    std::memcpy(static_cast<void*>(row.out), row.token(0), C * sizeof(T));
    return;
  }
  constexpr int W = f32v::width, kTogether = 4;
  const f32v divisor = set1(row.divisor);
  std::int64_t c = 0;
  for (; c + kTogether * W <= C; c += kTogether * W) {
    f32v sum[kTogether] = {set1(0), set1(0), set1(0), set1(0)};
    for (std::int64_t k = 0; k < row.count; ++k) {
      const T* token = row.token(k) + c;
      const f32v weight = set1(row.weight(k));
      for (int v = 0; v < kTogether; ++v) sum[v] = fma(weight, load(token + v * W), sum[v]);
    }
    for (int v = 0; v < kTogether; ++v) store(row.out + c + v * W, sum[v] / divisor);
  }
  for (; c < C; c += W) {
    const int lanes = static_cast<int>(C - c < W ? C - c : W);
    f32v sum = set1(0);
    for (std::int64_t k = 0; k < row.count; ++k) sum = fma(set1(row.weight(k)), load(row.token(k) + c, lanes), sum);
    store(row.out + c, sum / divisor, lanes);
  }
}

// Any stride of channels: channels outside, rows inside, so that where tokens are contiguous their lines are shared.
template <class T, class Row>
void write_rows_strided(const Row* rows, std::int64_t count, std::int64_t C, std::int64_t stride_c) {
  for (std::int64_t c = 0; c < C; ++c)
    for (const Row* row = rows; row < rows + count; ++row) {
      T& to = row->out[c];
      if (row->divisor == 0) {
        to = T{};
      } else if (row->copy) {
        to = row->token(0)[c * stride_c];
      } else {
        float sum = 0;
        for (std::int64_t k = 0; k < row->count; ++k) sum = fma_lane(row->weight(k), to_f32(row->token(k)[c * stride_c]), sum);
        from_f32(sum / row->divisor, to);
      }
    }
}

// Rows 0 … count−1 over threads; row_at(m) makes one.
template <class T, class RowAt>
void write_rows(std::int64_t count, std::int64_t C, std::int64_t stride_c, int threads, RowAt&& row_at) {
  constexpr std::int64_t kRows = 8;  // that a task takes; so many streams of writes fit the ways of a first-level cache
  const std::int64_t tasks = (count + kRows - 1) / kRows;
  const std::int64_t grain = 1 + 32768 / (kRows * (C + 16) * 8);  // 32 KiB are worth a thread
  parallel_for(tasks, grain, threads, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t first = t * kRows, left = count - first < kRows ? count - first : kRows;
      if (stride_c == 1) {
        for (std::int64_t m = first; m < first + left; ++m) write_row<T>(row_at(m), C);
      } else {
        decltype(row_at(first)) rows[kRows];
        for (std::int64_t k = 0; k < left; ++k) rows[k] = row_at(first + k);
        write_rows_strided<T>(rows, left, C, stride_c);
      }
    }
  });
}

}  // namespace effvlm::EFFVLM_ISA
