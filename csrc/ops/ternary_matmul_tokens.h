// Part of ternary_matmul_cpu.cpp: tokens as the products want them.
#pragma once
#include "core/cpu/simd.h"
#include "ops/ternary_matmul.h"

namespace effvlm::EFFVLM_ISA {
namespace {

// to[s·256 + i] = x of strip s, as f32; a narrow strip is repeated, so that entries find their column modulo 256.
template <class T>
void spread_token(const T* x, std::int64_t stride, std::int64_t C, std::int64_t strips, float* to) {
  for (std::int64_t s = 0; s < strips; ++s, to += kTileColumns) {
    const Strip strip = strip_at(C, s);
    const std::int64_t width = C - strip.column < strip.pitch ? C - strip.column : strip.pitch;
    const T* from = x + strip.column * stride;
    std::int64_t c = 0;
    if (stride == 1)
      for (; c + f32v::width <= width; c += f32v::width) store(to + c, load(from + c));
    for (; c < width; ++c) to[c] = to_f32(from[c * stride]);
    for (; c < strip.pitch; ++c) to[c] = 0;
    for (; c < kTileColumns; ++c) to[c] = to[c - strip.pitch];
  }
}

inline float largest(const float* x, std::int64_t n) {
  f32v most = set1(0), odd = set1(0);
  for (std::int64_t c = 0; c < n; c += f32v::width) {
    const f32v value = load(x + c);
    most = max(abs(value), most);
    odd = odd + (value - value);  // 0, or NaN where the value is NaN or infinite
  }
  return reduce_max(most) + reduce_add(odd);
}

// Rounds half to even without a conversion: |x| < 2^22.
inline f32v round_even(f32v x) {
  const f32v magic = set1(12582912.0f);
  return (x + magic) - magic;
}

// q and m of one spread token; returns S.
inline float quantize_token(const float* x, std::int64_t strips, int levels, std::int8_t* q, std::uint8_t* step) {
  const float most = largest(x, strips * kTileColumns), limit = levels == 3 ? 127.0f : 63.0f, top = 255;
  const bool plain = most >= 1e-33f && most < INFINITY;  // less than that counts as zero
  const float unit = plain ? most / (limit * top) : most < 1e-33f ? 0.0f : NAN, inverse = plain ? top / most : 0;
  for (std::int64_t s = 0; s < strips; ++s, x += kTileColumns, q += kTileColumns) {
    const float steps = plain ? std::ceil(largest(x, kTileColumns) * inverse) : 1, m = steps < 1 ? 1 : steps > top ? top : steps;
    const float scale = plain ? 1 / (m * unit) : 0;
    step[s] = static_cast<std::uint8_t>(m);
    if (!plain) {
      std::memset(q, 0, kTileColumns);
      continue;
    }
    for (std::int64_t c = 0; c < kTileColumns; c += f32v::width) {
      float rounded[f32v::width];
      store(rounded, max(set1(-limit), min(set1(limit), round_even(load(x + c) * set1(scale)))));
      for (int l = 0; l < f32v::width; ++l) q[c + l] = static_cast<std::int8_t>(rounded[l]);
    }
  }
  return unit;
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
