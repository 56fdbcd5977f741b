#include <algorithm>
#include <cstring>
#include <type_traits>

#include "core/check.h"
#include "core/cpu/exp_short.h"
#include "core/cpu/parallel.h"
#include "core/cpu/strided.h"
#include "core/dispatch.h"
#include "ops/causal_conv1d.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;

constexpr i64 kBlock = 512;             // most channels that one task has, where they are contiguous
constexpr i64 kAhead = 8;               // rows of channels fetched ahead: strides are too wide for the hardware to see them
constexpr i64 kPiece = 1024;            // inputs of one channel that are converted at a time
constexpr i64 kWorthAThread = 1 << 16;  // elements read below which waking another thread costs more than it saves

template <class T>
constexpr i64 kLine = 64 / sizeof(T);

// Inputs begin … end−1 of batch entry b.
struct Sequence {
  i64 b, begin, end;
};

Sequence sequence(const CausalConv1dArgs& a, i64 s) {
  if (!a.cu_seqlens) return {s, 0, a.L};
  return {0, a.cu_seqlens[s * a.cu_seqlens_stride], a.cu_seqlens[(s + 1) * a.cu_seqlens_stride]};
}

void check_sequences(const CausalConv1dArgs& a) {
  if (!a.cu_seqlens) return;
  i64 before = 0;
  for (i64 s = 0; s <= a.S; ++s) {
    const i64 start = a.cu_seqlens[s * a.cu_seqlens_stride];
    if (start < before || (s == 0 && start != 0) || (s == a.S && start != a.L))
      fail("causal_conv1d: expected cu_seqlens to ascend from 0 to L = %lld, got %lld at %lld", static_cast<long long>(a.L),
           static_cast<long long>(start), static_cast<long long>(s));
    before = start;
  }
}

// from_columns(f32 or T pointer): weight, bias and state are of either type.
template <class T, class F>
void by_type_or_f32(Dtype dtype, const void* p, F&& f) {
  if (dtype == Dtype::f32) return f(static_cast<const float*>(p));
  f(static_cast<const T*>(p));
}

template <class T>
void weights_of(const CausalConv1dArgs& a, i64 d, i64 rows, float* weights, float* bias, i64 stride) {
  by_type_or_f32<T>(a.weight_dtype, a.weight, [&](auto p) {
    columns(p + d * a.weight_stride_d, a.weight_stride_d, a.weight_stride_w, rows, a.W, weights, stride);
  });
  if (!a.bias) return std::fill(bias, bias + stride, 0.0f);
  by_type_or_f32<T>(a.bias_dtype, a.bias,
                    [&](auto p) { columns(p + d * a.bias_stride, a.bias_stride, 0, rows, 1, bias, stride); });
}

// What comes before the first input: the last W−1 columns of state, or zeros.
template <class T>
void history_of(const CausalConv1dArgs& a, i64 s, i64 d, i64 rows, float* history, i64 stride) {
  if (!a.state) return std::fill(history, history + (a.W - 1) * stride, 0.0f);
  const i64 first = s * a.state_stride_s + d * a.state_stride_d + (a.M - a.W + 1) * a.state_stride_m;
  by_type_or_f32<T>(a.state_dtype, a.state,
                    [&](auto p) { columns(p + first, a.state_stride_d, a.state_stride_m, rows, a.W - 1, history, stride); });
}

// The last M columns of [state, x], for `rows` channels from d on. Columns that stay move towards the front; in rows one after
// the other that is one move of the whole block, and what it brings from the next row is overwritten by the new columns.
template <class T, class State>
void write_state(const CausalConv1dArgs& a, i64 s, i64 d, i64 rows) {
  const auto [b, begin, end] = sequence(a, s);
  const i64 length = end - begin, kept = std::max<i64>(0, a.M - length), row = a.state_stride_d, step = a.state_stride_m;
  if (!length) return;
  State* state = static_cast<State*>(a.state) + s * a.state_stride_s + d * row;
  if (kept && step == 1 && row == a.M) {
    std::memmove(state, state + length, static_cast<std::size_t>(rows * a.M - length) * sizeof(State));
  } else {
    for (i64 c = 0; c < rows; ++c)
      for (i64 j = 0; j < kept; ++j) state[c * row + j * step] = state[c * row + (j + length) * step];
  }
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride_b + d * a.x_stride_d;
  for (i64 j = kept; j < a.M; ++j) {
    const T* column = x + (end - a.M + j) * a.x_stride_l;
    State* to = state + j * step;
    for (i64 c = 0; c < rows; ++c)
      if constexpr (std::is_same_v<T, State>)
        to[c * row] = column[c * a.x_stride_d];
      else
        to[c * row] = to_f32(column[c * a.x_stride_d]);
  }
}

template <class T>
void write_state(const CausalConv1dArgs& a, i64 s, i64 d, i64 rows) {
  if (!a.state) return;
  if (a.state_dtype == Dtype::f32) return write_state<T, float>(a, s, d, rows);
  write_state<T, T>(a, s, d, rows);
}

template <class T, bool kSilu>
f32v activate(f32v y) {
  if constexpr (kSilu) return silu_for<T>(y);
  return y;
}

// kW: W where that is known to the compiler, else 0.

// One sequence of `rows` channels that lie side by side: vectors along channels, the last W inputs in a ring of rows.
template <class T, int kW, bool kSilu>
void along_channels(const CausalConv1dArgs& a, i64 s, i64 d, i64 rows) {
  const i64 W = kW ? kW : a.W;
  const auto [b, begin, end] = sequence(a, s);
  float weights[kConvMaxWidth * kBlock], bias[kBlock], ring[kConvMaxWidth * kBlock];
  weights_of<T>(a, d, rows, weights, bias, kBlock);
  history_of<T>(a, s, d, rows, ring, kBlock);
  const float* input[kConvMaxWidth];  // rows of the ring, oldest first
  for (i64 w = 0; w < W; ++w) input[w] = ring + w * kBlock;
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride_b + d * a.x_stride_d;
  T* out = static_cast<T*>(a.out) + b * a.out_stride_b + d;
  for (i64 t = begin; t < end; ++t) {
    const T* from = x + t * a.x_stride_l;
    T* to = out + t * a.out_stride_l;
    float* newest = const_cast<float*>(input[W - 1]);
    const auto sum = [&](i64 c, f32v last) {
      store(newest + c, last);
      f32v y = load(bias + c);
      for (i64 w = 0; w < W - 1; ++w) y = fma(load(weights + w * kBlock + c), load(input[w] + c), y);
      return activate<T, kSilu>(fma(load(weights + (W - 1) * kBlock + c), last, y));
    };
    const T* ahead = t + kAhead < end ? from + kAhead * a.x_stride_l : from;
    for (i64 c = 0; c < rows; c += kLine<T>) __builtin_prefetch(ahead + c);
    for_lanes(
        rows, [&](i64 c) { store_short(to + c, sum(c, load_strided(from + c * a.x_stride_d, a.x_stride_d, f32v::width))); },
        [&](i64 c, int n) { store_short(to + c, sum(c, load_strided(from + c * a.x_stride_d, a.x_stride_d, n)), n); });
    const float* oldest = input[0];
    for (i64 w = 0; w < W - 1; ++w) input[w] = input[w + 1];
    input[W - 1] = oldest;
  }
}

// One sequence of one channel: vectors along L.
template <class T, int kW, bool kSilu>
void along_inputs(const CausalConv1dArgs& a, i64 s, i64 d) {
  const i64 W = kW ? kW : a.W;
  const auto [b, begin, end] = sequence(a, s);
  float weight[kConvMaxWidth * f32v::width], bias[f32v::width], history[kConvMaxWidth * f32v::width];
  alignas(64) float tile[kConvMaxWidth + kPiece + f32v::width];
  float* const now = tile + kConvMaxWidth;  // the piece; before it the W−1 inputs that came before
  weights_of<T>(a, d, 1, weight, bias, f32v::width);
  history_of<T>(a, s, d, 1, history, f32v::width);
  for (i64 w = 0; w < W - 1; ++w) now[w - (W - 1)] = history[w * f32v::width];
  f32v weights[kConvMaxWidth];
  for (i64 w = 0; w < W; ++w) weights[w] = set1(weight[w * f32v::width]);
  const f32v first = set1(bias[0]);
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride_b + d * a.x_stride_d;
  T* out = static_cast<T*>(a.out) + b * a.out_stride_b + d * a.out_stride_d;
  for (i64 t = begin; t < end; t += kPiece) {
    const i64 n = std::min(kPiece, end - t);
    if (a.x_stride_l == 1)
      for_lanes(
          n, [&](i64 i) { store(now + i, load(x + t + i)); }, [&](i64 i, int tail) { store(now + i, load(x + t + i, tail)); });
    else
      columns(x + t * a.x_stride_l, a.x_stride_l, 0, n, 1, now, 0);
    const auto sum = [&](i64 i) {
      f32v y = first;
      for (i64 w = 0; w < W; ++w) y = fma(weights[w], load(now + i + w - (W - 1)), y);
      return activate<T, kSilu>(y);
    };
    for_lanes(
        n, [&](i64 i) { store_short(out + t + i, sum(i)); }, [&](i64 i, int tail) { store_short(out + t + i, sum(i), tail); });
    std::memmove(now - (W - 1), now + n - (W - 1), static_cast<std::size_t>(W - 1) * sizeof(float));
  }
}

template <class T, int kW, bool kSilu>
void convolve(const CausalConv1dArgs& a) {
  const bool side_by_side = a.out_stride_d == 1 && (a.x_stride_d == 1 || a.L == 1);
  const i64 share = (a.S * a.D / std::max(1, 2 * a.threads) + 63) / 64 * 64;  // two tasks for every thread, in whole cache lines
  const i64 block = side_by_side ? std::clamp<i64>(share, 64, kBlock) : 1, blocks = (a.D + block - 1) / block;
  const int threads = a.B * a.D * (a.L + a.W) < kWorthAThread ? 1 : a.threads;
  parallel_for(a.S * blocks, 1, threads, [&](i64 first, i64 last, int) {
    for (i64 task = first; task < last; ++task) {
      const i64 s = task / blocks, d = task % blocks * block, rows = std::min(block, a.D - d);
      if (side_by_side)
        along_channels<T, kW, kSilu>(a, s, d, rows);
      else
        along_inputs<T, kW, kSilu>(a, s, d);
      write_state<T>(a, s, d, rows);
    }
  });
}

}  // namespace

void causal_conv1d_cpu(const CausalConv1dArgs& a) {
  check_sequences(a);
  by_float_dtype("causal_conv1d", a.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (a.W == 4) return a.silu ? convolve<T, 4, true>(a) : convolve<T, 4, false>(a);
    return a.silu ? convolve<T, 0, true>(a) : convolve<T, 0, false>(a);
  });
}

}  // namespace effvlm::EFFVLM_ISA
