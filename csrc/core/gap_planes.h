// Gap planes: how ternary (or five-level) weights are stored below one bit each. docs/gap_planes.md describes every byte; this is
// what packing, checking and the kernels on CPU and CUDA have in common.
//
// A matrix of R rows and C columns is cut into tiles of 64 rows × one strip of columns. A tile lists its non-zeros in row-major
// order as gaps: quotients gap >> k in unary (U), and k planes of low bits, a plane of signs and sometimes a third plane (L).
#pragma once
#include <cstdint>

#if defined(__CUDACC__) || defined(EFFVLM_SIMT)
#define EFFVLM_FORMAT __host__ __device__ inline
#else
#define EFFVLM_FORMAT inline
#endif

namespace effvlm {

// A stack of E matrices as its tensors hold it.
struct GapPlanes {
  std::int64_t E, R, C;
  int levels;                 // 3 or 5
  const std::uint32_t* data;  // tiles; `words` of them, padding included
  std::int64_t words;
  const std::uint32_t* tiles;  // (E, blocks, strips, 2) directory
  const std::uint32_t* base;   // (E, blocks, groups) words, and one more: the end of the last tile
};

namespace {  // internal linkage: compiled once per ISA level, and the linker must not merge the copies

constexpr int kTileRows = 64;      // of a tile
constexpr int kTileColumns = 256;  // of a whole strip; narrower strips hold what is left over
constexpr int kStripUnit = 32;     // strips are 256, 128, 64 or 32 columns wide
constexpr int kBaseStrips = 32;    // strips that share one 32-bit base
constexpr int kMaxLowBits = 5;     // k: eight low parts then sum to less than 256, so that bytes never carry
constexpr int kMaxNonZeros = (1 << 14) - 1, kMaxUnaryBits = (1 << 14) - 1;
constexpr int kDataPadding = 16;  // zero words behind the last tile: kernels read whole vectors

enum class TileKind : int { gaps = 0, gaps_and_third = 1, dense = 2 };

struct Strip {
  std::int64_t column;  // first
  int pitch;            // 256, 128, 64 or 32: columns of a row in the tile's order
};

// C rounded up to 32, as whole strips and then one strip of 128, 64 and 32 columns where these bits are set.
EFFVLM_FORMAT std::int64_t strips_of(std::int64_t C) {
  const std::int64_t units = (C + kStripUnit - 1) / kStripUnit;
  return units / 8 + (units >> 2 & 1) + (units >> 1 & 1) + (units & 1);
}

EFFVLM_FORMAT Strip strip_at(std::int64_t C, std::int64_t s) {
  const std::int64_t units = (C + kStripUnit - 1) / kStripUnit, whole = units / 8;
  if (s < whole) return {s * kTileColumns, kTileColumns};
  std::int64_t column = whole * kTileColumns, left = s - whole;
  for (int pitch = 128; pitch >= kStripUnit; pitch /= 2)
    if (units * kStripUnit & pitch) {
      if (left-- == 0) return {column, pitch};
      column += pitch;
    }
  return {column, kStripUnit};
}

// One directory entry, unpacked.
struct TileEntry {
  unsigned offset;    // of its first word, from its base
  int count;          // entries of the list: non-zeros, and bridges (third plane of three-level weights)
  TileKind kind;      //
  int middle_bit;     // bits of U before the first entry of rows 32 … 63
  int middle_column;  // position modulo 256 of the entry before that one
  int k;              // low bits
};

EFFVLM_FORMAT TileEntry tile_entry(std::uint32_t first, std::uint32_t second) {
  return {first & 0xffff,
          static_cast<int>(first >> 16 & 0x3fff),
          static_cast<TileKind>(first >> 30),
          static_cast<int>(second & 0x3fff),
          static_cast<int>(second >> 14 & 0xff),
          static_cast<int>(second >> 22 & 7)};
}

// Planes of a list: low bits, signs, and the third.
EFFVLM_FORMAT int planes_of(const TileEntry& e) { return e.k + 1 + (e.kind == TileKind::gaps_and_third); }

// Bytes of L: blocks of 64 entries, a 64-bit word per plane; of the last block only the bytes that hold entries.
EFFVLM_FORMAT int list_bytes(int count, int planes) { return planes * (8 * (count / 64) + (count % 64 + 7) / 8); }

EFFVLM_FORMAT int dense_bytes(int pitch, int levels) { return kTileRows * pitch / 8 * (levels == 3 ? 2 : 3); }

EFFVLM_FORMAT std::int64_t blocks_of(const GapPlanes& w) { return (w.R + kTileRows - 1) / kTileRows; }
EFFVLM_FORMAT std::int64_t groups_of(const GapPlanes& w) { return (strips_of(w.C) + kBaseStrips - 1) / kBaseStrips; }

// Where a tile's bytes are. U runs from the start, L ends at the end.
struct GapTile {
  TileEntry entry;
  const std::uint8_t* start;
  int bytes;  // −1: the directory is corrupt, and nothing may be read

  EFFVLM_FORMAT int unary_bytes() const { return bytes - list_bytes(entry.count, planes_of(entry)); }
  EFFVLM_FORMAT const std::uint8_t* list() const { return start + unary_bytes(); }
};

// Tile s of row block b (counted over all matrices). Whatever the directory says, the bytes of the tile lie inside the data.
EFFVLM_FORMAT GapTile tile_at(const GapPlanes& w, std::int64_t block, std::int64_t s, std::int64_t strips, std::int64_t groups,
                              int pitch) {
  const std::uint32_t* directory = w.tiles + (block * strips + s) * 2;
  const std::int64_t group = block * groups + s / kBaseStrips;
  const bool last = s % kBaseStrips == kBaseStrips - 1 || s == strips - 1;
  const TileEntry e = tile_entry(directory[0], directory[1]);
  const std::int64_t begin = static_cast<std::int64_t>(w.base[group]) + e.offset;
  const std::int64_t end = last ? w.base[group + 1] : w.base[group] + static_cast<std::int64_t>(directory[2] & 0xffff);
  GapTile tile{e, reinterpret_cast<const std::uint8_t*>(w.data + begin), static_cast<int>(4 * (end - begin))};
  const bool inside = begin <= end && end <= w.words - kDataPadding && end - begin <= 1 << 12;
  const bool dense = e.kind == TileKind::dense;
  if (!inside || (dense ? tile.bytes != dense_bytes(pitch, w.levels)
                        : e.kind > TileKind::gaps_and_third || e.k > kMaxLowBits ||
                              tile.bytes < list_bytes(e.count, planes_of(e)) || 8 * tile.unary_bytes() > kMaxUnaryBits + 64))
    tile.bytes = -1;
  return tile;
}

}  // namespace
}  // namespace effvlm
