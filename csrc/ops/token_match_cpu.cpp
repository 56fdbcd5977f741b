#include "core/check.h"
#include "core/cpu/dot.h"
#include "core/cpu/int8_strip.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/token_match.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

// Everything a call needs besides its arguments. Tokens are numbered b·N + n; sources b·S + i, destinations b·Dp + j.
struct Scratch {
  i64 S, D, Dp, K;        // sources, destinations, padded destinations and channels
  float* inverse_norm;    // (B,N): 1/‖x‖ for cosine, 1 for dot, 0 for a zero token
  i64* bad_token;         // (threads): first token found that is not finite, or -1
  void* packed;           // (B,N,C): x with contiguous channels, where x itself has not
  // Screening only: x̃ = x·inverse_norm is centred on the mean of some destinations and rounded to int8, x̃ ≈ mean + scale·q.
  float* mean;            // (B,K)
  std::uint8_t* source;   // (B,Sp,K): q + 128
  std::int8_t* destination;  // (B,Dp/16 panels,K,16)
  float *source_scale, *source_error, *source_norm, *source_slack;  // (B,Sp)
  float *scale, *offset, *error, *norm, *reach;  // (B,Dp): offset <mean, x̃>; error ‖x̃−mean−scale·q‖; norm ‖scale·q‖+; reach ‖x̃‖+‖mean‖
  i32* shift;             // (B,Dp): 128·Σq, what the +128 of the sources adds to a dot product
  float* row;             // (threads,K): one token in f32
  float* strip;           // (threads,kStripRows,Dp): upper bounds of the scores of some sources
};

bool contiguous(const TokenMatchArgs& a) { return a.x_stride_c == 1 || a.C <= 1; }

Scratch lay_out(const TokenMatchArgs& a, bool screened) {
  char* next = static_cast<char*>(a.workspace);
  const auto take = [&](auto*& p, i64 count) {
    p = reinterpret_cast<std::remove_reference_t<decltype(p)>>(next);
    next += round_up(count * static_cast<i64>(sizeof *p), 64);
  };
  Scratch s{};
  s.S = (a.N + 1) / 2, s.D = a.N / 2, s.Dp = round_up(s.D, kMatchPanel), s.K = round_up(a.C, kMatchChannels);
  take(s.inverse_norm, a.B * a.N);
  take(s.bad_token, a.threads);
  if (screened) {
    const i64 Sp = round_up(s.S, kMatchRows);
    take(s.mean, a.B * s.K);
    take(s.source, a.B * Sp * s.K);
    take(s.destination, a.B * s.Dp * s.K);
    for (float** field : {&s.source_scale, &s.source_error, &s.source_norm, &s.source_slack}) take(*field, a.B * Sp);
    for (float** field : {&s.scale, &s.offset, &s.error, &s.norm, &s.reach}) take(*field, a.B * s.Dp);
    take(s.shift, a.B * s.Dp);
    take(s.row, a.threads * s.K);
    take(s.strip, a.threads * kMatchStrip * s.Dp);
  }
  if (!contiguous(a)) {
    char* bytes;
    take(bytes, a.B * a.N * a.C * (a.dtype == Dtype::f32 ? 4 : 2));
    s.packed = bytes;
  }
  EFFVLM_CHECK(next <= static_cast<char*>(a.workspace) + a.workspace_bytes, "token_match: workspace of %lld bytes is too small",
               static_cast<long long>(a.workspace_bytes));
  return s;
}

template <class T>
struct Matcher {
  const TokenMatchArgs& a;
  Scratch s;

  const T* token(i64 b, i64 n) const {
    if (s.packed) return static_cast<const T*>(s.packed) + (b * a.N + n) * a.C;
    return static_cast<const T*>(a.x) + b * a.x_stride_b + n * a.x_stride_n;
  }

  void pack(i64 b, i64 n) const {
    const T* from = static_cast<const T*>(a.x) + b * a.x_stride_b + n * a.x_stride_n;
    T* to = const_cast<T*>(token(b, n));
    for (i64 c = 0; c < a.C; ++c) to[c] = from[c * a.x_stride_c];
  }

  float squared_norm(const T* x) const {
    f32v sum = set1(0);
    for_lanes(
        a.C, [&](i64 c) { sum = fma(load(x + c), load(x + c), sum); },
        [&](i64 c, int n) { sum = fma(load(x + c, n), load(x + c, n), sum); });
    return reduce_add(sum);
  }

  // Fills inverse_norm; false when the squared norm is no finite number, which is how NaN, Inf and overflow show.
  bool measure(i64 b, i64 n) const {
    const float square = squared_norm(token(b, n));
    s.inverse_norm[b * a.N + n] = !a.cosine ? 1.0f : square > 0 ? 1 / std::sqrt(square) : 0.0f;
    return square <= 3.4028235e38f;
  }

  float score(i64 b, i64 source, i64 destination, float dot) const {
    const float* inverse = s.inverse_norm + b * a.N;
    return dot * inverse[2 * destination + 1] * inverse[2 * source] + 0.0f;  // + 0: no −0, whose bits sort below +0
  }

  void keep_best(i64 b, i64 source, i64 destination, float dot) const {
    const float value = score(b, source, destination, dot);
    float& best = a.score[b * s.S + source];
    if (value > best || a.partner[b * s.S + source] < 0) {
      best = value;
      a.partner[b * s.S + source] = static_cast<i32>(2 * destination + 1);
    }
  }

  void forget_best(i64 b, i64 first, i64 last) const {
    for (i64 i = first; i < last; ++i) a.score[b * s.S + i] = 0, a.partner[b * s.S + i] = -1;
  }

  // ---- direct: every pair in f32, blocks of MR sources × 4 destinations in registers ----

  static constexpr int kDirectRows = 32;  // sources per block: their rows stay in the second-level cache
#if defined(__AVX512F__)
  static constexpr int MR = 4;
#else
  static constexpr int MR = 2;  // 16 registers
#endif

  void direct_block(i64 b, i64 first, i64 last) const {
    forget_best(b, first, last);
    float dot[MR * 4];
    const T *rows[MR], *columns[4];
    for (i64 j = 0; j < s.D; j += 4) {
      for (int k = 0; k < 4; ++k) columns[k] = token(b, 2 * (j + k < s.D ? j + k : s.D - 1) + 1);
      for (i64 i = first; i < last; i += MR) {
        for (int k = 0; k < MR; ++k) rows[k] = token(b, 2 * (i + k < last ? i + k : last - 1));
        dots<T, MR, 4, 1>(rows, columns, a.C, dot);
        for (int k = 0; k < MR && i + k < last; ++k)
          for (int l = 0; l < 4 && j + l < s.D; ++l) keep_best(b, i + k, j + l, dot[k * 4 + l]);
      }
    }
  }

#if defined(__AVX512VNNI__)
  // ---- screened: int8 upper and lower bounds first, then f32 for the destinations that can be the best ----
  //
  // With x̃ = mean + p + e (p = scale·q as rounded, e the rounding error): <x̃_i, x̃_j> = <p_i, p_j> + <mean, x̃_j> + (a term of
  // the row alone) ± (‖e_i‖·‖p_j‖ + ‖x̃_i − mean‖·‖e_j‖), by Cauchy-Schwarz; + slack for f32 rounding, (2C+128)·2^-24 of the norms.

  void find_mean(i64 b) const {
    constexpr i64 kSample = 64;  // any centre is correct; a good one makes the bounds tight
    float* mean = s.mean + b * s.K;
    const i64 count = s.D < kSample ? s.D : kSample;
    for (i64 c = 0; c < s.K; ++c) mean[c] = 0;
    for (i64 t = 0; t < count; ++t) {
      const T* x = token(b, 2 * (t * s.D / count) + 1);
      const float square = squared_norm(x), w = (a.cosine ? (square > 0 ? 1 / std::sqrt(square) : 0) : 1) / count;
      for_lanes(
          a.C, [&](i64 c) { store(mean + c, fma(load(x + c), set1(w), load(mean + c))); },
          [&](i64 c, int n) { store(mean + c, fma(load(x + c, n), set1(w), load(mean + c, n)), n); });
    }
  }

  struct Rounded {
    float scale, error, norm, offset, mean_norm;
    i32 sum;
  };

  // Rounds token n of batch b to int8 bytes, 16 at a time, handed to put(c, bytes).
  template <class Put>
  Rounded round_token(i64 b, i64 n, float* y, Put&& put) const {
    const T* x = token(b, n);
    const float *mean = s.mean + b * s.K, inverse = s.inverse_norm[b * a.N + n];
    f32v largest = set1(0), square = set1(0), offset = set1(0), mean_square = set1(0), error = set1(0);
    const auto centre = [&](i64 c, f32v value) {
      const f32v m = load(mean + c), normal = value * set1(inverse), centred = normal - m;
      store(y + c, centred);
      largest = max(largest, abs(centred));
      square = fma(centred, centred, square);
      offset = fma(m, normal, offset);
      mean_square = fma(m, m, mean_square);
    };
    i64 c = 0;  // y and mean are padded to K with zeros, so that no lane of a tail needs a mask
    for (; c + 16 <= a.C; c += 16) centre(c, load(x + c));
    if (c < a.C) centre(c, load(x + c, static_cast<int>(a.C - c))), c += 16;
    for (; c < s.K; c += 16) store(y + c, set1(0));
    const float peak = reduce_max(largest), scale = peak / 127, inverse_scale = peak > 0 ? 127 / peak : 0;
    __m512i sum = _mm512_setzero_si512();
    for (c = 0; c < s.K; c += 16) {
      const __m512i q = _mm512_cvtps_epi32((load(y + c) * set1(inverse_scale)).v);
      const f32v rest = fma(f32v{_mm512_cvtepi32_ps(q)}, set1(-scale), load(y + c));
      error = fma(rest, rest, error);
      sum = _mm512_add_epi32(sum, q);
      put(c, _mm512_cvtepi32_epi8(q));
    }
    constexpr float kUp = 1.0001f;  // covers the rounding of the norms themselves
    return {scale, kUp * std::sqrt(reduce_add(error)), kUp * std::sqrt(reduce_add(square)), reduce_add(offset),
            kUp * std::sqrt(reduce_add(mean_square)), _mm512_reduce_add_epi32(sum)};
  }

  float length(i64 b, i64 n) const {  // ‖x̃‖, and no less
    return a.cosine ? 1.0001f : 1.0001f * std::sqrt(squared_norm(token(b, n)));
  }

  void round_source(i64 b, i64 i, float* y) const {
    const i64 at = b * round_up(s.S, kMatchRows) + i;
    std::uint8_t* bytes = s.source + at * s.K;
    const Rounded r = round_token(b, 2 * i, y, [&](i64 c, __m128i q) {
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes + c), _mm_xor_si128(q, _mm_set1_epi8(-128)));  // + 128
    });
    s.source_scale[at] = r.scale, s.source_error[at] = r.error, s.source_norm[at] = r.norm;
    s.source_slack[at] = (2.0f * a.C + 128) * 0x1p-24f * (length(b, 2 * i) + r.mean_norm);
  }

  void round_destination(i64 b, i64 j, float* y) const {
    const i64 at = b * s.Dp + j;
    std::int8_t* panel = s.destination + (at - at % kPanel) * s.K + j % kPanel * 4;
    if (j >= s.D) {  // padding: never a candidate
      s.scale[at] = s.error[at] = s.norm[at] = s.reach[at] = 0, s.offset[at] = -INFINITY, s.shift[at] = 0;
      return;
    }
    const Rounded r = round_token(b, 2 * j + 1, y, [&](i64 c, __m128i q) {
      alignas(16) std::int8_t bytes[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes), q);
      for (int four = 0; four < 16; four += 4) std::memcpy(panel + (c + four) * kPanel, bytes + four, 4);
    });
    s.scale[at] = r.scale, s.offset[at] = r.offset, s.error[at] = r.error, s.norm[at] = r.norm + r.error;
    s.reach[at] = length(b, 2 * j + 1) + r.mean_norm, s.shift[at] = 128 * r.sum;
  }

  // Upper bounds of all scores of rows first … last−1 into the strip, their largest lower bounds into `floor`.
  void bound_scores(i64 b, i64 first, i64 last, float* strip, f32v* floor) const {
    [[maybe_unused]] const TileScope tiles;
    alignas(64) i32 sums[kBlockRows * 32];
    const i64 source = b * round_up(s.S, kMatchRows) + first;
    for (i64 i = 0; i < last - first; ++i) floor[i] = set1(-INFINITY);
    for (i64 j = 0; j < s.Dp; j += kBlockPanels * kPanel) {
      const i64 panels = (s.Dp - j) / kPanel < kBlockPanels ? 1 : kBlockPanels;
      for (i64 i0 = 0; i0 < last - first; i0 += kBlockRows) {
        int8_block(s.source + (source + i0) * s.K, s.K, s.destination + (b * s.Dp + j) * s.K, panels, sums);
        for (i64 p = 0; p < panels; ++p) {
          const i64 at = b * s.Dp + j + p * kPanel;
          const __m512i shift = _mm512_load_si512(s.shift + at);
          const f32v scale = load(s.scale + at), offset = load(s.offset + at), error = load(s.error + at);
          const f32v norm = load(s.norm + at), reach = load(s.reach + at);
          for (i64 k = 0; k < kBlockRows && i0 + k < last - first; ++k) {
            const i64 row = source + i0 + k;
            const f32v exact = {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums + k * 32 + p * kPanel), shift))};
            const f32v middle = fma(exact, scale * set1(s.source_scale[row]), offset);
            const f32v rounding = fma(set1(s.source_norm[row]), error, set1(s.source_slack[row]) * reach);
            const f32v radius = fma(set1(s.source_error[row]), norm, rounding);
            store(strip + (i0 + k) * s.Dp + j + p * kPanel, middle + radius);
            floor[i0 + k] = max(floor[i0 + k], middle - radius);
          }
        }
      }
    }
  }

  // f32 scores of one destination with the sources in `rows` (a bit per row of the strip), four at a time.
  void resolve(i64 b, i64 first, i64 j, std::uint32_t rows) const {
    const T* column = token(b, 2 * j + 1);
    while (rows) {
      i64 index[4];
      const T* row[4];
      int count = 0;
      for (; count < 4 && rows; ++count, rows &= rows - 1) {
        index[count] = first + __builtin_ctz(rows);
        row[count] = token(b, 2 * index[count]);
      }
      float dot[4];
      if (count == 1) {
        dots<T, 1, 1, 4>(row, &column, a.C, dot);
      } else {
        for (int k = count; k < 4; ++k) row[k] = row[0];
        dots<T, 4, 1, 4>(row, &column, a.C, dot);
      }
      for (int k = 0; k < count; ++k) keep_best(b, index[k], j, dot[k]);
    }
  }

  void screened_block(i64 b, i64 first, i64 last, int thread) const {
    forget_best(b, first, last);
    float* strip = s.strip + thread * kMatchStrip * s.Dp;
    f32v floor[kStripRows];
    float least[kStripRows];
    bound_scores(b, first, last, strip, floor);
    for (i64 i = 0; i < last - first; ++i) least[i] = reduce_max(floor[i]);
    for (i64 j = 0; j < s.Dp; j += 16) {
      std::uint32_t rows[16] = {};
      unsigned any = 0;
      for (i64 i = 0; i < last - first; ++i) {
        unsigned lanes = _mm512_cmp_ps_mask(_mm512_load_ps(strip + i * s.Dp + j), _mm512_set1_ps(least[i]), _CMP_GE_OQ);
        any |= lanes;
        for (; lanes; lanes &= lanes - 1) rows[__builtin_ctz(lanes)] |= 1u << i;
      }
      for (; any; any &= any - 1) resolve(b, first, j + __builtin_ctz(any), rows[__builtin_ctz(any)]);
    }
  }

  void prepare_screen() const {
    parallel_for(a.B, 1, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 b = begin; b < end; ++b) find_mean(b);
    });
    parallel_for(a.B * (s.S + s.Dp), 1 + 8192 / s.K, a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 t = begin; t < end; ++t) {
        const i64 b = t / (s.S + s.Dp), k = t % (s.S + s.Dp);
        if (k < s.S) {
          round_source(b, k, s.row + thread * s.K);
        } else {
          round_destination(b, k - s.S, s.row + thread * s.K);
        }
      }
    });
  }
#endif

  void measure_all() const {
    for (int t = 0; t < a.threads; ++t) s.bad_token[t] = -1;
    parallel_for(a.B * a.N, 1 + 16384 / (a.C + 1), a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 t = begin; t < end; ++t) {
        if (s.packed) pack(t / a.N, t % a.N);
        i64& bad = s.bad_token[thread];
        if (!measure(t / a.N, t % a.N) && (bad < 0 || t < bad)) bad = t;
      }
    });
    i64 bad = -1;
    for (int t = 0; t < a.threads; ++t)
      if (s.bad_token[t] >= 0 && (bad < 0 || s.bad_token[t] < bad)) bad = s.bad_token[t];
    if (bad >= 0)
      fail("token_match: expected finite tokens, got NaN, Inf or a squared norm beyond float32 at batch %lld, token %lld",
           static_cast<long long>(bad / a.N), static_cast<long long>(bad % a.N));
  }

  void match([[maybe_unused]] bool screened) const {
    measure_all();
    i64 rows = kDirectRows;
#if defined(__AVX512VNNI__)
    if (screened) prepare_screen(), rows = kStripRows;
#endif
    const i64 blocks = (s.S + rows - 1) / rows;
    parallel_for(a.B * blocks, 1, a.threads, [&](i64 begin, i64 end, [[maybe_unused]] int thread) {
      for (i64 t = begin; t < end; ++t) {
        const i64 b = t / blocks, first = t % blocks * rows, last = first + rows < s.S ? first + rows : s.S;
#if defined(__AVX512VNNI__)
        if (screened) {
          screened_block(b, first, last, thread);
          continue;
        }
#endif
        direct_block(b, first, last);
      }
    });
  }
};

// Where screening pays: enough pairs for int8 to outweigh the rounding, and sums that stay inside 32 bits.
bool pick_screened([[maybe_unused]] const TokenMatchArgs& a) {
#if defined(__AVX512VNNI__)
  return a.N >= 128 && a.C >= 64 && a.C <= kInt8MaxK;
#else
  return false;
#endif
}

std::uint32_t sort_key(float x) {  // unsigned order of keys = order of floats
  const std::uint32_t bits = f32_to_bits(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The r-th largest key and how many keys equal to it are among the r largest: radix select, a byte at a time.
std::uint32_t kth_key(const float* score, i64 S, i64 r, i64& equal) {
  std::uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    i64 count[256] = {};
    for (i64 i = 0; i < S; ++i) {
      const std::uint32_t key = sort_key(score[i]);
      if (shift == 24 || (key ^ prefix) >> (shift + 8) == 0) ++count[key >> shift & 255];
    }
    int digit = 255;
    for (; r > count[digit]; --digit) r -= count[digit];
    prefix |= static_cast<std::uint32_t>(digit) << shift;
  }
  equal = r;
  return prefix;
}

void make_groups(const TokenMatchArgs& a, i64 b) {
  const i64 S = (a.N + 1) / 2;
  const float* score = a.score + b * S;
  const i32* partner = a.partner + b * S;
  i32* group = a.group + b * a.N;
  i64 equal = 0;
  const std::uint32_t least = a.r ? kth_key(score, S, a.r, equal) : 0xffffffffu;
  constexpr i32 kMerged = -1;
  i32 next = 0;
  for (i64 n = 0; n < a.N; ++n) {
    const std::uint32_t key = n % 2 == 0 && a.r ? sort_key(score[n / 2]) : 0;
    const bool merged = key > least || (key == least && equal-- > 0);
    group[n] = merged ? kMerged : next++;
  }
  for (i64 i = 0; i < S; ++i)
    if (group[2 * i] == kMerged) group[2 * i] = group[partner[i]];
}

}  // namespace

void token_match_cpu(const TokenMatchArgs& a) {
  if (a.B == 0 || a.N == 0) return;
  const bool screened = pick_screened(a);
  const Scratch s = lay_out(a, screened);
  by_float_dtype("token_match", a.dtype, [&](auto type) { Matcher<typename decltype(type)::type>{a, s}.match(screened); });
  parallel_for(a.B, 1, a.threads, [&](i64 begin, i64 end, int) {
    for (i64 b = begin; b < end; ++b) make_groups(a, b);
  });
}

}  // namespace effvlm::EFFVLM_ISA
