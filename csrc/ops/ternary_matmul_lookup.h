// Part of ternary_matmul_cpu.cpp: few tokens. Each entry of a tile's list looks up the activation that it adds.
#pragma once
#include "core/cpu/dot4.h"
#include "core/cpu/gap_planes_read.h"
#include "ops/ternary_matmul.h"

namespace effvlm::EFFVLM_ISA {
namespace {

#if defined(__AVX512VBMI2__)
constexpr int kSumLanes = 16;
constexpr int kPlanar = 4;  // byte planes of x per strip, 256 bytes each: exact look-ups find the bytes of a float one by one
#else
constexpr int kSumLanes = f32v::width;
#endif

#if defined(__AVX512F__)
// The lowest n bits, all from 64 on. (bzhi looks at eight bits of n alone, and a row can have 256 entries.)
inline std::uint64_t first_bits(int n) { return _bzhi_u64(~std::uint64_t{0}, static_cast<unsigned>(n < 64 ? n : 64)); }
#endif

// The sums of 64 rows for one token, in lanes that are added up at the end: f32, or i32.
struct RowSums {
  alignas(64) float exact[kTileRows][kSumLanes];
  alignas(64) std::int32_t whole[kTileRows][kSumLanes];

  void clear(bool int8) { int8 ? std::memset(whole, 0, sizeof whole) : std::memset(exact, 0, sizeof exact); }

  // One sum per row.
  void add_up(bool int8, float* to) const {
    for (int r = 0; !int8 && r < kTileRows; r += 4) {
      const f32v four[4] = {load(exact[r]), load(exact[r + 1]), load(exact[r + 2]), load(exact[r + 3])};
      reduce_add4(four, to + r);
    }
    for (int r = 0; int8 && r < kTileRows; ++r) {
      std::int32_t sum = 0;
      for (const std::int32_t lane : whole[r]) sum += lane;
      to[r] = static_cast<float>(sum);
    }
  }
};

#if defined(__AVX512VBMI2__)

// What is added per entry, before it is summed by rows.
struct LookedUp {
  alignas(64) std::int8_t whole[kTileRows * kTileColumns + 192];
  alignas(64) float exact[kTileRows * kTileColumns + 192];
};

// Signs and third plane of 64 entries: as they stand in a list's planes, or from values (dense tiles have no such planes).
struct PlaneMarks {
  TilePlanes planes;
  int k;
  __mmask64 negative(int i) const { return planes(i, k); }
  __mmask64 third(int i) const { return planes.planes > k + 1 ? planes(i, k + 1) : 0; }
};
struct ValueMarks {
  const std::int8_t* value;
  __mmask64 negative(int i) const { return _mm512_movepi8_mask(load_512(value + i)); }
  __mmask64 third(int i) const {  // only five-level tiles have large values
    return _mm512_cmpgt_epu8_mask(_mm512_abs_epi8(load_512(value + i)), _mm512_set1_epi8(1));
  }
};

// x of 64 columns, from 256 bytes in four registers.
struct Bytes256 {
  __m512i a, b, c, d;
  explicit Bytes256(const void* x) {
    const char* from = static_cast<const char*>(x);
    a = load_512(from), b = load_512(from + 64), c = load_512(from + 128), d = load_512(from + 192);
  }
  __m512i at(__m512i column) const {
    const __m512i low = _mm512_permutex2var_epi8(a, column, b), high = _mm512_permutex2var_epi8(c, column, d);
    return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(column), high);
  }
};

// m · Σ q of each row. |q| < 64 with five levels, so that doubled values are bytes as well.
template <bool Third, class Marks>
void look_up(const TileList& list, const Marks& marks, int levels, const std::int8_t* q, std::uint8_t m, LookedUp& buffer,
             RowSums& sums) {
  const Bytes256 x(q);
  const __m512i zero = _mm512_setzero_si512(), step = _mm512_set1_epi8(static_cast<char>(m));
  for (int i = 0; i < list.count; i += 64) {
    __m512i value = x.at(load_512(list.column + i));
    value = _mm512_mask_sub_epi8(value, marks.negative(i), zero, value);
    if (Third) {
      const __mmask64 third = marks.third(i);
      value = levels == 5 ? _mm512_mask_add_epi8(value, third, value, value) : _mm512_maskz_mov_epi8(~third, value);
    }
    _mm512_store_si512(buffer.whole + i, value);
  }
  int begin = list.row[0];
  for (int r = 0; r < kTileRows; ++r) {
    const int end = list.row[r + 1];
    const std::uint64_t entries = first_bits(end - begin);
    __m512i sum = _mm512_load_si512(sums.whole[r]);
    sum = _mm512_dpbusd_epi32(sum, step, _mm512_maskz_loadu_epi8(entries, buffer.whole + begin));
    for (int i = begin + 64; __builtin_expect(i < end, 0); i += 64)
      sum = _mm512_dpbusd_epi32(sum, step, _mm512_maskz_loadu_epi8(first_bits(end - i), buffer.whole + i));
    _mm512_store_si512(sums.whole[r], sum);
    begin = end;
  }
}

// Bytes are unpacked within each 128 bits: entries in this order leave the unpacking in their own.
struct PlanarOrder {
  alignas(64) std::uint8_t entry[64];
};
constexpr PlanarOrder planar_order() {
  PlanarOrder t{};
  for (int j = 0; j < 4; ++j)
    for (int e = 0; e < 16; ++e) t.entry[e / 4 * 16 + 4 * j + e % 4] = static_cast<std::uint8_t>(16 * j + e);
  return t;
}
static constexpr PlanarOrder kPlanarOrder = planar_order();

// Σ x of each row, x in kPlanar planes of bytes, lowest first. Short: the lower two are zeros (bf16).
template <bool Short, bool Third, class Marks>
void look_up(const TileList& list, const Marks& marks, int levels, const std::uint8_t* planar, LookedUp& buffer, RowSums& sums) {
  const Bytes256 p0(planar), p1(planar + 256), p2(planar + 512), p3(planar + 768);
  const __m512i zero = _mm512_setzero_si512(), order = load_512(kPlanarOrder.entry);
  for (int i = 0; i < list.count; i += 64) {
    const __m512i column = _mm512_permutexvar_epi8(order, load_512(list.column + i));
    const __m512i sign = _mm512_permutexvar_epi8(order, _mm512_maskz_set1_epi8(marks.negative(i), static_cast<char>(0x80)));
    const __m512i b2 = p2.at(column), b3 = _mm512_xor_si512(p3.at(column), sign);
    const __m512i high = _mm512_unpacklo_epi8(b2, b3), higher = _mm512_unpackhi_epi8(b2, b3);
    __m512i low = zero, lower = zero;
    if (!Short) {
      const __m512i b0 = p0.at(column), b1 = p1.at(column);
      low = _mm512_unpacklo_epi8(b0, b1), lower = _mm512_unpackhi_epi8(b0, b1);
    }
    __m512 value[4] = {
        _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high)),
        _mm512_castsi512_ps(_mm512_unpacklo_epi16(lower, higher)), _mm512_castsi512_ps(_mm512_unpackhi_epi16(lower, higher))};
    const std::uint64_t third = Third ? marks.third(i) : 0;
    for (int j = 0; j < 4; ++j) {
      const __mmask16 some = static_cast<__mmask16>(third >> 16 * j);
      if (Third)
        value[j] = levels == 5 ? _mm512_mask_add_ps(value[j], some, value[j], value[j]) : _mm512_maskz_mov_ps(~some, value[j]);
      _mm512_store_ps(buffer.exact + i + 16 * j, value[j]);
    }
  }
  int begin = list.row[0];
  for (int r = 0; r < kTileRows; ++r) {
    const int end = list.row[r + 1];
    const std::uint64_t entries = first_bits(end - begin);
    __m512 sum = _mm512_load_ps(sums.exact[r]);
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(static_cast<__mmask16>(entries), buffer.exact + begin));
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(static_cast<__mmask16>(entries >> 16), buffer.exact + begin + 16));
    for (int i = begin + 32; __builtin_expect(i < end, 0); i += 16)
      sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bits(end - i)), buffer.exact + i));
    _mm512_store_ps(sums.exact[r], sum);
    begin = end;
  }
}

// f32 of a strip as planes of bytes.
inline void to_planar(const float* x, std::uint8_t* to) {
  for (int p = 0; p < kPlanar; ++p)
    for (int c = 0; c < kTileColumns; c += 16) {
      const __m512i bits = _mm512_srl_epi32(_mm512_castps_si512(_mm512_loadu_ps(x + c)), _mm_cvtsi32_si128(8 * p));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + p * kTileColumns + c), _mm512_cvtepi32_epi8(bits));
    }
}

#else

// Entries are found one by one, which is faster than gathering, in a table of all that an entry can add: x of 256 columns, −x,
// and for entries marked by the third plane 2x and −2x (five levels) or twice nothing. Then rows are summed.
struct LookedUp {
  alignas(64) std::uint16_t place[kTileRows * kTileColumns + 192];
  alignas(64) float exact[kTileRows * kTileColumns + 192], exact_table[4 * kTileColumns];
  alignas(64) std::int8_t whole[kTileRows * kTileColumns + 192], whole_table[4 * kTileColumns];
};

template <class P>
void find(const TileList& list, const std::uint16_t* __restrict place, const P* __restrict x, int levels, P* __restrict table,
          P* __restrict to) {
  const P twice = levels == 5 ? 2 : 0;
  for (int c = 0; c < kTileColumns; ++c) {
    table[c] = x[c], table[c + kTileColumns] = static_cast<P>(-x[c]);
    table[c + 2 * kTileColumns] = static_cast<P>(twice * x[c]), table[c + 3 * kTileColumns] = static_cast<P>(-twice * x[c]);
  }
  for (int i = 0; i < list.count; i += 4) {
    std::uint64_t four;
    std::memcpy(&four, place + i, sizeof four);
    to[i] = table[(four & 0xffff) / kPlaceUnit], to[i + 1] = table[(four >> 16 & 0xffff) / kPlaceUnit];
    to[i + 2] = table[(four >> 32 & 0xffff) / kPlaceUnit], to[i + 3] = table[(four >> 48) / kPlaceUnit];
  }
}

// Rows of up to so many entries are summed without a branch, which their lengths would often mislead: about all at 85 % zeros.
constexpr int kExactGroups = 40 / f32v::width, kWholeGroups = 64 / (4 * i32v::width);

// Group g of the first n entries; zeros behind them.
inline f32v group_of(const float* p, int g, int n) {
  p += g * f32v::width;
#if defined(__AVX512F__)
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(first_bits(n) >> 16 * g), p)};
#elif defined(__AVX2__)
  const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(8 * g));
  return {_mm256_and_ps(_mm256_loadu_ps(p), _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)))};
#else
  f32v some = set1(0);
  for (int l = 0; l < f32v::width && g * f32v::width + l < n; ++l) some.v[l] = p[l];
  return some;
#endif
}
inline i32v group_of(const std::int8_t* p, int g, int n) {
  p += g * 4 * i32v::width;
#if defined(__AVX512F__)
  return {_mm512_maskz_loadu_epi8(first_bits(n), p)};
#elif defined(__AVX2__)
  alignas(32) static constexpr std::int8_t lanes[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                        16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  const __m256i lane = _mm256_add_epi8(load_bytes(lanes).v, _mm256_set1_epi8(static_cast<char>(32 * g)));
  return {_mm256_and_si256(load_bytes(p).v, _mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(n < 64 ? n : 64)), lane))};
#else
  std::int8_t some[4 * i32v::width] = {};
  for (int l = 0; l < 4 * i32v::width && g * 4 * i32v::width + l < n; ++l) some[l] = p[l];
  return load_bytes(some);
#endif
}

// Σ x of each row.
inline void look_up(const TileList& list, const float* x, int levels, LookedUp& found, RowSums& sums) {
  find(list, found.place, x, levels, found.exact_table, found.exact);
  int begin = list.row[0];
  for (int r = 0; r < kTileRows; ++r) {
    const int end = list.row[r + 1];
    const float* row = found.exact + begin;
    f32v sum = load(sums.exact[r]);
    for (int g = 0; g < kExactGroups; ++g) sum = sum + group_of(row, g, end - begin);
    for (int i = kExactGroups * f32v::width; __builtin_expect(begin + i < end, 0); i += f32v::width)
      sum = sum + group_of(row + i, 0, end - begin - i);
    store(sums.exact[r], sum);
    begin = end;
  }
}

// m · Σ q of each row. |q| < 64 with five levels, so that doubled values are bytes as well.
inline void look_up(const TileList& list, const std::int8_t* q, std::int32_t m, int levels, LookedUp& found, RowSums& sums) {
  find(list, found.place, q, levels, found.whole_table, found.whole);
  const i32v ones = set1_i32(0x01010101), step = set1_i32(m);
  int begin = list.row[0];
  for (int r = 0; r < kTileRows; ++r) {
    const int end = list.row[r + 1];
    const std::int8_t* row = found.whole + begin;
    i32v sum = set1_i32(0);
    for (int g = 0; g < kWholeGroups; ++g) sum = dot4(sum, ones, group_of(row, g, end - begin));
    for (int i = 64; __builtin_expect(begin + i < end, 0); i += 4 * i32v::width)
      sum = dot4(sum, ones, group_of(row + i, 0, end - begin - i));
    store_i32(sums.whole[r], load_i32(sums.whole[r]) + step * sum);
    begin = end;
  }
}

#endif

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
