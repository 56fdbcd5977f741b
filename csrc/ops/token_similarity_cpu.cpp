#include <type_traits>

#include "core/cpu/dot.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/token_similarity.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;

constexpr int kChains = 4;             // partial sums, to cover the latency of the multiply-add
constexpr i64 kRows = 8, kPart = 256;  // of strided rows, gathered at a time; kPart: whole steps of all chains

// Partial sums of a pair of rows; `add` may be called for one part of the channels after the other.
template <class T>
struct Pair {
  using Lanes = DotLanes<T>;
  static constexpr int W = Lanes::width;
  static_assert(kPart % (kChains * W) == 0, "a part ends where the chains do");
  f32v dot[kChains], a_square[kChains], b_square[kChains];

  Pair() {
    for (int k = 0; k < kChains; ++k) dot[k] = a_square[k] = b_square[k] = set1(0);
  }

  void add(const T* a, const T* b, i64 C) {
    const auto step = [&](int k, typename Lanes::Vector va, typename Lanes::Vector vb) {
      dot[k] = Lanes::mac(dot[k], va, vb);
      a_square[k] = Lanes::mac(a_square[k], va, va);
      b_square[k] = Lanes::mac(b_square[k], vb, vb);
    };
    i64 c = 0;
    for (; c + kChains * W <= C; c += kChains * W)
      for (int k = 0; k < kChains; ++k) step(k, Lanes::take(a + c + k * W), Lanes::take(b + c + k * W));
    for (; c + W <= C; c += W) step(0, Lanes::take(a + c), Lanes::take(b + c));
    const int rest = static_cast<int>(C - c);
    if (rest) step(0, Lanes::take(a + c, rest), Lanes::take(b + c, rest));
  }

  static double sum(const f32v (&x)[kChains]) { return reduce_add((x[0] + x[1]) + (x[2] + x[3])); }

  float cosine() const {
    const double squares = sum(a_square) * sum(b_square);  // exact
    if (squares == 0) return 0;
    const float cosine = static_cast<float>(sum(dot) / std::sqrt(squares));
    return !(squares < INFINITY) ? NAN : cosine > 1 ? 1 : cosine < -1 ? -1 : cosine;
  }
};

template <class T>
struct Rows {
  const TokenSimilarityArgs& args;

  const T* a(i64 n) const { return static_cast<const T*>(args.a) + n * args.a_stride_n; }
  const T* b(i64 n) const { return static_cast<const T*>(args.b) + n * args.b_stride_n; }

  void compare(i64 first, i64 last) const {
    if (args.a_stride_c != 1 || args.b_stride_c != 1) return compare_strided(first, last);
    for (i64 n = first; n < last; ++n) {
      Pair<T> pair;
      pair.add(a(n), b(n), args.C);
      args.out[n] = pair.cosine();
    }
  }

  // Channels outside, rows inside, so that where tokens are contiguous their lines are shared.
  static void gather(const T* from, i64 stride_n, i64 stride_c, i64 rows, i64 channels, T (*to)[kPart]) {
    for (i64 c = 0; c < channels; ++c)
      for (i64 n = 0; n < rows; ++n) to[n][c] = from[n * stride_n + c * stride_c];
  }

  void compare_strided(i64 first, i64 last) const {
    T part_a[kRows][kPart], part_b[kRows][kPart];
    for (i64 n = first; n < last; n += kRows) {
      const i64 rows = last - n < kRows ? last - n : kRows;
      Pair<T> pairs[kRows];
      for (i64 c = 0; c < args.C; c += kPart) {
        const i64 channels = args.C - c < kPart ? args.C - c : kPart;
        gather(a(n) + c * args.a_stride_c, args.a_stride_n, args.a_stride_c, rows, channels, part_a);
        gather(b(n) + c * args.b_stride_c, args.b_stride_n, args.b_stride_c, rows, channels, part_b);
        for (i64 k = 0; k < rows; ++k) pairs[k].add(part_a[k], part_b[k], channels);
      }
      for (i64 k = 0; k < rows; ++k) args.out[n + k] = pairs[k].cosine();
    }
  }

  // By how many rows b is a, shifted; N if it is not.
  i64 period() const {
    const i64 row = args.a_stride_n * static_cast<i64>(sizeof(T));
    if (args.a_stride_n <= 0 || args.a_stride_n != args.b_stride_n || args.a_stride_c != args.b_stride_c) return args.N;
    const i64 bytes = static_cast<const char*>(args.b) - static_cast<const char*>(args.a), rows = bytes / row;
    const i64 shift = rows < 0 ? -rows : rows;
    return bytes % row == 0 && shift > 0 && shift < args.N ? shift : args.N;
  }

  // Task ↔ a block of neighbouring rows of a frame, and the same block of the frames after it.
  void compare_all() const {
    constexpr i64 kBytes = 128 << 10, kFrames = 16;
    const i64 P = period(), fit = kBytes / (args.C * static_cast<i64>(sizeof(T)) + 1), block = fit < 1 ? 1 : fit < P ? fit : P;
    const i64 blocks = (P + block - 1) / block, frames = (args.N + P - 1) / P, runs = (frames + kFrames - 1) / kFrames;
    parallel_for(blocks * runs, 1, args.threads, [&](i64 begin, i64 end, int) {
      for (i64 t = begin; t < end; ++t) {
        const i64 column = t % blocks * block, width = P - column < block ? P - column : block;
        const i64 last_frame = (t / blocks + 1) * kFrames < frames ? (t / blocks + 1) * kFrames : frames;
        for (i64 frame = t / blocks * kFrames; frame < last_frame; ++frame) {
          const i64 first = frame * P + column, last = first + width < args.N ? first + width : args.N;
          if (first < last) compare(first, last);
        }
      }
    });
  }
};

}  // namespace

void token_similarity_cpu(const TokenSimilarityArgs& a) {
  if (a.N == 0) return;
  by_float_dtype("token_similarity", a.dtype, [&](auto type) { Rows<typename decltype(type)::type>{a}.compare_all(); });
}

}  // namespace effvlm::EFFVLM_ISA
