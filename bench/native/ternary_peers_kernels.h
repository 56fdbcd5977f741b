// What the peers do per row: four rows by up to four tokens where weights are dense, one by one where they are coded.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BF16__)
#define PEERS_AVX512 1
#include <immintrin.h>
#endif

namespace {

using std::int64_t;

constexpr int kRows = 4, kTokens = 4;  // of a tile, whose sums stay in registers
constexpr int64_t kBlock = 256;        // columns whose 2-bit weights fill a vector
constexpr int kLongest = 28;           // trits of a string of the dictionary

float wide(std::uint16_t bits) {
  const std::uint32_t word = std::uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Four rows of weights and up to four tokens; what is beyond the last repeats it.
template <class Weight, class Value>
struct Tile {
  std::array<const Weight*, kRows> weights;
  std::array<const Value*, kTokens> x;
  int64_t length;  // padded columns
};

template <class Sum>
using Sums = std::array<std::array<Sum, kTokens>, kRows>;

#if PEERS_AVX512

void to_bf16(const float* x, int64_t count, std::uint16_t* out, float&, std::int32_t&) {
  for (int64_t i = 0; i < count; i += 16) {
    const auto lanes = static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
    const __m256bh narrow = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, x + i));
    _mm256_mask_storeu_epi16(out + i, lanes, reinterpret_cast<const __m256i&>(narrow));
  }
}

void to_int8(const float* x, int64_t count, std::int8_t* out, float& scale, std::int32_t& sum) {
  const auto lanes = [&](int64_t i) { return static_cast<__mmask16>(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1); };
  __m512 largest = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes(i), x + i)));
  scale = _mm512_reduce_max_ps(largest) / 127;
  const __m512 inverse = _mm512_set1_ps(scale > 0 ? 1 / scale : 0);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(inverse, _mm512_maskz_loadu_ps(lanes(i), x + i)));
    _mm512_mask_cvtepi32_storeu_epi8(out + i, lanes(i), whole);
    total = _mm512_add_epi32(total, whole);
  }
  sum = _mm512_reduce_add_epi32(total);
}

// Sums of `Rows` rows from `first` on with N tokens, of which there are enough at once to hide how long one takes.
template <int Rows, int N>
void bf16_rows(const Tile<std::uint16_t, std::uint16_t>& tile, int first, Sums<float>& result) {
  constexpr int kChains = N == 1 ? 2 : 1;
  const auto load = [](const std::uint16_t* from) { return (__m512bh)_mm512_loadu_si512(from); };
  __m512 sums[Rows][N][kChains];
  for (auto& row : sums)
    for (auto& token : row)
      for (auto& sum : token) sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < tile.length; c += 32 * kChains)
    for (int k = 0; k < kChains; ++k) {
      __m512bh weights[Rows];
      for (int i = 0; i < Rows; ++i) {
        const std::uint16_t* from = tile.weights[first + i] + c + 32 * k;
        weights[i] = load(from);
        if (N > 1) _mm_prefetch(from + Rows * tile.length, _MM_HINT_T1);
      }
      for (int j = 0; j < N; ++j) {
        const __m512bh x = load(tile.x[j] + c + 32 * k);
        for (int i = 0; i < Rows; ++i) sums[i][j][k] = _mm512_dpbf16_ps(sums[i][j][k], weights[i], x);
      }
    }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < N; ++j) {
      for (int k = 1; k < kChains; ++k) sums[i][j][0] = _mm512_add_ps(sums[i][j][0], sums[i][j][k]);
      result[first + i][j] = _mm512_reduce_add_ps(sums[i][j][0]);
    }
}

// Byte b of a block holds columns b, 64 + b, 128 + b and 192 + b. One token: its four fields are multiplied in place and their
// sums shifted in the end. Several: fields are shifted once for all of them.
template <int Rows, int N>
void crumbs_rows(const Tile<std::uint8_t, std::int8_t>& tile, int first, Sums<std::int32_t>& result) {
  constexpr int kChains = N == 1 ? 4 : 1;
  __m512i sums[Rows][N][kChains];
  for (auto& row : sums)
    for (auto& token : row)
      for (auto& sum : token) sum = _mm512_setzero_si512();
  for (int64_t c = 0; c < tile.length; c += kBlock) {
    __m512i crumbs[Rows];
    for (int i = 0; i < Rows; ++i) {
      crumbs[i] = _mm512_loadu_si512(tile.weights[first + i] + c / 4);
      _mm_prefetch(tile.weights[first + i] + c / 4 + kRows * tile.length / 4, _MM_HINT_T0);
    }
    for (int q = 0; q < 4; ++q) {
      const __m512i field = _mm512_set1_epi8(static_cast<char>(N == 1 ? 3 << 2 * q : 3));
      __m512i raised[Rows];
      for (int i = 0; i < Rows; ++i)
        raised[i] = _mm512_and_si512(N == 1 ? crumbs[i] : _mm512_srli_epi16(crumbs[i], 2 * q), field);
      for (int j = 0; j < N; ++j) {
        const __m512i x = _mm512_loadu_si512(tile.x[j] + c + 64 * q);
        for (int i = 0; i < Rows; ++i) sums[i][j][q % kChains] = _mm512_dpbusd_epi32(sums[i][j][q % kChains], raised[i], x);
      }
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < N; ++j) {
      for (int k = 1; k < kChains; ++k) sums[i][j][0] = _mm512_add_epi32(sums[i][j][0], _mm512_srai_epi32(sums[i][j][k], 2 * k));
      result[first + i][j] = _mm512_reduce_add_epi32(sums[i][j][0]);
    }
}

// With one token memory is what limits, and is fastest in one stream: row by row.
template <int N>
Sums<float> bf16_tile(const Tile<std::uint16_t, std::uint16_t>& tile) {
  Sums<float> sums;
  for (int i = 0; i < kRows; i += N == 1 ? 1 : kRows) bf16_rows<N == 1 ? 1 : kRows, N>(tile, i, sums);
  return sums;
}

template <int N>
Sums<std::int32_t> crumbs_tile(const Tile<std::uint8_t, std::int8_t>& tile) {
  Sums<std::int32_t> sums;
  for (int i = 0; i < kRows; i += N == 1 ? 1 : kRows) crumbs_rows<N == 1 ? 1 : kRows, N>(tile, i, sums);
  return sums;
}

// Every codeword multiplies as many values as the longest string has; what its own string lacks counts nothing.
float codes_f32(const std::uint64_t* signs, const std::uint16_t* code, const std::uint16_t* end, const float* x, float low,
                float high) {
  const __m512i fields = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i last = _mm512_mask_set1_epi32(fields, 0xf000, 32);  // shifts the string's length out
  const __m512 levels = _mm512_broadcast_f32x4(_mm_setr_ps(0, high, low, 0));
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  const auto add = [&](int which, __m512& begin, __m512& rest) {
    std::int32_t half[2];
    std::memcpy(half, signs + which, sizeof half);
    const __m512 a = _mm512_permutevar_ps(levels, _mm512_srlv_epi32(_mm512_set1_epi32(half[0]), fields));
    const __m512 b = _mm512_permutevar_ps(levels, _mm512_srlv_epi32(_mm512_set1_epi32(half[1]), last));
    begin = _mm512_fmadd_ps(a, _mm512_loadu_ps(x), begin);
    rest = _mm512_fmadd_ps(b, _mm512_loadu_ps(x + 16), rest);
    x += reinterpret_cast<const std::uint8_t*>(signs + which)[7];
  };
  for (; code + 1 < end; code += 2) {
    add(code[0], sums[0], sums[1]);
    add(code[1], sums[2], sums[3]);
  }
  if (code < end) add(*code, sums[0], sums[1]);
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// Sums of the values that meet 1 and of those that meet -1: in the lower and the upper half of the vectors.
std::array<std::int32_t, 2> codes_int8(const std::uint64_t* planes, const std::uint16_t* code, const std::uint16_t* end,
                                       const std::int8_t* x) {
  const __m512i bits = _mm512_set_epi64(0x3f3f3f3f37363534, 0x333231302f2e2d2c, 0x2b2a292827262524, 0x232221201f1e1d1c,
                                        0x3f3f3f3f1b1a1918, 0x1716151413121110, 0x0f0e0d0c0b0a0908, 0x0706050403020100);
  const __m512i one = _mm512_set1_epi8(1);
  __m512i sums[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  const auto add = [&](int which, __m512i& sum) {
    const __m512i string = _mm512_set1_epi64(static_cast<long long>(planes[which]));
    const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_multishift_epi64_epi8(bits, string), one), values);
    x += reinterpret_cast<const std::uint8_t*>(planes + which)[7];
  };
  for (; code + 3 < end; code += 4)
    for (int i = 0; i < 4; ++i) add(code[i], sums[i]);
  for (; code < end; ++code) add(*code, sums[0]);
  const __m512i all = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]), _mm512_add_epi32(sums[2], sums[3]));
  const __m256i pairs = _mm256_hadd_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  const __m256i fours = _mm256_hadd_epi32(pairs, pairs);
  const __m128i eights = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  return {_mm_cvtsi128_si32(eights), _mm_extract_epi32(eights, 1)};
}

#else

void to_bf16(const float* x, int64_t count, std::uint16_t* out, float&, std::int32_t&) {
  for (int64_t i = 0; i < count; ++i) {
    std::uint32_t word;
    std::memcpy(&word, x + i, sizeof word);
    out[i] = static_cast<std::uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);  // to nearest, ties to even
  }
}

void to_int8(const float* x, int64_t count, std::int8_t* out, float& scale, std::int32_t& sum) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(x[i]));
  scale = largest / 127;
  for (int64_t i = 0; i < count; ++i) sum += out[i] = static_cast<std::int8_t>(scale > 0 ? std::nearbyint(x[i] / scale) : 0);
}

template <int N>
Sums<float> bf16_tile(const Tile<std::uint16_t, std::uint16_t>& tile) {
  Sums<float> sums{};
  for (int64_t c = 0; c < tile.length; ++c)
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < N; ++j) sums[i][j] += wide(tile.weights[i][c]) * wide(tile.x[j][c]);
  return sums;
}

template <int N>
Sums<std::int32_t> crumbs_tile(const Tile<std::uint8_t, std::int8_t>& tile) {
  Sums<std::int32_t> sums{};
  for (int64_t c = 0; c < tile.length; ++c)
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < N; ++j) sums[i][j] += (tile.weights[i][c / kBlock * 64 + c % 64] >> c / 64 % 4 * 2 & 3) * tile.x[j][c];
  return sums;
}

float codes_f32(const std::uint64_t* signs, const std::uint16_t* code, const std::uint16_t* end, const float* x, float low,
                float high) {
  float sum = 0;
  for (; code < end; x += signs[*code++] >> 56)
    for (std::uint64_t i = 0, string = signs[*code]; i < string >> 56; ++i)
      sum += (string >> 2 * i & 1 ? high : string >> 2 * i & 2 ? low : 0) * x[i];
  return sum;
}

std::array<std::int32_t, 2> codes_int8(const std::uint64_t* planes, const std::uint16_t* code, const std::uint16_t* end,
                                       const std::int8_t* x) {
  std::array<std::int32_t, 2> sums{};
  for (; code < end; x += planes[*code++] >> 56)
    for (std::uint64_t i = 0, string = planes[*code]; i < string >> 56; ++i) {
      sums[0] += (string >> i & 1) * x[i];
      sums[1] += (string >> (kLongest + i) & 1) * x[i];
    }
  return sums;
}

#endif

}  // namespace
