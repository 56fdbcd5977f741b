// One tile of gap planes as a list of columns and values. Whatever the bytes say, nothing outside the tile is read (but for
// kDataPadding words) and nothing outside the list is written.
#pragma once
#include "core/check.h"
#include "core/cpu/simd.h"
#include "core/gap_planes.h"

namespace effvlm::EFFVLM_ISA {

// Entries i of tile row r: row[r] <= i < row[r + 1]. Room for a full tile, and for the last whole vector.
struct TileList {
  int count;
  std::uint16_t row[kTileRows + 1 + 64];
  alignas(64) std::uint8_t column[kTileRows * kTileColumns + 192];
  alignas(64) std::int8_t value[kTileRows * kTileColumns + 192];
};

[[noreturn]] inline void fail_corrupt() { fail("ternary: corrupt weights; TernaryWeight.validate() says where"); }

// The first `bytes` of a word; those behind them are read (the data ends in padding), and dropped.
inline std::uint64_t load_word(const std::uint8_t* from, int bytes = 8) {
  std::uint64_t word;
  std::memcpy(&word, from, sizeof word);
  return bytes < 8 ? word & ((std::uint64_t{1} << 8 * bytes) - 1) : word;
}

// Plane p of the block of 64 entries that starts at entry i.
struct TilePlanes {
  const std::uint8_t* list;
  int count, planes;

  std::uint64_t operator()(int i, int p) const {
    const int left = count - i, bytes = left < 64 ? (left + 7) / 8 : 8;
    return load_word(list + i / 8 * planes + p * bytes, bytes);
  }
};

#if defined(__AVX512BW__)
inline __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }
#endif

#if defined(__AVX512VBMI2__)

// Index vectors of the steps below.
struct ByteOrders {
  alignas(64) std::uint8_t lane[64], before[64], top[64], earlier[64], low[64];
};
constexpr ByteOrders byte_orders() {
  ByteOrders t{};
  for (int i = 0; i < 64; ++i) {
    t.lane[i] = static_cast<std::uint8_t>(i), t.before[i] = static_cast<std::uint8_t>((i + 63) % 64);
    t.top[i] = static_cast<std::uint8_t>(i % 8 * 8 + 7);                // the last byte of each eight, in every eight
    t.earlier[i] = static_cast<std::uint8_t>(i % 8 < i / 8 ? 255 : 0);  // of those, the ones before these eight
    t.low[i] = static_cast<std::uint8_t>(i / 8 % 2 * 8);                // (per 128 bits) the low byte of these eight
  }
  return t;
}
static constexpr ByteOrders kBytes = byte_orders();

// Columns modulo 256 of the ones in U. Returns how many.
inline int read_ones(const GapTile& tile, std::uint8_t* to) {
  const int bytes = tile.unary_bytes();
  const __m512i lane = load_512(kBytes.lane);
  __m512i first = _mm512_setzero_si512();
  int n = 0;
  const auto take = [&](std::uint64_t word) {
    _mm512_storeu_si512(to + n, _mm512_add_epi8(first, _mm512_maskz_compress_epi8(word, lane)));
    first = _mm512_add_epi8(first, _mm512_set1_epi8(64)), n += __builtin_popcountll(word);
  };
  int at = 0;
  for (; at + 8 <= bytes; at += 8) take(load_word(tile.start + at));
  if (at < bytes) take(load_word(tile.start + at, bytes - at));
  return n;
}

// Of 64 entries in turn: columns from the ones in U, and where rows start.
template <int K, bool Narrow>
struct ColumnReader {
  TileList& list;
  __m512i zero = _mm512_setzero_si512(), rank = load_512(kBytes.lane), sum = zero, before = _mm512_set1_epi8(-1), row_bits = zero;
  int rows = 0;

  // Column i: its one's place in U, less i, times 2^K, plus i and the low parts so far. `entries`: which of the 64 there are.
  void read(int i, const std::uint8_t* planes, int bytes, std::uint64_t entries) {
    __m512i low = zero;
    for (int p = 0; p < K; ++p)
      low = _mm512_mask_add_epi8(low, load_word(planes + p * bytes) & entries, low, _mm512_set1_epi8(static_cast<char>(1 << p)));
    low = _mm512_mullo_epi64(low, _mm512_set1_epi64(0x0101010101010101));  // sums within each eight: they do not reach 256
    const __m512i tops = _mm512_permutexvar_epi8(load_512(kBytes.top), low), order = load_512(kBytes.low);
    const __m512i earlier = _mm512_sad_epu8(_mm512_and_si512(tops, load_512(kBytes.earlier)), zero);
    const __m512i quotient = _mm512_slli_epi16(_mm512_sub_epi8(load_512(list.column + i), rank), K);
    const __m512i shifted = _mm512_and_si512(quotient, _mm512_set1_epi8(static_cast<char>(0xff << K)));
    const __m512i eights = _mm512_add_epi8(low, _mm512_shuffle_epi8(earlier, order));
    const __m512i column = _mm512_add_epi8(eights, _mm512_add_epi8(_mm512_add_epi8(shifted, rank), sum));
    sum = _mm512_add_epi8(sum, _mm512_shuffle_epi8(_mm512_sad_epu8(tops, zero), order));
    rank = _mm512_add_epi8(rank, _mm512_set1_epi8(64));
    _mm512_store_si512(list.column + i, column);
    start_rows(i, column, entries);
  }

  void start_rows(int i, __m512i column, std::uint64_t entries) {
    const __m512i turned = _mm512_permutexvar_epi8(load_512(kBytes.before), column);  // lane 0: the last, for the next 64
    const __m512i previous = _mm512_mask_mov_epi8(turned, 1, before);
    before = turned;
    std::uint64_t starts = Narrow ? _mm512_test_epi8_mask(_mm512_xor_si512(column, previous), row_bits) | (i == 0)
                                  : _mm512_cmple_epu8_mask(column, previous);
    starts &= entries;
    if (rows > kTileRows) fail_corrupt();  // there is room for what 64 more add
    const __m512i at = _mm512_maskz_compress_epi8(starts, load_512(kBytes.lane)),
                  first = _mm512_set1_epi16(static_cast<short>(i));
    const int count = __builtin_popcountll(starts);
    _mm512_storeu_si512(list.row + rows, _mm512_add_epi16(first, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(at))));
    if (count > 32)  // sparse tiles
      _mm512_storeu_si512(list.row + rows + 32, _mm512_add_epi16(first, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(at, 1))));
    rows += count;
  }
};

template <int K, bool Narrow>
void read_columns(const TilePlanes& planes, int pitch, TileList& list) {
  ColumnReader<K, Narrow> reader{list};
  reader.row_bits = _mm512_set1_epi8(static_cast<char>(0x100 - pitch));
  const std::uint8_t* at = planes.list;
  int i = 0;
  for (; i + 64 <= list.count; i += 64, at += 8 * planes.planes) reader.read(i, at, 8, ~std::uint64_t{0});
  if (i < list.count) reader.read(i, at, (list.count - i + 7) / 8, (std::uint64_t{1} << (list.count - i)) - 1);
  if (reader.rows > kTileRows) fail_corrupt();
  for (int row = reader.rows; row <= kTileRows; ++row) list.row[row] = static_cast<std::uint16_t>(list.count);
}

#elif defined(__AVX2__)

// Places of the ones of a byte, in order.
struct OnesOfByte {
  alignas(64) std::uint8_t place[256][8];
};
constexpr OnesOfByte ones_of_byte() {
  OnesOfByte t{};
  for (int byte = 0; byte < 256; ++byte)
    for (int bit = 0, n = 0; bit < 8; ++bit)
      if (byte >> bit & 1) t.place[byte][n++] = static_cast<std::uint8_t>(bit);
  return t;
}
static constexpr OnesOfByte kOnes = ones_of_byte();

// Columns modulo 256 of the ones in U. Returns how many.
inline int read_ones(const GapTile& tile, std::uint8_t* to) {
  const int bytes = tile.unary_bytes();
  int n = 0;
  const auto take = [&](std::uint64_t word, int at, int count) {
    for (int j = 0; j < count; ++j, word >>= 8) {
      std::uint64_t places;
      std::memcpy(&places, kOnes.place[word & 0xff], 8);
      places += std::uint64_t{0x0808080808080808} * static_cast<std::uint64_t>((at & 31) + j);  // stays within every byte
      std::memcpy(to + n, &places, 8), n += __builtin_popcount(word & 0xff);
    }
  };
  int at = 0;
  for (; at + 8 <= bytes; at += 8) take(load_word(tile.start + at), at, 8);
  take(load_word(tile.start + at, bytes - at), at, bytes - at);
  return n;
}

// A byte of ones for every bit that is set.
inline __m256i bytes_of_bits(std::uint32_t bits) {
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<long long>(0x8040201008040201));
  const __m256i byte = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), spread);
  return _mm256_cmpeq_epi8(_mm256_and_si256(byte, bit), bit);
}

// Inclusive sums of 32 bytes, modulo 256.
inline __m256i sums_of_bytes(__m256i v) {
  v = _mm256_add_epi8(v, _mm256_slli_si256(v, 1)), v = _mm256_add_epi8(v, _mm256_slli_si256(v, 2));
  v = _mm256_add_epi8(v, _mm256_slli_si256(v, 4)), v = _mm256_add_epi8(v, _mm256_slli_si256(v, 8));
  return _mm256_add_epi8(v, _mm256_shuffle_epi8(_mm256_permute2x128_si256(v, v, 0x08), _mm256_set1_epi8(15)));
}

// As for AVX-512, 32 entries at a time.
template <int K, bool Narrow>
struct ColumnReader {
  TileList& list;
  __m256i row_bits, rank, sum = _mm256_setzero_si256(), before = _mm256_set1_epi8(-1);
  int rows = 0;

  ColumnReader(TileList& list, int pitch)
      : list(list),
        row_bits(_mm256_set1_epi8(static_cast<char>(0x100 - pitch))),
        rank(_mm256_sub_epi8(sums_of_bytes(_mm256_set1_epi8(1)), _mm256_set1_epi8(1))) {}

  // Entries i … i + 31, in the lower half of their planes' words; gives a bit for each that starts a row.
  std::uint32_t read(int i, const std::uint64_t* word) {
    __m256i low = _mm256_setzero_si256();
    for (int p = 0; p < K; ++p) {
      const __m256i set = bytes_of_bits(static_cast<std::uint32_t>(word[p]));
      low = _mm256_or_si256(low, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(1 << p))));
    }
    low = sums_of_bytes(low);
    auto* at = reinterpret_cast<__m256i*>(list.column + i);
    const __m256i quotient = _mm256_slli_epi16(_mm256_sub_epi8(_mm256_load_si256(at), rank), K);
    const __m256i shifted = _mm256_and_si256(quotient, _mm256_set1_epi8(static_cast<char>(0xff << K)));
    const __m256i column = _mm256_add_epi8(_mm256_add_epi8(low, sum), _mm256_add_epi8(rank, shifted));
    sum = _mm256_add_epi8(sum, _mm256_broadcastb_epi8(_mm_srli_si128(_mm256_extracti128_si256(low, 1), 15)));
    rank = _mm256_add_epi8(rank, _mm256_set1_epi8(32));
    _mm256_store_si256(at, column);
    const __m256i previous = _mm256_alignr_epi8(column, _mm256_permute2x128_si256(before, column, 0x21), 15);
    before = column;
    const __m256i other =
        Narrow ? _mm256_and_si256(_mm256_xor_si256(column, previous), row_bits) : _mm256_subs_epu8(column, previous);
    const auto none = static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(other, _mm256_setzero_si256())));
    return Narrow ? ~none | (i == 0) : none;
  }

  void start_rows(int i, std::uint64_t starts) {
    if (rows > kTileRows) fail_corrupt();  // there is room for what 64 more add
    std::uint16_t* to = list.row + rows;
    rows += __builtin_popcountll(starts);
    for (int n = 0; n < 6; ++n, starts &= starts - 1) to[n] = static_cast<std::uint16_t>(i + _tzcnt_u64(starts));
    for (to += 6; __builtin_expect(starts != 0, 0); starts &= starts - 1)  // sparse tiles
      *to++ = static_cast<std::uint16_t>(i + _tzcnt_u64(starts));
  }
};

template <int K, bool Narrow>
void read_columns(const TilePlanes& planes, int pitch, TileList& list) {
  ColumnReader<K, Narrow> reader{list, pitch};
  for (int i = 0; i < list.count; i += 64) {
    std::uint64_t word[K + 1];
    for (int p = 0; p < K; ++p) word[p] = planes(i, p);
    const std::uint64_t first = reader.read(i, word);
    for (int p = 0; p < K; ++p) word[p] >>= 32;
    const std::uint64_t starts = first | static_cast<std::uint64_t>(reader.read(i + 32, word)) << 32;
    const int left = list.count - i;
    reader.start_rows(i, left < 64 ? starts & ((std::uint64_t{1} << left) - 1) : starts);
  }
  if (reader.rows > kTileRows) fail_corrupt();
  for (int row = reader.rows; row <= kTileRows; ++row) list.row[row] = static_cast<std::uint16_t>(list.count);
}

#else

// Columns modulo 256 of the ones in U, less their numbers: quotients, summed up. Returns how many.
inline int read_quotients(const GapTile& tile, std::uint8_t* to) {
  const int bytes = tile.unary_bytes();
  int n = 0;
  for (int at = 0; at < bytes; at += 8)
    for (std::uint64_t word = load_word(tile.start + at, bytes - at < 8 ? bytes - at : 8); word; word &= word - 1, ++n)
      to[n] = static_cast<std::uint8_t>(8 * at + __builtin_ctzll(word) - n);
  return n;
}

// Columns, and where rows start: where a position's row is not that of the one before.
inline void read_columns(const GapTile& tile, int pitch, const TilePlanes& planes, TileList& list) {
  const int k = tile.entry.k, row_bits = 0x100 - pitch;
  int row = 0, before = 0xff, low = -1;
  list.row[0] = 0;
  for (int i = 0; i < list.count; i += 64) {
    std::uint64_t word[kMaxLowBits];
    for (int p = 0; p < k; ++p) word[p] = planes(i, p);
    const int n = list.count - i < 64 ? list.count - i : 64;
    for (int j = 0; j < n; ++j) {
      for (int p = 0; p < k; ++p) low += static_cast<int>(word[p] >> j & 1) << p;
      ++low;
      const int column = (low + (list.column[i + j] << k)) & 0xff;
      const bool starts = pitch == kTileColumns ? column <= before : (column ^ before) & row_bits;
      if (starts && i + j) {
        if (++row == kTileRows) fail_corrupt();
        list.row[row] = static_cast<std::uint16_t>(i + j);
      }
      list.column[i + j] = static_cast<std::uint8_t>(column), before = column;
    }
  }
  while (row < kTileRows) list.row[++row] = static_cast<std::uint16_t>(list.count);
}

inline void read_positions(const GapTile& tile, int pitch, const TilePlanes& planes, TileList& list) {
  if (read_quotients(tile, list.column) != list.count) fail_corrupt();
  read_columns(tile, pitch, planes, list);
}

#endif

#if defined(__AVX2__)

template <bool Narrow>
void read_columns(int k, const TilePlanes& planes, int pitch, TileList& list) {
  switch (k) {
    case 0: return read_columns<0, Narrow>(planes, pitch, list);
    case 1: return read_columns<1, Narrow>(planes, pitch, list);
    case 2: return read_columns<2, Narrow>(planes, pitch, list);
    case 3: return read_columns<3, Narrow>(planes, pitch, list);
    case 4: return read_columns<4, Narrow>(planes, pitch, list);
    default: return read_columns<5, Narrow>(planes, pitch, list);
  }
}

inline void read_positions(const GapTile& tile, int pitch, const TilePlanes& planes, TileList& list) {
  if (read_ones(tile, list.column) != list.count) fail_corrupt();
  pitch == kTileColumns ? read_columns<false>(tile.entry.k, planes, pitch, list)
                        : read_columns<true>(tile.entry.k, planes, pitch, list);
}

#endif

inline void read_dense(const GapTile& tile, int pitch, int levels, TileList& list) {
  const int plane = kTileRows * pitch / 8;
  int n = 0;
  for (int row = 0; row < kTileRows; ++row) {
    list.row[row] = static_cast<std::uint16_t>(n);
    for (int c = 0; c < pitch; ++c) {
      const int bit = row * pitch + c;
      const auto at = [&](int p) { return tile.start[p * plane + bit / 8] >> bit % 8 & 1; };
      if (!at(0)) continue;
      const int size = 1 + (levels == 5 && at(2));
      list.column[n] = static_cast<std::uint8_t>(bit & 0xff), list.value[n++] = static_cast<std::int8_t>(at(1) ? -size : size);
    }
  }
  list.row[kTileRows] = static_cast<std::uint16_t>(list.count = n);
}

inline void read_values(const TilePlanes& planes, int k, int levels, TileList& list) {
  const bool third = planes.planes > k + 1;
  for (int i = 0; i < list.count; i += 64) {
    const std::uint64_t negative = planes(i, k), marked = third ? planes(i, k + 1) : 0;
#if defined(__AVX512F__)
    const __m512i one = _mm512_set1_epi8(1),
                  size = levels == 5 ? _mm512_mask_add_epi8(one, marked, one, one) : _mm512_maskz_mov_epi8(~marked, one);
    _mm512_store_si512(list.value + i, _mm512_mask_sub_epi8(size, negative, _mm512_setzero_si512(), size));
#elif defined(__AVX2__)
    for (int h = 0; h < 64; h += 32) {
      const __m256i one = _mm256_set1_epi8(1), flip = bytes_of_bits(static_cast<std::uint32_t>(negative >> h));
      const __m256i mark = bytes_of_bits(static_cast<std::uint32_t>(marked >> h));
      const __m256i size = levels == 5 ? _mm256_sub_epi8(one, mark) : _mm256_andnot_si256(mark, one);
      const __m256i value = _mm256_sub_epi8(_mm256_xor_si256(size, flip), flip);
      _mm256_store_si256(reinterpret_cast<__m256i*>(list.value + i + h), value);
    }
#else
    const int n = list.count - i < 64 ? list.count - i : 64;
    for (int j = 0; j < n; ++j) {
      const int size = marked >> j & 1 ? (levels == 5 ? 2 : 0) : 1;
      list.value[i + j] = static_cast<std::int8_t>(negative >> j & 1 ? -size : size);
    }
#endif
  }
}

// Columns are modulo 256: of a narrow strip, (row · pitch + column) % 256.
inline void read_tile(const GapTile& tile, int pitch, int levels, TileList& list) {
  if (tile.bytes < 0) fail_corrupt();
  if (tile.entry.kind == TileKind::dense) return read_dense(tile, pitch, levels, list);
  list.count = tile.entry.count;
  const TilePlanes planes{tile.list(), list.count, planes_of(tile.entry)};
  read_positions(tile, pitch, planes, list);
  read_values(planes, tile.entry.k, levels, list);
}

// What each entry adds, as a place in a table of four times 256: x of its column, −x, and with the third plane what is twice that
// (five levels) or nothing. Places count in eighths, which is what addresses of large lines want.
constexpr int kPlaceUnit = 8;
inline void find_places(const TileList& list, std::uint16_t* __restrict to) {
  const std::uint8_t* __restrict column = list.column;
  const std::int8_t* __restrict value = list.value;
  const int n = list.count;
  for (int i = 0; i < n; ++i) {
    const int negative = value[i] < 0, marked = value[i] != 1 && value[i] != -1;
    to[i] = static_cast<std::uint16_t>((column[i] | negative << 8 | marked << 9) * kPlaceUnit);
  }
  for (int i = n; i < n + 3; ++i) to[i] = 0;  // places are looked up four at a time
}

}  // namespace effvlm::EFFVLM_ISA
