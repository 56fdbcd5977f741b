// What the CPU form of selective_scan is made of: rows of one vector of channels are packed, scanned and stored. Everything in
// between is f32, whatever the types and strides of the tensors.
#pragma once
#include "core/cpu/exp_short.h"
#include "core/cpu/transpose.h"
#include "core/dispatch.h"
#include "ops/selective_scan.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;

constexpr int kLanes = f32v::width;

// Channels' tokens, or tokens' channels, are far apart: too many streams for the hardware to see that they go on.
constexpr i64 kAhead = 256;  // bytes of a row that is read along L
constexpr i64 kRowsAhead = kScanTile;

#if defined(__AVX512F__)
// The even and the odd elements of 16 words.
inline void split(const float* words, float* even, float* odd, bf16) {
  const __m512i x = _mm512_loadu_si512(words);
  _mm512_storeu_si512(even, _mm512_slli_epi32(x, 16));
  _mm512_storeu_si512(odd, _mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline void split(const float* words, float* even, float* odd, f16) {
  const __m512i x = _mm512_loadu_si512(words);
  store(even, widen(_mm512_cvtepi32_epi16(x), f16{}));
  store(odd, widen(_mm512_cvtepi32_epi16(_mm512_srli_epi32(x, 16)), f16{}));
}

// to[i·pitch + c] = from[c·stride + i] for whole blocks of 16 words of each of 16 rows; returns how many i that were.
template <class T>
inline i64 pack_turned(const T* from, i64 stride, i64 steps, int count, float* to, i64 pitch) {
  constexpr i64 kBlock = 64 / sizeof(T);
  i64 i = 0;
  for (; i + kBlock <= steps; i += kBlock) {
    const float* rows[16];
    for (int c = 0; c < 16; ++c) {
      rows[c] = reinterpret_cast<const float*>(from + (c < count ? c : 0) * stride + i);
      __builtin_prefetch(rows[c] + kAhead / 4);
    }
    if constexpr (sizeof(T) == 4) {
      transpose_16x16(rows, to + i * pitch, pitch);
    } else {  // pairs of steps travel as words
      float words[256];
      transpose_16x16(rows, words, 16);
      for (int j = 0; j < 16; ++j) split(words + 16 * j, to + (i + 2 * j) * pitch, to + (i + 2 * j + 1) * pitch, T{});
    }
  }
  return i;
}

template <class T>
inline i64 unpack_turned(const float* from, i64 steps, int count, T* to, i64 stride) {
  i64 i = 0;
  for (; i + 16 <= steps; i += 16) {
    const float* rows[16];
    float turned[256];
    for (int j = 0; j < 16; ++j) rows[j] = from + (i + j) * 16;
    transpose_16x16(rows, turned, 16);
    for (int c = 0; c < count; ++c) store_short(to + c * stride + i, load(turned + 16 * c));
  }
  return i;
}
#else
template <class T>
inline i64 pack_turned(const T*, i64, i64, int, float*, i64) {
  return 0;
}
template <class T>
inline i64 unpack_turned(const float*, i64, int, T*, i64) {
  return 0;
}
#endif

// to[i·pitch + c] = from[c·stride_c + i·stride_l] for i < steps, c < count <= kLanes. Up to kLanes numbers of each row may be
// written, where pitch has room for them.
template <class T>
void pack(const T* from, i64 stride_c, i64 stride_l, i64 steps, int count, float* to, i64 pitch) {
  i64 i = 0;
  if (pitch == 1 && stride_l == 1) {
    for (; i + kLanes <= steps; i += kLanes) store(to + i, load(from + i));
  } else if (stride_c == 1 && count == kLanes) {
    for (; i < steps; ++i) {
      __builtin_prefetch(from + (i + kRowsAhead) * stride_l);
      store(to + i * pitch, load(from + i * stride_l));
    }
  } else if (stride_c == 1 && pitch > 1) {
    for (; i < steps; ++i) store(to + i * pitch, load(from + i * stride_l, count));
  } else if (stride_l == 1 && pitch > 1) {
    i = pack_turned(from, stride_c, steps, count, to, pitch);
  }
  for (; i < steps; ++i)
    for (int c = 0; c < count; ++c) to[i * pitch + c] = to_f32(from[c * stride_c + i * stride_l]);
}

// The other way round, from rows of kLanes.
template <class T>
void unpack(const float* from, i64 steps, int count, T* to, i64 stride_c, i64 stride_l) {
  i64 i = 0;
  if (stride_c == 1 && count == kLanes) {
    for (; i < steps; ++i) store_short(to + i * stride_l, load(from + i * kLanes));
  } else if (stride_c == 1) {
    for (; i < steps; ++i) store_short(to + i * stride_l, load(from + i * kLanes), count);
  } else if (stride_l == 1) {
    i = unpack_turned(from, steps, count, to, stride_c);
  }
  for (; i < steps; ++i)
    for (int c = 0; c < count; ++c) from_f32(from[i * kLanes + c], to[c * stride_c + i * stride_l]);
}

// Where a tensor's (b, k, c, l) is.
template <class T>
inline T* at(const ScanTensor& x, i64 b, i64 k, i64 c, i64 l) {
  return static_cast<T*>(x.data) + b * x.stride_b + k * x.stride_k + c * x.stride_c + l * x.stride_l;
}

// Rows of a tensor from place (b, k, c, l) on, `every` places apart.
inline void read(const ScanTensor& x, i64 b, i64 k, i64 c, i64 l, i64 every, i64 steps, int count, float* to, i64 pitch) {
  by_float_dtype("selective_scan", x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    pack(at<const T>(x, b, k, c, l), x.stride_c, every * x.stride_l, steps, count, to, pitch);
  });
}

inline void write(const float* from, const ScanTensor& x, i64 b, i64 k, i64 c, i64 l, i64 steps, int count) {
  by_float_dtype("selective_scan", x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    unpack(from, steps, count, at<T>(x, b, k, c, l), x.stride_c, x.stride_l);
  });
}

// What a vector of channels goes through: rows `stride` floats apart, of which y is added to.
struct ScanRows {
  i64 steps, stride;
  const float *dt, *u;
  float* y;
};

// G of a token's states, in registers for all steps. b and c: the first of these states at the first step. skip: null but for the
// first G. decay: log2(e)·A.
template <int G>
inline void scan_states(const ScanRows& rows, const float* b, const float* c, i64 pitch, const float* decay, const float* skip,
                        float* states) {
  f32v h[G];
  for (int n = 0; n < G; ++n) h[n] = load(states + n * kLanes);
  for (i64 i = 0; i < rows.steps; ++i, b += pitch, c += pitch) {
    const f32v dt = load(rows.dt + i * rows.stride), u = load(rows.u + i * rows.stride), du = dt * u;
    f32v even = load(rows.y + i * rows.stride), odd = set1(0);  // two sums: half the wait for additions
    if (skip) even = fma(load(skip), u, even);
    for (int n = 0; n < G; ++n) {
      h[n] = fma(du, set1(b[n]), exp2(dt * load(decay + n * kLanes)) * h[n]);
      (n % 2 ? odd : even) = fma(h[n], set1(c[n]), n % 2 ? odd : even);
    }
    store(rows.y + i * rows.stride, G > 1 ? even + odd : even);
  }
  for (int n = 0; n < G; ++n) store(states + n * kLanes, h[n]);
}

inline void scan(const ScanRows& rows, i64 N, const float* b, const float* c, i64 pitch, const float* decay, const float* skip,
                 float* states) {
  constexpr int kGroup = kLanes == 16 ? 16 : 4;  // states, sums and coefficients fill the registers
  i64 n = 0;
  const auto by = [&](auto group) {
    constexpr int G = decltype(group)::value;
    for (; n + G <= N; n += G)
      scan_states<G>(rows, b + n, c + n, pitch, decay + n * kLanes, n ? nullptr : skip, states + n * kLanes);
  };
  by(std::integral_constant<int, kGroup>{});
  by(std::integral_constant<int, 4>{});
  by(std::integral_constant<int, 2>{});
  by(std::integral_constant<int, 1>{});
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
