#include "core/gap_planes_pack.h"

#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/cpu/parallel.h"

namespace effvlm {
namespace {

using i64 = std::int64_t;

// The entries of a tile in order. What lies between two neighbours in one row, or in rows next to each other, is less than 256
// positions, and every row up to the last one with a non-zero has an entry: bridges, entries without a weight, see to that.
struct List {
  enum : std::uint8_t { kNegative = 1, kLarge = 2, kBridge = 4 };
  int count = 0, bridges = 0;
  bool fits = true;  // at most kMaxNonZeros
  std::uint16_t position[kMaxNonZeros];
  std::uint8_t flags[kMaxNonZeros];

  void add(int at, std::uint8_t flag) {
    if (count == kMaxNonZeros) {
      fits = false;
      return;
    }
    position[count] = static_cast<std::uint16_t>(at);
    flags[count++] = flag;
  }
  void reach(int at, int pitch) {
    for (int last = count ? position[count - 1] : -1; fits; last += pitch) {
      const int row = last < 0 ? -1 : last / pitch;
      if (at / pitch <= row + 1 && at - last <= kTileColumns) return;
      add(last + pitch, kBridge);
      ++bridges;
    }
  }
  int gap(int i) const { return position[i] - (i ? position[i - 1] : -1) - 1; }
};

struct Source {
  const std::int8_t* first;  // the tile's corner
  i64 stride;
  int rows, width, pitch;
};

Source source_of(const std::int8_t* weights, const GapPlanes& w, i64 block, i64 s) {
  const Strip strip = strip_at(w.C, s);
  const i64 e = block / blocks_of(w), row = block % blocks_of(w) * kTileRows;
  const i64 rows = w.R - row < kTileRows ? w.R - row : kTileRows;
  const i64 width = w.C - strip.column < strip.pitch ? w.C - strip.column : strip.pitch;
  return {weights + (e * w.R + row) * w.C + strip.column, w.C, static_cast<int>(rows), static_cast<int>(width), strip.pitch};
}

template <class F>
void each_weight(const Source& from, F&& f) {
  for (int r = 0; r < from.rows; ++r) {
    const std::int8_t* row = from.first + r * from.stride;
    for (int c = 0; c < from.width; c += 8) {
      const int n = from.width - c < 8 ? from.width - c : 8;
      std::uint64_t eight = 0;
      std::memcpy(&eight, row + c, n);
      for (; eight; eight &= ~(std::uint64_t{0xff} << (__builtin_ctzll(eight) / 8 * 8))) {
        const int i = __builtin_ctzll(eight) / 8;
        f(r * from.pitch + c + i, row[c + i]);
      }
    }
  }
}

void collect(const Source& from, int levels, List& list) {
  const int most = levels == 3 ? 1 : 2;
  each_weight(from, [&](int at, int value) {
    EFFVLM_CHECK(-most <= value && value <= most, "ternary_pack: expected weights in %d … %d, got %d", -most, most, value);
    list.reach(at, from.pitch);
    list.add(at, (value < 0 ? List::kNegative : 0) | (value == 2 || value == -2 ? List::kLarge : 0));
  });
}

// How a tile is stored best: its kind, k, and bytes (whole words).
struct Plan {
  TileKind kind;
  int k, unary_bits, bytes;
};

Plan plan_of(const List& list, int pitch, int levels) {
  bool third = list.bridges > 0;
  for (int i = 0; i < list.count && !third; ++i) third = list.flags[i] & List::kLarge;
  const bool listed = list.fits && !(list.bridges && levels == 5);  // in five levels the third plane is for magnitudes
  Plan best{TileKind::dense, 0, 0, dense_bytes(pitch, levels)};
  int least = best.bytes;
  for (int k = 0; listed && k <= kMaxLowBits; ++k) {
    int bits = list.count;
    for (int i = 0; i < list.count; ++i) bits += list.gap(i) >> k;
    const int bytes = ((bits + 7) / 8 + list_bytes(list.count, k + 1 + third) + 3) / 4 * 4;
    // Of nearly equal sizes the larger k: it has fewer bits in U, which are what costs time to read.
    if (bits <= kMaxUnaryBits && bytes <= (best.kind == TileKind::dense ? best.bytes - 1 : least + least / 256))
      best = {third ? TileKind::gaps_and_third : TileKind::gaps, k, bits, bytes};
    least = bytes < least ? bytes : least;
  }
  return best;
}

void write_entry(const List& list, const Plan& plan, int pitch, std::uint32_t* entry) {
  entry[0] = static_cast<std::uint32_t>(plan.kind) << 30;
  entry[1] = 0;
  if (plan.kind == TileKind::dense) return;
  int middle = 0, bits = 0;
  while (middle < list.count && list.position[middle] < kTileRows / 2 * pitch) bits += 1 + (list.gap(middle++) >> plan.k);
  const int before = middle ? list.position[middle - 1] & 0xff : 0xff;
  entry[0] |= static_cast<std::uint32_t>(list.count) << 16;
  entry[1] = static_cast<std::uint32_t>(bits | before << 14 | plan.k << 22);
}

void set_bit(std::uint8_t* bytes, int i) { bytes[i / 8] |= static_cast<std::uint8_t>(1 << i % 8); }

// `to` is zeros.
void write_list(const List& list, const Plan& plan, std::uint8_t* to) {
  const int planes = plan.k + 1 + (plan.kind == TileKind::gaps_and_third);
  std::uint8_t* block = to + plan.bytes - list_bytes(list.count, planes);
  for (int i = 0, bit = -1; i < list.count; ++i) {
    if (i && i % 64 == 0) block += 8 * planes;
    const int bytes = list.count - i / 64 * 64 < 64 ? (list.count % 64 + 7) / 8 : 8;  // of a plane in this block
    set_bit(to, bit += 1 + (list.gap(i) >> plan.k));
    for (int p = 0; p < plan.k; ++p)
      if (list.gap(i) >> p & 1) set_bit(block + p * bytes, i % 64);
    if (list.flags[i] & List::kNegative) set_bit(block + plan.k * bytes, i % 64);
    if (list.flags[i] & (List::kLarge | List::kBridge)) set_bit(block + (plan.k + 1) * bytes, i % 64);
  }
}

void write_dense(const Source& from, std::uint8_t* to) {
  const int plane = kTileRows * from.pitch / 8;
  each_weight(from, [&](int at, int value) {
    set_bit(to, at);
    if (value < 0) set_bit(to + plane, at);
    if (value == 2 || value == -2) set_bit(to + 2 * plane, at);
  });
}

}  // namespace

std::int64_t gap_planes_measure(const std::int8_t* weights, const GapPlanes& w, std::uint32_t* tiles, std::uint32_t* base,
                                int threads) {
  const i64 strips = strips_of(w.C), groups = groups_of(w), blocks = w.E * blocks_of(w);
  std::vector<std::uint32_t> words(blocks * strips);
  parallel_for(blocks, 1, threads, [&](i64 begin, i64 end, int) {
    for (i64 tile = begin * strips; tile < end * strips; ++tile) {
      const Source from = source_of(weights, w, tile / strips, tile % strips);
      List list;
      collect(from, w.levels, list);
      const Plan plan = plan_of(list, from.pitch, w.levels);
      write_entry(list, plan, from.pitch, tiles + 2 * tile);
      words[tile] = plan.bytes / 4;
    }
  });
  std::uint64_t total = 0;
  for (i64 block = 0; block < blocks; ++block)
    for (i64 s = 0; s < strips; ++s) {
      if (s % kBaseStrips == 0) base[block * groups + s / kBaseStrips] = static_cast<std::uint32_t>(total);
      tiles[2 * (block * strips + s)] |= static_cast<std::uint32_t>(total) - base[block * groups + s / kBaseStrips];
      total += words[block * strips + s];
    }
  EFFVLM_CHECK(total <= 0xffffffff - kDataPadding, "ternary_pack: expected at most 16 GiB of packed data in one tensor");
  base[blocks * groups] = static_cast<std::uint32_t>(total);
  return static_cast<i64>(total) + kDataPadding;
}

void gap_planes_write(const std::int8_t* weights, const GapPlanes& w, std::uint32_t* data, int threads) {
  const i64 strips = strips_of(w.C), groups = groups_of(w);
  std::memset(data + w.words - kDataPadding, 0, 4 * kDataPadding);
  parallel_for(w.E * blocks_of(w), 1, threads, [&](i64 begin, i64 end, int) {
    for (i64 tile = begin * strips; tile < end * strips; ++tile) {
      const Source from = source_of(weights, w, tile / strips, tile % strips);
      const GapTile at = tile_at(w, tile / strips, tile % strips, strips, groups, from.pitch);
      EFFVLM_CHECK(at.bytes >= 0, "ternary_pack: the weights changed while they were packed");
      std::uint8_t* to = reinterpret_cast<std::uint8_t*>(data + (at.start - reinterpret_cast<const std::uint8_t*>(w.data)) / 4);
      std::memset(to, 0, at.bytes);
      if (at.entry.kind == TileKind::dense) {
        write_dense(from, to);
      } else {
        List list;
        collect(from, w.levels, list);
        write_list(list, {at.entry.kind, at.entry.k, 0, at.bytes}, to);
      }
    }
  });
}

}  // namespace effvlm
