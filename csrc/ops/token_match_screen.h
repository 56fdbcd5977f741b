// Part of token_match_cpu.cpp: which destinations can be the best one of a source, decided by int8 dot products.
//
// Let x̃ be a token (divided by its norm for cosine) and m the mean of some destinations; any m is correct, a good one is tight.
// Round x̃ − m to int8: x̃ = m + p + e with p = scale·q and e what rounding left. Then, by Cauchy-Schwarz,
//     <x̃_i, x̃_j> = [<m, x̃_i> − <m, m>] + <m, x̃_j> + <p_i, p_j> ± (‖e_i‖·‖p_j‖ + ‖x̃_i − m‖·‖e_j‖ + slack)
// where <p_i, p_j> is an exact integer times the scales, and slack covers the f32 arithmetic on both sides: each sum of C
// products errs by at most C·2^-24 of the norms, four such sums are compared, and (4C+256)·2^-24·(‖x̃_i‖+‖m‖)·(‖x̃_j‖+‖m‖) is more.
// The bracket is the same for a whole row. Only a destination whose upper bound reaches the row's best known score is computed
// in f32, so the result is the exact one, at about a quarter of the multiplications.
#pragma once
#include "core/cpu/dot.h"
#include "core/cpu/int8_strip.h"
#include "core/cpu/parallel.h"
#include "ops/token_match.h"

namespace effvlm::EFFVLM_ISA {
namespace {

struct ScreenScratch {
  std::int64_t S, D, Sp, Dp, K;                                      // sources, destinations, both padded, padded channels
  float *mean, *mean_square;                                         // (B,K), (B): m and <m, m>
  std::uint8_t* source;                                              // (B,Sp,K): q + 128
  std::int8_t* destination;                                          // (B,Dp/16 panels,K,16)
  float *row_scale, *row_error, *row_norm, *row_slack, *row_offset;  // (B,Sp): scale, ‖e‖, ‖x̃−m‖, slack, the bracket above
  float *scale, *offset, *error, *norm, *reach;                      // (B,Dp): scale, <m,x̃>, ‖e‖, no less than ‖p‖, ‖x̃‖+‖m‖
  std::int32_t* shift;  // (B,Dp): 128·Σq, what the +128 of the sources adds to an integer dot product
  float* row;           // (threads,K): one token in f32
  float* strip;         // (threads,kStripRows,Dp): upper bounds of the scores of some sources
};

#if defined(__AVX512VNNI__)

// Tokens: what Matcher offers (token_match_cpu.cpp).
template <class T, class Tokens>
struct Screen {
  using i64 = std::int64_t;
  using i32 = std::int32_t;
  const Tokens& tokens;
  const ScreenScratch& s;
  static constexpr float kUp = 1.0001f;  // rounds a norm computed in f32 up

  void find_mean(i64 b) const {
    constexpr i64 kSample = 64;
    float* mean = s.mean + b * s.K;
    const i64 C = tokens.a.C, count = s.D < kSample ? s.D : kSample;
    for (i64 c = 0; c < s.K; ++c) mean[c] = 0;
    for (i64 t = 0; t < count; ++t) {
      const T* x = tokens.token(b, 2 * (t * s.D / count) + 1);
      const f32v weight = set1(tokens.inverse_of(tokens.squared_norm(x)) / count);
      for_lanes(
          C, [&](i64 c) { store(mean + c, fma(load(x + c), weight, load(mean + c))); },
          [&](i64 c, int n) { store(mean + c, fma(load(x + c, n), weight, load(mean + c, n)), n); });
    }
    f32v square = set1(0);
    for (i64 c = 0; c < s.K; c += 16) square = fma(load(mean + c), load(mean + c), square);
    s.mean_square[b] = reduce_add(square);
  }

  struct Rounded {
    float scale, error, norm, offset;
    i32 sum;
  };

  // Rounds token n of batch b to int8, 16 bytes at a time handed to put(c, bytes). y: room for K floats.
  template <class Put>
  Rounded round_token(i64 b, i64 n, float* y, Put&& put) const {
    const T* x = tokens.token(b, n);
    const i64 C = tokens.a.C;
    const float *mean = s.mean + b * s.K, inverse = tokens.inverse(b, n);
    f32v largest = set1(0), square = set1(0), offset = set1(0), error = set1(0);
    const auto centre = [&](i64 c, f32v value) {
      const f32v m = load(mean + c), normal = value * set1(inverse), centred = normal - m;
      store(y + c, centred);
      largest = max(largest, abs(centred));
      square = fma(centred, centred, square);
      offset = fma(m, normal, offset);
    };
    i64 c = 0;
    for (; c + 16 <= C; c += 16) centre(c, load(x + c));
    if (c < C) centre(c, load(x + c, static_cast<int>(C - c))), c += 16;  // mean is padded with zeros, and so y is
    for (; c < s.K; c += 16) store(y + c, set1(0));
    const float peak = reduce_max(largest), scale = peak / 127, to_int8 = peak > 0 ? 127 / peak : 0;
    __m512i sum = _mm512_setzero_si512();
    for (c = 0; c < s.K; c += 16) {
      const __m512i q = _mm512_cvtps_epi32((load(y + c) * set1(to_int8)).v);
      const f32v rest = fma(f32v{_mm512_cvtepi32_ps(q)}, set1(-scale), load(y + c));
      error = fma(rest, rest, error);
      sum = _mm512_add_epi32(sum, q);
      put(c, _mm512_cvtsepi32_epi8(q));
    }
    return {scale, kUp * std::sqrt(reduce_add(error)), kUp * std::sqrt(reduce_add(square)), reduce_add(offset),
            _mm512_reduce_add_epi32(sum)};
  }

  // ‖x̃‖ + ‖m‖ of token n, whose squared norm is known.
  float reach(i64 b, i64 n, float square) const {
    return kUp * (std::sqrt(square) * tokens.inverse(b, n) + std::sqrt(s.mean_square[b]));
  }

  void round_source(i64 b, i64 i, float square, float* y) const {
    const i64 at = b * s.Sp + i;
    std::uint8_t* bytes = s.source + at * s.K;
    const Rounded r = round_token(b, 2 * i, y, [&](i64 c, __m128i q) {
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes + c), _mm_xor_si128(q, _mm_set1_epi8(-128)));  // + 128
    });
    s.row_scale[at] = r.scale, s.row_error[at] = r.error, s.row_norm[at] = r.norm, s.row_offset[at] = r.offset - s.mean_square[b];
    s.row_slack[at] = (4.0f * tokens.a.C + 256) * 0x1p-24f * reach(b, 2 * i, square);
  }

  void round_destination(i64 b, i64 j, float square, float* y) const {
    const i64 at = b * s.Dp + j;
    std::int8_t* panel = s.destination + (at - j % kPanel) * s.K + j % kPanel * 4;
    const Rounded r = round_token(b, 2 * j + 1, y, [&](i64 c, __m128i q) {
      alignas(16) std::int8_t bytes[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes), q);
      for (int four = 0; four < 16; four += 4) std::memcpy(panel + (c + four) * kPanel, bytes + four, 4);
    });
    s.scale[at] = r.scale, s.offset[at] = r.offset, s.error[at] = r.error, s.norm[at] = r.norm + r.error;
    s.reach[at] = reach(b, 2 * j + 1, square), s.shift[at] = 128 * r.sum;
  }

  void pad_destinations(i64 b) const {  // lanes past the last destination: never a candidate
    for (i64 at = b * s.Dp + s.D; at < (b + 1) * s.Dp; ++at)
      s.scale[at] = s.error[at] = s.norm[at] = s.reach[at] = 0, s.offset[at] = -INFINITY, s.shift[at] = 0;
  }

  struct Floor {  // per lane: the largest lower bound seen in a row, and where
    __m512 bound;
    __m512i panel;
  };

  // Upper bounds of the scores of `rows` sources from `first` on into the strip, their largest lower bounds into floor.
  void bound_scores(i64 b, i64 first, i64 rows, float* strip, Floor* floor) const {
    [[maybe_unused]] const TileScope tiles;
    alignas(64) i32 sums[kBlockRows * kBlockPanels * kPanel];
    const i64 source = b * s.Sp + first;
    for (i64 i = 0; i < rows; ++i) floor[i] = {_mm512_set1_ps(-INFINITY), _mm512_setzero_si512()};
    for (i64 j = 0; j < s.Dp; j += kBlockPanels * kPanel)
      for (i64 i = 0; i < rows; i += kBlockRows) {
        const i64 panels = s.Dp - j < kBlockPanels * kPanel ? 1 : kBlockPanels;
        int8_block(s.source + (source + i) * s.K, s.K, s.destination + (b * s.Dp + j) * s.K, panels, sums);
        for (i64 p = 0; p < panels; ++p)
          bound_panel(source + i, rows - i, b * s.Dp, j + p * kPanel, sums + p * kPanel, strip + i * s.Dp, floor + i);
      }
  }

  void bound_panel(i64 source, i64 rows, i64 base, i64 j, const i32* sums, float* strip, Floor* floor) const {
    const i64 at = base + j;
    const __m512i shift = _mm512_load_si512(s.shift + at), panel = _mm512_set1_epi32(static_cast<i32>(j));
    const f32v scale = load(s.scale + at), offset = load(s.offset + at), error = load(s.error + at);
    const f32v norm = load(s.norm + at), reach = load(s.reach + at);
    for (i64 i = 0; i < kBlockRows && i < rows; ++i) {
      const i64 row = source + i;
      const __m512i integer = _mm512_sub_epi32(_mm512_load_si512(sums + i * kBlockPanels * kPanel), shift);
      const f32v middle = fma(f32v{_mm512_cvtepi32_ps(integer)}, scale * set1(s.row_scale[row]), offset);
      const f32v rounding = fma(set1(s.row_norm[row]), error, set1(s.row_slack[row]) * reach);
      const f32v radius = fma(set1(s.row_error[row]), norm, rounding), least = middle - radius;
      store(strip + i * s.Dp + j, middle + radius);
      const __mmask16 better = _mm512_cmp_ps_mask(least.v, floor[i].bound, _CMP_GT_OQ);
      floor[i].bound = _mm512_mask_mov_ps(floor[i].bound, better, least.v);
      floor[i].panel = _mm512_mask_mov_epi32(floor[i].panel, better, panel);
    }
  }

  // The f32 score of the destination with the largest lower bound: with it in hand, the others must beat the real thing.
  float threshold(i64 b, i64 i, const Floor& floor) const {
    const float bound = _mm512_reduce_max_ps(floor.bound);
    const unsigned lane = __builtin_ctz(_mm512_cmp_ps_mask(floor.bound, _mm512_set1_ps(bound), _CMP_EQ_OQ));
    alignas(64) i32 panel[16];
    _mm512_store_si512(panel, floor.panel);
    const i64 j = panel[lane] + lane;
    const T *row = tokens.token(b, 2 * i), *column = tokens.token(b, 2 * j + 1);
    float dot;
    dots<T, 1, 1, 4>(&row, &column, tokens.a.C, &dot);
    const float known = tokens.score(b, i, j, dot) - s.row_offset[b * s.Sp + i];
    return known > bound ? known : bound;
  }

  // f32 scores of one destination with the sources in `rows` (a bit per row of the strip), four at a time.
  void resolve(i64 b, i64 first, i64 j, std::uint64_t rows) const {
    const T* column = tokens.token(b, 2 * j + 1);
    while (rows) {
      i64 index[4];
      const T* row[4];
      int count = 0;
      for (; count < 4 && rows; ++count, rows &= rows - 1) {
        index[count] = first + __builtin_ctzll(rows);
        row[count] = tokens.token(b, 2 * index[count]);
      }
      float dot[4];
      if (count == 1) {
        dots<T, 1, 1, 4>(row, &column, tokens.a.C, dot);
      } else {
        for (int k = count; k < 4; ++k) row[k] = row[0];
        dots<T, 4, 1, 4>(row, &column, tokens.a.C, dot);
      }
      for (int k = 0; k < count; ++k) tokens.keep_best(b, index[k], j, dot[k]);
    }
  }

  void match_rows(i64 b, i64 first, i64 last, int thread) const {
    float* strip = s.strip + thread * kStripRows * s.Dp;
    Floor floor[kStripRows];
    float least[kStripRows];
    const i64 rows = last - first;
    bound_scores(b, first, rows, strip, floor);
    for (i64 i = 0; i < rows; ++i) least[i] = threshold(b, first + i, floor[i]);
    for (i64 j = 0; j < s.Dp; j += kPanel) {
      std::uint64_t candidates[kPanel] = {};
      unsigned any = 0;
      for (i64 i = 0; i < rows; ++i) {
        unsigned lanes = _mm512_cmp_ps_mask(_mm512_load_ps(strip + i * s.Dp + j), _mm512_set1_ps(least[i]), _CMP_GE_OQ);
        any |= lanes;
        for (; lanes; lanes &= lanes - 1) candidates[__builtin_ctz(lanes)] |= std::uint64_t{1} << i;
      }
      for (; any; any &= any - 1) resolve(b, first, j + __builtin_ctz(any), candidates[__builtin_ctz(any)]);
    }
  }
};

#endif

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
