// Gap planes on CUDA: a warp turns half a tile, 32 rows, into bytes in shared memory. No tables, and no lane waits for another.
//
// First the low bits and the sign of every entry go from planes to a byte each, 1,024 entries at a time: 130 instructions, and 30
// per plane. Then, in rounds of 32 × 16 bits of U, 250 instructions each: a scan of the numbers of ones tells a lane which
// entries are its own; it moves eight of their bytes to the places of the ones in a byte of U (a byte permutation does four); a
// one counts 1 + low bits, a zero 2^k, and a product with 0x01010101 adds them up; a scan of these sums gives positions.
// At 88.5 % zeros half a tile is 940 entries, which take 3 rounds with k = 3, and 5 with k = 2: 1.1 or 1.6 instructions of the
// warp per entry. These are counts of what nvcc 13.0 makes of it for sm_90; nothing here has run on a GPU.
//
// Whatever the bytes are, nothing outside the tile is read (but for up to ten bytes behind it, which the padding makes part of
// the tensor), and nothing outside the warp's HalfTile is written: what leads to an address is clamped or compared.
#pragma once
#include "core/cuda/mma.cuh"
#include "core/gap_planes.h"

namespace effvlm {
namespace {

constexpr int kHalfRows = kTileRows / 2;
constexpr int kLaneBits = 16;        // of U, in a round
constexpr int kWindow = 32 * kWarp;  // entries that are bytes at a time

// Shared memory of a warp.
struct alignas(16) HalfTile {
  std::uint8_t value[kHalfRows * kTileColumns];  // row-major, `pitch` bytes a row
  std::uint8_t entry[kWindow];                   // low bits, 0x40 third plane, 0x80 negative
};

// The bytes that stand for weights of ±1 and ±2, four at once: `negative` holds 0xff or 0 in each.
template <u32 kOneFlip, u32 kOne, u32 kTwoFlip, u32 kTwo>
struct Codes {
  __device__ __forceinline__ static u32 one(u32 negative) { return (negative & kOneFlip * 0x01010101u) ^ kOne * 0x01010101u; }
  __device__ __forceinline__ static u32 two(u32 negative) { return (negative & kTwoFlip * 0x01010101u) ^ kTwo * 0x01010101u; }
};
using SignedBytes = Codes<0xfe, 0x01, 0xfc, 0x02>;  // −2 … 2

template <class T>
__device__ __forceinline__ T load_as(const std::uint8_t* from) {  // aligned
  return *reinterpret_cast<const T*>(from);
}
__device__ __forceinline__ u32 low_bits(u32 word, int n) { return n < 32 ? word & ((1u << n) - 1) : word; }
// Bits 0 … 3 as bytes of 0 or 1; a mask of what else is set must have been taken off.
__device__ __forceinline__ u32 spread_nibble(u32 bits) { return bits * 0x00204081u & 0x01010101u; }
// Four bytes from any offset, and up to seven around them.
__device__ __forceinline__ u32 load_unaligned(const u32* from, unsigned offset) {
  const u32* word = from + offset / 4;
  return shift_right(word[0], word[1], 8 * (offset % 4));
}

// Adds `bit` to the bytes of the entries whose bits are set.
__device__ __forceinline__ void spread_plane(u32 plane, int bit, u32 (&entries)[8]) {
  const u32 even = plane & 0x0f0f0f0f, odd = plane >> 4 & 0x0f0f0f0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) entries[i] |= spread_nibble(permute_bytes(i % 2 ? odd : even, 0, 0x4440 + i / 2)) << bit;
}

struct List {
  const u32* words;
  unsigned offset;  // of the planes' first byte in them
  int count, k, plane_count;
  bool third;

  __device__ __forceinline__ explicit List(const GapTile& tile)
      : words(reinterpret_cast<const u32*>(tile.start)),
        offset(tile.unary_bytes()),
        count(tile.entry.count),
        k(tile.entry.k),
        plane_count(planes_of(tile.entry)),
        third(tile.entry.kind == TileKind::gaps_and_third) {}

  // Entries first … first + kWindow − 1, a byte each, 32 to a lane; `first` is a multiple of 32.
  __device__ __forceinline__ void read(int first, std::uint8_t* to) const {
    const int lane = threadIdx.x % kWarp, at = first + 32 * lane;
    u32 entries[8] = {}, plane[kMaxLowBits], sign = 0, mark = 0;
    if (at < count) {
      const unsigned stride = at / 64 == count / 64 ? (count % 64 + 7) / 8 : 8;  // of the last block, what it holds
      const unsigned from = offset + at / 64 * 8 * plane_count + at % 64 / 8;
#pragma unroll
      for (int p = 0; p < kMaxLowBits; ++p) plane[p] = p < k ? load_unaligned(words, from + p * stride) : 0;
      sign = load_unaligned(words, from + k * stride);
      if (third) mark = load_unaligned(words, from + (k + 1) * stride);
#pragma unroll
      for (int p = 0; p < kMaxLowBits; ++p)
        if (p < k) spread_plane(plane[p], p, entries);
      spread_plane(sign, 7, entries);
      if (third) spread_plane(mark, 6, entries);
    }
    store_pack(reinterpret_cast<u32*>(to) + 8 * lane, Pack<u32>{entries[0], entries[1], entries[2], entries[3]});
    store_pack(reinterpret_cast<u32*>(to) + 8 * lane + 4, Pack<u32>{entries[4], entries[5], entries[6], entries[7]});
  }
};

constexpr u32 kTopBits = 0xba98;  // permute_bytes: of a's four bytes

// The ones of a byte of U.
struct Eight {
  u32 ones, position[2], value[2];  // position: of bit i, counted from the position after the last one before this byte

  __device__ __forceinline__ int advance() const { return static_cast<int>(position[1] >> 24) + 1; }

  template <class Code>
  __device__ __forceinline__ static Eight read(u32 ones, const std::uint8_t* entry, int k, bool third, u32 doubled) {
    Eight result{ones, {}, {}};
    const int skew = static_cast<int>(reinterpret_cast<std::uintptr_t>(entry) % 4);
    const std::uint8_t* word = entry - skew;
    const u32 middle = load_as<u32>(word + 4);
    const u32 first = shift_right(load_as<u32>(word), middle, 8 * skew);
    u32 second = shift_right(middle, load_as<u32>(word + 8), 8 * skew);
    // The eighth entry is there only if all bits are ones; else it is what a zero counts, less 1, and what zeros select.
    if (ones != 0xff) second = permute_bytes(second, (1u << k) - 1, 0x4210);
    u32 bit = (ones | ones << 12) & 0x000f000f;
    bit = (bit | bit << 6) & 0x03030303;
    bit = (bit | bit << 3) & 0x11111111;                              // nibble i: bit i
    const u32 select = (bit * 0x11111110) | (0x77777777u - 7 * bit);  // the ones before it, or 7
    u32 low[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const u32 each = permute_bytes(first, second, select >> 16 * h), negative = permute_bytes(each, 0, kTopBits);
      low[h] = each & 0x1f1f1f1f, result.value[h] = Code::one(negative);
      if (third) {
        const u32 marked = permute_bytes(each << 1, 0, kTopBits);
        result.value[h] = (result.value[h] & ~marked) | (Code::two(negative) & marked & doubled);
      }
    }
    result.position[0] = low[0] * 0x01010101u + 0x03020100u;
    result.position[1] = (low[1] + (result.position[0] >> 24)) * 0x01010101u + 0x04030201u;
    return result;
  }

  // Positions increase from bit to bit, byte to byte and lane to lane whatever the entries are, so that no two meet.
  __device__ __forceinline__ void write(int at, int limit, std::uint8_t* to) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int position_i = add_byte(position[i / 4], i % 4, at);
      if (ones >> i & 1 && static_cast<unsigned>(position_i) < static_cast<unsigned>(limit))
        to[position_i] = static_cast<std::uint8_t>(value[i / 4] >> 8 * (i % 4));
    }
  }
};

// Ones among the first `bits` of U; four loads at a time are under way.
__device__ __forceinline__ int ones_before(const std::uint8_t* unary, int bits) {
  int ones = 0;
#pragma unroll 1
  for (int first = 32 * static_cast<int>(threadIdx.x % kWarp); first < bits; first += 4 * 32 * kWarp)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = first + i * 32 * kWarp;
      if (at < bits) ones += popcount(low_bits(load_as<u32>(unary + (at >> 3)), bits - at));
    }
  return warp_sum(ones);
}

template <class Code>
__device__ __forceinline__ void scatter_list(const GapTile& tile, int pitch, u32 doubled, int half, HalfTile& to) {
  const TileEntry& e = tile.entry;
  const int lane = threadIdx.x % kWarp, bits = 8 * tile.unary_bytes(), middle = e.middle_bit < bits ? e.middle_bit : bits;
  const List list(tile);
  const int begin = half ? middle : 0, end = half ? bits : middle, limit = kHalfRows * pitch;
  int at = begin / kLaneBits * kLaneBits, rank = half ? ones_before(tile.start, middle) : 0;
  const std::uint16_t* next = reinterpret_cast<const std::uint16_t*>(tile.start) + at / kLaneBits + lane;
  const auto load = [&](int ahead) {
    const int left = end - at - kLaneBits * (lane + ahead);
    return left > 0 ? low_bits(next[ahead], left) : 0;
  };
  // The position after the last one, from the half's first. Of row 31's last entry it is known modulo 256, and rows are not
  // empty; the bits before `begin` are counted as zeros.
  int position = half ? e.middle_column - 255 - ((begin - at) << e.k) : 0;
  u32 unary = load(0);
  if (lane == 0) unary &= ~0u << (begin - at);
  while (at < end) {
    const int window = rank & ~31;
    list.read(window, to.entry);
    __syncwarp();  // the window is filled
    for (; at < end; at += kWarp * kLaneBits, next += kWarp) {
      const u32 following = load(kWarp);
      const int ones = popcount(unary), ones_through = warp_inclusive_sum(ones), total = shuffle(ones_through, kWarp - 1);
      if (rank + total + 12 > window + kWindow) break;  // 12: of the last word that a lane may load along
      const std::uint8_t* entry = to.entry + (rank - window + ones_through - ones);
      const auto lower = Eight::read<Code>(unary & 0xff, entry, e.k, list.third, doubled);
      const auto upper = Eight::read<Code>(unary >> 8, entry + popcount(unary & 0xff), e.k, list.third, doubled);
      const int advance = lower.advance() + upper.advance(), through = warp_inclusive_sum(advance);
      const int from = position + through - advance;
      lower.write(from, limit, to.value);
      upper.write(from + lower.advance(), limit, to.value);
      rank += total, position += shuffle(through, kWarp - 1), unary = following;
    }
    __syncwarp();  // everyone is through with the window
  }
}

template <class Code>
__device__ __forceinline__ void scatter_dense(const GapTile& tile, int pitch, u32 doubled, int half, HalfTile& to) {
  const int plane = kTileRows * pitch / 8;
  const std::uint8_t* bytes = tile.start + half * (plane / 2);
  for (int word = threadIdx.x % kWarp; word < kHalfRows * pitch / 32; word += kWarp) {
    const u32 set = load_as<u32>(bytes + 4 * word), negative = load_as<u32>(bytes + plane + 4 * word);
    const u32 large = doubled ? load_as<u32>(bytes + 2 * plane + 4 * word) : 0;
    for (int i = 0; i < 32; i += 4) {
      const u32 minus = 255 * spread_nibble(negative >> i & 15), marked = 255 * spread_nibble(large >> i & 15);
      const u32 value = (Code::one(minus) & ~marked) | (Code::two(minus) & marked);
      *reinterpret_cast<u32*>(to.value + 32 * word + i) = value & 255 * spread_nibble(set >> i & 15);
    }
  }
}

// Rows 32·half … 32·half + 31 of a tile, into to.value; zeros if the directory is corrupt. For whole warps; others see it after
// a __syncwarp.
template <class Code>
__device__ __forceinline__ void read_half(const GapPlanes& w, const GapTile& tile, int pitch, int half, HalfTile& to) {
  const u32 doubled = w.levels == 5 ? ~0u : 0;  // what the third plane marks is of magnitude 2, else a bridge
  u32* zero = reinterpret_cast<u32*>(to.value) + 4 * (threadIdx.x % kWarp);
#pragma unroll 4
  for (int i = 0; i < pitch / 16; i += 2) {  // 2, 4, 8 or 16 packs of a lane
    store_pack(zero + 4 * kWarp * i, Pack<u32>{});
    store_pack(zero + 4 * kWarp * (i + 1), Pack<u32>{});
  }
  __syncwarp();  // zeros come before values
  if (tile.bytes < 0) return;
  if (tile.entry.kind == TileKind::dense) {
    scatter_dense<Code>(tile, pitch, doubled, half, to);
  } else {
    scatter_list<Code>(tile, pitch, doubled, half, to);
  }
}

}  // namespace
}  // namespace effvlm
