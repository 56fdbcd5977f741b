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

#if defined(__AVX512VNNI__)
static_assert(kMatchRows % kStripRows == 0 && kMatchStrip >= kStripRows && kMatchPanel == kPanel, "paddings of the workspace");

// Tokens: what Matcher offers (token_match_cpu.cpp).
template <class T, class Tokens>
struct Screen {
  using i64 = std::int64_t;
  using i32 = std::int32_t;
  const Tokens& tokens;
  i64 Sp, Dp, K;                                                     // room for sources, destinations and channels, padded
  float *mean, *mean_square;                                         // (B,K), (B): m and <m, m>
  std::uint8_t* source;                                              // (B,Sp,K): q + 128
  std::int8_t* destination;                                          // (B,Dp/16 panels,K,16)
  float *row_scale, *row_error, *row_norm, *row_slack, *row_offset;  // (B,Sp): scale, ‖e‖, ‖x̃−m‖, slack, the bracket above
  float *scale, *offset, *error, *norm, *reach;                      // (B,Dp): scale, <m,x̃>, ‖e‖, no less than ‖p‖, ‖x̃‖+‖m‖
  i32* shift;                            // (B,Dp): 128·Σq, what the +128 of the sources adds to an integer dot product
  float* row;                            // (threads,K): one token in f32
  float* strip;                          // (threads,kMatchStrip,Dp): upper bounds of the scores of some sources
  static constexpr float kUp = 1.0001f;  // rounds a norm computed in f32 up

  explicit Screen(const Tokens& t) : tokens(t) {
    const auto& l = t.layout;
    Sp = l.Sp, Dp = l.Dp, K = l.K;
    const auto floats = [&](i64 offset, i64 index = 0) { return t.template at<float>(offset, index); };
    const i64 rows = t.a.B * Sp, columns = t.a.B * Dp;
    mean = floats(l.mean), mean_square = floats(l.mean_square), row = floats(l.row), strip = floats(l.strip);
    source = t.template at<std::uint8_t>(l.source), destination = t.template at<std::int8_t>(l.destination);
    row_scale = floats(l.row_fields), row_error = floats(l.row_fields, rows), row_norm = floats(l.row_fields, 2 * rows);
    row_slack = floats(l.row_fields, 3 * rows), row_offset = floats(l.row_fields, 4 * rows);
    scale = floats(l.fields), offset = floats(l.fields, columns), error = floats(l.fields, 2 * columns);
    norm = floats(l.fields, 3 * columns), reach = floats(l.fields, 4 * columns), shift = t.template at<i32>(l.shift);
  }

  void find_mean(i64 b) const {
    constexpr i64 kSample = 64;
    float* centre = mean + b * K;
    const i64 C = tokens.a.C, D = tokens.destinations(b), count = D < kSample ? D : kSample;
    for (i64 c = 0; c < K; ++c) centre[c] = 0;
    for (i64 t = 0; t < count; ++t) {
      const T* x = tokens.token(b, tokens.destinations_of(b)[t * D / count]);
      const f32v weight = set1(tokens.inverse_of(tokens.squared_norm(x)) / count);
      for_lanes(
          C, [&](i64 c) { store(centre + c, fma(load(x + c), weight, load(centre + c))); },
          [&](i64 c, int n) { store(centre + c, fma(load(x + c, n), weight, load(centre + c, n)), n); });
    }
    f32v square = set1(0);
    for (i64 c = 0; c < K; c += 16) square = fma(load(centre + c), load(centre + c), square);
    mean_square[b] = reduce_add(square);
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
    const float *about = mean + b * K, inverse = tokens.inverse(b, n);
    f32v largest = set1(0), square = set1(0), offset = set1(0), error = set1(0);
    const auto centre = [&](i64 c, f32v value) {
      const f32v m = load(about + c), normal = value * set1(inverse), centred = normal - m;
      store(y + c, centred);
      largest = max(largest, abs(centred));
      square = fma(centred, centred, square);
      offset = fma(m, normal, offset);
    };
    i64 c = 0;
    for (; c + 16 <= C; c += 16) centre(c, load(x + c));
    if (c < C) centre(c, load(x + c, static_cast<int>(C - c))), c += 16;  // mean is padded with zeros, and so y is
    for (; c < K; c += 16) store(y + c, set1(0));
    const float peak = reduce_max(largest), scale = peak / 127, to_int8 = peak > 0 ? 127 / peak : 0;
    __m512i sum = _mm512_setzero_si512();
    for (c = 0; c < K; c += 16) {
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
  float reach_of(i64 b, i64 n, float square) const {
    return kUp * (std::sqrt(square) * tokens.inverse(b, n) + std::sqrt(mean_square[b]));
  }

  void round(i64 b, i32 number, float square, int thread) const {
    if (number >= 0) {
      round_source(b, number, square, thread);
    } else {
      round_destination(b, ~number, square, thread);
    }
  }

  void round_source(i64 b, i64 i, float square, int thread) const {
    const i64 at = b * Sp + i, n = tokens.sources_of(b)[i];
    std::uint8_t* bytes = source + at * K;
    const Rounded r = round_token(b, n, row + thread * K, [&](i64 c, __m128i q) {
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes + c), _mm_xor_si128(q, _mm_set1_epi8(-128)));  // + 128
    });
    row_scale[at] = r.scale, row_error[at] = r.error, row_norm[at] = r.norm, row_offset[at] = r.offset - mean_square[b];
    row_slack[at] = (4.0f * tokens.a.C + 256) * 0x1p-24f * reach_of(b, n, square);
  }

  void round_destination(i64 b, i64 j, float square, int thread) const {
    const i64 at = b * Dp + j, n = tokens.destinations_of(b)[j];
    std::int8_t* panel = destination + (at - j % kPanel) * K + j % kPanel * 4;
    const Rounded r = round_token(b, n, row + thread * K, [&](i64 c, __m128i q) {
      alignas(16) std::int8_t bytes[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(bytes), q);
      for (int four = 0; four < 16; four += 4) std::memcpy(panel + (c + four) * kPanel, bytes + four, 4);
    });
    scale[at] = r.scale, offset[at] = r.offset, error[at] = r.error, norm[at] = r.norm + r.error;
    reach[at] = reach_of(b, n, square), shift[at] = 128 * r.sum;
  }

  i64 columns(i64 b) const { return (tokens.destinations(b) + kPanel - 1) / kPanel * kPanel; }  // of the strip

  void pad_destinations(i64 b) const {  // lanes past the last destination: never a candidate
    for (i64 at = b * Dp + tokens.destinations(b); at < b * Dp + columns(b); ++at)
      scale[at] = error[at] = norm[at] = reach[at] = 0, offset[at] = -INFINITY, shift[at] = 0;
  }

  struct Floor {  // per lane: the largest lower bound seen in a row, and where
    __m512 bound;
    __m512i panel;
  };

  // Upper bounds of the scores of `rows` sources from `first` on into the strip, their largest lower bounds into floor.
  void bound_scores(i64 b, i64 first, i64 rows, float* bounds, Floor* floor) const {
    [[maybe_unused]] const TileScope tiles;
    alignas(64) i32 sums[kBlockRows * kBlockPanels * kPanel];
    const i64 base = b * Sp + first, columns = this->columns(b);
    for (i64 i = 0; i < rows; ++i) floor[i] = {_mm512_set1_ps(-INFINITY), _mm512_setzero_si512()};
    for (i64 j = 0; j < columns; j += kBlockPanels * kPanel)
      for (i64 i = 0; i < rows; i += kBlockRows) {
        const i64 panels = columns - j < kBlockPanels * kPanel ? 1 : kBlockPanels;
        int8_block(source + (base + i) * K, K, destination + (b * Dp + j) * K, panels, sums);
        for (i64 p = 0; p < panels; ++p)
          bound_panel(b, first + i, rows - i, j + p * kPanel, sums + p * kPanel, bounds + i * columns, floor + i);
      }
  }

  void bound_panel(i64 b, i64 first, i64 rows, i64 j, const i32* sums, float* bounds, Floor* floor) const {
    const i64 at = b * Dp + j, columns = this->columns(b);
    const __m512i shift_j = _mm512_load_si512(shift + at), panel = _mm512_set1_epi32(static_cast<i32>(j));
    const f32v scale_j = load(scale + at), offset_j = load(offset + at), error_j = load(error + at);
    const f32v norm_j = load(norm + at), reach_j = load(reach + at);
    for (i64 i = 0; i < kBlockRows && i < rows; ++i) {
      const i64 row = b * Sp + first + i;
      const __m512i integer = _mm512_sub_epi32(_mm512_load_si512(sums + i * kBlockPanels * kPanel), shift_j);
      const f32v middle = fma(f32v{_mm512_cvtepi32_ps(integer)}, scale_j * set1(row_scale[row]), offset_j);
      const f32v rounding = fma(set1(row_norm[row]), error_j, set1(row_slack[row]) * reach_j);
      const f32v radius = fma(set1(row_error[row]), norm_j, rounding), least = middle - radius;
      store(bounds + i * columns + j, middle + radius);
      const __mmask16 better = _mm512_cmp_ps_mask(least.v, floor[i].bound, _CMP_GT_OQ);
      floor[i].bound = _mm512_mask_mov_ps(floor[i].bound, better, least.v);
      floor[i].panel = _mm512_mask_mov_epi32(floor[i].panel, better, panel);
    }
  }

  // The f32 score of the destination with the largest lower bound: with it in hand, the others must beat the real thing.
  // noinline, as resolve: within match_rows GCC would keep the sums of dots() in memory.
  [[gnu::noinline]] float threshold(i64 b, i64 i, const Floor& floor) const {
    const float bound = _mm512_reduce_max_ps(floor.bound);
    const unsigned lane = __builtin_ctz(_mm512_cmp_ps_mask(floor.bound, _mm512_set1_ps(bound), _CMP_EQ_OQ));
    alignas(64) i32 panel[16];
    _mm512_store_si512(panel, floor.panel);
    const i64 j = panel[lane] + lane;
    const i32 p = tokens.sources_of(b)[i], q = tokens.destinations_of(b)[j];
    const T *row = tokens.token(b, p), *column = tokens.token(b, q);
    float dot;
    dots<T, 1, 1, 4>(&row, &column, tokens.a.C, &dot);
    const float known = tokens.score(b, p, q, dot) - row_offset[b * Sp + i];
    return known > bound ? known : bound;
  }

  // f32 scores of the destination at position q with the sources in `rows` (a bit per row of the strip), four at a time.
  [[gnu::noinline]] void resolve(i64 b, i64 first, i32 q, std::uint64_t rows) const {
    const i32* sources = tokens.sources_of(b) + first;
    const T* column = tokens.token(b, q);
    while (rows) {
      i32 position[4];
      const T* row[4];
      int count = 0;
      for (; count < 4 && rows; ++count, rows &= rows - 1) {
        position[count] = sources[__builtin_ctzll(rows)];
        row[count] = tokens.token(b, position[count]);
      }
      float dot[4];
      if (count == 1) {
        dots<T, 1, 1, 4>(row, &column, tokens.a.C, dot);
      } else {
        for (int k = count; k < 4; ++k) row[k] = row[0];
        dots<T, 4, 1, 4>(row, &column, tokens.a.C, dot);
      }
      for (int k = 0; k < count; ++k) tokens.keep_best(b, position[k], q, dot[k]);
    }
  }

  void match_rows(i64 b, i64 first, i64 last, int thread) const {
    float* bounds = strip + thread * kStripRows * Dp;
    Floor floor[kStripRows];
    float least[kStripRows];
    const i32* destination = tokens.destinations_of(b);
    const i64 rows = last - first, columns = this->columns(b);
    bound_scores(b, first, rows, bounds, floor);
    for (i64 i = 0; i < rows; ++i) least[i] = threshold(b, first + i, floor[i]);
    for (i64 j = 0; j < columns; j += kPanel) {
      std::uint64_t candidates[kPanel] = {};
      unsigned any = 0;
      for (i64 i = 0; i < rows; ++i) {
        unsigned lanes = _mm512_cmp_ps_mask(_mm512_load_ps(bounds + i * columns + j), _mm512_set1_ps(least[i]), _CMP_GE_OQ);
        any |= lanes;
        for (; lanes; lanes &= lanes - 1) candidates[__builtin_ctz(lanes)] |= std::uint64_t{1} << i;
      }
      for (; any; any &= any - 1) resolve(b, first, destination[j + __builtin_ctz(any)], candidates[__builtin_ctz(any)]);
    }
  }
};

#else

constexpr std::int64_t kStripRows = 1;

template <class T, class Tokens>
struct Screen {  // for levels that never screen
  explicit Screen(const Tokens&) {}
  void find_mean(std::int64_t) const {}
  void pad_destinations(std::int64_t) const {}
  void round(std::int64_t, std::int32_t, float, int) const {}
  void match_rows(std::int64_t, std::int64_t, std::int64_t, int) const {}
};

#endif

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
