#include <cstring>

#include "core/check.h"
#include "core/cpu/parallel.h"
#include "core/gap_planes_pack.h"

namespace effvlm {
namespace {

using i64 = std::int64_t;

struct Extent {
  int rows, width, pitch;
  bool holds(int at) const { return at / pitch < rows && at % pitch < width; }
};

bool bit(const std::uint8_t* bytes, int i) { return bytes[i / 8] >> i % 8 & 1; }

// What is wrong with a tile, or null.
const char* wrong_dense(const GapTile& tile, const Extent& extent, int levels) {
  if (tile.entry.count || tile.entry.middle_bit || tile.entry.middle_column || tile.entry.k)
    return "its entry is not that of a dense tile";
  const int plane = kTileRows * extent.pitch / 8;
  for (int at = 0; at < kTileRows * extent.pitch; ++at) {
    const bool set = bit(tile.start, at);
    if (set && !extent.holds(at)) return "a weight lies outside the matrix";
    for (int p = 1; p < levels / 2 + 1; ++p)
      if (!set && bit(tile.start + p * plane, at)) return "a weight of zero has a sign or magnitude";
  }
  return nullptr;
}

// Reads entries one by one.
struct Reader {
  const GapTile& tile;
  int bits, next = 0, index = 0, position = -1;
  bool negative = false, third = false;

  explicit Reader(const GapTile& t) : tile(t), bits(8 * t.unary_bytes()) {}

  // Returns false at the end of U.
  bool read() {
    const TileEntry& e = tile.entry;
    int gap = 0;
    while (next < bits && !bit(tile.start, next)) ++next, gap += 1 << e.k;
    if (next++ >= bits || index >= e.count) return false;
    const int planes = planes_of(e), whole = index / 64;
    const int bytes = e.count - whole * 64 < 64 ? (e.count % 64 + 7) / 8 : 8;
    const std::uint8_t* block = tile.list() + whole * 8 * planes;
    for (int p = 0; p < e.k; ++p) gap |= bit(block + p * bytes, index % 64) << p;
    negative = bit(block + e.k * bytes, index % 64);
    third = planes > e.k + 1 && bit(block + (e.k + 1) * bytes, index % 64);
    position += gap + 1;
    ++index;
    return true;
  }
};

// Bits of the last block's planes that belong to no entry.
bool has_stray_bits(const GapTile& tile) {
  const int rest = tile.entry.count % 64, bytes = (rest + 7) / 8;
  for (int p = 0; p < planes_of(tile.entry) && rest % 8; ++p)
    if (tile.start[tile.bytes - p * bytes - 1] >> rest % 8) return true;
  return false;
}

const char* wrong_list(const GapTile& tile, const Extent& extent, int levels) {
  const TileEntry& e = tile.entry;
  Reader reader(tile);
  int before = -1, middle_bit = -1, middle_column = 0xff, end = 0;
  while (reader.index < e.count) {
    if (!reader.read()) return "it has fewer entries than its directory says";
    const int row = before < 0 ? -1 : before / extent.pitch;
    const bool bridge = levels == 3 && reader.third;
    if (!(bridge ? reader.position < extent.rows * extent.pitch : extent.holds(reader.position)))
      return "a weight lies outside the matrix";
    if (reader.position - before > kTileColumns || reader.position / extent.pitch > row + 1) return "a gap is too wide";
    if (bridge && reader.negative) return "an entry without a weight has a sign";
    if (middle_bit < 0 && reader.position >= kTileRows / 2 * extent.pitch) middle_bit = end, middle_column = before & 0xff;
    before = reader.position, end = reader.next;
  }
  if (reader.read() || reader.next <= reader.bits) return "it has more entries than its directory says";
  if (middle_bit < 0) middle_bit = end, middle_column = before & 0xff;
  if (middle_bit != e.middle_bit || middle_column != e.middle_column) return "its entry point at row 32 is wrong";
  if (has_stray_bits(tile)) return "bits are set behind its last entry";
  if (tile.bytes - list_bytes(e.count, planes_of(e)) - (end + 7) / 8 >= 4) return "it is longer than its entries";
  return nullptr;
}

void check_tile(const GapPlanes& w, i64 block, i64 s, i64 strips, i64 groups) {
  const Strip strip = strip_at(w.C, s);
  const i64 row = block % blocks_of(w) * kTileRows, rows = w.R - row, width = w.C - strip.column;
  const Extent extent{static_cast<int>(rows < kTileRows ? rows : kTileRows),
                      static_cast<int>(width < strip.pitch ? width : strip.pitch), strip.pitch};
  const std::uint32_t* directory = w.tiles + 2 * (block * strips + s);
  const GapTile tile = tile_at(w, block, s, strips, groups, strip.pitch);
  const char* wrong = tile.bytes < 0                              ? "its directory entry points nowhere"
                      : s % kBaseStrips == 0 && tile.entry.offset ? "its directory entry leaves out data"
                      : directory[1] >> 25                        ? "its directory entry has unknown bits"
                      : tile.entry.kind == TileKind::dense        ? wrong_dense(tile, extent, w.levels)
                                                                  : wrong_list(tile, extent, w.levels);
  EFFVLM_CHECK(!wrong, "ternary: corrupt weights: tile at matrix %lld, row %lld, column %lld: %s",
               static_cast<long long>(block / blocks_of(w)), static_cast<long long>(row), static_cast<long long>(strip.column),
               wrong);
}

}  // namespace

void gap_planes_validate(const GapPlanes& w, std::int64_t first, std::int64_t last, int threads) {
  const i64 strips = strips_of(w.C), groups = groups_of(w), blocks = blocks_of(w), end = w.base[w.E * blocks * groups];
  EFFVLM_CHECK(w.base[0] == 0 && end == w.words - kDataPadding, "ternary: corrupt weights: expected %lld words of data, got %lld",
               static_cast<long long>(end + kDataPadding), static_cast<long long>(w.words));
  for (int i = 0; i < kDataPadding; ++i)
    EFFVLM_CHECK(!w.data[w.words - 1 - i], "ternary: corrupt weights: the padding behind the data is not zeros");
  parallel_for((last - first) * blocks, 1, threads, [&](i64 begin, i64 stop, int) {
    for (i64 block = first * blocks + begin; block < first * blocks + stop; ++block)
      for (i64 s = 0; s < strips; ++s) check_tile(w, block, s, strips, groups);
  });
}

}  // namespace effvlm
